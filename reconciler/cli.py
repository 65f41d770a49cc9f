"""The command line, ``pi-reconciler``: the group of commands, and how it ends.

A command's room is imported when it is asked for, and what it works with when it runs, so
that a client command starts fast.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import click

from reconciler import __version__
from reconciler.console import (
    FAILURE,
    INTERRUPTED,
    NO_SUCH_SESSION,
    USAGE,
    close_output,
    common,
    fail,
    kind_of,
)
from reconciler.errors import InvalidRequestError, NoSuchSessionError, ReconcilerError
from reconciler.layout import InvalidSessionIdError

_COMMANDS: Mapping[str, tuple[str, ...]] = {
    "Sessions": ("spawn", "write", "ls", "inspect", "logs", "stop", "restart"),
    "The background process": ("run", "status", "events", "service", "config", "doctor"),
    "The command line": ("demo", "completion"),
}
"""What there is, under the headings of the help."""

_ALIASES = {"ps": "ls"}

_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("help", "version"), "--{}"),
    **dict.fromkeys(("list", "jlist"), "ls"),
    **dict.fromkeys(("start", "create", "new"), "spawn"),
    **dict.fromkeys(("kill", "rm", "delete", "end"), "stop"),
    **dict.fromkeys(("send", "prompt", "attach", "exec"), "write"),
    **dict.fromkeys(("show", "describe"), "inspect"),
    **dict.fromkeys(("tail", "log"), "logs"),
    **dict.fromkeys(("top", "monit", "watch"), "ls --watch"),
    **dict.fromkeys(("install", "enable"), "service install"),
    **dict.fromkeys(("uninstall", "disable"), "service uninstall"),
    **dict.fromkeys(("clean", "cleanup", "prune"), "run --once"),
    **dict.fromkeys(("daemon", "serve"), "run"),
}
"""What docker, systemctl, pm2 and the like call it, and what it is here."""

_OPTIONS_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("cli -V", "cli -v"), "the version is --version"),
    "logs --tail": "it is -n here",
    "spawn --name": "the name is the first argument, SID",
    "spawn -e": "it is --env here",
    **dict.fromkeys(("spawn -w", "spawn --workdir"), "it is --cwd here"),
    "spawn": "what is meant for the agent goes after --",
    **dict.fromkeys(("ls -a", "ls --all"), "it lists all that there are"),
    **dict.fromkeys(
        ("stop -t", "stop --time", "stop --timeout", "restart -t", "restart --time"),
        "how long SIGKILL waits is the setting ladder.term_grace",
    ),
    **dict.fromkeys(
        ("stop -f", "stop --force", "restart -f", "restart --force"), "SIGKILL comes by itself"
    ),
    **dict.fromkeys(
        ("run -d", "run --detach", "run --daemon"), "pi-reconciler service install has it so"
    ),
    "run --json": "it is --log-form json here",
}
"""The same for a command's options; for a command alone, what any option may be."""

_ARGUMENTS_ELSEWHERE: Mapping[str, str] = {
    "spawn": "the agent's command goes after --",
    **dict.fromkeys(("ls", "status"), "of one session pi-reconciler inspect tells"),
}
"""The same for an argument that a command does not take."""


