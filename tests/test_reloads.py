"""Changed settings are taken by a running daemon, whole or not at all."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_cli
from conftest import WAIT, asynchronous, bare_socket, happens, soon
from structlog.testing import CapturingLogger
from test_cli import Cli, cli, lines_of

from reconciler import KeeperManager, Policy, Reconciler, Verdict
from reconciler.budget import LogBudget
from reconciler.reloads import Reloads
from reconciler.settings import Settings, Sources

__all__ = ["cli"]


# -- A daemon and SIGHUP -----------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text("[policy]\nsettle = 3600\n")
    return path


@pytest.fixture
def daemon(cli: Cli, settings: Path) -> Iterator[subprocess.Popen[bytes]]:
    flags = ("--resync", "3600", "--metrics", "127.0.0.1:0")
    arguments = ("run", "--config", settings, *flags)
    with cli.started(*arguments, stdout=subprocess.PIPE) as process:
        lines_of(process, "reconciler.started")
        yield process


def reloaded(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    process.send_signal(signal.SIGHUP)
    return lines_of(process, "settings.reloaded")[-1]


def refused(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    process.send_signal(signal.SIGHUP)
    return lines_of(process, "settings.refused")[-1]


def test_a_daemon_goes_by_new_settings_from_sighup_on(
    cli: Cli, settings: Path, daemon: subprocess.Popen[bytes]
) -> None:
    bare_socket(cli.folder / "old.rpc.sock")
    ours = "[policy]\nsettle = 0.05\n[log]\nlevel = 'debug'\n"
    settings.write_text(f"resync = 1\n{ours}[metrics]\naddress = '127.0.0.1:1'\n")
    told = reloaded(daemon)
    assert told["file"] == str(settings)
    assert told["changed"] == ["policy.settle", "log.level"], "a flag beats the file"
    assert told["needs_restart"] == []
    lines = lines_of(daemon, "session.cleaned")
    assert lines[-1]["sid"] == "old"
    assert "session.seen" in {line["event"] for line in lines}, "of level debug"


def test_what_cannot_change_at_run_time_is_told_until_a_restart(
    settings: Path, daemon: subprocess.Popen[bytes]
) -> None:
    settings.write_text(
        "programs = ['theirs.cjs']\n[policy]\nsettle = 3600\n[log]\nform = 'console'\n"
    )
    told = reloaded(daemon)
    assert (told["changed"], told["needs_restart"]) == (["programs"], ["log.form"])
    told = reloaded(daemon)
    assert (told["changed"], told["needs_restart"]) == ([], ["log.form"])


def test_bad_settings_are_refused_whole_and_the_old_ones_stay(
    cli: Cli, settings: Path, daemon: subprocess.Popen[bytes]
) -> None:
    bare_socket(cli.folder / "old.rpc.sock")
    settings.write_text("[policy]\nsettle = 0.05\norphan_grace = -1\n")
    told = refused(daemon)
    assert told["reason"].startswith(f"{settings}: policy.orphan_grace is -1, allowed: seconds")
    assert told["level"] == "error"
    settings.unlink()
    assert refused(daemon)["reason"] == f"settings file '{settings}' is not there"
    os.mkfifo(settings)
    assert "no regular file" in refused(daemon)["reason"]
    assert (cli.folder / "old.rpc.sock").exists(), "it settles for an hour, still"
    settings.unlink()
    settings.write_text("[policy]\nsettle = 0.05\n")
    assert reloaded(daemon)["changed"] == ["policy.settle"]


EARLY = """
import os, signal
from reconciler.__main__ import main
from reconciler.commands import run
opening = run._log
def asked(*given):
    os.kill(os.getpid(), signal.SIGHUP)
    return opening(*given)
run._log = asked
main()
"""
"""The program, asked to reload before its event loop is there."""


def test_a_daemon_that_is_told_to_reload_as_it_starts_does_so(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_cli, "PROGRAM", (sys.executable, "-c", EARLY))
    with cli.started("run", stdout=subprocess.PIPE) as process:
        events = [line["event"] for line in lines_of(process, "settings.reloaded")]
        assert events == ["reconciler.started", "settings.reloaded"]


AT_ITS_END = """
import contextlib, signal
from reconciler.__main__ import main
with contextlib.suppress(SystemExit):
    main()
