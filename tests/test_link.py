from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

from delivery_scene import face as face  # noqa: PLC0414 - fixtures
from delivery_scene import scene as scene  # noqa: PLC0414
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler import link, peers


def test_the_blocking_face_starts_without_what_it_does_not_need() -> None:
    code = (
        "import sys, reconciler.rpc_writer\n"
        "heavy = {'asyncio', 'msgspec', 'structlog', 'psutil', 'watchdog', 'click', 'rich'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_of_a_piece_that_was_sent_alone_it_is_known_when_all_of_it_was_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ledger = link._Ledger()
        ledger.sent_alone(ours.send(b"x" * 8192))
        for size in (8000, 191):
            theirs.recv(size)
            assert not ledger.seen(link._queued(ours))
            assert (ledger.handed, ledger.taken) == (8192, 0)
        theirs.recv(1)
        assert ledger.seen(link._queued(ours))
        assert (ledger.handed, ledger.taken) == (8192, 8192)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.one_of(st.integers(1, 8192), st.integers(-20_000, -1)), max_size=60))
def test_the_ledger_never_says_more_than_was_read(steps: list[int]) -> None:
    """Steps: how much is sent, or (negative) read."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for end in (ours, theirs):
            end.setblocking(False)
        ledger = link._Ledger()
        ends: list[int] = []
        read = 0
        for step in steps:
            with contextlib.suppress(BlockingIOError):
                if step < 0:
                    read += len(theirs.recv(-step))
                else:
                    sent = ours.send(b"x" * step)
                    if step % 2:  # it was read, and nobody looked, before this was entered
                        read += len(theirs.recv(step // 2))
                    ledger.sent(sent, link._queued(ours))
                    ends.append(ledger.handed)
            if step % 3 == 0:
                ledger.seen(link._queued(ours))
            assert ledger.taken in (0, *ends)
            assert ledger.taken <= read
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.recv(1 << 16)
        ledger.seen(link._queued(ours))
        assert ledger.taken == ledger.handed


def test_the_ledger_is_exact_when_everybody_looks() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ledger = link._Ledger()
        for size in (1, 100, 1000, 5000, 8192, 10):
            ours.send(b"x" * size)
            ledger.sent(size, link._queued(ours))
        read = 0
        for size in (1, 100, 1000, 5000, 8192, 10):
            theirs.recv(size)
            read += size
            assert ledger.seen(link._queued(ours))
            assert ledger.taken == read
        assert not ledger.seen(0)


def test_a_dying_process_is_seen_as_such_when_its_connection_ends() -> None:
    code = (
        "import os, socket, sys\n"
        "s = socket.socket(fileno=int(sys.argv[1]))\n"
        "s.send(b'r'); s.recv(1); os.kill(os.getpid(), 9)"
    )
    for _ in range(20):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            assert ours.recv(1) == b"r"
            started = peers._process(child.pid)
            assert started is not None
            peer = peers.Peer(child.pid, started[0], ours=False)
            assert peer.lives()
            ours.send(b"g")
            assert ours.recv(1) == b""
            assert not peer.lives()
            child.wait()
            assert not peer.lives()
            assert peer.written() == 0