class Group(click.Group):
    """The command group: commands by name, aliases, and an end by Ctrl-C that says so once."""

    def list_commands(self, _: click.Context) -> list[str]:
        """All names."""
        return [name for names in _COMMANDS.values() for name in names]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Find a command by its name or alias."""
        name = _ALIASES.get(name, name)
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = getattr(
            importlib.import_module(f"reconciler.commands.{name}"), name
        )
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; for a name that is none, say which may be meant."""
        name = args[0]
        known = name.startswith("-") or self.get_command(ctx, name) is not None
        if not known and not ctx.resilient_parsing:
            ctx.fail(f"No such command {name!r}{_meant(name, self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the commands under their headings."""
        width = formatter.width - 6 - max(map(len, self.list_commands(ctx)))
        for heading, names in _COMMANDS.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(heading):
                formatter.write_dl(
                    [(name, each.get_short_help_str(width)) for name, each in found if each]
                )

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's own type
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None
        except click.UsageError as error:
            if error.ctx is None and (name := ctx.invoked_subcommand):  # click does not say where
                error.ctx = click.Context(cli, parent=ctx, info_name=name)
            raise


def _meant(name: str, commands: Iterable[str]) -> str:
    """What somebody may have meant by the name of a command that is none."""
    if here := _ELSEWHERE.get(name):
        return f", it is {here.format(name)} here"
    import difflib

    near = difflib.get_close_matches(name, commands, cutoff=0.7)
    return f", did you mean {' or '.join(near)}?" if near else ""


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="pi-reconciler")
@common
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Keep the keepers of headless pi sessions right.

    A keeper owns one pi agent and listens on a socket in the sessions folder. This program
    removes what dead keepers leave behind, ends keepers whose agent is gone, and starts,
    writes to, lists and stops sessions.

    \b
    Start the background process:     pi-reconciler run
    Start a session, write to it:     pi-reconciler spawn demo
                                      pi-reconciler write demo '{"type":"get_state","id":"1"}'
    See what there is, and end it:    pi-reconciler ls
                                      pi-reconciler stop demo

    \b
    Exit codes: 0 success, 1 failure, 2 usage, 3 no such session, 75 not delivered (safe to
    send again), 76 delivery not known, 78 bad settings. With --json standard output then has
    an object with `error` and `kind` (docs/command-line.md).
    """  # noqa: D301 - click wants the real character
    if ctx.invoked_subcommand != "run":
        _let_hang_up()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(USAGE)


def _let_hang_up() -> None:
    """Let SIGHUP end the program, as any: only `run` has a use for one that has waited."""
    import signal

    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def main() -> NoReturn:
    """Run the command line; whatever goes wrong becomes one line and an exit code."""
    import gc

    chosen: dict[str, Any] = {}
    try:
        _check_completion(os.environ)
        sys.exit(cli.main(prog_name="pi-reconciler", standalone_mode=False, obj=chosen))
    except Exception as error:  # noqa: BLE001 - nobody is above it
        if chosen.get("debug"):
            import traceback

            traceback.print_exception(error)
        _end(error)
    finally:
        gc.freeze()  # the interpreter's end need not search for garbage in all that was imported


def _in_words(error: click.UsageError) -> str:
    """What was used wrongly, and what may be meant."""
    command = error.ctx.command if error.ctx else cli
    name = command.name or ""
    words = " ".join(error.format_message().split()).rstrip(".")
    meant = None
    if isinstance(error, click.NoSuchOption):
        exactly = _OPTIONS_ELSEWHERE.get(f"{name} {error.option_name}")
        if exactly or command is cli:  # what only looks alike would mislead
            words = f"No such option {error.option_name!r}"
        if command is cli:
            words += " before the command"
        meant = exactly or _OPTIONS_ELSEWHERE.get(name)
    elif words.startswith("Got unexpected extra argument"):
        meant = _ARGUMENTS_ELSEWHERE.get(name)
    return f"{words}, {meant}" if meant else words


def _check_completion(environ: Mapping[str, str]) -> None:
    """Refuse to complete where the shell has not said what; click takes it for granted.

    Raises:
        UsageError: what is missing.
    """
    if not (asked := environ.get("_PI_RECONCILER_COMPLETE", "")) or asked.endswith("_source"):
        return
    missing = [name for name in ("COMP_WORDS", "COMP_CWORD") if name not in environ]
    if not asked.endswith("_complete"):
        missing = ["such completion"]
    elif not missing and asked != "fish_complete" and not environ["COMP_CWORD"].isdecimal():
        missing = ["number in COMP_CWORD"]
    if missing:
        raise click.UsageError(
            f"_PI_RECONCILER_COMPLETE is {asked!r}, and there is no {' and no '.join(missing)}: "
            "unset it, it is for the Tab key (see pi-reconciler completion --help)"
        )


def _end(error: Exception) -> NoReturn:
    """End as an error asks for."""
    match error:
        case click.UsageError():
            path = error.ctx.command_path if error.ctx else "pi-reconciler"
            fail(f"{_in_words(error)} (see {path} --help)", USAGE)
        case InvalidSessionIdError() | InvalidRequestError():
            fail(str(error), USAGE, kind_of(error))
        case NoSuchSessionError():
            fail(str(error), NO_SUCH_SESSION)
        case ReconcilerError():
            fail(str(error), FAILURE, kind_of(error))
        case click.Abort():
            fail("interrupted", INTERRUPTED)
        case OSError():  # but for a broken pipe, which click ends with 1 in silence
            close_output()
            where = f": {error.filename!r}" if error.filename else ""
            fail(f"{error.strerror or error}{where}", FAILURE, kind_of(error))
        case _:
            kind = type(error).__name__
            fail(f"a defect: {kind}: {error} (--debug shows where)", FAILURE, "defect")
