"""The budget of the logs, as the reconciler keeps it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import (
    HUNG,
    PROGRAM,
    WAIT,
    Told,
    asynchronous,
    happens,
    program_environment,
    stale_pair,
)

from reconciler import KeeperManager, Reconciler
from reconciler.budget import LogBudget
from reconciler.folder import Folder
from reconciler.metrics import Metrics
from reconciler.sessions import SessionTable
from reconciler.sweep import LogSweeper

NOTHING = LogBudget(total=0, each=1000, age=1e12)


def old_logs(folder: Path, sid: str) -> list[str]:
    names = [f"keeper-{sid}.log", f"keeper-launch-{sid}.log"]
    for name in names:
        (folder / name).write_text("old\n" * 10)
    return names


def logs(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".log"))


async def come_down_to(reconciler: Reconciler, folder: Path, left: list[str]) -> None:
    """Look until these logs are left: a process that is on its way out may hold its own yet."""
    async with asyncio.timeout(WAIT):
        while logs(folder) != left:
            await reconciler.settled()


@asynchronous
async def test_a_full_look_ends_with_the_logs_in_their_budget(manager: KeeperManager) -> None:
    folder, told = manager.sessions_dir, Told()
    await manager.spawn("alive", agent_command=HUNG)
    old_logs(folder, "over")
    stale_pair(folder, "dead")
    old_logs(folder, "dead")
    made: list[Metrics] = []

    def metrics(sessions: SessionTable) -> Metrics:
        made.append(Metrics(sessions))
        return made[0]

    async with Reconciler(manager, logger=told.logger, log_budget=NOTHING, metrics=metrics) as it:
        # The dead session's files go in the first look, its logs in the second.
        await come_down_to(it, folder, ["keeper-alive.log", "keeper-launch-alive.log"])
        lines = told.of("logs.swept")
        assert sum(line["bytes"] for line in lines) == 160
        assert {name for line in lines for name in line["logs"]} == {
            *("keeper-over.log", "keeper-launch-over.log"),
            *("keeper-dead.log", "keeper-launch-dead.log"),
        }
        assert {line["reason"] for line in lines} == {"logs too long in all"}
        await it.settled()
        assert told.of("logs.swept") == lines
        read = made[0].registry.get_sample_value
        assert read("pi_reconciler_logs_swept_total", {"reason": "logs too long in all"}) == 4
        sizes = sum((folder / name).stat().st_size for name in logs(folder))
        assert read("pi_reconciler_log_bytes") == sizes
        await it.stop("alive")
        await come_down_to(it, folder, [])


@asynchronous
async def test_a_dry_run_and_one_without_the_lock_tell_it_once_and_do_nothing(
    manager: KeeperManager,
) -> None:
    names = old_logs(manager.sessions_dir, "over")
    told = Told()
    async with Reconciler(manager, dry_run=True, logger=told.logger, log_budget=NOTHING) as it:
        await it.settled()
        await it.settled()
        (line,) = told.of("logs.planned")
        assert (line["count"], line["bytes"], sorted(line["logs"])) == (2, 80, sorted(names))
        old_logs(manager.sessions_dir, "another")
        await it.settled()
        assert [line["count"] for line in told.of("logs.planned")] == [2, 4]
    assert len(logs(manager.sessions_dir)) == 4
    assert not told.of("logs.swept")


@asynchronous
async def test_by_default_nothing_young_and_short_goes(manager: KeeperManager) -> None:
    names = old_logs(manager.sessions_dir, "over")
    async with Reconciler(manager) as it:
        await it.settled()
    assert logs(manager.sessions_dir) == sorted(names)


@asynchronous
async def test_a_living_log_that_stays_too_long_is_told_of_once(manager: KeeperManager) -> None:
    folder, told = manager.sessions_dir, Told()
    await manager.spawn("alive", agent_command=HUNG)
    with (folder / "keeper-alive.log").open("ab") as log:
        log.write(b"x" * 5000)
    size = (folder / "keeper-alive.log").stat().st_size
    async with Reconciler(manager, logger=told.logger, log_budget=NOTHING) as it:
        await it.settled()
        assert not told.of("logs.grown")  # its keeper may be about to cut it
        await it.settled()
        await it.settled()
        (line,) = told.of("logs.grown")
    assert (line["sid"], line["log"], line["bytes"]) == ("alive", "keeper-alive.log", size)
    assert (folder / "keeper-alive.log").stat().st_size == size


@asynchronous
async def test_what_cannot_be_swept_is_told_once(
    manager: KeeperManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_logs(manager.sessions_dir, "over")
    told, rename = Told(), os.rename

    def failing(name: str, hidden: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        if name == "keeper-over.log":
            raise PermissionError(1, "Operation not permitted")
        rename(name, hidden, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", failing)
    async with Reconciler(manager, logger=told.logger, log_budget=NOTHING) as it:
        await it.settled()
        await it.settled()
    (line,) = told.of("logs.sweep_failed")
    assert line["reason"] == "keeper-over.log: Operation not permitted"
    assert logs(manager.sessions_dir) == ["keeper-over.log"]


@asynchronous
async def test_a_sweep_that_takes_long_holds_nothing_up_and_is_waited_for_at_the_end(
    manager: KeeperManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ended, sweep = threading.Event(), threading.Event(), LogSweeper.sweep

    def slow(
        self: LogSweeper, folder: Folder, living: set[str], *, act: bool, stop: threading.Event
    ) -> object:
        began.set()
        assert stop.wait(WAIT)
        report = sweep(self, folder, living, act=act, stop=stop)
        ended.set()
        return report

    monkeypatch.setattr(LogSweeper, "sweep", slow)
    folder, told = manager.sessions_dir, Told()
    names = old_logs(folder, "over")
    async with Reconciler(manager, logger=told.logger, log_budget=NOTHING, resync=0.05):
        await asyncio.to_thread(began.wait, WAIT)
        stale_pair(folder, "dead")
        await happens(lambda: told.of("session.cleaned", "dead"))
        assert not ended.is_set()
    assert ended.is_set()
    assert logs(folder) == sorted(names)


@asynchronous
async def test_a_folder_that_goes_while_its_logs_are_swept_is_no_trouble(
    manager: KeeperManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, sweep = threading.Event(), LogSweeper.sweep

    def late(self: LogSweeper, folder: Folder, living: set[str], **more: object) -> object:
        assert go.wait(WAIT)
        return sweep(self, folder, living, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(LogSweeper, "sweep", late)
    folder, told = manager.sessions_dir, Told()
    old_logs(folder, "over")
    async with Reconciler(manager, logger=told.logger, log_budget=NOTHING) as it:
        away = folder.rename(folder.with_name("away"))
        await happens(lambda: told.of("folder.gone"))
        folder.mkdir(mode=0o700)
        old_logs(folder, "new")
        go.set()
        await come_down_to(it, folder, [])
    assert not [name for name in os.listdir(away) if name.startswith(".")]


def test_the_command_line_keeps_the_budget_of_the_settings(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[log_budget]\ntotal = 65536\n")
    for number in range(3):
        path = folder / f"keeper-{number}.log"
        path.write_bytes(b"x" * 40_000)
        os.utime(path, (number, number) if number == 0 else None)
    command = (*PROGRAM, "run", "--once", "--log-form", "json", "--sessions-dir", str(folder))
    environment = {
        **program_environment(folder),
        "PI_RECONCILER_CONFIG": str(tmp_path / "config.toml"),
    }
    told = subprocess.run(command, check=True, env=environment, capture_output=True, timeout=WAIT)
    assert told.stdout.count(b'"logs.swept"') == 1
    assert b'"logs too long in all"' in told.stdout, "how old they are, it has had no time to know"
    assert len(logs(folder)) == 1
