from __future__ import annotations

import ast
import asyncio
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos import Fault
from conftest import (
    HUNG,
    alive,
    asynchronous,
    bare_socket,
    dead_pid,
    end_all,
    happens,
    identity,
    program_environment,
    until,
)
from lateness import lateness
from stand_ins import agent_of, recorder
from watchdog.events import (
    DirCreatedEvent,
    FileClosedEvent,
    FileMovedEvent,
    FileSystemEvent,
)
from world import World

from reconciler import watcher
from reconciler.controller import Reconciler
from reconciler.keeper import KeeperManager
from reconciler.ladder import Ladder
from reconciler.layout import claims
from reconciler.logs import make_logger
from reconciler.state import Policy
from reconciler.workqueue import LongWork

RESYNC = 1.5
QUICK = Policy(settle=0.2, start_grace=0.4, orphan_grace=0.1, lost_grace=0.7, rebind_grace=0.2)
LADDER = Ladder(term_grace=0.2)
SESSIONS = 10
AT_ONCE = 4

Handle = Callable[[watcher._Handler, FileSystemEvent], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chances:
    """How likely each fault is for one event, from 0 to 1."""

    lost: float = 0.0
    doubled: float = 0.0
    held: float = 0.0
    """Comes later, behind others, in another order."""
    invented: float = 0.0


KINDS = {
    "all lost": Chances(lost=1.0),
    "some lost": Chances(lost=0.5),
    "doubled": Chances(doubled=1.0),
    "reordered": Chances(held=0.8),
    "invented": Chances(invented=1.0),
    "everything": Chances(lost=0.3, doubled=0.3, held=0.3, invented=0.3),
}


class Injector:
    """Stands between what the kernel told and the handler."""

    def __init__(self, folder: Path, chances: Chances, seed: int) -> None:
        self.done = 0
        """How many events it has tampered with."""
        self._folder = folder
        self._chances = chances
        self._random = random.Random(seed)
        self._held: list[FileSystemEvent] = []
        self._handler: watcher._Handler | None = None

    def through(self, handle: Handle) -> Handle:
        """What to call in the place of the handler."""

        def tampered(handler: watcher._Handler, event: FileSystemEvent) -> None:
            self._handler = handler
            for each in self._made_of(event):
                handle(handler, each)

        return tampered

    def _chance(self, chance: float) -> bool:
        came = self._random.random() < chance
        self.done += came
        return came

    def _made_of(self, event: FileSystemEvent) -> Iterable[FileSystemEvent]:
        if self._chance(self._chances.lost):
            return
        copies = [event] * (2 if self._chance(self._chances.doubled) else 1)
        if self._chance(self._chances.held):
            self._held += copies
            copies = []
        yield from copies
        if self._chance(self._chances.invented):
            yield self._invented()
        if self._held and self._random.random() < 0.3:
            held, self._held = self._held, []
            self._random.shuffle(held)
            yield from held

    def _invented(self) -> FileSystemEvent:
        """What did not happen: to a session that is there, that is not, to no session at all."""
        there = sorted(name for name in os.listdir(self._folder) if claims(name))
        nobody = f"{uuid.UUID(int=self._random.getrandbits(128))}.rpc.sock"
        odd = (
            b"\xff\xfe.rpc.sock.pid",
            ".rpc.sock",
            "..",
            "a\nb.rpc.sock",
            "x" * 300 + ".rpc.sock",
        )
        paths = [
            os.path.join(os.fsencode(self._folder), os.fsencode(name))
            for name in (*there, nobody, self._random.choice(odd))
        ]
        one, other = self._random.choices(paths, k=2)
        return self._random.choice(
            (FileClosedEvent(one), FileMovedEvent(one, other), DirCreatedEvent(str(self._folder)))
        )

    def release(self) -> None:
        """What was held back comes now."""
        for event in self._held:
            assert self._handler is not None
            watcher._Handler.on_any_event(self._handler, event)
        self._held = []


@asynccontextmanager
async def reconciling(folder: Path) -> AsyncIterator[list[float]]:
    """A reconciler at work; gives the times of its full looks."""
    looks: list[float] = []
    with (folder.parent / "log").open("w") as log:
        async with Reconciler(
            KeeperManager(folder, policy=QUICK, ladder=LADDER),
            resync=RESYNC,
            logger=make_logger(log, "info", "json"),
        ) as reconciler:
            look = reconciler._look_at_all

            def counted() -> LongWork | None:
                looks.append(time.monotonic())
                return look()

            reconciler._look_at_all = counted  # type: ignore[method-assign]
            yield looks


async def history(world: World) -> None:
    """Sessions come and go."""
    width = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with width:
            await world.session()

    await asyncio.gather(*(one() for _ in range(SESSIONS)))


def check_alive(world: World, fault: Fault, what: str) -> None:
    """Who lives on has its files, and lives."""
    for sid, spawned in world.alive.items():
        said = (world.folder / f"{sid}.rpc.sock.pid").read_text()
        fault.holds(said == str(spawned.keeper_pid), f"{what}: the pid file of {sid} says {said}")
        fault.holds(alive(spawned.keeper_pid), f"{what}: the keeper of {sid} lives")
        agent = agent_of(KeeperManager(world.folder), sid)
        fault.holds(alive(agent), f"{what}: the agent of {sid} lives")


@pytest.mark.chaos(
    "file events lost, doubled, reordered, invented",
    "same final state as with none, one resync later at most; nobody harmed",
)
@pytest.mark.timeout(3600)
@asynchronous
async def test_events_may_be_anything(
    folder: Path, manager: KeeperManager, node_manager: KeeperManager, fault: Fault
) -> None:
    kinds = (*KINDS, "everything", "all lost")  # these two more often than the others
    for seed in fault.rounds(short=3, full=80):
        kind = kinds[-1 - seed % len(kinds)]
        await tampered_history(World(folder, manager, node_manager, seed), kind, seed, fault)
        clear(folder)


async def tampered_history(world: World, kind: str, seed: int, fault: Fault) -> None:
    """One round: sessions come and go, and the handler is told of it as the kind says."""
    injector = Injector(world.folder, KINDS[kind], seed)
    tampered = injector.through(watcher._Handler.on_any_event)
    with (
        pytest.MonkeyPatch.context() as patched,
        innocent_named_in(world.folder, seed) as harmed,
    ):
        patched.setattr(watcher._Handler, "on_any_event", tampered)
        async with reconciling(world.folder) as looks:
            await history(world)
            await happens(lambda: world.expected() <= world.found(), "who lives on is up")
            before = len(looks)
            await asyncio.to_thread(injector.release)
            await happens(lambda: world.found() == world.expected(), f"{kind}: it is right")
            if not KINDS[kind].invented:  # that may ask for full looks, too
                resyncs = len(looks) - before
                fault.holds(resyncs <= 2, f"{kind}: it took {resyncs} resyncs")
        fault.holds(injector.done, f"{kind}: nothing was tampered with")
        check_alive(world, fault, kind)
        fault.holds(not harmed(), f"{kind}: the innocent got {harmed()}")


@contextmanager
def innocent_named_in(folder: Path, seed: int) -> Iterator[Callable[[], str]]:
    """A process whose pid a stale pid file names; gives what came to it."""
    record = folder.parent / f"{seed}.record"
    with subprocess.Popen(recorder(record), stdin=subprocess.PIPE) as process:
        try:
            until(lambda: record.exists() and record.read_bytes(), "the innocent runs")
            (folder / "recycled.rpc.sock.pid").write_text(str(process.pid))
            yield lambda: record.read_text().removeprefix("up\n")
            assert process.poll() is None
        finally:
            process.kill()


def clear(folder: Path) -> None:
    end_all(folder)
    for path in folder.iterdir():
        path.unlink()


# The kernel's queue.

QUEUE = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())

