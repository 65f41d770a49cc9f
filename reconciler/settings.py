"""Settings: a TOML file, every value checked, unknown keys refused.

The defaults are those of the rooms that use them; ``config/pi-reconciler.toml`` lists and
explains each one.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path
from typing import Annotated, Any

import msgspec
import platformdirs

from reconciler.ladder import Ladder
from reconciler.logs import Form, Level
from reconciler.rpc_writer import WritePolicy
from reconciler.state import Policy

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class SettingsError(Exception):
    """A settings file that cannot be used: which file, which key, what was found."""


def _table(kind: type) -> type[msgspec.Struct]:
    """A strict TOML table with the fields and defaults of a room's own dataclass."""
    hints = typing.get_type_hints(kind)
    fields = [
        (field.name, Seconds if hints[field.name] is float else hints[field.name], field.default)
        for field in dataclasses.fields(kind)
    ]
    return msgspec.defstruct(kind.__name__, fields, forbid_unknown_fields=True, frozen=True)


_Policy, _Ladder, _Write = _table(Policy), _table(Ladder), _table(WritePolicy)


class LogSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[log]``: what is written, and how."""

    level: Level = "info"
    form: Form = "auto"


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole file."""

    sessions_dir: str = ""
    programs: tuple[str, ...] = ()
    keeper_command: tuple[str, ...] = ()
    agent_command: tuple[str, ...] = ()
    resync: Seconds = 60.0
    policy: _Policy = msgspec.field(default_factory=_Policy)  # type: ignore[valid-type]
    ladder: _Ladder = msgspec.field(default_factory=_Ladder)  # type: ignore[valid-type]
    write: _Write = msgspec.field(default_factory=_Write)  # type: ignore[valid-type]
    log: LogSettings = LogSettings()


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What a settings file says, as the rooms take it.

    Attributes:
        sessions_dir: the folder, or None for the dashboard's.
        programs: base names of further keeper programs.
        keeper_command: what `spawn` runs; empty for our own keeper.
        agent_command: what keepers run; empty for ``pi --mode rpc``.
        resync: seconds between two full looks.
        policy: the times that decisions depend on.
        ladder: how processes are ended.
        write: how lines are delivered.
        log: what is logged, and how.
    """

    sessions_dir: Path | None = None
    programs: frozenset[str] = frozenset()
    keeper_command: tuple[str, ...] = ()
    agent_command: tuple[str, ...] = ()
    resync: float = 60.0
    policy: Policy = dataclasses.field(default_factory=Policy)
    ladder: Ladder = dataclasses.field(default_factory=Ladder)
    write: WritePolicy = dataclasses.field(default_factory=WritePolicy)
    log: LogSettings = dataclasses.field(default_factory=LogSettings)


def default_path() -> Path:
    """Where the settings file is looked for when none is named."""
    return platformdirs.user_config_path("pi-reconciler", appauthor=False) / "config.toml"


def load(path: Path | None = None) -> Settings:
    """Read the settings.

    Args:
        path: the file. When None, the default one, which need not be there.

    Raises:
        SettingsError: the file cannot be read or holds something that it must not.
    """
    named = path is not None
    path = path or default_path()
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        if not named:
            return Settings()
        raise SettingsError(f"settings file {str(path)!r} is not there") from error
    except OSError as error:
        raise SettingsError(f"settings file {str(path)!r}: {error.strerror}") from error
    return parse(text, str(path))


def parse(text: bytes, source: str = "settings") -> Settings:
    """Read the settings from TOML text.

    Args:
        text: the file's content.
        source: what to call it in an error.

    Raises:
        SettingsError: what is wrong, under which key.
    """
    try:
        file = msgspec.toml.decode(text, type=_File)
        return Settings(
            sessions_dir=Path(os.path.expanduser(file.sessions_dir)) if file.sessions_dir else None,
            programs=frozenset(file.programs),
            keeper_command=file.keeper_command,
            agent_command=file.agent_command,
            resync=file.resync,
            policy=Policy(**_fields(file.policy)),
            ladder=Ladder(**_fields(file.ladder)),
            write=WritePolicy(**_fields(file.write)),
            log=file.log,
        )
    except (msgspec.DecodeError, ValueError) as error:
        raise SettingsError(f"{source}: {error}{_allowed(str(error))}") from error


def _fields(table: Any) -> dict[str, Any]:  # noqa: ANN401 - a struct made from a dataclass
    return msgspec.structs.asdict(table)


def _allowed(error: str) -> str:
    """The keys that may stand where an unknown one was found."""
    if "unknown field" not in error:
        return ""
    tables: dict[str, type[msgspec.Struct]] = {
        "$.policy": _Policy,
        "$.ladder": _Ladder,
        "$.write": _Write,
        "$.log": LogSettings,
    }
    place = error.rpartition("`")[0].rpartition("`")[2]
    names = tables.get(place, _File).__struct_fields__
    return f"; allowed there: {', '.join(names)}"
