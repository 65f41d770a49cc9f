from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import NODE_KEEPER, SINK, bare_socket, dead_pid, end_all, identity, root, until
from stand_ins import NOBODY, ending, keeper_without_agent, kill, listening, running, spawn

from reconciler.facts import DEAD, HIDDEN, Facts
from reconciler.folder import Answer, Folder, Peer
from reconciler.identity import NOBODY as NO_KEEPER
from reconciler.identity import NOT_ASKED, Asked, Identity
from reconciler.keeper import KeeperManager
from reconciler.layout import KEEPER_PROGRAM
from reconciler.observations import KeeperState, Listening
from reconciler.plans import Verdict
from reconciler.probe import Probe
from reconciler.processes import LINUX
from reconciler.requests import OUR_KEEPER
from reconciler.state import Desired, Policy, decide

SID = "5f0e7c1e-0c50-4f0e-9b39-4e4a3a2f3d11"
SOCKET = f"{SID}.rpc.sock"


@pytest.fixture
def opened(folder: Path) -> Iterator[Folder]:
    with Folder(folder) as opened:
        yield opened


@pytest.fixture
def who(opened: Folder) -> Identity:
    return Identity(opened)


class Odd(type(LINUX)):  # type: ignore[misc]
    """The system, but for the answers that a test gives."""

    def __init__(self, **answers: Callable[..., object]) -> None:
        for name, answer in answers.items():
            setattr(self, name, answer)


# By arguments and by what is held open.


def test_our_keeper(manager: KeeperManager, who: Identity) -> None:
    pid = spawn(manager, SID).keeper_pid
    keeper = who.identify(SID, pid)
    assert (keeper.state, keeper.process, keeper.ours) == (KeeperState.PROVEN, identity(pid), True)
    assert 0 <= keeper.age < 20
    assert keeper.evidence.endswith("runs keeper_process.py for this session and this folder")
    assert who.proves_keeper(SID, identity(pid))
    os.kill(pid, signal.SIGSTOP)
    assert who.proves_keeper(SID, identity(pid))


def test_a_keeper_of_another_make(node_manager: KeeperManager, who: Identity) -> None:
    pid = spawn(node_manager, SID).keeper_pid
    keeper = who.identify(SID, pid)
    assert (keeper.state, keeper.process, keeper.ours) == (KeeperState.PROVEN, identity(pid), False)
    assert who.proves_keeper(SID, identity(pid))


def test_a_keeper_whose_logs_were_deleted(manager: KeeperManager, who: Identity) -> None:
    """Ours holds the folder itself open."""
    pid = spawn(manager, SID).keeper_pid
    for log in manager.sessions_dir.glob("keeper-*.log"):
        log.unlink()
    assert who.identify(SID, pid).state is KeeperState.PROVEN


def test_a_keeper_of_another_make_whose_logs_were_deleted(
    node_manager: KeeperManager, who: Identity
) -> None:
    """Its arguments alone do not say whose folder it serves, its socket does."""
    pid = spawn(node_manager, SID).keeper_pid
    for log in node_manager.sessions_dir.glob("keeper-*.log"):
        log.unlink()
    assert who.identify(SID, pid).state is KeeperState.UNVERIFIABLE
    assert who.proves_keeper(SID, identity(pid))
    kill(pid)  # the fixture finds it by its logs


def test_a_keeper_of_another_session(manager: KeeperManager, who: Identity) -> None:
    pid = spawn(manager, SID).keeper_pid
    assert who.identify("another", pid).state is KeeperState.RECYCLED
    assert not who.proves_keeper("another", identity(pid))


@pytest.mark.parametrize("make", ["ours", "node"])
def test_a_keeper_of_another_folder_with_the_same_id(
    who: Identity, folder: Path, make: str
) -> None:
    home = folder.parents[2] / "b" / ".pi" / "dashboard" / "sessions"
    command = ("node", str(NODE_KEEPER)) if make == "node" else OUR_KEEPER
    manager = KeeperManager(home, keeper_command=command)
    spawned = spawn(manager, SID)
    try:
        keeper = who.identify(SID, spawned.keeper_pid)
        assert keeper.state is KeeperState.UNVERIFIABLE
        assert keeper.evidence.endswith("has no file of this folder open")
        assert not who.proves_keeper(SID, identity(spawned.keeper_pid))
        assert spawned.keeper_pid in who.scan()[SID]
        with Folder(home) as its_own:
            assert Identity(its_own).proves_keeper(SID, identity(spawned.keeper_pid))
    finally:
        kill(spawned.keeper_pid)


