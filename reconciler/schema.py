"""What a settings file may hold: each key, and what is allowed there.

The tables are the fields of the rooms' own dataclasses, so that a room's new number can be
set at once. Imported only where there is a file to check.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from reconciler.ladder import Ladder
from reconciler.logs import Form, Level
from reconciler.rpc_writer import WritePolicy
from reconciler.state import AboutLeftovers, Policy

Text = Annotated[str, msgspec.Meta(pattern="^[^\0]*$")]
Texts = tuple[Text, ...]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Pauses = tuple[Annotated[float, msgspec.Meta(ge=0, le=86_400)], ...]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000)]

_ALLOWED: Mapping[Any, str] = {
    Text: "a text without NUL",
    Texts: "a list of texts without NUL",
    Seconds: "seconds above 0, 86400 at most",
    Pauses: "a list of seconds from 0 to 86400",
    Count: "a whole number from 1 to 1000",
}
_OF_A_ROOM: Mapping[Any, Any] = {
    float: Seconds,
    int: Count,
    tuple[float, ...]: Pauses,
    AboutLeftovers: AboutLeftovers,
}


def _keys(room: type) -> dict[str, Any]:
    """The fields of a room's dataclass, each with what a file may say there."""
    hints = typing.get_type_hints(room)
    return {field.name: _OF_A_ROOM[hints[field.name]] for field in dataclasses.fields(room)}


KEYS: Mapping[str, Any] = {
    "sessions_dir": Text,
    "programs": Texts,
    "keeper_command": Texts,
    "agent_command": Texts,
    "resync": Seconds,
    "policy": _keys(Policy),
    "ladder": _keys(Ladder),
    "write": _keys(WritePolicy),
    "log": {"level": Level, "form": Form},
}
"""Every key and its type; a dictionary is a table."""

_PRIVATE = frozenset({"agent_command"})
_UNTOLD = "something else (not repeated here)"
# Whose values no error repeats: an agent may be given a secret among its arguments.


def read(text: bytes) -> dict[str, Any]:
    """Read a settings file's text into the arguments of `reconciler.settings.Settings`.

    What the file does not say is left out.

    Raises:
        ValueError: it is no TOML, or all that is wrong with its keys and values.
    """
    try:
        raw = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"this is not TOML: {error}") from error
    except RecursionError:
        raise ValueError("its lists or tables are nested too deep") from None
    problems: list[str] = []
    said = _table(raw, KEYS, "", problems)
    if problems:
        raise ValueError("; ".join(problems))
    return _arguments(said)


def _table(
    raw: Mapping[str, Any], keys: Mapping[str, Any], place: str, problems: list[str]
) -> dict[str, Any]:
    """Take in one table; what is wrong with it is noted."""
    said: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{place}{key}"
        kind = keys.get(key)
        if kind is None:
            problems.append(f"{name} is no setting, allowed: {', '.join(keys)}")
        elif isinstance(kind, Mapping):
            if isinstance(value, dict):
                said[key] = _table(value, kind, f"{name}.", problems)
            else:
                problems.append(f"{name} is {_found(value)}, allowed: a table [{name}]")
        else:
            try:
                said[key] = msgspec.convert(value, kind)
            except msgspec.ValidationError:
                found = _UNTOLD if key in _PRIVATE else _found(value)
                problems.append(f"{name} is {found}, allowed: {_allowed(kind)}")
    return said


def _allowed(kind: Any) -> str:  # noqa: ANN401 - any type that msgspec knows
    words = _ALLOWED.get(kind)
    return words or f"one of {', '.join(typing.get_args(kind))}"


def _found(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


_LONGEST = 60


def _arguments(said: dict[str, Any]) -> dict[str, Any]:
    log = said.pop("log", {})
    arguments = said | {f"log_{key}": value for key, value in log.items()}
    for key, room in (("policy", Policy), ("ladder", Ladder), ("write", WritePolicy)):
        if key in said:
            arguments[key] = room(**said[key])
    if "programs" in said:
        arguments["programs"] = frozenset(said["programs"])
    if "sessions_dir" in said:
        folder = said["sessions_dir"]
        arguments["sessions_dir"] = Path(os.path.expanduser(folder)) if folder else None
    return arguments
