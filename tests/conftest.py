"""What tests share: a sessions folder of their own, keepers in it, and a bound on waiting."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from reconciler.keeper import KeeperManager
from reconciler.layout import KEEPER_PROGRAM
from reconciler.processes import SYSTEM
from reconciler.state import ProcessId, Session

NODE_KEEPER = Path(__file__).with_name("keepers") / "keeper.cjs"
"""A keeper of another make, as the dashboard's behaves."""

SINK = ("sh", "-c", "exec cat > /dev/null")
"""A stand-in agent: it lives until its input ends, or a signal comes."""

WAIT = 20.0
"""Seconds until a test gives up waiting for what must come. A bound, not a pause."""


def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait until a condition holds, WAIT seconds at most."""
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {WAIT:g} s in vain: {what or condition}")
        time.sleep(0.002)


async def soon(awaitable: Awaitable[Session]) -> Session:
    """Await what must come, WAIT seconds at most."""
    return await asyncio.wait_for(awaitable, WAIT)


def alive(pid: int) -> bool:
    """Whether a pid is a process that is not a zombie."""
    return SYSTEM.facts(pid).process is not None


def identity(pid: int) -> ProcessId:
    """The process of a pid that must live."""
    process = SYSTEM.facts(pid).process
    assert process is not None, f"process {pid} is not alive"
    return process


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A sessions folder where the contract wants it, so that any keeper can serve it.

    What still lives of its sessions at the end is killed: by pid, each proven to be a
    keeper of this very folder, or the child of one.
    """
    path = tmp_path / ".pi" / "dashboard" / "sessions"
    path.mkdir(parents=True, mode=0o700)
    yield path
    end_all(path)


def end_all(folder: Path) -> None:
    """Kill the keepers of a test's folder and their agents."""
    if not folder.is_dir():
        return
    status = folder.stat()
    for pid in SYSTEM.pids():
        arguments = SYSTEM.arguments(pid) or ()
        if not any(a.endswith((KEEPER_PROGRAM.name, NODE_KEEPER.name)) for a in arguments):
            continue
        logs = [p.stat() for p in folder.glob("keeper-*.log") if p.is_file() and not p.is_symlink()]
        files = {(s.st_dev, s.st_ino) for s in (status, *logs)}
        if SYSTEM.holds(pid, files):
            for child in (*(SYSTEM.children(pid) or ()), pid):
                try:
                    os.kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    continue


@pytest.fixture
def manager(folder: Path) -> KeeperManager:
    """A manager of the test's folder that starts keepers of ours."""
    return KeeperManager(folder)


@pytest.fixture
def node_manager(folder: Path) -> KeeperManager:
    """A manager of the test's folder that starts keepers of another make."""
    return KeeperManager(folder, keeper_command=("node", str(NODE_KEEPER)))


@pytest.fixture
def innocent() -> Iterator[int]:
    """The pid of a process of our user that is no keeper and must live on."""
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
    until(lambda: SYSTEM.arguments(process.pid), "the innocent process runs")
    yield process.pid
    process.kill()
    process.wait()


def bare_socket(path: Path) -> None:
    """Leave a socket that nobody listens on, as a killed keeper does."""
    code = "import os,socket,sys; os.chdir(sys.argv[1]); socket.socket(1).bind(sys.argv[2])"
    subprocess.run([sys.executable, "-I", "-c", code, path.parent, path.name], check=True)


def dead_pid() -> int:
    """A pid that was a process's of ours a moment ago, and is nobody's now."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def stale_pair(folder: Path, sid: str) -> None:
    """Leave a socket and a pid file, in the order in which a keeper makes them."""
    bare_socket(folder / f"{sid}.rpc.sock")
    (folder / f"{sid}.rpc.sock.pid").write_text(str(dead_pid()))
