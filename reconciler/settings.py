"""Settings: what an operator may choose, and the file that says it.

Loading is cheap where there is no file: what checks one (`reconciler.schema`) is imported
when there is something to check, and the rooms that the values are for are not needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from reconciler.ladder import Ladder
    from reconciler.logs import Form, Level
    from reconciler.rpc_writer import WritePolicy
    from reconciler.state import Policy


class SettingsError(Exception):
    """A settings file that cannot be used: which file, which key, what was found."""


class Settings(NamedTuple):
    """What a settings file says, as the rooms take it.

    ``config/pi-reconciler.toml`` explains each value.

    Attributes:
        sessions_dir: the folder, or None for the dashboard's.
        programs: base names of further keeper programs.
        keeper_command: what `spawn` runs; empty for our own keeper.
        agent_command: what keepers run; empty for ``pi --mode rpc``.
        resync: seconds between two full looks.
        policy: the times that decisions depend on; None for the room's defaults.
        ladder: how processes are ended; None for the room's defaults.
        write: how lines are delivered; None for the room's defaults.
        log_level: the lowest level that is logged.
        log_form: how log lines look.
    """

    sessions_dir: Path | None = None
    programs: frozenset[str] = frozenset()
    keeper_command: tuple[str, ...] = ()
    agent_command: tuple[str, ...] = ()
    resync: float = 60.0
    policy: Policy | None = None
    ladder: Ladder | None = None
    write: WritePolicy | None = None
    log_level: Level = "info"
    log_form: Form = "auto"


def default_path(
    environ: Mapping[str, str] = os.environ, home: Path | None = None, platform: str = sys.platform
) -> Path:
    """Where the settings file is looked for when none is named.

    The user's config folder as platformdirs knows it. On Linux it is written out here, so
    that a client command need not import that.
    """
    if platform == "linux":
        chosen = environ.get("XDG_CONFIG_HOME", "").strip()
        base = Path(chosen) if chosen else (home or Path.home()) / ".config"
        return base / "pi-reconciler" / "config.toml"
    import platformdirs  # noqa: PLC0415 - see above

    return platformdirs.user_config_path("pi-reconciler", appauthor=False) / "config.toml"


def load(path: Path | None = None) -> Settings:
    """Read the settings.

    Args:
        path: the file. When None, the default one, which need not be there.

    Raises:
        SettingsError: the file cannot be read, or holds something that it must not.
    """
    named = path is not None
    path = path or default_path()
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        if not named:
            return Settings()
        raise SettingsError(f"settings file {str(path)!r} is not there") from None
    except OSError as error:
        raise SettingsError(
            f"settings file {str(path)!r} cannot be read: {error.strerror}"
        ) from error
    return parse(text, str(path))


def parse(text: bytes, source: str = "settings") -> Settings:
    """Read the settings from TOML text.

    Args:
        text: the file's content.
        source: what to call it in an error.

    Raises:
        SettingsError: all that is wrong: under which key, what was found, what is allowed.
    """
    from reconciler.schema import read  # noqa: PLC0415 - and all rooms that have settings with it

    try:
        values = read(text)
    except ValueError as error:
        raise SettingsError(f"{source}: {error}") from error
    return Settings(**values)
