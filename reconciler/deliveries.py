"""What a write is told to do, and what it says in the end: plain values."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self


class Outcome(enum.Enum):
    """What is known of a message once its write is over."""

    DELIVERED = "delivered"
    """The keeper gave its receipt for every byte."""
    NOT_DELIVERED = "not_delivered"
    """Nothing of it left this process: it cannot reach the agent. Safe to send again."""
    UNCONFIRMED = "unconfirmed"
    """Some of it was handed over and there is no receipt: it may reach the agent or not.
    Of a message with a key that can have been in an earlier call, too."""


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
    UNTRUSTED_FOLDER = "untrusted_folder"
    """Others can exchange what stands in the sessions folder: it, or one above it, is
    another user's or open to others' writing. The command line says which, and the mend."""
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
    NO_KEYS = "no_keys"
    """A key was given, and this keeper does not show that it understands keys."""
    KEEPER_REPLACED = "keeper_replaced"
    """The key was handed to another keeper before, which may have passed its message on."""
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


RECEIPTS = frozenset({Reason.RECEIPT, Reason.HANDED_ON})


@dataclass(frozen=True, slots=True, kw_only=True)
class WritePolicy:
    """How long a write tries. The defaults are those of the dashboard's own client.

    Attributes:
        attempts: connections tried at most, 1 or more. Only an attempt that handed nothing
            over is followed by another; of a message with a key, any.
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
        size: bytes on the wire, the line feed and a key included.
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


OnDelivery = Callable[[Delivery], None]
"""Is told what became of a write, in the thread that wrote."""


def tell(listener: OnDelivery | None, delivery: Delivery) -> None:
    """Tell who wants to know; an error of theirs changes nothing about the delivery."""
    if listener is None:
        return
    try:
        listener(delivery)
    except Exception:
        import logging  # noqa: PLC0415 - a writer does without it

        logging.getLogger("reconciler").exception("on_delivery has failed")
