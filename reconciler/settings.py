"""Settings: what an operator may choose, in a file, by variables and by flags.

Loading is cheap where nobody says anything: what checks it (`reconciler.sources`) is imported
when there is something to check, and the rooms that the values are for are not needed.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from reconciler.layout import PREFIX

if TYPE_CHECKING:
    from reconciler.addresses import MetricsSettings
    from reconciler.budget import LogBudget
    from reconciler.ladder import Ladder
    from reconciler.log_settings import LogSettings
    from reconciler.restarts import RestartLimits
    from reconciler.rpc_writer import WritePolicy
    from reconciler.sources import Said
    from reconciler.state import Policy


RESERVED = frozenset(
    PREFIX + name
    for name in (
        *("CONFIG", "DEBUG"),  # which file; a traceback for a defect
        *("SESSION", "FOLDER"),  # the markers that all that an agent starts inherits
        *("CAMPAIGN", "EXAMPLES", "HISTORIES", "SEED", "SESSIONS", "SOAK", "STEPS"),  # our tests'
    )
)
"""Variables of ours that are no settings. Any other one that names no key is refused."""

MOST = 1 << 20
"""Bytes of a settings file; a longer one is none."""

_FOLDER = PREFIX + "SESSIONS_DIR"


class SettingsError(Exception):
    """Settings that cannot be used: which source, which key, what was found, what is allowed.

    Attributes:
        problems: each of them, as a line of its own.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (message,)


class Settings(NamedTuple):
    """What the settings say, as the rooms take it.

    ``docs/settings.md`` lists each value. A table that nobody says anything of is None: its
    room's defaults.

    Attributes:
        sessions_dir: the folder, or None for the dashboard's.
        programs: base names of further keeper programs.
        keeper_command: what `spawn` runs; empty for our own keeper.
        agent_command: what keepers run; empty for ``pi --mode rpc``.
        resync: seconds between two full looks.
        policy: the times that decisions depend on.
        restart: how fast, and how often, sessions are started again.
        ladder: how processes are ended.
        write: how lines are delivered.
        log: how the program's own log is written.
        log_budget: what the sessions' logs may cost.
        metrics: where metrics and health are to be had.
    """

    sessions_dir: Path | None = None
    programs: frozenset[str] = frozenset()
    keeper_command: tuple[str, ...] = ()
    agent_command: tuple[str, ...] = ()
    resync: float = 60.0
    policy: Policy | None = None
    restart: RestartLimits | None = None
    ladder: Ladder | None = None
    write: WritePolicy | None = None
    log: LogSettings | None = None
    log_budget: LogBudget | None = None
    metrics: MetricsSettings | None = None


class Loaded(NamedTuple):
    """Settings, and where each is from.

    Attributes:
        settings: as the rooms take them.
        said: every key by its full name, with its value and who says it.
    """

    settings: Settings
    said: Mapping[str, Said]


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


class Sources(NamedTuple):
    """What all sources say at one moment, not yet checked.

    Attributes:
        path: the settings file.
        named: somebody has named that file, so it must be there.
        text: what it holds; empty where it is not there.
        variables: the environment variables that should be settings.
        flags: what the command line says, by the keys' full names (``log.level``).
    """

    path: Path
    named: bool
    text: bytes
    variables: Mapping[str, str]
    flags: Mapping[str, Any]

    @classmethod
    def read(
        cls,
        path: Path | None = None,
        environ: Mapping[str, str] = os.environ,
        flags: Mapping[str, Any] | None = None,
    ) -> Self:
        """Read them; `load` says what the arguments are.

        Raises:
            SettingsError: the file cannot be read.
        """
        chosen = path or default_path()
        text = _read(chosen, named=path is not None)
        return cls(chosen, path is not None, text, _ours(environ), flags or {})

    def again(self) -> Self:
        """The same with what the file says now.

        Raises:
            SettingsError: the file cannot be read.
        """
        return self._replace(text=_read(self.path, named=self.named))

    def settings(self) -> Settings:
        """What they say.

        Raises:
            SettingsError: something that is said must not be.
        """
        if self.text or self.flags or self.variables.keys() - {_FOLDER}:
            return self.loaded().settings
        folder = self.variables.get(_FOLDER)  # so often set that it costs no check of the others
        return Settings(sessions_dir=Path(os.path.expanduser(folder)) if folder else None)

    def loaded(self) -> Loaded:
        """What they say, and who says it.

        Raises:
            SettingsError: something that is said must not be.
        """
        return _made(self.text, str(self.path), self.variables, self.flags)


def load(
    path: Path | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Read the settings: a flag beats a variable, that beats the file, that beats the default.

    Args:
        path: the file. When None, the default one, which need not be there.
        environ: the environment. A variable of ours that is neither a key's nor `RESERVED` is
            refused; an empty one says nothing.
        flags: what the command line says, by the keys' full names (``log.level``).

    Raises:
        SettingsError: the file cannot be read, or something that is said must not be.
    """
    return Sources.read(path, environ, flags).settings()


def load_all(
    path: Path | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
) -> Loaded:
    """The same as `load`, with who says each of them."""
    return Sources.read(path, environ, flags).loaded()


def parse(text: bytes, source: str = "settings") -> Settings:
    """Read the settings from TOML text alone.

    Args:
        text: the file's content.
        source: what to call it in an error.

    Raises:
        SettingsError: all that is wrong: under which key, what was found, what is allowed.
    """
    return _made(text, source, {}, {}).settings


def _made(
    text: bytes, source: str, variables: Mapping[str, str], flags: Mapping[str, Any]
) -> Loaded:
    from reconciler import sources  # noqa: PLC0415 - and all rooms that have settings with it

    try:
        said = sources.gather(text, source, variables, flags)
        return Loaded(Settings(**sources.arguments(said)), said)
    except sources.SourcesError as error:
        raise SettingsError(str(error), map(str, error.problems)) from error


def _ours(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that should be settings."""
    return {
        name: text
        for name, text in environ.items()
        if text and name.startswith(PREFIX) and name not in RESERVED
    }


def _read(path: Path, *, named: bool) -> bytes:
    """The file's content, bounded. Nobody who may write into a pipe is waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        if not named:
            return b""
        raise SettingsError(f"settings file {str(path)!r} is not there") from None
    except OSError as error:
        raise SettingsError(_unreadable(path, error.strerror)) from error
    try:
        return _content(path, descriptor)
    except OSError as error:
        raise SettingsError(_unreadable(path, error.strerror)) from error
    finally:
        os.close(descriptor)


def _content(path: Path, descriptor: int) -> bytes:
    if str(path) != os.devnull and not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise SettingsError(_unreadable(path, "it is no regular file"))
    with open(descriptor, "rb", closefd=False) as file:
        text = file.read(MOST + 1)
    if len(text) > MOST:
        raise SettingsError(_unreadable(path, f"it is longer than {MOST} bytes"))
    return text


def _unreadable(path: Path, why: str | None) -> str:
    return f"settings file {str(path)!r} cannot be read: {why}"
