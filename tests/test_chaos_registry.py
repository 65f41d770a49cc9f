"""The dashboard's spawn registry in every state in which it should not be."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos import Fault
from conftest import (
    HUNG,
    PROGRAM,
    Daemon,
    dead_pid,
    identity,
    program_environment,
    root,
    stale_pair,
    until,
)
from innocents import harm, innocents
from stand_ins import kill

from reconciler.keeper import KeeperManager
from reconciler.layout import registry_file
from reconciler.observations import ProcessId
from reconciler.processes import SYSTEM
from reconciler.registry import LIMIT

CHANGES = 60
"""How often the registry is replaced while it is read."""


@dataclass
class People:
    """Who a registry may name."""

    blameless: list[ProcessId]
    spawned: list[ProcessId]
    """Innocents that have, as agents do, the dashboard's mark in their environment."""
    keeper: ProcessId
    agent: ProcessId

    def named(self, sid: str) -> list[dict[str, object]]:
        """Entries in which they are the agents of a dead session, and its keepers."""
        agents = [process.pid for process in (*self.blameless, self.keeper, self.agent)]
        pairs: list[dict[str, object]] = [
            {"pid": 1, "piPid": agent, "keeperPid": keeper}
            for agent, keeper in itertools.product(agents, agents)
        ]
        return [*pairs, *({**pair, "keeperSockPath": f"/x/{sid}.rpc.sock"} for pair in pairs)]


Write = Callable[[Path, list[dict[str, object]]], None]


