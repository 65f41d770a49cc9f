"""Logging: one JSON object a line, or the console form on a terminal.

Event names are constant and dotted; everything else is a key. See ``docs/logs.md``.

A log must never be what stops the work: no value, however odd, no broken or full pipe and no
disk that hangs makes a call here fail, or wait.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import stat
import sys
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

import msgspec
import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, FilteringBoundLogger

Level = Literal["debug", "info", "warning", "error"]
Form = Literal["auto", "json", "console"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """How the program's own log is written.

    Attributes:
        level: the lowest level that is written.
        form: how a line looks; ``auto``: console on a terminal, JSON elsewhere.
    """

    level: Level = "info"
    form: Form = "auto"


LEVELS: dict[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

BACKLOG = 8 << 20
"""Bytes of lines that may wait to be written: some 20,000 lines, two of a great cold start."""

PATIENCE = 0.5
"""Seconds that the end of the program waits for lines to be written."""

_PIECE = 1 << 18
# Bytes that are written to a file at once: each write gives the interpreter's lock away. A pipe
# is given PIPE_BUF at most: no other's line comes within that.

_GATHER = 0.005
# Seconds between two writes: in a flood of lines the thread would else take the interpreter from
# who makes them, line by line.

_LINGER = 1.0
# Seconds without a line after which the thread that writes ends: a new one costs 50 us.


def get_logger() -> FilteringBoundLogger:
    """The logger of the library.

    It is the application's when the application has configured structlog; else JSON lines
    from level ``info`` up on standard error, so that nothing mixes with anybody's output.
    """
    if structlog.is_configured():
        logger: FilteringBoundLogger = structlog.get_logger("reconciler")
        return logger
    return make_logger(sys.stderr, "info", "json")


def make_logger(
    stream: TextIO | None, level: Level = "info", form: Form = "auto", *, colors: bool = True
) -> FilteringBoundLogger:
    """A logger of our own that leaves structlog's configuration alone.

    Args:
        stream: where the lines go; None, as ``sys.stdout`` is when it was closed at the
            start: nowhere.
        level: the lowest level that is written.
        form: ``json``, ``console``, or ``auto``: console on a terminal, JSON elsewhere.
        colors: the console form may be coloured, where a terminal shows it.
    """
    terminal = stream is not None and stream.isatty()
    if form == "auto":
        form = "console" if terminal else "json"
    sink = _Sink(stream)
    proxy = structlog.wrap_logger(
        sink,
        processors=[_Stamp(sink), *_form(form, colors=terminal and colors)],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
    )
    logger: FilteringBoundLogger = proxy.bind()  # itself: the proxy would cost at every line
    return logger


def set_level(logger: FilteringBoundLogger, level: Level) -> None:
    """Have a logger that `make_logger` made write another level, wherever it is held."""
    # What it lets through is its class's, so that a line below the level costs nothing.
    logger.__class__ = structlog.make_filtering_bound_logger(LEVELS[level])


def _form(form: Form, *, colors: bool) -> tuple[Any, ...]:
    """The processors that make an event a line."""
    if form == "json":
        return (_json,)
    console = structlog.dev.ConsoleRenderer(
        sort_keys=False,
        colors=colors,
        exception_formatter=structlog.dev.plain_traceback,
    )
    return console, _utf8_line


class _Sink:
    """Takes lines for a stream. What cannot be written is dropped, and counted.

    The lines go to the descriptor itself, in a thread; streams without one are written to as
    they are.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._dropped = 0
        self._writer: _Writer | None = None
        # OSError: a stream that has no descriptor. ValueError: it was closed.
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                self._writer = _Writer(stream.fileno())
        _SINKS.add(self)

    @property
    def lost(self) -> int:
        """How many lines were dropped."""
        return self._dropped + (self._writer.lost if self._writer is not None else 0)

    def confess(self, event: EventDict) -> None:
        """Once lines were dropped, each later one says how many."""
        if lost := self.lost:
            event["lines_dropped"] = lost

    def msg(self, line: bytes) -> None:
        """Take one line."""
        if self._stream is not None and not self._take(self._stream, line + b"\n"):
            self._dropped += 1

    debug = info = warning = error = critical = msg

    def _take(self, stream: TextIO, line: bytes) -> bool:
        if self._writer is not None:
            return not stream.closed and self._writer.put(line)
        # OSError: it takes no more. ValueError: it was closed.
        with contextlib.suppress(OSError, ValueError):
            stream.write(line.decode())
            stream.flush()
            return True
        return False


_SINKS: weakref.WeakSet[_Sink] = weakref.WeakSet()


def dropped() -> int:
    """How many lines this process's loggers have dropped; from any thread."""
    return sum(sink.lost for sink in tuple(_SINKS))


