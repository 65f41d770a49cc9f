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

import contextlib
import enum
import errno
import fcntl
import json
import math
import os
import select
import socket
import stat
import struct
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypeVar

from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_any,
    stop_before_delay,
    wait_chain,
    wait_fixed,
    wait_none,
)

from reconciler import layout

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

Message: TypeAlias = Mapping[str, object] | str | bytes
"""What can be written: a JSON object, or one line that is one already."""

MAX_LINE: Final = 64 * 1024 * 1024
"""Bytes of the longest line, without its line feed."""

_PIECE = 8192
# Bytes handed to the kernel at once. The kernel tells that a piece was read, never how much
# of one: smaller pieces make a slower agent's progress visible (8 KiB in 350 ms is 23 kB/s),
# and cost 40 MiB no more than 6 ms.

_TURN = 1 << 20
# Bytes sent before the event loop gets a turn, where a fast keeper never makes us wait.

_LOOKS = 10
# Looks for progress per progress timeout: a peer that reads raises no event that says so.

_LONGEST_PAUSE = 0.016
# Seconds between two tries where there is nothing to wait on; they begin at 1 ms and double.

_EXITING = 0x4  # PF_EXITING in the flags of /proc/<pid>/stat, set before descriptors close
_PID_DIGITS = 10


class Outcome(enum.Enum):
    """What is known of a message once its write is over."""

    DELIVERED = "delivered"
    """The keeper gave its receipt for every byte."""
    NOT_DELIVERED = "not_delivered"
    """Nothing of it left this process: it cannot reach the agent. Safe to send again."""
    UNCONFIRMED = "unconfirmed"
    """Some of it was handed over and there is no receipt: it may reach the agent or not."""


class Reason(enum.Enum):
    """Why a write ended as it did: a constant word, fit for a log's or metric's key."""

    RECEIPT = "receipt"
    """Our keeper's receipt: every byte is in the agent's standard input."""
    HANDED_ON = "handed_on"
    """Another keeper's receipt, and it lived on: it has taken every byte and handed it on.
    The Node keeper holds in its memory what the agent has not read yet."""
    TAKEN = "taken"
    """Our keeper had read every byte, and so had handed it on, but never closed."""

    NO_SOCKET = "no_socket"
    """No socket, or no sessions folder."""
    NOT_A_SOCKET = "not_a_socket"
    """Something else stands under the socket's name: a link, a file."""
    REFUSED = "refused"
    """Nobody listens on the socket."""
    BACKLOG_FULL = "backlog_full"
    """A keeper that does not accept, with a full queue before it."""
    NO_PID_FILE = "no_pid_file"
    """The pid file is absent or empty: the keeper is being born."""
    BAD_PID_FILE = "bad_pid_file"
    """The pid file is a link, another user's, or holds no pid."""
    WRONG_PEER = "wrong_peer"
    """Who listens is not the process of the pid file, or is in another pid namespace."""
    WRONG_USER = "wrong_user"
    """The socket or its listener is another user's."""
    PERMISSION = "permission"
    """The system does not let us at the folder, the socket or the pid file."""
    NO_RESOURCES = "no_resources"
    """No descriptors or no memory left, here or in the kernel."""
    SYSTEM_ERROR = "system_error"
    """Any other refusal of the system."""
    TIMED_OUT_BEFORE = "timed_out_before"
    """Time ran out with nothing handed over."""

    TIMED_OUT_AFTER = "timed_out_after"
    """No progress, or no time left, after bytes were handed over."""
    KEEPER_DIED = "keeper_died"
    """The connection ended because the keeper died."""
    BROKEN = "broken"
    """The keeper closed the connection before it had read all of it."""
    ABANDONED = "abandoned"
    """The caller left a stream before its receipt."""


_RECEIPTS = frozenset({Reason.RECEIPT, Reason.HANDED_ON})


