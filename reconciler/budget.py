"""What the logs of a folder may cost: which of them go, and which are cut. Pure.

Only logs of ended sessions ever go, the oldest first; a log counts as old as the newest
log of its session.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from reconciler.observations import FileId
from reconciler.ranges import Range

_BYTES = Range(64 << 10, 1 << 50, "a whole number of bytes")
_AGE = Range(60, 100 * 366 * 86_400, "seconds")

FIRST_DAY = 1_735_689_600.0
"""Seconds since the epoch, the start of 2025: before there was this program nothing was logged by a
clock that had been set. How old such a log is, is not known."""


@dataclass(frozen=True, slots=True)
class LogBudget:
    """How much the logs of a sessions folder may take, and for how long."""

    total: Annotated[int, _BYTES] = 1 << 30
    """Bytes of all session logs together, those of living sessions counted as well."""
    each: Annotated[int, _BYTES] = 128 << 20
    """Bytes of one log; the cap that a keeper of ours keeps to while it lives. An ended
    session's longer log is cut to its newest half of this."""
    age: Annotated[float, _AGE] = 30 * 86_400.0
    """Seconds for which the logs of an ended session are kept since it last wrote to them."""


class Why(enum.Enum):
    """Why a log goes, or is cut."""

    AGE = "log too old"
    EACH = "log too long"
    TOTAL = "logs too long in all"


@dataclass(frozen=True, slots=True)
class Log:
    """A log of a session, as it was found."""

    name: str
    sid: str
    file: FileId
    ended: bool
    """The session is known to be over. What is not known to be over counts as living."""


@dataclass(frozen=True, slots=True)
class Step:
    """One log to be removed, or to be cut to its newest bytes."""

    log: Log
    why: Why
    keep: int = 0
    """Bytes to be kept; 0: the log is removed."""

    @property
    def freed(self) -> int:
        """Bytes that are free afterwards."""
        return self.log.file.size - self.keep


def steps(logs: Sequence[Log], budget: LogBudget, now: float) -> tuple[Step, ...]:
    """What is to be done so that the logs stay within the budget, the oldest first.

    Args:
        logs: all session logs of the folder.
        budget: what they may cost.
        now: seconds since the epoch; minus infinity where that is not known.
    """
    last = _last_written(logs)
    ended = sorted(
        (log for log in logs if log.ended),
        key=lambda log: (last[log.sid], log.sid, log.file.mtime_ns),
    )
    alone = [(log, _by_itself(log, budget, _age(last[log.sid], now))) for log in ended]
    total = sum(log.file.size for log in logs) - sum(step.freed for _, step in alone if step)
    chosen = []
    for log, step in alone:
        if total > budget.total and not (step and step.why is Why.AGE):
            total -= step.keep if step else log.file.size
            chosen.append(Step(log, Why.TOTAL))
        elif step:
            chosen.append(step)
    return tuple(chosen)


def _age(written: float, now: float) -> float:
    """Seconds for which a log is known to be there, at the least."""
    return now - written if written >= FIRST_DAY else 0.0


def _by_itself(log: Log, budget: LogBudget, age: float) -> Step | None:
    """What is to be done with a log whatever the others take."""
    if age > budget.age:
        return Step(log, Why.AGE)
    if log.file.size > budget.each:
        return Step(log, Why.EACH, keep=max(1, budget.each // 2))
    return None


def _last_written(logs: Iterable[Log]) -> dict[str, float]:
    """When each session last wrote to a log of its own, in seconds since the epoch."""
    last: dict[str, float] = {}
    for log in logs:
        written = log.file.mtime_ns / 1e9
        last[log.sid] = max(written, last.get(log.sid, written))
    return last


def grown(logs: Iterable[Log], budget: LogBudget) -> tuple[Log, ...]:
    """The logs of living sessions that are longer than one log may be."""
    return tuple(log for log in logs if not log.ended and log.file.size > budget.each)
