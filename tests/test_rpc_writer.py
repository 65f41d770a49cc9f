from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from conftest import WAIT, open_descriptors
from delivery_scene import (
    FACES,
    HASTY,
    KINDS,
    PATIENT,
    RECEIPT,
    SENDING,
    SID,
    SLOWEST,
    Async,
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

from reconciler import layout, link, peers
from reconciler.lanes import Lanes
from reconciler.rpc_writer import (
    BlockingRpcWriter,
    Delivery,
    InvalidMessageError,
    Message,
    Outcome,
    Reason,
    RpcWriter,
    StreamBrokenError,
    WritePolicy,
    encode,
)
from reconciler.testing import Behaviour, FakeKeeper, no_waiting
from reconciler.waiting import Moment

# -- The table of outcomes --------------------------------------------------------------

SMALL: Message = {"type": "prompt", "message": "small"}
BIG: Message = {"type": "prompt", "message": "b" * (1 << 20)}
LONG: Message = {"type": "prompt", "message": "l" * (40 << 20)}
SMALL_SIZE = len(encode(SMALL))


@dataclass(frozen=True)
class Row:
    """What is seen, and what the delivery has to say."""

    name: str
    arrange: Callable[[Scene], object]
    outcome: Outcome
    reason: Reason
    attempts: int = 1
    handed: str = "all"
    message: Message = field(default_factory=lambda: SMALL)
    policy: WritePolicy = PATIENT
    timeout: float | None = None


def healthy(kind: str) -> Callable[[Scene], object]:
    return lambda scene: scene.keeper(kind)


def nothing(_: Scene) -> None:
    pass


def no_folder(scene: Scene) -> None:
    scene.folder.rmdir()


def killed_earlier(kind: str) -> Callable[[Scene], object]:
    return lambda scene: scene.keeper(kind).process.kill()


def killed_before_accept(kind: str) -> Callable[[Scene], object]:
    def arrange(scene: Scene) -> None:
        keeper = scene.keeper(kind)
        keeper.process.stop()
        scene.at(RECEIPT, keeper.process.kill)

    return arrange


def killed_within_a_line(kind: str) -> Callable[[Scene], object]:
    def arrange(scene: Scene) -> None:
        keeper = scene.keeper(kind)
        keeper.process.stop()
        scene.at(SENDING, keeper.process.kill)

    return arrange


def killed_after_accept(scene: Scene) -> None:
    """Ours, when it has taken a part of what it cannot pass on: the pipe is full."""
    keeper = scene.keeper("ours")
    keeper.agent.stop()

    def kill() -> None:
        until(lambda: peers.Peer(keeper.process.pid, 0, ours=True).written() >= 1 << 16)
        keeper.process.kill()

    scene.at(RECEIPT, kill)


def stopped(kind: str) -> Callable[[Scene], object]:
    return lambda scene: scene.keeper(kind).process.stop()


def stopped_with_full_backlog(kind: str) -> Callable[[Scene], object]:
    def arrange(scene: Scene) -> None:
        scene.keeper(kind).process.stop()
        with contextlib.suppress(BlockingIOError):
            while True:
                client = scene.stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(scene.path(layout.Role.SOCKET)))

    return arrange


def agent_stopped(kind: str) -> Callable[[Scene], object]:
    return lambda scene: scene.keeper(kind).agent.stop()


def agent_dead(kind: str) -> Callable[[Scene], object]:
    def arrange(scene: Scene) -> None:
        keeper = scene.keeper(kind)
        keeper.agent.kill()
        keeper.process.wait()

    return arrange


def deaf_agent(scene: Scene) -> None:
    """It lives, and reads no more: a keeper resets every connection."""
    scene.keeper("ours", "--deaf")


def slow_agent(kind: str) -> Callable[[Scene], object]:
    return lambda scene: scene.keeper(kind, "--slow", str(1 << 16), "0.003")


def fake(behaviour: Behaviour, after: int = 0) -> Callable[[Scene], object]:
    return lambda scene: scene.fake(behaviour, after=after)


def pid_file_says(text: str | None) -> Callable[[Scene], object]:
    return lambda scene: scene.fake(Behaviour.RECEIPT).say_pid(text)


def pid_file_is(make: Callable[[Path], object]) -> Callable[[Scene], object]:
    def arrange(scene: Scene) -> None:
        scene.fake(Behaviour.RECEIPT).say_pid(None)
        path = scene.path(layout.Role.PID_FILE)
        make(path)
        if path.is_dir():
            scene.stack.callback(path.rmdir)

    return arrange