class InvalidMessageError(ValueError):
    """A message that cannot be one line for an agent. Its text is not repeated here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WritePolicy:
    """How long a write tries. The defaults are those of the dashboard's own client.

    Attributes:
        attempts: connections tried at most, 1 or more. Only an attempt that handed nothing
            over is followed by another.
        progress_timeout: seconds without progress after which an attempt is given up.
            Progress is a piece of 8 KiB taken by the keeper, or a step of the protocol.
        backoff: seconds before the second attempt, the third and so on; the last value
            stays. May be empty: no waiting.
    """

    attempts: int = 3
    progress_timeout: float = 0.350
    backoff: tuple[float, ...] = (0.050, 0.150)

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}, give 1 or more")
        if not 0 < self.progress_timeout < math.inf:
            raise ValueError(f"progress_timeout is {self.progress_timeout}, give seconds above 0")
        if not all(0 <= seconds < math.inf for seconds in self.backoff):
            raise ValueError(f"backoff is {self.backoff}, give seconds of 0 or more")


_DEFAULT_POLICY: Final = WritePolicy()


@dataclass(frozen=True, slots=True)
class Attempt:
    """One connection, or one try at it.

    Attributes:
        started: seconds after the call began.
        elapsed: seconds it took.
        reason: how it ended.
        handed_over: bytes that the kernel took for the keeper.
    """

    started: float
    elapsed: float
    reason: Reason
    handed_over: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What became of one message.

    Attributes:
        sid: the session.
        outcome: the promise, see `Outcome`.
        reason: how the last attempt ended, or why there was none.
        attempts: every attempt, in order.
        elapsed: seconds from the call to its end, waiting for earlier writes included.
        size: bytes on the wire, the line feed included.
    """

    sid: str
    outcome: Outcome
    reason: Reason
    attempts: tuple[Attempt, ...]
    elapsed: float
    size: int

    @property
    def delivered(self) -> bool:
        """Whether there is a receipt."""
        return self.outcome is Outcome.DELIVERED


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyDelivery(Delivery):
    """What became of messages that went through one connection, in order.

    The first `confirmed` are delivered, the last `unsent` are not, those between are
    unconfirmed. `outcome` is that of all of them together: ``DELIVERED`` or
    ``NOT_DELIVERED`` when it is so for every one, else ``UNCONFIRMED``.

    Attributes:
        total: how many messages there were.
        confirmed: how many were surely delivered. After a break this is known of our
            keeper alone, and is the least that is sure.
        unsent: how many surely were not.
    """

    total: int
    confirmed: int
    unsent: int

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """The outcome of each message, in order."""
        between = self.total - self.confirmed - self.unsent
        return (
            *(Outcome.DELIVERED for _ in range(self.confirmed)),
            *(Outcome.UNCONFIRMED for _ in range(between)),
            *(Outcome.NOT_DELIVERED for _ in range(self.unsent)),
        )


class StreamBrokenError(Exception):
    """A stream could not be opened, or ended without the receipt for all of it.

    Attributes:
        delivery: what is sure of the messages sent through it.
    """

    def __init__(self, delivery: ManyDelivery) -> None:
        super().__init__(
            f"stream to session {delivery.sid}: {delivery.reason.value}; of {delivery.total} "
            f"messages {delivery.confirmed} surely delivered, {delivery.unsent} surely not"
        )
        self.delivery = delivery

    def __reduce__(self) -> tuple[type[Self], tuple[ManyDelivery]]:
        return type(self), (self.delivery,)


class RpcWriter:
    """Writes to the keepers of one sessions folder, for asyncio.

    Writes to one session arrive in the order in which they were asked for, from whatever
    task, thread or loop; writes to different sessions do not wait for each other.

    Args:
        sessions_dir: the folder with the sockets.
        policy: how long to try.

    Raises:
        NotImplementedError: on a system other than Linux.
    """

    def __init__(self, sessions_dir: Path, *, policy: WritePolicy = _DEFAULT_POLICY) -> None:
        self._desk = _Desk(sessions_dir, policy)

    async def write(
        self,
        sid: str,
        message: Message,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - ends in a value, not in an exception
    ) -> Delivery:
        """Write one message, and wait for its receipt.

        Cancelled, it closes its connection; what was handed over by then may arrive.

        Args:
            sid: the session.
            message: a mapping, or one line (see `encode`).
            timeout: seconds for the call as a whole; without it the policy alone bounds it.

        Raises:
            InvalidMessageError, InvalidSessionIdError: before anything was done. A failed
                delivery raises nothing.
        """
        return _single(await self.write_many(sid, (message,), timeout=timeout))

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
        exchange = self._desk.exchange(sid, messages)
        deadline = _deadline(timeout)
        with exchange.settled(), exchange.turn() as turn:
            await _run_async(turn.come, deadline)
            await AsyncRetrying(**exchange.retrying(deadline))(
                _run_async, exchange.attempt, deadline
            )
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

    def __init__(self, sessions_dir: Path, *, policy: WritePolicy = _DEFAULT_POLICY) -> None:
        self._desk = _Desk(sessions_dir, policy)

    def write(self, sid: str, message: Message, *, timeout: float | None = None) -> Delivery:
        """Write one message, and wait for its receipt: `RpcWriter.write`."""
        return _single(self.write_many(sid, (message,), timeout=timeout))

    def write_many(
        self, sid: str, messages: Iterable[Message], *, timeout: float | None = None
    ) -> ManyDelivery:
        """Write messages through one connection: `RpcWriter.write_many`."""
        exchange = self._desk.exchange(sid, messages)
        deadline = _deadline(timeout)
        with exchange.settled(), exchange.turn() as turn:
            _run_blocking(turn.come, deadline)
            Retrying(**exchange.retrying(deadline))(_run_blocking, exchange.attempt, deadline)
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

    def __init__(self, exchange: _Exchange, timeout: float | None) -> None:
        self.sid = exchange.sid
        self._exchange = exchange
        self._timeout = timeout

    @property
    def delivery(self) -> ManyDelivery | None:
        """What became of the messages; None while the stream is open."""
        return self._exchange.ended

    async def __aenter__(self) -> Self:
        exchange, deadline = self._exchange, _deadline(self._timeout)
        with exchange.unbroken(), exchange.turn() as turn:
            await _run_async(turn.come, deadline)
            await AsyncRetrying(**exchange.retrying(deadline))(
                _run_async, exchange.opening, deadline
            )
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
            await _run_async(self._exchange.sending, line, _deadline(timeout))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._exchange.abandon()
            return
        with self._exchange.unbroken():
            await _run_async(self._exchange.finishing, _deadline(self._timeout))


