"""One connection to a session's keeper, and to nobody else; what is known of its bytes."""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import socket
import stat
import sys
import termios
import threading
from collections import deque
from pathlib import Path

from reconciler import layout
from reconciler.deliveries import Reason
from reconciler.peers import Peer, Peers, shows_keys
from reconciler.trust import Trust
from reconciler.waiting import (
    AttemptError,
    FinalError,
    Moment,
    Patience,
    Script,
    TransientError,
    UnconfirmedError,
    Wait,
)

_PIECE = 8192
# Bytes handed to the kernel at once. The kernel tells that a piece was read, never how much
# of one: smaller pieces make a slower agent's progress visible (8 KiB in 350 ms is 23 kB/s),
# and cost 40 MiB no more than 6 ms.

_TURN = 1 << 20
# Bytes sent before the event loop gets a turn, where a fast keeper never makes us wait.

_READS = 10
# Reads at most of what a keeper says, at one look.


_SOCKET = layout.file_name(layout.Role.SOCKET, "", "linux")
# What its name has behind the session's id; nothing stands before it.


class _Heard(enum.Enum):
    """What the connection says while nobody answers on it."""

    NOTHING = "nothing"
    END = "end"
    RESET = "reset"


class _Ledger:
    """Which bytes the other side has surely read.

    The kernel tells how much memory (`_queued`) all pieces take that were not read to their
    end, first in, first out. What each of them takes is seen when it is sent, never as more
    than it is: so the newest pieces that explain the memory are at least those unread.

    Attributes:
        handed: bytes sent.
        taken: bytes surely read, the end of a piece.
    """

    __slots__ = ("_explained", "_pieces", "_queued", "handed", "taken")

    def __init__(self) -> None:
        self.handed = 0
        self.taken = 0
        self._pieces: deque[tuple[int, int]] = deque()  # where each ends, what it takes
        self._explained = 0
        self._queued = 0  # when last looked at

    def sent_alone(self, size: int) -> None:
        """Enter the only piece: nothing has to be known of it but whether anything is queued."""
        self.handed += size
        self._pieces.append((self.handed, 0))

    def sent(self, size: int, queued: int) -> None:
        """Enter a piece, with what is queued now."""
        self.handed += size
        weight = max(0, queued - self._queued)
        self._queued = queued
        self._pieces.append((self.handed, weight))
        self._explained += weight

    def seen(self, queued: int) -> bool:
        """Strike what must have been read; whether more was than before."""
        less = queued < self._queued
        self._queued = queued
        while self._pieces and self._explained - self._pieces[0][1] >= queued:
            self.taken, weight = self._pieces.popleft()
            self._explained -= weight
            less = True
        return less


