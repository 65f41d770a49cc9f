"""The processes that are measured, those they live among, and how they are started and ended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

from benchmarks.measuring import SkippedError, Stage
from benchmarks.watching import WAIT
from reconciler.hints import LEFTOVER_PAUSE
from reconciler.layout import KEEPER_PROGRAM

ROOT = Path(__file__).parent.parent
PEERS = Path(__file__).with_name("peers")

NODE_KEEPER = ROOT / "tests" / "keepers" / "keeper.cjs"
"""A keeper in Node that does what the dashboard's does: the peer of ours."""

SINK = '["cat"]'
"""The agent of the keepers that are measured: it reads and says nothing."""

PYTHON = (sys.executable, "-I", "-S")

QUIET = LEFTOVER_PAUSE + 0.2
"""Seconds without work after which a daemon is at rest: longer than it puts off any work that
an exit brings with it."""

_STARTING_AT_ONCE = 8

Process = subprocess.Popen[bytes]


def node() -> str:
    """The Node runtime."""
    if found := shutil.which("node"):
        return found
    raise SkippedError("node is not installed")


def until(condition: Callable[[], object], what: str, pause: float = 0.005) -> None:
    """Wait for what is not measured: ``WAIT`` seconds at most."""
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT:g} s in vain: {what}")
        time.sleep(pause)


@contextlib.contextmanager
def ended(*processes: Process) -> Iterator[None]:
    """Kill and reap what was started, by pid."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


# Keepers.


def environment(folder: Path) -> dict[str, str]:
    """What a program needs to serve a folder, and to find none of the user's own settings."""
    home = str(folder.parents[2])
    return {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "",  # as installed: nobody compiles it at every start
        "HOME": home,
        "XDG_CONFIG_HOME": home,
        "PYTHONPATH": str(ROOT),
        "PI_DASHBOARD_HOME": home,
        "PI_KEEPER_PI_CMD": SINK,
        "PI_KEEPER_PI_ARGS": "[]",
    }


def keeper_command(*, ours: bool) -> tuple[str, ...]:
    """How a keeper is run, without the session's id."""
    return (*PYTHON, str(KEEPER_PROGRAM)) if ours else (node(), str(NODE_KEEPER))


def start_keeper(folder: Path, sid: str, *, ours: bool = True) -> Process:
    """Start one keeper. It is not waited for."""
    return subprocess.Popen(
        [*keeper_command(ours=ours), sid],
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def socket_of(folder: Path, sid: str) -> Path:
    return folder / f"{sid}.rpc.sock"


def pid_file_of(folder: Path, sid: str) -> Path:
    return folder / f"{sid}.rpc.sock.pid"


def agent_file_of(folder: Path, sid: str) -> Path:
    return folder / f"{sid}.rpc.sock.pi-pid"


def number_in(path: Path) -> int:
    """The pid in a pid file; 0 when it is not there yet, or empty."""
    try:
        return int(path.read_text() or 0)
    except FileNotFoundError:
        return 0


def wait_for_agent(folder: Path, sid: str) -> int:
    """Wait until a keeper has written down its agent, the last thing it does; gives the pid."""
    path = agent_file_of(folder, sid)
    until(lambda: number_in(path), f"{path} is written")
    return number_in(path)


@contextlib.contextmanager
def keepers(stage: Stage, folder: Path, sids: Sequence[str]) -> Iterator[dict[str, Process]]:
    """Real keepers of ours, each with an agent; a few are started at a time."""
    started: dict[str, Process] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: _end(started.values()))
        for position, sid in enumerate(sids):
            started[sid] = start_keeper(folder, sid)
            if position >= _STARTING_AT_ONCE:
                wait_for_agent(folder, sids[position - _STARTING_AT_ONCE])
            stage.tell(f"starting keepers: {position + 1} of {len(sids)}")
        for sid in sids[-_STARTING_AT_ONCE:]:
            wait_for_agent(folder, sid)
        yield started


def _end(processes: Iterable[Process]) -> None:
    with ended(*processes):
        pass


class Crowd:
    """The live sessions that a daemon watches: real keepers of ours, each with an agent."""

    def __init__(self, stage: Stage) -> None:
        self.folder = stage.folder()
        sids = [f"live-{number:04}" for number in range(stage.sessions)]
        self.keepers = stage.enter(keepers(stage, self.folder, sids))
        self.pids = {
            pid
            for sid, keeper in self.keepers.items()
            for pid in (keeper.pid, number_in(agent_file_of(self.folder, sid)))
        }


# Ours: the daemon.


