"""Messages with a key: written again they are delivered again, and arrive once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from conftest import open_descriptors
from delivery_scene import (
    HASTY,
    PATIENT,
    RECEIPT,
    SENDING,
    SID,
    Face,
    Keeper,
    Scene,
    before_connection,
    moment,
    named_as_ours,
    until,
)
from delivery_scene import face as face  # noqa: PLC0414 - fixtures
from delivery_scene import scene as scene  # noqa: PLC0414
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reconciler import accounts, layout
from reconciler.rpc_writer import (
    BlockingRpcWriter,
    InvalidMessageError,
    Message,
    Outcome,
    Reason,
    RpcWriter,
    WritePolicy,
    encode,
)
from reconciler.testing import Behaviour, FakeKeeper

D, N, U = Outcome.DELIVERED, Outcome.NOT_DELIVERED, Outcome.UNCONFIRMED
SMALL: Message = {"type": "prompt", "message": "small"}
BIG: Message = {"type": "prompt", "message": "b" * (1 << 20)}


def has(keeper: Keeper, *messages: Message) -> None:
    """Wait until the agent has these messages, and no others."""
    lines = [encode(message)[:-1] for message in messages]
    until(lambda: len(keeper.lines()) >= len(lines), "the lines")
    assert keeper.lines() == lines


def replaced(scene: Scene, kind: str = "ours") -> Keeper:
    """Kill the newest keeper, and start another in its place."""
    scene.keepers[-1].process.kill()
    for role in layout.CLAIM:
        scene.path(role).unlink(missing_ok=True)
    return scene.keeper(kind, "--survive")


# -- Sent again -------------------------------------------------------------------------


def test_written_twice_it_arrives_once(scene: Scene, face: Face) -> None:
    keeper = scene.keeper("ours")
    for message in (SMALL, SMALL, BIG):
        delivery = face.write(scene.folder, message, PATIENT, key="job 7")
        assert (delivery.outcome, delivery.reason) == (D, Reason.RECEIPT)
        assert delivery.size == len(encode(message)) + len("job 7") + 2
    assert face.write(scene.folder, SMALL, PATIENT).delivered
    has(keeper, SMALL, SMALL)


@pytest.mark.parametrize("message", [SMALL, BIG], ids=["small", "big"])
@pytest.mark.parametrize("which", ["process", "agent"])
def test_an_unconfirmed_one_is_written_again_without_fear(
    scene: Scene, face: Face, which: str, message: Message
) -> None:
    """The keeper was stopped past the timeout, or its agent with a full pipe."""
    keeper = scene.keeper("ours")
    stopped = keeper.process if which == "process" else keeper.agent
    stopped.stop()
    filling: Message = {"pad": "f" * 60_000}
    if which == "agent":
        assert face.write(scene.folder, filling, PATIENT).delivered
    room_left = (which, message) == ("agent", SMALL)
    before = len(open_descriptors())
    first = face.write(scene.folder, message, PATIENT if room_left else HASTY, key="k")
    assert len(open_descriptors()) == before
    if room_left:
        assert first.delivered
    else:
        assert (first.outcome, first.reason) == (U, Reason.TIMED_OUT_AFTER)
        assert len(first.attempts) == 3
        assert all(attempt.handed_over for attempt in first.attempts)
    stopped.go_on()
    assert face.write(scene.folder, message, PATIENT, key="k").delivered
    assert face.write(scene.folder, {"n": 2}, PATIENT).delivered
    has(keeper, *([filling] if which == "agent" else []), message, {"n": 2})


@pytest.mark.parametrize("message", [SMALL, BIG], ids=["small", "big"])
def test_attempts_go_on_after_bytes_were_handed_over(
    scene: Scene, face: Face, message: Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = scene.keeper("ours")
    keeper.process.stop()
    before_connection(monkeypatch, 2, keeper.process.go_on)
    delivery = face.write(scene.folder, message, WritePolicy(progress_timeout=1.0), key="k")
    assert delivery.delivered
    first, second = delivery.attempts
    assert (first.reason, second.reason) == (Reason.TIMED_OUT_AFTER, Reason.RECEIPT)
    assert 0 < first.handed_over <= second.handed_over == delivery.size
    has(keeper, message)


def test_what_was_read_to_its_end_is_not_tried_again(scene: Scene, face: Face) -> None:
    """A keeper that is stuck between the last byte and the receipt."""
    size = len(encode(SMALL)) + len("k") + 2
    named_as_ours(size, dies=False)(scene)
    delivery = face.write(scene.folder, SMALL, HASTY, key="k")
    assert (delivery.outcome, delivery.reason) == (D, Reason.TAKEN)
    assert [attempt.reason for attempt in delivery.attempts] == [Reason.TIMED_OUT_AFTER]


@pytest.mark.parametrize("after", [0, 10])
def test_a_connection_that_breaks_is_no_reason_to_give_up(
    scene: Scene, face: Face, after: int
) -> None:
    keeper = scene.fake(Behaviour.RESET, after=after, keys=True)
    delivery = face.write(scene.folder, SMALL, HASTY, key="k")
    assert (delivery.outcome, delivery.reason) == (U, Reason.BROKEN)
    assert [attempt.reason for attempt in delivery.attempts] == [Reason.BROKEN] * 3
    assert keeper.received == ()


def test_a_dead_keeper_is_not_tried_again(scene: Scene, face: Face) -> None:
    keeper = scene.keeper("ours")
    keeper.process.stop()
    scene.at(RECEIPT, keeper.process.kill)
    delivery = face.write(scene.folder, SMALL, PATIENT, key="k")
    assert (delivery.outcome, delivery.reason) == (U, Reason.KEEPER_DIED)
    assert len(delivery.attempts) == 1


# -- Who is sent what --------------------------------------------------------------------


def test_a_keeper_that_shows_no_keys_gets_nothing(scene: Scene, face: Face) -> None:
    keeper = scene.keeper("node")
    delivery = face.write(scene.folder, SMALL, PATIENT, key="k")
    assert (delivery.outcome, delivery.reason) == (N, Reason.NO_KEYS)
    (attempt,) = delivery.attempts
    assert (attempt.reason, attempt.handed_over) == (Reason.NO_KEYS, 0)
    assert face.write(scene.folder, SMALL, PATIENT).delivered
    has(keeper, SMALL)


def test_the_sign_is_the_listeners_not_the_paths(scene: Scene, face: Face) -> None:
    """A socket without the sign, moved to where one with the sign was."""
    plain = scene.stack.enter_context(FakeKeeper(scene.folder / "aside", SID))
    scene.fake(Behaviour.RECEIPT, keys=True)
    plain.socket_path.rename(scene.path(layout.Role.SOCKET))
    delivery = face.write(scene.folder, SMALL, PATIENT, key="k")
    assert (delivery.outcome, delivery.reason) == (N, Reason.NO_KEYS)


def test_nothing_goes_to_a_keeper_that_came_instead(scene: Scene) -> None:
    """Its memory is empty, and its agent another: only a new key may go there."""
    scene.keeper("ours", "--survive")
    # One attempt: what is not to arrive waits a second, and what is has one.
    writer = BlockingRpcWriter(scene.folder, policy=WritePolicy(attempts=1, progress_timeout=1.0))
    scene.keepers[0].process.stop()
    assert writer.write(SID, SMALL, key="k").outcome is U
    new = replaced(scene)
    again = writer.write(SID, SMALL, key="k")
    assert (again.outcome, again.reason) == (U, Reason.KEEPER_REPLACED)
    (attempt,) = again.attempts
    assert attempt.handed_over == 0
    assert writer.write(SID, SMALL, key="another").delivered
    has(new, SMALL)
    new.process.kill()
    gone = writer.write(SID, SMALL, key="k")
    assert (gone.outcome, gone.reason) == (U, Reason.REFUSED), "it can have arrived before"
    assert writer.write(SID, SMALL, key="third").outcome is N


def test_a_keeper_that_came_between_two_attempts_gets_nothing(
    scene: Scene, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.keeper("ours", "--survive").process.stop()
    before_connection(monkeypatch, 2, lambda: replaced(scene))
    delivery = face.write(scene.folder, SMALL, HASTY, key="k")
    assert (delivery.outcome, delivery.reason) == (U, Reason.KEEPER_REPLACED)
    first, second = delivery.attempts
    assert (first.reason, first.handed_over) == (Reason.TIMED_OUT_AFTER, delivery.size)
    assert (second.reason, second.handed_over) == (Reason.KEEPER_REPLACED, 0)
    scene.keepers[0].agent.wait()
    assert [keeper.lines() for keeper in scene.keepers] == [[], []]


def test_a_keeper_that_died_between_two_attempts(
    scene: Scene, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = scene.keeper("ours")
    keeper.process.stop()
    before_connection(monkeypatch, 2, keeper.process.kill)
    delivery = face.write(scene.folder, SMALL, HASTY, key="k")
    assert (delivery.outcome, delivery.reason) == (U, Reason.REFUSED)
    handed = [attempt.handed_over for attempt in delivery.attempts]
    assert handed == [delivery.size, 0, 0]


def test_only_the_newest_keys_are_kept_in_mind() -> None:
    keys = accounts.Keys()
    for number in range(accounts._KEYS_IN_MIND + 1):
        keys.handed(SID, f"{number}", (1, number))
        keys.handed(SID, "1", (2, 2))
    assert keys.keeper(SID, "0") is None
    assert keys.keeper(SID, "1") == (2, 2)
    assert keys.keeper("other", "1") is None
    assert len(keys._keepers) == accounts._KEYS_IN_MIND


def test_a_cancelled_write_is_kept_in_mind(scene: Scene) -> None:
    keeper = scene.keeper("ours", "--survive")
    keeper.process.stop()

    async def run() -> None:
        writer = RpcWriter(scene.folder, policy=PATIENT)
        task = asyncio.create_task(writer.write(SID, BIG, key="k"))
        await moment(scene, SENDING)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        keeper.process.go_on()
        assert (await writer.write(SID, BIG, key="k")).delivered
        replaced(scene)
        again = await writer.write(SID, BIG, key="k")
        assert (again.outcome, again.reason) == (U, Reason.KEEPER_REPLACED)

    asyncio.run(run())
    has(keeper, BIG)


# -- Keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["k", "a b", "~" * 128, "!"])
def test_a_key(scene: Scene, face: Face, key: str) -> None:
    keeper = scene.fake(Behaviour.RECEIPT, keys=True)
    for _ in range(2):
        delivery = face.write(scene.folder, SMALL, PATIENT, key=key)
        assert (delivery.outcome, delivery.reason) == (D, Reason.HANDED_ON)
    assert keeper.received == (encode(SMALL)[:-1],)


@pytest.mark.parametrize("key", ["", " ", "   ", "k" * 129, "é", "a\nb", "\x01", "\x7f", "a\0"])
def test_what_is_no_key_is_refused_first(scene: Scene, face: Face, key: str) -> None:
    keeper = scene.fake(Behaviour.RECEIPT, keys=True)
    with pytest.raises(InvalidMessageError, match="the key is not 1 to 128 printable ASCII"):
        face.write(scene.folder, SMALL, PATIENT, key=key)
    assert keeper.received == ()


# -- Whatever happens -------------------------------------------------------------------


def paused(scene: Scene) -> None:
    scene.keepers[-1].process.stop()
    scene.keepers[-1].process.go_on()


def stopped_for_a_while(scene: Scene) -> None:
    """Past every timeout of HASTY."""
    keeper = scene.keepers[-1]
    keeper.process.stop()
    timer = threading.Timer(0.2, keeper.process.go_on)
    timer.start()
    scene.stack.callback(timer.join)


def agent_stopped_for_a_while(scene: Scene) -> None:
    keeper = scene.keepers[-1]
    keeper.agent.stop()
    timer = threading.Timer(0.2, keeper.agent.go_on)
    timer.start()
    scene.stack.callback(timer.join)


def replaced_by_another(scene: Scene) -> None:
    replaced(scene)


def killed(scene: Scene) -> None:
    scene.keepers[-1].process.kill()


BREAKS: dict[str, Callable[[Scene], None]] = {
    "paused": paused,
    "stopped": stopped_for_a_while,
    "agent stopped": agent_stopped_for_a_while,
    "replaced": replaced_by_another,
    "killed": killed,
}


@dataclass(frozen=True)
class History:
    """Callers with the keys that they write, in order, and what happens after so many waits."""

    callers: list[list[int]]
    breaks: list[tuple[int, str]]


def histories(breaks: list[str]) -> st.SearchStrategy[History]:
    keys = st.lists(st.integers(0, len(SIZES) - 1), min_size=1, max_size=8)
    return st.builds(
        History,
        callers=st.lists(keys, min_size=1, max_size=3),
        breaks=st.lists(st.tuples(st.integers(0, 20), st.sampled_from(breaks)), max_size=4),
    )


SIZES = (0, 10, 5_000, 70_000, 300_000, 1_000)
"""Of the messages with the keys 0 to 5."""


def message_of(key: int) -> Message:
    return {"key": key, "pad": "p" * SIZES[key]}


def play(scene: Scene, history: History, writers: int) -> dict[int, set[Outcome]]:
    """All callers at once; each writes what is not delivered once more. What they were told."""
    scene.keeper("ours", "--survive")
    due = sorted(history.breaks)
    waits = itertools.count()
    busy = threading.Lock()

    def on_wait() -> None:
        with busy:
            count = next(waits)
            while due and due[0][0] <= count:
                BREAKS[due.pop(0)[1]](scene)

    scene.every_wait = on_wait
    made = [BlockingRpcWriter(scene.folder, policy=HASTY) for _ in range(writers)]
    told: dict[int, set[Outcome]] = {key: set() for key in range(len(SIZES))}

    def call(writer: BlockingRpcWriter, keys: list[int]) -> None:
        for key in keys:
            for _ in range(2):
                outcome = writer.write(SID, message_of(key), key=str(key)).outcome
                told[key].add(outcome)
                if outcome is D:
                    break

    with ThreadPoolExecutor(len(history.callers)) as pool:
        list(pool.map(call, itertools.cycle(made), history.callers))
    return told


def read_in_the_end(scene: Scene) -> Iterator[int]:
    """The keys that agents have read once their keepers are gone and their pipes are empty."""
    for keeper in scene.keepers:
        keeper.process.kill()
        keeper.agent.go_on()
        keeper.agent.wait()
        for line in keeper.lines():
            message = json.loads(line)
            assert message == message_of(message["key"])
            yield message["key"]


@pytest.mark.parametrize(
    ("writers", "breaks"), [(1, sorted(BREAKS)), (3, sorted(BREAKS.keys() - {"replaced"}))]
)
def test_whatever_happens(scene: Scene, writers: int, breaks: list[str]) -> None:
    """Each key arrives once at most, and once if anybody was told so.

    One writer holds that over all keepers that follow each other; several, over one.
    """

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(histories(breaks))
    def holds(history: History) -> None:
        outer, scene.keepers = scene.stack, []
        try:
            with contextlib.ExitStack() as stack:
                scene.stack = stack
                for role in layout.CLAIM:
                    scene.path(role).unlink(missing_ok=True)
                told = play(scene, history, writers)
                read = list(read_in_the_end(scene))
        finally:
            scene.stack = outer
        assert len(set(read)) == len(read), "a message arrived twice"
        assert {key for key, outcomes in told.items() if D in outcomes} <= set(read)
        assert not {key for key, outcomes in told.items() if outcomes <= {N}} & set(read)

    holds()
