"""`events`: what happens, as it happens."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import click

from reconciler.commands.status import NOT_KNOWN, NOT_RUNNING
from reconciler.console import (
    FAILURE,
    Common,
    check_reader,
    complete_session,
    end_with_reader,
    json_option,
    pass_common,
    say,
)

if TYPE_CHECKING:
    from reconciler.control_client import Found, Stream

_PAUSE = 0.25
# Seconds between two looks for a background process where there is none.

_HEAD = frozenset({"timestamp", "level", "severity_number", "event", "sid", "reason", "detail"})
_COLORS = {"warning": "yellow", "error": "red", "debug": "bright_black"}


@click.command(short_help="Tell what happens, as it happens.")
@click.argument("sids", nargs=-1, metavar="[SID]...", shell_complete=complete_session)
@click.option(
    "--no-wait",
    is_flag=True,
    help="End when the background process ends, or if there is none; else the next one is "
    "waited for.",
)
@json_option
@pass_common
def events(given: Common, sids: tuple[str, ...], *, no_wait: bool, as_json: bool) -> None:
    """Tell what the background process does, as it does it, until Ctrl-C.

    With session ids only what concerns these. On a terminal one line an event; in a pipe, or
    with --json, the log's own lines: one JSON object a line (docs/logs.md explains each). What
    was before is in the log.

    Where no background process runs, nothing is done that could be told: `ls --watch` looks
    itself.

    \b
    All that happens:                 pi-reconciler events
    One session, for a script:        pi-reconciler events demo | jq -r .event
    Until the daemon ends:            pi-reconciler events --no-wait

    \b
    Exit codes: 130 after Ctrl-C; with --no-wait 3 when the background process has ended or is
    not there, 4 when that cannot be known.
    """  # noqa: D301 - click wants the real character
    from reconciler.control_client import State, find
    from reconciler.layout import check_sid

    for sid in sids:
        check_sid(sid)
    end_with_reader()
    plain = as_json or sys.stdout is None or not sys.stdout.isatty()
    show = _verbatim if plain else _readable(colors=given.colors)
    complaint = ""
    while True:
        found = find(given.folder().absolute())
        if found.stream is not None:
            with contextlib.closing(found.stream):
                _follow(found, found.stream, frozenset(sids), show)
            found = found._replace(state=State.NOT_RUNNING, reason=f"process {found.pid} has ended")
        if no_wait:
            _end(found)
        if found.reason != complaint:
            say(f"{found.reason}; waiting for a background process (pi-reconciler run)")
            complaint = found.reason
        check_reader(timeout=_PAUSE)


def _end(found: Found) -> NoReturn:
    from reconciler.control_client import State

    say(found.reason)
    sys.exit(NOT_RUNNING if found.state is State.NOT_RUNNING else NOT_KNOWN)


def _follow(
    found: Found, stream: Stream, sids: Collection[str], show: Callable[[bytes, Any], None]
) -> None:
    """Show lines until no more will come."""
    from reconciler.console import fail

    if not found.status.get("streams"):
        fail(
            f"process {found.pid} takes no more listeners: end one of them, or let it have more "
            "open files (ulimit -n)",
            FAILURE,
        )
    say(f"process {found.pid} works on {found.status['folder']}")
    while (lines := stream.read()) is not None:
        for line in lines:
            event = json.loads(line)
            # What was dropped may have concerned them.
            if not sids or event.get("sid") in sids or "lines_dropped" in event:
                show(line, event)
        if not lines:
            check_reader(stream, timeout=3600)


def _verbatim(line: bytes, _: object) -> None:
    click.echo(line)


def _readable(*, colors: bool) -> Callable[[bytes, Mapping[str, Any]], None]:
    def show(_: bytes, event: Mapping[str, Any]) -> None:
        line = readable(event)
        color = _COLORS.get(event["level"])
        click.echo(click.style(line, fg=color) if colors and color else line)

    return show


def readable(event: Mapping[str, Any]) -> str:
    """An event in one line for a person: when, what, of which session, why and how it went."""
    from datetime import datetime

    at = datetime.fromisoformat(event["timestamp"]).astimezone().strftime("%H:%M:%S")
    keys = ("verdict", "reason") if event["event"] == "session.seen" else ("reason", "detail")
    words = ": ".join(str(event[key]) for key in keys if event.get(key))
    if not words:
        words = " ".join(f"{key}={event[key]}" for key in event if key not in _HEAD)
    line = f"{at}  {event['event']:<20}  {event.get('sid') or '-':<12}  {words}"
    # A process's arguments may be among the evidence: nothing in them moves a cursor.
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
