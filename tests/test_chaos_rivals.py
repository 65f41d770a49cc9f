"""More than one who would clean a folder: reconcilers, commands, the dashboard's discovery."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos import Fault
from conftest import HUNG, PROGRAM, Daemon, identity, program_environment, stale_pair, until
from raw_keeper import into
from stand_ins import ending, kill

from reconciler.console import FAILURE, NO_SUCH_SESSION
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager
from reconciler.layout import claims
from reconciler.observations import ProcessId
from reconciler.processes import SYSTEM
from reconciler.rpc_writer import BlockingRpcWriter

CHECKED = "one acts, or all without harm: the living live and are written to, the dead are cleaned"
DISCOVERY = Path(__file__).parent / "keepers" / "discovery.cjs"
SEED = int(os.environ.get("PI_RECONCILER_SEED", "1"))
ACTS = ("session.cleaned", "keeper.stopped", "agent.stopped", "keeper.told_to_bind")
ENDINGS = (".rpc.sock", ".rpc.sock.pid", ".rpc.sock.pi-pid")


@dataclass
class Live:
    """A session that must live on, whoever cleans."""

    manager: KeeperManager
    sid: str
    keeper: ProcessId
    agent: ProcessId
    record: Path

    def is_unharmed(self, fault: Fault) -> None:
        for process in (self.keeper, self.agent):
            unharmed = SYSTEM.facts(process.pid).process == process
            fault.holds(unharmed, f"{self.sid}: {process.pid} lives")
        until(lambda: len(files(self.manager.sessions_dir, self.sid)) == 3, "it has its files")
        number = str(uuid.uuid4())
        writer = BlockingRpcWriter(self.manager.sessions_dir)
        sent = writer.write(self.sid, {"n": number}, timeout=20)
        fault.holds(sent.delivered, f"{self.sid} is written to: {sent}")
        until(lambda: number.encode() in self.record.read_bytes(), "the line arrives")
        fault.holds(self.record.read_bytes().count(number.encode()) == 1, "it arrives once")


def files(folder: Path, sid: str) -> list[str]:
    return [name for name in os.listdir(folder) if claims(name) == sid]


def cleaned(folder: Path, sid: str) -> bool:
    return not files(folder, sid)


def begin(manager: KeeperManager, agent: tuple[str, ...] = HUNG) -> tuple[str, int, int]:
    """Start a session: its id, and the pids of its keeper and its agent."""
    sid = str(uuid.uuid4())
    spawned = asyncio.run(manager.spawn(sid, agent_command=agent, timeout=60))
    assert spawned.agent_pid is not None
    return sid, spawned.keeper_pid, spawned.agent_pid


def lives(manager: KeeperManager, tmp_path: Path) -> Live:
    record = tmp_path / str(uuid.uuid4())
    sid, keeper, agent = begin(manager, tuple(into(record)))
    return Live(manager, sid, identity(keeper), identity(agent), record)


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """One of our commands, started."""
    return subprocess.Popen(
        [*PROGRAM, *arguments, "--sessions-dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=program_environment(folder),
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, error = process.communicate(timeout=60)
    return process.returncode, error


# Two reconcilers.


@contextlib.contextmanager
def onlooker(folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A reconciler that decides and tells everything, and does nothing."""
    with log.open("ab") as file:
        options = ("--dry-run", "--log-form", "json", "--sessions-dir", str(folder))
        program = [*PROGRAM, "run", *options]
        environment = program_environment(folder)
        looking = subprocess.Popen(program, stdout=file, stderr=file, env=environment)
    with ending(looking):
        until(lambda: '"reconciler.started"' in log.read_text(), "it looks on")
        yield looking


@pytest.mark.timeout(900)
@pytest.mark.chaos("two reconcilers, commands, the dashboard", CHECKED)
def test_one_is_killed_and_the_next_starts_at_the_same_instant(
    daemon: Daemon, manager: KeeperManager, tmp_path: Path, fault: Fault
) -> None:
    folder, log = daemon.folder, tmp_path / "dry.log"
    chance = random.Random(SEED)
    live = lives(manager, tmp_path)
    with onlooker(folder, log) as looking, Folder(folder) as opened:
        for number in fault.rounds(short=1, full=30):
            holder = opened.lock_holder()
            fault.holds(holder == daemon.process.pid, f"the daemon has the lock: {holder}")
            heir = command(folder, "run", "--log-form", "json")
            # It takes some 300 ms until the new one asks for the lock.
            with contextlib.suppress(subprocess.TimeoutExpired):
                heir.wait(chance.uniform(0.0, 0.6))
            daemon.process.kill()
            daemon.process.wait()
            stale_pair(folder, f"stale-{number}")
            dies, keeper, _ = begin(manager)
            kill(keeper)
            if _holds(heir, opened, fault):
                until(functools.partial(cleaned, folder, f"stale-{number}"), "the new one acts")
                heir.kill()
                heir.communicate()
                fault.holds(opened.lock_holder() is None, "the lock ends with its holder")
                stale_pair(folder, f"left-{number}")
                until(lambda: f"left-{number}" in log.read_text(), "the onlooker tells")  # noqa: B023
                fault.holds(len(files(folder, f"left-{number}")) == 2, "and does nothing")
            daemon.process = daemon._start()
            for sid in (f"stale-{number}", f"left-{number}", dies):
                until(functools.partial(cleaned, folder, sid), f"{sid} is cleaned")
            live.is_unharmed(fault)
        fault.holds(looking.poll() is None, "the onlooker runs")
    acts = [event for event in ACTS if f'"{event}"' in log.read_text()]
    fault.holds(not acts, f"the onlooker has done nothing: {acts}")


