"""When the same actions may be tried again: less and less often, while they do not help."""

from __future__ import annotations

from dataclasses import dataclass

FIRST, LAST = 0.1, 60.0
"""Seconds until the second try, doubling up to the last value."""


@dataclass(frozen=True, slots=True)
class _Tried:
    what: object
    count: int
    not_before: float


class Retries:
    """What was tried for each session. Pure: the caller brings the time, monotonic seconds."""

    def __init__(self) -> None:
        self._tried: dict[str, _Tried] = {}

    def wait(self, sid: str, what: object, now: float) -> float:
        """Seconds until ``what`` may be tried for a session; 0.0 for anything new."""
        tried = self._tried.get(sid)
        if tried is None or tried.what != what:
            return 0.0
        return max(0.0, tried.not_before - now)

    def note(self, sid: str, what: object, now: float) -> float:
        """``what`` is tried now; gives the seconds until it may be tried again."""
        tried = self._tried.get(sid)
        count = tried.count + 1 if tried is not None and tried.what == what else 0
        pause = min(LAST, FIRST * 2.0 ** min(count, 16))
        self._tried[sid] = _Tried(what, count, now + pause)
        return pause

    def forget(self, sid: str) -> None:
        """All is well with the session."""
        self._tried.pop(sid, None)
