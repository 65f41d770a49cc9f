"""A daemon that is started under some trouble, and those whom nothing may harm meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
from chaos import CAMPAIGN, Fault
from conftest import (
    HUNG,
    NODE_KEEPER,
    PROGRAM,
    SINK,
    Daemon,
    alive,
    dead_pid,
    identity,
    program_environment,
    until,
)
from stand_ins import agent_of

from reconciler.keeper import KeeperManager, SpawnedKeeper
from reconciler.rpc_writer import BlockingRpcWriter, WritePolicy

RECORDER = (
    "import os, signal, sys\n"
    "told = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)\n"
    "for number in sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}):\n"
    "    signal.signal(number, lambda number, _: os.write(told, b'signal %d\\n' % number))\n"
    "os.write(told, b'ready\\n')\n"
    "while line := os.read(0, 65536): os.write(told, line)\n"
)
"""An agent, or nobody's process, that writes down its lines, and every signal but the two."""

QUICK = """
[policy]
settle = 0.5
start_grace = 1.0
orphan_grace = 0.1
lost_grace = 1.0
rebind_grace = 0.3
[ladder]
term_grace = 0.2
"""
"""Settings with short times, for the short rounds; the campaign goes by the defaults."""

PATIENT = WritePolicy(progress_timeout=5.0)
"""For a write that must arrive on a machine that is busy with other things."""


class Hampered(Daemon):
    """The background process with something before its command line; killed at the end.

    Args:
        folder: the sessions folder.
        log: the file that its log goes to.
        before: a program that makes the trouble and then becomes the daemon (exec).
        options: further options of ``run``.
        environment: further variables.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        *,
        before: Sequence[str] = (),
        options: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self._before, self._options = before, options
        self._settings = folder.parent / "settings.toml"
        self._settings.write_text("" if CAMPAIGN else QUICK)
        self._environment = environment or {}
        super().__init__(folder, log)

    def _start(self) -> subprocess.Popen[bytes]:
        started = self._count("reconciler.started")
        folder = ("--sessions-dir", str(self.folder), "--config", str(self._settings))
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                (*self._before, *PROGRAM, "run", "--log-form", "json", *folder, *self._options),
                stdout=log,
                stderr=log,
                env=program_environment(self.folder) | self._environment,
            )
        until(lambda: self._count("reconciler.started") > started, "the daemon runs")
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log so far; each whole line must be JSON."""
        return [
            json.loads(line)
            for line in self.log.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]

    def told(self, event: str) -> list[dict[str, Any]]:
        """The lines of one event."""
        return [line for line in self.lines if line["event"] == event]

    def cpu(self) -> float:
        """Seconds of processor time that it has used."""
        used = psutil.Process(self.process.pid).cpu_times()
        return float(used.user + used.system)

    def descriptors(self, kind: str) -> list[str]:
        """Its descriptors of a kind, as the kernel names it: ``[pidfd]``, ``inotify``."""
        base = f"/proc/{self.process.pid}/fd"
        found = []
        for name in os.listdir(base):
            with contextlib.suppress(FileNotFoundError):
                if kind in os.readlink(f"{base}/{name}"):
                    found.append(name)
        return found


def recorder(told: Path) -> tuple[str, ...]:
    """The command of a `RECORDER`."""
    return (sys.executable, "-I", "-S", "-c", RECORDER, str(told))


class Bystanders:
    """Sessions that live, and a process that is nobody's keeper: none may come to harm.

    Args:
        manager: starts the sessions.
        scratch: where their agents write down what comes.
        count: how many sessions.
        env: their environment; this process's when left out.
    """

    def __init__(
        self,
        manager: KeeperManager,
        scratch: Path,
        count: int = 2,
        env: Mapping[str, str] | None = None,
    ) -> None:
        scratch.mkdir(exist_ok=True)
        self._manager = manager
        self._told = {f"bystander{number}": scratch / str(number) for number in range(count)}
        self._innocents_word = scratch / "innocent"
        self.innocent = subprocess.Popen(recorder(self._innocents_word), stdin=subprocess.PIPE)
        commands = {sid: recorder(told) for sid, told in self._told.items()}
        self.keepers = spawn_all(manager, commands, env=env)
        until(lambda: all(map(is_ready, (*self._told.values(), self._innocents_word))))
        agents = [agent_of(manager, sid) for sid in self._told]
        pids = [*(each.keeper_pid for each in self.keepers), *agents, self.innocent.pid]
        self._identities = [identity(pid) for pid in pids]
        self._words = 0

    def unharmed(self, fault: Fault) -> None:
        """Check each: the same processes, no signal, their files, and a line arrives."""
        for process in self._identities:
            same = alive(process.pid) and identity(process.pid) == process
            fault.holds(same, f"process {process.pid} lives on")
        fault.holds(self._innocents_word.read_text() == "ready\n", "no signal to the innocent")
        folder = self._manager.sessions_dir
        for sid, told in self._told.items():
            for name in (f"{sid}.rpc.sock", f"{sid}.rpc.sock.pid", f"{sid}.rpc.sock.pi-pid"):
                fault.holds((folder / name).exists(), f"{name} is there")
            fault.holds("signal" not in told.read_text(), f"no signal to the agent of {sid}")
            self.hears(fault, sid)

    def hears(self, fault: Fault, sid: str) -> None:
        """Check that a line that is written to a session now arrives at its agent."""
        self._words += 1
        word = f"word {self._words}"
        writer = BlockingRpcWriter(self._manager.sessions_dir, policy=PATIENT)
        delivery = writer.write(sid, {"say": word})
        fault.holds(delivery.delivered, f"a line to {sid}: {delivery.reason}")
        told = self._told[sid]
        until(lambda: not delivery.delivered or word in told.read_text(), f"{word} to {sid}")

    def end(self) -> None:
        """The innocent ends; the sessions end with their folder."""
        with self.innocent:
            self.innocent.kill()


