from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import WAIT, alive, dead_pid, identity, root, stale_pair, until
from stand_ins import (
    WAITS,
    agent_of,
    keeper_without_agent,
    kill,
    listening,
    running,
    spawn,
    usurper,
)

from reconciler import processes
from reconciler.effects import Done, Effects
from reconciler.facts import DEAD, Facts
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager
from reconciler.ladder import Ladder, end
from reconciler.layout import FOLDER_MARKER, KEEPER_PROGRAM, SESSION_MARKER, Role, file_name
from reconciler.observations import Agent, AgentState, FileId, Keeper, KeeperState, Observation
from reconciler.plans import (
    Adopt,
    Plan,
    Rebind,
    Remove,
    Stop,
    StopAgent,
    StopKeeper,
    StopLeftovers,
    Verdict,
)
from reconciler.probe import Probe
from reconciler.processes import LINUX, SYSTEM, Target
from reconciler.state import Desired, Policy, decide

SID = "5f0e7c1e-0c50-4f0e-9b39-4e4a3a2f3d11"
SOCKET, PID_FILE, AGENT_FILE = (
    file_name(role, SID) for role in (Role.SOCKET, Role.PID_FILE, Role.AGENT_PID_FILE)
)
SHORT = Ladder(term_grace=0.05, kill_grace=10.0)
LONG = Ladder(term_grace=20.0, kill_grace=20.0)
NOW = Policy(settle=0, start_grace=0, orphan_grace=0)
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + WAITS + "\nwhile True: signal.pause()"
REPO = Path(__file__).parent.parent


@pytest.fixture
def opened(folder: Path) -> Iterator[Folder]:
    with Folder(folder) as opened:
        yield opened


@pytest.fixture
def probe(opened: Folder) -> Probe:
    return Probe(opened)


@pytest.fixture
def effects(probe: Probe) -> Effects:
    return Effects(probe, LONG)


def judge(seen: Observation, desired: Desired = Desired.AS_FOUND) -> Plan:
    return decide(seen, desired, NOW)


def stop(effects: Effects, seen: Observation, action: Stop) -> Done:
    return asyncio.run(effects.stop(seen, action))


def claims(folder: Path) -> dict[str, int]:
    """The files of the session by inode, hidden ones too."""
    return {p.name: p.lstat().st_ino for p in folder.iterdir() if not p.name.endswith(".log")}


# The ladder.


@pytest.mark.parametrize(
    ("code", "stopped", "ladder", "at_once", "how"),
    [
        pytest.param(WAITS, False, LONG, False, "ended by SIGTERM", id="obeys"),
        pytest.param(DEAF, False, SHORT, False, "ended by SIGKILL", id="ignores SIGTERM"),
        pytest.param(WAITS, True, SHORT, False, "ended by SIGKILL", id="is stopped"),
        pytest.param(DEAF, False, LONG, True, "ended by SIGKILL", id="at once"),
    ],
)
def test_the_ladder(*, code: str, stopped: bool, ladder: Ladder, at_once: bool, how: str) -> None:
    with running(code) as (pid,):
        if stopped:
            os.kill(pid, signal.SIGSTOP)
            os.waitid(os.P_PID, pid, os.WSTOPPED)
        with Target(identity(pid), lambda: True) as target:
            done = asyncio.run(end(target, ladder, at_once=at_once))
        assert done == (True, how)
        assert not alive(pid)


def test_the_ladder_of_a_process_that_is_dead() -> None:
    with running() as (pid,):
        process = identity(pid)
        kill(pid)
        with Target(process, lambda: True) as target:
            assert asyncio.run(end(target, LONG)) == (True, "dead already")


def test_the_ladder_of_a_process_that_hangs_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[signal.Signals] = []

    def swallow(_: Target, number: signal.Signals, *, group: bool = False) -> bool:
        del group
        sent.append(number)
        return True

    monkeypatch.setattr(Target, "send", swallow)
    with running() as (pid,), Target(identity(pid), lambda: True) as target:
        ladder = Ladder(term_grace=0.01, kill_grace=0.01)
        assert asyncio.run(end(target, ladder)) == (False, "alive after SIGKILL")
        assert sent == [signal.SIGTERM, signal.SIGKILL]


