from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import WAIT, open_descriptors

from reconciler import layout
from reconciler.rpc_writer import (
    BlockingRpcWriter,
    Outcome,
    Reason,
    StreamBrokenError,
    WritePolicy,
)
from reconciler.testing import Behaviour, FakeKeeper, no_waiting

SID = "fake-1"
QUICK = WritePolicy(progress_timeout=0.05, backoff=(0.001,))
PATIENT = WritePolicy(progress_timeout=10.0)


def connect(keeper: FakeKeeper) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10.0)
    try:
        client.connect(str(keeper.socket_path))
    except OSError:
        client.close()
        raise
    return client


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def descriptors() -> Iterator[None]:
    before = len(open_descriptors())
    threads = threading.active_count()
    yield
    assert len(open_descriptors()) == before
    assert threading.active_count() == threads


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("behaviour", Behaviour)
def test_leaves_nothing_behind(tmp_path: Path, behaviour: Behaviour) -> None:
    folder = tmp_path / "made" / "when it is not there"
    with FakeKeeper(folder, SID, behaviour, after=3) as keeper:
        assert stat.S_ISSOCK(keeper.socket_path.stat().st_mode)
        assert keeper.pid_path.read_text() == str(keeper.pid)
        assert entries(folder) == {f"{SID}.rpc.sock", f"{SID}.rpc.sock.pid"}
        assert (keeper.pid == os.getpid()) is (behaviour is not Behaviour.DIE)
    assert entries(folder) == set()


@pytest.mark.parametrize(
    ("behaviour", "after", "outcome", "reason"),
    [
        (Behaviour.RECEIPT, 0, Outcome.DELIVERED, Reason.HANDED_ON),
        (Behaviour.REFUSE, 0, Outcome.NOT_DELIVERED, Reason.REFUSED),
        (Behaviour.NO_ACCEPT, 0, Outcome.NOT_DELIVERED, Reason.BACKLOG_FULL),
        (Behaviour.STALL, 0, Outcome.UNCONFIRMED, Reason.TIMED_OUT_AFTER),
        (Behaviour.STALL, 4, Outcome.UNCONFIRMED, Reason.TIMED_OUT_AFTER),
        (Behaviour.RESET, 0, Outcome.UNCONFIRMED, Reason.BROKEN),
        (Behaviour.RESET, 4, Outcome.UNCONFIRMED, Reason.BROKEN),
        (Behaviour.CLOSE, 4, Outcome.UNCONFIRMED, Reason.BROKEN),
        (Behaviour.DIE, 0, Outcome.UNCONFIRMED, Reason.KEEPER_DIED),
        (Behaviour.DIE, 4, Outcome.UNCONFIRMED, Reason.KEEPER_DIED),
    ],
)
def test_what_a_writer_makes_of_it(
    tmp_path: Path, behaviour: Behaviour, after: int, outcome: Outcome, reason: Reason
) -> None:
    hasty = behaviour in {Behaviour.STALL, Behaviour.NO_ACCEPT}
    with FakeKeeper(tmp_path, SID, behaviour, after=after), no_waiting():
        writer = BlockingRpcWriter(tmp_path, policy=QUICK if hasty else PATIENT)
        delivery = writer.write(SID, {"type": "prompt"})
    assert (delivery.outcome, delivery.reason) == (outcome, reason)


def test_lines_of_many_connections(tmp_path: Path) -> None:
    with FakeKeeper(tmp_path, SID) as keeper:
        with connect(keeper) as one, connect(keeper) as two:
            one.sendall(b"a\nb\nun")
            assert keeper.wait_received(2) == (b"a", b"b")
            two.sendall(b"c\n")
            assert keeper.wait_received(3) == (b"a", b"b", b"c")
            one.sendall(b"finished")
        assert keeper.wait_received(4) == (b"a", b"b", b"c", b"unfinished")
        assert keeper.received == (b"a", b"b", b"c", b"unfinished")
        with pytest.raises(TimeoutError, match="4 of 5 lines"):
            keeper.wait_received(5, timeout=0.01)


def test_close_is_an_end_of_stream_where_all_was_read(tmp_path: Path) -> None:
    with FakeKeeper(tmp_path, SID, Behaviour.CLOSE, after=4) as keeper:
        with connect(keeper) as client:
            client.sendall(b"abc\n")
            assert client.recv(1) == b""
        assert keeper.received == (b"abc",)
        with contextlib.ExitStack() as left:
            left.enter_context(pytest.raises(StreamBrokenError))
            stream = left.enter_context(BlockingRpcWriter(tmp_path).stream(SID))
            stream.send("abc")
            keeper.wait_received(2)
            stream.send("never arrives")
        assert keeper.wait_received(2) == (b"abc", b"abc")


def test_close_at_once(tmp_path: Path) -> None:
    with FakeKeeper(tmp_path, SID, Behaviour.CLOSE) as keeper, connect(keeper) as client:
        assert client.recv(1) == b""


