"""Where log lines go: never waited for, and what cannot be written is counted.

A `Sink` takes lines from whoever logs and hands them to a thread, which gives them to a
`Target`: a descriptor here, a file of its own (`reconciler.log_files`) or the journal
(`reconciler.journal`). The thread may be held up for as long as the system likes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import stat
import sys
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from structlog.typing import EventDict

BACKLOG = 8 << 20
"""Bytes of lines that may wait to be written: some 20,000 lines, two of a great cold start."""

PATIENCE = 0.5
"""Seconds that the end of the program waits for lines to be written."""

PIECE = 1 << 18
"""Bytes that are written to a file at once: each write gives the interpreter's lock away."""

_GATHER = 0.005
# Seconds between two writes: in a flood of lines the thread would else take the interpreter from
# who makes them, line by line.

_LINGER = 1.0
# Seconds without a line after which the thread that writes ends: a new one costs 50 us.


class SinkError(Exception):
    """The sink that was asked for cannot be had: which, why, and what to do."""


class Target(Protocol):
    """What the thread writes to."""

    @property
    def piece(self) -> int:
        """Bytes of lines that are taken at once; a single longer line is, too."""

    @property
    def trouble(self) -> str:
        """What the system said to the last thing that failed; empty when all is well."""

    def write(self, lines: list[bytes]) -> int:
        """Write lines that end in LF, however long that takes; how many are lost."""

    def reset(self) -> None:
        """Forget what is half done: a fork has made this a copy of the parent's."""


class Sink:
    """Takes lines. What cannot be written is dropped, and counted.

    Args:
        target: what a thread writes to; None: nothing is written.
        stream: a stream without a descriptor, that is written to as it is, in place of a target;
            or the one whose descriptor the target has: once it is closed, lines are dropped.
        terminal: whether a person looks on.
    """

    def __init__(
        self, target: Target | None, stream: TextIO | None = None, *, terminal: bool = False
    ) -> None:
        self.terminal = terminal
        self._stream = stream
        self._dropped = 0
        self._writer = _Writer(target) if target is not None else None
        _SINKS.add(self)

    @property
    def lost(self) -> int:
        """How many lines were dropped."""
        return self._dropped + (self._writer.lost if self._writer is not None else 0)

    def confess(self, event: EventDict) -> None:
        """Once lines were dropped, each later one says how many; and what does not work now."""
        writer = self._writer
        if self._dropped or (writer is not None and writer.lost):
            event["lines_dropped"] = self.lost
        if writer is not None and writer.trouble:
            event["log_trouble"] = writer.trouble

    def msg(self, line: bytes) -> None:
        """Take one line."""
        if not self._take(line + b"\n"):
            self._dropped += 1

    debug = info = warning = error = critical = msg

    def _take(self, line: bytes) -> bool:
        stream = self._stream
        if self._writer is not None:
            return not (stream is not None and stream.closed) and self._writer.put(line)
        # OSError: it takes no more. ValueError: it was closed.
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.write(line.decode())
                stream.flush()
            return True
        return False


_SINKS: weakref.WeakSet[Sink] = weakref.WeakSet()


def dropped() -> int:
    """How many lines this process's loggers have dropped; from any thread."""
    return sum(sink.lost for sink in tuple(_SINKS))


def to_stream(stream: TextIO | None) -> Sink:
    """A sink for a stream: its descriptor where it has one.

    Args:
        stream: None, as ``sys.stdout`` is when it was closed at the start: nowhere.
    """
    target: Target | None = None
    # OSError: a stream that has no descriptor. ValueError: it was closed.
    with contextlib.suppress(OSError, ValueError):
        if stream is not None:
            target = Descriptor(os.dup(stream.fileno()))  # a number of its own, nobody else's
    return Sink(target, stream, terminal=stream is not None and stream.isatty())


