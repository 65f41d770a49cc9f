from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    HUNG,
    NODE_KEEPER,
    SINK,
    WAIT,
    Told,
    alive,
    asynchronous,
    bare_socket,
    dead_pid,
    end_all,
    happens,
    identity,
    open_descriptors,
    root,
    sessions_folder,
    soon,
    stale_pair,
    until,
)
from stand_ins import running as program

from reconciler import effects, exits, inotify, ladder, probe, removal
from reconciler.controller import Reconciler
from reconciler.errors import (
    FolderError,
    FolderLockedError,
    NoSuchSessionError,
    ReconcilerError,
    UnverifiableError,
)
from reconciler.findings import Finding
from reconciler.hints import AT_ONCE
from reconciler.keeper import KeeperManager, SpawnedKeeper
from reconciler.ladder import Ladder
from reconciler.layout import KEEPER_PROGRAM, registry_file
from reconciler.observations import Observation
from reconciler.plans import Verdict
from reconciler.processes import SYSTEM
from reconciler.requests import OUR_KEEPER
from reconciler.sessions import Session
from reconciler.state import Desired, Policy
from reconciler.workqueue import LongWork

SID = "8c2c7f0e-2a4b-4c57-9d63-3f6f3f1f2a10"
NODE = ("node", str(NODE_KEEPER))
QUICK = Policy(settle=0.3, start_grace=0.6, orphan_grace=0.1, lost_grace=0.9, rebind_grace=0.3)
LADDER = Ladder(term_grace=0.3, kill_grace=10.0)
NEVER = 3600.0

MAKES = pytest.mark.parametrize("make", [OUR_KEEPER, NODE], ids=["ours", "other"])
Make = tuple[str, ...]


def manager_of(folder: Path, make: Make = OUR_KEEPER) -> KeeperManager:
    return KeeperManager(folder, keeper_command=make, policy=QUICK, ladder=LADDER)


@contextlib.asynccontextmanager
async def running(
    manager: KeeperManager, *, resync: float = NEVER, dry_run: bool = False
) -> AsyncIterator[tuple[Reconciler, Told]]:
    told = Told()
    async with Reconciler(
        manager, resync=resync, dry_run=dry_run, logger=told.logger
    ) as reconciler:
        with contextlib.suppress(FolderError):  # told in the log, too
            await asyncio.wait_for(reconciler.settled(), 20)
        yield reconciler, told


def is_in(*phases: Verdict) -> Callable[[Session], bool]:
    return lambda session: session.phase in phases


async def ready(reconciler: Reconciler, sid: str) -> Session:
    return await soon(
        reconciler.wait_for(sid, lambda s: s.phase is Verdict.READY and s.agent_pid is not None)
    )


def only_exits_bring_looks(reconciler: Reconciler) -> None:
    """From here on no file event comes, and no full look is due."""
    reconciler._watcher.stop()
    assert reconciler._resync == NEVER


def claims_of(folder: Path, sid: str = SID) -> list[str]:
    return sorted(path.name.removeprefix(sid) for path in folder.glob(f"{sid}.rpc.sock*"))


ALL = [".rpc.sock", ".rpc.sock.pi-pid", ".rpc.sock.pid"]


def pid_file(folder: Path, sid: str = SID) -> Path:
    return folder / f"{sid}.rpc.sock.pid"


def socket_file(folder: Path, sid: str = SID) -> Path:
    return folder / f"{sid}.rpc.sock"


def answers(folder: Path, sid: str = SID) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(socket_file(folder, sid))) == 0


async def gone(folder: Path, sid: str = SID) -> None:
    await happens(lambda: not claims_of(folder, sid), f"the files of {sid} are removed")


def agent_of(spawned: SpawnedKeeper) -> int:
    assert spawned.agent_pid is not None
    return spawned.agent_pid


def check_line(line: dict[str, Any]) -> None:
    """What each line of an action says."""
    first = ["timestamp", "level", "severity_number", "event", "sid", "keeper_pid", "reason"]
    assert list(line)[:7] == first
    assert time.strptime(line["timestamp"], "%Y-%m-%dT%H:%M:%S.%fZ")
    assert line["level"] in {"info", "warning"}
    assert isinstance(line["reconcile_id"], int)
    assert isinstance(line["duration_ms"], float)
    assert line["reason"]


# Death.


@MAKES
@asynchronous
async def test_a_killed_keeper_is_cleaned_up_after_with_no_file_event_and_no_polling(
    folder: Path, make: Make
) -> None:
    manager = manager_of(folder, make)
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn(SID, agent_command=HUNG)
        await ready(reconciler, SID)
        only_exits_bring_looks(reconciler)
        os.kill(spawned.keeper_pid, signal.SIGKILL)
        await soon(reconciler.wait_for(SID, is_in(Verdict.ABSENT)))
        assert claims_of(folder) == []
        await happens(lambda: not alive(agent_of(spawned)), "the agent is dead")
        events = ["session.cleaned"] if make is OUR_KEEPER else ["agent.stopped", "session.cleaned"]
        assert told.events(SID) == events
        (line,) = told.of("session.cleaned")
        check_line(line)
        assert line["keeper_pid"] == spawned.keeper_pid
        assert line["reason"] == "keeper dead"
        assert 0 <= line["since_exit_ms"] < WAIT * 1000
        assert line["pid_file"] == "pid"
        assert line["listening"] == "refused"


@MAKES
@asynchronous
async def test_a_stopped_keeper_whose_agent_was_killed_is_killed_and_then_its_files_go(
    folder: Path, make: Make
) -> None:
    manager = manager_of(folder, make)
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn(SID, agent_command=HUNG)
        await ready(reconciler, SID)
        only_exits_bring_looks(reconciler)
        os.kill(spawned.keeper_pid, signal.SIGSTOP)
        os.kill(agent_of(spawned), signal.SIGKILL)
        await soon(reconciler.wait_for(SID, is_in(Verdict.ORPHAN)))
        assert claims_of(folder) == ALL
        await soon(reconciler.wait_for(SID, is_in(Verdict.ABSENT)))
        assert claims_of(folder) == []
        assert not alive(spawned.keeper_pid)
        stopped, cleaned = (line for line in told.lines if line.get("sid") == SID)
        check_line(stopped)
        check_line(cleaned)
        assert (stopped["event"], cleaned["event"]) == ("keeper.stopped", "session.cleaned")
        assert stopped["reason"] == "agent gone, keeper lives on"
        assert stopped["detail"] == "ended by SIGKILL"
        assert stopped["duration_ms"] >= LADDER.term_grace * 1000
        assert "is gone" in stopped["agent_evidence"]


@MAKES
@asynchronous
async def test_a_keeper_that_ends_by_itself_with_its_agent_needs_nothing(
    folder: Path, make: Make
) -> None:
    manager = KeeperManager(folder, keeper_command=make, policy=Policy(orphan_grace=600.0))
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn(SID, agent_command=HUNG)
        await ready(reconciler, SID)
        os.kill(agent_of(spawned), signal.SIGKILL)
        await soon(reconciler.wait_for(SID, is_in(Verdict.ABSENT)))
        assert claims_of(folder) == []
        assert SID not in reconciler.sessions
        assert told.events(SID) == []


