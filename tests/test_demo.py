"""`pi-reconciler demo`: it puts right what it breaks, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROGRAM, WAIT, program_environment, until
from stand_ins import ending
from test_cli_logs import needs_tmux, screen, terminal

from reconciler import demo
from reconciler.processes import SYSTEM


@pytest.fixture
def place() -> Iterator[Path]:
    """Where temporary files go; nothing may be left there, nor of a process that knows it."""
    path = Path(tempfile.mkdtemp(prefix="d-"))
    yield path
    assert [pid for pid in SYSTEM.pids() if SYSTEM.variable(pid, "TMPDIR") == str(path)] == []
    assert os.listdir(path) == []
    path.rmdir()


def environment(place: Path, pi: str = "") -> dict[str, str]:
    """Without the real agent, but for one that a test makes."""
    env = {**program_environment(place / "a" / "b" / "c" / "d"), "TMPDIR": str(place)}
    return {
        **env,
        "HOME": "/nonexistent",
        "XDG_CONFIG_HOME": "/nonexistent",
        "PATH": f"{pi}:/usr/bin:/bin",
    }


def run(place: Path, *options: str, pi: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*PROGRAM, "demo", *options),
        check=False,
        capture_output=True,
        text=True,
        env=environment(place, pi),
        timeout=WAIT,
    )


def test_in_a_pipe_it_tells_each_thing_and_what_was_measured(place: Path) -> None:
    shown = run(place)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "\x1b" not in shown.stdout
    page = (Path(__file__).parent.parent / "docs" / "demo.md").read_text()
    (example,) = re.findall(r"^\$ pi-reconciler demo\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert plain(shown.stdout.replace(str(place), "/tmp")) == plain(example)


def plain(text: str) -> str:
    """Without what differs each time."""
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"/tmp/pi-\w+", "HOME", text))


def test_as_json_it_is_a_check(place: Path) -> None:
    shown = run(place, "--json")
    told = json.loads(shown.stdout)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert told["success"] is True
    assert told["agent"] == "stand-in"
    assert told["left"] == []
    assert [each["sid"] for each in told["scenes"]] == ["killed", "frozen", "dropped", "unharmed"]
    assert all(each["put_right"] and each["ms"] >= 0 for each in told["scenes"])


def test_a_pi_that_does_not_start_is_replaced_by_the_stand_in(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "pi"
    other.write_text("#!/bin/sh\nexit 4\n")
    other.chmod(0o755)
    shown = run(place, pi=str(tmp_path))
    assert shown.returncode == 0
    assert "That pi does not start: " in shown.stdout
    assert "with a stand-in as agent" in shown.stdout


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("In a folder", signal.SIGINT),
        ("Three sessions", signal.SIGTERM),
        ("frozen    broken", signal.SIGINT),
        ("dropped   broken", signal.SIGHUP),
    ],
)
def test_whenever_it_is_ended_nothing_is_left(
    place: Path, moment: str, number: signal.Signals
) -> None:
    with ending(
        subprocess.Popen(
            (*PROGRAM, "demo"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(place), "PYTHONUNBUFFERED": "1"},
        )
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if moment in line:
                break
        else:
            pytest.fail(f"{moment!r} did not come")
        process.send_signal(number)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)  # a second one does not keep it from cleaning up
        told = process.stdout.read()
        assert process.wait(WAIT) == 128 + number
        assert "Cleaned away: no process and no file is left." in told
        assert process.stderr.read() == ""
        process.stdout.close()
        process.stderr.close()


def test_when_nobody_reads_any_more_nothing_is_left(place: Path) -> None:
    command = f"{' '.join(PROGRAM)} demo | head -n 5"
    shown = subprocess.run(
        ("sh", "-c", command),
        check=True,
        capture_output=True,
        env={**environment(place), "PYTHONUNBUFFERED": "1"},
        timeout=WAIT,
    )
    assert len(shown.stdout.splitlines()) == 5
    assert shown.stderr == b""
    until(lambda: os.listdir(place) == [], "it has cleaned up")


def test_what_is_not_put_right_is_no_success(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(demo, "_files", lambda *_: ["still there"])
    monkeypatch.setattr(demo, "_LONGEST", 1.0)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    outcome = asyncio.run(demo.Demo(demo.Audience()).play())
    assert not outcome.success
    assert [each.put_right for each in outcome.scenes] == [False, False, False, True]
    assert outcome.left == ()


def test_what_cannot_be_removed_is_told_and_is_no_success(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    outcome = asyncio.run(demo.Demo(demo.Audience()).play())
    (home,) = place.iterdir()
    rmtree(home)
    assert outcome.left == (f"folder {home}",)
    assert not outcome.success


@needs_tmux
def test_on_a_terminal_it_can_be_followed(place: Path, folder: Path) -> None:
    command = f"TMPDIR={place} {' '.join(PROGRAM)} demo; echo ended $?; exec sleep 600"
    with terminal(folder, command) as tmux:
        until(lambda: "ended" in screen(tmux), "it is over")
        shown = screen(tmux)
        assert "ended 0" in shown
        assert shown.count("put right in") == 3
        assert "\x1b[32mput right" in screen(tmux, "-e")
