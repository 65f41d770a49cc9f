"""Order: one lane per session, first come, first served, across threads and event loops."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Self

from reconciler.deliveries import Reason
from reconciler.link import Link
from reconciler.waiting import FinalError, Moment, Script, Wait


class Turn:
    """A place in a session's lane, for as long as the block lasts; who is first has the turn."""

    __slots__ = ("_lanes", "granted", "sid", "wake")

    def __init__(self, lanes: Lanes, sid: str) -> None:
        self._lanes = lanes
        self.sid = sid
        self.granted = False
        self.wake: Callable[[], object] | None = None

    def __enter__(self) -> Self:
        self._lanes.join(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._lanes.leave(self)

    def granted_or(self, wake: Callable[[], object]) -> bool:
        """Whether the turn has come; else ``wake`` is called when it does, by any thread."""
        return self._lanes.granted_or(self, wake)

    def come(self, deadline: float) -> Script[None]:
        """Wait for the turn."""
        while not self.granted:
            left = deadline - time.monotonic()
            if left <= 0:
                raise FinalError(Reason.TIMED_OUT_BEFORE)
            yield Wait(Moment.TURN, left, turn=self)


class _Lane:
    """Who writes to one session now and next, and which streams to it are open."""

    __slots__ = ("streams", "turns")

    def __init__(self) -> None:
        self.turns: deque[Turn] = deque()
        self.streams: list[Link] = []


class Lanes:
    """First come, first served, session by session; across threads and event loops."""

    def __init__(self) -> None:
        self._begin()
        _EVERY.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._lanes: dict[str, _Lane] = {}

    def __len__(self) -> int:
        return len(self._lanes)

    def turn(self, sid: str) -> Turn:
        """A place in the lane, taken when it is entered; wait for it with `Turn.come`."""
        return Turn(self, sid)

    def join(self, turn: Turn) -> None:
        """Take the place at the end."""
        with self._lock:
            lane = self._lanes.get(turn.sid)
            if lane is None:
                lane = self._lanes[turn.sid] = _Lane()
            lane.turns.append(turn)
            turn.granted = lane.turns[0] is turn

    def granted_or(self, turn: Turn, wake: Callable[[], object]) -> bool:
        """`Turn.granted_or`."""
        with self._lock:
            turn.wake = wake
            return turn.granted

    def leave(self, turn: Turn) -> None:
        """Give the place up, and the turn to the next."""
        with self._lock:
            lane = self._lanes.get(turn.sid)
            if lane is None or turn not in lane.turns:  # passed over, see _grant
                return
            lane.turns.remove(turn)
            if lane.turns and not lane.turns[0].granted:
                self._grant(lane.turns)
            if not lane.turns and not lane.streams:
                del self._lanes[turn.sid]

    def _grant(self, turns: deque[Turn]) -> None:
        """Give the turn to the next who can still be woken: an event loop may have gone."""
        while turns:
            turns[0].granted = True
            wake = turns[0].wake
            try:
                if wake is not None:
                    wake()
            except RuntimeError:
                turns.popleft()
            else:
                return

    def streams(self, sid: str) -> tuple[Link, ...]:
        """The connections of a session's open streams."""
        with self._lock:
            lane = self._lanes.get(sid)
            return tuple(lane.streams) if lane is not None else ()

    def add_stream(self, sid: str, link: Link) -> None:
        """A stream was opened."""
        with self._lock:
            self._lanes.setdefault(sid, _Lane()).streams.append(link)

    def drop_stream(self, sid: str, link: Link) -> None:
        """A stream has ended, if this is one's."""
        with self._lock:
            lane = self._lanes.get(sid)
            if lane is not None and link in lane.streams:
                lane.streams.remove(link)
                if not lane.turns and not lane.streams:
                    del self._lanes[sid]


_EVERY: weakref.WeakSet[Lanes] = weakref.WeakSet()


def _after_fork() -> None:
    """Whoever writes, or waits to, is a thread of the parent's: in the child nobody does."""
    for lanes in tuple(_EVERY):
        lanes._begin()  # noqa: SLF001 - our own


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
