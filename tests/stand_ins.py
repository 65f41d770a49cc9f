"""Processes that stand in for keepers, agents and innocents, where a real one cannot be had.

Each is a context manager: it runs once it is entered, and is killed at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from conftest import NODE_KEEPER, SINK, alive, until

from reconciler.keeper import KeeperManager, SpawnedKeeper
from reconciler.processes import SYSTEM

NOBODY = 65534
"""A user that is not us, when we are root."""

T = TypeVar("T", str, bytes)

WAITS = "print(os.getpid(), flush=True); signal.pause()"

RECORDER = """
import contextlib, os, signal, sys
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
for number in signal.valid_signals():
    with contextlib.suppress(OSError, ValueError):
        signal.signal(number, lambda number, _: os.write(out, b"signal %d\\n" % number))
os.write(out, b"up\\n")
while block := os.read(0, 65536):
    os.write(out, block)
"""
"""Writes down every signal that it gets, and every line that it is sent."""


def recorder(path: Path) -> tuple[str, ...]:
    """A stand-in agent, or an innocent, that writes down in a file what comes to it."""
    return (sys.executable, "-I", "-S", "-c", RECORDER, str(path))


@contextlib.contextmanager
def ending(process: subprocess.Popen[T]) -> Iterator[subprocess.Popen[T]]:
    """A process that is killed at the end, however that comes."""
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def running(
    code: str = WAITS,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    held: tuple[int, ...] = (),
    script: Path | None = None,
) -> Iterator[list[int]]:
    """A Python program; gives the pids that it says in its first line, the first its own."""
    text = f"import os, signal, socket, sys; {code}"
    if script is not None:
        script.write_text(text)
    program = ["-c", text] if script is None else [str(script)]
    with ending(
        subprocess.Popen(
            [sys.executable, "-I", "-S", *program, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            pass_fds=held,
        )
    ) as process:
        assert process.stdout is not None
        said = [int(word) for word in process.stdout.readline().split()]
        try:
            yield said or [process.pid]
        finally:
            for pid in said[1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def listening(
    folder: Path,
    name: str,
    *arguments: str,
    backlog: int = 16,
    heir: bool = False,
) -> Iterator[list[int]]:
    """A program that listens and never accepts; with an heir, a child has its socket too."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    code = [
        "listener = socket.socket(socket.AF_UNIX)",
        f"os.fchdir({descriptor})",
        f"os.close({descriptor})",
        f"listener.bind({name!r})",
        f"listener.listen({backlog})",
        "parent = os.getpid()",
        "pids = [parent, *([os.fork()] if HEIR else [])]".replace("HEIR", str(heir)),
        "if os.getpid() == parent: print(*pids, flush=True)",
        "signal.pause()",
    ]
    try:
        with running("\n".join(code), *arguments, held=(descriptor,)) as pids:
            yield pids
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def keeper_without_agent(
    folder: Path, sid: str, program: str = "keeper.cjs", code: str = WAITS
) -> Iterator[list[int]]:
    """A program that runs and holds open what a keeper of this folder does, and no more."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with tempfile.TemporaryDirectory() as home:
        try:
            script = Path(home) / program
            with running(code, sid, held=(descriptor,), script=script) as pids:
                yield pids
        finally:
            os.close(descriptor)


def spawn(manager: KeeperManager, sid: str) -> SpawnedKeeper:
    """A real session; its agent lives, and its pid file is there."""
    spawned = asyncio.run(manager.spawn(sid, agent_command=SINK, ready=False))
    until((manager.sessions_dir / f"{sid}.rpc.sock.pi-pid").exists, "the agent pid file")
    agent_of(manager, sid)
    return spawned


@contextlib.contextmanager
def usurper(manager: KeeperManager, sid: str) -> Iterator[int]:
    """A second Node keeper for a session that has one; it takes the names of the first."""
    pid_file = manager.sessions_dir / f"{sid}.rpc.sock.pid"
    first = pid_file.read_text()
    env = {
        **os.environ,
        "PI_DASHBOARD_HOME": str(manager.sessions_dir.parents[2]),
        "PI_KEEPER_PI_CMD": '["sleep"]',
        "PI_KEEPER_PI_ARGS": '["600"]',
    }
    with subprocess.Popen(["node", NODE_KEEPER, sid], env=env, start_new_session=True) as process:
        try:
            until(lambda: pid_file.read_text() not in {"", first}, "it has taken the pid file")
            until(lambda: agent_of(manager, sid) in (SYSTEM.children(process.pid) or ()))
            yield process.pid
        finally:
            for pid in (*(SYSTEM.children(process.pid) or ()), process.pid):
                os.kill(pid, signal.SIGKILL)


def agent_of(manager: KeeperManager, sid: str) -> int:
    """The pid in the agent pid file, which is made empty, and then filled."""
    texts = [""]

    def read() -> str:
        texts.append((manager.sessions_dir / f"{sid}.rpc.sock.pi-pid").read_text())
        return texts[-1]

    until(read, "the agent pid file is written")
    return int(texts[-1])


def kill(*pids: int) -> None:
    """SIGKILL, and wait until they are dead."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(alive, pids)))
