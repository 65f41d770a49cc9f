from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
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
    program_environment,
    until,
)
from world import World

from reconciler.keeper import KeeperManager
from reconciler.layout import claims

CAMPAIGN = bool(os.environ.get("PI_RECONCILER_CAMPAIGN"))
SESSIONS = int(os.environ.get("PI_RECONCILER_SESSIONS", "200"))
SEEDS = range(5 if CAMPAIGN else 1)
RESTARTS = 10
AT_ONCE = 6


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
    until(lambda: daemon.of("agent.stopped", "other"), "it is told")


def test_a_second_daemon_refuses_and_names_the_first(folder: Path, daemon: Daemon) -> None:
    command = (*PROGRAM, "run", "--sessions-dir", str(folder))
    second = subprocess.run(
        command, capture_output=True, text=True, env=program_environment(folder), check=False
    )
    assert second.returncode == 1
    assert f"process {daemon.process.pid}" in second.stderr
    daemon.crash_and_restart()
    assert daemon.end() == 0


def files(folder: Path) -> dict[Path, tuple[int, ...]]:
    """What stands in a folder, by all that only a change changes: a connect is a read."""
    kept = ("st_dev", "st_ino", "st_mode", "st_size", "st_mtime_ns", "st_ctime_ns")
    return {
        path: tuple(getattr(path.lstat(), name) for name in kept)
        for path in folder.glob("*.rpc.sock*")
    }


@asynchronous
async def test_a_daemon_that_ends_leaves_every_keeper_agent_and_file_as_it_was(
    folder: Path, manager: KeeperManager, daemon: Daemon
) -> None:
    spawned = await manager.spawn("s", agent_command=SINK)
    before = files(folder)
    begun = time.monotonic()
    assert daemon.end() == 0
    assert time.monotonic() - begun < WAIT
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(spawned.socket)
    assert alive(spawned.keeper_pid)
    assert alive(spawned.agent_pid or 0)
    assert files(folder) == before
    assert len(before) == 3