WITNESS = """
import os, sys, time
from test_chaos_events import delays
from reconciler import cli, inotify
real = inotify._SessionsFolder.on_queue_overflow
def told(self):
    print("overflow", time.monotonic(), delays(os.getpid()), file=sys.stderr, flush=True)
    real(self)
inotify._SessionsFolder.on_queue_overflow = told
cli.main()
"""
"""The background process; it also says at which moment the kernel's notice comes."""

SETTINGS = """
resync = 3600.0
[policy]
settle = 0.1
start_grace = 0.2
rebind_grace = 0.2
"""


def delays(pid: int) -> dict[str, float]:
    """How long each thread of a process has been ready to run, and no core was free: seconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {task.name: int((task / "schedstat").read_text().split()[1]) / 1e9 for task in tasks}


class Overflown:
    """The background process with a witness inside, in a process that can be held up."""

    def __init__(self, folder: Path) -> None:
        self.log = folder.parent / "daemon.log"
        settings = folder.parent / "settings.toml"
        settings.write_text(SETTINGS)
        command = [sys.executable, "-c", WITNESS, "run", "--config", str(settings)]
        command += ["--log-form", "json", "--log-level", "debug", "--sessions-dir", str(folder)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=program_environment(folder)
            )

    def hold_up(self) -> None:
        """Let none of its threads run."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")

        def stands() -> bool:
            return all(") T " in (task / "stat").read_text() for task in tasks.iterdir())

        until(stands, "it is held up")

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def noticed(self) -> tuple[float, dict[str, float]] | None:
        """When the notice came, and how long each thread had waited for a core until then."""
        for line in self.log.read_text().splitlines(keepends=True):
            if line.startswith("overflow ") and line.endswith("\n"):
                _, moment, waited = line.split(maxsplit=2)
                return float(moment), ast.literal_eval(waited)
        return None

    def took(self) -> float:
        """Seconds from the notice until now, those not counted that it waited for a core."""
        now, noticed = time.monotonic(), self.noticed()
        assert noticed is not None
        moment, before = noticed
        waited = {tid: w - before.get(tid, 0.0) for tid, w in delays(self.process.pid).items()}
        return now - moment - max(waited.values())

    def saw(self, sid: str) -> bool:
        return sid in self.log.read_text()


