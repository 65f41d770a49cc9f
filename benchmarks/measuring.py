"""What a row is, how its values become a figure, and the stage that rows of one run share."""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

T = TypeVar("T")

Values = Mapping[str, Sequence[float]]
"""What a scene has measured: by whose work it was, one value a round."""

Statistic = Callable[[Sequence[float]], float]

_TELL_EVERY = 15.0
# Seconds between two words of progress where standard error is no terminal.


class SkippedError(Exception):
    """What a row needs cannot be had here; its text says what."""


class Stage:
    """What the rows of one run share. A context manager: at its end, all of it is ended.

    Attributes:
        quick: whether this run checks the harness, and not the figures.
        sessions: how many live sessions "1,000 live sessions" are.
    """

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.sessions = self.of(1000, 12)
        self._stack = contextlib.ExitStack()
        self._made: dict[Callable[[Stage], Any], Any] = {}
        self._told = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """End what the rows so far have left running, and forget what they have measured."""
        self._made.clear()
        self._stack.close()

    def of(self, full: int, quick: int) -> int:
        """A number of rounds, or a size: that of a full run, or that of a quick one."""
        return quick if self.quick else full

    def of_each(self, full: tuple[int, ...], quick: tuple[int, ...]) -> tuple[int, ...]:
        """The same, of several."""
        return quick if self.quick else full

    def once(self, make: Callable[[Stage], T]) -> T:
        """What a function gives: several rows are often figures of one scene."""
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made

    def enter(self, context: contextlib.AbstractContextManager[T]) -> T:
        """Enter a context that lasts until the stage is cleared."""
        return self._stack.enter_context(context)

    def folder(self) -> Path:
        """A sessions folder of its own, where the contract wants it."""
        home = self.enter(tempfile.TemporaryDirectory(prefix="pib-", ignore_cleanup_errors=True))
        folder = Path(home) / ".pi" / "dashboard" / "sessions"
        folder.mkdir(parents=True, mode=0o700)
        return folder

    def tell(self, text: str) -> None:
        """Say how far it is, on standard error."""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
        elif time.monotonic() - self._told > _TELL_EVERY:
            self._told = time.monotonic()
            print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        name: the figure's name.
        work: what is measured.
        against: the peer; empty when there is none, and the figure stands for itself.
        goal: what the ratio (without a peer: the value) is to be at most.
        at_least: the goal is what it is to be at least.
        unit: of both values.
        scene: measures; several rows may share one.
        ours: whose values in the scene's are ours.
        peer: whose are the peer's.
        statistic: what is taken of our values. Of the peer's it is always the median.
        crowd: it is measured among the crowd of live sessions, which the rows share.
    """

    name: str
    work: str
    against: str
    goal: float
    unit: str
    scene: Callable[[Stage], Values]
    ours: str = "ours"
    peer: str = ""
    at_least: bool = False
    statistic: Statistic = statistics.median
    crowd: bool = False

    @property
    def goal_text(self) -> str:
        """The goal as a reader would write it."""
        unit = f" {self.unit}" if not self.peer else ""
        return f"{'≥' if self.at_least else '≤'} {self.goal:g}{unit}"

    def figure(self, values: Values) -> Figure:
        """What comes out of a scene's values."""
        if self.peer and self.peer not in values:
            raise SkippedError(f"{self.against}: it cannot be had here, see `make tools`")
        mine = values[self.ours]
        ours = self.statistic(mine)
        peer = statistics.median(values[self.peer]) if self.peer else None
        ratio = ours if peer is None else ours / peer
        return Figure(ratio, self.goal, ours, peer, self.unit, len(mine), spread(mine))

    def met(self, ratio: float) -> bool:
        """Whether a ratio is as good as the goal."""
        return ratio >= self.goal if self.at_least else ratio <= self.goal


@dataclass(frozen=True, slots=True)
class Figure:
    """One result, as ``results.json`` has it.

    Attributes:
        ratio: ours to the peer's; without a peer our value itself.
        goal: what it is held against.
        ours: our value.
        peer: the peer's median, None without a peer.
        unit: of both.
        rounds: how many values of ours there were.
        spread: the middle half of our values, as a part of their median.
    """

    ratio: float
    goal: float
    ours: float
    peer: float | None
    unit: str
    rounds: int
    spread: float


def spread(values: Sequence[float]) -> float:
    """The width of the middle half, as a part of the median; 0 of fewer than four values."""
    middle = statistics.median(values)
    if len(values) < 4 or not middle:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def p99(values: Sequence[float]) -> float:
    """The value that 99 of 100 do not exceed."""
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[98]
