from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import alive, bare_socket, dead_pid, identity, root, stale_pair, until
from stand_ins import (
    NOBODY,
    WAITS,
    agent_of,
    ending,
    keeper_without_agent,
    kill,
    listening,
    running,
    spawn,
    usurper,
)

from reconciler.folder import Folder
from reconciler.identity import Identity
from reconciler.keeper import KeeperManager
from reconciler.layout import KEEPER_PROGRAM, InvalidSessionIdError, Role, file_name
from reconciler.observations import AgentState, EntryKind, KeeperState, Listening, Observation
from reconciler.plans import Adopt, Plan, Rebind, Remove, StopKeeper, Verdict
from reconciler.probe import Probe
from reconciler.processes import SYSTEM
from reconciler.state import Desired, Policy, decide

SID = "5f0e7c1e-0c50-4f0e-9b39-4e4a3a2f3d11"
SOCKET, PID_FILE, AGENT_FILE = (
    file_name(role, SID) for role in (Role.SOCKET, Role.PID_FILE, Role.AGENT_PID_FILE)
)
NOW = Policy(settle=0, start_grace=0, orphan_grace=0, lost_grace=0)
"""All graces are over."""

REPO = Path(__file__).parent.parent


@pytest.fixture
def opened(folder: Path) -> Iterator[Folder]:
    with Folder(folder) as opened:
        yield opened


@pytest.fixture
def probe(opened: Folder) -> Probe:
    return Probe(opened)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def judge(seen: Observation, desired: Desired = Desired.AS_FOUND) -> Plan:
    return decide(seen, desired, NOW)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """What stands in a folder, exactly."""
    return {
        path.name: (path.lstat().st_ino, path.read_bytes() if path.is_file() else b"")
        for path in folder.iterdir()
        if not path.name.endswith(".log")
    }


# In order.


def test_our_keeper_is_ready(manager: KeeperManager, probe: Probe) -> None:
    spawned = spawn(manager, SID)
    seen = probe.look(SID, now=5.0)
    assert [entry.kind for _, entry in seen.entries] == [
        EntryKind.SOCKET,
        EntryKind.PID,
        EntryKind.PID,
    ]
    assert {entry.since for _, entry in seen.entries} == {5.0}
    assert seen.pid_file.pid == spawned.keeper_pid
    assert seen.agent_file.pid == agent_of(manager, SID)
    assert seen.keeper.process == seen.listener == identity(spawned.keeper_pid)
    assert (seen.listening, seen.rivals) == (Listening.ANSWERED, ())
    assert seen.seen_alive
    assert not seen.remote
    assert judge(seen).verdict is Verdict.READY


def test_a_keeper_of_another_make_is_ready(node_manager: KeeperManager, probe: Probe) -> None:
    pid = spawn(node_manager, SID).keeper_pid
    seen = probe.look(SID)
    assert (seen.keeper.process, seen.keeper.ours) == (identity(pid), False)
    assert judge(seen).verdict is Verdict.READY


