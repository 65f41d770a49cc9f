"""What a benchmark is, and the processes that several of them need."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from reconciler.layout import KEEPER_PROGRAM

NODE_KEEPER = Path(__file__).parent.parent / "tests" / "keepers" / "keeper.cjs"
"""A keeper in Node that does what the dashboard's does: the peer of ours."""

SINK = '["cat"]'
"""The agent of the keepers that are measured: it reads and says nothing."""

Times = list[float]


@dataclass(frozen=True)
class Benchmark:
    """One figure: ``measure(rounds)`` gives our values and the peer's, taken in turns."""

    name: str
    goal: float
    unit: str
    measure: Callable[[int], tuple[Times, Times]]
    rounds: int
    quick: int


def start_keeper(folder: Path, sid: str, *, ours: bool) -> subprocess.Popen[bytes]:
    """Start one keeper. It is not waited for."""
    env = {**os.environ, "PI_KEEPER_PI_CMD": SINK, "PI_KEEPER_PI_ARGS": "[]"}
    env["PI_DASHBOARD_HOME"] = str(folder.parent.parent.parent)
    command = (
        [sys.executable, "-I", "-S", str(KEEPER_PROGRAM)] if ours else ["node", str(NODE_KEEPER)]
    )
    return subprocess.Popen(
        [*command, sid],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Spin, so that the wait itself adds next to nothing; an error when it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s in vain")
        time.sleep(0.0002)


def accepts(path: Path) -> bool:
    """Whether a socket accepts connections."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@contextlib.contextmanager
def killed_at_the_end(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """End what was started, by pid."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