class BlockingRpcStream:
    """`RpcStream` for callers without an event loop: a context manager."""

    def __init__(self, exchange: _Exchange, timeout: float | None) -> None:
        self.sid = exchange.sid
        self._exchange = exchange
        self._timeout = timeout

    @property
    def delivery(self) -> ManyDelivery | None:
        """What became of the messages; None while the stream is open."""
        return self._exchange.ended

    def __enter__(self) -> Self:
        exchange, deadline = self._exchange, _deadline(self._timeout)
        with exchange.unbroken(), exchange.turn() as turn:
            _run_blocking(turn.come, deadline)
            Retrying(**exchange.retrying(deadline))(_run_blocking, exchange.opening, deadline)
        return self

    def send(self, message: Message, *, timeout: float | None = None) -> None:
        """Hand a message over: `RpcStream.send`."""
        line = encode(message)
        with self._exchange.unbroken():
            _run_blocking(self._exchange.sending, line, _deadline(timeout))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._exchange.abandon()
            return
        with self._exchange.unbroken():
            _run_blocking(self._exchange.finishing, _deadline(self._timeout))


# -- Messages ---------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    r"""One line as it goes over the wire, with its LF.

    Args:
        message: a mapping becomes compact JSON in ASCII, so that no reader trips over
            U+2028. Text (as UTF-8) and bytes are one line and stay as they are, less one
            line end (``\n`` or ``\r\n``) that they may have.

    Raises:
        InvalidMessageError: a line feed, carriage return or NUL inside, not UTF-8 (lone
            surrogates included), blank, longer than `MAX_LINE`; of a mapping: NaN or an
            infinity, a key that is no text, anything that JSON has not.
    """
    match message:
        case str():
            line = _line(_utf8(message))
        case bytes():
            line = _line(message)
            if not _is_utf8(line):
                raise InvalidMessageError("the message is not UTF-8")
        case Mapping():
            line = _json(message)
        case _:
            raise InvalidMessageError("give a mapping, or one line as str or bytes")
    if len(line) > MAX_LINE:
        raise InvalidMessageError(f"the message has {len(line)} bytes, at most {MAX_LINE} fit")
    return line + b"\n"


def _line(text: bytes) -> bytes:
    line = text[:-1].removesuffix(b"\r") if text.endswith(b"\n") else text
    for byte, name in ((b"\n", "a line feed"), (b"\r", "a carriage return"), (b"\0", "a NUL")):
        if byte in line:
            raise InvalidMessageError(f"the message has {name} inside, it must be one line")
    if not line.strip():
        raise InvalidMessageError("the message is blank")
    return line


def _utf8(text: str) -> bytes:
    # Raised outside of the handler: the codec's own error carries the text along.
    with contextlib.suppress(UnicodeEncodeError):
        return text.encode()
    raise InvalidMessageError("the message has lone surrogates, it is not UTF-8")


def _is_utf8(line: bytes) -> bool:
    if line.isascii():
        return True
    with contextlib.suppress(UnicodeDecodeError):
        line.decode()
        return True
    return False


def _json(message: Mapping[str, object]) -> bytes:
    problem = "it nests too deep"
    try:
        text = json.dumps(dict(message), separators=(",", ":"), allow_nan=False)
    except RecursionError:
        pass
    except TypeError:
        problem = "it has a value or a key that JSON has not"
    except ValueError:
        problem = "it has NaN, an infinity, a number too long, or contains itself"
    else:
        _check_json(message)
        return text.encode("ascii")
    raise InvalidMessageError(f"the message cannot be JSON: {problem}")


def _check_json(message: Mapping[str, object]) -> None:
    """Refuse what `json.dumps` makes into something else: other keys, lone surrogates."""
    values: list[object] = [dict(message)]
    while values:
        match values.pop():
            case str() as text if not text.isascii():
                _utf8(text)
            case dict() as mapping:
                if not all(isinstance(key, str) for key in mapping):
                    raise InvalidMessageError("the message has a key that is no text")
                values.extend(mapping)
                values.extend(mapping.values())
            case list() | tuple() as items:
                values.extend(items)


# -- Scripts: what to do, and what to wait for --------------------------------------------


class _Moment(enum.Enum):
    """Where a script waits."""

    TURN = "turn"
    STREAMS = "streams"
    BACKLOG = "backlog"
    SENDING = "sending"
    RECEIPT = "receipt"


@dataclass(frozen=True, slots=True)
class _Wait:
    """Wait for the socket (to be writable when sending, else readable) or for a turn."""

    moment: _Moment
    seconds: float
    sock: socket.socket | None = None
    turn: _Turn | None = None


Script: TypeAlias = Generator[_Wait, None, T]


class _AttemptError(Exception):
    """An attempt ended without a receipt."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class _TransientError(_AttemptError):
    """Nothing was handed over, and another attempt may find it better."""


class _FinalError(_AttemptError):
    """Nothing was handed over, and waiting a little will not change that."""


class _UnconfirmedError(_AttemptError):
    """Bytes were handed over: another attempt could deliver them twice."""


