"""Where settings come from: defaults, the file, variables, flags; each beats the one before it.

All that is wrong is found at once: in which source, under which key, what was found, and what
is allowed. Nothing is taken from sources of which one is wrong.
"""

from __future__ import annotations

import difflib
import itertools
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from reconciler.layout import PREFIX
from reconciler.schema import KEYS, TABLES, Key

_UNTOLD = "something else (not repeated here)"
_LONGEST = 60

_MOST_DOTS = 1_000_000
# Squares of the dots in each line, together: what 8 MB of a dotted key's beginnings have.


class Origin(Enum):
    """Who says a setting, the weakest first."""

    DEFAULT = "default"
    FILE = "file"
    VARIABLE = "variable"
    FLAG = "flag"


class Said(NamedTuple):
    """A setting's value, and who says it.

    Attributes:
        value: as a file would say it.
        origin: what kind of source it is from.
        source: its name there: the file, the variable or the flag.
    """

    value: Any
    origin: Origin = Origin.DEFAULT
    source: str = ""


class Problem(NamedTuple):
    """Something that is wrong: in which source, and what."""

    source: str
    told: str

    def __str__(self) -> str:
        return f"{self.source}: {self.told}"


class SourcesError(Exception):
    """Settings that cannot be used: all problems."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(joined(self.problems))


def joined(problems: Iterable[Problem]) -> str:
    """All problems in one line; a source is named before the first of its own."""
    groups = itertools.groupby(problems, lambda problem: problem.source)
    return "; ".join(
        f"{source}: " + "; ".join(problem.told for problem in group) for source, group in groups
    )


def gather(
    text: bytes, source: str, variables: Mapping[str, str], flags: Mapping[str, Any]
) -> Mapping[str, Said]:
    """Every key with its value, and who says it.

    Args:
        text: the file's content; empty for none.
        source: what to call the file in a problem.
        variables: environment variables that are settings, by their names.
        flags: what the command line says, by the keys' full names.

    Raises:
        SourcesError: all that is wrong.
    """
    problems: list[Problem] = []
    said = {name: Said(key.default) for name, key in KEYS.items()}
    said |= _from_file(text, source, problems)
    said |= _from_variables(variables, problems)
    said |= _from_flags(flags, problems)
    if problems:
        raise SourcesError(problems)
    return said


def arguments(said: Mapping[str, Said]) -> dict[str, Any]:
    """What `reconciler.settings.Settings` is made with; what nobody says is left out.

    Raises:
        SourcesError: values that do not go together, as a room says.
    """
    chosen = {name: each.value for name, each in said.items() if each.origin is not Origin.DEFAULT}
    made = {name: _AS_TAKEN.get(name, _as_it_is)(chosen[name]) for name in chosen if name in _TOP}
    problems = []
    for table, room in TABLES.items():
        fields = {KEYS[name].field: chosen[name] for name in chosen if KEYS[name].table == table}
        try:
            made |= {table: room(**fields)} if fields else {}
        except ValueError as error:
            problems.append(Problem(f"[{table}]", str(error)))
    if problems:
        raise SourcesError(problems)
    return made


def _as_it_is(value: Any) -> Any:  # noqa: ANN401 - any setting
    return value


def as_folder(text: str) -> Path | None:
    """A folder that a setting names, or None for the default one."""
    return Path(os.path.expanduser(text)) if text else None


_TOP = frozenset(name for name, key in KEYS.items() if not key.table)
_AS_TAKEN: Mapping[str, Callable[[Any], Any]] = {
    "sessions_dir": as_folder,
    "programs": frozenset,
}


# -- The file ----------------------------------------------------------------------------------


def _from_file(text: bytes, source: str, problems: list[Problem]) -> dict[str, Said]:
    said: dict[str, Said] = {}
    try:
        raw = _parsed(text)
    except ValueError as error:  # no TOML, no UTF-8, or a number of more digits than Python reads
        problems.append(Problem(source, f"this is not TOML: {error}"))
        return said
    except RecursionError:
        problems.append(Problem(source, "its lists or tables are nested too deep"))
        return said
    for table, field, value in _flat(raw):
        name = f"{table}.{field}" if table else field
        key = _BY_PLACE.get((table, field))
        if not table and field in TABLES:
            told = f"{name} is {_found(value)}, allowed: a table [{name}]"
            problems.append(Problem(source, told))
        elif key is None:
            problems.append(Problem(source, _unknown(table, field)))
        else:
            try:
                said[name] = Said(msgspec.convert(value, key.kind), Origin.FILE, source)
            except msgspec.ValidationError:
                problems.append(Problem(source, _wrong(name, value, key)))
    return said


def _parsed(text: bytes) -> Mapping[str, Any]:
    # Of a dotted key tomllib keeps every beginning: 200 kB of one would take all memory.
    if sum(line.count(b".") ** 2 for line in text.splitlines()) > _MOST_DOTS:
        raise RecursionError
    return tomllib.loads(text.decode())


_BY_PLACE = {(key.table, key.field): key for key in KEYS.values()}


def _flat(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Table, key and value of all; only what should be a table is looked into."""
    for key, value in raw.items():
        if key in TABLES and isinstance(value, dict):
            yield from ((key, field, inner) for field, inner in value.items())
        else:
            yield "", key, value