class _Writer:
    """Writes lines to a descriptor, in their order, in a thread that whoever logs never waits for.

    The thread may be held up for as long as the system likes: by a full pipe, a stopped
    terminal, a disk that hangs. It begins with a line, and ends when none came for a while.

    Attributes:
        lost: how many lines the system has refused.
    """

    def __init__(self, descriptor: int) -> None:
        self.lost = 0
        self._descriptor = os.dup(descriptor)  # its number cannot become another file's
        self._piece = _PIECE if _is_file(descriptor) else select.PIPE_BUF
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        self._begin()
        _WRITERS.add(self)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lines: deque[bytes] = deque()
        self._count = self._size = 0  # lines, bytes that wait, with those that are being written
        self._unsent = b""  # the rest of a line that the system has taken a part of
        self._changed = threading.Condition()
        self._running = self._resting = self._hurried = False

    def put(self, line: bytes) -> bool:
        """Take one line, or refuse it where too many wait."""
        if self._pid != os.getpid():  # a fork: what waits is the parent's, as its thread is
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
        """Wait until all is written, so long at most; how many lines are not."""
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
            self._write(lines)
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
            while self._lines and (not chosen or size + len(self._lines[0]) <= self._piece):
                chosen.append(self._lines.popleft())
                size += len(chosen[-1])
        return chosen

    def _write(self, lines: list[bytes]) -> None:
        """Write them all, however long that takes; what the system refuses is lost."""
        data = self._unsent + b"".join(lines)  # no line begins within another
        rest = _push(self._descriptor, data, self._piece)
        kept = len(rest)
        while lines and len(lines[-1]) <= kept:
            kept -= len(lines.pop())
            self.lost += 1
        self._unsent = rest[:kept]


def _push(descriptor: int, data: bytes, piece: int) -> bytes:
    """Write data piece by piece, and give back what was refused."""
    with contextlib.suppress(OSError):  # nobody reads any more, or the disk is full
        while data:
            try:
                data = data[os.write(descriptor, data[:piece]) :]
            except BlockingIOError:  # whoever else has it open made it so
                poll = select.poll()
                poll.register(descriptor, select.POLLOUT)
                poll.poll()
    return data


def _is_file(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


_WRITERS: weakref.WeakSet[_Writer] = weakref.WeakSet()


def flush(seconds: float = PATIENCE) -> int:
    """Wait until all lines are written, for so long at most; how many are not."""
    end = time.monotonic() + seconds
    return sum(writer.flush(max(0.0, end - time.monotonic())) for writer in tuple(_WRITERS))


@atexit.register
def _leave() -> None:
    """Say on standard error what nobody took, if that takes it at once."""
    left = flush()
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be none
        poll = select.poll()
        poll.register(sys.stderr.fileno(), select.POLLOUT)
        if left and poll.poll(0):
            told = f"pi-reconciler: {left} log lines could not be written before the end\n"
            os.write(sys.stderr.fileno(), told.encode())


class _Stamp:
    """Gives an event its time and level, and its exception as a text."""

    def __init__(self, sink: _Sink) -> None:
        self._confess = sink.confess
        self._second = 0
        self._text = ""

    def __call__(self, logger: object, method: str, event: EventDict) -> EventDict:
        """Add them."""
        self._confess(event)
        event["level"] = method
        event["timestamp"] = self._now()
        return _EXCEPTION(logger, method, event) if "exc_info" in event else event

    def _now(self) -> str:
        """RFC 3339; a second's text is made once."""
        second, microsecond = divmod(time.time_ns() // 1000, 1_000_000)
        if second != self._second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second, self._text = second, text
        return f"{self._text}.{microsecond:06}Z"


def as_json(event: EventDict) -> bytes:
    """An event with all its keys as the log writes it, without the line's end; never fails."""
    return _json(None, "", event)


_EXCEPTION = structlog.processors.ExceptionRenderer()

_FIRST = ("timestamp", "level", "event", "sid", "keeper_pid", "reason")


def _json(_: object, __: str, event: EventDict) -> bytes:
    """Render one line: the known keys first, the others in their order."""
    ordered = {key: event[key] for key in _FIRST if key in event}
    ordered.update(event)
    try:
        return _ENCODER.encode(ordered)
    except Exception:  # noqa: BLE001 - a value that is no JSON, in whatever way
        return msgspec.json.encode({_utf8(_words(key)): _value(ordered[key]) for key in ordered})


def _utf8_line(_: object, __: str, line: str) -> bytes:
    return line.encode("utf-8", "backslashreplace")


def _value(value: object) -> Any:  # noqa: ANN401 - what msgspec takes
    """A value as JSON if it can be, else what it looks like."""
    try:
        return msgspec.Raw(msgspec.json.encode(value, enc_hook=_words))
    except Exception:  # noqa: BLE001 - the same
        return _utf8(_words(value))


def _words(value: object) -> str:
    try:
        return value if isinstance(value, str) else repr(value)
    except Exception:  # noqa: BLE001 - its own repr fails
        return f"<{type(value).__name__}>"


def _utf8(text: str) -> str:
    """The same, where lone surrogates are written out."""
    return text.encode("utf-8", "backslashreplace").decode()


_ENCODER = msgspec.json.Encoder(enc_hook=_words)