def a_link_to_the_pid(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.write_text(str(os.getpid()))
    path.symlink_to(target)


def a_link_to_the_socket(scene: Scene) -> None:
    """Everything is right with the keeper; only its name is a link now."""
    scene.fake(Behaviour.RECEIPT)
    name = scene.path(layout.Role.SOCKET)
    name.rename(scene.folder / "moved")
    name.symlink_to("moved")


def a_file(scene: Scene) -> None:
    scene.path(layout.Role.SOCKET).write_text("")


def a_datagram_socket(scene: Scene) -> None:
    other = scene.stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    other.bind(str(scene.path(layout.Role.SOCKET)))


def impostor(scene: Scene) -> None:
    """A stranger listens where the living keeper's socket was."""
    keeper = scene.keeper("ours")
    scene.faked = True
    stranger = FakeKeeper(scene.folder / "aside", SID)
    scene.stack.enter_context(stranger)
    stranger.socket_path.rename(keeper.folder / stranger.socket_path.name)


D, N, U = Outcome.DELIVERED, Outcome.NOT_DELIVERED, Outcome.UNCONFIRMED
TABLE = [
    Row("ours", healthy("ours"), D, Reason.RECEIPT),
    Row("node", healthy("node"), D, Reason.HANDED_ON),
    Row("ours, agent stopped, room in its pipe", agent_stopped("ours"), D, Reason.RECEIPT),
    Row("node, agent stopped", agent_stopped("node"), D, Reason.HANDED_ON, message=BIG),
    Row(
        "ours, 40 MiB for a slow agent",
        slow_agent("ours"),
        *(D, Reason.RECEIPT),
        message=LONG,
        policy=SLOWEST,
    ),
    Row(
        "node, 40 MiB for a slow agent",
        slow_agent("node"),
        *(D, Reason.HANDED_ON),
        message=LONG,
        policy=PATIENT,
    ),
    Row(
        "ours, killed having read all",
        named_as_ours(SMALL_SIZE, dies=True),
        *(D, Reason.RECEIPT),
    ),
    Row(
        "ours, stuck having read all",
        named_as_ours(SMALL_SIZE, dies=False),
        *(D, Reason.TAKEN),
        policy=HASTY,
    ),
    Row("no folder", no_folder, N, Reason.NO_SOCKET, 3, "none", policy=HASTY),
    Row("no socket", nothing, N, Reason.NO_SOCKET, 3, "none", policy=HASTY),
    *(
        row
        for kind in KINDS
        for row in (
            Row(f"{kind}, killed before", killed_earlier(kind), N, Reason.REFUSED, 3, "none"),
            Row(f"{kind}, agent died before", agent_dead(kind), N, Reason.NO_SOCKET, 3, "none"),
            Row(
                f"{kind}, stopped, backlog full",
                stopped_with_full_backlog(kind),
                *(N, Reason.BACKLOG_FULL, 3, "none"),
                policy=HASTY,
            ),
            Row(
                f"{kind}, killed before accept",
                killed_before_accept(kind),
                *(U, Reason.KEEPER_DIED),
            ),
            Row(
                f"{kind}, killed within a line",
                killed_within_a_line(kind),
                *(U, Reason.KEEPER_DIED, 1, "some"),
                message=BIG,
            ),
            Row(f"{kind}, stopped", stopped(kind), U, Reason.TIMED_OUT_AFTER, policy=HASTY),
            Row(
                f"{kind}, stopped, within a line",
                stopped(kind),
                *(U, Reason.TIMED_OUT_AFTER, 1, "some"),
                message=BIG,
                policy=HASTY,
            ),
        )
    ),
    Row("ours, agent closed its input", deaf_agent, U, Reason.BROKEN),
    Row("ours, killed after accept", killed_after_accept, U, Reason.KEEPER_DIED, message=BIG),
    Row(
        "ours, agent stopped, no room in its pipe",
        agent_stopped("ours"),
        *(U, Reason.TIMED_OUT_AFTER),
        message=BIG,
        policy=WritePolicy(),
    ),
    Row("other, dies within a line", fake(Behaviour.DIE, 10), U, Reason.KEEPER_DIED),
    Row("other, dies having read all", fake(Behaviour.DIE, SMALL_SIZE), U, Reason.KEEPER_DIED),
    Row("other, resets", fake(Behaviour.RESET, 10), U, Reason.BROKEN),
    Row("other, stalls", fake(Behaviour.STALL, 5), U, Reason.TIMED_OUT_AFTER, policy=HASTY),
    Row(
        "other, stalls, call bounded",
        fake(Behaviour.STALL, 5),
        *(U, Reason.TIMED_OUT_AFTER),
        timeout=1.0,
    ),
    Row("no time", fake(Behaviour.RECEIPT), N, Reason.TIMED_OUT_BEFORE, 1, "none", timeout=0),
    Row("refuses", fake(Behaviour.REFUSE), N, Reason.REFUSED, 3, "none", policy=HASTY),
    Row(
        "never accepts", fake(Behaviour.NO_ACCEPT), N, Reason.BACKLOG_FULL, 3, "none", policy=HASTY
    ),
    Row("a stranger in its place", impostor, N, Reason.WRONG_PEER, 3, "none", policy=HASTY),
    Row("another's pid", pid_file_says("1"), N, Reason.WRONG_PEER, 3, "none", policy=HASTY),
    Row("no pid file", pid_file_says(None), N, Reason.NO_PID_FILE, 3, "none", policy=HASTY),
    Row("empty pid file", pid_file_says(""), N, Reason.NO_PID_FILE, 3, "none", policy=HASTY),
    Row("no pid in it", pid_file_says("pid"), N, Reason.BAD_PID_FILE, 1, "none"),
    Row("a long number in it", pid_file_says("1" * 99), N, Reason.BAD_PID_FILE, 1, "none"),
    Row(
        "its pid file is a link", pid_file_is(a_link_to_the_pid), N, Reason.BAD_PID_FILE, 1, "none"
    ),
    Row("its pid file is a FIFO", pid_file_is(os.mkfifo), N, Reason.BAD_PID_FILE, 1, "none"),
    Row("its pid file is a folder", pid_file_is(os.mkdir), N, Reason.BAD_PID_FILE, 1, "none"),
    Row("a link at its name", a_link_to_the_socket, N, Reason.NOT_A_SOCKET, 1, "none"),
    Row("a file at its name", a_file, N, Reason.NOT_A_SOCKET, 1, "none"),
    Row("a datagram socket at its name", a_datagram_socket, N, Reason.NOT_A_SOCKET, 1, "none"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name.replace(" ", "-"))
def test_outcome(scene: Scene, face: Face, row: Row) -> None:
    row.arrange(scene)
    before = len(open_descriptors())
    delivery = face.write(scene.folder, row.message, row.policy, row.timeout)
    assert len(open_descriptors()) == before or scene.faked  # whose ends are in this process too

    size = len(encode(row.message))
    *failed, last = delivery.attempts
    assert (delivery.outcome, delivery.reason) == (row.outcome, row.reason)
    assert len(delivery.attempts) == row.attempts
    assert last.reason is (Reason.TIMED_OUT_AFTER if row.reason is Reason.TAKEN else row.reason)
    assert delivery.size == size
    assert not any(attempt.handed_over for attempt in failed)
    assert {"none": last.handed_over == 0, "all": last.handed_over == size}.get(
        row.handed, 0 < last.handed_over < size
    )
    assert not scene.on_wait, "the moment of the row never came"
    check_times(delivery, row.policy)
    check_agents(scene, delivery.outcome, encode(row.message)[:-1])


def check_times(delivery: Delivery, policy: WritePolicy) -> None:
    assert delivery.elapsed >= sum(attempt.elapsed for attempt in delivery.attempts)
    for number, (one, next_) in enumerate(itertools.pairwise(delivery.attempts)):
        pause = policy.backoff[min(number, len(policy.backoff) - 1)]
        assert next_.started - (one.started + one.elapsed) >= pause * 0.9
    if policy is SLOWEST:
        assert delivery.elapsed > policy.progress_timeout
    elif policy is HASTY and delivery.reason is Reason.TIMED_OUT_AFTER:
        assert delivery.elapsed >= policy.progress_timeout


def check_agents(scene: Scene, outcome: Outcome, line: bytes) -> None:
    """What the agent reads in the end must agree with what was said."""
    for keeper in scene.keepers:
        keeper.agent.go_on()
        keeper.process.go_on()
        if outcome is Outcome.DELIVERED:
            until(partial(keeper.has_only, line), "the delivered line")
        elif outcome is Outcome.NOT_DELIVERED:
            assert keeper.lines() == []
        else:
            assert keeper.lines() in ([], [line]) or is_cut(keeper, line)


def is_cut(keeper: Keeper, line: bytes) -> bool:
    """The Node keeper makes a line of a part, which for an object is no JSON any more."""
    lines = keeper.lines()
    return keeper.kind == "node" and len(lines) == 1 and line.startswith(lines[0])


def test_the_agent_dies_within_a_line(scene: Scene, face: Face) -> None:
    """Its keeper resets the connection and ends: the writer sees it before or after that."""
    keeper = scene.keeper("ours")
    keeper.agent.stop()

    def kill() -> None:
        until(lambda: peers.Peer(keeper.process.pid, 0, ours=True).written() >= 1 << 16)
        keeper.agent.kill()

    scene.at(RECEIPT, kill)
    delivery = face.write(scene.folder, BIG, PATIENT)
    assert delivery.outcome is U
    assert delivery.reason in {Reason.BROKEN, Reason.KEEPER_DIED}
    assert len(delivery.attempts) == 1
    assert keeper.lines() == []


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_a_folder_that_others_may_write_to_gets_nothing(
    scene: Scene, face: Face, mode: int, *, above: bool
) -> None:
    keeper = scene.keeper("ours")
    wrong = scene.folder.parent if above else scene.folder
    wrong.chmod(mode)
    delivery = face.write(scene.folder, SMALL, PATIENT)
    assert (delivery.outcome, delivery.reason) == (N, Reason.UNTRUSTED_FOLDER)
    assert len(delivery.attempts) == 1
    wrong.chmod(0o700)
    assert face.write(scene.folder, SMALL, PATIENT).delivered
    until(keeper.lines)
    assert len(keeper.lines()) == 1


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("whose", ["listener", "socket", "pid file"])
def test_another_users_keeper_gets_nothing(scene: Scene, face: Face, whose: str) -> None:
    reason = Reason.WRONG_USER
    if whose == "listener":
        listener = scene.stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(scene.path(layout.Role.SOCKET)))
        os.seteuid(65534)
        try:
            listener.listen()
        finally:
            os.seteuid(0)
        scene.path(layout.Role.PID_FILE).write_text(str(os.getpid()))
    else:
        scene.fake(Behaviour.RECEIPT)
        role = layout.Role.SOCKET if whose == "socket" else layout.Role.PID_FILE
        os.chown(scene.path(role), 65534, 65534)
        reason = reason if whose == "socket" else Reason.BAD_PID_FILE
    delivery = face.write(scene.folder, SMALL, HASTY)
    assert (delivery.outcome, delivery.reason) == (N, reason)
    assert len(delivery.attempts) == 1


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_folder_that_may_not_be_entered(scene: Scene) -> None:
    scene.fake(Behaviour.RECEIPT)
    scene.folder.chmod(0)
    os.seteuid(65534)
    try:
        delivery = BlockingRpcWriter(scene.folder).write(SID, SMALL)
    finally:
        os.seteuid(0)
        scene.folder.chmod(0o700)
    assert (delivery.outcome, delivery.reason) == (N, Reason.PERMISSION)


def test_no_descriptors_left(scene: Scene, face: Face) -> None:
    scene.fake(Behaviour.RECEIPT)
    taken: list[int] = []

    def take_all() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))

    soft, hard = resource_limit(len(open_descriptors()) + 40)
    try:
        if isinstance(face, Async):
            delivery = asyncio.run(_with_none_left(scene.folder, take_all, taken))
        else:
            take_all()
            delivery = face.write(scene.folder, SMALL, HASTY)
    finally:
        for descriptor in taken:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        resource_limit(soft, hard)
    assert (delivery.outcome, delivery.reason) == (N, Reason.NO_RESOURCES)


