"""Hints: which session to look at, and when.

A hint is only a key. Equal hints are joined and the earliest due time counts; a key that
is in work is never given out a second time, and comes back once it is released.
"""

from __future__ import annotations

import heapq
from typing import Final

AT_ONCE: Final = 0.0
"""The due time of what goes before everything else that is due: a process has died."""

# Keys that can be no session id.
LOOK_AT_ALL: Final = "*"
"""Look at every session."""
LOOK_AT_PROCESSES: Final = "&"
"""Scan for what no file tells of."""
LOOK_FOR_LEFTOVERS: Final = "+"
"""Scan for what ended sessions have left behind."""

LEFTOVER_PAUSE: Final = 1.0
"""Seconds from a session's end until what it left behind is looked for: what ends with it
has ended by then, and one scan does for many that end together."""


class Hints:
    """Keys with due times. Pure: the caller brings the time, monotonic seconds."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        self._in_work: dict[str, float | None] = {}

    def add(self, key: str, due: float) -> None:
        """Ask for a look at ``key`` when it is ``due``, or earlier if that was asked already."""
        if key in self._in_work:
            known = self._in_work[key]
            self._in_work[key] = due if known is None else min(known, due)
        elif key not in self._due or due < self._due[key]:
            self._due[key] = due
            heapq.heappush(self._heap, (due, key))

    def take(self, now: float) -> str | None:
        """The key that is due first, now in work; None when none is due."""
        due = self.next_due()
        if due is None or due > now:
            return None
        _, key = heapq.heappop(self._heap)
        del self._due[key]
        self._in_work[key] = None
        return key

    def release(self, key: str) -> None:
        """The key is not in work any more; what was asked for meanwhile counts again."""
        again = self._in_work.pop(key, None)
        if again is not None:
            self.add(key, again)

    def depth(self, now: float) -> int:
        """How many keys are due or in work; may be asked from any thread."""
        return sum(due <= now for due in tuple(self._due.values())) + len(self._in_work)

    def next_due(self) -> float | None:
        """When the first key is due, or None."""
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def busy_until(self, horizon: float) -> bool:
        """Whether a key is in work, or due before ``horizon``."""
        due = self.next_due()
        return bool(self._in_work) or (due is not None and due < horizon)
