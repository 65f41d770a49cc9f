"""`restart`: what was running is ended and started again, whoever is beside it or comes between."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from conftest import (
    HUNG,
    SINK,
    Daemon,
    alive,
    as_nobody,
    asynchronous,
    note_down,
    program_environment,
    root,
    until,
)
from test_cli import Cli, Ended
from test_cli import cli as cli  # noqa: PLC0414 - a fixture
from test_restart_policies import NODE, manager_of, note_of
from test_restart_policies import quick as quick  # noqa: PLC0414 - a fixture

from reconciler import launches, starting
from reconciler.effects import Done, Effects
from reconciler.errors import (
    AgentExitedError,
    AgentNotFoundError,
    AlreadyRunningError,
    KeeperStartError,
    NoSuchSessionError,
    NotKeptError,
    UnverifiableError,
)
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager
from reconciler.ladder import Ladder
from reconciler.launches import Launch, Note
from reconciler.observations import Observation
from reconciler.plans import Stop, Verdict
from reconciler.probe import Probe
from reconciler.processes import SYSTEM
from reconciler.requests import OUR_KEEPER, KeeperRequest
from reconciler.restarts import Ending, RestartRecord
from reconciler.spawning import Started
from reconciler.spawning import start as really_start

V = Verdict


def phase(manager: KeeperManager) -> Verdict:
    return manager.inspect("s").plan.verdict


def noted(folder: Path) -> Note:
    with Folder(folder) as here, launches.opened(here, "s") as note:
        return note


@pytest.mark.parametrize("command", [OUR_KEEPER, NODE], ids=["ours", "node"])
@asynchronous
async def test_it_runs_again_as_it_was_started(
    folder: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manager = manager_of(folder, command=command)
    env = {"PATH": os.environ["PATH"], "KEY": "of the spawn"}
    before = await manager.spawn(
        "s", agent_command=SINK, cwd=tmp_path, env=env, capture=True, restart="always"
    )
    kept = note_of(folder).read_text().splitlines()[0]
    monkeypatch.setenv("KEY", "of the restart")
    after = await manager.restart("s")
    assert not alive(before.keeper_pid)
    assert after.agent_pid is not None
    assert os.readlink(f"/proc/{after.agent_pid}/cwd") == str(tmp_path)
    assert SYSTEM.variable(after.agent_pid, "KEY") == "of the restart"
    assert phase(manager) is V.READY
    assert note_of(folder).read_text().splitlines()[0] == kept
    assert (noted(folder).record, noted(folder).failed) == (RestartRecord("always"), False)
    assert note_of(folder).stat().st_mode & 0o777 == 0o600


@asynchronous
async def test_what_cannot_be_started_again_is_not_ended(folder: Path, tmp_path: Path) -> None:
    manager = manager_of(folder)
    program, there = tmp_path / "agent", tmp_path / "there"
    program.symlink_to("/bin/cat")
    there.mkdir()
    pids = [
        (await manager.spawn("never", agent_command=SINK)).keeper_pid,
        (await manager.spawn("gone", agent_command=[str(program)], restart="always")).keeper_pid,
        (await manager.spawn("odd", agent_command=SINK, restart="always")).keeper_pid,
        (await manager.spawn("held", agent_command=SINK, restart="always")).keeper_pid,
    ]
    program.unlink()
    note_of(folder, "odd").chmod(0o666)
    notes = {path: path.read_text() for path in folder.glob("*.launch")}
    with Folder(folder) as here, launches.opened(here, "held", to_write=True):
        for sid, error, words in (
            ("never", NotKeptError, "spawn --restart on-failure keeps it"),
            ("gone", AgentNotFoundError, "was not found"),
            ("odd", NotKeptError, "chmod 600"),
            ("held", AlreadyRunningError, "is just being started again"),
            ("none", NoSuchSessionError, "no session none"),
        ):
            with pytest.raises(error, match=words):
                await manager.restart(sid)
    assert all(map(alive, pids))
    assert {path: path.read_text() for path in folder.glob("*.launch")} == notes


@asynchronous
async def test_what_it_has_started_ends_with_it_unless_it_is_to_be_left(folder: Path) -> None:
    manager = manager_of(folder)
    agent = ("sh", "-c", 'setsid sleep 600 & echo $! > "$0"; exec cat > /dev/null')
    pids = folder.parent / "pids"
    others = []
    await manager.spawn("s", agent_command=[*agent, str(pids)], restart="always")
    for leave in (True, False):
        others.append(int(pids.read_text()))
        pids.unlink()
        await manager.restart("s", leave=leave)
        assert alive(others[-1]) is leave
        until(pids.exists)
        until(pids.read_text)
    os.kill(others[0], signal.SIGKILL)
    await manager.stop("s")


@asynchronous
async def test_one_that_waits_or_was_given_up_is_started_at_once(folder: Path) -> None:
    manager = manager_of(folder)
    spawned = await manager.spawn("s", agent_command=SINK, restart="always")
    with Folder(folder) as here, launches.opened(here, "s", to_write=True) as note:
        note.write(RestartRecord("always", restarts=(1.0, 2.0), given_up=True), failed=True)
    os.kill(spawned.keeper_pid, signal.SIGKILL)
    os.kill(spawned.agent_pid or 0, signal.SIGKILL)
    until(lambda: not alive(spawned.keeper_pid))
    await manager.restart("s")
    assert phase(manager) is V.READY
    assert noted(folder).record == RestartRecord("always")


# What comes between.


@pytest.mark.parametrize(
    "error",
    [UnverifiableError("session s was left alone: a reason"), OSError(errno.EMFILE, "no room")],
    ids=["refused", "system"],
)
@asynchronous
async def test_one_that_is_not_ended_is_as_it_was(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> None:
        assert noted(folder).failed, "should this be killed, it is started again"
        raise error

    manager = manager_of(folder)
    await manager.spawn("s", agent_command=SINK, restart="always")
    before = note_of(folder).read_text()
    monkeypatch.setattr(starting, "end_session", fails)
    with pytest.raises(type(error)):
        await manager.restart("s")
    assert note_of(folder).read_text() == before
    assert phase(manager) is V.READY


Start = Callable[[KeeperRequest, Probe], Awaitable[Started]]


def between(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Awaitable[object]]) -> None:
    """Have something happen once the session has ended, and before it is started."""

    async def start(request: KeeperRequest, probe: Probe) -> Started:
        monkeypatch.setattr(starting, "start", really_start)
        await act()
        return await really_start(request, probe)

    monkeypatch.setattr(starting, "start", start)


@asynchronous
async def test_who_spawns_one_of_its_name_meanwhile_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, other = manager_of(folder), manager_of(folder)
    await manager.spawn("s", agent_command=SINK, restart="always")

    async def spawn() -> None:
        with pytest.raises(AlreadyRunningError, match="is just being started again"):
            await other.spawn("s", agent_command=HUNG, restart="on-failure", timeout=0.1)

    between(monkeypatch, spawn)
    restarted = await manager.restart("s")
    assert SYSTEM.arguments(restarted.agent_pid or 0) not in {HUNG, None}
    assert noted(folder).launch.policy == "always"


@asynchronous
async def test_who_stops_it_meanwhile_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, other = manager_of(folder), manager_of(folder)
    await manager.spawn("s", agent_command=SINK, restart="always")
    between(monkeypatch, lambda: other.stop("s"))
    with pytest.raises(NoSuchSessionError, match="stopped while it was started again"):
        await manager.restart("s")
    assert manager.find() == []


@asynchronous
async def test_who_stops_it_meanwhile_and_spawns_another_one_keeps_that(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, other = manager_of(folder), manager_of(folder)
    await manager.spawn("s", agent_command=SINK, restart="always")
    spawned = []
    really_stop = Effects.stop

    async def stop(effects: Effects, seen: Observation, action: Stop) -> Done:
        monkeypatch.setattr(Effects, "stop", really_stop)
        done = await really_stop(effects, seen, action)
        await other.stop("s")
        spawned.append(await other.spawn("s", agent_command=SINK, restart="always"))
        return done

    monkeypatch.setattr(Effects, "stop", stop)
    with pytest.raises(NoSuchSessionError, match="was stopped meanwhile"):
        await manager.restart("s")
    assert alive(spawned[0].keeper_pid)
    assert phase(manager) is V.READY
    assert not noted(folder).failed


@root
@asynchronous
async def test_a_note_that_may_not_be_written_to_keeps_nobody_from_spawning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(*_: object) -> Started:
        raise KeeperStartError("it was tried")

    monkeypatch.setattr(starting, "start", start)
    with Folder(folder) as here:
        note_down(here, "s", Launch(policy="always", cwd="/"))
    note_of(folder).chmod(0o400)
    for path in (*list(folder.parents)[:3], folder, note_of(folder)):
        os.chown(path, 65534, 65534)
    with as_nobody(), pytest.raises(KeeperStartError, match="it was tried"):
        await manager_of(folder).spawn("s", agent_command=SINK, cwd="/")
    assert not note_of(folder).exists()


@asynchronous
async def test_one_that_does_not_come_up_keeps_its_policy(folder: Path, tmp_path: Path) -> None:
    manager, once = manager_of(folder), tmp_path / "once"
    script = 'mkdir "$0" || exit 3; exec cat > /dev/null'
    await manager.spawn("s", agent_command=["sh", "-c", script, str(once)], restart="always")
    with pytest.raises(AgentExitedError, match="it is ended now, and keeps its policy"):
        await manager.restart("s")
    assert noted(folder).failed
    assert phase(manager) is V.RESTARTING
    once.rmdir()
    await manager.restart("s")
    assert phase(manager) is V.READY


def test_should_it_be_killed_the_daemon_starts_the_session(folder: Path, quick: Daemon) -> None:
    manager = manager_of(folder)
    first = asyncio.run(manager.spawn("s", agent_command=SINK, restart="on-failure"))
    code = (
        "import asyncio, os, sys\n"
        "from reconciler import KeeperManager, starting\n"
        "async def start(*_): os.kill(os.getpid(), 9)\n"
        "starting.start = start\n"
        "asyncio.run(KeeperManager(sys.argv[1]).restart('s'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], env=program_environment(folder), check=False
    )
    assert done.returncode == -signal.SIGKILL
    until(lambda: quick.of("session.restarted", "s"), "the daemon does it")
    assert not alive(first.keeper_pid)
    until(lambda: phase(manager) is V.READY)


def test_should_it_be_killed_once_the_session_is_up_the_next_end_is_judged_by_itself(
    folder: Path,
) -> None:
    manager = manager_of(folder)
    asyncio.run(manager.spawn("s", agent_command=SINK, restart="on-failure"))
    code = (
        "import asyncio, os, sys\n"
        "from reconciler import KeeperManager, starting\n"
        "really_start = starting.start\n"
        "async def start(*given):\n"
        "    await really_start(*given)\n"
        "    os.kill(os.getpid(), 9)\n"
        "starting.start = start\n"
        "asyncio.run(KeeperManager(sys.argv[1]).restart('s'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], env=program_environment(folder), check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert noted(folder).failed, "it could not be told that the session is up"
    seen = manager.inspect("s").seen
    assert seen.agent.process is not None
    os.kill(seen.agent.process.pid, signal.SIGTERM)
    until(lambda: manager.inspect("s").seen.over)
    record = manager.inspect("s").seen.record
    assert record is not None
    assert record.ending is Ending.ASKED


def test_beside_a_daemon_it_is_restarted_once(folder: Path, quick: Daemon) -> None:
    """One that would start it again 50 ms after its end, while what it has started still ends."""
    manager = KeeperManager(folder, ladder=Ladder(term_grace=0.3))
    script = "setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' & exec cat > /dev/null"
    agent = ("sh", "-c", script)
    before = asyncio.run(manager.spawn("s", agent_command=agent, restart="always"))
    after = asyncio.run(manager.restart("s"))
    assert not alive(before.keeper_pid)
    assert (folder / "s.rpc.sock.pid").read_text() == str(after.keeper_pid)
    assert quick.of("session.restarted", "s") == []
    assert phase(manager) is V.READY


# The command.


def test_the_command_tells_of_each(cli: Cli) -> None:
    assert cli("spawn", "a", "--restart", "always", "--", "cat").code == 0
    assert cli("spawn", "b", "--restart", "on-failure", "--", "cat").code == 0
    never = cli.spawn("c")
    ended = cli("restart", "a", "c", "zz")
    pid = (cli.folder / "a.rpc.sock.pid").read_text()
    assert (ended.code, ended.out) == (1, f"a restarted, its keeper is {pid}\n")
    refused, missing = ended.err.splitlines()
    assert refused.startswith("pi-reconciler: session c was spawned without a restart policy")
    assert missing == f"pi-reconciler: no session zz in {cli.folder}"
    assert cli("restart", "a", "--quiet") == Ended(0, "", "")
    assert cli("restart", "zz").code == 3
    told = cli("restart", "--all", "--json").json
    assert [(each["sid"], each["restarted"]) for each in told] == [("a", True), ("b", True)]
    assert set(told[0]) == {"sid", "restarted", "keeper_pid", "agent_pid", "socket"}
    assert alive(never), "all are all that can be"
    cli("stop", "a", "b")
    assert "has a restart policy" in cli("restart", "--all").err
    for arguments in ((), ("a", "--all")):
        assert "give session ids, or --all, and not both" in cli.fails(2, "restart", *arguments)
    assert "not usable" in cli.fails(2, "restart", "../a")


def test_a_dry_run_says_what_would_be_ended_and_started(cli: Cli, tmp_path: Path) -> None:
    cli("spawn", "a", "--restart", "always", "--cwd", tmp_path, "--", "cat")
    cli.spawn("c")
    (row, other) = cli("ls", "--json").json
    before = note_of(cli.folder, "a").read_text()
    shown = cli("restart", "a", "--dry-run")
    assert shown.code == 0
    start = f"would restart a: end keeper {row['keeper_pid']}, end agent {row['agent_pid']}, start "
    assert shown.out.startswith(start)
    assert shown.out.endswith(f"/cat in {tmp_path}\n")
    (told,) = json.loads(cli("restart", "--all", "--dry-run", "--json").out)
    assert (told["dry_run"], told["keeper_pid"], told["cwd"]) == (
        True,
        row["keeper_pid"],
        str(tmp_path),
    )
    assert "was not kept" in cli("restart", "c", "--dry-run").err
    assert cli("ls", "--json").json[0]["keeper_pid"] == row["keeper_pid"]
    assert alive(other["keeper_pid"])
    assert note_of(cli.folder, "a").read_text() == before