async def _with_none_left(folder: Path, take_all: Callable[[], None], taken: list[int]) -> Delivery:
    take_all()
    try:
        return await RpcWriter(folder, policy=HASTY).write(SID, SMALL)
    finally:
        for descriptor in taken:
            os.close(descriptor)
        taken.clear()


def resource_limit(soft: int, hard: int | None = None) -> tuple[int, int]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard or before[1]))
    return before


def test_a_path_longer_than_the_kernels_limit(tmp_path: Path, face: Face) -> None:
    folder = tmp_path / ("long" * 40)
    with FakeKeeper(folder, SID) as keeper:
        assert len(str(keeper.socket_path)) > 108
        assert face.write(folder, SMALL, PATIENT).delivered
        assert keeper.received == (encode(SMALL)[:-1],)


def test_an_end_of_stream_before_ours_is_no_receipt(scene: Scene, face: Face) -> None:
    listener = scene.stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(scene.path(layout.Role.SOCKET)))
    listener.listen()
    scene.path(layout.Role.PID_FILE).write_text(str(os.getpid()))
    readers: list[threading.Thread] = []

    def close_one_side_and_read_on() -> None:
        client = scene.stack.enter_context(listener.accept()[0])
        client.shutdown(socket.SHUT_WR)
        readers.append(
            threading.Thread(target=lambda: [0 for _ in iter(lambda: client.recv(1 << 16), b"")])
        )
        readers[0].start()

    scene.at(SENDING, close_one_side_and_read_on)
    delivery = face.write(scene.folder, BIG, PATIENT)
    readers[0].join()
    assert (delivery.outcome, delivery.reason) == (U, Reason.BROKEN)
    assert delivery.attempts[0].handed_over == delivery.size