def test_on_windows_there_is_no_file_for_the_socket(
    manager: KeeperManager, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn(manager, SID)
    monkeypatch.setattr(sys, "platform", "win32")
    assert probe.look(SID).socket.kind is EntryKind.ABSENT


def test_the_clock_is_monotonic(probe: Probe) -> None:
    before = time.monotonic()
    assert before <= probe.look(SID).now <= time.monotonic()


@pytest.mark.parametrize("sid", ["", "../x", "a/b", "launch-a"])
def test_a_bad_session_id_reaches_no_file(probe: Probe, sid: str) -> None:
    with pytest.raises(InvalidSessionIdError):
        probe.look(sid)


def test_a_second_look_asks_nothing_that_is_known(
    manager: KeeperManager, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn(manager, SID)
    agent_of(manager, SID)
    first = probe.look(SID, now=1.0)
    for name in ("connect", "_keeper_of_this_folder"):
        monkeypatch.setattr(Identity, name, lambda *_: pytest.fail("asked again"))
    second = probe.look(SID, first, now=2.0)
    assert second == replace(first, now=2.0, keeper=replace(first.keeper, age=second.keeper.age))
    assert second.listener is first.keeper.process, "a daemon holds it once"
    assert second.agent is first.agent


def test_what_changes_is_young(manager: KeeperManager, probe: Probe) -> None:
    spawn(manager, SID)
    agent_of(manager, SID)
    first = probe.look(SID, now=1.0)
    path = manager.sessions_dir / AGENT_FILE
    path.write_text(path.read_text())
    second = probe.look(SID, first, now=2.0)
    assert second.agent_file.since == 2.0
    assert (second.pid_file.since, second.socket.since) == (1.0, 1.0)


def test_another_socket_is_asked(manager: KeeperManager, probe: Probe) -> None:
    spawn(manager, SID)
    first = probe.look(SID)
    (manager.sessions_dir / SOCKET).unlink()
    with listening(manager.sessions_dir, SOCKET) as (pid,):
        second = probe.look(SID, first)
        assert second.listener == identity(pid)
        assert judge(second).verdict is Verdict.UNVERIFIABLE


def test_a_sockets_backlog_is_no_matter_for_a_keeper_that_is_known(
    node_manager: KeeperManager, probe: Probe
) -> None:
    pid = spawn(node_manager, SID).keeper_pid
    os.kill(pid, signal.SIGSTOP)
    seen = probe.look(SID, probe.look(SID))
    assert judge(seen).verdict is Verdict.READY


# By listening.


@pytest.mark.parametrize("arguments", [(), (SID,), ("keeper.cjs", SID)])
def test_an_unknown_program_that_the_pid_file_names_and_that_listens(
    folder: Path, probe: Probe, arguments: tuple[str, ...]
) -> None:
    with listening(folder, SOCKET, *arguments) as (pid,):
        (folder / PID_FILE).write_text(str(pid))
        seen = probe.look(SID)
        assert (seen.keeper.state, seen.keeper.process) == (KeeperState.PROVEN, identity(pid))
        assert seen.rivals == ()
        assert judge(seen).verdict is Verdict.READY


@pytest.mark.parametrize("text", [None, "", "x", "dead"])
def test_an_unknown_program_that_listens_without_a_pid_file_that_names_it(
    folder: Path, probe: Probe, text: str | None
) -> None:
    with listening(folder, SOCKET) as (pid,):
        if text is not None:
            (folder / PID_FILE).write_text(str(dead_pid()) if text == "dead" else text)
        seen = probe.look(SID)
        assert (seen.keeper.state, seen.keeper.process) == (KeeperState.PROVEN, identity(pid))
        adopt = Adopt(identity(pid), seen.pid_file.file)
        assert judge(seen).actions == (adopt,)
        assert decide(seen, Desired.AS_FOUND, Policy()).verdict is Verdict.STARTING


def test_our_keeper_without_a_pid_file_is_told_to_write_it(
    manager: KeeperManager, probe: Probe
) -> None:
    pid = spawn(manager, SID).keeper_pid
    (manager.sessions_dir / PID_FILE).unlink()
    plan = judge(probe.look(SID))
    assert (plan.verdict, plan.actions) == (Verdict.ADOPT, (Rebind(identity(pid)),))


def test_a_dead_listener_whose_socket_lives_on_in_a_child(folder: Path, probe: Probe) -> None:
    with listening(folder, SOCKET, heir=True) as (pid, _):
        (folder / PID_FILE).write_text(str(pid))
        before = probe.look(SID)
        kill(pid)
        for seen in (probe.look(SID, before), probe.look(SID)):
            assert seen.listening is Listening.ANSWERED
            assert (judge(seen).verdict, judge(seen).actions) == (Verdict.UNVERIFIABLE, ())


# Not proven, not refuted: nothing is done.


def left_alone(seen: Observation, folder: Path) -> None:
    before = contents(folder)
    for desired in Desired:
        plan = judge(seen, desired)
        assert (plan.verdict, plan.actions) == (Verdict.UNVERIFIABLE, ())
    assert contents(folder) == before


def test_a_keeper_of_another_folder_with_the_same_id(
    manager: KeeperManager, folder: Path, probe: Probe
) -> None:
    other = KeeperManager(folder.parents[2] / "b" / "sessions")
    pid = spawn(other, SID).keeper_pid
    try:
        stale_pair(folder, SID)
        (folder / PID_FILE).write_text(str(pid))
        seen = probe.look(SID, scanned=probe.scan()[SID])
        assert seen.keeper.state is KeeperState.UNVERIFIABLE
        left_alone(seen, folder)
        own = spawn(manager, "other-sid")
        assert probe.look(SID, scanned=[pid, own.keeper_pid]).rivals == ()
    finally:
        kill(pid)


def test_of_a_keeper_of_another_folder_a_scan_makes_nothing(folder: Path, probe: Probe) -> None:
    other = KeeperManager(folder.parents[2] / "b" / "sessions")
    pid = spawn(other, SID).keeper_pid
    try:
        seen = probe.look(SID, scanned=[pid])
        assert seen.empty
        assert judge(seen).verdict is Verdict.ABSENT
    finally:
        kill(pid)


def test_an_unknown_program_with_the_id_among_its_arguments(folder: Path, probe: Probe) -> None:
    stale_pair(folder, SID)
    with running(WAITS, SID) as (pid,):
        (folder / PID_FILE).write_text(str(pid))
        left_alone(probe.look(SID), folder)


@root
@pytest.mark.root
def test_a_process_of_another_user(folder: Path, probe: Probe) -> None:
    stale_pair(folder, SID)
    with ending(subprocess.Popen(["sleep", "600"], user=NOBODY)) as process:
        until(lambda: SYSTEM.arguments(process.pid) == ("sleep", "600"))
        (folder / PID_FILE).write_text(str(process.pid))
        left_alone(probe.look(SID), folder)


def test_a_keeper_that_cannot_be_told_beside_another_that_listens(
    folder: Path, probe: Probe
) -> None:
    with listening(folder, SOCKET), running(WAITS, SID) as (pid,):
        (folder / PID_FILE).write_text(str(pid))
        left_alone(probe.look(SID), folder)


@root
@pytest.mark.root
def test_a_keeper_in_another_pid_namespace(folder: Path, probe: Probe) -> None:
    """It shares the folder. Its pid file says a number of its own world."""
    env = {
        **os.environ,
        "PI_KEEPER_SESSIONS_DIR": str(folder),
        "PI_KEEPER_PI_CMD": '["sleep"]',
        "PI_KEEPER_PI_ARGS": '["600"]',
    }
    inside = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    command = [*inside, sys.executable, "-I", "-S", str(KEEPER_PROGRAM), SID]
    with ending(subprocess.Popen(command, env=env)) as unshare:
        until((folder / AGENT_FILE).exists)
        assert (folder / PID_FILE).read_text() == "1"
        (keeper,) = SYSTEM.children(unshare.pid) or ()
        scanned = probe.scan()[SID]
        assert keeper in scanned
        seen = probe.look(SID, scanned=scanned)
        assert (seen.listening, seen.listener) == (Listening.ANSWERED, identity(keeper))
        left_alone(seen, folder)
        (folder / PID_FILE).write_text(str(keeper))  # even named by a pid of ours
        left_alone(probe.look(SID), folder)
        assert alive(keeper)


LOOK = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from reconciler.folder import Folder
from reconciler.probe import Probe
from reconciler.state import Desired, Policy, decide
probe = Probe(Folder(Path(sys.argv[1])))
seen = probe.look(sys.argv[2], scanned=probe.scan().get(sys.argv[2], ()))
for desired in Desired:
    plan = decide(seen, desired, Policy(settle=0, start_grace=0, orphan_grace=0))
    print(plan.verdict.value, len(plan.actions))
"""


@root
@pytest.mark.root
def test_from_within_another_pid_namespace(manager: KeeperManager) -> None:
    """A keeper outside is not to be seen from there, but it answers."""
    spawn(manager, SID)
    inside = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-I", "-c", LOOK]
    done = subprocess.run(
        [*inside, str(manager.sessions_dir), SID, str(REPO), *(path for path in sys.path if path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "unverifiable 0\n" * 3


@pytest.mark.parametrize("role", [Role.SOCKET, Role.PID_FILE, Role.AGENT_PID_FILE])
@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
def test_hostile(manager: KeeperManager, probe: Probe, role: Role, kind: str) -> None:
    spawn(manager, SID)
    path = manager.sessions_dir / file_name(role, SID)
    path.unlink()
    match kind:
        case "link":
            path.symlink_to("/etc/passwd")
        case "FIFO":
            os.mkfifo(path)
        case _:
            path.mkdir()
    for desired in Desired:
        plan = judge(probe.look(SID), desired)
        assert (plan.verdict, plan.actions) == (Verdict.REFUSED, ())


# Dead, or another's by now.


def test_left_behind(folder: Path, probe: Probe) -> None:
    stale_pair(folder, SID)
    seen = probe.look(SID)
    assert (seen.keeper.state, seen.listening) == (KeeperState.NONE, Listening.REFUSED)
    assert not seen.seen_alive
    plan = decide(seen, Desired.AS_FOUND, Policy())
    assert plan.verdict is Verdict.STALE
    assert plan.actions == (
        Remove(tuple((role, entry.file) for role, entry in seen.entries if entry.file)),
    )


def test_an_innocent_process_was_given_the_pid(folder: Path, probe: Probe, innocent: int) -> None:
    stale_pair(folder, SID)
    (folder / PID_FILE).write_text(str(innocent))
    seen = probe.look(SID)
    assert seen.keeper.state is KeeperState.RECYCLED
    plan = decide(seen, Desired.AS_FOUND, Policy())
    assert (plan.verdict, plan.reason) == (Verdict.STALE, "pid recycled by another process")
    assert all(isinstance(action, Remove) for action in plan.actions)


def test_nothing(probe: Probe) -> None:
    seen = probe.look(SID)
    assert seen.empty
    assert seen.agent.state is AgentState.NEVER_SEEN


@pytest.mark.parametrize(
    ("change", "seen_alive"),
    [
        (None, True),
        ("socket gone", True),
        ("another socket", False),
        ("another pid file", False),
        ("pid file gone", False),
    ],
)
def test_whether_these_very_files_were_a_living_keepers(
    manager: KeeperManager, probe: Probe, *, change: str | None, seen_alive: bool
) -> None:
    folder = manager.sessions_dir
    pid = spawn(manager, SID).keeper_pid
    before = probe.look(SID)
    kill(pid)
    match change:
        case "socket gone":
            (folder / SOCKET).unlink()
        case "another socket":
            (folder / SOCKET).unlink()
            bare_socket(folder / SOCKET)
        case "another pid file":
            (folder / PID_FILE).write_text(str(dead_pid()))
        case "pid file gone":
            (folder / PID_FILE).unlink()
    after = probe.look(SID, before)
    assert after.keeper.state is KeeperState.NONE
    assert after.seen_alive == seen_alive
    assert probe.look(SID, after).seen_alive == seen_alive
    assert not probe.look(SID).seen_alive


def test_a_keeper_that_dies_is_stale_at_once(manager: KeeperManager, probe: Probe) -> None:
    pid = spawn(manager, SID).keeper_pid
    before = probe.look(SID)
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([pidfd], [], [])
    plan = decide(probe.look(SID, before), Desired.AS_FOUND, Policy())
    os.close(pidfd)
    assert plan.verdict is Verdict.STALE


def test_on_another_host(
    manager: KeeperManager, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe.folder, "remote", True)
    pid = spawn(manager, SID).keeper_pid
    before = probe.look(SID)
    assert judge(before).verdict is Verdict.READY
    kill(pid)
    assert judge(probe.look(SID, before)).verdict is Verdict.STALE
    assert judge(probe.look(SID)).verdict is Verdict.UNVERIFIABLE


# Without files, or with too many keepers.


@pytest.mark.parametrize("make", ["ours", "node"])
def test_a_keeper_whose_files_were_deleted(
    request: pytest.FixtureRequest, probe: Probe, make: str
) -> None:
    manager = request.getfixturevalue("manager" if make == "ours" else "node_manager")
    pid = spawn(manager, SID).keeper_pid
    before = probe.look(SID)
    for name in (SOCKET, PID_FILE, AGENT_FILE):
        (manager.sessions_dir / name).unlink(missing_ok=True)
    assert probe.look(SID).empty
    expected = Rebind(identity(pid)) if make == "ours" else StopKeeper(identity(pid))
    for seen in (probe.look(SID, before), probe.look(SID, scanned=probe.scan()[SID])):
        assert (seen.keeper.state, seen.keeper.process) == (KeeperState.PROVEN, identity(pid))
        plan = judge(seen)
        assert (plan.verdict, plan.actions) == (Verdict.LOST, (expected,))


def test_a_keeper_whose_files_were_deleted_with_its_logs_is_not_dead(
    node_manager: KeeperManager, probe: Probe
) -> None:
    """Nothing proves it any more, and its agent is nobody's leftover for that."""
    spawned = spawn(node_manager, SID)
    seen = probe.look(SID)
    assert seen.agent.proven
    for path in node_manager.sessions_dir.iterdir():
        path.unlink()
    seen = probe.look(SID, seen)
    assert seen.keeper.process == identity(spawned.keeper_pid)
    assert decide(seen, Desired.AS_FOUND, NOW).verdict is Verdict.UNVERIFIABLE
    seen = probe.look(SID, seen)
    assert decide(seen, Desired.AS_FOUND, NOW).actions == ()


def test_a_keeper_without_files_that_ended_is_nobody(manager: KeeperManager, probe: Probe) -> None:
    pid = spawn(manager, SID).keeper_pid
    before = probe.look(SID)
    kill(pid)
    for name in (SOCKET, PID_FILE, AGENT_FILE):
        (manager.sessions_dir / name).unlink(missing_ok=True)
    seen = probe.look(SID, before, scanned=[pid])
    assert seen.empty
    assert judge(seen).verdict is Verdict.ABSENT


def test_a_keeper_without_a_socket(node_manager: KeeperManager, probe: Probe) -> None:
    spawn(node_manager, SID)
    (node_manager.sessions_dir / SOCKET).unlink()
    plan = judge(probe.look(SID))
    assert (plan.verdict, plan.actions) == (Verdict.UNREACHABLE, ())


@pytest.mark.parametrize("known", ["before", "scanned"])
def test_usurped(
    node_manager: KeeperManager, probe: Probe, stack: contextlib.ExitStack, known: str
) -> None:
    """The second Node keeper takes the name of the first, which lives on unseen."""
    first = spawn(node_manager, SID).keeper_pid
    before = probe.look(SID)
    second = stack.enter_context(usurper(node_manager, SID))
    seen = (
        probe.look(SID, before) if known == "before" else probe.look(SID, scanned=probe.scan()[SID])
    )
    assert seen.keeper.process == seen.listener == identity(second)
    assert [rival.process for rival in seen.rivals] == [identity(first)]
    plan = judge(seen)
    assert (plan.verdict, plan.actions) == (
        Verdict.USURPED,
        (StopKeeper(identity(first), at_once=True),),
    )
    assert identity(first) in seen.watched
    kill(first)  # not its agent: its end would make it delete the files of the second
    again = probe.look(SID, seen)
    assert again.rivals == ()
    assert judge(again).verdict is Verdict.READY


def test_the_eldest_of_several_unnamed_keepers_comes_first(folder: Path, probe: Probe) -> None:
    with keeper_without_agent(folder, SID) as (first,):
        until(lambda: SYSTEM.facts(first).age > 0.02)
        with keeper_without_agent(folder, SID) as (second,):
            (folder / PID_FILE).write_text(str(dead_pid()))
            seen = probe.look(SID, scanned=[second, first])
            assert seen.keeper.process == identity(first)
            assert [rival.process for rival in seen.rivals] == [identity(second)]


def test_a_scan_may_be_old(folder: Path, probe: Probe, innocent: int) -> None:
    stale_pair(folder, SID)
    seen = probe.look(SID, scanned=[innocent, dead_pid()])
    assert seen.rivals == ()
    assert seen.keeper.state is KeeperState.NONE