class Descriptor:
    """Writes lines to a descriptor, which it owns from here on."""

    def __init__(self, descriptor: int) -> None:
        self.trouble = ""
        self._descriptor = descriptor
        # A pipe is given PIPE_BUF at most: no other's line comes within that.
        self.piece = PIECE if stat.S_ISREG(os.fstat(descriptor).st_mode) else select.PIPE_BUF
        self._unsent = b""  # the rest of a line that the system has taken a part of
        self.close = weakref.finalize(self, os.close, descriptor)
        self.close.atexit = False

    def write(self, lines: list[bytes]) -> int:
        """Write them all; what the system refuses is lost."""
        data = self._unsent + b"".join(lines)  # no line begins within another
        rest = self._push(data)
        kept, lost = len(rest), 0
        while lines and len(lines[-1]) <= kept:
            kept -= len(lines.pop())
            lost += 1
        self._unsent = rest[:kept]
        return lost

    def settle(self) -> int:
        """Write the rest of a line; 1 if that is refused, and the line is lost."""
        rest, self._unsent = self._push(self._unsent), b""
        return int(bool(rest))

    def reset(self) -> None:
        """The rest of a line is the parent's to write."""
        self._unsent = b""

    def _push(self, data: bytes) -> bytes:
        """Write data piece by piece, and give back what was refused."""
        self.trouble = ""
        while data:
            try:
                data = data[os.write(self._descriptor, data[: self.piece]) :]
            except BlockingIOError:  # whoever else has it open made it so
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError as error:  # nobody reads any more, or the disk is full
                self.trouble = error.strerror or ""
                break
        return data


class _Writer:
    """Gives lines to a target, in their order, in a thread that whoever logs never waits for.

    The thread begins with a line, and ends when none came for a while.

    Attributes:
        lost: how many lines the target could not write.
        trouble: what the target's system said to the last thing that failed; empty: all is well.
    """

    def __init__(self, target: Target) -> None:
        self.lost = 0
        self.trouble = ""
        self.target = target
        self._begin()
        _WRITERS.add(self)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lines: deque[bytes] = deque()
        self._count = self._size = 0  # lines, bytes that wait, with those that are being written
        self._changed = threading.Condition()
        self._running = self._resting = self._hurried = False

    def put(self, line: bytes) -> bool:
        """Take one line, or refuse it where too many wait."""
        if self._pid != os.getpid():  # a fork: what waits is the parent's, as its thread is
            self.target.reset()
            self._begin()
        with self._changed:
            if self._size + len(line) > BACKLOG:
                return False
            self._lines.append(line)
            self._count += 1
            self._size += len(line)
            if self._resting:
                self._resting = False
                self._changed.notify_all()
            elif not self._running:
                self._start()
        return True

    def _start(self) -> None:
        with contextlib.suppress(RuntimeError):  # no more threads: the next line tries again
            threading.Thread(target=self._run, name="log", daemon=True).start()
            self._running = True

    def flush(self, seconds: float) -> int:
        """Wait until all is written, so long at most; how many are not."""
        if self._pid != os.getpid():
            return 0
        with self._changed:
            if self._size and not self._running:
                self._start()
            self._hurried = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._size, seconds)
            self._hurried = False
            return self._count

    def _run(self) -> None:
        while lines := self._next():
            count, size = len(lines), sum(map(len, lines))
            try:
                self.lost += self.target.write(lines)
            except OSError:  # a network filesystem: even a stat may fail
                self.lost += count
            self.trouble = self.target.trouble
            with self._changed:
                self._count -= count
                self._size -= size
                if self._hurried:
                    self._changed.notify_all()
                self._changed.wait_for(self._presses, _GATHER)

    def _presses(self) -> bool:
        return self._hurried or self._size > BACKLOG // 2

    def _next(self) -> list[bytes]:
        """Whole lines, as many as are written at once; none once none came for a while."""
        with self._changed:
            if not self._lines:
                self._resting = True
                self._changed.wait_for(lambda: self._lines, _LINGER)
                self._resting = False
            self._running = bool(self._lines)
            chosen: list[bytes] = []
            size = 0
            while self._lines and (not chosen or size + len(self._lines[0]) <= self.target.piece):
                chosen.append(self._lines.popleft())
                size += len(chosen[-1])
        return chosen


_WRITERS: weakref.WeakSet[_Writer] = weakref.WeakSet()


def flush(seconds: float = PATIENCE) -> int:
    """Wait until all lines are written, for so long at most; how many are not."""
    end = time.monotonic() + seconds
    return sum(writer.flush(max(0.0, end - time.monotonic())) for writer in tuple(_WRITERS))


@atexit.register
def _leave() -> None:
    """Say on standard error what nobody took, and no line has told of; if that takes it at once."""
    left = flush() + sum(writer.lost for writer in tuple(_WRITERS) if writer.trouble)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be none
        poll = select.poll()
        poll.register(sys.stderr.fileno(), select.POLLOUT)
        if left and poll.poll(0):
            told = f"pi-reconciler: {left} log lines could not be written before the end\n"
            os.write(sys.stderr.fileno(), told.encode())
