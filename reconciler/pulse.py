"""The pulse of an event loop: proof that it turns, and how late it comes to what is due.

One timer, only for as long as somebody asks for it: a loop that nobody watches sleeps on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PERIOD = 5.0
"""Seconds between two beats where nobody needs them more often: 0.2 wake-ups a second."""

STUCK = 10.0
"""Seconds without a beat after which the loop counts as stuck: two beats are missing, and no
step of the loop is longer than some milliseconds."""


class Pulse:
    """Beats in a loop from `start` to `stop`. Both belong to the loop's thread.

    Args:
        period: seconds between two beats.
    """

    def __init__(self, period: float = PERIOD) -> None:
        self._period = period
        self._listeners: list[Callable[[float], None]] = []
        self._last = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def silence(self) -> float:
        """Seconds since the last beat; from any thread. A sleeping machine's do not count."""
        return time.monotonic() - self._last

    def listen(self, listener: Callable[[float], None]) -> None:
        """Call ``listener`` at each beat with the lag: seconds by which it came too late."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Beat now, and from now on."""
        self._beat(asyncio.get_running_loop(), time.monotonic())

    def stop(self) -> None:
        """Beat no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = self._last = time.monotonic()
        self._timer = loop.call_later(self._period, self._beat, loop, now + self._period)
        for listener in self._listeners:
            listener(max(0.0, now - due))
