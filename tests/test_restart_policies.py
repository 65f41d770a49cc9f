"""Sessions that are started again: each policy, each way of ending, and who stops wins."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    HUNG,
    NODE_KEEPER,
    SINK,
    WAIT,
    Daemon,
    Told,
    alive,
    asynchronous,
    happens,
    note_down,
    program_environment,
    soon,
    until,
)

from reconciler import launches, starting
from reconciler.controller import Reconciler
from reconciler.errors import (
    AlreadyRunningError,
    FolderError,
    FolderLockedError,
    InvalidRequestError,
    KeeperStartError,
    NoSuchSessionError,
    UnverifiableError,
)
from reconciler.facts import boot_id
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager, SpawnedKeeper
from reconciler.ladder import Ladder
from reconciler.launches import Launch
from reconciler.layout import FOLDER_MARKER, folder_mark
from reconciler.observations import FileId
from reconciler.plans import Verdict
from reconciler.probe import Probe
from reconciler.processes import SYSTEM
from reconciler.requests import OUR_KEEPER, KeeperRequest
from reconciler.restarts import RestartLimits, RestartPolicy
from reconciler.sessions import Session
from reconciler.spawning import Started
from reconciler.spawning import start as really_start
from reconciler.state import Policy

CAMPAIGN = bool(os.environ.get("PI_RECONCILER_CAMPAIGN"))

OBEYS = ("sh", "-c", 'read code; exit "$code"')
"""A stand-in agent that ends with the status that it is told."""

SOON = RestartLimits(first=0.05, cap=0.1, window=300, most=3, farewell=0.2)
LATER = replace(SOON, first=600, cap=600)
NODE = ("node", str(NODE_KEEPER))
V = Verdict


def manager_of(
    folder: Path,
    limits: RestartLimits = SOON,
    command: tuple[str, ...] = OUR_KEEPER,
    ladder: Ladder | None = None,
) -> KeeperManager:
    return KeeperManager(
        folder,
        policy=Policy(settle=0.3, orphan_grace=0.1),
        restart_limits=limits,
        keeper_command=command,
        ladder=ladder,
    )


@contextlib.asynccontextmanager
async def running(
    manager: KeeperManager, *, dry_run: bool = False
) -> AsyncIterator[tuple[Reconciler, Told]]:
    told = Told()
    async with Reconciler(manager, dry_run=dry_run, logger=told.logger) as reconciler:
        yield reconciler, told


def say(spawned: SpawnedKeeper, text: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(spawned.socket)
        client.sendall(f"{text}\n".encode())


def note_of(folder: Path, sid: str = "s") -> Path:
    return folder / f"keeper-{sid}.launch"


def is_in(*phases: Verdict) -> Callable[[Session], bool]:
    return lambda session: session.plan is not None and session.phase in phases


Act = Callable[[SpawnedKeeper, KeeperManager], Awaitable[object]]


async def exits_0(spawned: SpawnedKeeper, _: KeeperManager) -> None:
    say(spawned, "0")


async def exits_3(spawned: SpawnedKeeper, _: KeeperManager) -> None:
    say(spawned, "3")


async def keeper_is_killed(spawned: SpawnedKeeper, _: KeeperManager) -> None:
    os.kill(spawned.keeper_pid, signal.SIGKILL)


async def agent_is_killed(spawned: SpawnedKeeper, _: KeeperManager) -> None:
    os.kill(spawned.agent_pid or 0, signal.SIGKILL)


async def keeper_is_asked(spawned: SpawnedKeeper, _: KeeperManager) -> None:
    os.kill(spawned.keeper_pid, signal.SIGTERM)


async def group_is_asked(spawned: SpawnedKeeper, _: KeeperManager) -> None:
    os.killpg(spawned.keeper_pid, signal.SIGTERM)


async def agent_is_asked(spawned: SpawnedKeeper, _: KeeperManager) -> None:
    os.kill(spawned.agent_pid or 0, signal.SIGTERM)


async def is_stopped(spawned: SpawnedKeeper, manager: KeeperManager) -> None:
    await manager.stop(spawned.sid)


AGAIN: dict[str, set[Act]] = {
    "on-failure": {exits_3, keeper_is_killed, agent_is_killed},
    "always": {exits_0, exits_3, keeper_is_killed, agent_is_killed},
    "never": set(),
}
ACTS = (
    *(exits_0, exits_3, keeper_is_killed, agent_is_killed),
    *(keeper_is_asked, group_is_asked, agent_is_asked, is_stopped),
)


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
@pytest.mark.parametrize("policy", ["on-failure", "always"])
@asynchronous
async def test_each_policy_and_each_way_of_ending(
    folder: Path, policy: RestartPolicy, act: Act
) -> None:
    manager = manager_of(folder)
    async with running(manager) as (reconciler, told):
        first = await reconciler.manager.spawn("s", agent_command=OBEYS, restart=policy)
        await soon(reconciler.wait_for("s", is_in(V.READY)))
        await act(first, manager)
        await soon(reconciler.wait_for("s", lambda row: row.keeper_pid != first.keeper_pid))
        if act in AGAIN[policy]:
            row = await soon(reconciler.wait_for("s", is_in(V.READY)))
            assert row.keeper_pid not in {None, first.keeper_pid}
            await happens(lambda: told.of("session.restarted", "s"))
            assert json.loads(note_of(folder).read_text().splitlines()[1])["restarts"] != []
            return
        await soon(reconciler.wait_for("s", is_in(V.ABSENT)))
        assert not note_of(folder).exists()
        assert told.of("session.restarted") == []
        stopped = act is is_stopped
        assert stopped or len(told.of("session.not_restarted", "s")) == 1
        assert not any(name.startswith("s.rpc") for name in os.listdir(folder))


@pytest.mark.parametrize("act", [exits_3, keeper_is_killed], ids=lambda act: act.__name__)
@asynchronous
async def test_never_is_the_default_and_leaves_no_note(folder: Path, act: Act) -> None:
    manager = manager_of(folder)
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn("s", agent_command=OBEYS)
        assert not note_of(folder).exists()
        await soon(reconciler.wait_for("s", is_in(V.READY)))
        await act(spawned, manager)
        await soon(reconciler.wait_for("s", is_in(V.ABSENT)))
        assert told.of("session.restarted") == []


@pytest.mark.parametrize(
    ("act", "again"),
    [(exits_0, False), (exits_3, True), (keeper_is_killed, True), (keeper_is_asked, False)],
    ids=lambda each: getattr(each, "__name__", ""),
)
@asynchronous
async def test_a_keeper_of_another_make(folder: Path, act: Act, *, again: bool) -> None:
    manager = manager_of(folder, command=NODE)
    async with running(manager_of(folder)) as (reconciler, told):
        spawned = await manager.spawn("s", agent_command=OBEYS, restart="on-failure")
        await soon(reconciler.wait_for("s", is_in(V.READY)))
        await act(spawned, manager)
        await soon(reconciler.wait_for("s", lambda row: row.keeper_pid != spawned.keeper_pid))
        await soon(reconciler.wait_for("s", is_in(V.READY if again else V.ABSENT)))
        assert note_of(folder).exists() == again
        if again:
            assert (
                b"keeper.cjs"
                in Path(f"/proc/{reconciler.sessions['s'].keeper_pid}/cmdline").read_bytes()
            )
            assert reconciler.sessions["s"].keeper_pid is not None
    assert bool(told.of("session.restarted")) == again


@asynchronous
async def test_what_the_new_session_is_given(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command, its folder and capture; of the environment what the reconciler has."""
    told = tmp_path / "told"
    agent = ("sh", "-c", f"pwd >> {told}; env >> {told}; echo captured; exec sleep 600")
    monkeypatch.setenv("FROM_THE_DAEMON", "yes")
    monkeypatch.setenv("NOTIFY_SOCKET", "/not/yours")
    env = {"PATH": os.environ["PATH"], "ONLY_THE_FIRST": "a secret"}
    async with running(manager_of(folder)) as (reconciler, _):
        spawned = await reconciler.spawn(
            "s", cwd=tmp_path, env=env, agent_command=agent, capture=True, restart="always"
        )
        told.unlink()
        await keeper_is_killed(spawned, reconciler.manager)
        await happens(lambda: told.exists() and "FROM_THE_DAEMON=yes" in told.read_text())
        await happens(lambda: (folder / "keeper-s.log").read_text().count("\ncaptured") == 2)
    lines = told.read_text().splitlines()
    assert lines[0] == str(tmp_path)
    assert not any(line.startswith(("ONLY_THE_FIRST", "NOTIFY_SOCKET")) for line in lines)


