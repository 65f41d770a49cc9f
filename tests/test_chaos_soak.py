"""Everything at random, for long: sessions come, are written to, frozen, killed and stopped.

`PI_RECONCILER_SOAK` says for how many seconds (1800 in a campaign), `PI_RECONCILER_SEED`
which history.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from chaos import CAMPAIGN, Fault
from conftest import Daemon, asynchronous, identity, stale_pair
from innocents import harm, innocents
from raw_keeper import into, memory

from reconciler.keeper import KeeperManager
from reconciler.layout import claims
from reconciler.observations import ProcessId
from reconciler.processes import SYSTEM
from reconciler.rpc_writer import RpcWriter, WritePolicy

SECONDS = float(os.environ.get("PI_RECONCILER_SOAK", "1800" if CAMPAIGN else "8"))
SEED = int(os.environ.get("PI_RECONCILER_SEED", "1"))
SESSIONS = 200 if CAMPAIGN else 20
AT_ONCE = 6
BOUND = 60.0
"""Seconds until what must come counts as missing; a busy machine is no defect."""

SPARE_FDS, SPARE_THREADS = 40, 8
"""What a daemon may hold beside two pidfds for each session."""
GROWTH = 4 * 1024 * 1024
"""Bytes that a daemon may grow by while it is measured..."""
SLOPE = 128 * 1024
"""...and bytes in a minute, where it is measured for five minutes at least."""

ENDINGS = (".rpc.sock", ".rpc.sock.pid", ".rpc.sock.pi-pid")


def alive(process: ProcessId) -> bool:
    return SYSTEM.facts(process.pid).process == process


@dataclass(eq=False)
class Live:
    """A session that the model knows alive."""

    sid: str
    manager: KeeperManager
    keeper: ProcessId
    agent: ProcessId
    record: Path
    keyed: bool
    sent: set[int] = field(default_factory=set)
    received: set[int] = field(default_factory=set)
    """Acknowledged lines."""
    busy: bool = False

    def lines(self) -> list[int]:
        """What the agent has read; a half line raises."""
        text = self.record.read_bytes()
        return [json.loads(line)["n"] for line in text.splitlines(keepends=True)]


class World:
    """The sessions of one folder as they should be, and what is done to them."""

    def __init__(self, folder: Path, records: Path, fault: Fault, seed: int) -> None:
        self.folder = folder
        self.live: list[Live] = []
        self.ended: set[str] = set()
        self.blameless: list[ProcessId] = []
        self.fault = fault
        self.random = random.Random(seed)
        self._records = records
        self._writer = RpcWriter(folder, policy=WritePolicy(progress_timeout=1.0))
        self._next = 0
        self.fates = {
            self.is_written_to: 40,
            self.keeper_freezes: 4,
            self.agent_freezes: 4,
            self.keeper_is_killed: 4,
            self.agent_is_killed: 4,
            self.keeper_freezes_and_agent_is_killed: 2,
            self.is_stopped: 4,
            self.is_stopped_while_frozen: 1,
        }

    @contextmanager
    def busy(self, live: Live) -> Iterator[None]:
        live.busy = True
        try:
            yield
        finally:
            live.busy = False

    async def eventually(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + BOUND
        while not condition() and time.monotonic() < deadline:  # noqa: ASYNC110 - files
            await asyncio.sleep(0.02)
        self.fault.holds(condition(), what)

    async def step(self, managers: list[KeeperManager]) -> None:
        """One thing happens to one session, or to none."""
        self.fault.count(1)
        idle = [live for live in self.live if not live.busy]
        chance = self.random.random()
        if len(self.live) < SESSIONS and (not idle or chance < 0.3):
            await self.begins(managers)
        elif chance > 0.97:
            await self.files_name_an_innocent()
        elif idle:
            live = self.random.choice(idle)
            (fate,) = self.random.choices([*self.fates], [*self.fates.values()])
            with self.busy(live):
                await fate(live)
        else:
            await asyncio.sleep(0.01)

    async def begins(self, managers: list[KeeperManager]) -> None:
        self._next += 1
        sid = f"s{self._next}-{self.random.getrandbits(64):x}"
        (manager,) = self.random.choices(managers, [9, 1])
        record = self._records / sid
        agent = tuple(into(record))
        spawned = await manager.spawn(sid, agent_command=agent, ready=False, timeout=BOUND)
        path = self.folder / f"{sid}.rpc.sock.pi-pid"
        await self.eventually(lambda: path.exists() and path.read_text(), f"{sid} has an agent")
        await self.eventually(record.exists, f"{sid}'s agent runs")
        keeper, agent_process = identity(spawned.keeper_pid), identity(int(path.read_text()))
        keyed = manager is managers[0]
        self.live.append(Live(sid, manager, keeper, agent_process, record, keyed))

    async def is_written_to(self, live: Live) -> None:
        for _ in range(self.random.randrange(1, 5)):
            self._next += 1
            live.sent.add(number := self._next)
            key = str(number) if live.keyed else None
            for _ in range(2 if live.keyed else 1):  # with a key it may be sent again
                delivery = await self._writer.write(live.sid, {"n": number}, key=key, timeout=BOUND)
                if delivery.delivered:
                    live.received.add(number)
                    break
        if live in self.live:
            await self._has_arrived(live)

    async def _has_arrived(self, live: Live) -> None:
        await self.eventually(lambda: live.received <= set(live.lines()), f"{live.sid} got all")
        self._not_twice(live)

    def _not_twice(self, live: Live) -> None:
        lines = live.lines()
        self.fault.holds(len(lines) == len(set(lines)), f"{live.sid} got nothing twice")
        self.fault.holds(live.sent.issuperset(lines), f"{live.sid} got what was sent")

    async def keeper_freezes(self, live: Live) -> None:
        await self._freezes(live, live.keeper)

    async def agent_freezes(self, live: Live) -> None:
        await self._freezes(live, live.agent)

    async def _freezes(self, live: Live, process: ProcessId) -> None:
        os.kill(process.pid, signal.SIGSTOP)
        writes = asyncio.create_task(self._is_written_to_while_frozen(live))
        await asyncio.sleep(self.random.uniform(0.0, 3.0))
        os.kill(process.pid, signal.SIGCONT)
        await writes
        await self._has_arrived(live)

    async def _is_written_to_while_frozen(self, live: Live) -> None:
        self._next += 1
        live.sent.add(number := self._next)
        key = str(number) if live.keyed else None
        delivery = await self._writer.write(live.sid, {"n": number}, key=key, timeout=BOUND)
        if delivery.delivered:
            live.received.add(number)

    async def keeper_is_killed(self, live: Live) -> None:
        self.live.remove(live)
        os.kill(live.keeper.pid, signal.SIGKILL)
        await self._ends(live, "keeper was killed")

    async def agent_is_killed(self, live: Live) -> None:
        self.live.remove(live)
        os.kill(live.agent.pid, signal.SIGKILL)
        await self._ends(live, "agent was killed")

    async def keeper_freezes_and_agent_is_killed(self, live: Live) -> None:
        self.live.remove(live)
        os.kill(live.keeper.pid, signal.SIGSTOP)
        os.kill(live.agent.pid, signal.SIGKILL)
        await self._ends(live, "keeper is frozen, agent was killed")

    async def is_stopped(self, live: Live) -> None:
        self.live.remove(live)
        await live.manager.stop(live.sid)
        self.fault.holds(self._is_gone(live), f"{live.sid} was stopped and is gone at once")
        await self._ends(live, "was stopped")

    async def is_stopped_while_frozen(self, live: Live) -> None:
        os.kill(live.keeper.pid, signal.SIGSTOP)
        await self.is_stopped(live)

    async def _ends(self, live: Live, how: str) -> None:
        await self.eventually(lambda: self._is_gone(live), f"{live.sid} {how} and is gone")
        self.ended.add(live.sid)
        self._not_twice(live)
        live.record.unlink()

    def _is_gone(self, live: Live) -> bool:
        names = [self.folder / f"{live.sid}{ending}" for ending in ENDINGS]
        files = any(name.exists() or name.is_socket() for name in names)
        return not (files or alive(live.keeper) or alive(live.agent))

    async def files_name_an_innocent(self) -> None:
        self._next += 1
        sid = f"stale{self._next}"
        await asyncio.to_thread(stale_pair, self.folder, sid)
        innocent = self.random.choice(self.blameless)
        (self.folder / f"{sid}.rpc.sock.pid").write_text(str(innocent.pid))
        (self.folder / f"{sid}.rpc.sock.pi-pid").write_text(str(innocent.pid))
        left = [self.folder / f"{sid}{ending}" for ending in ENDINGS]
        await self.eventually(lambda: not any(map(os.path.lexists, left)), f"{sid} is cleaned")
        self.ended.add(sid)

    def check(self) -> None:
        """What holds at every moment."""
        names = set(os.listdir(self.folder))
        for live in self.live:
            for who, process in (("keeper", live.keeper), ("agent", live.agent)):
                self.fault.holds(alive(process), f"{live.sid}: its {who} lives")
            files = {f"{live.sid}{ending}" for ending in ENDINGS}
            self.fault.holds(files <= names, f"{live.sid} has its files: {files - names}")
        back = {claims(name) for name in names} & self.ended
        self.fault.holds(not back, f"what was ended stays away: {back}")
        for innocent in self.blameless:
            self.fault.holds(not (told := harm(innocent)), told)

    async def is_right_at_the_end(self) -> None:
        self.check()
        for live in self.live:
            await self._has_arrived(live)
        expected = {f"{live.sid}{ending}" for live in self.live for ending in ENDINGS}
        found = {name for name in os.listdir(self.folder) if claims(name) or ".taken-" in name}
        self.fault.holds(found == expected, f"exactly the living are left: {found ^ expected}")
        self.fault.holds(self.live, "some live at the end")


@dataclass(frozen=True)
class Sample:
    at: float
    rss: int
    fds: int
    threads: int
    sessions: int


class Meter:
    """What the daemon that runs takes."""

    def __init__(self, daemon: Daemon, world: World) -> None:
        self.samples: list[Sample] = []
        self._daemon = daemon
        self._world = world

    def take(self) -> None:
        pid = self._daemon.process.pid
        status = Path(f"/proc/{pid}/status").read_text()
        threads = int(status.partition("Threads:")[2].split()[0])
        fds, now = len(os.listdir(f"/proc/{pid}/fd")), time.monotonic()
        self.samples.append(Sample(now, memory(pid), fds, threads, len(self._world.live)))

    def judge(self, fault: Fault) -> str:
        """Judge one daemon's samples, the first fifth of its time for warming up left out."""
        samples = self.samples[len(self.samples) // 5 :]
        for sample in samples:
            room = 2 * (sample.sessions + AT_ONCE) + SPARE_FDS
            fault.holds(sample.fds <= room, f"descriptors: {sample}")
            fault.holds(sample.threads <= SPARE_THREADS, f"threads: {sample}")
        grown = samples[-1].rss - samples[0].rss
        fault.holds(grown <= GROWTH, f"grown by {grown} bytes")
        minutes = (samples[-1].at - samples[0].at) / 60
        slope = _slope(samples) * 60
        fault.holds(minutes < 5 or slope <= SLOPE, f"grows by {slope:.0f} bytes a minute")
        last = samples[-1]
        return (
            f"{minutes:.1f} min: rss {samples[0].rss // 1024} -> {last.rss // 1024} KiB, "
            f"{slope / 1024:.1f} KiB/min; fds {max(s.fds for s in samples)} at most, "
            f"{last.fds} at the end; threads {max(s.threads for s in samples)} at most; "
            f"sessions {last.sessions}"
        )


def _slope(samples: list[Sample]) -> float:
    """Bytes a second, by least squares."""
    times = [sample.at for sample in samples]
    middle = sum(times) / len(times)
    square = sum((at - middle) ** 2 for at in times) or 1.0
    return sum((s.at - middle) * s.rss for s in samples) / square


async def _soak(world: World, meter: Meter, daemon: Daemon, managers: list[KeeperManager]) -> None:
    """All at once; the daemon that lives in the second half of the time is measured."""
    begun = time.monotonic()
    half, end = begun + SECONDS / 2, begun + SECONDS
    measuring = asyncio.Event()

    async def things_happen() -> None:
        while time.monotonic() < end:
            await world.step(managers)

    async def the_daemon_crashes() -> None:
        while time.monotonic() < half:
            await asyncio.to_thread(daemon.crash_and_restart)
            await asyncio.sleep(world.random.uniform(0.5, 1.0) * SECONDS / 20)
        measuring.set()

    async def all_is_watched() -> None:
        while time.monotonic() < end:
            world.check()
            if measuring.is_set():
                meter.take()
            await asyncio.sleep(0.25 if SECONDS < 60 else 1.0)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(things_happen())
        tasks.create_task(the_daemon_crashes())
        tasks.create_task(all_is_watched())
    meter.take()


@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.chaos(
    "random work, kills and stops for long",
    "the living live, keep their files and get each line once; the ended are gone; innocents "
    "get no signal; the daemon does not grow",
)
@asynchronous
async def test_random_sessions_for_long(
    tmp_path: Path,
    manager: KeeperManager,
    node_manager: KeeperManager,
    daemon: Daemon,
    fault: Fault,
) -> None:
    world = World(daemon.folder, tmp_path, fault, SEED)
    meter = Meter(daemon, world)
    with innocents(4) as world.blameless:
        await _soak(world, meter, daemon, [manager, node_manager])
        await world.is_right_at_the_end()
    fault.holds(daemon.end() == 0, "the daemon ends well")
    told = f"seed {SEED}: {len(world.ended)} ended, {len(world.live)} live; {meter.judge(fault)}"
    sys.stdout.write(f"{told}\n")  # for `pytest -s` or `-rP`