class _Patience:
    """How long there may be no progress, within what is left of the call."""

    def __init__(self, policy: WritePolicy, deadline: float) -> None:
        self._span = policy.progress_timeout
        self._deadline = deadline
        self._ends = 0.0
        self.renew()

    def renew(self) -> None:
        self._ends = min(time.monotonic() + self._span, self._deadline)

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._ends

    def up_to(self, seconds: float) -> float:
        return max(0.0, min(seconds, self._ends - time.monotonic()))

    @property
    def look(self) -> float:
        """Seconds to the next look for progress."""
        return self.up_to(self._span / _LOOKS)


def _pauses() -> Iterator[float]:
    pause = 0.001
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE)


def _deadline(timeout: float | None) -> float:
    if timeout is None:
        return math.inf
    if not timeout >= 0:
        raise ValueError(f"timeout is {timeout}, give seconds of 0 or more")
    return time.monotonic() + timeout


# -- Drivers ------------------------------------------------------------------------------


def _run_blocking(make: Callable[..., Script[T]], *arguments: object) -> T:
    with contextlib.closing(make(*arguments)) as script:
        try:
            while True:
                _wait_blocking(next(script))
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _wait_blocking(wait: _Wait) -> None:
    if wait.turn is not None:
        came = threading.Event()
        if not wait.turn.granted_or(came.set):
            came.wait(min(wait.seconds, threading.TIMEOUT_MAX))
    elif wait.sock is None:
        time.sleep(wait.seconds)
    else:
        poll = select.poll()
        poll.register(
            wait.sock, select.POLLOUT if wait.moment is _Moment.SENDING else select.POLLIN
        )
        poll.poll(wait.seconds * 1000)


async def _run_async(make: Callable[..., Script[T]], *arguments: object) -> T:
    with contextlib.closing(make(*arguments)) as script:
        try:
            while True:
                await _wait_async(next(script))
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


async def _wait_async(wait: _Wait) -> None:
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
    with _watched(loop, wait, ready):
        await ready


@contextlib.contextmanager
def _watched(
    loop: asyncio.AbstractEventLoop, wait: _Wait, ready: asyncio.Future[None]
) -> Iterator[None]:
    """Resolve the future when the socket is ready or the time is over."""
    timer = None if wait.seconds == math.inf else loop.call_later(wait.seconds, _resolve, ready)
    remove: Callable[[int], bool] | None = None
    descriptor = -1 if wait.sock is None else wait.sock.fileno()
    if wait.sock is not None and wait.moment is _Moment.SENDING:
        loop.add_writer(descriptor, _resolve, ready)
        remove = loop.remove_writer
    elif wait.sock is not None:
        loop.add_reader(descriptor, _resolve, ready)
        remove = loop.remove_reader
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        if remove is not None:
            remove(descriptor)


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


# -- Order: one lane per session --------------------------------------------------------


class _Turn:
    """A place in a session's lane; who is first has the turn."""

    def __init__(self, lanes: _Lanes, sid: str) -> None:
        self._lanes = lanes
        self.sid = sid
        self.granted = False
        self.wake: Callable[[], object] | None = None

    def granted_or(self, wake: Callable[[], object]) -> bool:
        """Whether the turn has come; else ``wake`` is called when it does, by any thread."""
        return self._lanes.granted_or(self, wake)

    def come(self, deadline: float) -> Script[None]:
        """Wait for the turn."""
        while not self.granted:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _FinalError(Reason.TIMED_OUT_BEFORE)
            yield _Wait(_Moment.TURN, left, turn=self)


class _Lane:
    """Who writes to one session now and next, and which streams to it are open."""

    def __init__(self) -> None:
        self.turns: deque[_Turn] = deque()
        self.streams: list[_Link] = []


