"""Work that waits: written once, as a script, and driven with ``poll`` or with asyncio.

A script is a generator that never blocks: it yields a `Wait` where something has to be
waited for. `run_blocking` and `run_async` do the waiting, and are all that the two faces
do not share.
"""

from __future__ import annotations

import enum
import math
import select
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

from reconciler.deliveries import Reason, WritePolicy

if TYPE_CHECKING:
    import asyncio
    from typing import Protocol

    class Turn(Protocol):
        """What is waited for where another is first."""

        def granted_or(self, wake: Callable[[], object]) -> bool:
            """Whether it has come; else ``wake`` is called when it does, by any thread."""


T = TypeVar("T")

_LOOKS = 10
# Looks for progress per progress timeout: a peer that reads raises no event that says so.

_LONGEST_LOOK = 3600.0
# Seconds between two looks at most: ``poll`` takes no more than 24 days.

_LONGEST_PAUSE = 0.016
# Seconds between two tries where there is nothing to wait on; they begin at 1 ms and double.


class Moment(enum.Enum):
    """Where a script waits."""

    TURN = "turn"
    STREAMS = "streams"
    BACKLOG = "backlog"
    SENDING = "sending"
    RECEIPT = "receipt"


class Wait(NamedTuple):
    """Wait for the socket (to be writable when sending, else readable) or for a turn."""

    moment: Moment
    seconds: float
    sock: socket.socket | None = None
    turn: Turn | None = None


Script: TypeAlias = Generator[Wait, None, T]


class AttemptError(Exception):
    """An attempt ended without a receipt."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class TransientError(AttemptError):
    """Another attempt may find it better, and cannot deliver twice.

    Nothing was handed over; or the message has a key, and goes to the same keeper again.
    """


class FinalError(AttemptError):
    """Nothing was handed over, and waiting a little will not change that."""


class UnconfirmedError(AttemptError):
    """Bytes were handed over: another attempt could deliver them twice."""


class Patience:
    """How long there may be no progress, within what is left of the call."""

    __slots__ = ("_deadline", "_ends", "_span")

    def __init__(self, policy: WritePolicy, deadline: float) -> None:
        self._span = policy.progress_timeout
        self._deadline = deadline
        self._ends = min(time.monotonic() + self._span, deadline)

    def renew(self) -> None:
        """There was progress."""
        self._ends = min(time.monotonic() + self._span, self._deadline)

    @property
    def over(self) -> bool:
        """Whether it has run out."""
        return time.monotonic() >= self._ends

    def up_to(self, seconds: float) -> float:
        """So many seconds, or what is left."""
        return max(0.0, min(seconds, self._ends - time.monotonic()))

    @property
    def look(self) -> float:
        """Seconds to the next look for progress."""
        return self.up_to(min(self._span / _LOOKS, _LONGEST_LOOK))


def pauses() -> Iterator[float]:
    """Seconds between two tries where there is nothing to wait on."""
    pause = 0.001
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE)


def deadline_of(timeout: float | None) -> float:
    """When a call with this timeout, in seconds, is over; ValueError for one that is none."""
    if timeout is None:
        return math.inf
    if not timeout >= 0:
        raise ValueError(f"timeout is {timeout}, give seconds of 0 or more")
    return time.monotonic() + timeout


# -- Drivers ------------------------------------------------------------------------------


def run_blocking(make: Callable[..., Script[T]], *arguments: object) -> T:
    """Run a script to its end, and wait in this thread."""
    script = make(*arguments)
    try:
        while True:
            _wait_blocking(next(script))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        script.close()


def _wait_blocking(wait: Wait) -> None:
    if wait.sock is not None:
        poll = select.poll()
        poll.register(wait.sock, select.POLLOUT if wait.moment is Moment.SENDING else select.POLLIN)
        poll.poll(wait.seconds * 1000)
    elif wait.turn is not None:
        came = threading.Event()
        if not wait.turn.granted_or(came.set):
            came.wait(min(wait.seconds, threading.TIMEOUT_MAX))
    else:
        time.sleep(wait.seconds)


async def run_async(make: Callable[..., Script[T]], *arguments: object) -> T:
    """Run a script to its end, and wait in the running event loop."""
    script = make(*arguments)
    try:
        while True:
            await _wait_async(next(script))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        script.close()


async def _wait_async(wait: Wait) -> None:
    import asyncio  # noqa: PLC0415 - the blocking face does without it, and starts twice as fast

    if wait.turn is None and wait.sock is None:
        await asyncio.sleep(wait.seconds)
        return
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    if wait.turn is not None:
        wake = partial(loop.call_soon_threadsafe, _resolve, ready)
        if wait.turn.granted_or(wake):
            return
    timer = None if wait.seconds == math.inf else loop.call_later(wait.seconds, _resolve, ready)
    try:
        if wait.sock is None:
            await ready
        else:
            await _readiness(loop, wait.sock.fileno(), wait.moment, ready)
    finally:
        if timer is not None:
            timer.cancel()


async def _readiness(
    loop: asyncio.AbstractEventLoop, descriptor: int, moment: Moment, ready: asyncio.Future[None]
) -> None:
    """Resolve the future when the socket is ready, too."""
    sending = moment is Moment.SENDING
    (loop.add_writer if sending else loop.add_reader)(descriptor, _resolve, ready)
    try:
        await ready
    finally:
        (loop.remove_writer if sending else loop.remove_reader)(descriptor)


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