@pytest.mark.parametrize("after", [0, 2])
def test_reset(tmp_path: Path, after: int) -> None:
    with FakeKeeper(tmp_path, SID, Behaviour.RESET, after=after) as keeper:
        with connect(keeper) as client:
            client.sendall(b"abc")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        with connect(keeper) as client:
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""


def test_a_keeper_that_dies_tells_what_it_read(tmp_path: Path) -> None:
    with FakeKeeper(tmp_path, SID, Behaviour.DIE, after=8) as keeper:
        with connect(keeper) as client:
            client.sendall(b"a\n")
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        with connect(keeper) as client:
            client.sendall(b"b\nc\ndefgh")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert keeper.wait_received(3) == (b"a", b"b", b"c")
        os.waitid(os.P_PID, keeper.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ConnectionRefusedError):
            connect(keeper)


def test_a_client_that_breaks_off(tmp_path: Path) -> None:
    with FakeKeeper(tmp_path, SID, Behaviour.DIE) as keeper:
        connect(keeper).close()
        with connect(keeper) as client:
            client.sendall(b"x")
            with pytest.raises(ConnectionResetError):
                client.recv(1)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("behaviour", [b for b in Behaviour if b is not Behaviour.REFUSE])
def test_keys_can_be_shown(tmp_path: Path, behaviour: Behaviour) -> None:
    folder = tmp_path / ("long" * 40)
    with FakeKeeper(folder, SID, behaviour, after=200, keys=True) as keeper:
        names = []
        if behaviour is not Behaviour.NO_ACCEPT:
            at = os.open(folder, os.O_PATH)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"/proc/self/fd/{at}/{keeper.socket_path.name}")
                names.append(client.getpeername())
            os.close(at)
        assert names in ([], [f".//{SID}.rpc.sock"])
        assert entries(folder) == {f"{SID}.rpc.sock", f"{SID}.rpc.sock.pid"}
    assert entries(folder) == set()


def test_a_line_with_a_known_key_is_taken_and_forgotten(tmp_path: Path) -> None:
    with FakeKeeper(tmp_path, SID, keys=True) as keeper:
        writer = BlockingRpcWriter(tmp_path, policy=PATIENT)
        for key in ("a", "a", "b"):
            assert writer.write(SID, "x", key=key).delivered
        assert writer.write(SID, "x").delivered
        assert keeper.received == (b"x", b"x", b"x")
        with connect(keeper) as client:
            client.sendall(b"\x01c\x01broken off")
        assert writer.write(SID, "last", key="c").delivered
        assert keeper.wait_received(4) == (b"x", b"x", b"x", b"last")


def test_a_keeper_that_shows_keys_and_dies(tmp_path: Path) -> None:
    line = b"\x01k\x01abc\n"
    with FakeKeeper(tmp_path, SID, Behaviour.DIE, after=len(line) + 3, keys=True) as keeper:
        writer = BlockingRpcWriter(tmp_path, policy=PATIENT)
        assert writer.write(SID, "abc", key="k").reason is Reason.HANDED_ON
        delivery = writer.write(SID, "abcdefgh", key="l")
        assert (delivery.outcome, delivery.reason) == (Outcome.UNCONFIRMED, Reason.KEEPER_DIED)
        assert keeper.wait_received(1) == (b"abc",)


def test_without_keys_none_are_shown(tmp_path: Path) -> None:
    with FakeKeeper(tmp_path, SID) as keeper:
        delivery = BlockingRpcWriter(tmp_path).write(SID, "x", key="k")
        assert (delivery.outcome, delivery.reason) == (Outcome.NOT_DELIVERED, Reason.NO_KEYS)
        assert keeper.received == ()


def test_say_pid(tmp_path: Path) -> None:
    with FakeKeeper(tmp_path, SID) as keeper:
        writer = BlockingRpcWriter(tmp_path, policy=PATIENT)
        keeper.say_pid("1")
        assert writer.write(SID, "x").reason is Reason.WRONG_PEER
        keeper.say_pid(None)
        assert writer.write(SID, "x").reason is Reason.NO_PID_FILE
        keeper.say_pid(str(os.getpid()))
        assert writer.write(SID, "x").delivered
        assert keeper.received == (b"x",)


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    with FakeKeeper(tmp_path, SID) as keeper:
        for keys in (False, True):
            with pytest.raises(OSError, match="in use"), FakeKeeper(tmp_path, SID, keys=keys):
                pass
        assert keeper.socket_path.exists()


def test_the_session_id_is_checked(tmp_path: Path) -> None:
    with pytest.raises(layout.InvalidSessionIdError):
        FakeKeeper(tmp_path, "../x")


def test_no_waiting_ends_with_its_block(tmp_path: Path) -> None:
    def apart(pause: float) -> float:
        policy = WritePolicy(attempts=2, backoff=(pause,))
        delivery = BlockingRpcWriter(tmp_path, policy=policy).write(SID, "x", timeout=3 * WAIT)
        one, two = delivery.attempts
        return two.started - one.started

    with no_waiting():
        with no_waiting():
            pass
        assert apart(2 * WAIT) < WAIT
    assert apart(0.05) >= 0.05
