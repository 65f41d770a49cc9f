"""A keeper that a test starts by hand, by path, and what is asked about it."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SOURCE = HERE.parent / "reconciler" / "keeper_process.py"
PROGRAM = SOURCE.parent / "launcher" / SOURCE.name
PYTHON = [sys.executable, "-I", "-S"]
AGENTS = HERE / "agents"
SID = "8c2c7f0e-2a4b-4c57-9d63-3f6f3f1f2a10"
MIB = 1024 * 1024

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")


def holds(condition: Callable[[], object]) -> bool:
    """Whether a condition holds; what is asked of a file that is not there yet does not."""
    try:
        return bool(condition())
    except FileNotFoundError:
        return False


def until(happened: Callable[[], object], seconds: float = 20) -> None:
    """Wait for a moment that can be named, no longer than the bound."""
    give_up = time.monotonic() + seconds
    while not holds(happened):
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.002)


class Session:
    """A keeper under test, in a folder of its own, and what is asked about it."""

    def __init__(self, folder: Path, sid: str = SID) -> None:
        self.folder = folder
        self.sid = sid
        self.socket = folder / f"{sid}.rpc.sock"
        self.pid_file = folder / f"{sid}.rpc.sock.pid"
        self.agent_file = folder / f"{sid}.rpc.sock.pi-pid"
        self.log = folder / f"keeper-{sid}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._everyone: list[subprocess.Popen[bytes]] = []
        self._notices: dict[int, bytes] = {}
        self._notice = -1

    def start(
        self,
        agent: list[str],
        *,
        wait: str = "ready",
        prepare: str = "",
        arguments: list[str] | None = None,
        cwd: Path | None = None,
        pass_fds: tuple[int, ...] = (),
        **environment: str,
    ) -> subprocess.Popen[bytes]:
        notice, write = os.pipe()
        known = {
            "PI_KEEPER_SESSIONS_DIR": str(self.folder),
            "PI_KEEPER_PI_CMD": json.dumps(agent),
            "PI_KEEPER_PI_ARGS": "[]",
            "PI_KEEPER_NOTIFY_FD": str(write),
        }
        last = "; os.execv(sys.argv[1], sys.argv[1:])"
        before = [*PYTHON, "-c", f"import os, signal, sys; {prepare}{last}"] if prepare else []
        process = subprocess.Popen(
            [*before, *PYTHON, str(PROGRAM), *([self.sid] if arguments is None else arguments)],
            env=os.environ | known | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(write, *pass_fds),
            cwd=cwd,
        )
        os.close(write)
        self._everyone.append(process)
        self._notices[notice] = b""
        self.process, self._notice = process, notice
        if wait:
            assert self.told()["event"] == "listening"
        if wait == "ready":
            assert self.told()["event"] == "ready"
        return process

    def told(self, seconds: float = 20) -> dict[str, Any]:
        """The next line that the keeper sent to whoever started it."""
        fd = self._notice
        while b"\n" not in self._notices[fd]:
            assert select.select([fd], [], [], seconds)[0], "nothing was told"
            said = os.read(fd, 4096)
            assert said, "the keeper told no more"
            self._notices[fd] += said
        line, _, self._notices[fd] = self._notices[fd].partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        return told

    def agent_pid(self) -> int:
        return int(self.agent_file.read_text())

    def connect(self, *, send_buffer: int = 0) -> socket.socket:
        """Connect by way of a descriptor: the path may be too long for a socket's name."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(30)
        if send_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        fd = os.open(self.socket, os.O_PATH | os.O_NOFOLLOW)
        try:
            client.connect(f"/proc/self/fd/{fd}")
        except BaseException:
            client.close()
            raise
        finally:
            os.close(fd)
        return client

    def send(self, data: bytes) -> bool:
        """Send it all, shut, and say whether the receipt came."""
        with self.connect() as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            return receipt(client)

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def events(self) -> list[str]:
        return [line["event"] for line in self.log_lines()]

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.wait()

    def wait(self, seconds: float = 20) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def stderr(self) -> str:
        assert self.process is not None
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def close(self) -> None:
        for process in self._everyone:
            if process.poll() is None:
                process.kill()
            process.wait(20)
            assert process.stderr is not None
            process.stderr.close()
        for fd in self._notices:
            os.close(fd)


def receipt(client: socket.socket) -> bool:
    """True for the end of the stream, False for a reset."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return False


def into(path: Path) -> list[str]:
    return ["/bin/sh", "-c", f"exec cat > {shlex.quote(str(path))}"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def memory(pid: int, key: str = "VmRSS") -> int:
    """Bytes, by /proc/<pid>/status."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) * 1024


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    made = Session(tmp_path / "sessions")
    yield made
    made.close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
