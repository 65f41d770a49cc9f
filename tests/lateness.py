"""How late this machine wakes who sleeps: what a bound on a time is held against."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

TICK = 0.005


@contextlib.contextmanager
def lateness() -> Iterator[Callable[[], float]]:
    """Let a thread sleep, over and over; gives the seconds that it was late so far, in all.

    It is as late as whatever else is woken meanwhile: where other programs have the processors,
    and where this very process stands still.
    """
    over = threading.Event()
    before, begun = 0.0, time.monotonic()

    def late() -> float:
        return before + max(0.0, time.monotonic() - begun - TICK)

    def sleep() -> None:
        nonlocal before, begun
        while not over.wait(TICK):
            before, begun = late(), time.monotonic()

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    try:
        yield late
    finally:
        over.set()
        sleeper.join()
