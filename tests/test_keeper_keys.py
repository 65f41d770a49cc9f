"""Lines with keys: sent again they are acknowledged again, and forwarded once."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
from pathlib import Path

import pytest
from raw_keeper import Session, into, receipt, until


def keyed(key: bytes, line: bytes) -> bytes:
    return b"\x01" + key + b"\x01" + line + b"\n"


def lines(out: Path) -> list[bytes]:
    return out.read_bytes().splitlines() if out.exists() else []


def start(session: Session, out: Path) -> None:
    session.start(into(out))


def test_a_client_can_ask_the_kernel_whether_keys_are_understood(
    session: Session, out: Path
) -> None:
    start(session, out)
    with session.connect() as client:
        assert client.getpeername() == f".//{session.socket.name}"


def test_the_sign_is_there_after_binding_again(session: Session, out: Path) -> None:
    process = session.start(into(out))
    session.socket.unlink()
    os.kill(process.pid, signal.SIGHUP)
    until(lambda: "keeper.rebound" in session.events())
    with session.connect() as client:
        assert client.getpeername() == f".//{session.socket.name}"


def test_same_key_is_forwarded_once_and_acknowledged_each_time(session: Session, out: Path) -> None:
    start(session, out)
    assert session.send(keyed(b"a", b"first"))
    assert session.send(keyed(b"a", b"first"))
    assert session.send(keyed(b"b", b"second") + keyed(b"a", b"first") + keyed(b"c", b"third"))
    until(lambda: lines(out) == [b"first", b"second", b"third"])


def test_long_line_with_a_known_key_is_taken_and_dropped(session: Session, out: Path) -> None:
    start(session, out)
    long = b"x" * (3 * 1024 * 1024)
    assert session.send(keyed(b"long", long))
    assert session.send(keyed(b"long", long) + keyed(b"next", b"after"))
    until(lambda: [len(line) for line in lines(out)] == [len(long), 5])


@pytest.mark.parametrize(
    "pieces",
    [
        (b"\x01", b"k", b"\x01", b"li", b"ne", b"\n"),
        (b"\x01k\x01", b"line\n"),
        (b"\x01k\x01line", b"\n"),
    ],
)
def test_key_and_line_may_come_in_pieces(
    session: Session, out: Path, pieces: tuple[bytes, ...]
) -> None:
    start(session, out)
    with session.connect() as client:
        for piece in pieces:
            client.sendall(piece)
            until(lambda: session.agent_pid() > 0)
        client.shutdown(socket.SHUT_WR)
        assert receipt(client)
    until(lambda: lines(out) == [b"line"])


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"\x01", id="mark alone"),
        pytest.param(b"\x01key", id="key without end"),
        pytest.param(b"\x01key\x01", id="key without a line"),
        pytest.param(b"\x01key\x01half", id="line without its end"),
        pytest.param(b'\x01key\x01{"whole":"json"}', id="JSON without LF"),
        pytest.param(b"\x01\x01line\n", id="empty key"),
        pytest.param(b"\x01" + b"k" * 129 + b"\x01line\n", id="key too long"),
        pytest.param(b"\x01key\x01good\nbad\n", id="second line without a key"),
    ],
)
def test_what_is_no_key_and_line_gets_no_receipt(session: Session, out: Path, sent: bytes) -> None:
    start(session, out)
    assert not session.send(sent)
    assert session.send(keyed(b"last", b"last"))
    until(lambda: lines(out)[-1:] == [b"last"])
    assert set(lines(out)) <= {b"good", b"last"}


def test_longest_key(session: Session, out: Path) -> None:
    start(session, out)
    for _ in range(2):
        assert session.send(keyed(b"k" * 128, b"line"))
    assert session.send(b"end\n")
    until(lambda: lines(out) == [b"line", b"end"])


def test_other_clients_see_no_difference(session: Session, out: Path) -> None:
    start(session, out)
    assert session.send(keyed(b"a", b"first"))
    assert session.send(b"a\x01b\x01c\nfirst\n")
    until(lambda: lines(out) == [b"first", b"a\x01b\x01c", b"first"])


def test_the_newest_1024_keys_are_remembered(session: Session, out: Path) -> None:
    start(session, out)
    for first in range(0, 1100, 100):
        many = (keyed(b"%d" % n, b"%d" % n) for n in range(first, first + 100))
        assert session.send(b"".join(many))
    assert session.send(keyed(b"1099", b"known"))
    assert session.send(keyed(b"76", b"known"))
    assert session.send(keyed(b"0", b"forgotten"))
    until(lambda: lines(out) == [*(b"%d" % n for n in range(1100)), b"forgotten"])


def test_line_broken_off_is_not_remembered(session: Session, out: Path) -> None:
    start(session, out)
    assert not session.send(keyed(b"k", b"half")[:-1])
    assert session.send(keyed(b"k", b"whole"))
    until(lambda: lines(out) == [b"whole"])


def test_many_clients_with_the_same_keys_while_the_agent_stops_and_goes(
    session: Session, out: Path
) -> None:
    start(session, out)
    agent = session.agent_pid()
    chance = random.Random(7)
    keys = [b"%03d" % n for n in range(60)]
    orders = [chance.sample(keys, len(keys)) for _ in range(8)]
    receipts: list[bool] = []

    def send(order: list[bytes]) -> None:
        receipts.extend(session.send(keyed(key, key * 4000)) for key in order)

    os.kill(agent, signal.SIGSTOP)
    clients = [threading.Thread(target=send, args=(order,)) for order in orders]
    for client in clients:
        client.start()
    os.kill(agent, signal.SIGCONT)
    for client in clients:
        client.join(60)
    assert receipts == [True] * (len(keys) * len(orders))
    until(lambda: len(lines(out)) >= len(keys))
    assert sorted(lines(out)) == [key * 4000 for key in keys]