class _Lanes:
    """First come, first served, session by session; across threads and event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: dict[str, _Lane] = {}

    def __len__(self) -> int:
        return len(self._lanes)

    @contextlib.contextmanager
    def turn(self, sid: str) -> Iterator[_Turn]:
        """Take a place in the lane; wait for it with `_Turn.come`."""
        turn = _Turn(self, sid)
        with self._lock:
            turns = self._lanes.setdefault(sid, _Lane()).turns
            turns.append(turn)
            turn.granted = turns[0] is turn
        try:
            yield turn
        finally:
            self._leave(turn)

    def granted_or(self, turn: _Turn, wake: Callable[[], object]) -> bool:
        with self._lock:
            turn.wake = wake
            return turn.granted

    def _leave(self, turn: _Turn) -> None:
        with self._lock:
            lane = self._lanes.get(turn.sid)
            if lane is None or turn not in lane.turns:  # passed over, see _grant
                return
            lane.turns.remove(turn)
            if lane.turns and not lane.turns[0].granted:
                self._grant(lane.turns)
            self._sweep(turn.sid)

    def _grant(self, turns: deque[_Turn]) -> None:
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

    def _sweep(self, sid: str) -> None:
        lane = self._lanes.get(sid)
        if lane is not None and not lane.turns and not lane.streams:
            del self._lanes[sid]

    def streams(self, sid: str) -> tuple[_Link, ...]:
        with self._lock:
            lane = self._lanes.get(sid)
            return tuple(lane.streams) if lane is not None else ()

    def add_stream(self, sid: str, link: _Link) -> None:
        with self._lock:
            self._lanes.setdefault(sid, _Lane()).streams.append(link)

    def drop_stream(self, sid: str, link: _Link) -> None:
        with self._lock:
            lane = self._lanes.get(sid)
            if lane is not None and link in lane.streams:
                lane.streams.remove(link)
                self._sweep(sid)


# -- One connection -----------------------------------------------------------------------


class _Heard(enum.Enum):
    """What the connection says while nobody answers on it."""

    NOTHING = "nothing"
    END = "end"
    RESET = "reset"


class _Ledger:
    """Which bytes the other side has surely read.

    The kernel tells how much memory (`_queued`) all pieces take that were not read to their
    end, first in, first out. What each of them takes is seen when it is sent, never as more
    than it is: so the newest pieces that explain the memory are at least those unread.

    Attributes:
        handed: bytes sent.
        taken: bytes surely read, the end of a piece.
    """

    def __init__(self) -> None:
        self.handed = 0
        self.taken = 0
        self._pieces: deque[tuple[int, int]] = deque()  # where each ends, what it takes
        self._explained = 0
        self._queued = 0  # when last looked at

    def sent(self, size: int, queued: int) -> None:
        """Enter a piece, with what is queued now."""
        self.handed += size
        weight = max(0, queued - self._queued)
        self._queued = queued
        self._pieces.append((self.handed, weight))
        self._explained += weight

    def seen(self, queued: int) -> bool:
        """Strike what must have been read; whether there is less queued than before."""
        less = queued < self._queued
        self._queued = queued
        while self._pieces and self._explained - self._pieces[0][1] >= queued:
            self.taken, weight = self._pieces.popleft()
            self._explained -= weight
        return less


class _Link:
    """A connection to a keeper that was checked, and what is known of it.

    Our keeper reads the last byte of a line only once the line is in the agent's standard
    input: from it, what is taken is delivered.
    """

    def __init__(self, sock: socket.socket, peer: _Peer) -> None:
        self.peer = peer
        self._sock = sock
        self._ledger = _Ledger()
        self._heard = _Heard.NOTHING
        self._written: int | None = None  # by the peer, when last looked at
        self._lock = threading.RLock()  # writes that wait for a stream look at its link

    @property
    def handed(self) -> int:
        """Bytes that the kernel took for the keeper."""
        return self._ledger.handed

    @property
    def taken(self) -> int:
        """Bytes that the keeper has surely read."""
        return self._ledger.taken

    def close(self) -> None:
        with self._lock:
            self._sock.close()

    def cut(self) -> None:
        """Make whoever waits on the connection see its end, without closing it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def send(self, data: bytes, patience: _Patience) -> Script[None]:
        """Hand everything to the kernel."""
        self._measure()
        rest = memoryview(data)
        turn_at = self.handed + _TURN
        while rest:
            try:
                count = self._sock.send(rest[:_PIECE])
            except BlockingIOError:
                yield from self._wait(_Moment.SENDING, patience)
                continue
            except OSError:
                raise self._broken() from None
            self._ledger.sent(count, _queued(self._sock))
            rest = rest[count:]
            patience.renew()
            if self.handed >= turn_at:
                turn_at = self.handed + _TURN
                yield _Wait(_Moment.SENDING, 0)

    def finish(self, patience: _Patience) -> Script[Reason]:
        """Say that this was all, and wait for the receipt."""
        if self.hear() is not _Heard.NOTHING:
            raise self._broken()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        patience.renew()
        while (heard := self.hear()) is _Heard.NOTHING:
            yield from self._wait(_Moment.RECEIPT, patience)
        if heard is _Heard.RESET:
            raise self._broken()
        return self._receipt()

    def _receipt(self) -> Reason:
        """Believe the end of the stream, or not.

        The kernel ends it without a reset only when every byte was read. For our keeper
        that says all. Another one may have had bytes in its memory as it died.
        """
        if self.peer.ours:
            return Reason.RECEIPT
        if self.peer.lives():
            return Reason.HANDED_ON
        raise _UnconfirmedError(Reason.KEEPER_DIED)

    def _wait(self, moment: _Moment, patience: _Patience) -> Script[None]:
        if patience.over:
            raise self._failure(Reason.TIMED_OUT_AFTER if self.handed else Reason.TIMED_OUT_BEFORE)
        yield _Wait(moment, patience.look, sock=self._sock)
        if self.hear() is _Heard.NOTHING and self.progressed():
            patience.renew()

    def hear(self) -> _Heard:
        """Whether the keeper has closed. What it says, which is nothing, is dropped."""
        with self._lock:
            if self._heard is _Heard.NOTHING:
                self._heard = self._listen()
            return self._heard

    def _listen(self) -> _Heard:
        try:
            for _ in range(_LOOKS):
                if not self._sock.recv(_PIECE):
                    return _Heard.END
        except BlockingIOError:
            pass
        except OSError:
            return _Heard.RESET  # told once: the next read would say "end"
        return _Heard.NOTHING

    def check_open(self) -> None:
        """Raise when the keeper has closed already."""
        if self.hear() is not _Heard.NOTHING:
            raise self._broken()

    def progressed(self) -> bool:
        """Whether the keeper did something since the last look: read of us, or wrote on."""
        before, self._written = self._written, self.peer.written()
        return self._measure() or before not in {None, self._written}

    def drained(self, patience: _Patience) -> bool:
        """Whether the keeper has taken everything, or will never take any more."""
        if self.progressed():
            patience.renew()
        return self.taken >= self.handed or self._heard is not _Heard.NOTHING

    def _measure(self) -> bool:
        """See how much the keeper has taken; whether that is more than before."""
        with self._lock:
            if self._sock.fileno() < 0:
                self._heard = _Heard.RESET
                return False
            queued = _queued(self._sock)
            # Only now: a keeper that closed would have thrown away what was queued.
            return self.hear() is _Heard.NOTHING and self._ledger.seen(queued)

    def _broken(self) -> _AttemptError:
        return self._failure(Reason.BROKEN if self.peer.lives() else Reason.KEEPER_DIED)

    def _failure(self, reason: Reason) -> _AttemptError:
        return (_UnconfirmedError if self.handed else _TransientError)(reason)


