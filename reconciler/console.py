"""What the commands share: their common options, how they tell things, and how they end.

Data goes to standard output, messages to standard error.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

if TYPE_CHECKING:
    from reconciler.keeper import KeeperManager
    from reconciler.layout import Role
    from reconciler.settings import Settings, Sources

FAILURE, USAGE, NO_SUCH_SESSION, TRY_AGAIN, NOT_KNOWN, BAD_SETTINGS = 1, 2, 3, 75, 76, 78
"""Exit codes; 0 is success. 75 and 78 are sysexits' EX_TEMPFAIL and EX_CONFIG."""

INTERRUPTED = 130
"""What a shell expects of a program that Ctrl-C ended: 128 and the number of SIGINT."""

_KINDS: Mapping[int, str] = {
    FAILURE: "failure",
    USAGE: "usage",
    NO_SUCH_SESSION: "no_such_session",
    TRY_AGAIN: "not_delivered",
    NOT_KNOWN: "delivery_not_known",
    BAD_SETTINGS: "bad_settings",
}

_DAY = 86_400


class Common(NamedTuple):
    """What every command is given.

    Attributes:
        settings: what the settings say.
        sources: what they are from.
        sessions_dir: the folder that the command line names, if it does.
        colors: whether what a person reads may be coloured, where a terminal shows it.
    """

    settings: Settings
    sources: Sources
    sessions_dir: Path | None
    colors: bool = True

    def manager(self) -> KeeperManager:
        """The manager of the sessions folder, as the settings say."""
        from reconciler.keeper import KeeperManager
        from reconciler.requests import OUR_KEEPER

        return KeeperManager(
            self.sessions_dir or self.settings.sessions_dir,
            keeper_command=self.settings.keeper_command or OUR_KEEPER,
            programs=self.settings.programs,
            policy=self.settings.policy,
            restart_limits=self.settings.restart,
            ladder=self.settings.ladder,
        )

    def folder(self) -> Path:
        """The sessions folder, without what a manager imports."""
        from reconciler.layout import sessions_dir

        chosen = self.sessions_dir or self.settings.sessions_dir
        return chosen or sessions_dir(os.environ, Path.home())


# How commands tell things.


def fail(
    message: str, code: int, kind: str = "", *, told: Mapping[str, object] | None = None
) -> NoReturn:
    """End with one line on standard error, and with --json an object on standard output.

    Args:
        message: what went wrong, which value, what to do.
        code: the exit code.
        kind: the constant word for programs; by default that of the exit code.
        told: what else stands in the object.
    """
    complain(message)
    if "--json" in _own_words() and code != INTERRUPTED:
        try:
            print_json({**(told or {}), "error": message, "kind": kind or _KINDS[code]})
        except OSError:  # nobody reads it: the exit code still tells
            close_output()
    sys.exit(code)


def _own_words() -> list[str]:
    """The words of the command line, but for an agent's: it may be one that cannot be parsed."""
    words = sys.argv[1:]
    return words[: words.index("--")] if "--" in words else words


def kind_of(error: Exception) -> str:
    """The constant word for an error: its class, or that the system has refused."""
    if isinstance(error, OSError):
        return "system"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()


def complain(message: str) -> None:
    """Say what went wrong: one line on standard error, even to those who want quiet."""
    line = message.encode(errors="backslashreplace").decode().replace("\n", " ")
    with contextlib.suppress(OSError):  # nobody reads it: the exit code still tells
        click.echo(f"pi-reconciler: {line}", err=True)


def say(message: str) -> None:
    """Say what is good to know: one line on standard error, unless --quiet is given."""
    if not chosen().get("quiet"):
        complain(message)


def confirm(message: str) -> None:
    """Say on standard output what was done, unless --quiet is given."""
    if not chosen().get("quiet"):
        click.echo(message)


def print_json(value: object) -> None:
    """Print a value as JSON: in lines for a terminal, else as one."""
    import json

    pretty = sys.stdout is not None and sys.stdout.isatty()
    click.echo(json.dumps(value, indent=2 if pretty else None))


def print_lines(lines: Iterable[str]) -> None:
    """Print what a person reads."""
    click.echo("\n".join(lines))