def test_a_folder_that_was_moved_is_the_same(
    manager: KeeperManager, who: Identity, tmp_path: Path
) -> None:
    pid = spawn(manager, SID).keeper_pid
    manager.sessions_dir.rename(tmp_path / "moved")
    assert who.proves_keeper(SID, identity(pid))
    (tmp_path / "moved").rename(manager.sessions_dir)


@pytest.mark.parametrize(
    ("programs", "state"),
    [
        (frozenset({"keeper.cjs"}), KeeperState.UNVERIFIABLE),
        (frozenset({"keeper.cjs", "mykeeper"}), KeeperState.PROVEN),
    ],
)
def test_programs_are_known_by_setting(
    opened: Folder, programs: frozenset[str], state: KeeperState
) -> None:
    with keeper_without_agent(opened.path, SID, "mykeeper") as (pid,):
        keeper = Identity(opened, programs).identify(SID, pid)
        assert (keeper.state, keeper.ours) == (state, False)


def test_an_innocent_process_was_given_the_pid(innocent: int, who: Identity) -> None:
    keeper = who.identify(SID, innocent)
    assert (keeper.state, keeper.process) == (KeeperState.RECYCLED, identity(innocent))
    program = os.path.basename(os.path.realpath(sys.executable))
    assert keeper.evidence == f"process {innocent} is {program}, not a keeper"
    assert not who.proves_keeper(SID, identity(innocent))


@pytest.mark.parametrize("argument", [SID, f"--session={SID}", f"/x/{SID}.rpc.sock"])
def test_an_unknown_program_with_the_id_among_its_arguments(who: Identity, argument: str) -> None:
    with running("print(flush=True); signal.pause()", argument) as (pid,):
        keeper = who.identify(SID, pid)
        assert keeper.state is KeeperState.UNVERIFIABLE
        assert keeper.evidence.endswith("its program is not known")
        assert not who.proves_keeper(SID, identity(pid))


