from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from conftest import (
    HUNG,
    PROGRAM,
    SINK,
    WAIT,
    Daemon,
    alive,
    asynchronous,
    bare_socket,
    identity,
    program_environment,
    stale_pair,
    until,
)

from reconciler.keeper import KeeperManager, SpawnedKeeper
from reconciler.layout import claims

CAMPAIGN = bool(os.environ.get("PI_RECONCILER_CAMPAIGN"))
SESSIONS = int(os.environ.get("PI_RECONCILER_SESSIONS", "200"))
SEEDS = range(5 if CAMPAIGN else 1)
RESTARTS = 10
AT_ONCE = 6
ENDINGS = (".rpc.sock", ".rpc.sock.pid", ".rpc.sock.pi-pid")


class World:
    """Sessions that come and go at random, and what must be left of them at the end."""

    def __init__(self, folder: Path, ours: KeeperManager, other: KeeperManager, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.alive: dict[str, SpawnedKeeper] = {}
        self.innocents: set[str] = set()
        self._ours = ours
        self._other = other
        self._fates = (
            *(self.lives_on, self.lives_on),
            *(self.keeper_is_killed, self.keeper_is_killed, self.agent_is_killed),
            *(self.hangs_without_agent, self.is_stopped, self.leaves_files, self.comes_back),
        )

    async def session(self) -> None:
        """One session's life."""
        sid = str(uuid.UUID(int=self.random.getrandbits(128)))
        manager = self._other if self.random.random() < 0.1 else self._ours
        await self.random.choice(self._fates)(sid, manager)

    async def _spawn(self, sid: str, manager: KeeperManager) -> SpawnedKeeper:
        agent = SINK if self.random.random() < 0.5 else HUNG
        return await manager.spawn(sid, agent_command=agent, ready=False, timeout=60)

    async def lives_on(self, sid: str, manager: KeeperManager) -> None:
        self.alive[sid] = await self._spawn(sid, manager)

    async def keeper_is_killed(self, sid: str, manager: KeeperManager) -> None:
        os.kill((await self._spawn(sid, manager)).keeper_pid, signal.SIGKILL)

    async def agent_is_killed(self, sid: str, manager: KeeperManager) -> None:
        await self._spawn(sid, manager)
        os.kill(await self._agent(sid), signal.SIGKILL)

    async def hangs_without_agent(self, sid: str, manager: KeeperManager) -> None:
        spawned = await self._spawn(sid, manager)
        agent = await self._agent(sid)
        os.kill(spawned.keeper_pid, signal.SIGSTOP)
        os.kill(agent, signal.SIGKILL)

    async def is_stopped(self, sid: str, manager: KeeperManager) -> None:
        await self._spawn(sid, manager)
        await manager.stop(sid)

    async def leaves_files(self, sid: str, manager: KeeperManager) -> None:
        del manager
        self.random.choice((stale_pair, self._leave_socket, self._leave_pid_file))(self.folder, sid)

    async def comes_back(self, sid: str, manager: KeeperManager) -> None:
        first = identity((await manager.spawn(sid, agent_command=HUNG)).keeper_pid)
        os.kill(first.pid, signal.SIGKILL)
        await manager.outlast((first,))
        self.alive[sid] = await self._spawn(sid, manager)

    def _leave_socket(self, folder: Path, sid: str) -> None:
        bare_socket(folder / f"{sid}.rpc.sock")

    def _leave_pid_file(self, folder: Path, sid: str) -> None:
        (folder / f"{sid}.rpc.sock.pid").write_text(self.random.choice(("", "x", "999999999")))

    async def _agent(self, sid: str) -> int:
        """The agent's pid, once the keeper has written it down."""
        path = self.folder / f"{sid}.rpc.sock.pi-pid"
        async with asyncio.timeout(WAIT):
            while not (path.exists() and path.read_text()):  # noqa: ASYNC110 - a file
                await asyncio.sleep(0.005)
        return int(path.read_text())

    def expected(self) -> set[str]:
        return {f"{sid}{ending}" for sid in self.alive for ending in ENDINGS}

    def found(self) -> set[str]:
        return {name for name in os.listdir(self.folder) if claims(name) or ".taken-" in name}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", SEEDS)
@asynchronous
async def test_sessions_come_and_go_while_the_daemon_is_killed_again_and_again(
    folder: Path, manager: KeeperManager, node_manager: KeeperManager, daemon: Daemon, seed: int
) -> None:
    world = World(folder, manager, node_manager, seed)
    width = asyncio.Semaphore(AT_ONCE)
    begun = 0

    async def one() -> None:
        nonlocal begun
        async with width:
            begun += 1
            if begun % max(1, SESSIONS // RESTARTS) == 0:
                daemon.crash_and_restart()
            await world.session()

    await asyncio.gather(*(one() for _ in range(SESSIONS)))
    until(lambda: world.found() == world.expected(), "exactly the live ones are left")
    assert world.alive
    for sid, spawned in world.alive.items():
        assert alive(spawned.keeper_pid)
        assert (folder / f"{sid}.rpc.sock.pid").read_text() == str(spawned.keeper_pid)
        assert alive(int((folder / f"{sid}.rpc.sock.pi-pid").read_text()))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(spawned.socket)
    assert {entry.sid for entry in await manager.discover()} == set(world.alive)
    assert daemon.end() == 0
    assert world.found() == world.expected()


@asynchronous
async def test_what_died_while_no_daemon_ran_is_cleaned_at_its_start(
    folder: Path, manager: KeeperManager, node_manager: KeeperManager, daemon: Daemon
) -> None:
    daemon.process.kill()
    daemon.process.wait()
    agents = []
    for sid, each in (("ours", manager), ("other", node_manager), ("lives", manager)):
        spawned = await each.spawn(sid, agent_command=HUNG)
        if sid != "lives":
            os.kill(spawned.keeper_pid, signal.SIGKILL)
            agents.append(spawned.agent_pid or 0)
    daemon.process = daemon._start()
    until(lambda: {name.split(".")[0] for name in os.listdir(folder) if claims(name)} == {"lives"})
    until(lambda: not any(map(alive, agents)), "their agents are dead")
    assert daemon.of("agent.stopped", "other")


def test_a_second_daemon_refuses_and_names_the_first(folder: Path, daemon: Daemon) -> None:
    command = (*PROGRAM, "run", "--sessions-dir", str(folder))
    second = subprocess.run(
        command, capture_output=True, text=True, env=program_environment(folder), check=False
    )
    assert second.returncode == 1
    assert f"process {daemon.process.pid}" in second.stderr
    daemon.crash_and_restart()
    assert daemon.end() == 0


@asynchronous
async def test_a_daemon_that_ends_leaves_every_keeper_agent_and_file_as_it_was(
    folder: Path, manager: KeeperManager, daemon: Daemon
) -> None:
    spawned = await manager.spawn("s", agent_command=SINK)
    before = {path: path.lstat() for path in folder.glob("*.rpc.sock*")}
    begun = time.monotonic()
    assert daemon.end() == 0
    assert time.monotonic() - begun < WAIT
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(spawned.socket)
    assert alive(spawned.keeper_pid)
    assert alive(spawned.agent_pid or 0)
    assert {path: path.lstat() for path in folder.glob("*.rpc.sock*")} == before
    assert len(before) == 3
