"""Delivery to the real agent: every command takes effect once, whatever happens beside it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import pytest
from conftest import SINK, Daemon, asynchronous

from reconciler.keeper import KeeperManager
from reconciler.rpc_writer import Delivery, RpcWriter, WritePolicy

TOOLS = Path(__file__).parents[1] / ".tools" / "agent" / "node_modules" / ".bin" / "pi"
AGENT = Path(os.environ.get("PI_AGENT_BIN", TOOLS))
SESSIONS = ("agent-1", "agent-2", "agent-3")
CALLERS, LINES = 20, 50
BOUND = 60.0
PATIENT = WritePolicy(progress_timeout=20.0)

pytestmark = [pytest.mark.agent, pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def agent_is_there() -> None:
    """Skip without the agent, but never where CI counts on it."""
    if not AGENT.exists():
        word = f"the agent is not at {AGENT}: run `make agent`, or set PI_AGENT_BIN"
        if os.environ.get("CI") == "true":
            pytest.fail(word)
        pytest.skip(word)


class Agents:
    """Sessions with the real agent, and what their commands left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder.parents[2]
        self.manager = KeeperManager(folder)

    async def spawn(self, sid: str) -> None:
        await self.manager.spawn(
            sid,
            cwd=self.home,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home)},
            agent_command=(str(AGENT), "--mode", "rpc", "--offline", "--no-session"),
            capture=True,
            timeout=60,
        )

    def command(self, sid: str, word: str) -> dict[str, object]:
        """A command that appends a word to the session's file. The agent runs many at once."""
        return {"type": "bash", "command": f"echo {word} >> {self.home}/{sid}", "id": word}

    def effects(self, sid: str) -> list[str]:
        path = self.home / sid
        return path.read_text().splitlines() if path.exists() else []

    def answered(self, sid: str) -> list[str]:
        """The ids that the agent has answered, each time that it has."""
        text = (self.folder / f"keeper-{sid}.log").read_text()
        whole = (line for line in text.splitlines(keepends=True) if line.endswith("}\n"))
        told = (json.loads(line) for line in whole if line.startswith("{"))
        return [each["id"] for each in told if each.get("type") == "response"]


async def killing_others(manager: KeeperManager, lane: int, killed: list[int]) -> None:
    """Start keepers of other sessions and kill them, for as long as nobody says stop."""
    for number in itertools.count():
        spawned = await manager.spawn(f"other-{lane}-{number}", agent_command=SINK)
        os.kill(spawned.keeper_pid, signal.SIGKILL)
        killed.append(spawned.keeper_pid)


@contextlib.asynccontextmanager
async def beside(*work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Cancel work in the end; none of it may have failed."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def happens(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < give_up, f"waited {BOUND:g} s in vain: {what}"
        await asyncio.sleep(0.05)


@asynchronous
async def test_a_thousand_commands_take_effect_exactly_once(folder: Path, daemon: Daemon) -> None:
    """Every second caller writes with keys, and each of his lines twice."""
    agents, writer = Agents(folder), RpcWriter(folder, policy=PATIENT)
    await asyncio.gather(*(agents.spawn(sid) for sid in SESSIONS))
    expected: dict[str, list[str]] = {sid: [] for sid in SESSIONS}

    async def call(caller: int) -> list[Delivery]:
        deliveries = []
        for number in range(LINES):
            sid, word = SESSIONS[(caller + number) % len(SESSIONS)], f"{caller}-{number}"
            command = agents.command(sid, word)
            expected[sid].append(word)
            if caller % 2:
                deliveries.append(await writer.write(sid, command, key=word))
                deliveries.append(await writer.write(sid, command, key=word))
            else:
                deliveries.append(await writer.write(sid, command))
        return deliveries

    def all_is_answered() -> bool:
        return all(len(agents.answered(sid)) >= len(expected[sid]) for sid in SESSIONS)

    killed: list[int] = []
    async with beside(*(killing_others(agents.manager, lane, killed) for lane in range(4))):
        told = await asyncio.gather(*map(call, range(CALLERS)))
        await happens(all_is_answered, "all is answered")
    deliveries = [delivery for each in told for delivery in each]
    assert len(deliveries) == CALLERS * LINES * 3 // 2
    assert all(delivery.delivered for delivery in deliveries)
    for sid in SESSIONS:
        once = collections.Counter(expected[sid])
        assert collections.Counter(agents.answered(sid)) == once
        assert collections.Counter(agents.effects(sid)) == once
    assert sum(map(len, expected.values())) == CALLERS * LINES
    assert len(killed) >= 4, "keepers of other sessions were killed meanwhile"
    assert not [sid for sid in SESSIONS if daemon.of("session.cleaned", sid)]
