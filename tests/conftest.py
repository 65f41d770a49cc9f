"""What tests share: a sessions folder of their own, keepers in it, and a bound on waiting."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import functools
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import pytest
from chaos import Table
from chaos import fault as fault  # noqa: PLC0414 - fixtures and hooks
from chaos import pytest_pyfunc_call as pytest_pyfunc_call  # noqa: PLC0414
from raw_keeper import holds
from raw_keeper import out as out  # noqa: PLC0414
from raw_keeper import session as session  # noqa: PLC0414

from reconciler import launches
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager
from reconciler.layout import FOLDER_MARKER, KEEPER_PROGRAM
from reconciler.logs import Level, make_logger
from reconciler.observations import ProcessId
from reconciler.processes import SYSTEM
from reconciler.sessions import Session

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

os.umask(0o022)  # folders that a group may write to are not trusted: tests must not make such

P = ParamSpec("P")

NODE_KEEPER = Path(__file__).with_name("keepers") / "keeper.cjs"
"""A keeper of another make, as the dashboard's behaves."""

SINK = ("sh", "-c", "exec cat > /dev/null")
"""A stand-in agent: it lives until its input ends, or a signal comes."""

HUNG = ("sleep", "600")
"""A stand-in agent that hangs: it does not read, and the end of its input is nothing to it."""

WAIT = 20.0
"""Seconds until a test gives up waiting for what must come. A bound, not a pause."""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Table())
    # A shell starts what runs in its background deaf to Ctrl-C, and so what that starts: the tests'
    # own commands would be, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait until a condition holds, WAIT seconds at most."""
    deadline = time.monotonic() + WAIT
    while not holds(condition):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {WAIT:g} s in vain: {what or condition}")
        time.sleep(0.002)


def open_descriptors() -> set[str]:
    """This process's descriptors, but for those that the garbage of earlier tests held."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


async def soon(awaitable: Awaitable[Session]) -> Session:
    """Await what must come, WAIT seconds at most."""
    return await asyncio.wait_for(awaitable, WAIT)


def asynchronous(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def happens(condition: Callable[[], object], what: str = "") -> None:
    """Let the event loop run until a condition holds, WAIT seconds at most."""
    deadline = time.monotonic() + WAIT
    while not holds(condition):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {WAIT:g} s in vain: {what or condition}")
        await asyncio.sleep(0.002)


class Told:
    """A log that can be read back, line by line."""

    def __init__(self, level: Level = "info") -> None:
        self._stream = io.StringIO()
        self.logger: FilteringBoundLogger = make_logger(self._stream, level, "json")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines so far; each must be JSON."""
        return [json.loads(line) for line in self._stream.getvalue().splitlines()]

    def of(self, event: str, sid: str | None = None) -> list[dict[str, Any]]:
        """The lines of one event, of one session if one is given."""
        return [
            line
            for line in self.lines
            if line["event"] == event and (sid is None or line.get("sid") == sid)
        ]

    def events(self, sid: str) -> list[str]:
        """The events of a session, in order."""
        return [line["event"] for line in self.lines if line.get("sid") == sid]


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Be another user for a while, in this process: needs root."""
    codecs.lookup("ascii")  # it may stand where only root can read, and is looked for once
    groups = os.getgroups()
    os.setgroups([])
    os.setresgid(65534, 65534, 0)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")


def alive(pid: int) -> bool:
    """Whether a pid is a process that is not a zombie."""
    return SYSTEM.facts(pid).process is not None


def identity(pid: int) -> ProcessId:
    """The process of a pid that must live."""
    process = SYSTEM.facts(pid).process
    assert process is not None, f"process {pid} is not alive"
    return process


@contextlib.contextmanager
def sessions_folder() -> Iterator[Path]:
    """A sessions folder where the contract wants it, so that any keeper can serve it.

    Its path is short enough for any socket's name, which pytest's own are not. What still
    lives of its sessions at the end is killed: by pid, each proven to be a keeper of this
    very folder, or the child of one.
    """
    home = Path(tempfile.mkdtemp(prefix="pi-"))
    path = home / ".pi" / "dashboard" / "sessions"
    path.mkdir(parents=True, mode=0o700)
    yield path
    end_all(path)
    shutil.rmtree(home)


@pytest.fixture
def folder() -> Iterator[Path]:
    with sessions_folder() as path:
        yield path


def end_all(folder: Path) -> None:
    """Kill the keepers of a test's folder, their agents, and what these have started.

    The number of a folder that is removed is given to the next one, and what carries it in its
    marker would be taken for a leftover there.
    """
    if not folder.is_dir():
        return
    status = folder.stat()
    mark = f"{status.st_dev}:{status.st_ino}"
    for pid in SYSTEM.pids():
        if SYSTEM.variable(pid, FOLDER_MARKER) == mark:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            continue
        arguments = SYSTEM.arguments(pid) or ()
        if not any(a.endswith((KEEPER_PROGRAM.name, NODE_KEEPER.name)) for a in arguments):
            continue
        logs = [p.stat() for p in folder.glob("keeper-*.log") if p.is_file() and not p.is_symlink()]
        files = {(s.st_dev, s.st_ino) for s in (status, *logs)}
        home = SYSTEM.variable(pid, "PI_DASHBOARD_HOME")  # of one whose files were deleted
        if SYSTEM.holds(pid, files) or home == str(folder.parents[2]):
            for child in (*(SYSTEM.children(pid) or ()), pid):
                try:
                    os.kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    continue


PROGRAM = (sys.executable, "-m", "reconciler")
"""How the command line is run."""


class Daemon:
    """The background process on a folder, as a user runs it. Its log is read back."""

    def __init__(
        self, folder: Path, log: Path, *options: str, program: Sequence[str] = PROGRAM
    ) -> None:
        self.folder = folder
        self.log = log
        self._command = (*program, "run", "--log-form", "json", *options)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = program_environment(self.folder)
        started = self._count("reconciler.started")
        with self.log.open("ab") as log:
            command = (*self._command, "--sessions-dir", str(self.folder))
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        until(lambda: self._count("reconciler.started") > started, "the daemon runs")
        return process

    def _count(self, event: str) -> int:
        return self.log.read_text().count(f'"{event}"') if self.log.exists() else 0

    def of(self, event: str, sid: str = "") -> list[dict[str, Any]]:
        """The log's lines of one event, of one session if one is given."""
        lines = (line for line in self.log.read_text().splitlines(keepends=True))
        told = (json.loads(line) for line in lines if line.endswith("}\n") and sid in line)
        return [line for line in told if line["event"] == event]

    def crash_and_restart(self) -> None:
        """SIGKILL, and a new one."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def end(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(WAIT)


def program_environment(folder: Path) -> dict[str, str]:
    """An environment in which nothing of the user's own settings is found."""
    home = str(folder.parents[2])
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "HOME": home, "XDG_CONFIG_HOME": home, "PYTHONPATH": paths}


@pytest.fixture
def daemon(folder: Path, tmp_path: Path) -> Iterator[Daemon]:
    """The background process, on the test's folder."""
    running = Daemon(folder, tmp_path / "daemon.log")
    yield running
    running.process.kill()
    running.process.wait()


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


def note_down(folder: Folder, sid: str, launch: launches.Launch) -> None:
    """Make a launch note, as a spawn does."""
    with launches.written(folder, sid, launch):
        pass