def is_ready(told: Path) -> bool:
    """Whether a recorder has begun to write down what comes."""
    return told.exists() and "ready" in told.read_text()


@contextlib.contextmanager
def bystanders(
    manager: KeeperManager, scratch: Path, count: int = 2, env: Mapping[str, str] | None = None
) -> Iterator[Bystanders]:
    """`Bystanders`, whose innocent ends at the end."""
    those = Bystanders(manager, scratch, count, env)
    try:
        yield those
    finally:
        those.end()


def spawn_all(
    manager: KeeperManager,
    commands: Mapping[str, Sequence[str]],
    *,
    env: Mapping[str, str] | None = None,
) -> list[SpawnedKeeper]:
    """Start a session for each id, some at a time; their agents are up and known."""
    return spawn_these([(manager, sid, command) for sid, command in commands.items()], env)


def spawn_these(
    sessions: Iterable[tuple[KeeperManager, str, Sequence[str]]],
    env: Mapping[str, str] | None = None,
) -> list[SpawnedKeeper]:
    """Start sessions of several makes: manager, id and the agent's command of each."""

    async def main() -> list[SpawnedKeeper]:
        room = asyncio.Semaphore(40)

        async def one(manager: KeeperManager, sid: str, command: Sequence[str]) -> SpawnedKeeper:
            async with room:
                return await manager.spawn(sid, agent_command=command, env=env, timeout=60)

        return await asyncio.gather(*(one(*each) for each in sessions))

    return asyncio.run(main())


def stale_pairs(folder: Path, sids: Iterable[str]) -> None:
    """Leave what killed keepers leave, many at a time, by this very process."""
    text = str(dead_pid())
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        for sid in sids:
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(f"/proc/self/fd/{directory}/{sid}.rpc.sock")
            (folder / f"{sid}.rpc.sock.pid").write_text(text)
    finally:
        os.close(directory)


def left_by(folder: Path, sids: Iterable[str]) -> list[str]:
    """The claims of these sessions that still stand in a folder, taken ones among them."""
    known = frozenset(sids)
    return [name for name in os.listdir(folder) if _session(name) in known]


def _session(name: str) -> str:
    return name.removeprefix(".").partition(".rpc.sock")[0]


def gone(folder: Path, sids: Sequence[str]) -> Callable[[], bool]:
    """Says whether nothing of these sessions is left."""
    return lambda: not left_by(folder, sids)


def leave(folder: Path, name: str) -> tuple[list[str], list[int]]:
    """Leave every kind of thing that must go; the sessions, and the processes that live on.

    A pair of files without a process, killed keepers, an agent that outlives its keeper, and
    a keeper that is held up, so that it cannot end with its agent.
    """
    ours = KeeperManager(folder)
    node = KeeperManager(folder, keeper_command=("node", str(NODE_KEEPER)))
    killed = [f"{name}-killed{number}" for number in range(5 if CAMPAIGN else 1)]
    stale, orphaned, hung = f"{name}-stale", f"{name}-orphaned", f"{name}-hung"
    sessions = [(ours, hung, SINK), (node, orphaned, HUNG), *((ours, sid, SINK) for sid in killed)]
    held, parent, *others = spawn_these(sessions)
    agent, orphan = (agent_of(ours, sid) for sid in (hung, orphaned))
    stale_pairs(folder, [stale])
    os.kill(held.keeper_pid, signal.SIGSTOP)
    for pid in (agent, parent.keeper_pid, *(each.keeper_pid for each in others)):
        os.kill(pid, signal.SIGKILL)
    return [stale, hung, orphaned, *killed], [held.keeper_pid, orphan]


def all_goes(fault: Fault, folder: Path, left: tuple[list[str], list[int]]) -> None:
    """Check that what was left goes: files and processes."""
    sids, pids = left
    until(gone(folder, sids), "all files are cleaned")
    fault.holds(not any(map(alive, pids)), "keeper and agents without each other were ended")