def end_with_reader() -> None:
    """From now on end as other tools do, in silence by SIGPIPE, once nobody reads the output."""
    import signal

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def check_reader(*others: Any, timeout: float = 0.0) -> None:  # noqa: ANN401 - what has a descriptor
    """End, after `end_with_reader`, if nobody reads the output any more.

    Args:
        others: what to wait for meanwhile: descriptors that become readable.
        timeout: seconds to wait.
    """
    import select
    import signal

    poll = select.poll()
    for other in others:
        poll.register(other, select.POLLIN)
    descriptor = -1
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be none
        descriptor = sys.stdout.fileno()
        poll.register(descriptor, 0)
    if any(ready == descriptor for ready, _ in poll.poll(timeout * 1000)):
        signal.raise_signal(signal.SIGPIPE)


def close_output() -> None:
    """Keep what could not be written from being tried again, and told of, at the very end."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


# Options.

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Tell what would be done, and do nothing."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def seconds(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    """Read a span of time; click's own ranges let NaN pass."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        if 0 < (span := float(text)) <= _DAY:
            return span
    raise click.BadParameter(f"{text!r} is not a number of seconds above 0, {_DAY} at most")


def complete_session(ctx: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """The sessions whose names begin so: by the names in the folder, no process is looked at."""
    from reconciler.layout import CONCERN

    return _sessions(ctx, begun, CONCERN)


def complete_logged(ctx: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """The same, with those that have left no more than a log."""
    from reconciler.layout import Role

    return _sessions(ctx, begun, tuple(Role))


def _sessions(ctx: click.Context, begun: str, roles: tuple[Role, ...]) -> list[str]:
    from reconciler.layout import parse_name
    from reconciler.settings import SettingsError

    with contextlib.suppress(SettingsError, OSError):
        folder = _loaded(ctx.ensure_object(dict)).folder()
        parsed = filter(None, map(parse_name, os.listdir(folder)))
        found = {name.sid for name in parsed if name.role in roles}
        return sorted(sid for sid in found if sid.startswith(begun))
    return []


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that all have, after its name as well as before it."""

    def remember(ctx: click.Context, option: click.Parameter, value: Any) -> None:  # noqa: ANN401 - a path or a flag
        said = ctx.ensure_object(dict)
        given = ctx.get_parameter_source(str(option.name)) is _FROM_COMMAND_LINE
        if value and (given or option.name not in said):  # a flag beats a variable
            said[option.name] = value

    for options, more in reversed(_OPTIONS):
        command = click.option(*options, callback=remember, expose_value=False, **more)(command)
    return command


_FROM_COMMAND_LINE = click.core.ParameterSource.COMMANDLINE
_OPTIONS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (
        ("--sessions-dir",),
        {
            "type": click.Path(path_type=Path, file_okay=False),
            "metavar": "DIR",
            "help": "The sessions folder.  [default: ~/.pi/dashboard/sessions]",
        },
    ),
    (
        ("--config",),
        {
            "type": click.Path(path_type=Path),
            "envvar": "PI_RECONCILER_CONFIG",
            "metavar": "FILE",
            "help": "The settings file.  [default: config.toml in the user's config folder]",
        },
    ),
    (("-q", "--quiet"), {"is_flag": True, "help": "Say nothing but data and errors."}),
    (("--no-color",), {"is_flag": True, "help": "No colours, as with the variable NO_COLOR."}),
    (
        ("--debug",),
        {
            "is_flag": True,
            "envvar": "PI_RECONCILER_DEBUG",
            "help": "Show where in the program an error came up.",
        },
    ),
)


def pass_common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Load the settings, and hand them to the command."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - click's callbacks
        return command(_common(chosen()), *args, **kwargs)

    return common(run)


def chosen() -> dict[str, Any]:
    """What the common options of this command line say."""
    said: dict[str, Any] = click.get_current_context().ensure_object(dict)
    return said


def _common(said: dict[str, Any]) -> Common:
    from reconciler.settings import SettingsError

    try:
        return _loaded(said)
    except SettingsError as error:
        fail(str(error), BAD_SETTINGS)


def _loaded(said: dict[str, Any]) -> Common:
    from reconciler.settings import Sources

    colors = not (said.get("no_color") or os.environ.get("NO_COLOR"))
    sources = Sources.read(said.get("config"))
    return Common(sources.settings(), sources, said.get("sessions_dir"), colors)