def text(path: Path, content: bytes) -> None:
    """Replace the registry as the dashboard does."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)


def valid(entries: object) -> bytes:
    return json.dumps({"entries": entries}).encode()


def just_under(entries: list[dict[str, object]]) -> bytes:
    """A registry as large as may be read; the entries that count come last."""
    start, end = b'{"entries":[', json.dumps(entries).encode()[1:] + b"}"
    other = json.dumps({"piPid": 2, "keeperSockPath": f"/x/{'o' * 60}.rpc.sock"}).encode() + b","
    body = other * ((LIMIT - len(start) - len(end)) // len(other))
    return start + body + b" " * (LIMIT - len(start) - len(body) - len(end)) + end


def sparse(path: Path, size: int) -> None:
    new = path.with_suffix(".new")
    new.touch()
    os.truncate(new, size)
    os.replace(new, path)


def absent(_: Path, __: list[dict[str, object]]) -> None:
    """Nothing is there."""


def link(path: Path, entries: list[dict[str, object]]) -> None:
    aim = path.with_suffix(".aim")
    text(aim, valid(entries))
    path.symlink_to(aim)


USABLE: dict[str, Write] = {
    "absent": absent,
    "good": lambda path, entries: text(path, valid(entries)),
    "just under the limit": lambda path, entries: text(path, just_under(entries)),
    "wrong types inside": lambda path, _: text(
        path, valid([None, 1, [], {"piPid": "1"}, {"piPid": 1.5, "keeperPid": {}}, {"piPid": -1}])
    ),
}
UNUSABLE: dict[str, Write] = {
    "half": lambda path, entries: text(path, valid(entries)[:-7]),
    "empty": lambda path, _: text(path, b""),
    "over the limit": lambda path, entries: text(path, valid(entries).ljust(LIMIT + 1)),
    "huge": lambda path, _: sparse(path, 1 << 40),
    "NULs": lambda path, _: sparse(path, 4096),
    "a list": lambda path, entries: text(path, json.dumps(entries).encode()),
    "entries of a wrong type": lambda path, _: text(path, valid({"piPid": 2})),
    "deep": lambda path, _: text(path, b"[" * 1_000_000),
    "deep inside": lambda path, _: text(path, b'{"entries":[' + b'{"a":' * 500_000),
    "not UTF-8": lambda path, _: text(path, b'{"entries":[{"cwd":"\xff"}]}'),
    "a FIFO": lambda path, _: os.mkfifo(path),
    "a folder": lambda path, _: path.mkdir(),
    "a link": link,
    "a link to itself": lambda path, _: path.symlink_to(path),
}


def clear(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
        (path.rmdir if is_folder else path.unlink)()


def told(daemon: Daemon) -> int:
    return daemon.log.read_text().count('"registry.unusable"')


class World:
    """One folder, a session in it that lives, and those that die while a registry stands."""

    def __init__(self, manager: KeeperManager, people: People, fault: Fault) -> None:
        self.manager = manager
        self.people = people
        self.fault = fault
        self.path = registry_file(manager.sessions_dir)
        self._count = 0

    def files(self, sid: str) -> list[str]:
        return [
            name for name in os.listdir(self.manager.sessions_dir) if name.startswith(f"{sid}.")
        ]

    def sid(self) -> str:
        self._count += 1
        return f"dies-{self._count}"

    def sessions_die(self, write: Write, what: str) -> None:
        """A registry comes, and names the wrong ones for sessions that are looked at then."""
        stale, killed = self.sid(), self.sid()
        write(self.path, [*self.people.named(stale), *self.people.named(killed), *self._lies()])
        stale_pair(self.manager.sessions_dir, stale)
        spawned = asyncio.run(
            self.manager.spawn(killed, agent_command=HUNG, ready=False, timeout=60)
        )
        until(lambda: len(self.files(killed)) == 3, "it is up")
        kill(spawned.keeper_pid)
        until(lambda: not self.files(stale), f"{what}: what a dead keeper left is cleaned")
        until(lambda: not self.files(killed), f"{what}: a killed keeper's files are cleaned")

    def _lies(self) -> list[dict[str, object]]:
        """What the registry says of the session that lives: a dead agent, a wrong keeper."""
        socket = "/x/lives.rpc.sock"
        return [
            {"piPid": dead_pid(), "keeperPid": self.people.keeper.pid},
            {"piPid": self.people.blameless[0].pid, "keeperPid": 2, "keeperSockPath": socket},
        ]

    def nobody_is_harmed(self, what: str) -> None:
        for innocent in (*self.people.blameless, *self.people.spawned):
            self.fault.holds(not (seen := harm(innocent)), f"{what}: {seen}")
        for process in (self.people.keeper, self.people.agent):
            unharmed = SYSTEM.facts(process.pid).process == process
            self.fault.holds(unharmed, f"{what}: the session that lives is alive")
        self.fault.holds(len(self.files("lives")) == 3, f"{what}: it keeps its files")


@pytest.fixture
def world(manager: KeeperManager, fault: Fault) -> Iterator[World]:
    spawned = asyncio.run(manager.spawn("lives", agent_command=HUNG, timeout=60))
    with innocents(2) as blameless, innocents(1, PI_DASHBOARD_SPAWNED="1") as marked:
        agent = identity(spawned.agent_pid or 0)
        yield World(manager, People(blameless, marked, identity(spawned.keeper_pid), agent), fault)


CHECKED = "it is not known, and told once; nobody it names is harmed, and what is dead is cleaned"


@pytest.mark.timeout(900)
@pytest.mark.chaos("the spawn registry unusable, or lying", CHECKED)
def test_registries_that_cannot_be_used_and_such_that_lie(
    world: World, daemon: Daemon, fault: Fault
) -> None:
    for _ in fault.rounds(short=1, full=20):
        for what, write in {**USABLE, **UNUSABLE}.items():
            before = told(daemon)
            world.sessions_die(write, what)
            world.nobody_is_harmed(what)
            lines = told(daemon) - before
            fault.holds(lines == (what in UNUSABLE), f"{what}: told {lines} times")
            clear(world.path)
    fault.holds("session.failed" not in daemon.log.read_text(), "no look has failed")


@pytest.mark.timeout(300)
@pytest.mark.chaos("the spawn registry unusable, or lying", CHECKED)
def test_a_registry_that_is_replaced_while_it_is_read(
    world: World, daemon: Daemon, fault: Fault
) -> None:
    writes = [write for what, write in (USABLE | UNUSABLE).items() if "deep" not in what]
    ends = threading.Event()

    def replace() -> None:
        for write in itertools.cycle(writes):
            clear(world.path)
            write(world.path, world.people.named("lives"))
            time.sleep(0.001)
            if ends.is_set():
                return

    replacing = threading.Thread(target=replace)
    replacing.start()
    try:
        for _ in fault.rounds(short=2, full=CHANGES):
            world.sessions_die(absent, "replaced")
            world.nobody_is_harmed("replaced")
    finally:
        ends.set()
        replacing.join()
    fault.holds("session.failed" not in daemon.log.read_text(), "no look has failed")


@pytest.mark.chaos("the spawn registry unusable, or lying", CHECKED)
def test_who_may_be_the_agent_of_a_dead_session_is_left_alone(
    world: World, daemon: Daemon, fault: Fault
) -> None:
    """One with an agent's mark, of which nobody can tell whose it is."""
    fault.count(1)
    (marked,) = world.people.spawned
    text(world.path, valid([{"piPid": marked.pid, "keeperSockPath": "/x/may-be.rpc.sock"}]))
    stale_pair(world.manager.sessions_dir, "may-be")
    until(lambda: daemon.of("session.unverifiable", "may-be"), "it is told")
    fault.holds(len(world.files("may-be")) == 2, "its files stay")
    world.nobody_is_harmed("maybe")


@root
@pytest.mark.root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
@pytest.mark.chaos("the spawn registry unusable, or lying", CHECKED)
def test_a_registry_that_must_not_be_read(world: World, fault: Fault) -> None:
    """Root reads everything, but for one that gave that right away."""
    fault.count(1)
    folder = world.manager.sessions_dir
    text(world.path, valid(world.people.named("stale")))
    world.path.chmod(0)
    os.chown(world.path, 1, 1)
    stale_pair(folder, "stale")
    rights = "-dac_override,-dac_read_search"
    done = subprocess.run(
        [
            *("setpriv", "--bounding-set", rights, "--inh-caps", rights, *PROGRAM, "run"),
            *("--once", "--log-form", "json", "--sessions-dir", str(folder)),
        ],
        capture_output=True,
        text=True,
        env=program_environment(folder),
        check=False,
    )
    fault.holds(done.returncode == 0, f"it ends well: {done.stderr}")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    said = [line["reason"] for line in lines if line["event"] == "registry.unusable"]
    fault.holds(len(said) == 1 and "Permission denied" in said[0], f"told once: {said}")
    fault.holds(not world.files("stale"), "what is dead is cleaned")
    world.nobody_is_harmed("unreadable")