class Daemon:
    """``pi-reconciler run`` on a folder, its log in a file: a context manager.

    It is started with the settings that everybody has, and looks at every second of a run as
    it does anywhere: full looks, and scans for leftovers a second after a death.
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder.parents[2] / "daemon.log"
        command = (sys.executable, "-m", "reconciler", "run", "--log-form", "json")
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--sessions-dir", str(folder)],
                env=environment(folder),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _end([self.process])

    @property
    def pid(self) -> int:
        return self.process.pid

    def told(self, event: str) -> list[dict[str, Any]]:
        """The log's lines of one event."""
        lines = (json.loads(line) for line in self._log.read_text().splitlines())
        return [line for line in lines if line["event"] == event]

    def descriptors(self) -> int:
        """How many descriptors it holds, in one call that costs it nothing (Linux 6.2)."""
        with contextlib.suppress(FileNotFoundError):
            path = f"/proc/{self.pid}/fd"
            return os.stat(path).st_size or len(os.listdir(path))
        return 0

    def watched(self) -> set[int]:
        """The pids whose exits it waits for: those it holds a pidfd of."""
        found = set()
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/{self.pid}/fd/{name}") == "anon_inode:[pidfd]":
                    found.add(_field(f"/proc/{self.pid}/fdinfo/{name}", "Pid"))
        return found

    def wait_for(self, pids: Iterable[int]) -> None:
        """Wait until it waits for the exits of some processes: their sessions are ready."""
        wanted = set(pids)
        until(lambda: wanted <= self.watched(), "the daemon watches them", pause=0.02)

    def wait_for_number(self, count: int, pause: float = 0.1) -> None:
        """Wait until it waits for the exits of so many processes.

        Its descriptors are counted first: that is cheap, and so may be done often.
        """
        until(lambda: self.descriptors() > count, "the daemon watches them", pause)
        until(lambda: len(self.watched()) >= count, "the daemon watches them", pause)

    def rest(self) -> None:
        """Wait until it has nothing to do."""
        rest([self.pid])


def rest(pids: Sequence[int], quiet: float = QUIET) -> None:
    """Wait until processes have done no work for a while: half a millisecond of it at most."""

    def rested() -> bool:
        before = [worked(pid) for pid in pids]
        time.sleep(quiet)
        return all(worked(pid) - then < 0.0005 for pid, then in zip(pids, before, strict=True))

    until(rested, f"{pids} are at rest", pause=0)


def worked(pid: int) -> float:
    """Seconds of processor time that a process has had, all its threads together."""
    nanoseconds = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):
            nanoseconds += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def wakeups(pid: int) -> int:
    """Voluntary context switches of a process so far, all its threads together."""
    threads = os.listdir(f"/proc/{pid}/task")
    return sum(_field(f"/proc/{pid}/task/{t}/status", "voluntary_ctxt_switches") for t in threads)


def resident(pid: int) -> int:
    """KiB of a process that are in memory."""
    return _field(f"/proc/{pid}/status", "VmRSS")


def _field(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise ValueError(f"{path} has no {name}")


# Peers.


class Helper:
    """A program that answers each line on its standard input with one line: a context manager.

    Args:
        command: the program, which says a first line once it is up.
        folder: where it works.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._process = subprocess.Popen(
            command,
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[bytes] = self._process.stdin
        self._stdout: IO[bytes] = self._process.stdout
        self.answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _end([self._process])

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, line: str) -> str:
        """Say a line, and wait for the answer."""
        self._stdin.write(line.encode() + b"\n")
        self._stdin.flush()
        return self.answer()

    def answer(self) -> str:
        """Wait for the next line."""
        line = self._stdout.readline().decode()
        if not line.endswith("\n"):
            raise RuntimeError(f"{self._process.args!r} has ended")
        return line.removesuffix("\n")


def bare(folder: Path, what: str, *arguments: str) -> Helper:
    """The limit: a bare loop in a process of its own."""
    return Helper([*PYTHON, str(PEERS / "bare.py"), what, *arguments], folder)


class Supervised:
    """A keeper of ours under ``s6-supervise``, whose finish script removes its two files.

    A context manager. It is told to run the keeper once, so nothing starts another one while
    the files go. Each keeper under s6 has a supervisor of its own: how many others there are
    is nothing to it.
    """

    def __init__(self, folder: Path, sid: str) -> None:
        if not shutil.which("s6-supervise"):
            raise SkippedError("s6 is not installed: make tools (needs root and apt)")
        self._service = folder.parents[2] / f"s6-{sid}"
        self._service.mkdir()
        (self._service / "down").touch()
        files = f"{socket_of(folder, sid)} {pid_file_of(folder, sid)}"
        self._script("run", f"exec {' '.join(keeper_command(ours=True))} {sid}")
        self._script("finish", f"exec rm -f {files}")
        self._process = subprocess.Popen(
            ["s6-supervise", str(self._service)],
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        once = ["s6-svc", "-o", str(self._service)]
        until(
            lambda: not subprocess.run(once, stderr=subprocess.DEVNULL, check=False).returncode,
            "s6-supervise listens",
        )
        wait_for_agent(folder, sid)
        self.keeper_pid = number_in(pid_file_of(folder, sid))

    def _script(self, name: str, line: str) -> None:
        path = self._service / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)  # it ends what it runs, and itself
        self._process.wait(WAIT)
        shutil.rmtree(self._service)