def _queued(sock: socket.socket) -> int:
    """Memory that the kernel holds for bytes which the peer has not read.

    It counts whole pieces and their overhead: never less than the bytes, 0 when none.
    """
    answer = bytearray(4)
    fcntl.ioctl(sock, termios.TIOCOUTQ, answer)
    (queued,) = struct.unpack("i", answer)
    return int(queued)


# -- Connecting: nobody but this session's keeper -----------------------------------------


@dataclass(frozen=True, slots=True)
class _Peer:
    """The process that listens.

    Attributes:
        pid: its pid, which the session's pid file names too.
        started: when it started, in ticks since boot.
        ours: its arguments say that it is our keeper, of this session.
    """

    pid: int
    started: int
    ours: bool

    def lives(self) -> bool:
        """Whether it has not begun to exit. Its connections end after it has begun."""
        process = _process(self.pid)
        return process is not None and process == (self.started, False)

    def written(self) -> int:
        """Bytes that our keeper has written, 0 where that cannot be told.

        It may hold a whole long line, and write it to its agent while nothing moves on the
        connection.
        """
        if self.ours:
            with (
                contextlib.suppress(OSError, ValueError),
                open(f"/proc/{self.pid}/io", "rb") as file,
            ):
                return int(file.read().split()[3])
        return 0


def _process(pid: int) -> tuple[int, bool] | None:
    """When a process started and whether it is exiting, or None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[19]), fields[0] in {b"Z", b"X"} or bool(int(fields[6]) & _EXITING)


def _is_ours(pid: int, sid: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = os.fsdecode(file.read(_PIECE)).split("\0")
    except OSError:
        return False
    said = layout.keeper_arguments(arguments, frozenset({layout.KEEPER_PROGRAM.name}))
    return said is not None and said.sid == sid


def _connect(folder: Path, sid: str, patience: _Patience) -> Script[_Link]:
    """Connect to the session's keeper, and to nobody else."""
    try:
        with contextlib.ExitStack() as opened:
            folder_fd = _opened(opened, folder, os.O_PATH | os.O_DIRECTORY)
            address = _address(opened, folder_fd, sid)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                yield from _accepted(sock, address, patience)
                return _Link(sock, _checked_peer(sock, folder_fd, sid))
            except BaseException:
                sock.close()
                raise
    except OSError as error:
        raise _failure_of(error) from None


def _opened(
    stack: contextlib.ExitStack, path: str | Path, flags: int, folder: int | None = None
) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, dir_fd=folder)
    stack.callback(os.close, descriptor)
    return descriptor


def _address(opened: contextlib.ExitStack, folder_fd: int, sid: str) -> str:
    """Pin the socket's inode: no link is followed, and no path is too long for the kernel."""
    name = layout.file_name(layout.Role.SOCKET, sid)
    descriptor = _opened(opened, name, os.O_PATH | os.O_NOFOLLOW, folder_fd)
    status = os.fstat(descriptor)
    if not stat.S_ISSOCK(status.st_mode):
        raise _FinalError(Reason.NOT_A_SOCKET)
    if status.st_uid != os.geteuid():
        raise _FinalError(Reason.WRONG_USER)
    return f"/proc/self/fd/{descriptor}"


def _accepted(sock: socket.socket, address: str, patience: _Patience) -> Script[None]:
    """Connect. A full backlog is waited for: it has no event, so it is tried again."""
    for pause in _pauses():
        try:
            sock.connect(address)
        except BlockingIOError:
            if patience.over:
                raise
            yield _Wait(_Moment.BACKLOG, patience.up_to(pause))
        else:
            return


def _checked_peer(sock: socket.socket, folder_fd: int, sid: str) -> _Peer:
    """Make sure who listens: our user, and the process that the pid file names."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    if uid != os.geteuid():
        raise _FinalError(Reason.WRONG_USER)
    if pid != _named_pid(folder_fd, sid):
        raise _TransientError(Reason.WRONG_PEER)
    process = _process(pid)
    if process is None:
        raise _TransientError(Reason.KEEPER_DIED)
    return _Peer(pid, process[0], _is_ours(pid, sid))


def _named_pid(folder_fd: int, sid: str) -> int:
    """The pid in the session's pid file; nothing is followed, nothing blocks."""
    name = layout.file_name(layout.Role.PID_FILE, sid)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    with contextlib.ExitStack() as opened:
        try:
            descriptor = _opened(opened, name, flags, folder_fd)
        except FileNotFoundError:
            raise _TransientError(Reason.NO_PID_FILE) from None
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENXIO}:  # a link; a socket or a device
                raise _FinalError(Reason.BAD_PID_FILE) from None
            raise
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise _FinalError(Reason.BAD_PID_FILE)
        text = os.read(descriptor, _PID_DIGITS + 2)
    if not text:
        raise _TransientError(Reason.NO_PID_FILE)
    digits = text.removesuffix(b"\n")
    if not digits.isdigit() or len(digits) > _PID_DIGITS:
        raise _FinalError(Reason.BAD_PID_FILE)
    return int(digits)