@asynchronous
async def test_an_agent_that_another_keeper_left_behind_before_is_ended_and_then_the_files_go(
    folder: Path,
) -> None:
    manager = manager_of(folder, NODE)
    spawned = await manager.spawn(SID, agent_command=HUNG)
    os.kill(spawned.keeper_pid, signal.SIGKILL)
    await happens(lambda: not alive(spawned.keeper_pid))
    assert alive(agent_of(spawned))
    async with running(manager) as (_, told):
        await gone(folder)
        assert not alive(agent_of(spawned))
        assert told.events(SID) == ["agent.stopped", "session.cleaned"]
        assert told.of("agent.stopped")[0]["agent_pid"] == spawned.agent_pid
        assert "outlived" in told.of("agent.stopped")[0]["agent_evidence"]


# What is left behind, and what is being born.


@asynchronous
async def test_a_recycled_pid_beside_a_healthy_keeper_costs_the_files_and_nobodys_life(
    folder: Path, innocent: int
) -> None:
    manager = manager_of(folder)
    async with running(manager) as (reconciler, told):
        healthy = await manager.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        bare_socket(socket_file(folder, "recycled"))
        pid_file(folder, "recycled").write_text(str(innocent))
        await gone(folder, "recycled")
        assert alive(innocent)
        assert alive(healthy.keeper_pid)
        assert claims_of(folder) == ALL
        (line,) = told.of("session.cleaned")
        assert line["reason"] == "pid recycled by another process"
        assert line["keeper_pid"] == innocent


@MAKES
@asynchronous
async def test_a_pid_file_that_names_an_innocent_beside_a_keeper_that_listens_is_made_right(
    folder: Path, make: Make, innocent: int
) -> None:
    manager = manager_of(folder, make)
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        pid_file(folder).write_text(str(innocent))
        await happens(
            lambda: pid_file(folder).read_text() == str(spawned.keeper_pid),
            "the pid file names the keeper",
        )
        await ready(reconciler, SID)
        assert alive(innocent)
        assert claims_of(folder) == ALL
        assert told.events(SID)[0] == (
            "keeper.told_to_bind" if make is OUR_KEEPER else "keeper.adopted"
        )


def socket_and_empty_pid_file(folder: Path) -> None:
    bare_socket(socket_file(folder))
    pid_file(folder).touch()


LEFT: dict[str, tuple[str, Callable[[Path], object]]] = {
    "bare socket": (
        "no pid file, and nobody listens",
        lambda folder: bare_socket(socket_file(folder)),
    ),
    "empty pid file": ("pid file empty and old", lambda folder: pid_file(folder).touch()),
    "broken pid file": (
        "pid file broken and old",
        lambda folder: pid_file(folder).write_text("12 34"),
    ),
    "socket and empty pid file": ("pid file empty and old", socket_and_empty_pid_file),
}


@pytest.mark.parametrize(("reason", "leave"), LEFT.values(), ids=LEFT)
@asynchronous
async def test_files_that_name_nobody_go_after_the_settle_time_and_not_before(
    folder: Path, reason: str, leave: Callable[[Path], object]
) -> None:
    async with running(KeeperManager(folder, policy=Policy(settle=600.0))) as (patient, told):
        leave(folder)
        session = await soon(patient.wait_for(SID, is_in(Verdict.STARTING)))
        assert session.reason == "a keeper may be starting"
        assert claims_of(folder)
        assert told.events(SID) == []
    for path in folder.iterdir():
        path.unlink()
    async with running(manager_of(folder)) as (_, told):
        begun = time.monotonic()
        leave(folder)
        await gone(folder)
        assert time.monotonic() - begun >= QUICK.settle
        assert [line["reason"] for line in told.of("session.cleaned")] == [reason]


@asynchronous
async def test_a_pid_file_of_the_dead_condemns_at_once(folder: Path) -> None:
    patient = KeeperManager(folder, policy=Policy(settle=600.0))
    told = Told()
    async with Reconciler(patient, resync=NEVER, logger=told.logger):
        stale_pair(folder, SID)
        await gone(folder)
        assert [line["reason"] for line in told.of("session.cleaned")] == ["keeper dead"]


@pytest.mark.parametrize("listens", [True, False])
@asynchronous
async def test_a_keeper_that_is_being_born_at_the_instant_of_a_full_look_lives(
    folder: Path, *, listens: bool
) -> None:
    patient = KeeperManager(folder, policy=Policy(settle=600.0))
    told = Told()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_file(folder)))
        if listens:
            listener.listen()
        pid_file(folder).touch()
        async with Reconciler(patient, resync=NEVER, logger=told.logger) as reconciler:
            await soon(
                reconciler.wait_for(
                    SID, lambda s: s.seen is not None and is_in(Verdict.STARTING)(s)
                )
            )
            assert claims_of(folder) == [".rpc.sock", ".rpc.sock.pid"]
            listener.listen()
            pid_file(folder).write_text(str(os.getpid()))
            session = await soon(reconciler.wait_for(SID, lambda s: s.keeper_pid == os.getpid()))
            assert session.phase in {Verdict.READY, Verdict.STARTING}
            assert claims_of(folder) == [".rpc.sock", ".rpc.sock.pid"]
            assert told.events(SID) == []


# A keeper that lives without some of its files.


@asynchronous
async def test_a_keeper_of_ours_that_lost_its_socket_binds_again(folder: Path) -> None:
    manager = manager_of(folder)
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        socket_file(folder).unlink()
        await happens(lambda: socket_file(folder).exists() and answers(folder), "it listens")
        session = await ready(reconciler, SID)
        assert session.keeper_pid == spawned.keeper_pid
        assert claims_of(folder) == ALL
        line = told.of("keeper.told_to_bind")[0]
        check_line(line)
        assert line["verdict"] == "unreachable"


@pytest.mark.parametrize("seen", [True, False], ids=["seen before", "found by a scan"])
@asynchronous
async def test_a_keeper_of_ours_that_lost_all_its_files_comes_back(
    folder: Path, *, seen: bool
) -> None:
    manager = manager_of(folder)
    spawned = await manager.spawn(SID, agent_command=SINK)

    def lose_all() -> None:
        for path in folder.glob(f"{SID}.rpc.sock*"):
            path.unlink()

    if not seen:
        lose_all()
    async with running(manager) as (reconciler, told):
        if seen:
            await ready(reconciler, SID)
            lose_all()
        await happens(lambda: {".rpc.sock", ".rpc.sock.pid"} <= set(claims_of(folder)))
        session = await ready(reconciler, SID)
        assert session.keeper_pid == spawned.keeper_pid
        assert answers(folder)
        assert told.of("keeper.told_to_bind", SID)[0]["verdict"] == "lost"


@asynchronous
async def test_another_keeper_that_lost_its_pid_file_is_adopted(folder: Path) -> None:
    manager = manager_of(folder, NODE)
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        pid_file(folder).unlink()
        await happens(pid_file(folder).exists, "the pid file is written again")
        await ready(reconciler, SID)
        assert pid_file(folder).read_text() == str(spawned.keeper_pid)
        assert told.events(SID) == ["keeper.adopted"]
        check_line(told.of("keeper.adopted")[0])