def test_the_ladder_ends_when_the_proof_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no pidfds the proof is asked for before each signal."""
    monkeypatch.delattr(os, "pidfd_open")
    answers = [True, True, False]
    with running(DEAF) as (pid,), Target(identity(pid), lambda: answers.pop(0)) as target:
        done = asyncio.run(end(target, Ladder(term_grace=0.01)))
        assert done == (False, "not proven any more, not signalled")
        assert alive(pid)


# Stopping.


def test_a_keeper_of_ours_is_stopped_with_its_agent(
    manager: KeeperManager, probe: Probe, effects: Effects
) -> None:
    pid = spawn(manager, SID).keeper_pid
    agent = agent_of(manager, SID)
    done = stop(effects, probe.look(SID), StopKeeper(identity(pid)))
    assert (done.success, done.detail) == (True, "ended by SIGTERM")
    assert 0 < done.duration < 20
    until(lambda: not alive(agent))
    assert claims(manager.sessions_dir) == {}


def test_the_group_that_a_keeper_leads_gets_the_signal(
    opened: Folder, probe: Probe, effects: Effects
) -> None:
    code = (
        "os.setsid(); child = os.fork()\n"
        "if child: print(os.getpid(), child, flush=True)\n"
        "signal.pause()"
    )
    with keeper_without_agent(opened.path, SID, code=code) as (pid, child):
        assert stop(effects, probe.look(SID), StopKeeper(identity(pid))).success
        until(lambda: not alive(child))


def test_a_deaf_keeper_is_killed(opened: Folder, probe: Probe) -> None:
    with keeper_without_agent(opened.path, SID, code=DEAF) as (pid,):
        effects = Effects(probe, SHORT)
        done = stop(effects, probe.look(SID), StopKeeper(identity(pid)))
        assert (done.success, done.detail) == (True, "ended by SIGKILL")


def test_a_stopped_keeper_whose_agent_died_is_killed_and_then_its_files_go(
    node_manager: KeeperManager, probe: Probe
) -> None:
    pid = spawn(node_manager, SID).keeper_pid
    os.kill(pid, signal.SIGSTOP)
    kill(agent_of(node_manager, SID))
    seen = probe.look(SID)
    plan = judge(seen)
    assert (plan.verdict, plan.actions) == (Verdict.ORPHAN, (StopKeeper(identity(pid)),))
    effects = Effects(probe, SHORT)
    before = claims(node_manager.sessions_dir)
    assert stop(effects, seen, StopKeeper(identity(pid))).detail == "ended by SIGKILL"
    assert claims(node_manager.sessions_dir) == before
    seen = probe.look(SID, seen)
    (remove,) = judge(seen).actions
    assert isinstance(remove, Remove)
    assert effects.instant(seen, remove).success
    assert claims(node_manager.sessions_dir) == {}


@pytest.mark.parametrize("at_once", [True, False])
def test_who_is_not_proven_is_not_stopped(
    manager: KeeperManager, probe: Probe, effects: Effects, innocent: int, *, at_once: bool
) -> None:
    spawn(manager, SID)
    seen = probe.look(SID)
    done = stop(effects, seen, StopKeeper(identity(innocent), at_once=at_once))
    assert (done.success, done.detail) == (False, "not proven any more, not signalled")
    assert alive(innocent)


def test_a_later_owner_of_the_pid_is_not_stopped(
    manager: KeeperManager, probe: Probe, effects: Effects
) -> None:
    pid = spawn(manager, SID).keeper_pid
    earlier = replace(identity(pid), started=identity(pid).started - 1)
    seen = probe.look(SID)
    done = stop(effects, seen, StopKeeper(earlier))
    assert (done.success, done.detail) == (False, "not proven any more, not signalled")
    assert alive(pid)


def test_a_keeper_whose_folder_is_another_by_now_is_not_stopped(
    manager: KeeperManager, probe: Probe, effects: Effects, opened: Folder
) -> None:
    pid = spawn(manager, SID).keeper_pid
    seen = probe.look(SID)
    elsewhere = opened.path.parent
    opened.close()
    opened.fd = os.open(elsewhere, os.O_RDONLY | os.O_DIRECTORY)
    opened.key = (elsewhere.stat().st_dev, elsewhere.stat().st_ino)
    done = stop(effects, seen, StopKeeper(identity(pid)))
    assert not done.success
    assert alive(pid)


def test_an_agent_that_outlived_its_keeper_is_stopped(
    node_manager: KeeperManager, probe: Probe
) -> None:
    spawned = spawn(node_manager, SID)
    agent = agent_of(node_manager, SID)
    os.kill(agent, signal.SIGSTOP)
    before = probe.look(SID)
    kill(spawned.keeper_pid)
    seen = probe.look(SID, before)
    plan = judge(seen)
    assert (plan.verdict, plan.actions) == (Verdict.ORPHAN_AGENT, (StopAgent(identity(agent)),))
    done = stop(Effects(probe, SHORT), seen, StopAgent(identity(agent)))
    assert (done.success, alive(agent)) == (True, False)
    assert judge(probe.look(SID, seen)).verdict is Verdict.STALE


@pytest.mark.parametrize("proven", [True, False])
def test_an_agent_is_stopped_only_as_it_was_proven(
    probe: Probe, effects: Effects, innocent: int, *, proven: bool
) -> None:
    another = replace(identity(os.getpid()), started=1) if proven else identity(innocent)
    agent = Agent(AgentState.ALIVE, 0.0, another, proven=proven)
    seen = replace(probe.look(SID), agent=agent)
    done = stop(effects, seen, StopAgent(identity(innocent)))
    assert (done.success, done.detail) == (False, "not proven any more, not signalled")
    assert alive(innocent)


def test_no_descriptor_left_to_hold_it_by(
    manager: KeeperManager, probe: Probe, effects: Effects
) -> None:
    pid = spawn(manager, SID).keeper_pid
    seen = probe.look(SID)
    process = identity(pid)
    loop = asyncio.new_event_loop()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            loop.run_until_complete(effects.stop(seen, StopKeeper(process)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        loop.close()
    assert alive(pid)


# Two keepers for one session.


def test_a_usurped_keeper_is_killed_at_once_and_the_winners_files_survive(
    node_manager: KeeperManager, probe: Probe, effects: Effects
) -> None:
    first = spawn(node_manager, SID).keeper_pid
    before = probe.look(SID)
    agent = agent_of(node_manager, SID)
    os.kill(agent, signal.SIGSTOP)
    with usurper(node_manager, SID) as second:
        winners = claims(node_manager.sessions_dir)
        seen = probe.look(SID, before)
        plan = judge(seen)
        assert plan.actions == (StopKeeper(identity(first), at_once=True),)
        done = stop(effects, seen, StopKeeper(identity(first), at_once=True))
        assert (done.success, done.detail) == (True, "ended by SIGKILL")
        assert not alive(agent)
        assert claims(node_manager.sessions_dir) == winners
        seen = probe.look(SID, seen)
        assert (judge(seen).verdict, seen.listener) == (Verdict.READY, identity(second))


def test_the_agent_of_a_usurped_keeper_ends_while_that_still_proves_it(
    node_manager: KeeperManager, probe: Probe, effects: Effects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were we killed in between, the agent would be nobody's, and live for ever."""
    first = spawn(node_manager, SID).keeper_pid
    agent = agent_of(node_manager, SID)
    sent: list[tuple[int, signal.Signals, bool]] = []
    send = Target.send

    def noted(target: Target, number: signal.Signals, *, group: bool = False) -> bool:
        sent.append((target.process.pid, number, alive(agent)))
        return send(target, number, group=group)

    monkeypatch.setattr(Target, "send", noted)
    with usurper(node_manager, SID):
        seen = probe.look(SID)
        stop(effects, seen, StopKeeper(identity(first), at_once=True))
    assert sent == [
        (first, signal.SIGSTOP, True),
        (agent, signal.SIGTERM, True),
        (first, signal.SIGKILL, False),
    ]