def _failure_of(error: OSError) -> _AttemptError:
    """What a system error on the way to a connection means."""
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return _TransientError(Reason.NO_SOCKET)
        case errno.ECONNREFUSED:
            return _TransientError(Reason.REFUSED)
        case errno.EAGAIN:
            return _TransientError(Reason.BACKLOG_FULL)
        case errno.EMFILE | errno.ENFILE | errno.ENOMEM | errno.ENOBUFS:
            return _TransientError(Reason.NO_RESOURCES)
        case errno.EACCES | errno.EPERM:
            return _FinalError(Reason.PERMISSION)
        case errno.EPROTOTYPE:
            return _FinalError(Reason.NOT_A_SOCKET)
        case _:
            return _TransientError(Reason.SYSTEM_ERROR)


# -- One write, one batch, or one stream ----------------------------------------------------


class _Switches:
    """What `reconciler.testing` switches."""

    backoff = True


class _Desk:
    """What the exchanges of one writer share."""

    def __init__(self, folder: Path, policy: WritePolicy) -> None:
        if sys.platform != "linux":
            raise NotImplementedError("receipts and the check of the peer need Linux")
        self.folder = folder
        self.policy = policy
        self.lanes = _Lanes()

    def exchange(self, sid: str, messages: Iterable[Message] | None = None) -> _Exchange:
        """Check everything that the caller gave, before anything is done."""
        layout.check_sid(sid)
        if messages is None:
            return _Exchange(self, sid, [])
        if isinstance(messages, str | bytes | Mapping):
            raise InvalidMessageError("give a list of messages, this is a single one")
        lines = [encode(message) for message in messages]
        if not lines:
            raise InvalidMessageError("there is no message")
        return _Exchange(self, sid, lines)


