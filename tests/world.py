"""Sessions that come and go at random: real keepers, agents and files."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import uuid
from pathlib import Path

from conftest import HUNG, SINK, WAIT, bare_socket, identity, stale_pair

from reconciler.keeper import KeeperManager, SpawnedKeeper
from reconciler.layout import claims
from reconciler.stopping import outlast

ENDINGS = (".rpc.sock", ".rpc.sock.pid", ".rpc.sock.pi-pid")


class World:
    """Sessions that come and go at random, and what must be left of them at the end."""

    def __init__(self, folder: Path, ours: KeeperManager, other: KeeperManager, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.alive: dict[str, SpawnedKeeper] = {}
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
        await outlast((first,), manager.ladder)
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