def test_a_usurped_keeper_that_is_asked_to_end_would_take_the_winners_files(
    node_manager: KeeperManager,
) -> None:
    """Why it is killed."""
    first = spawn(node_manager, SID).keeper_pid
    with usurper(node_manager, SID):
        os.kill(first, signal.SIGTERM)
        until(lambda: not alive(first))
        assert claims(node_manager.sessions_dir) == {}


CHILDREN = """
os.setsid()
pids = [os.getpid()]
for kind in ("agent", "listener", "keeper"):
    if child := os.fork(): pids.append(child)
    elif kind == "keeper": signal.pause()
    else: os.execvp("sleep", ["sleep", "600"])
print(*pids, flush=True)
signal.pause()
"""


def test_of_the_children_of_a_usurped_keeper_only_its_agent_is_ended(
    opened: Folder, probe: Probe, effects: Effects
) -> None:
    with keeper_without_agent(opened.path, SID, code=CHILDREN) as (pid, agent, listener, winner):
        until(lambda: all(SYSTEM.arguments(p) == ("sleep", "600") for p in (agent, listener)))
        rival = Keeper(KeeperState.PROVEN, identity(winner))
        seen = replace(
            probe.look(SID, scanned=(pid,)), listener=identity(listener), rivals=(rival,)
        )
        assert seen.keeper.process == identity(pid)
        done = stop(effects, seen, StopKeeper(identity(pid), at_once=True))
        assert (done.success, done.detail) == (True, "ended by SIGKILL")
        assert [alive(child) for child in (agent, listener, winner)] == [False, True, True]