@asynchronous
async def test_another_keeper_that_lost_its_socket_is_told_of_once(folder: Path) -> None:
    manager = manager_of(folder, NODE)
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        socket_file(folder).unlink()
        await soon(reconciler.wait_for(SID, is_in(Verdict.UNREACHABLE)))
        await reconciler.settled()
        await reconciler.settled()
        assert told.events(SID) == ["session.unreachable"]
        assert alive(spawned.keeper_pid)


@asynchronous
async def test_another_keeper_that_lost_all_its_files_is_stopped(folder: Path) -> None:
    manager = manager_of(folder, NODE)
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn(SID, agent_command=HUNG)
        await ready(reconciler, SID)
        for path in folder.glob(f"{SID}.rpc.sock*"):
            path.unlink()
        await happens(lambda: not alive(spawned.keeper_pid), "the keeper is stopped")
        await happens(lambda: not alive(agent_of(spawned)), "and its agent")
        await soon(reconciler.wait_for(SID, is_in(Verdict.ABSENT)))
        assert told.of("keeper.stopped")[0]["reason"] == "keeper without any file"


@pytest.mark.parametrize("make", [OUR_KEEPER, NODE], ids=["of ours", "of another"])
@asynchronous
async def test_a_keeper_that_another_one_pushed_aside_is_ended_and_the_second_keeps_its_files(
    folder: Path, make: Make
) -> None:
    manager = manager_of(folder, make)
    async with running(manager) as (reconciler, told):
        first = await manager.spawn(SID, agent_command=HUNG)
        await ready(reconciler, SID)
        with second_keeper(folder) as second:
            session = await soon(
                reconciler.wait_for(
                    SID, lambda s: s.keeper_pid == second and s.agent_pid is not None
                )
            )
            await reconciler.settled()
            assert session.agent_pid is not None
            assert not alive(first.keeper_pid)
            await happens(lambda: not alive(agent_of(first)), "the agent of the first is dead")
            assert alive(second)
            assert claims_of(folder) == ALL
            assert pid_file(folder).read_text() == str(second)
            assert answers(folder)
            assert told.events(SID) == ["keeper.stopped"]
            assert told.of("keeper.stopped")[0]["verdict"] == "usurped"


