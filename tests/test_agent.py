from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    NODE_KEEPER,
    PROGRAM,
    Daemon,
    alive,
    asynchronous,
    happens,
    identity,
    program_environment,
)

from reconciler.errors import NoSuchSessionError
from reconciler.keeper import KeeperManager, SpawnedKeeper
from reconciler.requests import OUR_KEEPER
from reconciler.rpc_writer import RpcWriter

SID = "8c2c7f0e-2a4b-4c57-9d63-3f6f3f1f2a10"
TOOLS = Path(__file__).parents[1] / ".tools" / "agent" / "node_modules" / ".bin" / "pi"
AGENT = Path(os.environ.get("PI_AGENT_BIN", TOOLS))

pytestmark = [pytest.mark.agent, pytest.mark.timeout(240)]
MAKES = pytest.mark.parametrize(
    "make", [OUR_KEEPER, ("node", str(NODE_KEEPER))], ids=["ours", "other"]
)


@pytest.fixture(autouse=True)
def agent_is_there() -> None:
    """Skip without the agent, but never where CI counts on it."""
    if not AGENT.exists():
        word = f"the agent is not at {AGENT}: run `make agent`, or set PI_AGENT_BIN"
        if os.environ.get("CI") == "true":
            pytest.fail(word)
        pytest.skip(word)


class Agent:
    """A session with the real agent, offline, and what it does."""

    def __init__(self, folder: Path, make: tuple[str, ...]) -> None:
        self.folder = folder
        self.home = folder.parents[2]
        self.manager = KeeperManager(folder, keeper_command=make)
        self.writer = RpcWriter(folder)

    async def spawn(self) -> SpawnedKeeper:
        return await self.manager.spawn(
            SID,
            cwd=self.home,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home)},
            agent_command=(str(AGENT), "--mode", "rpc", "--offline", "--no-session"),
            capture=True,
            timeout=60,
        )

    def append(self, word: str) -> dict[str, Any]:
        """The command that leaves a word on disk: a line for each time it is carried out."""
        command = f"printf '%s\\n' {word} >> {self.home}/effects"
        return {"type": "bash", "command": command, "id": word}

    def answered(self, word: str) -> Callable[[], bool]:
        """Whether the agent has said, on its output, that a command is through."""

        def said() -> bool:
            lines = (self.folder / f"keeper-{SID}.log").read_text().splitlines()
            told = [json.loads(line) for line in lines if line.startswith("{")]
            answers = [each for each in told if each.get("type") == "response"]
            return any(each.get("id") == word for each in answers)

        return said

    @property
    def effects(self) -> list[str]:
        return (self.home / "effects").read_text().splitlines()

    @property
    def files(self) -> list[str]:
        return [path.name for path in self.folder.glob("*.rpc.sock*")]


@MAKES
@asynchronous
async def test_a_command_takes_effect_exactly_once(folder: Path, make: tuple[str, ...]) -> None:
    agent = Agent(folder, make)
    await agent.spawn()
    delivery = await agent.writer.write(SID, agent.append("library"))
    assert delivery.delivered
    await happens(agent.answered("library"), "the agent answers")
    assert agent.effects == ["library"]
    line = json.dumps(agent.append("command-line"))
    done = subprocess.run(  # noqa: ASYNC221 - nothing else is to happen meanwhile
        (*PROGRAM, "write", "--sessions-dir", str(folder), SID, line),
        env=program_environment(folder),
        check=False,
    )
    assert done.returncode == 0
    await happens(agent.answered("command-line"), "the agent answers")
    assert agent.effects == ["library", "command-line"]
    assert not (await agent.manager.stop(SID)).elapsed > 10
    assert agent.files == []


@MAKES
@asynchronous
async def test_its_keeper_is_killed(folder: Path, daemon: Daemon, make: tuple[str, ...]) -> None:
    agent = Agent(folder, make)
    spawned = await agent.spawn()
    await agent.writer.write(SID, agent.append("before"))
    await happens(agent.answered("before"), "the agent answers")
    os.kill(spawned.keeper_pid, signal.SIGKILL)
    await happens(lambda: agent.files == [], "the files are gone")
    await happens(lambda: not alive(spawned.agent_pid or 0), "the agent is dead")
    await happens(lambda: daemon.of("session.cleaned", SID), "the log says so")
    (line,) = daemon.of("session.cleaned", SID)
    assert line["reason"] == "keeper dead"
    assert line["keeper_pid"] == spawned.keeper_pid
    assert line["since_exit_ms"] >= 0
    delivery = await agent.writer.write(SID, agent.append("after"))
    assert not delivery.delivered
    assert agent.effects == ["before"]


@MAKES
@asynchronous
async def test_it_is_killed_while_its_keeper_is_stopped(
    folder: Path, daemon: Daemon, make: tuple[str, ...]
) -> None:
    agent = Agent(folder, make)
    spawned = await agent.spawn()
    os.kill(spawned.keeper_pid, signal.SIGSTOP)
    os.kill(spawned.agent_pid or 0, signal.SIGKILL)
    await happens(lambda: daemon.of("session.cleaned", SID), "the session is cleaned up after")
    assert agent.files == []
    assert not alive(spawned.keeper_pid)
    (stopped,) = daemon.of("keeper.stopped", SID)
    (cleaned,) = daemon.of("session.cleaned", SID)
    assert stopped["detail"] == "ended by SIGKILL"
    assert stopped["timestamp"] < cleaned["timestamp"]


@MAKES
@asynchronous
async def test_the_daemon_ends_and_all_is_as_it_was(
    folder: Path, daemon: Daemon, make: tuple[str, ...]
) -> None:
    agent = Agent(folder, make)
    spawned = await agent.spawn()
    before = (identity(spawned.keeper_pid), identity(spawned.agent_pid or 0))
    files = sorted(agent.files)
    assert daemon.end() == 0
    assert (identity(spawned.keeper_pid), identity(spawned.agent_pid or 0)) == before
    assert sorted(agent.files) == files
    assert (await agent.writer.write(SID, agent.append("after"))).delivered
    await happens(agent.answered("after"), "the agent answers")
    assert agent.effects == ["after"]


@pytest.mark.parametrize("victim", ["keeper", "agent"])
@asynchronous
async def test_what_a_command_goes_on_with_is_told_and_ended_by_stop(
    folder: Path, daemon: Daemon, victim: str
) -> None:
    agent = Agent(folder, OUR_KEEPER)
    spawned = await agent.spawn()
    slow = {"type": "bash", "command": "sleep 1000", "id": "slow"}
    assert (await agent.writer.write(SID, slow)).delivered
    await happens(lambda: "sleep" in left_by(agent.manager), "the command runs")
    pid = left_by(agent.manager)["sleep"]
    os.kill(spawned.keeper_pid if victim == "keeper" else spawned.agent_pid or 0, signal.SIGKILL)
    await happens(lambda: daemon.of("session.leftovers", SID), "the log tells it")
    (line,) = daemon.of("session.leftovers", SID)
    assert f"{pid} sleep" in line["leftovers"]
    assert alive(pid)
    assert agent.files == []
    assert (await agent.manager.stop(SID)).leftovers == line["leftover_count"]
    assert not alive(pid)


def left_by(manager: KeeperManager) -> dict[str, int]:
    """What the session has started: pids by the names of the programs."""
    try:
        seen = manager.inspect(SID).seen
    except NoSuchSessionError:
        return {}
    return {each.name: each.process.pid for each in seen.leftovers}
