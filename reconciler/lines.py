"""What a line of a session's log is: who wrote it, when, and how a person reads it. Pure.

In a keeper log the keeper's own lines stand between those of its agent: a keeper of ours
writes JSON objects, the dashboard's a time and a text, an agent whatever it likes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

Stream = Literal["keeper", "agent", "launch"]

_OURS = (b'{"timestamp": "', b'{"timestamp":"')
_THEIRS = re.compile(
    rb"(?P<timestamp>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?Z) (?P<message>.*)", re.DOTALL
)
_KNOWN = frozenset(
    {"timestamp", "level", "severity_number", "event", "message", "sid", "keeper_pid"}
)
_SPAN = re.compile(r"(?:\d{1,9}[smhdw])+", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a log.

    Attributes:
        stream: whose it is; all lines of a launch log are ``launch``.
        raw: its bytes, without the LF.
        stamp: when it was written, if it says so; seconds since the epoch.
        fields: what a keeper's line says; empty for other lines.
    """

    stream: Stream
    raw: bytes
    stamp: float | None
    fields: Mapping[str, Any]


def read_line(raw: bytes, *, launch: bool = False) -> Line:
    """Read a line of a keeper log, or of a launch log."""
    fields = _fields(raw)
    stamp = _stamp(fields.get("timestamp"))
    if stamp is None:
        return Line("launch" if launch else "agent", raw, None, {})
    return Line("launch" if launch else "keeper", raw, stamp, fields)


def _fields(raw: bytes) -> Mapping[str, Any]:
    if raw.startswith(_OURS):
        try:
            said = json.loads(raw, parse_constant=str, parse_float=_number)
        except (ValueError, RecursionError):
            return {}
        ours = str(said.get("event")).startswith("keeper.") and "message" in said
        return said if ours else {}
    if theirs := _THEIRS.fullmatch(raw):
        return {key: text.decode(errors="replace") for key, text in theirs.groupdict().items()}
    return {}


def _number(text: str) -> float | str:
    """A float, or its text where that is out of range: JSON has no infinity."""
    number = float(text)
    return number if math.isfinite(number) else text


def _stamp(text: object) -> float | None:
    try:
        stamp = datetime.fromisoformat(str(text)).timestamp()
        _local(stamp)
    except (ValueError, OverflowError, OSError):  # none, or one that no calendar here can show
        return None
    return stamp


def _local(stamp: float) -> datetime:
    return datetime.fromtimestamp(stamp, UTC).astimezone()


def as_json(line: Line, sid: str) -> str:
    """A line as one JSON object: whose it is, and its fields or its text."""
    told: dict[str, Any] = {"sid": sid, "stream": line.stream}
    if line.fields:
        told = {**told, **line.fields, **told}
    else:
        told["line"] = line.raw.decode(errors="replace")
    return json.dumps(told)


def parts(line: Line) -> tuple[str, str, str]:
    """A line as a terminal shows it: local time and level (or nothing), and its text.

    What could move a cursor or change a terminal is written out, as `safe` does.
    """
    if line.stamp is None:
        return "", "", safe(line.raw.decode(errors="backslashreplace"))
    said = line.fields
    more = [f"{key}={value}" for key, value in said.items() if key not in _KNOWN]
    text = " ".join([str(said["message"]), *more])
    when = _local(line.stamp)
    return f"{when:%b %d %H:%M:%S}.{when:%f}"[:-3], safe(str(said.get("level", ""))), safe(text)


def safe(text: str) -> str:
    """A text in which every control and invisible character is written out, but for tabs."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each == "\t" else repr(each)[1:-1] for each in text
    )


def moment(text: str, now: datetime) -> float:
    """A moment in seconds since the epoch: ``5m``, ``2h``, ``1d12h`` ago, or RFC 3339.

    Args:
        text: a span before now in s, m, h, d and w, or a date, with or without a time; where
            no zone is given, the local one is meant.
        now: with its zone.

    Raises:
        ValueError: it is neither.
    """
    try:
        if _SPAN.fullmatch(text):
            spans = re.findall(r"(\d+)([smhdw])", text)
            seconds = sum(int(number) * _UNITS[unit] for number, unit in spans)
            return (now - timedelta(seconds=seconds)).timestamp()
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(
            f"{text!r} is no moment: give a span as 90s, 5m, 2h or 3d, or a time as "
            "2026-03-01T09:00:00Z"
        ) from error
