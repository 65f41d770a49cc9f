"""Who listens on a session's socket: this session's keeper, and nobody else."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from typing import NamedTuple

from reconciler import layout
from reconciler.deliveries import Reason
from reconciler.waiting import FinalError, TransientError

_SHOWS_KEYS = ".//"
# Before the socket's name in the name that a keeper is bound by, if it understands keys.

_EXITING = 0x4  # PF_EXITING in the flags of /proc/<pid>/stat, set before descriptors close
_PID_DIGITS = 10
_PIECE = 8192  # bytes read of a file in /proc
_CREDENTIALS = struct.Struct("3i")
_PID_FILE = layout.file_name(layout.Role.PID_FILE, "", "linux")
# What its name has behind the session's id; nothing stands before it.
_CAREFULLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_IN_MIND = 1024
# Sessions of whose keeper it is remembered what /proc says.


class Peer(NamedTuple):
    """The process that listens.

    Attributes:
        pid: its pid, which the session's pid file names too.
        started: when it started, in ticks since boot.
        ours: its arguments say that it is our keeper, of this session.
    """

    pid: int
    started: int
    ours: bool

    @property
    def process(self) -> tuple[int, int]:
        """Who it is: a pid alone may be another's later."""
        return self.pid, self.started

    def lives(self) -> bool:
        """Whether it has not begun to exit. Its connections end after it has begun."""
        process = _process(self.pid)
        return process is not None and process == (self.started, False)

    def written(self) -> int:
        """Bytes that our keeper has written, 0 where that cannot be told.

        It may hold a whole long line, and write it to its agent while nothing moves on the
        connection.
        """
        if self.ours:
            with contextlib.suppress(OSError, ValueError):
                return int(_read(f"/proc/{self.pid}/io").split()[3])
        return 0


def _process(pid: int) -> tuple[int, bool] | None:
    """When a process started and whether it is exiting, or None when there is none."""
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[19]), fields[0] in {b"Z", b"X"} or bool(int(fields[6]) & _EXITING)


def _is_ours(pid: int, sid: str) -> bool:
    try:
        arguments = os.fsdecode(_read(f"/proc/{pid}/cmdline")).split("\0")
    except OSError:
        return False
    said = layout.keeper_arguments(arguments, frozenset({layout.KEEPER_PROGRAM.name}))
    return said is not None and said.sid == sid


def _read(path: str) -> bytes:
    """The beginning of a file; the buffers of ``open`` would take a tenth of a whole write."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _PIECE)
    finally:
        os.close(descriptor)


class Peers:
    """Makes sure who listens, and remembers what ``/proc`` says of those it has seen.

    What is asked of every connection: whose process listens, and that it is the one of the pid
    file. What is remembered: when that process started, and as what. The kernel makes the inode
    of ``/proc/<pid>`` for one process, and a number for one inode; it may make another for the
    same process, but never finds the same for another. So the same inode is the same process,
    which is asked of every connection as well.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, int, int], Peer]] = {}

    def checked(self, sock: socket.socket, folder: int, sid: str) -> Peer:
        """The process that listens: our user's, and the one that the pid file names.

        Args:
            sock: a connection.
            folder: the sessions folder, open.
            sid: the session.
        """
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid != os.geteuid():
            raise FinalError(Reason.WRONG_USER)
        if pid != _named_pid(folder, sid):
            raise TransientError(Reason.WRONG_PEER)
        try:
            status = os.stat(f"/proc/{pid}")
        except OSError:
            raise TransientError(Reason.KEEPER_DIED) from None
        inode = status.st_dev, status.st_ino, status.st_ctime_ns
        known = self._known.get(sid)
        if known is not None and known[0] == inode and known[1].pid == pid:
            return known[1]
        # What is read from here on is of this process, or of one with another inode.
        return self._met(sid, pid, inode)

    def _met(self, sid: str, pid: int, inode: tuple[int, int, int]) -> Peer:
        process = _process(pid)
        if process is None:
            raise TransientError(Reason.KEEPER_DIED)
        peer = Peer(pid, process[0], _is_ours(pid, sid))
        self._known.pop(sid, None)
        self._known[sid] = inode, peer
        if len(self._known) > _IN_MIND:
            with contextlib.suppress(KeyError, RuntimeError):  # another thread was faster
                del self._known[next(iter(self._known))]
        return peer


def shows_keys(sock: socket.socket, sid: str) -> bool:
    """Whether the name that the listener is bound by says that it understands keys."""
    return bool(sock.getpeername() == _SHOWS_KEYS + layout.file_name(layout.Role.SOCKET, sid))


def _named_pid(folder_fd: int, sid: str) -> int:
    """The pid in the session's pid file; nothing is followed, nothing blocks."""
    try:
        descriptor = os.open(sid + _PID_FILE, _CAREFULLY, dir_fd=folder_fd)
    except FileNotFoundError:
        raise TransientError(Reason.NO_PID_FILE) from None
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:  # a link; a socket or a device
            raise FinalError(Reason.BAD_PID_FILE) from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise FinalError(Reason.BAD_PID_FILE)
        text = os.read(descriptor, _PID_DIGITS + 2)
    finally:
        os.close(descriptor)
    if not text:
        raise TransientError(Reason.NO_PID_FILE)
    digits = text.removesuffix(b"\n")
    if not digits.isdigit() or len(digits) > _PID_DIGITS:
        raise FinalError(Reason.BAD_PID_FILE)
    return int(digits)
