"""Lines to a keeper's socket, each with a receipt.

A keeper forwards every line to its agent and answers nothing. But when a client that has
sent all it had closes its sending side, the keeper closes the connection only after it has
handed everything on: the end of the stream is the receipt. A connection that breaks with
bytes unread is reset by the kernel, which is no receipt. `docs/delivery.md` says what
follows from that.

One copy of the work serves both faces: it is written as generators (`Script`) over a
socket that never blocks, which yield a `Wait` where something has to be waited for.
`RpcWriter` drives them with asyncio, `BlockingRpcWriter` with ``poll``. Needs Linux:
``SO_PEERCRED``, ``O_PATH`` and ``/proc``.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Final, Self

from reconciler.deliveries import (
    Attempt,
    Delivery,
    ManyDelivery,
    OnDelivery,
    Outcome,
    Reason,
    StreamBrokenError,
    WritePolicy,
)
from reconciler.exchanges import Again, Desk, Exchange
from reconciler.messages import MAX_LINE, InvalidMessageError, Message, encode
from reconciler.waiting import (
    AttemptError,
    Script,
    TransientError,
    deadline_of,
    run_async,
    run_blocking,
)

__all__ = [
    "MAX_LINE",
    "Attempt",
    "BlockingRpcStream",
    "BlockingRpcWriter",
    "Delivery",
    "InvalidMessageError",
    "ManyDelivery",
    "Message",
    "Outcome",
    "Reason",
    "RpcStream",
    "RpcWriter",
    "StreamBrokenError",
    "WritePolicy",
    "encode",
]

_DEFAULT_POLICY: Final = WritePolicy()


class RpcWriter:
    """Writes to the keepers of one sessions folder, for asyncio.

    Writes to one session arrive in the order in which they were asked for, from whatever
    task, thread or loop; writes to different sessions do not wait for each other.

    Args:
        sessions_dir: the folder with the sockets.
        policy: how long to try.
        on_delivery: called with what became of each write or stream once it is over, for
            instance `reconciler.metrics.DeliveryMetrics.delivered`. It must be quick. One that
            was cancelled is not told.

    Raises:
        NotImplementedError: on a system other than Linux.
    """

    def __init__(
        self,
        sessions_dir: Path,
        *,
        policy: WritePolicy = _DEFAULT_POLICY,
        on_delivery: OnDelivery | None = None,
    ) -> None:
        self._desk = Desk(sessions_dir, policy, on_delivery)

    async def write(
        self,
        sid: str,
        message: Message,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - ends in a value, not in an exception
        key: str | None = None,
    ) -> Delivery:
        """Write one message, and wait for its receipt.

        Cancelled, it closes its connection; what was handed over by then may arrive.

        Args:
            sid: the session.
            message: a mapping, or one line (see `encode`).
            timeout: seconds for the call as a whole; without it the policy alone bounds it.
            key: a name for this message, 1 to 128 printable ASCII characters. The keeper
                forwards one message of a key and takes others of that key as delivered: it
                is safe to write an unconfirmed one again, with its key. A keeper that does
                not understand keys gets nothing (`Reason.NO_KEYS`).

        Raises:
            InvalidMessageError, InvalidSessionIdError: before anything was done. A failed
                delivery raises nothing.
        """
        return _single(await self._write(self._desk.single(sid, message, key), timeout))

    async def write_many(
        self,
        sid: str,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - ends in a value, not in an exception
    ) -> ManyDelivery:
        """Write messages through one connection without a pause, with one receipt.

        Arguments and errors are those of `write`. No message at all is an invalid one.
        """
        return await self._write(self._desk.exchange(sid, messages), timeout)

    async def _write(
        self,
        exchange: Exchange,
        timeout: float | None,  # noqa: ASYNC109 - ends in a value, not in an exception
    ) -> ManyDelivery:
        deadline = deadline_of(timeout)
        try:
            with exchange.turn() as turn:
                if not turn.granted:
                    await run_async(turn.come, deadline)
                await _tried(exchange, exchange.attempt, deadline)
        except AttemptError as failure:
            return exchange.failed(failure)
        return exchange.delivery()

    def stream(self, sid: str, *, timeout: float | None = None) -> RpcStream:
        """Keep one connection for many messages: ``async with writer.stream(sid) as s``.

        Args:
            sid: the session.
            timeout: seconds for the opening, and again for the receipt at the end.

        Raises:
            InvalidSessionIdError: for a session id that is none.
        """
        return RpcStream(self._desk.exchange(sid), timeout)


class BlockingRpcWriter:
    """`RpcWriter` for callers without an event loop; threads may share one.

    Same arguments, methods, results and errors, to the letter.
    """

    def __init__(
        self,
        sessions_dir: Path,
        *,
        policy: WritePolicy = _DEFAULT_POLICY,
        on_delivery: OnDelivery | None = None,
    ) -> None:
        self._desk = Desk(sessions_dir, policy, on_delivery)

    def write(
        self, sid: str, message: Message, *, timeout: float | None = None, key: str | None = None
    ) -> Delivery:
        """Write one message, and wait for its receipt: `RpcWriter.write`."""
        return _single(self._write(self._desk.single(sid, message, key), timeout))

    def write_many(
        self, sid: str, messages: Iterable[Message], *, timeout: float | None = None
    ) -> ManyDelivery:
        """Write messages through one connection: `RpcWriter.write_many`."""
        return self._write(self._desk.exchange(sid, messages), timeout)

    def _write(self, exchange: Exchange, timeout: float | None) -> ManyDelivery:
        deadline = deadline_of(timeout)
        try:
            with exchange.turn() as turn:
                if not turn.granted:
                    run_blocking(turn.come, deadline)
                _tried_blocking(exchange, exchange.attempt, deadline)
        except AttemptError as failure:
            return exchange.failed(failure)
        return exchange.delivery()

    def stream(self, sid: str, *, timeout: float | None = None) -> BlockingRpcStream:
        """Keep one connection for many messages: `RpcWriter.stream`."""
        return BlockingRpcStream(self._desk.exchange(sid), timeout)


class RpcStream:
    """One connection for many messages: an async context manager.

    Leaving the block without an exception means that there is a receipt for every message;
    else `StreamBrokenError` is raised. A stream does not connect again by itself: what is
    unconfirmed could arrive twice. Other writes of the same writer keep their order with it.

    Attributes:
        sid: the session.
    """

    def __init__(self, exchange: Exchange, timeout: float | None) -> None:
        self.sid = exchange.sid
        self._exchange = exchange
        self._timeout = timeout

    @property
    def delivery(self) -> ManyDelivery | None:
        """What became of the messages; None while the stream is open."""
        return self._exchange.ended

    async def __aenter__(self) -> Self:
        exchange, deadline = self._exchange, deadline_of(self._timeout)
        with exchange.unbroken(), exchange.turn() as turn:
            await run_async(turn.come, deadline)
            await _tried(exchange, exchange.opening, deadline)
        return self

    async def send(
        self,
        message: Message,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - ends in a value, not in an exception
    ) -> None:
        """Hand a message over: at the keeper's pace, until the kernel has all of it.

        Raises:
            InvalidMessageError: before anything was done; the stream goes on.
            StreamBrokenError: the keeper is gone or replaced, or made no progress, or time
                ran out. The stream is over.
        """
        line = encode(message)
        with self._exchange.unbroken():
            await run_async(self._exchange.sending, line, deadline_of(timeout))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with self._exchange.unbroken():
                    await run_async(self._exchange.finishing, deadline_of(self._timeout))
        finally:
            self._exchange.abandon()  # if it has not ended: nobody else comes to end it


class BlockingRpcStream:
    """`RpcStream` for callers without an event loop: a context manager."""

    def __init__(self, exchange: Exchange, timeout: float | None) -> None:
        self.sid = exchange.sid
        self._exchange = exchange
        self._timeout = timeout

    @property
    def delivery(self) -> ManyDelivery | None:
        """What became of the messages; None while the stream is open."""
        return self._exchange.ended

    def __enter__(self) -> Self:
        exchange, deadline = self._exchange, deadline_of(self._timeout)
        with exchange.unbroken(), exchange.turn() as turn:
            run_blocking(turn.come, deadline)
            _tried_blocking(exchange, exchange.opening, deadline)
        return self

    def send(self, message: Message, *, timeout: float | None = None) -> None:
        """Hand a message over: `RpcStream.send`."""
        line = encode(message)
        with self._exchange.unbroken():
            run_blocking(self._exchange.sending, line, deadline_of(timeout))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with self._exchange.unbroken():
                    run_blocking(self._exchange.finishing, deadline_of(self._timeout))
        finally:
            self._exchange.abandon()  # if it has not ended: nobody else comes to end it


async def _tried(
    exchange: Exchange, script: Callable[[float], Script[None]], deadline: float
) -> None:
    """Run a script until it goes well; tenacity comes in where the first try did not."""
    try:
        await run_async(script, deadline)
    except TransientError as failure:
        again, tenacity = Again(failure, script), _tenacity(failure)
    else:
        return
    await tenacity.AsyncRetrying(**exchange.retrying(deadline))(run_async, again, deadline)


def _tried_blocking(
    exchange: Exchange, script: Callable[[float], Script[None]], deadline: float
) -> None:
    """The same, without an event loop."""
    try:
        run_blocking(script, deadline)
    except TransientError as failure:
        again, tenacity = Again(failure, script), _tenacity(failure)
    else:
        return
    tenacity.Retrying(**exchange.retrying(deadline))(run_blocking, again, deadline)


def _tenacity(failure: TransientError) -> ModuleType:
    """What tries again: a quarter of what a client imports, loaded once a first try has failed.

    Raises:
        TransientError: that failure, where it cannot be loaded for want of descriptors.
    """
    try:
        with _LOADING:
            import tenacity  # noqa: PLC0415 - see above
    except OSError:
        raise failure from None
    return tenacity


_LOADING = threading.Lock()
# No fork while it is loaded: in the child, where that thread is not, it would be so for ever.

if sys.platform != "win32":
    os.register_at_fork(
        before=_LOADING.acquire,
        after_in_parent=_LOADING.release,
        after_in_child=_LOADING.release,
    )


def _single(many: ManyDelivery) -> Delivery:
    return Delivery(
        sid=many.sid,
        outcome=many.outcome,
        reason=many.reason,
        attempts=many.attempts,
        elapsed=many.elapsed,
        size=many.size,
    )
