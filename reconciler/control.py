"""The control socket: the daemon tells whoever asks how it stands, and what it does as it does it.

It stands in the sessions folder under a hidden name, and is opened by whoever holds the folder's
lock. Who connects is sent one JSON line of status, then the log's lines as they are told. Nothing
is read but the end of the connection. It never waits: for one who is slow so many lines are kept,
those beyond are dropped, counted, and told.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from reconciler import __version__
from reconciler.folder import Answer, Folder
from reconciler.layout import CONTROL_SOCKET
from reconciler.logs import SEVERITIES, as_json
from reconciler.processes import TO_END, TO_LOOK, leaves_free
from reconciler.reports import ACTIONS, Log
from reconciler.sessions import SessionTable

MOST_LISTENERS = 16
"""How many are told of events at a time, fewer where descriptors are few: looking and ending go
before. One more is told the status, and hung up on."""

BACKLOG = 1 << 20
"""Bytes of lines that wait for one listener: more than one slice of the loop can tell."""

_PAUSE = 1.0
# Seconds until connections are taken again after the system had no room for one.

Heard = Callable[[str, str, Mapping[str, object]], None]
"""Takes a level, an event and its fields, from any thread."""


class Tap:
    """A logger that hands all it is told on, remembers what was done last, and can be listened to.

    Args:
        log: where the lines go.

    Attributes:
        counts: how often each event was told.
        last: the last action: the event that told it, its fields, and when, in seconds since
            the epoch.
        listener: called with every line, whatever level the log takes.
    """

    def __init__(self, log: Log) -> None:
        self.counts: dict[str, int] = {}
        self.last: tuple[str, Mapping[str, object], float] | None = None
        self.listener: Heard | None = None
        self._log = log

    def is_enabled_for(self, level: int) -> bool:
        """Whether anybody takes lines of this level."""
        return self.listener is not None or self._log.is_enabled_for(level)

    def debug(self, event: str, **fields: object) -> None:
        """Tell what is for those who look for a defect."""
        self._log.debug(event, **fields)
        if listener := self.listener:
            listener("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Tell what was done."""
        self._log.info(event, **fields)
        if event in ACTIONS:
            self.last = event, fields, time.time()
        self._heard("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Tell what somebody should look at."""
        self._log.warning(event, **fields)
        self._heard("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Tell what went wrong."""
        self._log.error(event, **fields)
        self._heard("error", event, fields)

    def _heard(self, level: str, event: str, fields: Mapping[str, object]) -> None:
        self.counts[event] = self.counts.get(event, 0) + 1
        if listener := self.listener:  # read once: the loop's thread may let go of it
            listener(level, event, fields)


class Control:
    """Answers on the control socket of a folder.

    All of it runs in the event loop's thread; only what is told may come from others, too.

    Args:
        tap: what is told.
        sessions: what the status counts.
    """

    def __init__(self, tap: Tap, sessions: SessionTable) -> None:
        self._tap = tap
        self._sessions = sessions
        self._started_at = _stamp(time.time())
        self._begun = time.monotonic()
        self._listeners: set[_Listener] = set()
        self._door: socket.socket | None = None
        self._born = (0, 0)  # device and inode of the socket's name
        self._complaint = ""

    def serve(self, folder: Folder, may_not_act: Callable[[], str]) -> None:
        """Answer in a folder whose lock is held; called again, see to it that it can be found.

        Args:
            folder: the folder. Call `close` before it is closed.
            may_not_act: why it is only looked on just now, or nothing.
        """
        self._folder, self._may_not_act = folder, may_not_act
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        try:
            if self._door is None or not self._in_place():
                self._shut()
                self._open()
            self._complaint = ""
        except OSError as error:
            self._complain(f"{CONTROL_SOCKET}: {error.strerror}")

    def close(self) -> None:
        """Hang up on everybody, and remove the socket. May be called twice."""
        if self._door is not None:
            with contextlib.suppress(OSError):
                # Whoever holds the lock is the only one who puts another one there.
                if self._in_place():
                    os.unlink(CONTROL_SOCKET, dir_fd=self._folder.fd)
        self._shut()
        for listener in tuple(self._listeners):
            listener.end()

    def _open(self) -> None:
        self._clear_way()
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            _bind(door, self._folder)
            status = os.stat(CONTROL_SOCKET, dir_fd=self._folder.fd, follow_symlinks=False)
            door.listen(MOST_LISTENERS)
        except BaseException:
            door.close()
            raise
        self._born = (status.st_dev, status.st_ino)
        self._door = door
        self._loop.add_reader(door, self._accept, door)

    def _clear_way(self) -> None:
        """Remove what a dead predecessor has left, and nothing else."""
        stands = self._folder.status(CONTROL_SOCKET)
        if stands is None:
            return
        if not stat.S_ISSOCK(stands.st_mode) or stands.st_uid != os.geteuid():
            raise OSError(errno.EEXIST, "something else than a socket of ours has that name")
        if self._folder.ask(CONTROL_SOCKET).answer is not Answer.REFUSED:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        os.unlink(CONTROL_SOCKET, dir_fd=self._folder.fd)

    def _in_place(self) -> bool:
        stands = self._folder.status(CONTROL_SOCKET)
        return stands is not None and (stands.st_dev, stands.st_ino) == self._born

    def _shut(self) -> None:
        if self._door is not None:
            self._loop.remove_reader(self._door)
            self._door.close()
            self._door = None

    def _complain(self, reason: str) -> None:
        if reason != self._complaint:
            self._complaint = reason
            self._tap.warning("control.unavailable", folder=str(self._folder.path), reason=reason)

    def _accept(self, door: socket.socket) -> None:
        try:
            client, _ = door.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:  # no descriptor is left: the door would be ready for ever
            self._loop.remove_reader(door)
            self._loop.call_later(_PAUSE, self._accept_again, door)
            return
        client.setblocking(False)
        listener = _Listener(self._loop, client, self._leave)
        self._listeners.add(listener)
        self._tap.listener = self._tell
        room = leaves_free(client.fileno(), TO_LOOK + TO_END)
        if len(self._listeners) > MOST_LISTENERS or not room:
            listener.farewell(as_json(self.status(streams=False)) + b"\n")
        else:
            listener.tell(as_json(self.status(streams=True)) + b"\n")

    def _accept_again(self, door: socket.socket) -> None:
        if door is self._door:
            self._loop.add_reader(door, self._accept, door)

    def _leave(self, listener: _Listener) -> None:
        self._listeners.discard(listener)
        if not self._listeners:
            self._tap.listener = None

    def _tell(self, level: str, event: str, fields: Mapping[str, object]) -> None:
        stamped = {
            **fields,
            "timestamp": _stamp(time.time()),
            "level": level,
            "severity_number": SEVERITIES[level],
            "event": event,
        }
        line = as_json(stamped) + b"\n"
        if threading.get_ident() == self._thread:
            self._tell_all(line)
        else:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._tell_all, line)

    def _tell_all(self, line: bytes) -> None:
        for listener in tuple(self._listeners):
            listener.tell(line)

    def status(self, *, streams: bool) -> dict[str, object]:
        """How the daemon stands, as its first line tells it.

        Args:
            streams: whether events follow.
        """
        return {
            "timestamp": _stamp(time.time()),
            "level": "info",
            "severity_number": SEVERITIES["info"],
            "event": "reconciler.status",
            "version": __version__,
            "pid": os.getpid(),
            "started_at": self._started_at,
            "uptime_s": round(time.monotonic() - self._begun, 3),
            "dry_run": False,  # one that only looks on has no lock, and so no control socket
            "folder": str(self._folder.path),
            "only_looks_on": self._may_not_act() or None,
            "sessions": dict(Counter(row.phase.value for row in self._sessions.values())),
            "last_action": self._last_action(),
            "counts": dict(self._tap.counts),
            "streams": streams,
        }

    def _last_action(self) -> dict[str, object] | None:
        if self._tap.last is None:
            return None
        event, fields, at = self._tap.last
        told = {key: fields.get(key) for key in ("sid", "reason")}
        return {"event": event, **told, "at": _stamp(at)}


class _Listener:
    """One who is connected: takes what fits, and is told how much did not."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        client: socket.socket,
        leave: Callable[[_Listener], None],
    ) -> None:
        self._loop = loop
        self._client = client
        self._leave = leave
        self._waiting = bytearray()
        self._dropped = 0
        self._last_words = False
        loop.add_reader(client, self._heard)

    def tell(self, line: bytes) -> None:
        """Send one line as soon as it can be, or drop it."""
        if self._last_words:
            return
        # Once one was dropped all are, until it is told where they are missing.
        if self._dropped or len(self._waiting) + len(line) > BACKLOG:
            self._dropped += 1
            return
        if not self._waiting:
            self._loop.add_writer(self._client, self._send)
        self._waiting += line

    def farewell(self, line: bytes) -> None:
        """Send a last line, and hang up."""
        self.tell(line)
        self._last_words = True

    def end(self) -> None:
        """Hang up, once what it takes at once was sent."""
        with contextlib.suppress(OSError):
            self._client.send(self._waiting)
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._loop.remove_reader(self._client)
        self._loop.remove_writer(self._client)
        self._client.close()
        self._leave(self)

    def _send(self) -> None:
        try:
            del self._waiting[: self._client.send(self._waiting)]
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if self._waiting:
            return
        self._loop.remove_writer(self._client)
        if self._last_words:
            self.close()
        elif self._dropped:
            notice = _dropped(self._dropped)
            self._dropped = 0
            self.tell(notice)

    def _heard(self) -> None:
        """It has hung up, or it talks: who is not listened to is not kept."""
        with contextlib.suppress(BlockingIOError):
            with contextlib.suppress(ConnectionError):
                self._client.recv(1)
            self.close()


def _dropped(lines: int) -> bytes:
    notice: dict[str, Any] = {
        "timestamp": _stamp(time.time()),
        "level": "warning",
        "severity_number": SEVERITIES["warning"],
        "event": "control.lines_dropped",
        "lines_dropped": lines,
    }
    return as_json(notice) + b"\n"


def _bind(door: socket.socket, folder: Folder) -> None:
    """Give the socket its name, closed to others from its birth, however long the path is."""
    if sys.platform == "linux":
        os.fchmod(door.fileno(), 0o600)  # the mode that its name will have
        door.bind(f"/proc/self/fd/{folder.fd}/{CONTROL_SOCKET}")
    else:  # nobody can connect before it listens
        door.bind(str(folder.path / CONTROL_SOCKET))
        os.chmod(CONTROL_SOCKET, 0o600, dir_fd=folder.fd, follow_symlinks=False)


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")[:-6] + "Z"
