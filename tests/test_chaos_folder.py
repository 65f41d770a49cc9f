from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from chaos import Fault
from conftest import NODE_KEEPER, PROGRAM, Daemon, alive, end_all, identity, stale_pair, until
from stand_ins import agent_of, recorder

from reconciler.keeper import KeeperManager
from reconciler.observations import ProcessId
from reconciler.requests import OUR_KEEPER

ROOT = os.geteuid() == 0
BOUND = ("setpriv", "--inh-caps=-all", "--bounding-set=-all") if ROOT else ()
"""Bound by the modes of files, as every user but root is."""


def works(*command: str) -> bool:
    return subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(
    not works("env", *BOUND), reason="needs setpriv (util-linux) to give root's rights up"
)
needs_mounts = pytest.mark.skipif(
    not (ROOT and works("env", "unshare", "-m")), reason="needs a mount namespace of its own"
)


class Lives:
    """A session that lives while its folder comes and goes."""

    def __init__(self, folder: Path, sid: str, make: tuple[str, ...]) -> None:
        self._folder = folder
        self._sid = sid
        self._record = folder.parents[2] / f"{sid}.record"
        manager = KeeperManager(folder, keeper_command=(*BOUND, *make))
        command = recorder(self._record)
        spawned = asyncio.run(manager.spawn(sid, agent_command=command, ready=False))
        until((folder / f"{sid}.rpc.sock.pi-pid").exists, "the agent pid file")
        until(lambda: self._record.exists() and self._record.read_bytes(), "the agent runs")
        pids = spawned.keeper_pid, agent_of(manager, sid)
        self._processes: tuple[ProcessId, ...] = tuple(map(identity, pids))

    def check(self, fault: Fault, what: str) -> None:
        """It lives, and got no signal."""
        for each in self._processes:
            lives = alive(each.pid) and identity(each.pid) == each
            fault.holds(lives, f"{what}: {self._sid} lives")
        told = self._record.read_text()
        fault.holds("signal" not in told, f"{what}: {self._sid} got {told}")

    def check_files(self, fault: Fault, what: str) -> None:
        """Its files are there, and what is written to it arrives."""
        pid = str(self._processes[0].pid)
        said = (self._folder / f"{self._sid}.rpc.sock.pid").read_text()
        fault.holds(said == pid, f"{what}: the pid file of {self._sid} says {said}, not {pid}")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self._folder / f"{self._sid}.rpc.sock"))
            client.sendall(f"{what}\n".encode())
        until(lambda: what in self._record.read_text(), "the line arrives")

    def end(self) -> None:
        """Kill it, wherever its files are now."""
        for each in reversed(self._processes):
            if alive(each.pid) and identity(each.pid) == each:
                os.kill(each.pid, signal.SIGKILL)


class Scene:
    """A folder that comes and goes under the background process."""

    def __init__(self, folder: Path, daemon: Daemon) -> None:
        self.folder = folder
        self.home = folder.parents[2]
        self.away = self.home / "away"
        self.daemon = daemon
        self.took: list[float] = []
        """Seconds until each stale pair was cleaned."""
        self._sids = (f"stale-{number}" for number in itertools.count())

    def is_served(self, folder: Path | None = None) -> None:
        """A stale pair that is put into the folder now is cleaned at once."""
        sid, folder = next(self._sids), folder or self.folder
        begun = time.monotonic()
        stale_pair(folder, sid)
        until(lambda: not list(folder.glob(f"*{sid}.*")), f"{sid} is cleaned")
        self.took.append(time.monotonic() - begun)

    def tells(self, event: str) -> None:
        """Wait until it tells this once more than it has."""
        until(lambda: self.told()[event] > self.expected[event], f"{event} is told")
        self.expected[event] += 1

    def told(self) -> Counter[str]:
        """What it has told of the folder, and how often."""
        lines = self.daemon.log.read_text().splitlines(keepends=True)
        events = (json.loads(line)["event"] for line in lines if line.endswith("\n"))
        return Counter(event for event in events if event.startswith("folder."))

    expected: Counter[str]


@contextmanager
def scene(folder: Path, log: Path, program: tuple[str, ...] = BOUND) -> Iterator[Scene]:
    log.unlink(missing_ok=True)
    daemon = Daemon(folder, log, "--resync", "3600", program=(*program, *PROGRAM))
    it = Scene(folder, daemon)
    it.expected = Counter()
    try:
        it.is_served()
        yield it
    finally:
        daemon.process.kill()
        daemon.process.wait()


# How a folder goes, and comes back. Those that come back as they were keep their sessions.


def is_removed(it: Scene) -> None:
    shutil.rmtree(it.folder)
    it.tells("folder.gone")
    it.folder.mkdir(mode=0o700)


def is_replaced(it: Scene) -> None:
    other = it.home / "other"
    other.mkdir(mode=0o700)
    it.folder.rename(it.away)
    other.rename(it.folder)
    it.tells("folder.gone")


def is_moved_and_comes_back(it: Scene) -> None:
    it.folder.rename(it.away)
    it.tells("folder.gone")
    it.away.rename(it.folder)


def becomes_a_link_to_where_it_is(it: Scene) -> None:
    it.folder.rename(it.away)
    it.tells("folder.gone")
    it.folder.symlink_to(it.away)


def becomes_a_link_that_turns_elsewhere(it: Scene) -> None:
    becomes_a_link_to_where_it_is(it)
    it.is_served()
    (it.home / "other").mkdir(mode=0o700)
    turn_link(it.folder, it.home / "other")
    it.tells("folder.gone")


