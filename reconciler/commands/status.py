"""`status`: whether the background process runs, and how it stands."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from reconciler.console import Common, json_option, pass_common, print_json, print_lines

if TYPE_CHECKING:
    from reconciler.control_client import Found

NOT_RUNNING, NOT_KNOWN = 3, 4
"""Exit codes of `systemctl status`."""

_NO_STATUS = frozenset({"timestamp", "level", "severity_number", "event", "streams"})
# What the daemon's line says beside how it stands.


@click.command(short_help="Tell whether the background process runs.")
@json_option
@pass_common
def status(given: Common, *, as_json: bool) -> None:
    """Tell whether the background process runs on the sessions folder, and what it did last.

    The folder's lock says whether one runs; what it does it is asked itself.

    \b
    How does it stand?                pi-reconciler status
    In a script:                      pi-reconciler status > /dev/null || pi-reconciler run &
    What did it do so far?            pi-reconciler status --json | jq .counts

    \b
    Exit codes as systemctl's: 0 it runs, 3 it does not, 4 that cannot be known (somebody holds
    the folder's lock, and does not answer within a second).
    """  # noqa: D301 - click wants the real character
    from reconciler.control_client import State, find

    found = find(given.folder().absolute())
    if found.stream is not None:
        found.stream.close()
    if as_json:
        print_json(_plain(found))
    elif found.state is State.RUNNING:
        print_lines(_told(found.status))
    else:
        words = {State.NOT_RUNNING: "not running", State.NOT_KNOWN: "not known"}
        print_lines([f"{words[found.state]}: {found.reason}"])
    if found.state is not State.RUNNING:
        sys.exit(NOT_RUNNING if found.state is State.NOT_RUNNING else NOT_KNOWN)


def _plain(found: Found) -> dict[str, Any]:
    said = {k: v for k, v in found.status.items() if k not in _NO_STATUS}
    return {"state": found.state.value, "reason": found.reason or None, **said, "pid": found.pid}


def _told(said: Mapping[str, Any]) -> Iterator[str]:
    from reconciler.columns import aligned
    from reconciler.screens import age

    looks_on = f", and only looks on: {said['only_looks_on']}" if said["only_looks_on"] else ""
    yield f"running on {said['folder']}{looks_on}"
    yield from aligned(
        [
            ("pid", str(said["pid"])),
            ("since", f"{_local(said['started_at'])} ({age(said['uptime_s'])})"),
            ("sessions", _counted(said["sessions"])),
            ("last did", _last(said["last_action"])),
            ("version", said["version"]),
        ]
    )


def _counted(phases: Mapping[str, int]) -> str:
    each = ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items()))
    return f"{sum(phases.values())} ({each})" if each else "none"


def _last(action: Mapping[str, Any] | None) -> str:
    if action is None:
        return "nothing yet"
    return f"{action['event']} {action['sid']}: {action['reason']}, {_local(action['at'])}"


def _local(stamp: str) -> str:
    """A moment by the clock on the user's wall."""
    from datetime import datetime

    return datetime.fromisoformat(stamp).astimezone().strftime("%Y-%m-%d %H:%M:%S")
