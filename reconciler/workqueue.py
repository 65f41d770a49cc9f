"""The work queue: hints come in, from the loop and from threads; each key is worked on when due.

It knows no session: what is done about a key is its owner's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from reconciler.hints import Hints

SLICE = 0.005
"""Seconds of work after which the event loop gets its turn."""

LongWork = Coroutine[Any, Any, None]
"""What of the work on a key takes time: it runs beside the loop."""


class WorkQueue:
    """Works on keys in the event loop, in slices of time. Nothing happens before `open`.

    All methods belong to the loop's thread, but for those that say otherwise.

    Args:
        work: called with a key that is due. It is short; what takes time it gives back, and
            the key stays in work, that is out of the queue, until that is through.
    """

    def __init__(self, work: Callable[[str], LongWork | None]) -> None:
        self._work = work
        self._hints = Hints()
        self._inbox: set[str] = set()
        self._inbox_lock = threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._open = False
        self._draining = False

    def open(self) -> None:
        """Begin, in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._wake()

    async def close(self) -> None:
        """Begin no more, cancel what takes time, and wait until it has ended."""
        self._open = False
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def add(self, key: str, due: float) -> None:
        """Ask for work on ``key`` when it is ``due``, monotonic seconds; see `Hints.add`."""
        self._hints.add(key, due)
        self._wake()

    def add_from_thread(self, key: str) -> None:
        """The same from any thread, due now."""
        with self._inbox_lock:
            first = not self._inbox
            self._inbox.add(key)
        if first:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._empty_inbox)

    def _empty_inbox(self) -> None:
        with self._inbox_lock:
            keys, self._inbox = self._inbox, set()
        now = time.monotonic()
        for key in keys:
            self.add(key, now)

    @property
    def depth(self) -> int:
        """How many keys are due or in work. From any thread."""
        return self._hints.depth(time.monotonic())

    def busy_until(self, horizon: float) -> bool:
        """Whether a key is in work, or due before ``horizon``."""
        return bool(self._inbox or self._tasks) or self._hints.busy_until(horizon)

    def _wake(self) -> None:
        """See to it that `_drain` runs when the next key is due."""
        if self._draining or not self._open:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._hints.next_due()
        if due is None:
            return
        wait = due - time.monotonic()
        if wait > 0:
            self._timer = self._loop.call_later(wait, self._drain)
        else:
            self._draining = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Work on all that is due, for one slice of time."""
        if not self._open:
            return
        self._draining = True
        end = time.monotonic() + SLICE
        try:
            while (key := self._hints.take(now := time.monotonic())) is not None:
                more = None
                try:
                    more = self._work(key)
                finally:
                    if more is None:
                        self._hints.release(key)
                if more is not None:
                    self._go_on(key, more)
                if now > end:
                    break
        finally:
            self._draining = False
            self._wake()

    def _go_on(self, key: str, more: LongWork) -> None:
        task = self._loop.create_task(more)
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._through, key))

    def _through(self, key: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._hints.release(key)
        self._wake()
