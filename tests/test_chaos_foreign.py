"""Keepers that are none of this folder's business: other homes, namespaces and hosts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos import Fault
from conftest import (
    HUNG,
    NODE_KEEPER,
    SINK,
    Daemon,
    bare_socket,
    dead_pid,
    end_all,
    identity,
    root,
    stale_pair,
    until,
)
from innocents import harm, innocents
from neighbours import another_folder, daemon_on
from raw_keeper import into
from stand_ins import ending, kill

from reconciler import folder as folder_module
from reconciler.errors import NoSuchSessionError, UnverifiableError
from reconciler.folder import Answer, Folder
from reconciler.keeper import KeeperManager
from reconciler.layout import KEEPER_PROGRAM
from reconciler.observations import ProcessId
from reconciler.processes import SYSTEM
from reconciler.rpc_writer import BlockingRpcWriter

CHECKED = "nobody of another home, namespace or host is signalled or loses a file; ours are cleaned"
ENDINGS = (".rpc.sock", ".rpc.sock.pid", ".rpc.sock.pi-pid")
KEEPERS = {"ours": (), "node": ("node", str(NODE_KEEPER))}


def manager_of(folder: Path, kind: str) -> KeeperManager:
    command = KEEPERS[kind]
    return KeeperManager(folder, keeper_command=command) if command else KeeperManager(folder)


def files(folder: Path, sid: str) -> dict[str, tuple[int, bytes]]:
    """The session's files: inode and content."""
    found = {}
    for suffix in ENDINGS:
        path = folder / f"{sid}{suffix}"
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = (path.lstat().st_ino, b"" if path.is_socket() else path.read_bytes())
    return found


def _cleaned(folder: Path, sid: str) -> bool:
    return not files(folder, sid)


@dataclass
class Neighbour:
    """A session of another folder, with the id of one of ours."""

    manager: KeeperManager
    sid: str
    keeper: ProcessId
    agent: ProcessId
    record: Path
    files: dict[str, tuple[int, bytes]]

    def is_unharmed(self, fault: Fault, what: str) -> None:
        folder = self.manager.sessions_dir
        for process in (self.keeper, self.agent):
            unharmed = SYSTEM.facts(process.pid).process == process
            fault.holds(unharmed, f"{what}: the neighbour's {process.pid} lives")
        fault.holds(files(folder, self.sid) == self.files, f"{what}: it keeps its files")
        sent = BlockingRpcWriter(folder).write(self.sid, {"after": what}, timeout=20)
        until(lambda: what.encode() in self.record.read_bytes(), f"{what}: a line arrives there")
        fault.holds(sent.delivered, f"{what}: it is written to")


def begin(manager: KeeperManager, sid: str, agent: tuple[str, ...] = HUNG) -> tuple[int, int]:
    """Start a session; the pids of its keeper and its agent."""
    spawned = asyncio.run(manager.spawn(sid, agent_command=agent, ready=False, timeout=60))
    path = manager.sessions_dir / f"{sid}.rpc.sock.pi-pid"
    until(lambda: path.exists() and path.read_text(), "it has an agent")
    return spawned.keeper_pid, int(path.read_text())


def neighbour(manager: KeeperManager, sid: str, record: Path) -> Neighbour:
    keeper, agent = begin(manager, sid, tuple(into(record)))
    until(record.exists, "its agent runs")
    found = files(manager.sessions_dir, sid)
    return Neighbour(manager, sid, identity(keeper), identity(agent), record, found)


class Ours:
    """A session of the daemon's folder, and what may happen to it."""

    def __init__(self, manager: KeeperManager, sid: str, other: Neighbour) -> None:
        self.manager = manager
        self.sid = sid
        self.other = other

    def path(self, suffix: str) -> Path:
        return self.manager.sessions_dir / f"{self.sid}{suffix}"

    def is_gone(self) -> None:
        until(lambda: not files(self.manager.sessions_dir, self.sid), "ours is cleaned")

    def is_killed(self) -> None:
        kill(begin(self.manager, self.sid)[0])
        self.is_gone()

    def is_stopped(self) -> None:
        begin(self.manager, self.sid)
        asyncio.run(self.manager.stop(self.sid))
        self.is_gone()

    def loses_its_files(self) -> None:
        """The one that is looked for by a scan of processes is not the other folder's."""
        keeper, _ = begin(self.manager, self.sid)
        for suffix in ENDINGS:
            self.path(suffix).unlink(missing_ok=True)
        kill(keeper)
        self.is_gone()

    def names_the_neighbours_agent(self) -> None:
        keeper, _ = begin(self.manager, self.sid)
        self.path(".rpc.sock.pi-pid").write_text(str(self.other.agent.pid))
        kill(keeper)
        self.is_left_alone()

    def names_the_neighbours_keeper(self) -> None:
        """Its pid file does; nothing proves it to be ours, or to be somebody else."""
        bare_socket(self.path(".rpc.sock"))
        self.path(".rpc.sock.pid").write_text(str(self.other.keeper.pid))
        self.is_left_alone()

    def links_to_the_neighbour(self) -> None:
        there = self.other.manager.sessions_dir
        for suffix in ENDINGS:
            self.path(suffix).symlink_to(there / f"{self.sid}{suffix}")
        self.is_left_alone()

    def is_left_alone(self) -> None:
        with contextlib.suppress(UnverifiableError, NoSuchSessionError):
            asyncio.run(self.manager.stop(self.sid))
        for suffix in ENDINGS:
            self.path(suffix).unlink(missing_ok=True)


