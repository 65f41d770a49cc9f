"""Logging: one JSON object a line, or the console form on a terminal.

Event names are constant and dotted; everything else is a key. See ``docs/logs.md``.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Literal, TextIO

import msgspec
import structlog

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger, Processor, WrappedLogger

Level = Literal["debug", "info", "warning", "error"]
Form = Literal["auto", "json", "console"]

LEVELS: dict[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def get_logger() -> FilteringBoundLogger:
    """The logger of the library.

    It is the application's when the application has configured structlog; else JSON lines
    from level ``info`` up on standard error, so that nothing mixes with anybody's output.
    """
    if structlog.is_configured():
        logger: FilteringBoundLogger = structlog.get_logger("reconciler")
        return logger
    return make_logger(sys.stderr, "info", "json")


def make_logger(stream: TextIO, level: Level = "info", form: Form = "auto") -> FilteringBoundLogger:
    """A logger of our own that leaves structlog's configuration alone.

    Args:
        stream: where the lines go.
        level: the lowest level that is written.
        form: ``json``, ``console``, or ``auto``: console on a terminal, JSON elsewhere.
    """
    if form == "auto":
        form = "console" if stream.isatty() else "json"
    renderer: Processor = structlog.dev.ConsoleRenderer() if form == "console" else _json
    wrapped: WrappedLogger = structlog.PrintLogger(stream)
    logger: FilteringBoundLogger = structlog.wrap_logger(
        wrapped,
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        cache_logger_on_first_use=True,
    )
    return logger


_FIRST = ("timestamp", "level", "event", "sid", "keeper_pid", "reason")


def _json(_: object, __: str, event: Any) -> str:  # noqa: ANN401 - structlog's own type
    """Render one line: the known keys first, the others in their order."""
    ordered = {key: event.pop(key) for key in _FIRST if key in event}
    return msgspec.json.encode({**ordered, **event}, enc_hook=repr).decode()