signal.raise_signal(signal.SIGHUP)
"""


def test_any_other_command_ends_by_sighup(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_cli, "PROGRAM", (sys.executable, "-c", AT_ITS_END))
    with cli.started("config", "path", stdout=subprocess.PIPE) as process:
        assert process.wait(WAIT) == -signal.SIGHUP


def test_a_daemon_whose_terminal_is_gone_ends_at_sighup(cli: Cli, settings: Path) -> None:
    ours, theirs = pty.openpty()
    with cli.started("run", "--config", settings, stdin=theirs, stdout=subprocess.PIPE) as process:
        os.close(theirs)
        lines_of(process, "reconciler.started")
        assert reloaded(process)["changed"] == []
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert lines_of(process, "reconciler.stopped")
        assert process.wait(WAIT) == 0


# -- Reading beside the loop -------------------------------------------------------------------


class Scene:
    """Reloads with a file, whose reading may be held up, and what they have taken."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float) -> None:
        self.path = tmp_path / "config.toml"
        self.path.write_text("resync = 1")
        self.taken: list[Settings] = []
        self.log = CapturingLogger()
        self.turns: list[str] = []
        self.free = threading.Event()
        self.free.set()
        self.reads = 0
        again = Sources.again

        def held_up(sources: Sources) -> Sources:
            text = again(sources)
            self.reads += 1
            assert self.free.wait(WAIT)
            return text

        monkeypatch.setattr(Sources, "again", held_up)
        self.reloads = Reloads(
            Sources.read(self.path, {}),
            self.take,
            self.log,
            begun=lambda: self.turns.append("begun"),
            over=lambda: self.turns.append("over"),
            patience=patience,
        )

    def take(self, settings: Settings) -> None:
        self.taken.append(settings)

    @property
    def told(self) -> list[tuple[str, Any]]:
        calls = self.log.calls
        return [(c.args[0], c.kwargs.get("reason", c.kwargs.get("changed"))) for c in calls]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scene]:
    return lambda patience=WAIT: Scene(tmp_path, monkeypatch, patience)


@asynchronous
async def test_a_disk_that_hangs_holds_up_nothing(scene: Callable[..., Scene]) -> None:
    at = scene(patience=0.01)
    at.path.write_text("resync = 2")
    at.free.clear()
    at.reloads.ask()
    await happens(lambda: at.told)
    assert at.told == [("settings.refused", "the file could not be read within 0.01 s")]
    assert at.turns == ["begun", "over"]
    at.reloads.ask()
    assert at.told[1:] == [
        ("settings.refused", "the file is still being read since it was asked for before")
    ]
    at.reloads._patience = WAIT
    at.free.set()
    await happens(lambda: at.taken)
    assert at.taken == [Settings(resync=2.0)], "once, when the disk is back: it was asked again"
    assert at.turns == ["begun", "over"] * 2
    assert at.reads == 2


@asynchronous
async def test_what_is_asked_for_while_it_reads_is_read_after_that(
    scene: Callable[..., Scene],
) -> None:
    at = scene()
    at.path.write_text("resync = 2")
    at.free.clear()
    at.reloads.ask()
    await happens(lambda: at.reads)
    at.path.write_text("resync = 3")
    at.reloads.ask()
    at.reloads.ask()
    at.free.set()
    await happens(lambda: len(at.taken) == 2)
    assert [each.resync for each in at.taken] == [2.0, 3.0]
    assert at.turns == ["begun", "over"] * 2


@asynchronous
async def test_what_cannot_be_put_in_force_is_refused_and_stays_news(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = scene()
    at.path.write_text("resync = 2")
    with monkeypatch.context() as broken:
        broken.setattr(at.reloads, "_take", lambda _: 1 / 0)
        at.reloads.ask()
        await happens(lambda: at.told)
    at.reloads.ask()
    await happens(lambda: at.taken)
    assert at.told == [
        ("settings.refused", "ZeroDivisionError: division by zero"),
        ("settings.reloaded", ["resync"]),
    ]
    at.reloads.ask()
    await happens(lambda: len(at.told) == 3)
    assert at.told[2] == ("settings.reloaded", []), "nothing has changed"


@asynchronous
async def test_a_reason_is_bounded(scene: Callable[..., Scene]) -> None:
    at = scene()
    at.path.write_text("\n".join(f"key{number} = 1" for number in range(1000)))
    at.reloads.ask()
    await happens(lambda: at.told)
    assert len(at.told[0][1]) == 2000


@asynchronous
async def test_a_defect_refuses_and_harms_nothing(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = scene()
    with monkeypatch.context() as broken:
        broken.setattr(Sources, "again", lambda _: 1 / 0)
        at.reloads.ask()
        await happens(lambda: at.told)
    assert at.told == [("settings.refused", "ZeroDivisionError: division by zero")]
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", no_thread)
        at.reloads.ask()
    assert at.told[1] == ("settings.refused", "no thread to read them: can't start new thread")
    at.reloads.ask()
    await happens(lambda: at.taken)


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


# -- The loop ----------------------------------------------------------------------------------


@asynchronous
async def test_a_reconciler_goes_by_another_manager_of_its_folder_alone(folder: Path) -> None:
    patient, hasty = Policy(settle=3600), Policy(settle=0.01)
    bare_socket(folder / "old.rpc.sock")
    async with Reconciler(KeeperManager(folder, policy=patient)) as reconciler:
        await soon(reconciler.wait_for("old", lambda row: row.phase is Verdict.STARTING))
        with pytest.raises(ValueError, match="the folder stays"):
            reconciler.go_by(KeeperManager(folder.parent, policy=hasty), resync=1)
        assert reconciler.manager.policy == patient
        other = KeeperManager(folder, policy=hasty, programs=frozenset({"theirs.cjs"}))
        reconciler.go_by(other, resync=3600, log_budget=LogBudget(total=1 << 20))
        assert reconciler._holder.served is not None
        assert "theirs.cjs" in reconciler._holder.served.probe.identity._programs
        assert reconciler._holder.served.effects._probe is reconciler._holder.served.probe
        assert reconciler._sweeper.budget.total == 1 << 20
        await soon(reconciler.wait_for("old", lambda row: row.phase is Verdict.ABSENT))