@contextmanager
def overflown(folder: Path) -> Iterator[Overflown]:
    it = Overflown(folder)
    with it.process:
        try:
            yield it
        finally:
            it.process.kill()


def chmod_two(folder: Path) -> None:
    """Events of two names that are nobody's, more than the kernel's queue holds."""
    paths = folder / "keeper-a.log", folder / "keeper-b.log"
    for path in paths:
        path.touch()
    for turn in range(QUEUE + 100):
        paths[turn % 2].chmod(0o600)


def come_and_go(folder: Path) -> None:
    """Pid files of as many sessions as the kernel's queue has events for."""
    for number in range(QUEUE // 3 + 100):
        path = folder / f"churn-{number}.rpc.sock.pid"
        path.touch()  # made, and closed
        path.unlink()


@pytest.mark.chaos(
    "the kernel's event queue overflown",
    "same final state within 1 s of the notice, and of what the machine's load takes",
)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("churn", [chmod_two, come_and_go])
@asynchronous
async def test_an_overflow_costs_nothing(
    folder: Path,
    manager: KeeperManager,
    node_manager: KeeperManager,
    fault: Fault,
    churn: Callable[[Path], None],
) -> None:
    for seed in fault.rounds(short=1, full=20):
        keepers = {
            sid: identity((await each.spawn(sid, agent_command=HUNG)).keeper_pid)
            for sid, each in (("ours", manager), ("other", node_manager))
        }
        with overflown(folder) as daemon, innocent_named_in(folder, seed) as harmed:
            until(lambda: all(map(daemon.saw, ("ours", "other"))), "it has seen both sessions")
            await asyncio.to_thread(overflow, daemon, folder, churn, fault)
            for sid, keeper in keepers.items():
                fault.holds(identity(keeper.pid) == keeper, f"the keeper of {sid} lives")
                said = (folder / f"{sid}.rpc.sock.pid").read_text()
                fault.holds(said == str(keeper.pid), f"the pid file of {sid} says {said}")
            fault.holds(not harmed(), f"the innocent got {harmed()}")
        clear(folder)


def overflow(daemon: Overflown, folder: Path, churn: Callable[[Path], None], fault: Fault) -> None:
    """Fill the queue, let more happen, and take the time until that is put right."""
    daemon.hold_up()
    before = names(folder)
    churn(folder)
    leave_unseen(folder)
    with lateness() as late:
        daemon.go_on()
        until(daemon.noticed, "the kernel's notice")
        until(lambda: names(folder) == before, "it is right")
        took, load = daemon.took(), late()
    told = f"{churn.__name__}: right {took:.2f} s after the notice, and a sleeper {load:.2f} s late"
    # A keeper binds again, and this very process looks: both wait for a core as well.
    fault.holds(took < 1.0 + 2 * load, told)


def names(folder: Path) -> set[str]:
    """What stands in the folder in the end: the one that is recycled goes."""
    return {name for name in os.listdir(folder) if claims(name)} - {"recycled.rpc.sock.pid"}


def leave_unseen(folder: Path) -> None:
    """What happens while the queue is full: nobody is told of it."""
    dead = dead_pid()
    for number in range(50):
        (folder / f"stale-{number}.rpc.sock.pid").write_text(str(dead))
    bare_socket(folder / "bare.rpc.sock")
    (folder / "broken.rpc.sock.pid").write_text("x")
    (folder / "ours.rpc.sock").unlink()
    (folder / "other.rpc.sock.pid").unlink()