def goes_with_its_parents(it: Scene) -> None:
    shutil.rmtree(it.folder.parents[1])
    it.tells("folder.gone")
    it.folder.mkdir(mode=0o700, parents=True)


def is_moved_with_its_parents_and_comes_back(it: Scene) -> None:
    it.folder.parents[1].rename(it.away)
    it.tells("folder.gone")
    it.away.rename(it.folder.parents[1])


def has_a_parent_that_becomes_a_link(it: Scene) -> None:
    it.folder.parents[1].rename(it.away)
    it.tells("folder.gone")
    it.folder.parents[1].symlink_to(it.away)


def has_a_parent_that_is_a_link_and_turns_elsewhere(it: Scene) -> None:
    has_a_parent_that_becomes_a_link(it)
    it.is_served()
    other = it.home / "other"
    (other / "dashboard" / "sessions").mkdir(mode=0o700, parents=True)
    turn_link(it.folder.parents[1], other)
    it.tells("folder.gone")


def cannot_be_read_for_a_while(it: Scene) -> None:
    it.folder.chmod(0)
    it.tells("folder.unusable")
    it.folder.chmod(0o700)


def cannot_be_reached_for_a_while(it: Scene) -> None:
    it.folder.parent.chmod(0)
    it.tells("folder.gone")
    it.tells("folder.unusable")
    it.folder.parent.chmod(0o700)


def turn_link(link: Path, target: Path) -> None:
    """As ``ln -sfn`` does."""
    new = link.with_name("new")
    new.symlink_to(target)
    new.rename(link)


COMES_BACK = (
    is_moved_and_comes_back,
    becomes_a_link_to_where_it_is,
    is_moved_with_its_parents_and_comes_back,
    has_a_parent_that_becomes_a_link,
    cannot_be_read_for_a_while,
    cannot_be_reached_for_a_while,
)
WAYS = (
    *COMES_BACK,
    is_removed,
    is_replaced,
    becomes_a_link_that_turns_elsewhere,
    goes_with_its_parents,
    has_a_parent_that_is_a_link_and_turns_elsewhere,
)
Way = Callable[[Scene], None]

FAULT = pytest.mark.chaos(
    "the folder goes and comes", "told once, served again at once, its sessions unharmed"
)


@FAULT
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_folder(folder: Path, tmp_path: Path, fault: Fault, way: Way) -> None:
    for number in fault.rounds(short=1, full=10):
        makes: Mapping[str, tuple[str, ...]] = {"ours": OUR_KEEPER, "other": NODE}
        sessions = [Lives(folder, *make) for make in makes.items()] if number % 2 == 0 else []
        try:
            with scene(folder, tmp_path / "log") as it:
                way(it)
                it.is_served()
                fault.holds(it.told() == it.expected, f"told {it.told()}, not {it.expected}")
                for session in sessions:
                    session.check(fault, way.__name__)
                    if way in COMES_BACK:
                        session.check_files(fault, way.__name__)
        finally:
            for session in sessions:
                session.end()
            start_over(folder)


@FAULT
@needs_mounts
@pytest.mark.timeout(3600)
def test_a_folder_that_is_mounted_over_and_unmounted(
    folder: Path, tmp_path: Path, fault: Fault
) -> None:
    for _ in fault.rounds(short=1, full=10):
        with scene(folder, tmp_path / "log", ("unshare", "-m", *BOUND)) as it:
            pid = it.daemon.process.pid
            within = ("nsenter", "-t", str(pid), "-m")
            mount = ("mount", "-t", "tmpfs", "-o", "mode=700", "none", str(folder))
            subprocess.run([*within, *mount], check=True)
            it.tells("folder.gone")
            it.is_served(Path(f"/proc/{pid}/root{folder}"))
            subprocess.run([*within, "umount", "--lazy", str(folder)], check=True)
            it.tells("folder.gone")
            it.is_served()
            fault.holds(it.told() == it.expected, f"told {it.told()}, not {it.expected}")


def any_change(it: Scene, chance: random.Random) -> None:
    """Something happens to the folder, whatever it is now."""
    other = it.home / f"other-{chance.random()}"
    match chance.randrange(5):
        case 0 if it.folder.is_symlink():
            it.folder.unlink()
        case 0:
            shutil.rmtree(it.folder, ignore_errors=True)
        case 1:
            it.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        case 2 if it.folder.parents[1].exists():
            it.folder.parents[1].rename(other)
        case 3 if it.folder.exists():
            it.folder.rename(other)
            it.folder.symlink_to(other)
        case _:
            for path in (it.folder, it.folder.parent):
                if path.exists():
                    path.chmod(chance.choice((0o000, 0o700)))


@FAULT
@pytest.mark.timeout(3600)
def test_a_folder_to_which_anything_happens_in_any_order(
    folder: Path, tmp_path: Path, fault: Fault
) -> None:
    with scene(folder, tmp_path / "log") as it:
        for seed in fault.rounds(short=5, full=300):
            chance = random.Random(seed)
            for _ in range(chance.randrange(1, 8)):
                any_change(it, chance)
            for path in (folder.parents[1], folder.parent, folder):
                path.mkdir(mode=0o700, exist_ok=True)
                path.chmod(0o700)
            it.is_served()
            fault.holds(it.daemon.process.poll() is None, "it runs")


NODE = ("node", str(NODE_KEEPER))


def start_over(folder: Path) -> None:
    end_all(folder)
    for path in folder.parents[2].iterdir():
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path)
    folder.mkdir(mode=0o700, parents=True)