def _unknown(table: str, field: str) -> str:
    place = f"{table}." if table else ""
    here = [key.field for key in KEYS.values() if key.table == table]
    here += [] if table else TABLES
    near = [place + each for each in difflib.get_close_matches(field, here)]
    near += [key.name for key in KEYS.values() if key.field == field]
    return f"{_plain(place + field)} is no setting{_meant(near)}, allowed: {', '.join(here)}"


def _meant(near: Sequence[str]) -> str:
    return f" (did you mean {near[0]}?)" if near else ""


# -- Variables and flags -----------------------------------------------------------------------


def _from_variables(variables: Mapping[str, str], problems: list[Problem]) -> dict[str, Said]:
    said: dict[str, Said] = {}
    keys = {key.variable: key for key in KEYS.values()}
    for variable, text in variables.items():
        key = keys.get(variable)
        if key is None:
            meant = _meant(_near(variable, keys))
            allowed = f"{PREFIX}<KEY>, {PREFIX}<TABLE>_<KEY> (pi-reconciler config schema has all)"
            told = f"{_plain(variable)} is no setting{meant}, allowed: {allowed}"
            problems.append(Problem("environment", told))
            continue
        try:
            said[key.name] = Said(_read(text, key), Origin.VARIABLE, variable)
        except ValueError:  # msgspec's own errors are some
            form = ", as a JSON array" if key.is_list else ""
            problems.append(Problem("environment", _wrong(variable, text, key) + form))
    return said


def _near(variable: str, known: Iterable[str]) -> list[str]:
    """Those that are meant, perhaps: what all begin with makes nothing alike."""
    bare = [name.removeprefix(PREFIX) for name in known]
    near = difflib.get_close_matches(variable.removeprefix(PREFIX), bare)
    return [PREFIX + name for name in near]


def _read(text: str, key: Key) -> Any:  # noqa: ANN401 - any setting
    """The value that a variable's text says."""
    if key.is_list:
        return msgspec.json.decode(text, type=key.kind)
    return msgspec.convert(text, key.kind, strict=False)


def _from_flags(flags: Mapping[str, Any], problems: list[Problem]) -> dict[str, Said]:
    said: dict[str, Said] = {}
    for name, value in flags.items():
        key = KEYS[name]
        flag = "--" + name.replace(".", "-").replace("_", "-")
        try:
            said[name] = Said(msgspec.convert(value, key.kind), Origin.FLAG, flag)
        except msgspec.ValidationError:
            problems.append(Problem("command line", _wrong(flag, value, key)))
    return said


# -- Words -------------------------------------------------------------------------------------


def _wrong(name: str, value: object, key: Key) -> str:
    found = _UNTOLD if key.private else _found(value)
    return f"{name} is {found}, allowed: {key.allowed}"


def _found(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # it has more digits than Python writes
        return "a number too long"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _plain(name: str) -> str:
    return name if name.isprintable() else repr(name)