@asynchronous
async def test_no_secret_is_kept_and_none_is_told(folder: Path) -> None:
    manager = manager_of(folder)
    env = {"PATH": os.environ["PATH"], "API_KEY": "canary-of-env"}
    agent = ("sh", "-c", ": canary-of-arguments; read code; exit 3")
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn("s", env=env, agent_command=agent, restart="always")
        note = note_of(folder)
        assert "canary-of-env" not in note.read_text()
        assert note.stat().st_mode & 0o777 == 0o600
        say(spawned, "")
        await happens(lambda: told.of("session.restarted"))
        await soon(reconciler.wait_for("s", is_in(V.READY)))
        assert "canary" not in repr(manager.inspect("s"))
        assert "canary" not in json.dumps(told.lines)


# Crash loops.


@asynchronous
async def test_a_crash_loop_is_given_up_and_told_once(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    agent = ("sh", "-c", f"test -e {broken} && exit 3; touch {broken}; read x; exit 3")
    manager = manager_of(folder)
    async with running(manager) as (reconciler, told):
        say(await manager.spawn("s", agent_command=agent, restart="on-failure"), "go")
        await soon(reconciler.wait_for("s", is_in(V.GIVEN_UP)))
        await happens(lambda: told.of("session.given_up", "s"))
        # One that ends at once may have ended before it could be seen to have started.
        tries = [
            w for w in told.lines if w["event"] in {"session.restarted", "session.restart_failed"}
        ]
        assert [each["restarts"] for each in tries] == list(range(SOON.most))
    async with running(manager) as (reconciler, told):  # it is known to a later one
        await soon(reconciler.wait_for("s", is_in(V.GIVEN_UP)))
        await reconciler.settled()
        assert told.events("s") == []
        finding = manager.inspect("s")
        assert (finding.plan.verdict, finding.seen.empty) == (V.GIVEN_UP, False)
        broken.unlink()
        await manager.spawn("s", agent_command=agent, restart="on-failure")  # begins anew
        await soon(reconciler.wait_for("s", is_in(V.READY)))
        _, tail = note_of(folder).read_text().splitlines()
        assert (json.loads(tail)["restarts"], json.loads(tail)["given_up"]) == ([], False)


@asynchronous
async def test_a_session_that_was_given_up_can_be_stopped(folder: Path) -> None:
    manager = manager_of(folder)
    with Folder(folder) as here:
        note_down(here, "s", Launch(policy="always", cwd="/"))
        with launches.opened(here, "s", to_write=True) as note:
            note.write(replace(note.record, given_up=True))
    async with running(manager) as (reconciler, _):
        await soon(reconciler.wait_for("s", is_in(V.GIVEN_UP)))
        stopped = await reconciler.stop("s")
        assert (stopped.keeper_pid, stopped.leftovers) == (None, 0)
        assert "s" not in reconciler.sessions
    with pytest.raises(NoSuchSessionError):
        await manager.stop("s")


@pytest.mark.parametrize("node", [False, True], ids=["ours", "other"])
@asynchronous
async def test_one_that_cannot_be_started_counts_and_is_given_up(
    folder: Path, tmp_path: Path, *, node: bool
) -> None:
    cwd = tmp_path / "work"
    cwd.mkdir()
    manager = manager_of(folder, command=NODE if node else OUR_KEEPER)
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn("s", cwd=cwd, agent_command=HUNG, restart="always")
        cwd.rmdir()
        await keeper_is_killed(spawned, manager)
        await soon(reconciler.wait_for("s", is_in(V.GIVEN_UP)))
        await happens(lambda: told.of("session.given_up"))
    failed = told.of("session.restart_failed", "s")
    assert [each["detail"] for each in failed] == [f"cwd {str(cwd)!r} is not a folder"] * SOON.most


@asynchronous
async def test_a_start_that_we_broke_off_is_no_request_to_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A keeper that did not come up in time is ended by SIGTERM, and says so in its log."""
    manager = manager_of(folder)
    spawned = await manager.spawn("s", agent_command=HUNG, restart="always")
    with Folder(folder) as here:
        await keeper_is_asked(spawned, manager)
        await happens(lambda: not alive(spawned.keeper_pid))
        judged, _ = launches.look(here, "s", 0.0, over=True)
        assert judged.file is not None
        monkeypatch.setattr(starting, "start", slow)
        with pytest.raises(KeeperStartError):
            await manager.start_again("s", judged.file)
    found = manager.inspect("s")
    assert found.plan.verdict is V.RESTARTING
    assert found.plan.reason.startswith("agent failed")
    assert found.seen.record is not None
    assert len(found.seen.record.restarts) == 1


async def slow(*_: object) -> object:
    raise KeeperStartError("the keeper neither came up nor failed")


@asynchronous
async def test_an_attempt_that_cannot_be_noted_down_is_not_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    manager = manager_of(folder)
    async with running(manager) as (_, told):
        spawned = await manager.spawn("s", agent_command=HUNG, restart="always")
        with monkeypatch.context() as patched:
            patched.setattr(launches.Note, "write", full)
            await keeper_is_killed(spawned, manager)
            await happens(lambda: told.of("session.failed", "s"))
            assert told.of("session.restarted") == []
        await happens(lambda: told.of("session.restarted", "s"))


# Who stops wins.


@pytest.mark.parametrize("when", ["before it is started", "after it was started"])
@pytest.mark.parametrize("node", [False, True], ids=["ours", "other"])
@asynchronous
async def test_a_stop_while_it_is_started_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, when: str, *, node: bool
) -> None:
    """The stop has looked, and found nothing, before the new keeper was to be seen."""
    manager = manager_of(folder, command=NODE if node else OUR_KEEPER)
    spawned = await manager.spawn("s", agent_command=SINK, restart="always")
    pids = []

    async def start(request: KeeperRequest, probe: Probe) -> Started:
        if when.startswith("before"):
            await manager.stop("s")
        started = await really_start(request, probe)
        pids.append(started.process.pid)
        if when.startswith("after"):
            launches.forget(probe.folder, "s")  # what a stop does first, and then it is killed
        return started

    monkeypatch.setattr(starting, "start", start)
    async with running(manager) as (reconciler, told):
        await keeper_is_killed(spawned, manager)
        await happens(lambda: told.of("session.restart_failed", "s"))
        assert told.of("session.restart_failed")[0]["detail"] == (
            "session s: it was stopped while it was started again"
        )
        await soon(reconciler.wait_for("s", is_in(V.ABSENT)))
        assert not any(map(alive, pids))
        assert bool(pids) == (node or when.startswith("after")), "ours begins no agent"
        assert not any(name.startswith("s.rpc") for name in os.listdir(folder))


@pytest.mark.parametrize("again", [True, False], ids=["started again", "spawned"])
@asynchronous
async def test_whoever_has_come_in_its_place_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, again: bool
) -> None:
    """It was stopped right after its start, and its name used again, before it saw that."""
    manager = manager_of(folder)
    others: list[SpawnedKeeper] = []

    async def start(request: KeeperRequest, probe: Probe) -> Started:
        started = await really_start(request, probe)
        monkeypatch.undo()
        await manager.stop("s")
        others.append(await manager.spawn("s", agent_command=SINK, restart="always"))
        return started

    if again:
        spawned = await manager.spawn("s", agent_command=SINK, restart="always")
        monkeypatch.setattr(starting, "start", start)
        async with running(manager) as (_, told):
            await keeper_is_killed(spawned, manager)
            await happens(lambda: told.of("session.restart_failed", "s"))
    else:
        monkeypatch.setattr(starting, "start", start)
        with pytest.raises(FolderError, match="note down how session s"):
            await manager.spawn("s", agent_command=SINK, restart="always")
    (entry,) = await manager.discover()
    assert entry.keeper_pid == others[0].keeper_pid
    assert note_of(folder).exists()


@pytest.mark.parametrize("through", ["manager", "reconciler", "program"])
@asynchronous
async def test_a_stop_while_it_waits_for_its_turn(folder: Path, through: str) -> None:
    manager = manager_of(folder, LATER)
    async with running(manager) as (reconciler, _):
        spawned = await reconciler.spawn("s", agent_command=SINK, restart="always")
        await keeper_is_killed(spawned, manager)
        await soon(reconciler.wait_for("s", is_in(V.RESTARTING)))
        match through:
            case "manager":
                assert (await manager.stop("s")).keeper_pid is None
            case "reconciler":
                assert (await reconciler.stop("s")).keeper_pid is None
            case _:
                await asyncio.to_thread(program, folder, "stop", "s")
        await soon(reconciler.wait_for("s", lambda row: row.phase in {V.ABSENT, V.MISSING}))
        assert not note_of(folder).exists()


@asynchronous
async def test_a_stop_in_the_reconciler_while_it_is_started_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = manager_of(folder)
    spawned = await manager.spawn("s", agent_command=SINK, restart="always")
    begun, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    async def start(request: KeeperRequest, probe: Probe) -> Started:  # runs in a loop of its own
        loop.call_soon_threadsafe(begun.set)
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(go.wait(), loop))
        return await really_start(request, probe)

    monkeypatch.setattr(starting, "start", start)
    async with running(manager) as (reconciler, told):
        await keeper_is_killed(spawned, manager)
        await asyncio.wait_for(begun.wait(), 20)
        stop = asyncio.create_task(reconciler.stop("s"))
        await happens(lambda: not note_of(folder).exists())
        go.set()
        await asyncio.wait_for(stop, 20)
        assert "s" not in reconciler.sessions
        assert len(told.of("session.restart_failed", "s")) == 1
        assert await manager.discover() == []


@asynchronous
async def test_the_folder_stays_held_until_what_is_being_started_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = manager_of(folder)
    spawned = await manager.spawn("s", agent_command=SINK, restart="always")
    begun, go = threading.Event(), threading.Event()

    async def start(request: KeeperRequest, probe: Probe) -> Started:
        begun.set()
        go.wait(WAIT)
        return await really_start(request, probe)

    monkeypatch.setattr(starting, "start", start)
    async with contextlib.AsyncExitStack() as first:
        await first.enter_async_context(running(manager))
        await keeper_is_killed(spawned, manager)
        await happens(begun.is_set)
        ending = asyncio.create_task(first.aclose())
        await asyncio.sleep(0.05)
        with pytest.raises(FolderLockedError):
            async with Reconciler(manager):
                pass
        go.set()
        await asyncio.wait_for(ending, WAIT)
        # For a moment its agent, just forked, has the keeper's own arguments.
        await happens(lambda: [each.plan.verdict for each in manager.find()] == [Verdict.READY])


@asynchronous
async def test_a_stop_that_is_killed_right_after_its_first_step(folder: Path) -> None:
    """The note is gone, the session lives: when it ends it is not started again."""
    code = (
        "import asyncio, os, signal, sys\n"
        "from reconciler import launches\n"
        "from reconciler.keeper import KeeperManager\n"
        "real = launches.forget\n"
        "def forget(*given):\n"
        "    assert real(*given)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "launches.forget = forget\n"
        "asyncio.run(KeeperManager(sys.argv[1]).stop('s'))\n"
    )
    manager = manager_of(folder)
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn("s", agent_command=SINK, restart="always")
        env = program_environment(folder)
        command = (sys.executable, "-c", code, str(folder))
        ended = await asyncio.to_thread(subprocess.run, command, env=env, check=False)
        assert ended.returncode == -signal.SIGKILL
        assert alive(spawned.keeper_pid)
        await keeper_is_killed(spawned, manager)
        await soon(reconciler.wait_for("s", is_in(V.ABSENT)))
        assert told.of("session.restarted") == []


@asynchronous
async def test_a_new_session_of_the_name_ends_the_restarts_of_the_old_one(folder: Path) -> None:
    manager = manager_of(folder)
    async with running(manager_of(folder, LATER)) as (reconciler, _):
        old = await manager.spawn("s", agent_command=SINK, restart="always")
        await keeper_is_killed(old, manager)
        await soon(reconciler.wait_for("s", is_in(V.RESTARTING)))
        await manager.spawn("s", agent_command=SINK)
        await soon(reconciler.wait_for("s", is_in(V.READY)))
        assert not note_of(folder).exists()


@pytest.mark.parametrize("node", [False, True], ids=["ours", "other"])
@asynchronous
async def test_a_session_that_is_just_being_started_again_has_its_name_and_keeps_its_policy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, node: bool
) -> None:
    manager = manager_of(folder, command=NODE if node else OUR_KEEPER)
    old = await manager.spawn("s", agent_command=SINK, restart="always")
    tried, begun, go = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    really_held, here = starting.noted, threading.get_ident()

    async def start(request: KeeperRequest, probe: Probe) -> Started:  # in a thread of its own
        begun.set()
        go.wait(WAIT)
        return await really_start(request, probe)

    def held(*given: object, **more: object) -> object:
        if threading.get_ident() == here:
            loop.call_soon(tried.set)
        return really_held(*given, **more)  # type: ignore[arg-type]

    async with running(manager) as (reconciler, told):
        monkeypatch.setattr(starting, "start", start)
        await keeper_is_killed(old, manager)
        await happens(begun.is_set, "it is being started again")
        monkeypatch.setattr(starting, "noted", held)
        monkeypatch.setattr(starting, "start", really_start)
        spawn = asyncio.create_task(manager.spawn("s", agent_command=SINK))
        await asyncio.wait_for(tried.wait(), WAIT)
        go.set()
        with pytest.raises(AlreadyRunningError, match="is running already, its keeper is"):
            await spawn
        await soon(reconciler.wait_for("s", is_in(V.READY)))
        await happens(lambda: told.of("session.restarted", "s"))
        assert note_of(folder).exists()


@asynchronous
async def test_nobody_starts_a_session_again_whose_name_is_just_being_used_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be looked for before it is there, and lose its policy when it is."""
    manager = manager_of(folder)
    old = await manager.spawn("s", agent_command=SINK, restart="always")
    await keeper_is_killed(old, manager)
    await happens(lambda: not alive(old.keeper_pid))
    with Folder(folder) as here:
        judged, _ = launches.look(here, "s", 0.0, over=True)
    make_free, again = starting.Starter._make_free, []

    async def looked(self: starting.Starter, sid: str) -> None:
        await make_free(self, sid)
        monkeypatch.undo()
        assert judged.file is not None
        with pytest.raises(AlreadyRunningError, match="is just being started again"):
            again.append(await manager.start_again(sid, judged.file))

    monkeypatch.setattr(starting.Starter, "_make_free", looked)
    new = await manager.spawn("s", agent_command=SINK, restart="on-failure")
    assert again == []
    assert alive(new.keeper_pid)
    assert '"on-failure"' in note_of(folder).read_text()


@pytest.mark.parametrize("through", ["manager", "reconciler"])
@asynchronous
async def test_a_stop_by_force_in_the_middle_of_a_spawn_is_none_to_be_made_up_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    """It has looked for the policy before that was noted down, and has to use SIGKILL."""
    manager = manager_of(folder, ladder=Ladder(term_grace=0.2))
    note_launch = starting.Starter._note_launch
    async with running(manager) as (reconciler, told):
        stops = []

        async def noting(self: starting.Starter, request: KeeperRequest, started: Started) -> None:
            os.kill(started.process.pid, signal.SIGSTOP)
            await soon(reconciler.wait_for("s", lambda row: row.keeper_pid is not None))
            looked = asyncio.Event()
            forget = launches.forget

            def forgetting(*given: Any) -> bool:  # noqa: ANN401 - as the real one
                looked.set()
                return forget(*given)

            with monkeypatch.context() as patched:
                patched.setattr(launches, "forget", forgetting)
                stop = reconciler.stop if through == "reconciler" else manager.stop
                stops.append(asyncio.create_task(stop("s")))
                await looked.wait()
            await note_launch(self, request, started)

        monkeypatch.setattr(starting.Starter, "_note_launch", noting)
        await manager.spawn("s", agent_command=SINK, restart="always")
        assert note_of(folder).exists()
        await stops[0]
        assert not note_of(folder).exists()
        await soon(reconciler.wait_for("s", is_in(V.ABSENT)))
        assert told.of("session.restarted") == []


@asynchronous
async def test_a_session_that_was_ended_before_its_policy_was_noted_down_has_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = manager_of(folder)
    note_launch = starting.Starter._note_launch

    async def noting(self: starting.Starter, request: KeeperRequest, started: Started) -> None:
        os.kill(started.process.pid, signal.SIGKILL)
        await happens(lambda: not alive(started.process.pid))
        await note_launch(self, request, started)

    monkeypatch.setattr(starting.Starter, "_note_launch", noting)
    with pytest.raises(NoSuchSessionError, match="session s was ended while it was started"):
        await manager.spawn("s", agent_command=SINK, restart="always")
    assert not note_of(folder).exists()


@asynchronous
async def test_a_living_session_keeps_its_policy_when_its_name_is_tried_again(
    manager: KeeperManager, folder: Path
) -> None:
    await manager.spawn("s", agent_command=SINK, restart="always")
    with pytest.raises(AlreadyRunningError):
        await manager.spawn("s", agent_command=SINK)
    assert note_of(folder).exists()


@asynchronous
async def test_a_session_whose_policy_cannot_be_noted_down_is_ended(
    manager: KeeperManager, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FolderError, match=r"note down how session s.*: No space left on device"):
        await manager.spawn("s", agent_command=SINK, restart="always")
    assert await manager.discover() == []
    assert not [name for name in os.listdir(folder) if name.startswith("s.")]


@asynchronous
async def test_a_stop_that_cannot_end_the_restarts_does_nothing(
    manager: KeeperManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> bool:
        raise OSError(13, "Permission denied")

    spawned = await manager.spawn("s", agent_command=SINK, restart="always")
    monkeypatch.setattr(launches, "forget", refused)
    with pytest.raises(FolderError, match="to end the restarts of session s: Permission denied"):
        await manager.stop("s")
    assert alive(spawned.keeper_pid)


@asynchronous
async def test_no_such_policy(manager: KeeperManager, folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="'sometimes' is none of never, on-failure"):
        await manager.spawn("s", agent_command=SINK, restart="sometimes")  # type: ignore[arg-type]
    assert os.listdir(folder) == []


# Hostile notes, dry runs, other boots.


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "broken"])
@asynchronous
async def test_a_hostile_note_is_told_once_and_holds_nobody_up(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    path = note_of(folder, "evil")
    target = tmp_path / "target"
    target.write_text("precious")
    match kind:
        case "link":
            path.symlink_to(target)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            path.write_text('{"launch": 1, "policy": "always"')
    manager = manager_of(folder)
    async with running(manager) as (reconciler, told):
        await soon(reconciler.wait_for("evil", is_in(V.REFUSED)))
        good = await manager.spawn("good", agent_command=SINK, restart="always")
        await keeper_is_killed(good, manager)
        await happens(lambda: told.of("session.restarted", "good"))
        await reconciler.settled()
        assert told.events("evil") == ["session.refused"]
        assert told.of("session.refused")[0]["reason"].startswith("launch: no ")
        if kind == "broken":  # of ours: a person can clear it away
            await manager.stop("evil")
            assert not path.exists()
        else:
            with pytest.raises(UnverifiableError):
                await manager.stop("evil")
            assert os.path.lexists(path)
    assert target.read_text() == "precious"


@asynchronous
async def test_a_dry_run_tells_and_starts_nothing(folder: Path) -> None:
    manager = manager_of(folder)
    spawned = await manager.spawn("s", agent_command=SINK, restart="always")
    async with running(manager) as (reconciler, _):
        await soon(reconciler.wait_for("s", is_in(V.READY)))
    async with running(manager, dry_run=True) as (reconciler, told):
        await soon(reconciler.wait_for("s", is_in(V.READY)))
        os.kill(spawned.keeper_pid, signal.SIGTERM)  # it removes its files by itself
        await soon(reconciler.wait_for("s", is_in(V.STOPPING)))
        before = note_of(folder).read_bytes()
        await happens(lambda: told.of("session.planned", "s"))
        assert told.of("session.planned", "s")[-1]["actions"] == ["Forget"]
        assert note_of(folder).read_bytes() == before
        with pytest.raises(UnverifiableError, match="dry run"):
            await reconciler.stop("s")
        assert note_of(folder).exists()


@asynchronous
async def test_what_was_started_in_an_earlier_boot_is_started_again(folder: Path) -> None:
    """Asked to end, as all is when a machine goes down; in this boot that would be a stop."""
    manager = manager_of(folder)
    spawned = await manager.spawn("s", agent_command=SINK, restart="on-failure")
    await keeper_is_asked(spawned, manager)
    await happens(lambda: not alive(spawned.keeper_pid))
    note = note_of(folder)
    note.write_text(note.read_text().replace(boot_id(), "another"))
    async with running(manager) as (reconciler, told):
        await soon(reconciler.wait_for("s", is_in(V.READY)))
        await happens(lambda: told.of("session.restarted", "s"))
        assert told.of("session.restarted")[0]["reason"] == "the machine was started anew"
    assert boot_id() in note.read_text()


@asynchronous
async def test_a_daemon_that_is_killed_as_it_starts_what_was_started_in_an_earlier_boot(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the session's log says last was said when the machine went down: no stop even now."""
    manager = manager_of(folder)
    spawned = await manager.spawn("s", agent_command=SINK, restart="on-failure")
    await keeper_is_asked(spawned, manager)
    await happens(lambda: not alive(spawned.keeper_pid))
    note = note_of(folder)
    note.write_text(note.read_text().replace(boot_id(), "another"))

    async def killed(*_: object) -> Started:
        raise asyncio.CancelledError  # nothing that follows is done

    with monkeypatch.context() as patched, Folder(folder) as here:
        patched.setattr(starting, "start", killed)
        entry, _ = launches.look(here, "s", 0.0, over=True)
        assert entry.file is not None
        with pytest.raises(asyncio.CancelledError):
            await manager.start_again("s", entry.file)
    async with running(manager) as (reconciler, told):
        await happens(lambda: told.of("session.restarted", "s"))
        row = await soon(reconciler.wait_for("s", is_in(V.READY)))
        os.kill(row.keeper_pid or 0, signal.SIGTERM)  # and that is a stop
        await soon(reconciler.wait_for("s", is_in(V.ABSENT)))
        assert not note.exists()


@asynchronous
async def test_the_old_agent_is_dead_before_the_new_session_begins(folder: Path) -> None:
    """Another make's keeper leaves its agent behind."""
    manager = manager_of(folder, command=NODE)
    async with running(manager) as (reconciler, told):
        spawned = await manager.spawn("s", agent_command=HUNG, restart="always")
        await soon(reconciler.wait_for("s", lambda row: row.agent_pid is not None))
        await keeper_is_killed(spawned, manager)
        await happens(lambda: told.of("session.restarted", "s"))
        assert not alive(spawned.agent_pid or 0)
        events = told.events("s")
        assert events.index("agent.stopped") < events.index("session.restarted")


@asynchronous
async def test_many_at_once(folder: Path) -> None:
    manager = manager_of(folder)
    sids = [f"s{number}" for number in range(12)]
    async with running(manager) as (reconciler, told):
        spawns = (manager.spawn(sid, agent_command=SINK, restart="always") for sid in sids)
        for spawned in await asyncio.gather(*spawns):
            await keeper_is_killed(spawned, manager)
        await happens(lambda: len(told.of("session.restarted")) == len(sids))
        for sid in sids:
            await soon(reconciler.wait_for(sid, is_in(V.READY)))
        assert {each["sid"] for each in told.of("session.restarted")} == set(sids)


@asynchronous
async def test_a_note_that_has_changed_since_is_not_obeyed(
    manager: KeeperManager, folder: Path
) -> None:
    with Folder(folder) as here:
        note_down(here, "s", Launch(policy="always", cwd="/", agent_command=SINK))
    with pytest.raises(NoSuchSessionError, match="another one now"):
        await manager.start_again("s", FileId(1, 2, 3, 4))
    with pytest.raises(NoSuchSessionError, match="was stopped"):
        await manager.start_again("other", FileId(1, 2, 3, 4))
    assert await manager.discover() == []


# The daemon, and the command line.


def program(folder: Path, *arguments: str) -> str:
    command = (sys.executable, "-m", "reconciler", *arguments, "--sessions-dir", str(folder))
    ended = subprocess.run(
        command, env=program_environment(folder), text=True, capture_output=True, check=True
    )
    return ended.stdout


@pytest.fixture
def quick(folder: Path, tmp_path: Path) -> Iterator[Daemon]:
    config = tmp_path / "config.toml"
    config.write_text("[restart]\nfirst = 0.05\ncap = 0.1\nmost = 1000\nfarewell = 0.2\n")
    running = Daemon(folder, tmp_path / "daemon.log", "--config", str(config))
    yield running
    running.process.kill()
    running.process.wait()


def test_the_policy_outlives_the_daemon(folder: Path, quick: Daemon) -> None:
    program(folder, "spawn", "s", "--restart", "on-failure", "--", *SINK)
    quick.process.kill()
    quick.process.wait()
    os.kill(int((folder / "s.rpc.sock.pid").read_text()), signal.SIGKILL)
    assert json.loads(program(folder, "ls", "--json"))[0]["restart"] == "on-failure"
    assert "keeper-s.launch gone" in program(folder, "stop", "s", "--dry-run")
    assert "would remove its launch note" in program(folder, "spawn", "s", "--dry-run", "--", *SINK)
    assert note_of(folder).exists()
    quick.process = quick._start()
    until(lambda: quick.of("session.restarted", "s"), "it is started again")
    (row,) = json.loads(program(folder, "ls", "--json"))
    assert (row["phase"], row["restart"], row["restarts"]) == ("ready", "on-failure", 1)
    assert "on-failure (1)" in program(folder, "ls").splitlines()[1]
    assert "on-failure, restarted 1 time lately" in program(folder, "inspect", "s")
    assert quick.end() == 0
    assert alive(row["keeper_pid"]), "it outlives who has started it"
    program(folder, "stop", "s")
    assert not note_of(folder).exists()


def test_the_example_of_the_docs(folder: Path, quick: Daemon) -> None:
    page = (Path(__file__).parent.parent / "docs" / "restarts.md").read_text()
    (block,) = re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    env = program_environment(folder) | {"PI_RECONCILER_SESSIONS_DIR": str(folder)}
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, said = part.partition("\n")
        command = command.replace("pi-reconciler", f"{sys.executable} -m reconciler")
        command = command.replace("; sleep 2", "")
        done = subprocess.run(
            ["bash", "-c", command], env=env, text=True, capture_output=True, check=True
        )
        assert plain(done.stdout) == plain(said), command
        if command.startswith("kill"):
            until(lambda: quick.of("session.restarted", "demo"))
            until(lambda: '"ready"' in program(folder, "ls", "--json"))


def plain(text: str) -> str:
    return re.sub(r" +", " ", re.sub(r"\d{2,}|\d+s", "N", text))


class Scene:
    """Sessions with a policy, and a daemon, to which things happen at random."""

    def __init__(self, folder: Path, daemon: Daemon, seed: int) -> None:
        self.folder = folder
        self.manager = KeeperManager(folder)
        self.wanted: set[str] = set()
        self._mark = folder_mark(folder.stat().st_dev, folder.stat().st_ino)
        self._daemon = daemon
        self._random = random.Random(seed)
        self._fates = (
            *(self.keeper_is_killed, self.keeper_is_killed, self.agent_is_killed),
            *(self.is_stopped_as_it_dies, self.comes_back, self.daemon_is_killed),
        )

    async def happens(self) -> None:
        await self._random.choice(self._fates)()
        await asyncio.sleep(self._random.random() * 0.15)

    async def comes_back(self) -> None:
        sid = self._random.choice(sorted(self._all - self.wanted) or [""])
        if sid:
            await self.manager.spawn(sid, agent_command=SINK, restart="always")
            self.wanted.add(sid)

    async def keeper_is_killed(self) -> None:
        self._kill(self._one(), ".pid")

    async def agent_is_killed(self) -> None:
        self._kill(self._one(), ".pi-pid")

    async def is_stopped_as_it_dies(self) -> None:
        """Before, while or after it is started again."""
        sid = self._one()
        if sid:
            self._kill(sid, ".pid")
            await asyncio.sleep(self._random.random() * 0.15)
            self.wanted.discard(sid)
            await self.manager.stop(sid)

    async def daemon_is_killed(self) -> None:
        await asyncio.to_thread(self._daemon.crash_and_restart)

    _all = frozenset(f"s{number}" for number in range(6))

    def _one(self) -> str:
        return self._random.choice(sorted(self.wanted) or [""])

    def _kill(self, sid: str, ending: str) -> None:
        """Kill what a pid file names, if it is of this folder still."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.folder / f"{sid}.rpc.sock{ending}").read_text())
            keeper = SYSTEM.variable(pid, "PI_KEEPER_SESSIONS_DIR") == str(self.folder)
            if keeper or SYSTEM.variable(pid, FOLDER_MARKER) == self._mark:
                os.kill(pid, signal.SIGKILL)

    def found(self) -> dict[str, Verdict]:
        return {each.seen.sid: each.plan.verdict for each in self.manager.find()}


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(20 if CAMPAIGN else 1))
@asynchronous
async def test_all_that_are_wanted_live_and_no_other_whoever_is_killed(
    folder: Path, quick: Daemon, seed: int
) -> None:
    scene = Scene(folder, quick, seed)
    for _ in range(6):
        await scene.comes_back()
    for _ in range(100 if CAMPAIGN else 20):
        await scene.happens()
    expected = dict.fromkeys(scene.wanted, V.READY)
    await happens(lambda: scene.found() == expected, "exactly the wanted ones live")
    notes = {path.name for path in folder.glob("keeper-*.launch")}
    assert notes == {f"keeper-{sid}.launch" for sid in scene.wanted}
