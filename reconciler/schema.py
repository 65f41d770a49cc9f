"""What settings there are: each key, what is allowed there, and what names it goes by.

The tables are the fields of the rooms' own dataclasses, so that a room's new number can be
set at once, in the file and by a variable. Imported only where there is something to check.

To add a key to a table: a field with a default in the room's dataclass, the same key with a comment
in ``config/pi-reconciler.toml`` and a row in ``docs/settings.md``, and
``pi-reconciler config schema > config/pi-reconciler.schema.json``. To add a table:
its dataclass in `TABLES`, and a field of its name in `reconciler.settings.Settings`. To have it
taken at SIGHUP: its name in `AT_ONCE`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from reconciler.addresses import MetricsSettings
from reconciler.budget import LogBudget
from reconciler.ladder import Ladder
from reconciler.layout import PREFIX
from reconciler.log_settings import LogSettings
from reconciler.ranges import Pattern, Range
from reconciler.restarts import RestartLimits
from reconciler.rpc_writer import WritePolicy
from reconciler.state import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """The keys that stand outside of the tables, as a file says them."""

    sessions_dir: str = ""
    programs: tuple[str, ...] = ()
    keeper_command: tuple[str, ...] = ()
    agent_command: tuple[str, ...] = ()
    resync: float = 60.0


TABLES: Mapping[str, type] = {
    "policy": Policy,
    "restart": RestartLimits,
    "ladder": Ladder,
    "write": WritePolicy,
    "log": LogSettings,
    "log_budget": LogBudget,
    "metrics": MetricsSettings,
}
"""Every table of the file, and the dataclass that its keys are the fields of."""

AT_ONCE = frozenset(
    {
        *("resync", "programs", "keeper_command", "agent_command", "log.level"),
        *("policy", "restart", "ladder", "write", "log_budget"),
    }
)
"""Keys, and whole tables, that a running daemon takes at SIGHUP; others wait for its next start."""

_PRIVATE = frozenset({"agent_command"})
# Whose values no error repeats: an agent may be given a secret among its arguments.


@dataclass(frozen=True, slots=True)
class Key:
    """One setting.

    Attributes:
        name: as it is told: ``policy.settle``.
        kind: what msgspec checks a value by.
        allowed: the same in words.
        default: its value where nobody says one.
    """

    name: str
    kind: Any
    allowed: str
    default: Any

    @property
    def table(self) -> str:
        """The table it stands in; empty for none."""
        return self.name.rpartition(".")[0]

    @property
    def field(self) -> str:
        """What it is called within its table."""
        return self.name.rpartition(".")[2]

    @property
    def variable(self) -> str:
        """The environment variable that says it."""
        return PREFIX + self.name.upper().replace(".", "_")

    @property
    def at_once(self) -> bool:
        """Whether a running daemon takes a new value at SIGHUP."""
        return bool({self.name, self.table} & AT_ONCE)

    @property
    def private(self) -> bool:
        """Whether its value may hold a secret, and is told to nobody but its owner."""
        return self.name in _PRIVATE

    @property
    def is_list(self) -> bool:
        """Whether it holds a list; a variable says that as a JSON array."""
        return typing.get_origin(self.kind) is tuple


Text = Annotated[str, msgspec.Meta(pattern="^[^\0]*$")]

_SECONDS = Range(0, 86_400, "seconds", above=True)
_COUNT = Range(1, 1_000)
_PAUSE = Range(0, 86_400, "seconds")
Pauses = tuple[Annotated[float, msgspec.Meta(ge=_PAUSE.low, le=_PAUSE.high)], ...]


def _number(kind: type, span: Range) -> Any:  # noqa: ANN401 - a type
    if span.above:
        return Annotated[kind, msgspec.Meta(gt=span.low, le=span.high)]
    return Annotated[kind, msgspec.Meta(ge=span.low, le=span.high)]


_KINDS: Mapping[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    str: (Text, "a text without NUL"),
    tuple[str, ...]: (tuple[Text, ...], "a list of texts without NUL"),
    float: (_number(float, _SECONDS), str(_SECONDS)),
    int: (_number(int, _COUNT), str(_COUNT)),
    tuple[float, ...]: (Pauses, f"a list of {_PAUSE}"),
}
"""What a plain annotation stands for; an `Annotated` one says its own `Range` or `Pattern`."""


def _kind(hint: Any) -> tuple[Any, str]:  # noqa: ANN401 - a type
    if typing.get_origin(hint) is Literal:
        return hint, f"one of {', '.join(typing.get_args(hint))}"
    if typing.get_origin(hint) is Annotated:
        kind, span = typing.get_args(hint)
        if isinstance(span, Pattern):
            return Annotated[kind, msgspec.Meta(pattern=span.regex)], str(span)
        return _number(kind, span), str(span)
    return _KINDS[hint]


def _keys(room: type, place: str = "") -> dict[str, Key]:
    """The fields of a room's dataclass, each as a key."""
    hints = typing.get_type_hints(room, include_extras=True)
    return {
        name: Key(name, *_kind(hints[field.name]), field.default)
        for field in dataclasses.fields(room)
        for name in [place + field.name]
    }


KEYS: Mapping[str, Key] = types.MappingProxyType(
    _keys(Top)
    | {
        name: key
        for table, room in TABLES.items()
        for name, key in _keys(room, f"{table}.").items()
    }
)
"""Every key, by its full name, in the order of the file."""


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the file: for editors, and for whoever writes such files by program."""
    tables = {table: _struct(table, _fields(table)) for table in TABLES}
    nested = [(table, kind, msgspec.field(default_factory=kind)) for table, kind in tables.items()]
    made = msgspec.json.schema(_struct("settings", [*_fields(""), *nested]))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pi-reconciler settings",
        "description": "The settings file of pi-reconciler, in TOML.",
        "$ref": made["$ref"],
        "$defs": made["$defs"],
    }


def _struct(title: str, fields: list[tuple[str, Any, Any]]) -> type[msgspec.Struct]:
    return msgspec.defstruct(title, fields, forbid_unknown_fields=True, kw_only=True)


def _fields(table: str) -> list[tuple[str, Any, Any]]:
    return [
        (key.field, Annotated[key.kind, msgspec.Meta(description=_described(key))], key.default)
        for key in KEYS.values()
        if key.table == table
    ]


def _described(key: Key) -> str:
    taken = "SIGHUP" if key.at_once else "the next start"
    return f"{key.allowed[0].upper()}{key.allowed[1:]}. Variable: {key.variable}. Taken at {taken}."