class Link:
    """A connection to a keeper that was checked, and what is known of it.

    Our keeper reads the last byte of a line only once the line is in the agent's standard
    input: from it, what is taken is delivered.
    """

    __slots__ = ("_heard", "_ledger", "_lock", "_sock", "_written", "peer")

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        self.peer = peer
        self._sock = sock
        self._ledger = _Ledger()
        self._heard = _Heard.NOTHING
        self._written: int | None = None  # by the peer, when last looked at
        self._lock = threading.RLock()  # writes that wait for a stream look at its link

    @property
    def handed(self) -> int:
        """Bytes that the kernel took for the keeper."""
        return self._ledger.handed

    @property
    def taken(self) -> int:
        """Bytes that the keeper has surely read."""
        return self._ledger.taken

    def shows_keys(self, sid: str) -> bool:
        """Whether the keeper shows that it understands keys."""
        return shows_keys(self._sock, sid)

    def close(self) -> None:
        """Close the connection: the keeper gets what was handed over, and no more."""
        with self._lock:
            self._sock.close()

    def cut(self) -> None:
        """Make whoever waits on the connection see its end, without closing it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def deliver(self, data: bytes | bytearray, patience: Patience) -> Script[Reason]:
        """Hand everything to the kernel, say that this was all, and wait for the receipt.

        Args:
            data: all there is; of a stream nothing, what it had was sent before.
            patience: how long to wait without progress.
        """
        sent = self._send_alone(data) if 0 < len(data) <= _PIECE else 0
        if sent < len(data):
            yield from self.send(memoryview(data)[sent:], patience)
        self.check_open()
        try:  # noqa: SIM105 - on every write's way, and a context costs it a microsecond
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        patience.renew()
        while (heard := self.hear()) is _Heard.NOTHING:
            yield Wait(Moment.RECEIPT, patience.look, self._sock)
            self._look(patience)
        if heard is _Heard.RESET:
            raise self._broken()
        return self._receipt()

    def _send_alone(self, data: bytes | bytearray) -> int:
        """Hand the only piece over, if it goes at once: there is nothing to measure yet."""
        try:
            sent = self._sock.send(data)
        except OSError:  # `send` meets it again, and says what it means
            return 0
        self._ledger.sent_alone(sent)
        return sent

    def send(self, data: bytes | bytearray | memoryview, patience: Patience) -> Script[None]:
        """Hand everything to the kernel."""
        self._measure()
        all_of_it = memoryview(data)
        at, turn_at = 0, self.handed + _TURN
        while at < len(all_of_it):
            try:
                count = self._sock.send(all_of_it[at : at + _PIECE])
            except BlockingIOError:
                yield Wait(Moment.SENDING, patience.look, self._sock)
                self._look(patience)
                continue
            except OSError:
                raise self._broken() from None
            self._ledger.sent(count, _queued(self._sock))
            at += count
            patience.renew()
            if self.handed >= turn_at:
                turn_at = self.handed + _TURN
                yield Wait(Moment.SENDING, 0)

    def _receipt(self) -> Reason:
        """Believe the end of the stream, or not.

        The kernel ends it without a reset only when every byte was read. For our keeper
        that says all. Another one may have had bytes in its memory as it died.
        """
        if self.peer.ours:
            return Reason.RECEIPT
        if self.peer.lives():
            return Reason.HANDED_ON
        raise UnconfirmedError(Reason.KEEPER_DIED)

    def _look(self, patience: Patience) -> None:
        """See what came of a wait. Without any progress it may have been the last one."""
        if self.hear() is not _Heard.NOTHING:
            return
        if self.progressed():
            patience.renew()
        if patience.over:
            raise self._failure(Reason.TIMED_OUT_AFTER if self.handed else Reason.TIMED_OUT_BEFORE)

    def hear(self) -> _Heard:
        """Whether the keeper has closed. What it says, which is nothing, is dropped."""
        with self._lock:
            if self._heard is _Heard.NOTHING:
                self._heard = self._listen()
            return self._heard

    def _listen(self) -> _Heard:
        try:
            for _ in range(_READS):
                if not self._sock.recv(_PIECE):
                    return _Heard.END
        except BlockingIOError:
            pass
        except OSError:
            return _Heard.RESET  # told once: the next read would say "end"
        return _Heard.NOTHING

    def check_open(self) -> None:
        """Raise when the keeper has closed already."""
        if self.hear() is not _Heard.NOTHING:
            raise self._broken()

    def progressed(self) -> bool:
        """Whether the keeper did something since the last look: read of us, or wrote on."""
        before, self._written = self._written, self.peer.written()
        return self._measure() or before not in {None, self._written}

    def drained(self, patience: Patience) -> bool:
        """Whether the keeper has taken everything, or will never take any more."""
        if self.progressed():
            patience.renew()
        return self.taken >= self.handed or self._heard is not _Heard.NOTHING

    def _measure(self) -> bool:
        """See how much the keeper has taken; whether that is more than before."""
        with self._lock:
            if self._sock.fileno() < 0:
                self._heard = _Heard.RESET
                return False
            queued = _queued(self._sock)
            # Only now: a keeper that closed would have thrown away what was queued.
            return self.hear() is _Heard.NOTHING and self._ledger.seen(queued)

    def _broken(self) -> AttemptError:
        return self._failure(Reason.BROKEN if self.peer.lives() else Reason.KEEPER_DIED)

    def _failure(self, reason: Reason) -> AttemptError:
        return (UnconfirmedError if self.handed else TransientError)(reason)


def _queued(sock: socket.socket) -> int:
    """Memory that the kernel holds for bytes which the peer has not read.

    It counts whole pieces and their overhead: never less than the bytes, 0 when none.
    """
    answer = fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0")
    return int.from_bytes(answer, sys.byteorder)


# -- Connecting: nobody but this session's keeper -----------------------------------------


def connect(folder: Path, sid: str, trust: Trust, peers: Peers) -> Link:
    """Connect to the session's keeper, and to nobody else. It is tried once, and never waits."""
    try:
        inside = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if trust.distrust(inside, folder):
                raise FinalError(Reason.UNTRUSTED_FOLDER)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                _reach(sock, inside, sid)
                return Link(sock, peers.checked(sock, inside, sid))
            except BaseException:
                sock.close()
                raise
        finally:
            os.close(inside)
    except OSError as error:
        raise _failure_of(error) from None


def _reach(sock: socket.socket, inside: int, sid: str) -> None:
    """Connect to the socket that stands in the folder now."""
    pinned = os.open(sid + _SOCKET, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
    try:
        _check_socket(pinned)
        sock.connect(f"/proc/self/fd/{pinned}")
    finally:
        os.close(pinned)


def _check_socket(descriptor: int) -> None:
    """The socket's inode is held: no link was followed, and no path is too long to connect to."""
    status = os.fstat(descriptor)
    if not stat.S_ISSOCK(status.st_mode):
        raise FinalError(Reason.NOT_A_SOCKET)
    if status.st_uid != os.geteuid():
        raise FinalError(Reason.WRONG_USER)


def _failure_of(error: OSError) -> AttemptError:
    """What a system error on the way to a connection means."""
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return TransientError(Reason.NO_SOCKET)
        case errno.ECONNREFUSED:
            return TransientError(Reason.REFUSED)
        case errno.EAGAIN:
            return TransientError(Reason.BACKLOG_FULL)
        case errno.EMFILE | errno.ENFILE | errno.ENOMEM | errno.ENOBUFS:
            return TransientError(Reason.NO_RESOURCES)
        case errno.EACCES | errno.EPERM:
            return FinalError(Reason.PERMISSION)
        case errno.EPROTOTYPE:
            return FinalError(Reason.NOT_A_SOCKET)
        case _:
            return TransientError(Reason.SYSTEM_ERROR)