class _Exchange:
    """Messages for one connection: the scripts, and the account of what is sure.

    Scripts of one exchange run in turns, never at once; `abandon` may come at any time.

    Attributes:
        sid: the session.
        ended: what became of it, once it is over.
    """

    def __init__(self, desk: _Desk, sid: str, lines: list[bytes]) -> None:
        self.sid = sid
        self.ended: ManyDelivery | None = None
        self._desk = desk
        self._data = lines[0] if len(lines) == 1 else b"".join(lines)
        self._began = time.monotonic()
        self._tried = self._began
        self._attempts: list[Attempt] = []
        self._link: _Link | None = None
        self._live = False  # an attempt is on
        self._sending = False  # a message of a stream is on its way
        self._size = 0
        self._refused = 0  # messages that never got to the connection
        self._taken = 0  # messages that the keeper has taken whole ...
        self._taken_end = 0  # ... and where the last of them ended
        self._ends: deque[int] = deque()  # where the others end
        for line in lines:
            self._add(line)

    # For the faces.

    def turn(self) -> contextlib.AbstractContextManager[_Turn]:
        """Take a place in the session's lane."""
        return self._desk.lanes.turn(self.sid)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """End a write with its delivery, whatever failed."""
        try:
            yield
        except _AttemptError as failure:
            self._settle(failure.reason)

    @contextlib.contextmanager
    def unbroken(self) -> Iterator[None]:
        """Raise what breaks a stream, now or before, as `StreamBrokenError`."""
        broken = self.ended
        if broken is None:
            try:
                yield
            except _AttemptError as failure:
                broken = self._settle(failure.reason)
        if broken is not None:
            raise StreamBrokenError(broken)

    def retrying(self, deadline: float) -> dict[str, Any]:
        """What tenacity is to do, the same for both faces."""
        policy = self._desk.policy
        waits = policy.backoff if _Switches.backoff else ()
        return {
            "retry": retry_if_exception_type(_TransientError),
            "stop": stop_any(
                stop_after_attempt(policy.attempts),
                stop_before_delay(max(0.0, deadline - time.monotonic())),
            ),
            "wait": wait_chain(*map(wait_fixed, waits)) if waits else wait_none(),
            "reraise": True,
        }

    def delivery(self) -> ManyDelivery:
        """What became of it."""
        if self.ended is None:
            raise RuntimeError("the exchange has not ended")
        return self.ended

    def abandon(self) -> None:
        """End a stream without its receipt."""
        self._settle(Reason.ABANDONED)

    # Scripts.

    def attempt(self, deadline: float) -> Script[None]:
        """Connect, send everything, take the receipt."""
        with self._noted():
            patience = _Patience(self._desk.policy, deadline)
            link = yield from self._connected(patience)
            yield from link.send(self._data, patience)
            self._settle((yield from link.finish(patience)))

    def opening(self, deadline: float) -> Script[None]:
        """Open a stream."""
        with self._noted():
            link = yield from self._connected(_Patience(self._desk.policy, deadline))
            self._desk.lanes.add_stream(self.sid, link)

    def sending(self, line: bytes, deadline: float) -> Script[None]:
        """Send one more message of a stream, in its turn."""
        with self.turn() as turn:
            try:
                yield from turn.come(deadline)
                link = self._still_open()
                patience = _Patience(self._desk.policy, deadline)
                yield from self._streams_first(patience)
                link.check_open()
            except _AttemptError:
                self._refused += 1
                raise
            yield from self._hand_over(link, line, patience)

    def finishing(self, deadline: float) -> Script[None]:
        """Close a stream with its receipt."""
        with self.turn() as turn:
            yield from turn.come(deadline)
            link = self._still_open()
            self._settle((yield from link.finish(_Patience(self._desk.policy, deadline))))

    def _connected(self, patience: _Patience) -> Script[_Link]:
        if patience.over:
            raise _TransientError(Reason.TIMED_OUT_BEFORE)
        yield from self._streams_first(patience)
        self._link = yield from _connect(self._desk.folder, self.sid, patience)
        return self._link

    def _streams_first(self, patience: _Patience) -> Script[None]:
        """Wait until what open streams have sent before was taken: that keeps the order."""
        for link in self._desk.lanes.streams(self.sid):
            if link is self._link:
                continue
            patience.renew()
            pauses = _pauses()
            while not link.drained(patience):
                if patience.over:
                    raise _TransientError(Reason.TIMED_OUT_BEFORE)
                yield _Wait(_Moment.STREAMS, patience.up_to(next(pauses)))

    def _still_open(self) -> _Link:
        if self._link is None:
            raise RuntimeError("the stream was not entered")
        if self.ended is not None:
            raise _FinalError(self.ended.reason)
        return self._link

    def _hand_over(self, link: _Link, line: bytes, patience: _Patience) -> Script[None]:
        before = link.handed
        self._strike_taken()
        self._add(line)
        self._sending = True
        try:
            yield from link.send(line, patience)
        except GeneratorExit:  # cancelled
            if link.handed == before:
                self._size -= len(line)
                self._ends.pop()
            else:
                self._sending = False
                self.abandon()
            raise
        finally:
            self._sending = False
            if not self._live:
                link.close()

    # The account.

    def _add(self, line: bytes) -> None:
        self._size += len(line)
        self._ends.append(self._size)

    def _strike_taken(self) -> None:
        taken = 0 if self._link is None else self._link.taken
        while self._ends and self._ends[0] <= taken:
            self._taken_end = self._ends.popleft()
            self._taken += 1

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Keep the account of one attempt."""
        self._tried = time.monotonic()
        self._live = True
        try:
            yield
        except _AttemptError as failure:
            self._hang_up(failure.reason)
            raise
        except BaseException:
            self._hang_up(Reason.ABANDONED)
            raise

    def _hang_up(self, reason: Reason) -> None:
        """End the attempt that is on, if one is."""
        if not self._live:
            return
        self._live = False
        now, link = time.monotonic(), self._link
        handed = 0 if link is None else link.handed
        self._attempts.append(Attempt(self._tried - self._began, now - self._tried, reason, handed))
        if link is not None:
            self._desk.lanes.drop_stream(self.sid, link)
            if self._sending:
                link.cut()  # who sends closes it: no descriptor goes away under a wait
            else:
                link.close()

    def _settle(self, reason: Reason) -> ManyDelivery:
        """Close the account; the first to do so says why."""
        if self.ended is None:
            self._hang_up(reason)
            self.ended = self._delivery(reason)
        return self.ended

    def _delivery(self, reason: Reason) -> ManyDelivery:
        self._strike_taken()
        total = self._taken + len(self._ends) + self._refused
        unsent = self._unsent()
        confirmed = self._taken if self._link is not None and self._link.peer.ours else 0
        if reason in _RECEIPTS:
            confirmed = total
        elif total and confirmed == total:
            reason = Reason.TAKEN
        outcome = Outcome.UNCONFIRMED
        if reason in _RECEIPTS or reason is Reason.TAKEN:
            outcome = Outcome.DELIVERED
        elif unsent == total:
            outcome = Outcome.NOT_DELIVERED
        return ManyDelivery(
            sid=self.sid,
            outcome=outcome,
            reason=reason,
            attempts=tuple(self._attempts),
            elapsed=time.monotonic() - self._began,
            size=self._size,
            total=total,
            confirmed=confirmed,
            unsent=unsent,
        )

    def _unsent(self) -> int:
        """Messages of which no byte was handed over; one that is being sent may have some."""
        handed = 0 if self._link is None else self._link.handed
        starts = (self._taken_end, *self._ends)[:-1]
        unsent = sum(start >= handed for start in starts)
        return self._refused + max(0, unsent - self._sending)


def _single(many: ManyDelivery) -> Delivery:
    return Delivery(
        sid=many.sid,
        outcome=many.outcome,
        reason=many.reason,
        attempts=many.attempts,
        elapsed=many.elapsed,
        size=many.size,
    )