def test_what_a_keeper_says_is_no_progress(scene: Scene, face: Face) -> None:
    listener = scene.stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(scene.path(layout.Role.SOCKET)))
    listener.listen()
    scene.path(layout.Role.PID_FILE).write_text(str(os.getpid()))

    def talk() -> None:
        client = scene.stack.enter_context(listener.accept()[0])
        client.sendall(b"y" * 150_000)

    scene.at(RECEIPT, talk)
    delivery = face.write(scene.folder, SMALL, HASTY)
    assert (delivery.outcome, delivery.reason) == (U, Reason.TIMED_OUT_AFTER)


def test_attempts_meet_a_keeper_that_comes_late(
    scene: Scene, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starts() -> None:
        scene.fake(Behaviour.RECEIPT)

    before_connection(monkeypatch, 3, starts)
    policy = WritePolicy(progress_timeout=10.0, attempts=10, backoff=(0.01,))
    delivery = face.write(scene.folder, SMALL, policy)
    assert delivery.delivered
    *failed, last = (attempt.reason for attempt in delivery.attempts)
    assert set(failed) <= {Reason.NO_SOCKET, Reason.REFUSED, Reason.NO_PID_FILE}
    assert len(failed) == 2
    assert last is Reason.HANDED_ON


def test_a_full_backlog_is_waited_for_within_an_attempt(scene: Scene, face: Face) -> None:
    keeper = scene.keeper("ours")
    keeper.process.stop()
    stopped_clients = contextlib.ExitStack()
    with stopped_clients, contextlib.suppress(BlockingIOError):
        while True:
            client = stopped_clients.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect(str(scene.path(layout.Role.SOCKET)))
    scene.at(Moment.BACKLOG, keeper.process.go_on)
    delivery = face.write(scene.folder, SMALL, PATIENT)
    assert delivery.delivered
    assert len(delivery.attempts) == 1


def test_waiting_between_attempts_can_be_removed(folder: Path, face: Face) -> None:
    with no_waiting():
        delivery = face.write(folder, SMALL, WritePolicy(attempts=50, backoff=(60.0,)))
    assert len(delivery.attempts) == 50


def test_a_call_bounded_by_time_does_not_begin_another_attempt(folder: Path, face: Face) -> None:
    delivery = face.write(folder, SMALL, WritePolicy(backoff=(30.0,)), timeout=5.0)
    assert (delivery.outcome, delivery.reason) == (N, Reason.NO_SOCKET)
    assert len(delivery.attempts) == 1
    assert delivery.elapsed < 5.0


# -- Many messages, and streams ---------------------------------------------------------

THREE: list[Message] = [{"n": 1}, '{"n":2}', b'{"n":3}']


@pytest.mark.parametrize("kind", KINDS)
def test_many_messages_arrive_in_order_through_one_connection(
    scene: Scene, face: Face, kind: str
) -> None:
    keeper = scene.keeper(kind)
    messages: list[Message] = [{"n": n} for n in range(5000)]
    delivery = face.write_many(scene.folder, messages, PATIENT)
    assert delivery.delivered
    assert (delivery.total, delivery.confirmed, delivery.unsent) == (5000, 5000, 0)
    assert delivery.outcomes == (D,) * 5000
    until(lambda: len(keeper.lines()) == 5000)
    assert keeper.lines() == [encode(message)[:-1] for message in messages]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_keeps_one_connection(scene: Scene, face: Face, kind: str) -> None:
    keeper = scene.keeper(kind)
    delivery = face.stream(scene.folder, THREE, PATIENT)
    assert delivery is not None
    assert delivery.outcomes == (D, D, D)
    assert len(delivery.attempts) == 1
    until(lambda: keeper.lines() == [b'{"n":1}', b'{"n":2}', b'{"n":3}'])


def test_a_stream_may_carry_nothing(scene: Scene, face: Face) -> None:
    scene.fake(Behaviour.RECEIPT)
    delivery = face.stream(scene.folder, [], PATIENT)
    assert delivery is not None
    assert delivery.delivered
    assert delivery.outcomes == ()


def killed_when_the_agent_has(scene: Scene, kind: str, count: int) -> Callable[[], None]:
    keeper = scene.keepers[0]

    def kill() -> None:
        until(lambda: len(keeper.lines()) >= count, f"{count} lines at the agent of {kind}")
        keeper.process.kill()

    return kill


@pytest.mark.parametrize(("kind", "sure"), [("ours", 2), ("node", 0)])
def test_a_broken_batch_tells_what_is_sure(scene: Scene, face: Face, kind: str, sure: int) -> None:
    """Two lines that were read, one that is cut, and one that was never begun."""
    keeper = scene.keeper(kind)
    cut: Message = {"big": "x" * (3 << 20)}

    def read_what_was_sent() -> None:
        assert scene.waits_on is not None
        sock = scene.waits_on
        keeper.process.go_on()
        until(lambda: link._queued(sock) < 2 * link._PIECE, "reading")
        until(lambda: len(keeper.lines()) == 2, "two lines at the agent")
        keeper.process.stop()
        scene.at(SENDING, keeper.process.kill)

    keeper.process.stop()
    scene.at(SENDING, read_what_was_sent)
    delivery = face.write_many(scene.folder, [{"n": 1}, {"n": 2}, cut, {"n": 4}], PATIENT)
    assert (delivery.outcome, delivery.reason) == (U, Reason.KEEPER_DIED)
    assert (delivery.total, delivery.confirmed, delivery.unsent) == (4, sure, 1)
    assert delivery.outcomes[-1] is N
    assert delivery.outcomes[:sure] == (D,) * sure
    assert keeper.lines() == [b'{"n":1}', b'{"n":2}']


@pytest.mark.parametrize(("kind", "sure"), [("ours", 1), ("node", 0)])
def test_a_stream_fails_clearly_when_its_keeper_is_gone(
    scene: Scene, face: Face, kind: str, sure: int
) -> None:
    keeper = scene.keeper(kind)

    def messages() -> Iterator[Message]:
        yield {"n": 1}
        until(lambda: len(keeper.lines()) == 1)
        yield {"n": 2}
        until(lambda: len(keeper.lines()) == 2)
        keeper.process.kill()
        yield {"n": 3}
        pytest.fail("the stream took a message after its keeper's death")

    with pytest.raises(StreamBrokenError) as caught:
        face.stream(scene.folder, messages(), PATIENT)
    delivery = caught.value.delivery
    assert (delivery.outcome, delivery.reason) == (U, Reason.KEEPER_DIED)
    assert (delivery.total, delivery.confirmed, delivery.unsent) == (3, sure, 1)
    assert str(caught.value).startswith(f"stream to session {SID}: keeper_died; of 3 messages")
    copied = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert copied.delivery == delivery


def test_a_stream_that_cannot_be_opened(folder: Path, face: Face) -> None:
    with pytest.raises(StreamBrokenError) as caught:
        face.stream(folder, THREE, HASTY)
    delivery = caught.value.delivery
    assert (delivery.outcome, delivery.reason) == (N, Reason.NO_SOCKET)
    assert len(delivery.attempts) == 3
    assert delivery.total == 0


def test_a_stream_without_a_receipt_at_its_end(scene: Scene, face: Face) -> None:
    scene.fake(Behaviour.STALL, after=8)
    with pytest.raises(StreamBrokenError) as caught:
        face.stream(scene.folder, THREE, HASTY)
    delivery = caught.value.delivery
    assert (delivery.outcome, delivery.reason) == (U, Reason.TIMED_OUT_AFTER)
    assert delivery.outcomes == (U, U, U)


def test_a_stream_goes_at_the_keepers_pace_and_gives_up(scene: Scene, face: Face) -> None:
    scene.keeper("ours").agent.stop()
    sent = itertools.count()

    def messages() -> Iterator[Message]:
        while True:
            yield {"n": next(sent), "pad": "p" * 5000}

    with pytest.raises(StreamBrokenError) as caught:
        face.stream(scene.folder, messages(), SLOWEST)
    delivery = caught.value.delivery
    assert delivery.reason is Reason.TIMED_OUT_AFTER
    assert delivery.size < 1 << 20  # a pipe and a socket's buffers: nobody swallows the rest
    assert 10 <= delivery.confirmed < 20  # of 5 KB each, in the agent's pipe of 64 KiB
    assert delivery.total == next(sent)


def test_a_stream_left_by_an_exception_is_abandoned(scene: Scene) -> None:
    keeper = scene.fake(Behaviour.RECEIPT)
    writer = BlockingRpcWriter(scene.folder)
    before = len(open_descriptors())
    stream = writer.stream(SID)
    with contextlib.suppress(KeyError), stream:
        stream.send({"n": 1})
        raise KeyError
    assert stream.delivery is not None
    assert (stream.delivery.outcome, stream.delivery.reason) == (U, Reason.ABANDONED)
    until(lambda: len(open_descriptors()) == before)  # the fake keeper's end is in this process too
    assert len(writer._desk.lanes) == 0
    keeper.wait_received(1)
    with pytest.raises(StreamBrokenError):
        stream.send({"n": 2})


def test_an_invalid_message_does_not_end_a_stream(scene: Scene) -> None:
    keeper = scene.fake(Behaviour.RECEIPT)
    with BlockingRpcWriter(scene.folder).stream(SID) as stream:
        with pytest.raises(InvalidMessageError):
            stream.send("")
        stream.send({"n": 1})
    assert keeper.received == (b'{"n":1}',)


def test_a_stream_has_to_be_entered(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="not entered"):
        BlockingRpcWriter(folder).stream(SID).send({"n": 1})


# -- Order ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_writes_of_one_process_arrive_as_asked(scene: Scene, kind: str) -> None:
    keeper = scene.keeper(kind)

    async def run() -> list[Delivery]:
        writer = RpcWriter(scene.folder, policy=PATIENT)
        asked = (writer.write(SID, {"n": n, "pad": "p" * (n % 7 * 5000)}) for n in range(200))
        deliveries = await asyncio.gather(*asked)
        assert len(writer._desk.lanes) == 0
        return deliveries

    assert all(delivery.delivered for delivery in asyncio.run(run()))
    until(lambda: len(keeper.lines()) == 200)
    assert [json.loads(line)["n"] for line in keeper.lines()] == list(range(200))


def test_threads_are_served_first_come_first_served(scene: Scene) -> None:
    keeper = scene.keeper("ours")
    keeper.process.stop()
    writer = BlockingRpcWriter(scene.folder, policy=PATIENT)
    lanes = writer._desk.lanes._lanes

    def waiting(count: int) -> bool:
        return SID in lanes and len(lanes[SID].turns) == count

    with ThreadPoolExecutor(20) as pool:
        deliveries = []
        for n in range(20):
            deliveries.append(pool.submit(writer.write, SID, {"n": n}))
            until(partial(waiting, n + 1))
        keeper.process.go_on()
        assert all(delivery.result().delivered for delivery in deliveries)
    until(lambda: len(keeper.lines()) == 20)
    assert [json.loads(line)["n"] for line in keeper.lines()] == list(range(20))
    assert not lanes


def test_sessions_do_not_wait_for_each_other(scene: Scene) -> None:
    scene.keeper("ours").process.stop()
    other = scene.keeper("ours", sid="other")

    async def run() -> None:
        writer = RpcWriter(scene.folder, policy=PATIENT)
        stuck = asyncio.create_task(writer.write(SID, SMALL))
        await moment(scene, RECEIPT)
        assert (await writer.write("other", SMALL)).delivered
        assert not stuck.done()
        scene.keepers[0].process.go_on()
        assert (await stuck).delivered

    asyncio.run(run())
    until(lambda: len(other.lines()) == 1)


def test_a_write_that_waits_for_another_keeps_its_own_bound(scene: Scene) -> None:
    scene.keeper("ours").process.stop()

    async def run() -> None:
        writer = RpcWriter(scene.folder, policy=PATIENT)
        first = asyncio.create_task(writer.write(SID, {"n": 1}))
        second = asyncio.create_task(writer.write(SID, {"n": 2}, timeout=0.05))
        third = asyncio.create_task(writer.write(SID, {"n": 3}))
        delivery = await second
        assert (delivery.outcome, delivery.reason) == (N, Reason.TIMED_OUT_BEFORE)
        assert delivery.attempts == ()
        scene.keepers[0].process.go_on()
        assert (await first).delivered
        assert (await third).delivered

    asyncio.run(run())
    until(lambda: scene.keepers[0].lines() == [b'{"n":1}', b'{"n":3}'])


def test_a_thread_that_waits_for_another_keeps_its_own_bound(scene: Scene) -> None:
    scene.keeper("ours").process.stop()
    writer = BlockingRpcWriter(scene.folder, policy=PATIENT)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(writer.write, SID, SMALL)
        until(lambda: SID in writer._desk.lanes._lanes)
        delivery = writer.write(SID, SMALL, timeout=0.05)
        assert (delivery.outcome, delivery.reason) == (N, Reason.TIMED_OUT_BEFORE)
        scene.keepers[0].process.go_on()
        assert first.result().delivered


@pytest.mark.parametrize("kind", KINDS)
def test_writes_keep_their_order_with_an_open_stream(scene: Scene, kind: str) -> None:
    keeper = scene.keeper(kind)

    async def run() -> None:
        writer = RpcWriter(scene.folder, policy=PATIENT)
        async with writer.stream(SID) as one, writer.stream(SID) as two:
            for n in range(0, 150, 3):
                await one.send({"n": n, "pad": "p" * 40_000})
                await two.send({"n": n + 1})
                assert (await writer.write(SID, {"n": n + 2})).delivered
        assert len(writer._desk.lanes) == 0

    asyncio.run(run())
    until(lambda: len(keeper.lines()) == 150)
    assert [json.loads(line)["n"] for line in keeper.lines()] == list(range(150))


def test_a_write_does_not_overtake_what_a_stream_has_not_got_rid_of(scene: Scene) -> None:
    keeper = scene.keeper("ours")
    writer = BlockingRpcWriter(scene.folder, policy=HASTY)
    with contextlib.ExitStack() as left:
        left.enter_context(pytest.raises(StreamBrokenError))
        stream = left.enter_context(writer.stream(SID))
        keeper.process.stop()
        stream.send({"n": 1})
        delivery = writer.write(SID, {"n": 2})
        assert (delivery.outcome, delivery.reason) == (N, Reason.TIMED_OUT_BEFORE)
        assert len(delivery.attempts) == 3
    keeper.process.go_on()
    until(lambda: keeper.lines() == [b'{"n":1}'])


def test_threads_and_loops_share_a_lane(scene: Scene) -> None:
    keeper = scene.keeper("ours")
    writer = RpcWriter(scene.folder, policy=PATIENT)

    def loop(caller: int) -> list[Delivery]:
        async def run() -> list[Delivery]:
            return await asyncio.gather(
                *(writer.write(SID, {"c": caller, "n": n}) for n in range(50))
            )

        return asyncio.run(run())

    with ThreadPoolExecutor(4) as pool:
        assert all(each.delivered for done in pool.map(loop, range(4)) for each in done)
    until(lambda: len(keeper.lines()) == 200)
    read = [json.loads(line) for line in keeper.lines()]
    for caller in range(4):
        assert [line["n"] for line in read if line["c"] == caller] == list(range(50))


def test_a_turn_of_a_loop_that_is_gone_passes_on() -> None:
    lanes = Lanes()

    def gone() -> None:
        raise RuntimeError("Event loop is closed")

    woken: list[int] = []
    with contextlib.ExitStack() as others:
        with lanes.turn(SID) as first:
            second, third = (others.enter_context(lanes.turn(SID)) for _ in range(2))
            assert (first.granted, second.granted) == (True, False)
            assert not second.granted_or(gone)
            assert not third.granted_or(lambda: woken.append(3))
        assert woken == [3]
        assert third.granted
    assert len(lanes) == 0


# -- Cancellation -----------------------------------------------------------------------


@pytest.mark.parametrize("message", [SMALL, BIG], ids=["waiting-for-the-receipt", "within-a-line"])
def test_a_cancelled_write_closes_its_connection(scene: Scene, message: Message) -> None:
    keeper = scene.keeper("ours")
    keeper.process.stop()

    async def run() -> None:
        writer = RpcWriter(scene.folder, policy=PATIENT)
        before = len(open_descriptors())
        task = asyncio.create_task(writer.write(SID, message))
        waits = SENDING if message is BIG else RECEIPT
        await moment(scene, waits)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(open_descriptors()) == before
        assert len(writer._desk.lanes) == 0
        keeper.process.go_on()
        assert (await writer.write(SID, {"n": 2})).delivered

    asyncio.run(run())
    until(lambda: keeper.lines()[-1:] == [b'{"n":2}'])
    assert keeper.lines()[:-1] in ([], [encode(message)[:-1]])


def test_a_write_cancelled_before_its_turn_does_not_hold_up_the_next(scene: Scene) -> None:
    scene.keeper("ours").process.stop()

    async def run() -> None:
        writer = RpcWriter(scene.folder, policy=PATIENT)
        tasks = [asyncio.create_task(writer.write(SID, {"n": n})) for n in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        scene.keepers[0].process.go_on()
        assert (await tasks[0]).delivered
        assert (await tasks[2]).delivered
        assert len(writer._desk.lanes) == 0

    asyncio.run(run())
    until(lambda: scene.keepers[0].lines() == [b'{"n":0}', b'{"n":2}'])


def test_a_stream_whose_closing_is_cancelled_is_abandoned(scene: Scene) -> None:
    keeper = scene.keeper("ours")
    keeper.process.stop()

    async def closing(writer: RpcWriter) -> None:
        async with writer.stream(SID) as stream:
            await stream.send({"n": 1})

    async def run() -> None:
        writer = RpcWriter(scene.folder, policy=PATIENT)
        before = len(open_descriptors())
        task = asyncio.create_task(closing(writer))
        await moment(scene, RECEIPT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(open_descriptors()) == before
        assert len(writer._desk.lanes) == 0

    asyncio.run(run())
    keeper.process.go_on()


def test_a_stream_whose_closing_is_interrupted_is_abandoned(scene: Scene) -> None:
    keeper = scene.keeper("ours")
    keeper.process.stop()
    writer = BlockingRpcWriter(scene.folder, policy=PATIENT)
    before = len(open_descriptors())

    def interrupt() -> None:
        raise KeyboardInterrupt

    scene.at(RECEIPT, interrupt)
    with pytest.raises(KeyboardInterrupt), writer.stream(SID):
        pass
    assert len(open_descriptors()) == before
    assert len(writer._desk.lanes) == 0
    keeper.process.go_on()


def test_who_has_patience_for_centuries_can_wait(scene: Scene) -> None:
    keeper = scene.keeper("ours")
    keeper.process.stop()
    scene.at(RECEIPT, keeper.process.go_on)
    writer = BlockingRpcWriter(scene.folder, policy=WritePolicy(progress_timeout=1e10))
    assert writer.write(SID, {"n": 1}).delivered


FORKED = """
import importlib.abc, os, pathlib, signal, sys, threading, time
from reconciler.sync import RpcWriter

writer, loading = RpcWriter(pathlib.Path(sys.argv[1])), threading.Event()

class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "tenacity" and threading.current_thread() is not threading.main_thread():
            loading.set()
            time.sleep(0.1)  # that the fork falls into, if it does not wait

sys.meta_path.insert(0, Slow())
other = threading.Thread(target=writer.write, args=("none", "{}"))
other.start()
loading.wait()
if os.fork() == 0:
    signal.alarm(30)
    os._exit(0 if writer.write("none", "{}").reason.value == "no_socket" else 1)
other.join()
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_child_forked_while_a_thread_loads_what_tries_again_does_not_hang(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_forked_child_waits_for_no_thread_of_its_parent(scene: Scene) -> None:
    scene.fake(Behaviour.RECEIPT)
    writer = BlockingRpcWriter(scene.folder)
    lanes = writer._desk.lanes
    with lanes.turn(SID), lanes._lock:  # as another thread may hold both when it is forked
        child = os.fork()
        if child == 0:
            signal.alarm(int(WAIT))  # ends it, should it wait all the same
            os._exit(not writer.write(SID, {"n": 1}, timeout=5).delivered)
    assert os.waitpid(child, 0)[1] == 0


def test_a_send_cancelled_before_its_turn_was_never_sent(scene: Scene) -> None:
    keeper = scene.fake(Behaviour.RECEIPT)

    async def run() -> None:
        writer = RpcWriter(scene.folder)
        async with writer.stream(SID) as stream:
            await stream.send({"n": 1})
            with writer._desk.lanes.turn(SID):
                task = asyncio.create_task(stream.send({"n": 2}))
                await moment(scene, Moment.TURN)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await stream.send({"n": 3})
        assert stream.delivery is not None
        assert stream.delivery.outcomes == (D, D)

    asyncio.run(run())
    assert keeper.received == (b'{"n":1}', b'{"n":3}')


def test_a_send_cancelled_with_nothing_handed_over_was_never_sent(scene: Scene) -> None:
    keeper = scene.keeper("ours")
    keeper.process.stop()

    async def run() -> None:
        writer = RpcWriter(scene.folder, policy=PATIENT)
        async with writer.stream(SID) as stream:

            async def fill() -> None:
                for n in itertools.count():
                    sending.append(n)
                    await stream.send({"n": n, "pad": "p" * 4000})

            sending: list[int] = []
            task = asyncio.create_task(fill())
            await moment(scene, SENDING)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            keeper.process.go_on()
            await stream.send({"n": -1})
        assert stream.delivery is not None
        assert stream.delivery.outcomes == (D,) * len(sending)
        until(lambda: len(keeper.lines()) == len(sending))
        assert [json.loads(line)["n"] for line in keeper.lines()] == [*sending[:-1], -1]

    asyncio.run(run())


def test_a_send_that_has_no_time_ends_its_stream(scene: Scene) -> None:
    keeper = scene.fake(Behaviour.RECEIPT)
    writer = BlockingRpcWriter(scene.folder)
    stream = writer.stream(SID)
    with contextlib.ExitStack() as left:
        caught = left.enter_context(pytest.raises(StreamBrokenError))
        left.enter_context(stream)
        stream.send({"n": 1})
        left.enter_context(writer._desk.lanes.turn(SID))
        stream.send({"n": 2}, timeout=0.02)
    assert caught.value.delivery.reason is Reason.TIMED_OUT_BEFORE
    assert caught.value.delivery.outcomes == (U, N)
    assert keeper.wait_received(1) == (b'{"n":1}',)


def test_a_send_cancelled_within_a_line_ends_its_stream(scene: Scene) -> None:
    scene.keeper("ours").process.stop()

    async def run() -> None:
        writer = RpcWriter(scene.folder, policy=PATIENT)
        before = len(open_descriptors())
        stream = writer.stream(SID)
        with contextlib.suppress(asyncio.CancelledError):
            async with stream:
                task = asyncio.create_task(stream.send(BIG))
                await moment(scene, SENDING)
                task.cancel()
                await task
        assert stream.delivery is not None
        assert (stream.delivery.outcome, stream.delivery.reason) == (U, Reason.ABANDONED)
        with pytest.raises(StreamBrokenError):
            await stream.send({"n": 2})
        assert len(open_descriptors()) == before
        assert len(writer._desk.lanes) == 0

    asyncio.run(run())


def test_a_stream_left_while_another_task_sends(scene: Scene) -> None:
    scene.keeper("ours").process.stop()

    async def run() -> None:
        writer = RpcWriter(scene.folder, policy=PATIENT)
        before = len(open_descriptors())
        stream = writer.stream(SID)
        with contextlib.suppress(KeyError):
            async with stream:
                task = asyncio.create_task(stream.send(BIG))
                await moment(scene, SENDING)
                behind = asyncio.create_task(stream.send(SMALL))
                await moment(scene, Moment.TURN)
                raise KeyError
        assert stream.delivery is not None
        assert (stream.delivery.outcome, stream.delivery.unsent) == (U, 0)
        for send in (task, behind):
            with pytest.raises(StreamBrokenError):
                await send
        assert len(open_descriptors()) == before
        assert len(writer._desk.lanes) == 0

    asyncio.run(run())


# -- Whatever happens -------------------------------------------------------------------


def killed_and_replaced(scene: Scene, kind: str) -> None:
    scene.keepers[-1].process.kill()
    for role in layout.CLAIM:
        scene.path(role).unlink(missing_ok=True)
    scene.keeper(kind, "--survive")


def paused(scene: Scene, _: str) -> None:
    scene.keepers[-1].process.stop()
    scene.keepers[-1].process.go_on()


def agent_paused(scene: Scene, _: str) -> None:
    scene.keepers[-1].agent.stop()
    scene.keepers[-1].agent.go_on()


BREAKS: dict[str, Callable[[Scene, str], None]] = {
    "killed": lambda scene, _: scene.keepers[-1].process.kill(),
    "replaced": killed_and_replaced,
    "paused": paused,
    "agent paused": agent_paused,
}


@dataclass(frozen=True)
class History:
    """Callers with the sizes of their messages, and what happens after so many waits."""

    callers: list[list[int]]
    breaks: list[tuple[int, str]]


def histories(largest: int) -> st.SearchStrategy[History]:
    sizes = st.one_of(st.integers(0, 100), st.integers(0, largest))
    return st.builds(
        History,
        callers=st.lists(st.lists(sizes, min_size=1, max_size=6), min_size=1, max_size=4),
        breaks=st.lists(st.tuples(st.integers(0, 12), st.sampled_from(sorted(BREAKS))), max_size=3),
    )


def play(scene: Scene, history: History, kind: str, face: str) -> dict[tuple[int, int], Outcome]:
    """Let all callers write at once, each one message after the other."""
    scene.keeper(kind, "--survive")
    due = collections.deque(sorted(history.breaks))
    waits = itertools.count()
    busy = threading.Lock()

    def on_wait() -> None:
        with busy:
            count = next(waits)
            while due and due[0][0] <= count:
                BREAKS[due.popleft()[1]](scene, kind)

    scene.every_wait = on_wait
    policy = WritePolicy(progress_timeout=5.0, backoff=(0.0,))
    outcomes: dict[tuple[int, int], Outcome] = {}

    def blocking(caller: int, writer: BlockingRpcWriter) -> None:
        for number, size in enumerate(history.callers[caller]):
            delivery = writer.write(SID, {"c": caller, "n": number, "pad": "p" * size})
            outcomes[caller, number] = delivery.outcome

    async def asynchronous(caller: int, writer: RpcWriter) -> None:
        for number, size in enumerate(history.callers[caller]):
            delivery = await writer.write(SID, {"c": caller, "n": number, "pad": "p" * size})
            outcomes[caller, number] = delivery.outcome

    async def all_at_once() -> None:
        writer = RpcWriter(scene.folder, policy=policy)
        await asyncio.gather(*(asynchronous(caller, writer) for caller in callers))

    callers = range(len(history.callers))
    if face == "async":
        asyncio.run(all_at_once())
    else:
        writer = BlockingRpcWriter(scene.folder, policy=policy)
        with ThreadPoolExecutor(len(callers)) as pool:
            list(pool.map(blocking, callers, itertools.repeat(writer)))
    return outcomes


def read_in_the_end(scene: Scene) -> list[tuple[int, int]]:
    """What the agents have read once their keepers are gone and their pipes are empty."""
    read = []
    for keeper in scene.keepers:
        keeper.process.kill()
        keeper.agent.wait()
        for line in keeper.lines():
            message = json.loads(line)
            assert set(message) == {"c", "n", "pad"}
            read.append((message["c"], message["n"]))
    return read


@pytest.mark.parametrize("played", FACES)
@pytest.mark.parametrize(("kind", "largest"), [("ours", 300_000), ("node", 2_000)])
def test_whatever_happens(scene: Scene, kind: str, largest: int, played: str) -> None:
    """Node's memory is lost with it: there the messages fit into the agent's pipe."""

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(histories(largest))
    def holds(history: History) -> None:
        outer, scene.keepers = scene.stack, []
        try:
            with contextlib.ExitStack() as stack:
                scene.stack = stack
                for role in layout.CLAIM:
                    scene.path(role).unlink(missing_ok=True)
                outcomes = play(scene, history, kind, played)
                check(outcomes, read_in_the_end(scene))
        finally:
            scene.stack = outer

    holds()


def check(outcomes: dict[tuple[int, int], Outcome], read: list[tuple[int, int]]) -> None:
    """The promise, for the messages (caller, number) that agents have read."""
    assert len(set(read)) == len(read), "a message arrived twice"
    assert set(read) <= set(outcomes)
    assert {which for which, outcome in outcomes.items() if outcome is D} <= set(read)
    assert not {which for which, outcome in outcomes.items() if outcome is N} & set(read)
    for caller, _ in outcomes:
        numbers = [number for which, number in read if which == caller]
        assert numbers == sorted(numbers), "a caller's messages changed their order"
