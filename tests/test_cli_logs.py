"""`pi-reconciler logs`, in a pipe and on a real terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import PROGRAM, WAIT, asynchronous, program_environment, until
from stand_ins import ending

from reconciler import KeeperManager
from reconciler.requests import default_environment

OURS = (
    '{{"timestamp": "{}", "level": "warning", "event": "keeper.no_room", "message": "no room",'
    ' "sid": "demo", "keeper_pid": 4711, "unsaid": 3}}\n'
)
OLD, NEW = "2026-03-01T09:00:00.100Z", "2026-03-01T10:00:00.100Z"


@pytest.fixture
def log(folder: Path) -> Path:
    path = folder / "keeper-demo.log"
    path.write_text(f"{OURS.format(OLD)}first\n{OURS.format(NEW)}\x1b[2Jsecond\n")
    return path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*PROGRAM, "logs", *arguments, "--sessions-dir", str(folder)),
        check=False,
        capture_output=True,
        text=True,
        env=program_environment(folder),
        timeout=WAIT,
    )


def test_in_a_pipe_the_lines_are_as_they_stand_in_the_log(folder: Path, log: Path) -> None:
    shown = run(folder, "demo")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, log.read_text(), "")
    assert run(folder, "demo", "-n", "1").stdout == "\x1b[2Jsecond\n"
    assert run(folder, "demo", "--lines", "all").stdout == log.read_text()
    assert run(folder, "demo", "-n", "0").stdout == ""
    newer = log.read_text().split("first\n")[1]
    assert run(folder, "demo", "--since", "2026-03-01T09:30:00Z").stdout == newer
    assert run(folder, "demo", "--since", "1s").stdout == ""


def test_as_json_each_line_is_an_object(folder: Path, log: Path) -> None:
    told = [json.loads(line) for line in run(folder, "demo", "--json").stdout.splitlines()]
    assert [each["stream"] for each in told] == ["keeper", "agent", "keeper", "agent"]
    assert {each["sid"] for each in told} == {"demo"}
    assert told[2]["timestamp"] == NEW
    assert told[3]["line"] == "\x1b[2Jsecond"
    assert log.exists()


def test_the_launch_log(folder: Path) -> None:
    (folder / "keeper-launch-demo.log").write_text("Traceback\n")
    assert run(folder, "demo", "--launch").stdout == "Traceback\n"
    told = json.loads(run(folder, "demo", "--launch", "--json").stdout)
    assert told == {"sid": "demo", "stream": "launch", "line": "Traceback"}


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["none"], 3, "no session none has a log in "),
        (["demo", "--launch"], 3, "there is no keeper-launch-demo.log"),
        (["../demo"], 2, "session id '../demo' is not usable"),
        (["demo", "-n", "x"], 2, "'x' is not a number of lines, or all"),
        (["demo", "-n", "-1"], 2, "'-1' is not a number of lines, or all"),
        (["demo", "--since", "soon"], 2, "'soon' is no moment: give a span as 90s, 5m, 2h or 3d"),
        (["link"], 1, "is a symbolic link: it is not followed"),
        (["fifo"], 1, "is no regular file: it is not read"),
    ],
)
def test_what_cannot_be_shown(
    folder: Path, log: Path, arguments: list[str], code: int, told: str
) -> None:
    (folder / "keeper-link.log").symlink_to(log)
    os.mkfifo(folder / "keeper-fifo.log")
    shown = run(folder, *arguments)
    assert (shown.returncode, shown.stdout) == (code, "")
    assert told in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


def test_a_folder_that_is_not_there_is_no_session(tmp_path: Path, folder: Path) -> None:
    assert run(folder, "demo", "--sessions-dir", str(tmp_path / "none")).returncode == 3


@asynchronous
async def test_what_a_real_keeper_and_its_agent_have_said(
    manager: KeeperManager, folder: Path
) -> None:
    agent = ("sh", "-c", "echo hello from the agent; exec cat > /dev/null")
    await manager.spawn("demo", agent_command=agent, env=default_environment(), capture=True)
    await manager.stop("demo")
    told = [json.loads(line) for line in run(folder, "demo", "--json").stdout.splitlines()]
    assert "keeper.ready" in [each.get("event") for each in told]
    assert [each["line"] for each in told if each["stream"] == "agent"] == ["hello from the agent"]


def test_the_page_shows_what_comes_out(tmp_path: Path, folder: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "reading-logs.md").read_text()
    examples = "".join(re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    (tmp_path / "pi-reconciler").write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@"\n')
    (tmp_path / "pi-reconciler").chmod(0o755)
    environment = program_environment(folder)
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    steps = re.split(r"^\$ ", examples, flags=re.MULTILINE)[1:]
    assert len(steps) == 5
    for step in steps:
        command, _, expected = step.partition("\n")
        shown = subprocess.run(
            ("sh", "-c", f"{command} 2>&1"),
            check=False,
            capture_output=True,
            text=True,
            env=environment,
            timeout=WAIT,
        ).stdout
        expected = expected.replace("/home/you/.pi/dashboard/sessions", str(folder))
        assert re.sub(r"\d+$", "N", shown.strip()) == re.sub(r"\d+$", "N", expected.strip())


# Following.


@contextlib.contextmanager
def following(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = (*PROGRAM, "logs", "demo", "-f", *arguments, "--sessions-dir", str(folder))
    with ending(
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=program_environment(folder),
        )
    ) as process:
        yield process
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def test_it_follows_a_log_that_grows_is_emptied_and_replaced_until_ctrl_c(folder: Path) -> None:
    log = folder / "keeper-demo.log"
    log.write_text("".join(f"{number}\n" for number in range(100)))
    with following(folder) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert [process.stdout.readline() for _ in range(10)] == [f"{n}\n" for n in range(90, 100)]
        with log.open("a") as writer:
            writer.write("grown\n")
        assert process.stdout.readline() == "grown\n"
        log.write_text("anew\n")
        assert process.stdout.readline() == "anew\n"
        log.unlink()
        log.write_text("another\n")
        assert process.stdout.readline() == "another\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 130
        assert process.stderr.read() == ""


def test_it_ends_quietly_once_nobody_reads(folder: Path) -> None:
    (folder / "keeper-demo.log").write_text("line\n")
    with following(folder) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        process.wait(WAIT)
        assert process.stderr.read() == ""


def test_a_reader_that_has_enough_ends_it_quietly(folder: Path) -> None:
    (folder / "keeper-demo.log").write_text("line\n" * 100_000)
    command = f"{' '.join(PROGRAM)} logs demo --sessions-dir {folder} | head -n 1"
    shown = subprocess.run(
        ("sh", "-c", command),
        check=True,
        capture_output=True,
        env=program_environment(folder),
        timeout=WAIT,
    )
    assert (shown.stdout, shown.stderr) == (b"line\n", b"")


# On a terminal.

TMUX = shutil.which("tmux")
needs_tmux = pytest.mark.skipif(
    TMUX is None and "CI" not in os.environ, reason="needs tmux: make tools"
)


@contextlib.contextmanager
def terminal(folder: Path, command: str) -> Iterator[str]:
    """A terminal of 100 columns in which a command runs; how tmux is asked about it."""
    socket = folder.parents[2] / "t"
    tmux = f"tmux -S {socket} -f /dev/null"
    environment = {**program_environment(folder), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    subprocess.run(
        (*tmux.split(), "new-session", "-d", "-x", "100", "-y", "30", "sh", "-c", command),
        check=True,
        env=environment,
    )
    try:
        yield tmux
    finally:
        subprocess.run((*tmux.split(), "kill-server"), check=False, capture_output=True)


def screen(tmux: str, *options: str) -> str:
    command = (*tmux.split(), "capture-pane", "-p", *options)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_tmux
def test_on_a_terminal_lines_have_time_and_level_and_an_agent_cannot_act_upon_it(
    folder: Path, log: Path
) -> None:
    logs = f"{' '.join(PROGRAM)} logs demo --sessions-dir {folder}"
    with terminal(folder, f"{logs}; echo done; exec sleep 600") as tmux:
        until(lambda: "done" in screen(tmux), "the command has run")
        local = (datetime.fromisoformat(OLD).astimezone(), datetime.fromisoformat(NEW).astimezone())
        assert screen(tmux).splitlines()[:5] == [
            f"{local[0]:%b %d %H:%M:%S}.100 warning no room unsaid=3",
            "first",
            f"{local[1]:%b %d %H:%M:%S}.100 warning no room unsaid=3",
            "\\x1b[2Jsecond",
            "done",
        ]
        assert "\x1b[33mwarning" in screen(tmux, "-e")
    assert log.exists()


@needs_tmux
def test_on_a_terminal_ctrl_c_ends_it_with_130_and_no_color_is_heeded(
    folder: Path, log: Path
) -> None:
    logs = f"NO_COLOR=1 {' '.join(PROGRAM)} logs demo -f --sessions-dir {folder}"
    command = f"trap : INT; {logs}; echo ended $?; exec sleep 600"
    with terminal(folder, command) as tmux:
        until(lambda: "second" in screen(tmux), "it shows what there is")
        stamp = (datetime.now(UTC) - timedelta(hours=1)).isoformat(timespec="milliseconds")
        with log.open("a") as writer:
            writer.write(OURS.format(stamp.replace("+00:00", "Z")).replace("no room", "newest"))
        until(lambda: "newest" in screen(tmux), "it shows what comes")
        assert "\x1b[33m" not in screen(tmux, "-e")
        subprocess.run((*tmux.split(), "send-keys", "C-c"), check=True)
        until(lambda: "ended 130" in screen(tmux), "it has ended")
