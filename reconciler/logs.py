"""Logging: one JSON object a line, or the console form on a terminal.

Event names are constant and dotted; everything else is a key. See ``docs/logs.md``.

A log must never be what stops the work: no value, however odd, and no broken or full pipe
makes a call here fail or wait for long.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import sys
from typing import TYPE_CHECKING, Any, Literal, TextIO

import msgspec
import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, FilteringBoundLogger, Processor

Level = Literal["debug", "info", "warning", "error"]
Form = Literal["auto", "json", "console"]

LEVELS: dict[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

_PATIENCE = 250
"""Milliseconds that a full pipe is waited for, once; while it stays full, not at all."""


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
    stream: TextIO | None, level: Level = "info", form: Form = "auto"
) -> FilteringBoundLogger:
    """A logger of our own that leaves structlog's configuration alone.

    Args:
        stream: where the lines go; None, as ``sys.stdout`` is when it was closed at the
            start: nowhere.
        level: the lowest level that is written.
        form: ``json``, ``console``, or ``auto``: console on a terminal, JSON elsewhere.
    """
    terminal = stream is not None and stream.isatty()
    if form == "auto":
        form = "console" if terminal else "json"
    sink = _Sink(stream)
    logger: FilteringBoundLogger = structlog.wrap_logger(
        sink,
        processors=[
            sink.confess,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(),
            _console(colors=terminal) if form == "console" else _json,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        cache_logger_on_first_use=True,
    )
    return logger


def _console(*, colors: bool) -> Processor:
    return structlog.dev.ConsoleRenderer(
        sort_keys=False,
        colors=colors and not os.environ.get("NO_COLOR"),
        exception_formatter=structlog.dev.plain_traceback,
    )


class _Sink:
    """Writes lines to a stream. What cannot be written is dropped, and counted.

    The lines go to the descriptor itself, so that no buffer keeps what a broken pipe has
    refused; streams without one are written to as they are.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._unsent = b""
        self._dropped = 0

    def confess(self, _: object, __: str, event: EventDict) -> EventDict:
        """Once lines were dropped, each later one says how many."""
        if self._dropped:
            event["lines_dropped"] = self._dropped
        return event

    def msg(self, line: str) -> None:
        """Write one line."""
        if self._stream is None:
            return
        # OSError: nobody reads any more. ValueError: it was closed.
        with contextlib.suppress(OSError, ValueError):
            if self._write(self._stream, line.encode("utf-8", "backslashreplace") + b"\n"):
                return
        self._dropped += 1

    debug = info = warning = error = critical = msg

    def _write(self, stream: TextIO, line: bytes) -> bool:
        try:
            descriptor = stream.fileno()
        except io.UnsupportedOperation:
            stream.write(line.decode())
            stream.flush()
            return True
        stream.flush()
        self._unsent = _push(descriptor, self._unsent, 0)  # no line begins within another
        if self._unsent:
            return False
        rest = _push(descriptor, line, 0 if self._dropped else _PATIENCE)
        if rest != line:
            self._unsent = rest
        return rest != line


def _push(descriptor: int, data: bytes, patience: int) -> bytes:
    """Write what can be written without waiting for long, and give back the rest."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    with contextlib.suppress(OSError):  # nobody reads any more, or the disk is full
        while data and poll.poll(patience):
            data = data[os.write(descriptor, data[: select.PIPE_BUF]) :]
    return data


_FIRST = ("timestamp", "level", "event", "sid", "keeper_pid", "reason")


def _json(_: object, __: str, event: EventDict) -> str:
    """Render one line: the known keys first, the others in their order."""
    ordered = {key: event[key] for key in _FIRST if key in event} | dict(event)
    try:
        line = msgspec.json.encode(ordered, enc_hook=_words)
    except Exception:  # noqa: BLE001 - a value that is no JSON, in whatever way
        line = msgspec.json.encode({_utf8(_words(key)): _value(ordered[key]) for key in ordered})
    return line.decode()


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