FATES: tuple[Callable[[Ours], None], ...] = (
    Ours.is_killed,
    Ours.is_stopped,
    Ours.loses_its_files,
    Ours.names_the_neighbours_agent,
    Ours.names_the_neighbours_keeper,
    Ours.links_to_the_neighbour,
)


@pytest.mark.timeout(900)
@pytest.mark.chaos("keepers of other folders, namespaces, hosts", CHECKED)
@pytest.mark.parametrize(("here", "there"), [("ours", "ours"), ("ours", "node"), ("node", "ours")])
def test_equal_session_ids_in_two_homes(
    daemon: Daemon, tmp_path: Path, fault: Fault, here: str, there: str
) -> None:
    with another_folder(daemon.folder) as second:
        ours, theirs = manager_of(daemon.folder, here), manager_of(second, there)
        for number in fault.rounds(short=1, full=15):
            sid = str(uuid.uuid4())
            other = neighbour(theirs, sid, tmp_path / f"record-{number}")
            for fate in FATES:
                fate(Ours(ours, sid, other))
                other.is_unharmed(fault, fate.__name__)
            asyncio.run(theirs.stop(sid))


@contextlib.contextmanager
def container(folder: Path, sid: str, number: int, elsewhere: Path) -> Iterator[int]:
    """A keeper in a pid namespace of its own, where its number is the one that is given.

    It has the folder by another path, a bind mount. Gives its pid in our namespace.
    """
    elsewhere.mkdir()
    keeper = shlex.join([sys.executable, "-I", "-S", str(KEEPER_PROGRAM), sid])
    steps = (
        f"mount --bind {shlex.quote(str(folder))} {shlex.quote(str(elsewhere))}",
        f"echo {number - 1} > /proc/sys/kernel/ns_last_pid",
        f"{keeper} & wait",
    )
    env = {
        **os.environ,
        "PI_KEEPER_SESSIONS_DIR": str(elsewhere),
        "PI_KEEPER_PI_CMD": json.dumps(HUNG),
        "PI_KEEPER_PI_ARGS": "[]",
    }
    inside = ("unshare", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child")
    command = [*inside, "sh", "-ec", "\n".join(steps)]
    with ending(subprocess.Popen(command, env=env)) as unshare:
        path = folder / f"{sid}.rpc.sock.pi-pid"
        until(lambda: path.exists() and path.read_text(), "the keeper in the container is up")
        assert (folder / f"{sid}.rpc.sock.pid").read_text() == str(number)
        (init,) = SYSTEM.children(unshare.pid) or ()
        (pid,) = SYSTEM.children(init) or ()
        yield pid


@root
@pytest.mark.root
@pytest.mark.timeout(600)
@pytest.mark.chaos("keepers of other folders, namespaces, hosts", CHECKED)
def test_a_keeper_of_another_pid_namespace_in_the_same_folder(
    daemon: Daemon, manager: KeeperManager, tmp_path: Path, fault: Fault
) -> None:
    folder = daemon.folder
    with innocents(1) as (innocent,):
        for round_ in fault.rounds(short=1, full=15):
            sid = str(uuid.uuid4())
            with container(folder, sid, innocent.pid, tmp_path / f"m{round_}") as pid:
                keeper, before = identity(pid), files(folder, sid)
                until(functools.partial(daemon.of, "session.unverifiable", sid), "it is told")
                for frozen in (False, True):
                    os.kill(pid, signal.SIGSTOP if frozen else signal.SIGCONT)
                    with pytest.raises(UnverifiableError):
                        asyncio.run(manager.stop(sid))
                    daemon.crash_and_restart()
                unharmed = SYSTEM.facts(pid).process == keeper
                fault.holds(unharmed, "the keeper in the container lives")
                fault.holds(files(folder, sid) == before, "it keeps its files")
                kill(pid)
            daemon.crash_and_restart()  # nothing tells of that death: it is seen at a full look
            until(functools.partial(_cleaned, folder, sid), "once it is dead its files go")
            fault.holds(not (told := harm(innocent)), told)


NETWORKED = """
import sys
from reconciler import cli, folder
folder.NETWORK_FILESYSTEMS = frozenset({sys.argv.pop(1)})
cli.main()
"""
"""The filesystem is a local one that is taken for a network's: a fake, but for that real."""


@pytest.mark.timeout(600)
@pytest.mark.chaos("keepers of other folders, namespaces, hosts", CHECKED)
@pytest.mark.parametrize("kind", KEEPERS)
def test_a_filesystem_that_other_hosts_share(
    folder: Path, tmp_path: Path, fault: Fault, kind: str
) -> None:
    """A dead pid and a refused connect are no proof there."""
    filesystem = folder_module.filesystem_of(folder.stat().st_dev)
    program = (sys.executable, "-c", NETWORKED, filesystem)
    manager = manager_of(folder, kind)
    with innocents(1) as (innocent,), daemon_on(folder, tmp_path / "log", program) as daemon:
        for _ in fault.rounds(short=1, full=15):
            sids = {what: f"{what}-{uuid.uuid4()}" for what in ("dead", "innocent", "taken")}
            stale_pair(folder, sids["dead"])
            stale_pair(folder, sids["innocent"])
            (folder / f"{sids['innocent']}.rpc.sock.pid").write_text(str(innocent.pid))
            taken = folder / f"{sids['taken']}.rpc.sock"
            bare_socket(taken)
            taken.rename(folder / f".{taken.name}.taken-{dead_pid()}")
            before = {sid: files(folder, sid) for sid in sids.values()}
            keeper, _ = begin(manager, seen := str(uuid.uuid4()), SINK)
            until(functools.partial(_seen, manager, seen), "it lives")
            daemon.crash_and_restart()
            kill_once_followed(daemon, keeper)
            until(functools.partial(_cleaned, folder, seen), "what was seen alive is cleaned")
            for what in ("dead", "innocent"):
                sid = sids[what]
                until(functools.partial(daemon.of, "session.unverifiable", sid), "it is told")
                fault.holds(files(folder, sid) == before[sid], f"{what}: its files stay")
            until(taken.is_socket, "what a removal had taken is put back")
            fault.holds(not (told := harm(innocent)), told)
            for sid in sids.values():
                for name in files(folder, sid):
                    (folder / name).unlink()


def _seen(manager: KeeperManager, sid: str) -> bool:
    return sid in {entry.sid for entry in asyncio.run(manager.discover())}


@contextlib.contextmanager
def mounted(source: Path, folder: Path) -> Iterator[None]:
    """The folder is a FUSE mount of another that calls itself a network's filesystem."""
    mount = ["bindfs", "-o", "subtype=sshfs", str(source), str(folder)]
    subprocess.run(mount, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        end_all(folder)
        subprocess.run(["umount", "--lazy", folder], check=True)


@root
@pytest.mark.root
@pytest.mark.skipif(shutil.which("bindfs") is None, reason="needs bindfs: make tools")
@pytest.mark.timeout(600)
@pytest.mark.chaos("keepers of other folders, namespaces, hosts", CHECKED)
def test_a_keeper_of_another_host(folder: Path, tmp_path: Path, fault: Fault) -> None:
    """It lives and listens there; here its pid is nobody's, and its socket refuses."""
    manager = KeeperManager(folder)
    with contextlib.ExitStack() as stack:
        there = stack.enter_context(another_folder(folder))
        stack.enter_context(mounted(there, folder))
        daemon = stack.enter_context(daemon_on(folder, tmp_path / "log"))
        for round_ in fault.rounds(short=1, full=15):
            sid = str(uuid.uuid4())
            with container(there, sid, 3000, tmp_path / f"m{round_}") as pid:
                keeper, before = identity(pid), files(there, sid)
                with Folder(folder) as here:
                    assert here.remote
                    assert here.ask(f"{sid}.rpc.sock").answer is Answer.REFUSED
                daemon.crash_and_restart()
                until(functools.partial(daemon.of, "session.unverifiable", sid), "it is told")
                with pytest.raises(UnverifiableError):
                    asyncio.run(manager.stop(sid))
                ours, _ = begin(manager, seen := str(uuid.uuid4()), SINK)
                kill_once_followed(daemon, ours)
                until(functools.partial(_cleaned, folder, seen), "what was seen alive is cleaned")
                unharmed = SYSTEM.facts(pid).process == keeper
                fault.holds(unharmed, "the keeper of the other host lives")
                fault.holds(files(there, sid) == before, "it keeps its files")


def kill_once_followed(daemon: Daemon, pid: int) -> None:
    """Kill a process once the daemon holds a descriptor of it: then it has seen it alive."""
    until(lambda: pid in followed(daemon.process.pid), "the daemon follows it")
    kill(pid)


def followed(daemon: int) -> set[int]:
    """The pids of a process's pidfds."""
    pids: set[int] = set()
    for name in os.listdir(f"/proc/{daemon}/fdinfo"):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{daemon}/fdinfo/{name}").read_text()
            pids.update(int(line[4:]) for line in text.splitlines() if line.startswith("Pid:"))
    return pids