@root
@pytest.mark.root
@pytest.mark.parametrize("arguments", [(), (f"/x/{KEEPER_PROGRAM.name}", SID)])
def test_a_process_of_another_user(
    opened: Folder, who: Identity, arguments: tuple[str, ...]
) -> None:
    """Even if it runs what a keeper runs, and holds the folder open."""
    command = ["sh", "-c", "echo; sleep 600; :", *arguments]
    with ending(
        subprocess.Popen(command, user=NOBODY, pass_fds=(opened.fd,), stdout=subprocess.PIPE)
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        pid = process.pid
        keeper = who.identify(SID, pid)
        assert keeper.state is KeeperState.UNVERIFIABLE
        assert keeper.evidence == f"process {pid} belongs to uid {NOBODY}"
        assert not who.proves_keeper(SID, identity(pid))
        kill(*(LINUX.children(pid) or ()), pid)


def test_nobody(who: Identity) -> None:
    assert who.identify(SID, dead_pid()) == NO_KEEPER
    with running("print(flush=True)") as (pid,):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert who.identify(SID, pid) == NO_KEEPER


def test_a_thread_of_the_kernel(who: Identity) -> None:
    threads = [pid for pid in LINUX.pids() if LINUX.facts(pid).kernel]
    if not threads:
        pytest.skip("this pid namespace has no threads of the kernel")
    assert who.identify(SID, threads[0]).state is KeeperState.RECYCLED


def test_who_can_be_no_keeper_of_ours(opened: Folder, innocent: int) -> None:
    """Answers that this system need not give: a kernel's thread, another namespace, no name."""
    facts = LINUX.facts(innocent)
    kernels = Odd(facts=lambda _: replace(facts, kernel=True))
    keeper = Identity(opened, processes=kernels).identify(SID, innocent)
    assert (keeper.state, keeper.process) == (KeeperState.RECYCLED, facts.process)
    assert keeper.evidence == f"{innocent} is the kernel's"
    elsewhere = Odd(foreign=lambda pid: pid == innocent)
    keeper = Identity(opened, processes=elsewhere).identify(SID, innocent)
    assert (keeper.state, keeper.process) == (KeeperState.UNVERIFIABLE, facts.process)
    assert keeper.evidence == f"process {innocent} lives in another pid namespace"
    hidden = Odd(program=lambda _: "")
    keeper = Identity(opened, processes=hidden).identify(SID, innocent)
    assert keeper.evidence == f"process {innocent} is another program, not a keeper"


def dies(facts: Facts) -> Callable[[int], Facts]:
    """Answers once with these facts, and then that there is nobody."""
    answers = [facts]
    return lambda _: answers.pop() if answers else DEAD


@pytest.mark.parametrize("arguments", [None, ("node", "keeper.cjs", SID)])
@pytest.mark.parametrize("holds", [None, False])
@pytest.mark.parametrize("ends", [True, False])
def test_what_cannot_be_read(
    opened: Folder,
    innocent: int,
    arguments: tuple[str, ...] | None,
    *,
    holds: bool | None,
    ends: bool,
) -> None:
    """Of a process that lives on it proves nothing; and one that ends meanwhile is nobody."""
    facts = LINUX.facts(innocent)
    system = Odd(
        facts=dies(facts) if ends else lambda pid: facts if pid == innocent else DEAD,
        arguments=lambda _: arguments,
        holds=lambda *_: holds,
    )
    keeper = Identity(opened, processes=system).identify(SID, innocent)
    if ends:
        assert keeper == NO_KEEPER
        return
    assert (keeper.state, keeper.process) == (KeeperState.UNVERIFIABLE, facts.process)
    assert keeper.age == facts.age
    if arguments is None:
        assert keeper.evidence == f"the arguments of process {innocent} cannot be read"
    elif holds is None:
        assert keeper.evidence == f"whose folder keeper {innocent} serves cannot be told"
    else:
        assert keeper.evidence == f"keeper {innocent} has no file of this folder open"


def test_who_is_hidden(opened: Folder) -> None:
    keeper = Identity(opened, processes=Odd(facts=lambda _: HIDDEN)).identify(SID, 99)
    assert (keeper.state, keeper.evidence) == (
        KeeperState.UNVERIFIABLE,
        "process 99 is hidden from us",
    )


# By listening.


def test_who_listens_is_the_keeper_whatever_it_runs(who: Identity, folder: Path) -> None:
    with listening(folder, SOCKET) as (pid,):
        asked = who.connect(SID)
        assert asked == Asked(Listening.ANSWERED, identity(pid), named=True)
        keeper = who.listening_keeper(SID, asked)
        assert keeper is not None
        assert (keeper.state, keeper.process, keeper.ours) == (
            KeeperState.PROVEN,
            identity(pid),
            False,
        )
        assert keeper.evidence == f"process {pid} listens on the session's socket"
        assert 0 < keeper.age <= LINUX.facts(pid).age
        assert who.proves_keeper(SID, identity(pid))
        assert not who.proves_keeper("another", identity(pid))


def test_who_has_died_since_it_was_found_serves_nobody(
    who: Identity, opened: Folder, innocent: int
) -> None:
    assert not who.may_serve(SID, dead_pid())
    assert not who.may_serve(SID, innocent), "what it holds can be seen"
    hidden = Identity(opened, processes=Odd(holds=lambda *_: None))
    assert hidden.may_serve(SID, innocent)


def test_our_keeper_by_listening(manager: KeeperManager, who: Identity) -> None:
    pid = spawn(manager, SID).keeper_pid
    keeper = who.listening_keeper(SID, who.connect(SID))
    assert keeper is not None
    assert (keeper.process, keeper.ours) == (identity(pid), True)


def test_who_listened_and_is_gone(who: Identity, folder: Path) -> None:
    with listening(folder, SOCKET):
        asked = who.connect(SID)
    assert who.listening_keeper(SID, asked) is None
    assert who.connect(SID) == Asked(Listening.REFUSED)


def test_another_process_of_the_same_number_does_not_listen(who: Identity, folder: Path) -> None:
    with listening(folder, SOCKET) as (pid,):
        earlier = replace(identity(pid), started=1)
        assert not who.proves_keeper(SID, earlier)
        assert who.listening_keeper(SID, Asked(Listening.ANSWERED, earlier, named=True)) is None


def test_a_dead_listener_whose_socket_lives_on_in_a_child(who: Identity, folder: Path) -> None:
    """It answers, so it is alive; by whom cannot be told."""
    with listening(folder, SOCKET, heir=True) as (pid, _):
        kill(pid)
        asked = who.connect(SID)
        assert asked == Asked(Listening.ANSWERED)
        assert who.listening_keeper(SID, asked) is None


def test_a_later_owner_of_the_listeners_pid_is_not_named(
    who: Identity, innocent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's word stands in for a pid that was used again between two system calls."""
    dead = Peer(Answer.ACCEPTED, innocent, alive=False)
    monkeypatch.setattr(Folder, "ask", lambda *_: dead)
    assert who.connect(SID) == Asked(Listening.ANSWERED)
    assert not who.proves_keeper(SID, identity(innocent))


def test_a_listener_of_another_pid_namespace_is_not_named(opened: Folder, folder: Path) -> None:
    """Its pid may be ours to see; what it says of itself is not to be believed."""
    with listening(folder, SOCKET) as (pid,):
        who = Identity(opened, processes=Odd(foreign=lambda asked: asked == pid))
        asked = who.connect(SID)
        assert asked == Asked(Listening.ANSWERED, identity(pid), named=False)
        assert who.listening_keeper(SID, asked) is None
        assert not who.proves_keeper(SID, identity(pid))


def test_a_full_backlog_is_an_answer(who: Identity, folder: Path) -> None:
    with listening(folder, SOCKET, backlog=0), contextlib.ExitStack() as clients:
        for _ in range(3):
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(str(folder / SOCKET))
        assert who.connect(SID) == Asked(Listening.ANSWERED)


def test_nobody_listens(who: Identity, folder: Path) -> None:
    assert who.connect(SID) == Asked(Listening.REFUSED)
    bare_socket(folder / SOCKET)
    assert who.connect(SID) == Asked(Listening.REFUSED)


def test_what_cannot_be_asked(who: Identity, folder: Path) -> None:
    (folder / SOCKET).mkdir()
    assert who.connect(SID) == NOT_ASKED


@root
@pytest.mark.root
def test_a_listener_of_another_user_is_not_named(who: Identity, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / SOCKET))
        code = f"require('net').createServer().listen({{fd: {bound.fileno()}}})"
        with ending(
            subprocess.Popen(["node", "-e", code], user=NOBODY, pass_fds=[bound.fileno()])
        ) as node:
            until(lambda: who.connect(SID).listening is Listening.ANSWERED)
            asked = who.connect(SID)
            assert asked == Asked(Listening.ANSWERED, identity(node.pid), named=False)
            assert who.listening_keeper(SID, asked) is None
            assert not who.proves_keeper(SID, identity(node.pid))


# By a walk over all processes.


def test_a_scan_finds_keepers_of_every_make_and_folder(
    manager: KeeperManager, node_manager: KeeperManager, who: Identity, innocent: int
) -> None:
    ours, other = spawn(manager, "s-ours"), spawn(node_manager, "s-node")
    found = who.scan()
    assert found["s-ours"] == [ours.keeper_pid]
    assert found["s-node"] == [other.keeper_pid]
    assert innocent not in [pid for pids in found.values() for pid in pids]


def test_a_keeper_that_ends_is_nobody_at_once(manager: KeeperManager, who: Identity) -> None:
    pid = spawn(manager, SID).keeper_pid
    process = identity(pid)
    kill(pid)
    assert who.identify(SID, pid) == NO_KEEPER
    assert not who.proves_keeper(SID, process)
    until(lambda: who.connect(SID) == Asked(Listening.REFUSED))


def test_a_socket_that_was_linked_from_another_folder_makes_nobody_a_keeper(
    folder: Path,
) -> None:
    """Ours holds its own folder; of others the path that was bound tells the folder."""
    with contextlib.ExitStack() as held:
        for make in (OUR_KEEPER, ("node", str(NODE_KEEPER))):
            home = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="pi-")))
            there = home / ".pi" / "dashboard" / "sessions"
            there.mkdir(parents=True, mode=0o700)
            held.callback(end_all, there)
            manager = KeeperManager(there, keeper_command=make)
            keeper = asyncio.run(manager.spawn(SID, agent_command=SINK)).keeper_pid
            os.link(there / f"{SID}.rpc.sock", folder / f"{SID}.rpc.sock")
            with Folder(folder) as opened:
                who = Identity(opened)
                seen = Probe(opened).look(SID)
                assert not who.proves_keeper(SID, identity(keeper))
            assert seen.keeper.state is not KeeperState.PROVEN
            assert decide(seen, Desired.ABSENT, Policy()).verdict is Verdict.UNVERIFIABLE
            (folder / f"{SID}.rpc.sock").unlink()
