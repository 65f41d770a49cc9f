"""`logs`: what a session's keeper, and its agent, have said."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from reconciler.console import (
    FAILURE,
    INTERRUPTED,
    NO_SUCH_SESSION,
    Common,
    complete_logged,
    fail,
    pass_common,
)

if TYPE_CHECKING:
    from reconciler.tail import LogFile

_LAST = 10
_PAUSE = 200  # milliseconds between two looks at a log that is followed
_COLORS = {"debug": "bright_black", "warning": "yellow", "error": "red"}

Show = Callable[[bytes], bytes]


def _count(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    if text == "all":
        return sys.maxsize
    if not (text.isascii() and text.isdigit()) or len(text) > 18:  # noqa: PLR2004 - int64
        raise click.BadParameter(f"{text!r} is not a number of lines, or all")
    return int(text)


def _since(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    from datetime import UTC, datetime

    from reconciler.lines import moment

    try:
        return None if text is None else moment(text, datetime.now(UTC).astimezone())
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command(short_help="Show what a session has said.")
@click.argument("sid", shell_complete=complete_logged)
@click.option("-f", "--follow", is_flag=True, help="Go on, and show what is said from now on.")
@click.option(
    "-n",
    "--lines",
    "count",
    callback=_count,
    metavar="N",
    help="The last N lines alone, or all.  [default: all; 10 with --follow]",
)
@click.option(
    "--since",
    callback=_since,
    metavar="WHEN",
    help="What was said since then: 90s, 5m, 2h, 3d, or a time as 2026-03-01T09:00:00Z.",
)
@click.option("--launch", is_flag=True, help="The launch log: why a keeper did not start.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each line.")
@pass_common
def logs(
    given: Common,
    sid: str,
    count: int | None,
    since: float | None,
    *,
    follow: bool,
    launch: bool,
    as_json: bool,
) -> None:
    """Show what a session's keeper has said, and its agent, if it was started with --capture.

    A session that has ended still has its logs, until they are older than the settings keep
    them. On a terminal each line has its time and level, and nothing that an agent writes can
    act upon the terminal; in a pipe the lines are as they stand in the log. Lines without a time
    belong to the one before them that has one. With --follow it goes on when the log is cut,
    or the session is started again, until Ctrl-C.

    \b
    The last hour of it:              pi-reconciler logs demo --since 1h
    As it goes on:                    pi-reconciler logs demo -f
    Why its keeper does not start:    pi-reconciler logs demo --launch
    The agent's lines alone:          pi-reconciler logs demo --json | jq -r 'select(.line).line'
    """  # noqa: D301 - click wants the real character
    from reconciler.layout import Role, check_sid, file_name
    from reconciler.tail import LogFile, UnreadableLogError

    check_sid(sid)
    folder = given.folder()
    name = file_name(Role.LAUNCH_LOG if launch else Role.KEEPER_LOG, sid)
    try:
        log = LogFile(folder, name)
    except (FileNotFoundError, NotADirectoryError):
        fail(f"no session {sid} has a log in {folder}: there is no {name}", NO_SUCH_SESSION)
    except UnreadableLogError as error:
        fail(str(error), FAILURE)
    show = _show(given, sid, launch=launch, as_json=as_json)
    with log:
        log.go_to(count=_LAST if follow and count is None and since is None else count, since=since)
        if follow:
            with contextlib.suppress(KeyboardInterrupt):
                _follow(log, show)
            sys.exit(INTERRUPTED)
        else:
            _write(map(show, log.lines()))


def _show(given: Common, sid: str, *, launch: bool, as_json: bool) -> Show:
    """How a line is shown."""
    from reconciler.lines import as_json as json_of
    from reconciler.lines import parts, read_line

    if as_json:
        return lambda raw: json_of(read_line(raw, launch=launch), sid).encode()
    if sys.stdout is None or not sys.stdout.isatty():
        return lambda raw: raw

    def show(raw: bytes) -> bytes:
        when, level, text = parts(read_line(raw, launch=launch))
        if not when:
            return text.encode()
        if given.colors:
            when = click.style(when, dim=True)
            level, padding = click.style(level, fg=_COLORS.get(level, "green")), 7 - len(level)
            return f"{when} {level}{' ' * padding} {text}".encode()
        return f"{when} {level:7} {text}".encode()

    return show


def _follow(log: LogFile, show: Show) -> None:
    import errno
    import select

    reader = select.poll()  # tells of nothing but that nobody reads what is written
    reader.register(1, 0)
    while True:
        _write(map(show, log.news()))
        if any(flags & (select.POLLERR | select.POLLHUP) for _, flags in reader.poll(_PAUSE)):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _write(lines: Iterable[bytes]) -> None:
    if sys.stdout is None:
        return
    for line in lines:
        sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()