KEEPS_ANOTHER = """
import sys
child = os.fork()
if not child:
    script = sys.argv[0]
    code = "import signal; signal.pause()"
    open(script + "2/keeper.cjs", "w").write(code)
    os.execv(sys.executable, [sys.executable, "-X", "utf8", script + "2/keeper.cjs", "another"])
print(os.getpid(), child, flush=True)
signal.pause()
"""


def test_a_child_that_may_be_the_keeper_of_another_session_is_nobodys_agent(
    opened: Folder, probe: Probe, effects: Effects, tmp_path: Path
) -> None:
    code = KEEPS_ANOTHER.replace('script + "2/', f'"{tmp_path}/')
    with keeper_without_agent(opened.path, SID, code=code) as (pid, child):
        until(lambda: "another" in (SYSTEM.arguments(child) or ()))
        rival = Keeper(KeeperState.PROVEN, identity(os.getpid()))
        seen = replace(probe.look(SID, scanned=(pid,)), rivals=(rival,))
        done = stop(effects, seen, StopKeeper(identity(pid), at_once=True))
        assert (done.success, done.detail) == (True, "ended by SIGKILL")
        assert alive(child)


def test_a_usurped_keeper_is_never_left_stopped(
    opened: Folder, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is broken off while its agents are ended: nobody would wake it again."""

    def broken(*_: object) -> list[Target]:
        raise OSError(errno.EMFILE, "no descriptor is left")

    monkeypatch.setattr(Effects, "_agents_of", broken)
    with keeper_without_agent(opened.path, SID) as (pid,):
        seen = probe.look(SID, scanned=(pid,))
        with pytest.raises(OSError, match="no descriptor"):
            stop(Effects(probe, LONG), seen, StopKeeper(identity(pid), at_once=True))
        until(lambda: not alive(pid))


def test_a_keeper_that_can_end_its_agent_itself_is_left_to_it(
    opened: Folder, probe: Probe, effects: Effects
) -> None:
    with keeper_without_agent(opened.path, SID, code=CHILDREN) as (pid, agent, listener, winner):
        until(lambda: all(SYSTEM.arguments(p) == ("sleep", "600") for p in (agent, listener)))
        rival = Keeper(KeeperState.PROVEN, identity(winner))
        seen = replace(
            probe.look(SID, scanned=(pid,)), listener=identity(listener), rivals=(rival,)
        )
        action = StopKeeper(identity(pid))
        done = stop(effects, seen, action)
        assert (done.action, done.success, done.detail) == (action, True, "ended by SIGTERM")
        assert [alive(child) for child in (agent, listener, winner)] == [True, True, True]


def test_the_ladder_that_is_given_is_climbed(probe: Probe) -> None:
    assert Effects(probe, SHORT)._ladder is SHORT
    assert Effects(probe)._ladder == Ladder()


# Binding again, and adopting.


def test_our_keeper_binds_again(manager: KeeperManager, probe: Probe, effects: Effects) -> None:
    pid = spawn(manager, SID).keeper_pid
    agent_of(manager, SID)
    for name in (SOCKET, PID_FILE):
        (manager.sessions_dir / name).unlink()
    done = effects.instant(probe.look(SID), Rebind(identity(pid)))
    assert (done.success, done.detail) == (True, "told to bind again")
    until(lambda: probe.folder.ask(SOCKET).pid == pid)
    until(lambda: probe.look(SID).pid_file.pid == pid)
    assert alive(pid)


class Nobody(type(LINUX)):  # type: ignore[misc]
    """A system on which no process lives."""

    def facts(self, pid: int) -> Facts:  # noqa: ARG002
        return DEAD


def test_only_who_is_there_by_the_systems_word_gets_a_signal(
    manager: KeeperManager, probe: Probe
) -> None:
    """The system that is given is the one that is asked."""
    pid = spawn(manager, SID).keeper_pid
    seen = probe.look(SID)
    effects = Effects(probe, LONG, Nobody())
    assert not effects.instant(seen, Rebind(identity(pid))).success
    done = asyncio.run(effects.stop(seen, StopKeeper(identity(pid))))
    assert (done.success, done.detail) == (False, "not proven any more, not signalled")
    assert alive(pid)


def test_who_is_not_the_keeper_is_not_told(probe: Probe, effects: Effects, innocent: int) -> None:
    done = effects.instant(probe.look(SID), Rebind(identity(innocent)))
    assert (done.success, done.detail) == (False, "not the keeper any more")
    assert alive(innocent)


def test_a_keeper_that_does_not_catch_the_signal_yet_is_not_told(
    opened: Folder, probe: Probe, effects: Effects
) -> None:
    caught = "signal.signal(signal.SIGHUP, lambda *_: None); " + WAITS + "\nsignal.pause()"
    for code, success in ((WAITS, False), (caught, True)):
        with keeper_without_agent(opened.path, SID, KEEPER_PROGRAM.name, code) as (pid,):
            seen = probe.look(SID, scanned=(pid,))
            assert (seen.keeper.process, seen.keeper.ours) == (identity(pid), True)
            assert effects.instant(seen, Rebind(identity(pid))).success is success
            assert alive(pid)


@pytest.mark.parametrize("text", [None, "", "x", "dead"])
def test_a_keeper_that_listens_gets_its_pid_file(
    folder: Path, probe: Probe, effects: Effects, text: str | None
) -> None:
    with listening(folder, SOCKET) as (pid,):
        path = folder / PID_FILE
        if text is not None:
            path.write_text(str(dead_pid()) if text == "dead" else text)
        seen = probe.look(SID)
        (adopt,) = judge(seen).actions
        assert adopt == Adopt(identity(pid), seen.pid_file.file)
        done = effects.instant(seen, adopt)
        assert (done.success, done.detail) == (True, "pid file written")
        assert 0 <= done.duration < WAIT
        assert path.read_bytes() == str(pid).encode()
        assert path.stat().st_mode & 0o777 == 0o600
        assert claims(folder).keys() == {SOCKET, PID_FILE}
        assert judge(probe.look(SID, seen)).verdict is Verdict.READY


@pytest.mark.parametrize("replaced", [True, False])
def test_a_pid_file_that_has_changed_is_not_replaced(
    folder: Path, probe: Probe, effects: Effects, *, replaced: bool
) -> None:
    with listening(folder, SOCKET):
        path = folder / PID_FILE
        if replaced:
            path.write_text("x")
        seen = probe.look(SID)
        (adopt,) = judge(seen).actions
        assert isinstance(adopt, Adopt)
        path.write_text("12")
        done = effects.instant(seen, adopt)
        assert (done.success, done.detail) == (False, "the pid file has changed")
        assert path.read_text() == "12"


def test_who_does_not_listen_any_more_is_not_adopted(
    folder: Path, probe: Probe, effects: Effects
) -> None:
    with listening(folder, SOCKET) as (pid,):
        seen = probe.look(SID)
        adopt = Adopt(identity(pid), None)
    assert not effects.instant(seen, adopt).success
    assert claims(folder).keys() == {SOCKET}


def test_a_pid_file_that_cannot_be_written_is_not_left_half_done(
    folder: Path, probe: Probe, effects: Effects
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with listening(folder, SOCKET) as (pid,):
        seen = probe.look(SID)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                effects.instant(seen, Adopt(identity(pid), None))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert claims(folder).keys() == {SOCKET}


# Removing.


def test_what_was_judged_is_removed(folder: Path, probe: Probe, effects: Effects) -> None:
    stale_pair(folder, SID)
    (folder / AGENT_FILE).write_text(str(dead_pid()))
    seen = probe.look(SID)
    (action,) = judge(seen).actions
    assert isinstance(action, Remove)
    done = effects.instant(seen, action)
    assert (done.success, done.action) == (True, action)
    assert done.detail == "socket removed, agent_pid_file removed, pid_file removed"
    assert done.duration > 0
    assert claims(folder) == {}


def test_a_removal_says_what_it_left(folder: Path, probe: Probe, effects: Effects) -> None:
    stale_pair(folder, SID)
    seen = probe.look(SID)
    (action,) = judge(seen).actions
    assert isinstance(action, Remove)
    (folder / SOCKET).unlink()
    (folder / PID_FILE).write_text("12")
    done = effects.instant(seen, action)
    assert (done.success, done.detail) == (False, "socket gone, pid_file changed")


def test_nothing_is_removed_while_a_keeper_holds_the_lock(
    manager: KeeperManager, probe: Probe, effects: Effects
) -> None:
    spawn(manager, SID)
    agent_of(manager, SID)
    before = claims(manager.sessions_dir)
    seen = probe.look(SID)
    entries = tuple((role, entry.file or FileId(0, 0, 0, 0)) for role, entry in seen.entries)
    done = effects.instant(seen, Remove(entries))
    assert (done.success, done.detail) == (False, "a keeper holds the session's lock")
    assert claims(manager.sessions_dir) == before


def test_an_innocent_process_with_the_keepers_pid_lives_on(
    folder: Path, probe: Probe, effects: Effects, innocent: int
) -> None:
    stale_pair(folder, SID)
    (folder / PID_FILE).write_text(str(innocent))
    seen = probe.look(SID)
    for action in judge(seen, Desired.ABSENT).actions:
        assert isinstance(action, Remove)
        assert effects.instant(seen, action).success
    assert claims(folder) == {}
    assert alive(innocent)


RECYCLE = """
import asyncio, os, signal, subprocess, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from reconciler.effects import Effects
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager
from reconciler.probe import Probe
from reconciler.processes import SYSTEM
from reconciler.state import Desired, Policy, decide

SID, path = "s1", Path(sys.argv[1])
folder = Folder(path)
probe = Probe(folder)
spawned = asyncio.run(KeeperManager(path).spawn(SID, agent_command=["sleep", "600"]))
pid = spawned.keeper_pid
before = probe.look(SID)
first = before.keeper.process
agent = before.agent.process
os.kill(pid, signal.SIGKILL)
assert {os.wait()[0], os.wait()[0]} == {pid, agent.pid}  # a zombie keeps its session's number

innocent = None
for _ in range(100):
    with open("/proc/sys/kernel/ns_last_pid", "w") as last:
        last.write(str(pid - 1))
    innocent = subprocess.Popen(["sleep", "600"])
    if innocent.pid == pid:
        break
    innocent.kill()
    innocent.wait()
assert innocent.pid == pid, "no pid was recycled"
while not SYSTEM.arguments(pid):
    time.sleep(0.002)  # it is on its way into its program

for known in (before, None):
    seen = probe.look(SID, known)
    plan = decide(seen, Desired.AS_FOUND, Policy())
    assert (plan.verdict.value, plan.reason) == ("stale", "pid recycled by another process"), plan
    assert seen.keeper.process.pid == pid and seen.keeper.process != first
effects = Effects(probe)
stopped = asyncio.run(effects.stop(before, decide(before, Desired.ABSENT, Policy()).actions[0]))
assert SYSTEM.facts(pid).process == seen.keeper.process, "the innocent was killed"
done = effects.instant(seen, plan.actions[0])
assert done.success, done
left = [name for name in folder.names() if not name.endswith(".log")]
print(left, stopped.detail, SYSTEM.facts(pid).process == seen.keeper.process)
innocent.kill()
"""


@root
@pytest.mark.root
def test_a_pid_that_was_truly_recycled(folder: Path) -> None:
    """The kernel gives the keeper's number to an innocent process, in a namespace of its own."""
    inside = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    done = subprocess.run(
        [
            *inside,
            sys.executable,
            "-I",
            "-c",
            RECYCLE,
            str(folder),
            str(REPO),
            *filter(None, sys.path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == "[] not proven any more, not signalled True\n"


# What a session has left over.

MARKED = "print(os.getpid(), flush=True); signal.pause()"
DEAF_AND_MARKED = "signal.signal(signal.SIGTERM, lambda *_: None); print(os.getpid(), flush=True)"
CHANGES = (
    "signal.signal(signal.SIGTERM, lambda *_: os.execve('/bin/sleep', ['sleep', '600'], {}));"
    "print(os.getpid(), flush=True); signal.pause()"
)


def markers(opened: Folder) -> dict[str, str]:
    return {SESSION_MARKER: SID, FOLDER_MARKER: "{}:{}".format(*opened.key)}


def test_leftovers_are_ended_all_at_once_and_told_by_their_ends(
    opened: Folder, probe: Probe
) -> None:
    env = markers(opened)
    with (
        running(MARKED, env=env) as (first,),
        running(MARKED, env=env) as (second,),
        running(f"{DEAF_AND_MARKED}\nwhile True: signal.pause()", env=env) as (deaf,),
        running(CHANGES, env=env) as (changed,),
    ):
        action = StopLeftovers(tuple(map(identity, (first, deaf, second, changed))))
        done = stop(Effects(probe, SHORT), probe.look(SID), action)
        assert sorted(done.detail.split(", ")) == [
            "1 ended by SIGKILL",
            "1 not proven any more",
            "2 ended by SIGTERM",
            "not signalled",
        ]
        assert not done.success
        assert [alive(pid) for pid in (first, deaf, second, changed)] == [False, False, False, True]


def test_leftovers_for_which_no_descriptor_is_left_wait_for_the_next_look(
    opened: Folder, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = markers(opened)
    real = processes.open_pidfd
    with running(MARKED, env=env) as (first,), running(MARKED, env=env) as (second,):

        def scarce(pid: int, *arguments: int) -> int | None:
            if pid == second:
                raise OSError(errno.EMFILE, "no descriptor is left")
            return real(pid, *arguments)

        monkeypatch.setattr(processes, "open_pidfd", scarce)
        action = StopLeftovers((identity(first), identity(second)))
        done = stop(Effects(probe, LONG), probe.look(SID), action)
        told = "1 ended by SIGTERM, 1 not held yet, too many at once"
        assert (done.success, done.detail) == (False, told)
        assert [alive(first), alive(second)] == [False, True]
