"""One write, one batch, or one stream: its attempts, and the account of what is sure."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from reconciler import layout
from reconciler.accounts import Account, Keys
from reconciler.deliveries import (
    RECEIPTS,
    Attempt,
    ManyDelivery,
    OnDelivery,
    Outcome,
    Reason,
    StreamBrokenError,
    WritePolicy,
    tell,
)
from reconciler.lanes import Lanes, Turn
from reconciler.link import Link, connect
from reconciler.messages import InvalidMessageError, Message, encode, encode_all, keyed
from reconciler.peers import Peers
from reconciler.trust import Trust
from reconciler.waiting import (
    AttemptError,
    FinalError,
    Moment,
    Patience,
    Script,
    TransientError,
    UnconfirmedError,
    Wait,
    pauses,
)


class Switches:
    """What `reconciler.testing` switches."""

    backoff = True


class Desk:
    """What the exchanges of one writer share."""

    def __init__(
        self, folder: Path, policy: WritePolicy, on_delivery: OnDelivery | None = None
    ) -> None:
        if sys.platform != "linux":
            raise NotImplementedError("receipts and the check of the peer need Linux")
        self.folder = folder
        self.policy = policy
        self.on_delivery = on_delivery
        self.lanes = Lanes()
        self.trust = Trust()
        self.peers = Peers()
        self.keys = Keys()

    def exchange(self, sid: str, messages: Iterable[Message] | None = None) -> Exchange:
        """Check everything that the caller gave, before anything is done."""
        layout.check_sid(sid)
        if messages is None:
            return Exchange(self, sid)
        if isinstance(messages, str | bytes | Mapping):
            raise InvalidMessageError("give a list of messages, this is a single one")
        data, count = encode_all(messages)
        if not count:
            raise InvalidMessageError("there is no message")
        return Exchange(self, sid, data, count)

    def single(self, sid: str, message: Message, key: str | None) -> Exchange:
        """The same for one message, that may have a key."""
        layout.check_sid(sid)
        line = encode(message)
        data = line if key is None else keyed(line, key)
        return Exchange(self, sid, data, 1, key)


class Exchange:
    """Messages for one connection: the scripts, and the account of what is sure.

    Scripts of one exchange run in turns, never at once; `abandon` may come at any time.

    Attributes:
        sid: the session.
        ended: what became of it, once it is over.
    """

    def __init__(
        self,
        desk: Desk,
        sid: str,
        data: bytes | bytearray = b"",
        count: int = 0,
        key: str | None = None,
    ) -> None:
        self.sid = sid
        self.ended: ManyDelivery | None = None
        self._desk = desk
        self._key = key
        self._data = data
        self._began = time.monotonic()
        self._tried = self._began
        self._attempts: list[Attempt] = []
        self._link: Link | None = None
        self._live = False  # an attempt is on
        self._streams = False  # others wait for what it has sent
        self._sending = False  # a message of a stream is on its way
        self._account = Account(data, count)

    # For the faces.

    def turn(self) -> Turn:
        """Take a place in the session's lane."""
        return self._desk.lanes.turn(self.sid)

    def failed(self, failure: AttemptError) -> ManyDelivery:
        """End a write that failed with its delivery."""
        return self._settle(_forgotten(failure).reason)

    @contextlib.contextmanager
    def unbroken(self) -> Iterator[None]:
        """Raise what breaks a stream, now or before, as `StreamBrokenError`."""
        broken = self.ended
        if broken is None:
            try:
                yield
            except AttemptError as failure:
                broken = self._settle(_forgotten(failure).reason)
        if broken is not None:
            raise StreamBrokenError(broken)

    def retrying(self, deadline: float) -> dict[str, Any]:
        """What tenacity is to do, the same for both faces."""
        from tenacity import (  # noqa: PLC0415 - only who tries again needs it
            retry_if_exception_type,
            stop_after_attempt,
            stop_any,
            stop_before_delay,
            wait_chain,
            wait_fixed,
            wait_none,
        )

        policy = self._desk.policy
        waits = policy.backoff if Switches.backoff else ()
        return {
            "retry": retry_if_exception_type(TransientError),
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
        self._begin_attempt()
        try:
            patience = Patience(self._desk.policy, deadline)
            link = yield from self._connected(patience)
            if self._key is None:
                reason = yield from link.deliver(self._data, patience)
            else:
                with self._once(link, self._key):
                    reason = yield from link.deliver(self._data, patience)
        except BaseException as failure:
            self._end_attempt(failure)
            raise
        self._settle(reason)

    @contextlib.contextmanager
    def _once(self, link: Link, key: str) -> Iterator[None]:
        """With a key: to one keeper that understands it alone; to that one, once more."""
        if self._desk.keys.keeper(self.sid, key) not in {None, link.peer.process}:
            raise FinalError(Reason.KEEPER_REPLACED)
        if not link.shows_keys(self.sid):
            raise FinalError(Reason.NO_KEYS)
        try:
            yield
        except UnconfirmedError as failure:
            if failure.reason is Reason.KEEPER_DIED or self._all_taken():
                raise
            raise TransientError(failure.reason) from None
        finally:
            if link.handed:
                self._desk.keys.handed(self.sid, key, link.peer.process)

    def _all_taken(self) -> bool:
        self._strike_taken()
        return self._account.complete and self._link is not None and self._link.peer.ours

    def opening(self, deadline: float) -> Script[None]:
        """Open a stream."""
        self._begin_attempt()
        try:
            link = yield from self._connected(Patience(self._desk.policy, deadline))
        except BaseException as failure:
            self._end_attempt(failure)
            raise
        self._streams = True
        self._desk.lanes.add_stream(self.sid, link)

    def sending(self, line: bytes, deadline: float) -> Script[None]:
        """Send one more message of a stream, in its turn."""
        with self.turn() as turn:
            try:
                yield from turn.come(deadline)
                link = self._still_open()
                patience = Patience(self._desk.policy, deadline)
                yield from self._streams_first(patience)
                link.check_open()
            except AttemptError:
                self._account.refuse()
                raise
            yield from self._hand_over(link, line, patience)

    def finishing(self, deadline: float) -> Script[None]:
        """Close a stream with its receipt."""
        with self.turn() as turn:
            yield from turn.come(deadline)
            link = self._still_open()
            reason = yield from link.deliver(b"", Patience(self._desk.policy, deadline))
            self._settle(reason)

    def _connected(self, patience: Patience) -> Script[Link]:
        self._link = None
        if patience.over:
            raise TransientError(Reason.TIMED_OUT_BEFORE)
        desk = self._desk
        if desk.lanes.streams(self.sid):
            yield from self._streams_first(patience)
        gaps = pauses()
        while True:
            try:
                self._link = connect(desk.folder, self.sid, desk.trust, desk.peers)
            except TransientError as failure:
                # That there is room in the backlog again raises no event.
                if failure.reason is not Reason.BACKLOG_FULL or patience.over:
                    raise
            else:
                return self._link
            yield Wait(Moment.BACKLOG, patience.up_to(next(gaps)))

    def _streams_first(self, patience: Patience) -> Script[None]:
        """Wait until what open streams have sent before was taken: that keeps the order."""
        for link in self._desk.lanes.streams(self.sid):
            if link is self._link:
                continue
            patience.renew()
            gaps = pauses()
            while not link.drained(patience):
                if patience.over:
                    raise TransientError(Reason.TIMED_OUT_BEFORE)
                yield Wait(Moment.STREAMS, patience.up_to(next(gaps)))

    def _still_open(self) -> Link:
        if self._link is None:
            raise RuntimeError("the stream was not entered")
        if self.ended is not None:
            raise FinalError(self.ended.reason)
        return self._link

    def _hand_over(self, link: Link, line: bytes, patience: Patience) -> Script[None]:
        before = link.handed
        self._strike_taken()
        self._account.add(line)
        self._sending = True
        try:
            yield from link.send(line, patience)
        except GeneratorExit:  # cancelled
            if link.handed == before:
                self._account.withdraw(line)
            else:
                self._sending = False
                self.abandon()
            raise
        finally:
            self._sending = False
            if not self._live:
                link.close()

    # The end.

    def _strike_taken(self) -> None:
        if self._link is not None:
            self._account.strike(self._link.taken)

    def _begin_attempt(self) -> None:
        """An attempt is on."""
        self._tried = time.monotonic()
        self._live = True

    def _end_attempt(self, failure: BaseException) -> None:
        """The attempt that was on has failed."""
        reason = failure.reason if isinstance(failure, AttemptError) else Reason.ABANDONED
        self._hang_up(reason)

    def _hang_up(self, reason: Reason) -> None:
        """End the attempt that is on, if one is."""
        if not self._live:
            return
        self._live = False
        now, link = time.monotonic(), self._link
        handed = 0 if link is None else link.handed
        self._attempts.append(Attempt(self._tried - self._began, now - self._tried, reason, handed))
        if link is not None:
            if self._streams:
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
            tell(self._desk.on_delivery, self.ended)
        return self.ended

    def _delivery(self, reason: Reason) -> ManyDelivery:
        account = self._account
        total = account.total
        confirmed, unsent, outcome = total, 0, Outcome.DELIVERED
        if reason not in RECEIPTS:
            self._strike_taken()
            confirmed = account.taken if self._link is not None and self._link.peer.ours else 0
            unsent = self._unsent()
            if total and confirmed == total:
                reason = Reason.TAKEN
            else:
                outcome = Outcome.NOT_DELIVERED if unsent == total else Outcome.UNCONFIRMED
        return ManyDelivery(
            sid=self.sid,
            outcome=outcome,
            reason=reason,
            attempts=tuple(self._attempts),
            elapsed=time.monotonic() - self._began,
            size=account.size,
            total=total,
            confirmed=confirmed,
            unsent=unsent,
        )

    def _unsent(self) -> int:
        if self._desk.keys.keeper(self.sid, self._key) is not None:
            return 0
        handed = 0 if self._link is None else self._link.handed
        return self._account.unsent(handed, sending=self._sending)


class Again:
    """A script whose first try was made: it fails as that did, and then runs anew.

    So tenacity counts, waits and stops as if it had seen the first try itself.
    """

    def __init__(self, failure: TransientError, script: Callable[[float], Script[None]]) -> None:
        self._failure: AttemptError | None = _forgotten(failure)
        self._script = script

    def __call__(self, deadline: float) -> Script[None]:
        """Run it, as tenacity asks for it."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        yield from self._script(deadline)


def _forgotten(failure: AttemptError) -> AttemptError:
    """Cut an error off from where it came: tenacity keeps it, and that would keep the message."""
    failure.__traceback__ = failure.__context__ = None
    return failure
