"""Logging: one JSON object a line, or the console form on a terminal.

Event names are constant and dotted; everything else is a key. See ``docs/logs.md``.

A log must never be what stops the work: no value, however odd, no broken or full pipe and no
disk that hangs makes a call here fail, or wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import structlog

from reconciler.log_lines import PRIORITIES, SEVERITIES, encode, render
from reconciler.log_settings import Form, Level, LogSettings
from reconciler.sinks import Sink, SinkError, dropped, flush, to_stream

if TYPE_CHECKING:
    from structlog.typing import EventDict, FilteringBoundLogger

__all__ = [
    "LEVELS",
    "SEVERITIES",
    "Form",
    "Level",
    "LogSettings",
    "SinkError",
    "as_json",
    "dropped",
    "flush",
    "get_logger",
    "make_logger",
    "open_log",
    "set_level",
]

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


def make_logger(
    where: TextIO | Sink | None,
    level: Level = "info",
    form: Form = "auto",
    *,
    colors: bool = True,
    prefix: bool = False,
) -> FilteringBoundLogger:
    """A logger of our own that leaves structlog's configuration alone.

    Args:
        where: where the lines go: a sink, or a stream; None, as ``sys.stdout`` is when it was
            closed at the start: nowhere.
        level: the lowest level that is written.
        form: ``json``, ``ecs`` (JSON with the names of the Elastic Common Schema), ``console``,
            or ``auto``: console on a terminal, JSON elsewhere.
        colors: the console form may be coloured, where a terminal shows it.
        prefix: begin each line with its priority as ``<N>``, which journald takes off.
    """
    sink = where if isinstance(where, Sink) else to_stream(where)
    if form == "auto":
        form = "console" if sink.terminal else "json"
    processors: list[Callable[..., Any]] = [
        _Stamp(sink),
        *_form(form, colors=sink.terminal and colors),
    ]
    if prefix:
        processors.append(_prefix)
    proxy = structlog.wrap_logger(
        sink,
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
    )
    logger: FilteringBoundLogger = proxy.bind()  # itself: the proxy would cost at every line
    return logger


def open_log(
    said: LogSettings,
    stdout: TextIO | None,
    environ: Mapping[str, str] = os.environ,
    *,
    colors: bool = True,
) -> FilteringBoundLogger:
    """The logger that the settings ask for.

    Where standard output is a stream of journald's, each line has its priority before it.

    Raises:
        SinkError: there is no such sink, or not in this form.
    """
    prefix = False
    if said.sink == "file":
        sink = _file(said)
    elif said.sink == "journald":
        sink = _journal(said)
    else:
        sink = to_stream(stdout)
        prefix = said.form in ("auto", "json", "ecs") and _is_journal(stdout, environ)
    return make_logger(sink, said.level, said.form, colors=colors, prefix=prefix)


def _file(said: LogSettings) -> Sink:
    from reconciler.log_files import to_file  # noqa: PLC0415 - few have one

    if not said.file:
        raise SinkError("log.sink is 'file', and log.file names none: set it, or --log-file")
    path = Path(os.path.expanduser(said.file))
    return to_file(path, rotate_bytes=said.rotate_bytes, rotate_keep=said.rotate_keep)


def _journal(said: LogSettings) -> Sink:
    from reconciler.journal import to_journal  # noqa: PLC0415 - the same

    if said.form not in ("auto", "json"):
        raise SinkError(
            f"log.form is {said.form!r}, and log.sink is 'journald', which has fields in place of "
            "lines: leave log.form 'auto'"
        )
    return to_journal()


def _is_journal(stdout: TextIO | None, environ: Mapping[str, str]) -> bool:
    stream = environ.get("JOURNAL_STREAM")
    with contextlib.suppress(OSError, ValueError):  # no descriptor, or closed
        if stream and stdout is not None:
            status = os.fstat(stdout.fileno())
            return stream == f"{status.st_dev}:{status.st_ino}"
    return False


def set_level(logger: FilteringBoundLogger, level: Level) -> None:
    """Have a logger that `make_logger` made write another level, wherever it is held."""
    # What it lets through is its class's, so that a line below the level costs nothing.
    logger.__class__ = structlog.make_filtering_bound_logger(LEVELS[level])


def _form(form: Form, *, colors: bool) -> tuple[Callable[..., Any], ...]:
    """The processors that make an event a line."""
    if form == "json":
        return (_json,)
    if form == "ecs":
        return (_ecs,)
    console = structlog.dev.ConsoleRenderer(
        sort_keys=False,
        colors=colors,
        exception_formatter=structlog.dev.plain_traceback,
    )
    return _drop_severity, console, _utf8_line


class _Stamp:
    """Gives an event its time and level, and its exception as a text."""

    def __init__(self, sink: Sink) -> None:
        self._confess = sink.confess
        self._second = 0
        self._text = ""

    def __call__(self, logger: object, method: str, event: EventDict) -> EventDict:
        """Add them."""
        self._confess(event)
        event["level"] = method
        event["severity_number"] = SEVERITIES[method]
        event["timestamp"] = self._now()
        return _EXCEPTION(logger, method, event) if "exc_info" in event else event

    def _now(self) -> str:
        """RFC 3339; a second's text is made once."""
        second, microsecond = divmod(time.time_ns() // 1000, 1_000_000)
        if second != self._second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second, self._text = second, text
        return f"{self._text}.{microsecond:06}Z"


_EXCEPTION = structlog.processors.ExceptionRenderer()

_THEN = ("sid", "keeper_pid", "reason")


def _json(_: object, __: str, event: EventDict) -> bytes:
    """Render one line: the known keys first, the others in their order."""
    ordered = {
        "timestamp": event["timestamp"],
        "level": event["level"],
        "severity_number": event["severity_number"],
        "event": event.get("event", ""),
    }
    for key in _THEN:
        if key in event:
            ordered[key] = event[key]
    ordered.update(event)
    return render(ordered)


_FIRST = ("timestamp", "level", "severity_number", "event", *_THEN)


def as_json(event: EventDict) -> bytes:
    """An event in the order of the log's keys, without the line's end; never fails.

    It is for a program of ours: nested values stay as they are, and long ones whole.
    """
    return encode({key: event[key] for key in _FIRST if key in event} | dict(event))


_ECS: Mapping[str, str] = {
    "timestamp": "@timestamp",
    "level": "log.level",
    "severity_number": "event.severity",
    "event": "event.action",
    "reason": "event.reason",
    "exception": "error.stack_trace",
}
"""The field of the Elastic Common Schema for a key; every other key is a label."""

_ECS_ALWAYS = {
    "ecs.version": "8.11.0",
    "event.dataset": "pi-reconciler.log",
    "service.name": "pi-reconciler",
    "log.logger": "reconciler",
}


def _ecs(_: object, __: str, event: EventDict) -> bytes:
    """Render one line with the names of the Elastic Common Schema, dots in flat keys.

    https://www.elastic.co/docs/reference/ecs/ecs-field-reference
    """
    told = {name: event[key] for key, name in _ECS.items() if key in event}
    told["message"] = _title(event)
    told.update(_ECS_ALWAYS)
    told["process.pid"] = os.getpid()
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
        told["event.duration"] = round(event["duration_ms"] * 1_000_000)  # nanoseconds
    for key, value in event.items():
        if key not in _ECS:
            told[f"labels.{key}"] = value
    return render(told, "labels.truncated")


def _title(event: EventDict) -> str:
    """What a person reads in a list of events."""
    words = (event.get(key) for key in ("event", "sid", "reason"))
    return " ".join(word for word in words if isinstance(word, str))


_PREFIXES = {
    level: b"<%d>" % priority for level, priority in PRIORITIES.items()
}  # see sd-daemon(3)


def _prefix(_: object, method: str, line: bytes) -> bytes:
    return _PREFIXES[method] + line


def _drop_severity(_: object, __: str, event: EventDict) -> EventDict:
    del event["severity_number"]  # the level says it to a person
    return event


def _utf8_line(_: object, __: str, line: str) -> bytes:
    return line.encode("utf-8", "backslashreplace")
