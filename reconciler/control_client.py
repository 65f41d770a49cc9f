"""Asking a folder's daemon how it stands, and listening to what it does.

The folder's lock says whether one works on it, and the control socket what it is up to. What
answers is believed only if it is a process of our user, and no other one holds the lock.
"""

from __future__ import annotations

import enum
import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reconciler.folder import Folder
from reconciler.layout import CONTROL_SOCKET

PATIENCE = 1.0
"""Seconds in which a daemon must have answered."""

_PAUSE = 0.02
# Seconds between two tries: between its lock and its socket a daemon that starts needs less.

_PIECE = 1 << 16
_LONGEST = 1 << 20
# Bytes of one line that are taken in: the log's are far shorter.


_SAID: Mapping[str, type | tuple[type, ...]] = {
    "version": str,
    "pid": int,
    "started_at": str,
    "uptime_s": float,
    "folder": str,
    "sessions": dict,
    "streams": bool,
    "only_looks_on": (str, type(None)),
    "last_action": (dict, type(None)),
}
# What a status has; what else it has may be newer than this.


class State(enum.Enum):
    """Whether a daemon works on a folder."""

    RUNNING = "running"
    NOT_RUNNING = "not_running"
    NOT_KNOWN = "not_known"


class Found(NamedTuple):
    """What was found out about a folder's daemon.

    Attributes:
        state: whether one works on the folder.
        pid: its process, where that is known.
        reason: why it is not known to run; empty when it runs.
        status: its own words, when it runs.
        stream: what it tells from now on. Close it.
        silent: one listens, and does not answer.
    """

    state: State
    pid: int | None
    reason: str
    status: Mapping[str, Any] = {}
    stream: Stream | None = None
    silent: bool = False


class Stream:
    """Whole lines from a connection, and nothing longer than a line of the log can be."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._rest = b""
        self._whole: list[bytes] = []  # lines that came with the first one

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._client.fileno()

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def read(self) -> list[bytes] | None:
        """The lines that have come, without waiting; None once no more will come."""
        if self._whole:
            lines, self._whole = self._whole, []
            return lines
        try:
            data = self._client.recv(_PIECE)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines if data and len(self._rest) <= _LONGEST else None

    def first(self, deadline: float) -> dict[str, Any] | None:
        """The first line as a JSON object; None when none has come in time.

        Raises:
            ValueError: what came is none, or nothing came and nothing will.
        """
        poll = select.poll()
        poll.register(self, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            poll.poll(left * 1000)
            if (lines := self.read()) is None:
                raise ValueError("it hung up")
            if lines:
                self._whole = lines[1:]
                return _status(lines[0])
        return None


def _status(line: bytes) -> dict[str, Any]:
    """A daemon's first line; ValueError if it is none."""
    try:
        status = json.loads(line)
    except RecursionError:
        raise ValueError("its line nests too deep") from None
    if not isinstance(status, dict) or not all(
        key in status and isinstance(status[key], kind) for key, kind in _SAID.items()
    ):
        raise ValueError("its line is no status")
    return status


def find(path: Path, patience: float = PATIENCE) -> Found:
    """Find out whether a daemon works on a folder, and how it stands.

    Args:
        path: the sessions folder.
        patience: seconds to wait for an answer.
    """
    deadline = time.monotonic() + patience
    try:
        folder = Folder(path)
    except FileNotFoundError:
        return Found(State.NOT_RUNNING, None, f"there is no folder {path}")
    except OSError as error:
        return Found(State.NOT_KNOWN, None, f"{path} cannot be opened: {error.strerror}")
    with folder:
        while (found := _find(folder, deadline)).state is State.NOT_KNOWN:
            if time.monotonic() + _PAUSE >= deadline:
                break
            time.sleep(_PAUSE)
        return found


def _find(folder: Folder, deadline: float) -> Found:
    holder = folder.lock_holder()
    try:
        client = folder.connect(CONTROL_SOCKET)
    except (FileNotFoundError, ConnectionRefusedError):
        if holder is None:
            return Found(State.NOT_RUNNING, None, f"no daemon works on {folder.path}")
        reason = f"process {holder} holds the folder's lock, and does not say how it stands"
        return Found(State.NOT_KNOWN, holder, reason)
    except BlockingIOError:
        return _silent(holder)
    except OSError as error:
        return Found(State.NOT_KNOWN, holder, f"{CONTROL_SOCKET} cannot be asked: {error.strerror}")
    stream = Stream(client)
    found = _ask(stream, holder, deadline, _distrust(client, holder))
    if found.stream is None:
        stream.close()
    return found


def _ask(stream: Stream, holder: int | None, deadline: float, distrust: str) -> Found:
    if distrust:
        return Found(State.NOT_KNOWN, holder, distrust)
    try:
        status = stream.first(deadline)
    except ValueError as error:
        return Found(State.NOT_KNOWN, holder, f"{CONTROL_SOCKET} answers, but not as ours: {error}")
    if status is None:
        return _silent(holder)
    return Found(State.RUNNING, holder or status.get("pid"), "", status, stream)


def _silent(holder: int | None) -> Found:
    who = f"process {holder}" if holder else "a process that cannot be named"
    reason = f"{who} holds the control socket, and does not answer: it hangs, or was stopped"
    return Found(State.NOT_KNOWN, holder, reason, silent=True)


def _distrust(client: socket.socket, holder: int | None) -> str:
    """Why whoever answers is not believed, or nothing.

    The kernel does not name the lock's holder everywhere (btrfs, overlays, another pid
    namespace): then it is enough that only our user can open a socket there.
    """
    if sys.platform != "linux":
        return ""
    size = struct.calcsize("3i")
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, _ = struct.unpack("3i", credentials)
    if uid != os.geteuid():
        return f"{CONTROL_SOCKET} is answered by process {pid} of uid {uid}, not by one of ours"
    if not pid:
        return f"{CONTROL_SOCKET} is answered by a process that cannot be named (a container's?)"
    if holder not in {None, pid}:
        return f"{CONTROL_SOCKET} is answered by process {pid}, the lock is held by {holder}"
    return ""