def _holds(heir: subprocess.Popen[str], opened: Folder, fault: Fault) -> bool:
    """Whether the second one has the folder; or else it was refused, and says why."""
    until(lambda: heir.poll() is not None or opened.lock_holder() == heir.pid, "it has or is not")
    if heir.poll() is None:
        return True
    code, error = ended(heir)
    fault.holds(code == FAILURE and "another reconciler" in error, f"refused: {code}, {error}")
    return False


@pytest.mark.timeout(900)
@pytest.mark.chaos("two reconcilers, commands, the dashboard", CHECKED)
def test_commands_beside_the_daemon(
    daemon: Daemon, manager: KeeperManager, tmp_path: Path, fault: Fault
) -> None:
    folder = daemon.folder
    live = lives(manager, tmp_path)
    for number in fault.rounds(short=1, full=30):
        sid, keeper, agent = begin(manager)
        stops = [command(folder, "stop", sid) for _ in range(2)]
        once = command(folder, "run", "--once")
        if number % 3 == 0:
            os.kill(keeper, signal.SIGSTOP)
        if number % 3 == 1:
            kill(agent)
        for stop in stops:
            code, error = ended(stop)
            fault.holds(code in {0, NO_SUCH_SESSION}, f"stop: {code}, {error}")
        until(functools.partial(cleaned, folder, sid), f"{sid} is gone")
        until(lambda: SYSTEM.facts(keeper).process is None, "its keeper is dead")  # noqa: B023
        code, error = ended(once)
        fault.holds(code == FAILURE and f"process {daemon.process.pid}" in error, f"once: {error}")
        live.is_unharmed(fault)
    fault.holds("session.failed" not in daemon.log.read_text(), "no look has failed")


# The dashboard's discovery.


class Discovery:
    """The other program that cleans, in its loop."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def listed(self) -> set[str]:
        """What a pass finds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return set(json.loads(self._process.stdout.readline()))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Not while a Node keeper is born: its pid file is empty for a moment, and would go."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


@pytest.fixture
def discovery(folder: Path) -> Iterator[Discovery]:
    process = subprocess.Popen(
        ["node", DISCOVERY, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with ending(process):
        running = Discovery(process)
        running.listed()
        yield running


def _is_killed(_: KeeperManager, __: str, keeper: int, ___: int) -> None:
    os.kill(keeper, signal.SIGKILL)


def _loses_its_agent(_: KeeperManager, __: str, ___: int, agent: int) -> None:
    os.kill(agent, signal.SIGKILL)


def _hangs_without_agent(_: KeeperManager, __: str, keeper: int, agent: int) -> None:
    os.kill(keeper, signal.SIGSTOP)
    os.kill(agent, signal.SIGKILL)


def _is_stopped(manager: KeeperManager, sid: str, _: int, __: int) -> None:
    asyncio.run(manager.stop(sid))


FATES: tuple[Callable[[KeeperManager, str, int, int], None], ...] = (
    _is_killed,
    _loses_its_agent,
    _hangs_without_agent,
    _is_stopped,
)


@pytest.mark.timeout(900)
@pytest.mark.chaos("two reconcilers, commands, the dashboard", CHECKED)
def test_the_dashboards_discovery_beside_the_daemon(
    discovery: Discovery,
    daemon: Daemon,
    node_manager: KeeperManager,
    fault: Fault,
    tmp_path: Path,
) -> None:
    folder, manager = daemon.folder, KeeperManager(daemon.folder)
    with discovery.paused():
        living = [lives(each, tmp_path) for each in (manager, manager, node_manager)]
    for number in fault.rounds(short=1, full=30):
        dying = []
        for position, fate in enumerate(FATES):
            node = (number + position) % 4 == 0
            with discovery.paused() if node else contextlib.nullcontext():
                dying.append((fate, *begin(node_manager if node else manager)))
        for fate, sid, keeper, agent in dying:
            fate(manager, sid, keeper, agent)
        stale_pair(folder, f"stale-{number}")
        for fate, sid, keeper, agent in dying:
            for pid in (keeper, agent):
                gone = functools.partial(_is_gone, pid)
                until(gone, f"{fate.__name__}: {pid} is dead")
            until(functools.partial(cleaned, folder, sid), f"{fate.__name__}: its files are gone")
        until(functools.partial(cleaned, folder, f"stale-{number}"), "the stale pair is cleaned")
        for live in living:
            live.is_unharmed(fault)
        listed = discovery.listed()
        fault.holds(listed == {live.sid for live in living}, f"it lists the living: {listed}")
    fault.holds("session.failed" not in daemon.log.read_text(), "no look has failed")


def _is_gone(pid: int) -> bool:
    return SYSTEM.facts(pid).process is None
