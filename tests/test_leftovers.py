"""What a session has started and left behind: found, told, ended, and never taken for another's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from conftest import (
    NODE_KEEPER,
    PROGRAM,
    SINK,
    Told,
    alive,
    asynchronous,
    happens,
    identity,
    program_environment,
    root,
    soon,
    until,
)
from stand_ins import NOBODY, keeper_without_agent, kill, running, spawn

from reconciler.controller import Reconciler
from reconciler.errors import FolderError, NoSuchSessionError
from reconciler.facts import Processes
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager
from reconciler.ladder import Ladder
from reconciler.layout import FOLDER_MARKER, SESSION_MARKER
from reconciler.leftovers import Leftovers
from reconciler.observations import Keeper, KeeperState
from reconciler.plans import Verdict
from reconciler.portable import PORTABLE
from reconciler.processes import LINUX
from reconciler.rpc_writer import RpcWriter
from reconciler.sessions import Session
from reconciler.state import Policy

SID = "demo"
NO_KEEPER = Keeper(KeeperState.NONE)
BOTH = pytest.mark.parametrize("processes", [LINUX, PORTABLE], ids=["linux", "portable"])

STARTS = "setsid {} > /dev/null 2>&1 < /dev/null & exec cat > /dev/null"
"""A stand-in agent that starts a command as the real one does: in a session of its own."""

STARTER = ("sh", "-c", STARTS.format("sleep 600"))
STUBBORN = ("sh", "-c", STARTS.format("sh -c 'trap : TERM; while :; do sleep 600; done'"))


@pytest.fixture
def opened(folder: Path) -> Iterator[Folder]:
    with Folder(folder) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_is_left(folder: Path) -> Iterator[None]:
    """What a test leaves over is killed by its marker, which is this very folder's.

    Not by what is under test here: that may take anybody for a leftover.
    """
    status = folder.stat()
    mark = f"\0{FOLDER_MARKER}={status.st_dev}:{status.st_ino}\0".encode()
    yield
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in b"\0" + environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)


def named(manager: KeeperManager, name: str = "sleep", sid: str = SID) -> list[int]:
    """The pids of what a session has started, by the name of the program."""
    with contextlib.suppress(NoSuchSessionError):
        seen = manager.inspect(sid).seen
        return [each.process.pid for each in seen.leftovers if each.name == name]
    return []


async def started(manager: KeeperManager, command: tuple[str, ...] = STARTER) -> tuple[int, int]:
    """A session that has started something: its keeper's pid, and that process's."""
    spawned = await manager.spawn(SID, agent_command=command)
    await happens(lambda: named(manager), "the agent has started its command")
    return spawned.keeper_pid, named(manager)[0]


@contextlib.asynccontextmanager
async def reconciling(manager: KeeperManager) -> AsyncIterator[tuple[Reconciler, Told]]:
    told = Told()
    async with Reconciler(manager, resync=3600, logger=told.logger) as reconciler:
        await asyncio.wait_for(reconciler.settled(), 20)
        yield reconciler, told


def is_left(row: Session) -> bool:
    return row.phase is Verdict.LEFTOVERS


def is_gone(row: Session) -> bool:
    return row.phase is Verdict.ABSENT


def stopping(folder: Path) -> KeeperManager:
    """A manager whose policy is to end what sessions leave behind."""
    return KeeperManager(folder, policy=Policy(leftovers="stop"))


# Found, told, ended.


@asynchronous
async def test_a_crash_leaves_what_was_started_and_that_is_told_once(
    manager: KeeperManager,
) -> None:
    async with reconciling(manager) as (reconciler, told):
        keeper, left = await started(manager)
        await soon(reconciler.wait_for(SID, lambda row: row.phase is Verdict.READY))
        os.kill(keeper, signal.SIGKILL)
        row = await soon(reconciler.wait_for(SID, is_left))
        assert row.seen is not None
        assert [(each.process, each.name) for each in row.seen.leftovers] == [
            (identity(left), "sleep")
        ]
        (line,) = told.of("session.leftovers", SID)
        assert (line["leftovers"], line["leftover_count"]) == ([f"{left} sleep"], 1)
        assert (line["level"], line["keeper_pid"]) == ("warning", None)
        await asyncio.wait_for(reconciler.settled(), 20)
        assert len(told.of("session.leftovers", SID)) == 1
        assert alive(left)
        os.kill(left, signal.SIGKILL)
        await soon(reconciler.wait_for(SID, is_gone))


@asynchronous
async def test_a_crash_with_the_setting_ends_what_was_started(folder: Path) -> None:
    manager = stopping(folder)
    async with reconciling(manager) as (reconciler, told):
        keeper, left = await started(manager)
        await soon(reconciler.wait_for(SID, lambda row: row.phase is Verdict.READY))
        os.kill(keeper, signal.SIGKILL)
        await happens(lambda: not alive(left), "the leftover is ended")
        await happens(lambda: told.of("leftovers.stopped", SID))
        (line,) = told.of("leftovers.stopped", SID)
        assert line["detail"] == "1 ended by SIGTERM"
        assert told.events(SID).index("session.cleaned") < told.events(SID).index(
            "leftovers.stopped"
        )


@pytest.mark.parametrize("setting", ["report", "stop"])
@asynchronous
async def test_what_was_left_before_the_start_is_found(folder: Path, setting: str) -> None:
    manager = KeeperManager(folder) if setting == "report" else stopping(folder)
    keeper, left = await started(manager)
    kill(keeper)
    async with reconciling(manager) as (reconciler, _):
        if setting == "stop":
            await happens(lambda: not alive(left), "the leftover is ended")
        else:
            await soon(reconciler.wait_for(SID, is_left))
            assert alive(left)


@asynchronous
async def test_stop_ends_it_with_the_session(manager: KeeperManager) -> None:
    _, left = await started(manager)
    stopped = await manager.stop(SID)
    assert stopped.leftovers == 1
    assert not alive(left)
    with pytest.raises(NoSuchSessionError):
        manager.inspect(SID)


@asynchronous
async def test_stop_ends_what_is_over_but_for_its_leftovers(manager: KeeperManager) -> None:
    keeper, left = await started(manager)
    kill(keeper)
    for path in manager.sessions_dir.glob(f"{SID}.rpc.sock*"):
        path.unlink()
    assert manager.inspect(SID).plan.verdict is Verdict.LEFTOVERS
    assert (await manager.stop(SID)).leftovers == 1
    assert not alive(left)


@asynchronous
async def test_what_does_not_heed_sigterm_is_ended_by_sigkill(folder: Path) -> None:
    manager = KeeperManager(folder, ladder=Ladder(term_grace=0.2))
    await manager.spawn(SID, agent_command=STUBBORN)
    shell = os.path.basename(os.path.realpath("/bin/sh"))
    await happens(lambda: named(manager, shell) and named(manager), "the agent has started it")
    (left,) = named(manager, shell)
    assert (await manager.stop(SID)).leftovers >= 2
    assert not alive(left)
    assert not named(manager)


@asynchronous
async def test_the_reconcilers_stop_ends_it_too(manager: KeeperManager) -> None:
    async with reconciling(manager) as (reconciler, _):
        _, left = await started(manager)
        stopped = await asyncio.wait_for(reconciler.stop(SID), 20)
        assert stopped.leftovers == 1
        assert not alive(left)
        assert is_gone(reconciler.sessions.row(SID))


# Left alone on purpose.


@pytest.mark.parametrize("through", ["manager", "reconciler"])
@asynchronous
async def test_leave_keeps_it_whatever_the_setting(folder: Path, through: str) -> None:
    manager = stopping(folder)
    async with reconciling(manager) as (reconciler, told):
        _, left = await started(manager)
        await soon(reconciler.wait_for(SID, lambda row: row.phase is Verdict.READY))
        face = manager if through == "manager" else reconciler
        stopped = await asyncio.wait_for(face.stop(SID, leave=True), 20)
        assert stopped.leftovers == 0
        row = await soon(reconciler.wait_for(SID, is_left))
        assert row.reason == "left alone on purpose"
        await asyncio.wait_for(reconciler.settled(), 20)
        assert alive(left)
        assert not told.of("session.leftovers", SID)
        assert not told.of("leftovers.stopped", SID)
        os.kill(left, signal.SIGKILL)
        await soon(reconciler.wait_for(SID, is_gone))
        assert (folder / f"keeper-{SID}.leave").exists()
        for _ in range(3):  # one scan may miss what is between a fork and an exec
            assert (folder / f"keeper-{SID}.leave").exists()
            await asyncio.wait_for(reconciler.settled(), 20)
        assert not (folder / f"keeper-{SID}.leave").exists()


@asynchronous
async def test_a_second_thought_ends_what_was_left_on_purpose(manager: KeeperManager) -> None:
    async with reconciling(manager) as (reconciler, _):
        _, left = await started(manager)
        await asyncio.wait_for(reconciler.stop(SID, leave=True), 20)
        await soon(reconciler.wait_for(SID, is_left))
        stopped = await asyncio.wait_for(reconciler.stop(SID), 20)
        assert stopped.leftovers == 1
        assert not alive(left)


@asynchronous
async def test_a_new_session_of_the_name_ends_the_wish(manager: KeeperManager) -> None:
    _, left = await started(manager)
    await manager.stop(SID, leave=True)
    await manager.spawn(SID, agent_command=SINK)
    assert not (manager.sessions_dir / f"keeper-{SID}.leave").exists()
    assert alive(left)
    assert (await manager.stop(SID)).leftovers == 1
    assert not alive(left)


# The next session of the name is another one.


@pytest.mark.parametrize("leave", [True, False])
@asynchronous
async def test_a_stop_of_what_is_over_is_not_meant_for_the_next_of_the_name(
    manager: KeeperManager, *, leave: bool
) -> None:
    async with reconciling(manager) as (reconciler, _):
        keeper, left = await started(manager)
        await soon(reconciler.wait_for(SID, lambda row: row.phase is Verdict.READY))
        os.kill(keeper, signal.SIGKILL)
        await soon(reconciler.wait_for(SID, is_left))
        await asyncio.wait_for(reconciler.stop(SID, leave=leave), 20)
        assert alive(left) is leave
        spawned = await asyncio.wait_for(manager.spawn(SID, agent_command=SINK), 20)
        await soon(reconciler.wait_for(SID, lambda row: row.phase is Verdict.READY))
        await asyncio.wait_for(reconciler.settled(), 20)
        assert alive(spawned.keeper_pid)
        assert alive(left) is leave


@pytest.mark.parametrize("through", ["manager", "reconciler"])
@asynchronous
async def test_a_session_that_comes_while_leftovers_are_ended_is_not_stopped(
    folder: Path, through: str
) -> None:
    manager = KeeperManager(folder, ladder=Ladder(term_grace=3.0))
    async with reconciling(manager) as (reconciler, _):
        await manager.spawn(SID, agent_command=STUBBORN)
        await happens(lambda: named(manager), "the agent has started it")
        face = manager if through == "manager" else reconciler
        stop = asyncio.create_task(face.stop(SID))
        gone = lambda: not list(folder.glob(f"{SID}.rpc.sock*"))  # noqa: E731 - a condition
        await happens(gone, "the session is over")
        spawned = await manager.spawn(SID, agent_command=SINK)
        delivery = await RpcWriter(folder).write(SID, {"type": "get_state"})
        assert delivery.delivered
        await asyncio.wait_for(stop, 20)
        assert alive(spawned.keeper_pid)
        assert alive(spawned.agent_pid or 0)


@asynchronous
async def test_what_the_next_of_the_name_leaves_is_found_beside_the_old(
    manager: KeeperManager,
) -> None:
    async with reconciling(manager) as (reconciler, told):
        for count in (1, 2):
            spawned = await manager.spawn(SID, agent_command=STARTER)
            await happens(lambda: len(named(manager)) >= count, "its command runs")  # noqa: B023
            await soon(reconciler.wait_for(SID, lambda row: row.phase is Verdict.READY))
            os.kill(spawned.keeper_pid, signal.SIGKILL)
            await happens(
                lambda: [
                    line
                    for line in told.of("session.leftovers", SID)
                    if line["leftover_count"] == count  # noqa: B023 - it is asked at once
                ],
                "all of them are told",
            )


# Never taken for a leftover.


@pytest.mark.parametrize("options", ["-r ./nothing.js", "--no-warnings"])
@asynchronous
async def test_a_living_keeper_with_options_of_any_kind_is_spared(
    folder: Path, tmp_path: Path, options: str
) -> None:
    """Its arguments do not prove it to be one; they are enough to leave it alone."""
    (tmp_path / "nothing.js").write_text("")
    manager = KeeperManager(folder)
    env = program_environment(folder) | {"PI_DASHBOARD_HOME": str(folder.parents[2])}
    inner = "PI_KEEPER_PI_CMD='[\"sleep\"]' PI_KEEPER_PI_ARGS='[\"600\"]'"
    code = f"{inner} setsid node {options} {NODE_KEEPER} foreign & exec cat > /dev/null"
    await manager.spawn(SID, cwd=tmp_path, env=env, agent_command=("sh", "-c", code))
    agent_file = folder / "foreign.rpc.sock.pi-pid"
    await happens(lambda: agent_file.exists() and agent_file.read_text(), "it runs")
    agent = identity(int(agent_file.read_text()))
    await manager.stop(SID)
    assert identity(agent.pid) == agent
    assert (folder / "foreign.rpc.sock").is_socket()


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
@asynchronous
async def test_a_server_that_others_share_is_spared_with_all_in_it(
    folder: Path, tmp_path: Path
) -> None:
    manager = KeeperManager(folder)
    tmux = f"tmux -S {tmp_path}/t -f /dev/null"
    code = f"{tmux} new-session -d 'sleep 601'; exec cat > /dev/null"
    env = dict(os.environ) | {"TERM": "xterm"}
    await manager.spawn(SID, env=env, agent_command=("sh", "-c", code))
    ask = f"{tmux} list-panes -a -F '#{{pane_pid}} #{{pid}}'"

    def pids() -> list[int]:
        said = subprocess.run(["sh", "-c", ask], capture_output=True, text=True, check=False)
        return [int(word) for word in said.stdout.split()]

    await happens(pids, "the server runs")
    served = [identity(pid) for pid in pids()]
    try:
        await manager.stop(SID)
        assert [identity(process.pid) for process in served] == served
    finally:
        os.kill(served[-1].pid, signal.SIGKILL)  # the server; what is in it hangs up


@asynchronous
async def test_a_session_that_lives_has_none(folder: Path) -> None:
    """Not even with all of its files lost, and a daemon of its own that has detached itself."""
    manager = stopping(folder)
    _, daemon = await started(manager)
    for path in folder.glob(f"{SID}.rpc.sock*"):
        path.unlink()
    async with reconciling(manager) as (reconciler, told):
        await soon(reconciler.wait_for(SID, lambda row: row.phase is Verdict.READY))
        assert alive(daemon)
        assert not told.of("leftovers.stopped")


@asynchronous
async def test_a_new_session_of_the_name_shields_what_the_old_one_left(folder: Path) -> None:
    manager = stopping(folder)
    keeper, left = await started(manager)
    kill(keeper)
    await manager.spawn(SID, agent_command=SINK)
    async with reconciling(manager) as (reconciler, _):
        await soon(reconciler.wait_for(SID, lambda row: row.phase is Verdict.READY))
        await asyncio.wait_for(reconciler.settled(), 20)
        assert alive(left)


@asynchronous
async def test_another_folders_session_of_the_name_is_none_of_ours(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="pi-") as other:
        there = KeeperManager(other)
        _, theirs = await started(there)
        manager = stopping(folder)
        keeper, ours = await started(manager)
        assert named(manager) == [ours]
        try:
            kill(keeper)
            async with reconciling(manager):
                await happens(lambda: not alive(ours), "the leftover is ended")
            assert alive(theirs)
            assert named(there) == [theirs]
        finally:
            await there.stop(SID)


@asynchronous
async def test_a_session_that_was_started_from_inside_lives_on(folder: Path) -> None:
    """Started by our program, or by a keeper of another make that passes the marker on."""
    manager = KeeperManager(folder)
    home = folder.parents[2]
    ours = [*PROGRAM, "--sessions-dir", str(folder), "spawn", "inner", "--", *SINK]
    # As the dashboard does it: the keeper inherits the environment as it is.
    theirs = f"setsid node {NODE_KEEPER} foreign & exec cat > /dev/null"
    code = f"{' '.join(map(_quoted, ours))}; {theirs}"
    env = {
        **program_environment(folder),
        "PI_DASHBOARD_HOME": str(home),
    }
    inner_env = "PI_KEEPER_PI_CMD='[\"sleep\"]' PI_KEEPER_PI_ARGS='[\"600\"]' "
    await manager.spawn(
        SID,
        env=env,
        agent_command=("sh", "-c", code.replace("setsid node", f"{inner_env} setsid node")),
    )
    pid_files = [folder / f"{sid}.rpc.sock.pi-pid" for sid in ("inner", "foreign")]
    await happens(lambda: all(path.exists() and path.read_text() for path in pid_files))
    pids = [int(path.read_text()) for path in pid_files]
    keepers = [int((folder / f"{sid}.rpc.sock.pid").read_text()) for sid in ("inner", "foreign")]
    before = [identity(pid) for pid in (*pids, *keepers)]
    assert LINUX.variable(keepers[0], SESSION_MARKER) == ""
    assert LINUX.variable(keepers[1], SESSION_MARKER) == SID
    await manager.stop(SID)
    assert [identity(pid) for pid in (*pids, *keepers)] == before


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


@asynchronous
async def test_a_session_may_be_stopped_from_inside(folder: Path, tmp_path: Path) -> None:
    """Whoever stops it, and what waits for that one, is not ended by it."""
    manager = KeeperManager(folder)
    said = tmp_path / "said"
    stop = " ".join([*PROGRAM, "--sessions-dir", str(folder), "stop", SID])
    code = f"setsid sh -c '{stop} > {said} 2>&1; echo $? >> {said}' & exec cat > /dev/null"
    await manager.spawn(
        SID, env=program_environment(folder), agent_command=("sh", "-c", code), ready=False
    )
    await happens(lambda: said.exists() and said.read_text().endswith("\n0\n"), "it has stopped")
    assert said.read_text().startswith(f"{SID} stopped")


MARKED = "print(os.getpid(), flush=True); signal.pause()"


def marked(opened: Folder, sid: str = SID, folder: str | None = None) -> dict[str, str]:
    mark = "{}:{}".format(*opened.key)
    return {SESSION_MARKER: sid, FOLDER_MARKER: folder or mark}


@BOTH
def test_both_markers_make_it_this_sessions(opened: Folder, processes: Processes) -> None:
    leftovers = Leftovers(opened, processes=processes)
    with running(MARKED, env=marked(opened)) as (pid,):
        assert leftovers.scan()[SID] == [pid]
        (found,) = leftovers.find(SID, NO_KEEPER, [pid, pid])
        process = processes.facts(pid).process
        assert process is not None
        assert (found.process, found.name) == (process, processes.program(pid))
        assert found.name.startswith("python")
        assert leftovers.proves(SID, process)
        assert not leftovers.proves("other", process)
    assert not leftovers.proves(SID, process)
    assert leftovers.find(SID, NO_KEEPER, [pid]) == ()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {SESSION_MARKER: SID},
        {SESSION_MARKER: SID, FOLDER_MARKER: "1:1"},
        {SESSION_MARKER: "../x", FOLDER_MARKER: "MARK"},
        {SESSION_MARKER: "", FOLDER_MARKER: "MARK"},
        {"X": f"{SESSION_MARKER}={SID}", FOLDER_MARKER: "MARK"},
    ],
)
def test_less_than_both_markers_proves_nothing(opened: Folder, environment: dict[str, str]) -> None:
    mark = "{}:{}".format(*opened.key)
    env = {name: mark if value == "MARK" else value for name, value in environment.items()}
    leftovers = Leftovers(opened)
    with running(MARKED, env=env) as (pid,):
        assert not leftovers.scan()
        assert leftovers.find(SID, NO_KEEPER, [pid]) == ()
        assert not leftovers.proves(SID, identity(pid))


def test_a_keeper_is_none_and_what_stands_under_one_is_its_own(opened: Folder) -> None:
    child = (
        "child = os.fork()\n"
        "if not child: os.execvp('sleep', ['sleep', '600'])\n"
        "while open(f'/proc/{child}/comm').read() != 'sleep\\n': pass\n"
        "print(os.getpid(), child, flush=True)\n"
        "signal.pause()"
    )
    os.environ.update(marked(opened))
    try:
        with keeper_without_agent(opened.path, "inner", code=child) as pids:
            leftovers = Leftovers(opened)
            assert sorted(leftovers.scan()[SID]) == sorted(pids)
            assert leftovers.find(SID, NO_KEEPER, pids) == ()
            keeper = Keeper(KeeperState.PROVEN, identity(pids[0]))
            (under,) = leftovers.find(SID, keeper, pids)
            assert under.process == identity(pids[1])
            assert not leftovers.proves(SID, under.process)
    finally:
        for name in marked(opened):
            del os.environ[name]


def test_nobody_takes_himself_for_a_leftover_nor_those_above_him(opened: Folder) -> None:
    code = (
        "import json, os, sys, subprocess\n"
        "from pathlib import Path\n"
        "from reconciler.folder import Folder\n"
        "from reconciler.leftovers import Leftovers\n"
        "from reconciler.observations import Keeper, KeeperState\n"
        "leftovers = Leftovers(Folder(Path(sys.argv[1])))\n"
        "found = leftovers.scan()['demo']\n"
        "assert {os.getpid(), os.getppid()} <= set(found)\n"
        "left = leftovers.find('demo', Keeper(KeeperState.NONE), found)\n"
        "print(json.dumps([each.process.pid for each in left]))\n"
    )
    env = program_environment(opened.path) | marked(opened)
    with running(MARKED, env=marked(opened)) as (beside,):
        said = subprocess.run(
            ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code, str(opened.path)],
            env=env,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        assert json.loads(said) == [beside]


@root
def test_another_users_process_is_none(opened: Folder) -> None:
    drop = f"os.setuid({NOBODY}); os.execv('/bin/sleep', ['sleep', '600'])"
    with running(f"print(os.getpid(), flush=True); {drop}", env=marked(opened)) as (pid,):
        until(lambda: LINUX.facts(pid).uid == NOBODY)
        leftovers = Leftovers(opened)
        assert leftovers.find(SID, NO_KEEPER, [pid]) == ()
        assert not leftovers.proves(SID, identity(pid))


@root
def test_a_process_of_another_pid_namespace_is_none(opened: Folder) -> None:
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", "sleep", "600"], env=marked(opened) | PATHS
    ) as outer:
        try:
            until(lambda: LINUX.children(outer.pid))
            (inner,) = LINUX.children(outer.pid) or ()
            until(lambda: (LINUX.arguments(inner) or ("",))[0] == "sleep")
            leftovers = Leftovers(opened)
            found = leftovers.find(SID, NO_KEEPER, [outer.pid, inner])
            assert [each.process.pid for each in found] == [outer.pid]
        finally:
            outer.kill()


PATHS = {"PATH": os.environ["PATH"]}


# The command line.


@pytest.fixture
def cli(folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROGRAM, "--sessions-dir", str(folder), *arguments],
            env=program_environment(folder),
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_command_line_shows_and_ends_them(
    manager: KeeperManager, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    keeper, left = asyncio.run(started(manager))
    assert f"started         {left} sleep" in cli("inspect", SID).stdout
    kill(keeper)
    assert cli("run", "--once").returncode == 0
    told = cli("inspect", SID).stdout
    assert f"leftovers       {left} sleep" in told
    assert "leftovers, because: session over, what it started lives on" in told
    (row,) = json.loads(cli("ls", "--json").stdout)
    assert (row["phase"], row["leftovers"]) == ("leftovers", [left])
    assert cli("stop", SID).stdout == f"{SID} stopped, with 1 more that it had started\n"
    assert not alive(left)


def test_the_command_line_leaves_them(
    manager: KeeperManager, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    _, left = asyncio.run(started(manager))
    assert cli("stop", "--leave", SID).stdout == f"{SID} stopped\n"
    assert alive(left)
    assert "(to be left alone)" in cli("inspect", SID).stdout
    (ended,) = json.loads(cli("stop", SID, "--json").stdout)
    assert (ended["stopped"], ended["leftover_count"]) == (True, 1), ended
    assert not alive(left)


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
@asynchronous
async def test_what_is_no_file_of_ours_is_no_wish_and_stays(
    manager: KeeperManager, kind: str
) -> None:
    path = manager.sessions_dir / f"keeper-{SID}.leave"
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case _:
            path.symlink_to("/nowhere")
    _, left = await started(manager)
    with pytest.raises(FolderError, match="cannot be written to"):
        await manager.stop(SID, leave=True)
    async with reconciling(manager) as (reconciler, _):
        assert (await asyncio.wait_for(reconciler.stop(SID), 20)).leftovers == 1
    assert not alive(left)
    assert os.path.lexists(path)


def test_more_than_there_are_descriptors_for_end_in_turns(folder: Path) -> None:
    many = "for i in $(seq 60); do setsid sleep 600 > /dev/null 2>&1 < /dev/null & done"
    manager = KeeperManager(folder)
    asyncio.run(manager.spawn(SID, agent_command=("sh", "-c", f"{many}; exec cat > /dev/null")))
    until(lambda: len(named(manager)) == 60, "they run")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        assert asyncio.run(manager.stop(SID)).leftovers == 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not named(manager)


@asynchronous
async def test_a_name_tells_no_secret(manager: KeeperManager) -> None:
    """A program may write anything over its arguments."""
    title = "worker redis://:hunter2@host:1 \x1b]0;pwned\x07"
    start = f"exec -a {_quoted(title)} sleep 600"
    code = f"setsid bash -c {_quoted(start)} > /dev/null 2>&1 < /dev/null & exec cat > /dev/null"
    await manager.spawn(SID, agent_command=("sh", "-c", code))
    await happens(lambda: named(manager), "it runs")
    (left,) = named(manager)
    assert title in (LINUX.arguments(left) or ("",))[0]


def test_a_wish_that_cannot_be_noted_down_changes_nothing(
    manager: KeeperManager, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    spawned = spawn(manager, SID)
    (manager.sessions_dir / f"keeper-{SID}.leave").mkdir()
    ended = cli("stop", "--leave", SID)
    assert ended.returncode == 1
    assert "cannot be written to, to note down" in ended.stderr
    assert alive(spawned.keeper_pid)
