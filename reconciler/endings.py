"""How a session has ended: what its keeper's log says last.

Read only once a session that has a restart policy is over. The log may hold what an agent has
printed, so nothing but that session's own fate may hang on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from reconciler.folder import Folder
from reconciler.layout import Role, file_name
from reconciler.restarts import Ending

TAIL = 64 * 1024
"""Bytes that are read of a log's end: a farewell is four lines, and children of the agent may
still have printed something after it."""

_BY_REQUEST = frozenset({"SIGTERM", "SIGINT", 15, 2, 143, 130})
# How a stop looks from outside, and what a program that catches it exits with in a shell's way.

_FAREWELL = re.compile(r"(?:shutdown: code=\d+ reason=|keeper ends: )(?P<why>.*)")
_AGENT = re.compile(
    r"\b(?:pi|agent) exited (?:code=|\()(?P<code>\d{1,9}|[^\W\d]\w*)\b(?: signal=(?P<signal>\w+))?"
)
# The words of the dashboard's keeper, and of a shorter one. A number of thousands of digits, which
# an agent may print, is no status: Python would refuse to read it.


def ending_of(folder: Folder, sid: str, *, failed_at: float | None = None) -> Ending:
    """Read how a session has ended; its keeper is dead.

    Args:
        folder: the sessions folder.
        sid: the session's id.
        failed_at: when it was noted down that it has failed, in seconds since the epoch, if it was.

    Raises:
        OSError: no descriptor or no memory is left to read it: that tells nothing.
    """
    return ending_in(_tail(folder, file_name(Role.KEEPER_LOG, sid)), failed_at=failed_at)


def ending_in(log: bytes, *, failed_at: float | None = None) -> Ending:
    """How a session has ended, by the end of its keeper's log.

    What was noted down holds until a keeper has started since: that one's log tells again.
    """
    lines = log.decode(errors="replace").splitlines()
    told = list(_told(lines))
    if failed_at is not None and not (told and _begun(told[-1]) > failed_at):
        return Ending.FAILED
    return _of_ours(told) if told else _of_another(lines)


def _begun(said: dict[str, Any]) -> float:
    """When a keeper of ours has said that it starts; 0 where it has said something else."""
    with contextlib.suppress(ValueError, OverflowError):  # an agent may have printed it
        if _what(said) == "start":
            return datetime.fromisoformat(str(said["timestamp"])).timestamp()
    return 0.0


def _told(lines: list[str]) -> Iterator[dict[str, Any]]:
    """What a keeper of ours has said in its last life, the newest first."""
    for line in reversed(lines):
        if line.startswith('{"timestamp"') and '"keeper_pid"' in line:
            with contextlib.suppress(ValueError, RecursionError):
                said = json.loads(line)
                yield said
                if _what(said) == "start":
                    return


def _of_ours(told: list[dict[str, Any]]) -> Ending:
    events = {_what(said): said for said in reversed(told)}
    exited = events.get("agent_exited")
    if exited is not None and _by_request(exited.get("signal", exited.get("exit_code"))):
        return Ending.ASKED
    if not events.keys().isdisjoint({"failed", "crashed"}):
        return Ending.FAILED
    if exited is not None:
        return Ending.FINISHED if exited.get("exit_code") == 0 else Ending.FAILED
    return Ending.ASKED if "stop" in events else Ending.KILLED


def _what(said: dict[str, Any]) -> str:
    """The event of a keeper, without the word that all have."""
    return str(said.get("event")).removeprefix("keeper.")


def _of_another(lines: list[str]) -> Ending:
    last = lines[-8:]
    farewell = next((found for line in reversed(last) if (found := _FAREWELL.search(line))), None)
    if farewell is None:
        return Ending.KILLED
    agent = next((found for line in reversed(last) if (found := _AGENT.search(line))), None)
    if agent is None:
        return Ending.ASKED if _by_request(farewell["why"].strip()) else Ending.UNKNOWN
    code, signal = agent["code"], agent["signal"]
    if not code.isdecimal():
        return Ending.ASKED if _by_request(signal or code) else Ending.FAILED
    if _by_request(int(code)):
        return Ending.ASKED
    return Ending.FINISHED if int(code) == 0 else Ending.FAILED


def _by_request(how: object) -> bool:
    return isinstance(how, str | int) and how in _BY_REQUEST


def _tail(folder: Folder, name: str) -> bytes:
    """The end of a log; nothing where none of ours stands."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    status = folder.status(name)
    if status is None or not stat.S_ISREG(status.st_mode):
        return b""
    try:
        descriptor = os.open(name, flags, dir_fd=folder.fd)
    except (FileNotFoundError, PermissionError):
        return b""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return b""
        return os.pread(descriptor, TAIL, max(0, status.st_size - TAIL))
    finally:
        os.close(descriptor)