@contextlib.contextmanager
def second_keeper(folder: Path) -> Iterator[int]:
    """A keeper of another make that takes a live session over, as it does by habit."""
    settings = {
        "PI_DASHBOARD_HOME": str(folder.parents[2]),
        "PI_KEEPER_PI_CMD": json.dumps(HUNG[:1]),
        "PI_KEEPER_PI_ARGS": json.dumps(HUNG[1:]),
    }
    process = subprocess.Popen(
        [*NODE, SID], env=os.environ | settings, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        until(lambda: pid_file(folder).read_text() == str(process.pid), "the second took over")
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@asynchronous
async def test_a_keeper_under_a_program_that_stays_beside_it_is_the_keeper_and_no_usurper(
    folder: Path,
) -> None:
    """As a service file or a container starts it; the log is the starter's, too."""
    settings = {
        "PI_DASHBOARD_HOME": str(folder.parents[2]),
        "PI_KEEPER_PI_CMD": json.dumps(HUNG[:1]),
        "PI_KEEPER_PI_ARGS": json.dumps(HUNG[1:]),
    }
    log = folder / f"keeper-launch-{SID}.log"
    command = ["sh", "-c", 'exec timeout 1d "$@" >> "$0" 2>&1', str(log), *NODE, SID]
    with subprocess.Popen(  # noqa: ASYNC220 - it is there at once
        command, env=os.environ | settings, stdin=subprocess.DEVNULL
    ) as wrapper:
        try:
            agent_file = folder / f"{SID}.rpc.sock.pi-pid"
            await happens(lambda: agent_file.exists() and agent_file.read_text(), "it is ready")
            keeper = int(pid_file(folder).read_text())
            assert SYSTEM.facts(keeper).parent == wrapper.pid
            await happens(lambda: SYSTEM.facts(keeper).age > QUICK.start_grace)
            async with running(manager_of(folder)) as (reconciler, told):
                session = await ready(reconciler, SID)
                await reconciler.settled()
                assert session.keeper_pid == keeper
                assert wrapper.poll() is None
                assert answers(folder)
                assert claims_of(folder) == ALL
                assert told.events(SID) == []
        finally:
            wrapper.terminate()


@MAKES
@asynchronous
async def test_another_folders_session_of_the_same_name_that_works_in_this_one_is_left_alone(
    folder: Path, make: Make
) -> None:
    elsewhere = folder.parents[2] / "elsewhere" / ".pi" / "dashboard" / "sessions"
    other = manager_of(elsewhere, make)
    theirs = await other.spawn(SID, agent_command=HUNG, cwd=folder)
    try:
        await happens(lambda: SYSTEM.facts(theirs.keeper_pid).age > QUICK.lost_grace)
        async with running(manager_of(folder)) as (reconciler, _):
            ours = await reconciler.spawn(SID, agent_command=HUNG)
            await ready(reconciler, SID)
            await happens(lambda: SYSTEM.facts(ours.keeper_pid).age > QUICK.lost_grace)
            await reconciler.settled()
            assert reconciler.sessions[SID].keeper_pid == ours.keeper_pid
            assert alive(ours.keeper_pid)
            assert alive(theirs.keeper_pid)
            assert claims_of(elsewhere) == ALL
            await asyncio.wait_for(reconciler.stop(SID), 20)
            assert [alive(each.keeper_pid) for each in (ours, theirs)] == [False, True]
            assert answers(elsewhere)
    finally:
        end_all(elsewhere)


# What is not touched.


def theirs(path: Path) -> None:
    path.touch()
    os.chown(path, 65534, 65534)


def kinds(folder: Path, tmp_path: Path) -> dict[str, Callable[[Path], object]]:
    """Every kind of entry that does not belong under a name of ours."""
    target = tmp_path / "target"
    target.write_text(str(os.getpid()))
    made: dict[str, Callable[[Path], object]] = {
        "link": lambda path: path.symlink_to(target),
        "dangling": lambda path: path.symlink_to(folder / "nowhere"),
        "loop": lambda path: path.symlink_to(path.name),
        "folder": lambda path: path.mkdir(),
        "fifo": os.mkfifo,
    }
    if os.geteuid() == 0:
        made["device"] = lambda path: os.mknod(path, 0o20600, os.makedev(1, 5))
        made["theirs"] = theirs
    return made


@asynchronous
async def test_hostile_entries_of_every_kind_are_told_once_left_alone_and_hold_nobody_up(
    folder: Path, tmp_path: Path
) -> None:
    paths: dict[Path, int] = {}
    for kind, make in kinds(folder, tmp_path).items():
        for number, ending in enumerate(ALL):
            path = folder / f"{kind}-{number}{ending}"
            make(path)
            paths[path] = path.lstat().st_mode
    crossed = [folder / "crossed.rpc.sock", folder / "crossed-too.rpc.sock.pid"]
    crossed[0].write_text("12")
    bare_socket(crossed[1])
    odd = os.open(os.fsencode(folder) + b"/\xff\n.rpc.sock.pid", os.O_CREAT | os.O_WRONLY)
    os.close(odd)
    manager = manager_of(folder)
    async with running(manager) as (reconciler, told):
        healthy = await manager.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        os.kill(healthy.keeper_pid, signal.SIGKILL)
        await gone(folder)
        assert told.of("session.cleaned", SID)[0]["since_exit_ms"] < WAIT * 1000
        await reconciler.settled()
        await reconciler.settled()
        refused = told.of("session.refused")
        hostile = [*paths, *crossed]
        assert sorted(line["sid"] for line in refused) == sorted(
            path.name.split(".rpc.sock")[0] for path in hostile
        )
        assert all("belongs" in line["reason"] or "owned by" in line["reason"] for line in refused)
        assert {path: path.lstat().st_mode for path in paths} == paths
        assert all(path.exists() for path in crossed)
        assert (tmp_path / "target").read_text() == str(os.getpid())
        for path in hostile:
            (shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink)(path)
        await happens(lambda: not set(reconciler.sessions), "the table is empty again")


@asynchronous
async def test_what_cannot_be_verified_is_told_once_and_left_alone(folder: Path) -> None:
    code = "import time; time.sleep(600)"
    command = [sys.executable, "-I", "-S", "-c", code, SID]
    with subprocess.Popen(command) as stranger:  # noqa: ASYNC220 - it is there at once
        until(lambda: SYSTEM.arguments(stranger.pid))
        bare_socket(socket_file(folder))
        pid_file(folder).write_text(str(stranger.pid))
        async with running(manager_of(folder)) as (reconciler, told):
            assert reconciler.sessions[SID].phase is Verdict.UNVERIFIABLE
            await reconciler.settled()
            with pytest.raises(UnverifiableError, match="program is not known"):
                await asyncio.wait_for(reconciler.stop(SID), 20)
            assert told.events(SID) == ["session.unverifiable"]
            assert stranger.poll() is None
            assert claims_of(folder) == [".rpc.sock", ".rpc.sock.pid"]
            stranger.kill()
            await gone(folder)


@asynchronous
async def test_a_socket_that_somebody_inherited_from_a_dead_keeper_goes_when_that_one_does(
    folder: Path,
) -> None:
    child = subprocess.Popen(  # noqa: ASYNC220 - it is there at once
        [sys.executable, "-I", "-S", "-c", BIND_AND_FORK, str(folder), SID], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    heir = int(child.stdout.readline())
    child.stdout.close()
    child.wait()
    try:
        async with running(manager_of(folder)) as (reconciler, told):
            assert reconciler.sessions[SID].reason == "the socket answers, by whom cannot be told"
            assert told.events(SID) == ["session.unverifiable"]
            only_exits_bring_looks(reconciler)
            os.kill(heir, signal.SIGKILL)
            await gone(folder)
            assert told.events(SID) == ["session.unverifiable", "session.cleaned"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(heir, signal.SIGKILL)


BIND_AND_FORK = """
import os, socket, sys, time
os.chdir(sys.argv[1])
listener = socket.socket(1)
listener.bind(sys.argv[2] + ".rpc.sock")
listener.listen()
open(sys.argv[2] + ".rpc.sock.pid", "w").write(str(os.getpid()))
if heir := os.fork():
    print(heir)
else:
    time.sleep(600)
"""
"""A keeper that dies while a child of its still holds its listening socket."""


# The folder.


@asynchronous
async def test_a_folder_may_come_go_move_and_come_again(folder: Path) -> None:
    away = folder.with_name("away")
    folder.rmdir()
    manager = manager_of(folder)
    async with running(manager) as (reconciler, told):
        folder.mkdir()
        stale_pair(folder, "a")
        await gone(folder, "a")
        shutil.rmtree(folder)
        await happens(lambda: len(told.of("folder.gone")) == 1)
        folder.mkdir()
        spawned = await reconciler.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        folder.rename(away)
        await happens(lambda: len(told.of("folder.gone")) == 2)
        assert reconciler.sessions.row(SID).keeper_pid is None
        stale_pair(away, "b")
        folder.mkdir()
        stale_pair(folder, "c")
        await gone(folder, "c")
        assert len(claims_of(away, "b")) == 2, "another folder is none of its business"
        shutil.rmtree(folder)
        away.rename(folder)
        await gone(folder, "b")
        session = await ready(reconciler, SID)
        assert session.keeper_pid == spawned.keeper_pid
        assert claims_of(folder) == ALL


@asynchronous
async def test_a_folder_that_cannot_be_opened_is_complained_of_once(folder: Path) -> None:
    folder.rmdir()
    folder.touch()
    async with running(manager_of(folder)) as (reconciler, told):
        with pytest.raises(FolderError, match="cannot be opened: Not a directory"):
            await reconciler.settled()
        (line,) = told.of("folder.unusable")
        assert line["reason"] == "cannot be opened: Not a directory"
        folder.unlink()
        await reconciler.settled()
        folder.mkdir()
        stale_pair(folder, SID)
        await gone(folder)


@asynchronous
async def test_a_folder_that_all_may_write_to_is_only_looked_at(folder: Path) -> None:
    folder.chmod(0o777)
    stale_pair(folder, SID)
    async with running(manager_of(folder)) as (reconciler, told):
        with pytest.raises(FolderError, match="everybody may write"):
            await reconciler.settled()
        (line,) = told.of("folder.observed_only")
        assert "everybody may write" in line["reason"]
        assert [line["actions"] for line in told.of("session.planned")] == [["Remove"]]
        assert len(claims_of(folder)) == 2
        with pytest.raises(UnverifiableError, match="everybody may write"):
            await reconciler.stop(SID)
        folder.chmod(0o700)
        await reconciler.settled()
        await gone(folder)


@pytest.mark.parametrize("above", [False, True])
@asynchronous
async def test_a_folder_that_all_may_write_to_later_is_not_acted_upon_until_it_is_closed_again(
    folder: Path, *, above: bool
) -> None:
    wrong = folder.parent if above else folder
    async with running(manager_of(folder)) as (reconciler, told):
        for times in (1, 2):
            wrong.chmod(0o777)
            with pytest.raises(FolderError, match="chmod go-w it"):
                await reconciler.settled()
            stale_pair(folder, SID)
            for _ in range(2):
                with pytest.raises(FolderError, match="chmod go-w it"):
                    await reconciler.settled()
            assert len(claims_of(folder)) == 2
            assert len(told.of("folder.observed_only")) == times, "once for each time"
            with pytest.raises(UnverifiableError, match="chmod go-w it"):
                await reconciler.stop(SID)
            wrong.chmod(0o755)
            with pytest.raises(FolderLockedError):  # it was kept all the time
                async with Reconciler(manager_of(folder)):
                    pass
            await reconciler.settled()
            await gone(folder)


@asynchronous
async def test_a_second_reconciler_refuses_and_names_the_first(folder: Path) -> None:
    manager = manager_of(folder)
    async with running(manager):
        with pytest.raises(FolderLockedError, match=rf"process {os.getpid()}\b"):
            async with Reconciler(manager):
                pass
    async with running(manager):
        pass


@asynchronous
async def test_of_two_that_wait_for_a_folder_one_acts_and_the_other_looks_on(folder: Path) -> None:
    folder.rmdir()
    async with (
        running(manager_of(folder)) as (one, told_one),
        running(manager_of(folder)) as (two, told_two),
    ):
        folder.mkdir()
        stale_pair(folder, SID)
        await gone(folder)
        refused = 0
        for each in (one, two):
            try:
                await each.settled()
            except FolderError:
                refused += 1
        assert refused == 1
        cleaned = [told.of("session.cleaned") for told in (told_one, told_two)]
        observed = [told.of("folder.observed_only") for told in (told_one, told_two)]
        assert sorted(map(len, cleaned)) == [0, 1]
        assert [len(each) for each in observed] == [1 - len(each) for each in cleaned]


@asynchronous
async def test_a_dry_run_tells_everything_and_does_nothing_beside_one_that_acts(
    folder: Path,
) -> None:
    manager = manager_of(folder)
    spawned = await manager.spawn(SID, agent_command=HUNG)
    stale_pair(folder, "stale")
    async with running(manager, dry_run=True) as (dry, told):
        os.kill(spawned.keeper_pid, signal.SIGSTOP)
        os.kill(agent_of(spawned), signal.SIGKILL)
        await soon(dry.wait_for(SID, lambda s: s.reason == "agent gone, keeper lives on"))
        await dry.settled()
        planned = {line["sid"]: line for line in told.of("session.planned")}
        assert planned["stale"]["actions"] == ["Remove"]
        assert planned["stale"]["reason"] == "keeper dead"
        assert planned[SID]["actions"] == ["StopKeeper"]
        assert len(told.of("session.planned")) == 2
        assert alive(spawned.keeper_pid)
        assert claims_of(folder) == ALL
        assert len(claims_of(folder, "stale")) == 2
        with pytest.raises(UnverifiableError, match="dry run"):
            await dry.stop(SID)
        async with running(manager) as (_, told_acting):
            await gone(folder, "stale")
            await gone(folder)
            await soon(dry.wait_for(SID, is_in(Verdict.ABSENT)))
            assert told_acting.of("session.cleaned", "stale")
        assert {line["event"] for line in told.lines} == {"reconciler.started", "session.planned"}


# What is wanted.


@asynchronous
async def test_what_is_spawned_is_wanted_and_its_loss_is_told_once(folder: Path) -> None:
    async with running(manager_of(folder)) as (reconciler, told):
        spawned = await reconciler.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        assert reconciler.sessions[SID].desired is Desired.PRESENT
        os.kill(spawned.keeper_pid, signal.SIGKILL)
        await soon(reconciler.wait_for(SID, is_in(Verdict.MISSING)))
        await reconciler.settled()
        await reconciler.settled()
        assert told.events(SID) == ["session.cleaned", "session.missing"]
        assert told.of("session.missing")[0]["level"] == "warning"
        with pytest.raises(NoSuchSessionError):
            await reconciler.stop(SID)
        await happens(lambda: SID not in reconciler.sessions, "the wish ended with the stop")
        assert told.events(SID) == ["session.cleaned", "session.missing"]


@MAKES
@asynchronous
async def test_stop_returns_when_processes_and_files_are_gone(folder: Path, make: Make) -> None:
    async with running(manager_of(folder, make)) as (reconciler, told):
        spawned = await reconciler.spawn(SID, agent_command=HUNG)
        stopped = await asyncio.wait_for(reconciler.stop(SID), 20)
        assert (stopped.sid, stopped.keeper_pid) == (SID, spawned.keeper_pid)
        assert stopped.elapsed > 0
        assert not alive(spawned.keeper_pid)
        assert not alive(agent_of(spawned))
        assert claims_of(folder) == []
        assert SID not in reconciler.sessions
        assert told.of("keeper.stopped")[0]["reason"] == "not wanted any more"
        with pytest.raises(NoSuchSessionError):
            await reconciler.stop(SID)


@asynchronous
async def test_stop_of_a_recycled_pid_spares_the_process(folder: Path, innocent: int) -> None:
    pid_file(folder).write_text(str(innocent))
    async with running(manager_of(folder), dry_run=True) as (dry, _):
        assert dry.sessions[SID].phase is Verdict.STALE
    pid_file(folder).write_text("")
    patient = KeeperManager(folder, policy=Policy(settle=600.0))
    async with Reconciler(patient, resync=NEVER, logger=Told().logger) as reconciler:
        pid_file(folder).write_text(str(innocent))
        with contextlib.suppress(NoSuchSessionError):  # it may be cleaned before we ask
            stopped = await asyncio.wait_for(reconciler.stop(SID), 20)
            assert stopped.keeper_pid is None
        await gone(folder)
        assert alive(innocent)


@asynchronous
async def test_a_stop_that_was_refused_does_not_come_true_later(folder: Path) -> None:
    manager = manager_of(folder)
    async with running(manager) as (reconciler, told):
        found = await manager.spawn(SID, agent_command=SINK)
        wanted = await reconciler.spawn("wanted", agent_command=SINK)
        hostile = []
        for spawned in (found, wanted):
            await ready(reconciler, spawned.sid)
            path = folder / f"{spawned.sid}.rpc.sock.pi-pid"
            path.unlink()
            path.symlink_to("elsewhere")
            hostile.append(path)
            with pytest.raises(UnverifiableError, match="agent_pid_file"):
                await asyncio.wait_for(reconciler.stop(spawned.sid), 20)
        for path, spawned in zip(hostile, (found, wanted), strict=True):
            path.unlink()
            path.write_text(str(spawned.agent_pid))
            await ready(reconciler, spawned.sid)
            await reconciler.settled()
            assert alive(spawned.keeper_pid)
        assert reconciler.sessions[SID].desired is Desired.AS_FOUND
        assert reconciler.sessions["wanted"].desired is Desired.PRESENT
        assert not told.of("keeper.stopped")
        stopped = await asyncio.wait_for(reconciler.stop(SID), 20)
        assert stopped.keeper_pid == found.keeper_pid


# A keeper that detaches itself.

FORKS_WHEN_TOLD = """
import os, sys, time
folder = os.open(sys.argv[2], os.O_RDONLY)
print("open", flush=True)
sys.stdin.readline()
if child := os.fork():
    print(child, flush=True)
time.sleep(600)
"""


@asynchronous
async def test_a_keeper_that_detaches_is_not_taken_for_its_starters_agent(
    folder: Path, tmp_path: Path
) -> None:
    program = tmp_path / KEEPER_PROGRAM.name
    program.write_text(FORKS_WHEN_TOLD)
    command = [sys.executable, "-I", "-S", str(program), SID, str(folder)]
    with subprocess.Popen(  # noqa: ASYNC220 - it is there at once
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as between:
        assert between.stdin is not None
        assert between.stdout is not None
        assert between.stdout.readline() == b"open\n"
        told = Told()
        async with Reconciler(KeeperManager(folder), resync=3600.0, logger=told.logger) as it:
            await happens(lambda: it.sessions.row(SID).keeper_pid == between.pid)
            between.stdin.write(b"\n")
            between.stdin.flush()
            keeper = int(between.stdout.readline())
            try:
                seen = it.sessions[SID].seen
                it._queue.add(SID, AT_ONCE)
                await happens(lambda: it.sessions[SID].seen is not seen, "it was looked at")
                between.kill()
                await soon(it.wait_for(SID, lambda s: s.keeper_pid != between.pid))
                await it.settled()
                assert alive(keeper)
                assert it.sessions.row(SID).keeper_pid == keeper
                assert not told.of("agent.stopped")
                assert it.sessions.row(SID).phase is Verdict.STARTING
            finally:
                os.kill(keeper, signal.SIGKILL)


# One session's trouble.


@asynchronous
async def test_an_action_that_fails_is_tried_less_and_less_often_and_holds_nobody_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, times = removal.remove, []

    def remove(at: Any, sid: str, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as the real one
        if sid == "stuck":
            times.append(time.monotonic())
            raise PermissionError(1, "Operation not permitted")
        return real(at, sid, *args, **options)

    monkeypatch.setattr(effects, "remove", remove)
    async with running(manager_of(folder)) as (_, told):
        stale_pair(folder, "stuck")
        await happens(lambda: times, "the first try")
        stale_pair(folder, "other")
        await gone(folder, "other")
        await happens(lambda: len(times) == 5, "the fifth try")
        waits = [after - before for before, after in itertools.pairwise(times)]
        assert all(
            wait >= at_least for wait, at_least in zip(waits, (0.1, 0.2, 0.4, 0.8), strict=True)
        )
        [failed] = told.of("session.failed", "stuck")
        assert "Operation not permitted" in failed["reason"]
        monkeypatch.setattr(effects, "remove", real)
        await gone(folder, "stuck")


@asynchronous
async def test_a_look_that_fails_is_tried_again_and_holds_nobody_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, times = probe.Probe.look, []

    def look(self: probe.Probe, sid: str, *args: Any, **options: Any) -> Observation:  # noqa: ANN401 - as the real one
        if sid == "stuck":
            times.append(time.monotonic())
            raise RuntimeError("a fault of ours")
        return real(self, sid, *args, **options)

    async with running(manager_of(folder)) as (_, told):
        monkeypatch.setattr(probe.Probe, "look", look)
        pid_file(folder, "stuck").write_text(str(dead_pid()))
        await happens(lambda: len(times) >= 4, "some tries")
        stale_pair(folder, "other")
        await gone(folder, "other")
        monkeypatch.undo()
        await gone(folder, "stuck")
        assert told.of("session.failed", "stuck")[0]["reason"] == "RuntimeError: a fault of ours"


@asynchronous
async def test_two_stops_that_were_refused_do_not_come_true_later(folder: Path) -> None:
    manager = manager_of(folder)
    async with running(manager) as (reconciler, _):
        spawned = await manager.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        agent_file = folder / f"{SID}.rpc.sock.pi-pid"
        text = agent_file.read_text()
        agent_file.unlink()
        agent_file.symlink_to("elsewhere")
        stops = (reconciler.stop(SID), reconciler.stop(SID))
        for refused in await asyncio.gather(*stops, return_exceptions=True):
            assert isinstance(refused, UnverifiableError)
        assert reconciler.sessions[SID].desired is not Desired.ABSENT
        agent_file.unlink()
        agent_file.write_text(text)
        await ready(reconciler, SID)
        assert alive(spawned.keeper_pid)


@asynchronous
async def test_a_stop_that_fails_is_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, times = ladder.end, []

    async def end(*args: Any, **options: Any) -> tuple[bool, str]:  # noqa: ANN401 - as the real one
        times.append(time.monotonic())
        if len(times) == 1:
            raise OSError(24, "Too many open files")
        if len(times) == 2:
            return False, "alive after SIGKILL"
        return await real(*args, **options)

    monkeypatch.setattr(effects, "end", end)
    async with running(manager_of(folder)) as (reconciler, told):
        spawned = await reconciler.spawn(SID, agent_command=SINK)
        await asyncio.wait_for(reconciler.stop(SID), 20)
        assert not alive(spawned.keeper_pid)
        assert told.events(SID) == [
            "session.failed",
            "action.failed",
            "keeper.stopped",
        ]
        (line,) = told.of("action.failed")
        check_line(line)
        assert (line["action"], line["detail"]) == ("StopKeeper", "alive after SIGKILL")


@asynchronous
async def test_a_subscriber_that_raises_holds_up_neither_the_loop_nor_the_others(
    folder: Path,
) -> None:
    def raises(_: Session) -> None:
        raise KeyError("a fault of theirs")

    told_of: list[Verdict | None] = []
    async with running(manager_of(folder)) as (reconciler, told):
        reconciler.sessions.subscribe(raises)
        reconciler.sessions.subscribe(lambda session: told_of.append(session.phase))
        spawned = await reconciler.manager.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        os.kill(spawned.keeper_pid, signal.SIGKILL)
        await soon(reconciler.wait_for(SID, is_in(Verdict.ABSENT)))
        shutil.rmtree(folder)  # rows are forgotten, which is told, too
        await happens(lambda: told.of("folder.gone"))
        folder.mkdir()
        stale_pair(folder, "later")
        await gone(folder, "later")
        assert {Verdict.READY, Verdict.ABSENT} <= set(told_of)
        failed = told.of("subscriber.failed")
        assert len(failed) >= 2
        assert {(line["level"], line["reason"]) for line in failed} == {
            ("error", "KeyError: 'a fault of theirs'")
        }


@asynchronous
async def test_a_condition_that_raises_raises_where_it_is_waited_for(folder: Path) -> None:
    def condition(session: Session) -> bool:
        if session.phase is Verdict.READY:
            raise ZeroDivisionError
        return False

    async with running(manager_of(folder)) as (reconciler, told):
        waits = asyncio.create_task(reconciler.wait_for(SID, condition))
        await reconciler.spawn(SID, agent_command=SINK)
        with pytest.raises(ZeroDivisionError):
            await soon(waits)
        await ready(reconciler, SID)
        with pytest.raises(ZeroDivisionError):
            await soon(reconciler.wait_for(SID, condition))
        assert not reconciler.sessions._listeners
        assert not told.of("subscriber.failed")


# Losing sight.


@asynchronous
async def test_a_broken_spawn_registry_is_told_of_once(folder: Path) -> None:
    registry = registry_file(folder)
    registry.write_text("{broken")
    async with running(manager_of(folder)) as (reconciler, told):
        for sid in (SID, "other"):
            await reconciler.spawn(sid, agent_command=SINK)
            await ready(reconciler, sid)
        await reconciler.settled()
        (line,) = told.of("registry.unusable")
        assert line["level"] == "warning"
        assert line["reason"].startswith(f"{registry} is not usable: ")
        registry.write_text("{}")
        await reconciler.settled()
        assert len(told.of("registry.unusable")) == 2, "another state of it"
        registry.write_text('{"entries": []}')
        await reconciler.settled()
        assert len(told.of("registry.unusable")) == 2


@asynchronous
async def test_without_file_events_the_full_look_finds_everything(folder: Path) -> None:
    manager = manager_of(folder)
    async with running(manager) as (reconciler, told):
        reconciler._watcher.stop()
        reconciler.go_by(manager, resync=0.2)  # which asks for one look at once
        for sid in ("one", "two"):
            stale_pair(folder, sid)
            await gone(folder, sid)
            assert told.events(sid) == ["session.cleaned"]


@asynchronous
async def test_a_folder_that_cannot_be_watched_is_told_of_once_and_looked_at_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: object) -> None:
        raise OSError(24, "inotify instance limit reached")

    monkeypatch.setattr(inotify, "_Inotify", none_left)
    looks: list[Reconciler] = []
    real = Reconciler._look_at_all

    def look_at_all(self: Reconciler) -> LongWork | None:
        looks.append(self)
        return real(self)

    monkeypatch.setattr(Reconciler, "_look_at_all", look_at_all)
    async with running(manager_of(folder)) as (reconciler, told):
        stale_pair(folder, SID)
        await reconciler.settled()
        await gone(folder)
        await reconciler.settled()
        assert len(looks) <= 4, "a watch that fails must not ask for looks by itself"
        (line,) = told.of("folder.unwatched")
        assert "inotify instance limit reached" in line["reason"]
        monkeypatch.undo()
        await reconciler.settled()
        stale_pair(folder, "other")
        await gone(folder, "other")


@asynchronous
async def test_without_pidfds_exits_are_polled_and_that_is_told_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: int, **__: int) -> int:
        raise OSError(24, "Too many open files")

    manager = manager_of(folder)
    monkeypatch.setattr(exits, "open_pidfd", none_left)
    async with running(manager) as (reconciler, told):
        for sid in ("one", "two"):
            spawned = await manager.spawn(sid, agent_command=HUNG)
            await ready(reconciler, sid)
            os.kill(spawned.keeper_pid, signal.SIGKILL)
        only_exits_bring_looks(reconciler)
        for sid in ("one", "two"):
            await gone(folder, sid)
        assert [line["reason"] for line in told.of("exits.polled")] == ["Too many open files"]


@asynchronous
async def test_a_removal_that_was_itself_killed_is_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = dead_pid()
    hidden = folder / f".{SID}.rpc.sock.pid.taken-{dead}"
    hidden.write_text(str(dead))
    async with running(manager_of(folder), dry_run=True):
        assert hidden.exists()
    async with running(manager_of(folder)) as (reconciler, told):
        assert not hidden.exists()
        (line,) = told.of("removal.recovered")
        assert (line["name"], line["fate"]) == (hidden.name, "removed")
        hidden.write_text(str(dead))
        refusing(monkeypatch)
        await reconciler.settled()
        (line,) = told.of("removal.failed")
        assert line["error"] == "Operation not permitted"


def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unlink(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "unlink", unlink)


# Beginning, leaving, telling.


@MAKES
@asynchronous
async def test_leaving_leaves_every_keeper_agent_and_file_as_it_was(
    folder: Path, make: Make
) -> None:
    manager = manager_of(folder, make)
    async with running(manager) as (reconciler, told):
        spawned = await reconciler.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        keeper, agent = identity(spawned.keeper_pid), identity(agent_of(spawned))
        before = {path: path.lstat() for path in folder.glob("*.rpc.sock*")}
    assert (identity(spawned.keeper_pid), identity(agent_of(spawned))) == (keeper, agent)
    assert {path: path.lstat() for path in folder.glob("*.rpc.sock*")} == before
    assert len(before) == 3
    assert answers(folder)
    assert [line["event"] for line in told.lines] == ["reconciler.started", "reconciler.stopped"]


@asynchronous
async def test_leaving_at_once_leaves_nothing_behind_in_the_program(folder: Path) -> None:
    stale_pair(folder, SID)
    before = len(open_descriptors())
    told = Told()
    for _ in range(20):
        async with Reconciler(manager_of(folder), logger=told.logger):
            pass
        for _ in range(5):  # what was under way gets its turns, and must do nothing
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(claims_of(folder)) == 2
    assert len(open_descriptors()) == before
    assert {line["event"] for line in told.lines} == {"reconciler.started", "reconciler.stopped"}


@asynchronous
async def test_one_that_cannot_begin_holds_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: object) -> None:
        raise RuntimeError("can't start new thread")

    before = len(open_descriptors())
    with monkeypatch.context() as patched:
        patched.setattr(inotify._FolderEmitter, "start", none_left)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await Reconciler(manager_of(folder), logger=Told().logger).__aenter__()
    assert len(open_descriptors()) == before
    async with running(manager_of(folder)):
        pass


@asynchronous
async def test_it_is_entered_once(folder: Path) -> None:
    async with running(manager_of(folder)) as (reconciler, _):
        pass
    with pytest.raises(RuntimeError, match="entered once"):
        await reconciler.__aenter__()
    async with running(manager_of(folder)):
        pass


@asynchronous
async def test_leaving_does_not_wait_for_a_stop_under_way(folder: Path) -> None:
    manager = KeeperManager(folder, ladder=Ladder(term_grace=600.0))
    async with running(manager) as (reconciler, _):
        spawned = await reconciler.spawn(SID, agent_command=SINK)
        os.kill(spawned.keeper_pid, signal.SIGSTOP)
        stop = asyncio.create_task(reconciler.stop(SID))
        await soon(reconciler.wait_for(SID, is_in(Verdict.STOPPING)))
    assert alive(spawned.keeper_pid)
    stop.cancel()
    await asyncio.gather(stop, return_exceptions=True)


@asynchronous
async def test_a_quiet_world_logs_nothing(folder: Path) -> None:
    async with running(manager_of(folder)) as (reconciler, told):
        await reconciler.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        before = told.lines
        for _ in range(3):
            await reconciler.settled()
        assert told.lines == before
        assert [line["event"] for line in before] == ["reconciler.started"]


@asynchronous
async def test_changes_tell_each_new_state_in_order(folder: Path) -> None:
    seen: list[Session] = []
    async with running(manager_of(folder)) as (reconciler, _):

        async def listen() -> None:
            async for session in reconciler.changes():
                seen.append(session)  # noqa: PERF401 - what was seen counts while it goes on

        listener = asyncio.create_task(listen())
        await asyncio.sleep(0)
        spawned = await reconciler.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        await reconciler.stop(SID)
        await happens(lambda: seen[-1].phase is Verdict.ABSENT)
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
        phases = [session.phase for session in seen]
        assert {session.sid for session in seen} == {SID}
        order = [phases.index(p) for p in (Verdict.READY, Verdict.STOPPING, Verdict.ABSENT)]
        assert order == sorted(order)
        first = next(session for session in seen if session.phase is Verdict.READY)
        assert first.keeper_pid == spawned.keeper_pid
        assert not reconciler.sessions._listeners, "nobody listens any more"


@asynchronous
async def test_settled_returns_when_all_that_follows_is_done(folder: Path) -> None:
    manager = manager_of(folder)
    for number in range(10):
        stale_pair(folder, f"stale-{number}")
    bare_socket(socket_file(folder, "bare"))
    told = Told()
    async with Reconciler(manager, resync=NEVER, logger=told.logger) as reconciler:
        await asyncio.wait_for(reconciler.settled(), 20)
        assert os.listdir(folder) == []
        assert len(told.of("session.cleaned")) == 11
        for line in told.of("session.cleaned"):
            check_line(line)


@root
@asynchronous
async def test_another_users_folder_is_only_looked_at(folder: Path) -> None:
    os.chown(folder, 65534, 65534)
    stale_pair(folder, SID)
    async with running(manager_of(folder)) as (_, told):
        assert "belongs to uid 65534" in told.of("folder.observed_only")[0]["reason"]
        assert len(claims_of(folder)) == 2


@asynchronous
async def test_a_keepers_log_of_another_folder_that_is_linked_here_makes_it_no_keeper(
    folder: Path, tmp_path: Path
) -> None:
    log = tmp_path / f"keeper-{SID}.log"
    descriptor = os.open(log, os.O_RDWR | os.O_CREAT)  # all that a keeper of another make holds
    code = "print(os.getpid(), flush=True); signal.pause()"
    try:
        with program(code, SID, held=(descriptor,), script=tmp_path / "keeper.cjs") as (pid,):
            os.link(log, folder / log.name)
            patient = KeeperManager(folder, policy=Policy(start_grace=0, lost_grace=0, settle=0))
            async with running(patient) as (reconciler, told):
                await asyncio.wait_for(reconciler.settled(), 20)
                assert alive(pid), told.lines
                os.unlink(log)  # the one name that is left proves it
                reconciler._queue.add("*", 0.0)
                await happens(lambda: not alive(pid), "it is a lost keeper of this folder now")
    finally:
        os.close(descriptor)


@asynchronous
async def test_a_folder_that_is_opened_to_others_is_left_alone_at_once(
    folder: Path, manager: KeeperManager
) -> None:
    """And served again at once when it is closed; no full look is asked for in between."""
    async with running(manager) as (reconciler, told):
        spawned = await reconciler.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        folder.chmod(0o777)
        await happens(lambda: told.of("folder.observed_only"), "it is told")
        os.kill(spawned.keeper_pid, signal.SIGKILL)
        await happens(lambda: told.of("session.planned", SID), "it is told what would be done")
        assert claims_of(folder) == ALL
        folder.chmod(0o700)
        await gone(folder)


@asynchronous
async def test_a_folder_that_was_opened_this_instant_is_left_alone(
    folder: Path, manager: KeeperManager
) -> None:
    async with running(manager) as (reconciler, told):
        spawned = await reconciler.spawn(SID, agent_command=SINK)
        await ready(reconciler, SID)
        reconciler._watcher.stop()
        folder.chmod(0o720)
        os.kill(spawned.keeper_pid, signal.SIGKILL)
        await happens(lambda: told.of("session.planned", SID), "it is told what would be done")
        assert claims_of(folder) == ALL


@asynchronous
async def test_keepers_of_other_folders_cost_no_look(
    manager: KeeperManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of no session here, and of one whose id is in use here as well."""
    look = probe.Probe.look
    looks: list[tuple[str, object]] = []

    def counted(self: probe.Probe, sid: str, *given: Any, **more: Any) -> Observation:  # noqa: ANN401 - as the real one
        if more.get("scanned") or more.get("marked"):
            looks.append((sid, more))
        return look(self, sid, *given, **more)

    with sessions_folder() as elsewhere:
        for sid in (SID, "elsewhere"):
            await KeeperManager(elsewhere).spawn(sid, agent_command=SINK)
        await manager.spawn(SID, agent_command=SINK)
        async with running(manager) as (reconciler, _):
            await soon(reconciler.wait_for(SID, is_in(Verdict.READY)))
            monkeypatch.setattr(probe.Probe, "look", counted)
            await reconciler.settled()
            await reconciler.settled()
            monkeypatch.undo()
        assert looks == []


@asynchronous
async def test_a_scan_that_no_thread_is_left_for_is_told_of_and_made_again(
    manager: KeeperManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none_left(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    async with running(manager) as (reconciler, told):
        with monkeypatch.context() as patched:
            patched.setattr(asyncio, "to_thread", none_left)
            await reconciler.settled()
        (line,) = told.of("folder.half_read")
        assert line["reason"] == "not all could be looked at: can't start new thread"
        await reconciler.settled()
        assert len(told.of("folder.half_read")) == 1


@asynchronous
async def test_a_folder_that_goes_while_a_stop_looks_at_the_session_is_told_by_the_stop(
    folder: Path, manager: KeeperManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(manager) as (reconciler, told):
        spawned = await reconciler.spawn("s", agent_command=SINK)
        found = manager.inspect("s")

        def inspect(_: str) -> Finding:
            folder.rename(folder.with_name("moved"))
            until(lambda: told.of("folder.gone"))
            return found

        monkeypatch.setattr(manager, "inspect", inspect)
        with pytest.raises(UnverifiableError, match="there is no folder"):
            await reconciler.stop("s")
        assert alive(spawned.keeper_pid)
    folder.with_name("moved").rename(folder)


@asynchronous
async def test_a_folder_that_goes_while_a_stop_looks_for_leftovers_is_told_by_the_stop(
    folder: Path, manager: KeeperManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = probe.Probe.scan_all
    async with running(manager) as (reconciler, told):
        spawned = await reconciler.spawn("s", agent_command=SINK)

        def scan_all(self: probe.Probe) -> probe.Suspects:
            if not alive(spawned.keeper_pid) and folder.exists():
                folder.rename(folder.with_name("moved"))
                until(lambda: told.of("folder.gone"))
            return scan(self)

        monkeypatch.setattr(probe.Probe, "scan_all", scan_all)
        with pytest.raises(ReconcilerError, match="session s: "):
            await reconciler.stop("s")
        assert not alive(spawned.keeper_pid)
    folder.with_name("moved").rename(folder)


@asynchronous
async def test_a_folder_that_goes_while_processes_are_scanned_is_told_of_once(
    folder: Path, manager: KeeperManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread scans; what would follow from it has nothing to act upon any more."""
    scan = probe.Probe.scan_all
    scans: list[bool] = []
    async with running(manager) as (reconciler, told):

        def scan_all(self: probe.Probe) -> probe.Suspects:
            if not scans:
                folder.rename(folder.with_name("moved"))
                until(lambda: told.of("folder.gone"))
            scans.append(True)
            return scan(self)

        monkeypatch.setattr(probe.Probe, "scan_all", scan_all)
        reconciler._queue.add("*", 0.0)
        await happens(lambda: told.of("folder.gone") and scans and not reconciler._queue._tasks)
        assert told.of("folder.half_read") == []
    folder.with_name("moved").rename(folder)
