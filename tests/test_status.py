"""`status`, `events` and `ls --watch`, as processes of their own: in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import WAIT, Daemon, stale_pair, until
from terminal import Terminal, a_terminal
from test_cli import Cli, recorder
from test_cli import cli as cli  # noqa: PLC0414 - a fixture

from reconciler.commands.events import readable
from reconciler.layout import CONTROL_SOCKET


@pytest.fixture
def terminal(tmp_path: Path, cli: Cli) -> Iterator[Terminal]:
    """A terminal whose shell knows `pi-reconciler`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "pi-reconciler"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m reconciler "$@"\n')
    program.chmod(0o755)
    paths = f"{programs}{os.pathsep}{cli.env['PATH']}"
    with a_terminal(tmp_path, {**cli.env, "PATH": paths}) as made:
        yield made


def next_line(process: subprocess.Popen[bytes]) -> Any:  # noqa: ANN401 - JSON
    """The next line of a process as JSON; it must come."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], WAIT)[0], "waited in vain for a line"
    return json.loads(process.stdout.readline())


def next_of(process: subprocess.Popen[bytes], event: str) -> Any:  # noqa: ANN401 - JSON
    """The next line of an event; it must come."""
    while (line := next_line(process))["event"] != event:
        pass
    return line


def said(process: subprocess.Popen[bytes], words: str) -> str:
    """What a process says on standard error, up to a line with some words; it must come."""
    assert process.stderr is not None
    told = ""
    while words not in told:
        assert select.select([process.stderr], [], [], WAIT)[0], f"in vain for {words!r}: {told}"
        line = process.stderr.readline().decode()
        assert line, f"it ended before {words!r}: {told}"
        told += line
    return told


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


# -- status ----------------------------------------------------------------------------------


def test_status_tells_whether_it_runs_and_ends_as_systemctl_does(cli: Cli, daemon: Daemon) -> None:
    ended = cli("status")
    head, *rows = ended.out.splitlines()
    assert (ended.code, ended.err, head) == (0, "", f"running on {cli.folder}")
    shown = dict(re.split(r"  +", row, maxsplit=1) for row in rows)
    assert list(shown) == ["pid", "since", "sessions", "last did", "version"]
    assert shown["pid"] == str(daemon.process.pid)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(\d+s\)", shown["since"])
    assert (shown["sessions"], shown["last did"]) == ("none", "nothing yet")
    cli.spawn("demo")
    stale_pair(cli.folder, "gone")
    until(lambda: daemon.of("session.cleaned", "gone"))
    until(lambda: cli("status", "--json").json["sessions"] == {"ready": 1})
    out = cli("status").out
    assert re.search(r"^sessions +1 \(1 ready\)$", out, re.MULTILINE)
    assert re.search(
        r"^last did +session.cleaned gone: keeper dead, [-0-9]+ [:0-9]+$", out, re.MULTILINE
    )
    assert daemon.end() == 0
    ended = cli("status")
    assert (ended.code, ended.err) == (3, "")
    assert ended.out == f"not running: no daemon works on {cli.folder}\n"


def test_status_as_json_says_all_in_each_state(cli: Cli, daemon: Daemon) -> None:
    ended = cli("status", "--json")
    assert ended.code == 0
    assert (ended.json["state"], ended.json["reason"]) == ("running", None)
    assert ended.json["pid"] == daemon.process.pid
    assert ended.json.keys() > {"version", "started_at", "uptime_s", "counts", "last_action"}
    assert not ended.json.keys() & {"event", "level", "streams"}
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        ended = cli("status", "--json")
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert (ended.code, ended.json["state"]) == (4, "not_known")
    assert ended.json["pid"] == daemon.process.pid
    assert "does not answer" in ended.json["reason"]
    daemon.end()
    ended = cli("status", "--json")
    assert (ended.code, ended.json["state"], ended.json["pid"]) == (3, "not_running", None)


def test_a_daemon_that_only_looks_on_for_a_while_says_so(cli: Cli, daemon: Daemon) -> None:
    cli.folder.chmod(0o777)
    assert cli("status").out.startswith(
        f"running on {cli.folder}, and only looks on: everybody may write to the folder"
    )
    assert daemon.process.poll() is None


# -- events ----------------------------------------------------------------------------------


def test_events_in_a_pipe_are_the_logs_lines_at_once(cli: Cli, daemon: Daemon) -> None:
    with cli.started("events", **PIPES) as process:
        told = said(process, "works on")
        assert told == f"pi-reconciler: process {daemon.process.pid} works on {cli.folder}\n"
        stale_pair(cli.folder, "demo")
        assert next_line(process)["event"] == "session.seen", "which the log does not take"
        heard = next_of(process, "session.cleaned")
        until(lambda: daemon.of("session.cleaned"))
        (logged,) = daemon.of("session.cleaned")
        assert heard.keys() == logged.keys()
        assert heard | {"timestamp": ""} == logged | {"timestamp": ""}
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 130


def test_events_of_some_sessions_leave_out_the_others(cli: Cli, daemon: Daemon) -> None:
    assert daemon.process.poll() is None
    with cli.started("events", "two", "--json", **PIPES) as process:
        said(process, "works on")
        for sid in ("one", "two"):
            stale_pair(cli.folder, sid)
        assert next_line(process)["sid"] == "two"
    assert "session id" in cli.fails(2, "events", "../x")


def test_events_wait_for_a_daemon_and_for_the_next_one(cli: Cli, tmp_path: Path) -> None:
    with cli.started("events", **PIPES) as process:
        assert said(process, "waiting") == (
            f"pi-reconciler: no daemon works on {cli.folder}; "
            "waiting for a background process (pi-reconciler run)\n"
        )
        for _ in range(2):
            daemon = Daemon(cli.folder, tmp_path / "log")
            try:
                said(process, f"process {daemon.process.pid} works on")
                stale_pair(cli.folder, "demo")
                assert next_of(process, "session.cleaned")["sid"] == "demo"
            finally:
                daemon.process.kill()
                daemon.process.wait()
            said(process, f"process {daemon.process.pid} has ended; waiting")
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 130


def test_events_that_do_not_wait_end_as_status_would(cli: Cli, daemon: Daemon) -> None:
    with cli.started("events", "--no-wait", **PIPES) as process:
        said(process, "works on")
        daemon.end()
        assert process.wait(WAIT) == 3
    assert "no daemon works on" in cli.fails(3, "events", "--no-wait")
    ended = cli("events", "--no-wait", "--quiet")
    assert (ended.code, ended.out, ended.err) == (3, "", "")


@pytest.mark.parametrize("command", [("events",), ("ls", "--watch")])
def test_who_reads_no_more_ends_them_even_if_nothing_happens(
    cli: Cli, daemon: Daemon, command: tuple[str, ...]
) -> None:
    assert daemon.process.poll() is None
    cli.spawn("demo")
    with cli.started(*command, **PIPES) as process:
        if command == ("events",):
            said(process, "works on")
        else:
            assert next_line(process)["sid"] == "demo"
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(WAIT) == -signal.SIGPIPE
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_one_listener_too_many_is_told_what_to_do(cli: Cli, daemon: Daemon) -> None:
    import socket  # noqa: PLC0415 - here alone

    assert daemon.process.poll() is None
    listening = []
    for _ in range(16):
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(cli.folder / CONTROL_SOCKET))
        client.recv(1)
        listening.append(client)
    assert "takes no more listeners" in cli("events").err
    assert cli("status").code == 0
    for client in listening:
        client.close()


def test_an_event_in_one_line_moves_no_cursor() -> None:
    event = {
        "timestamp": "2026-03-01T09:10:00.000000Z",
        "level": "warning",
        "event": "session.unverifiable",
        "sid": "demo",
        "reason": "process 7 is \x1b[2J\x07vi\u202e",
        "detail": "left",
    }
    line = readable(event)
    assert line.isprintable()
    assert line.endswith(
        r"session.unverifiable  demo          process 7 is \x1b[2J\x07vi\u202e: left"
    )
    seen = event | {"event": "session.seen", "verdict": "ready", "reason": "keeper proven"}
    assert readable(seen).endswith("session.seen          demo          ready: keeper proven")
    started = {"timestamp": event["timestamp"], "event": "reconciler.started", "dry_run": False}
    assert readable(started).endswith("reconciler.started    -             dry_run=False")


# -- ls --watch ------------------------------------------------------------------------------


def test_a_watched_list_in_a_pipe_is_a_line_for_each_change(cli: Cli) -> None:
    keeper = cli.spawn("demo")
    with cli.started("ls", "--watch", **PIPES) as process:
        row = next_line(process)
        assert (row["sid"], row["phase"], row["keeper_pid"]) == ("demo", "ready", keeper)
        assert row.keys() == cli("ls", "--json").json[0].keys()
        os.kill(keeper, signal.SIGKILL)
        while row["phase"] != "stale":
            row = next_line(process)
        cli("stop", "demo")
        row = next_line(process)
        assert (row["phase"], row["keeper_pid"], row["age_s"]) == ("absent", None, None)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b"pi-reconciler: interrupted\n"


def test_a_watched_list_takes_no_lock_and_says_goodbye_to_rows_of_a_folder_that_went(
    cli: Cli, daemon: Daemon
) -> None:
    with cli.started("ls", "--watch", "--json", **PIPES) as process:
        cli.spawn("demo")
        row = next_line(process)
        while row["phase"] != "ready":
            row = next_line(process)
        assert cli("status").code == 0, "the daemon holds its lock"
        cli.folder.rename(cli.folder.with_name("moved"))
        assert next_line(process)["phase"] == "absent"
        cli.folder.with_name("moved").rename(cli.folder)
    assert daemon.process.poll() is None


def test_on_a_terminal_that_cannot_draw_a_watched_list_is_lines(
    cli: Cli, terminal: Terminal
) -> None:
    cli.spawn("demo")
    terminal.type("TERM=dumb pi-reconciler ls --watch")
    terminal.shows('{"sid": "demo", "phase": "ready"')
    terminal.press("C-c")
    terminal.shows("interrupted")


def test_a_watched_list_draws_over_what_it_drew(cli: Cli) -> None:
    """Nothing is cleared between two pictures: that would flicker."""
    keeper = cli.spawn("demo")
    ours, theirs = pty.openpty()
    cli.env["TERM"] = "xterm"
    with cli.started("ls", "--watch", stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        drawn = b""

        def read_until(words: bytes) -> None:
            nonlocal drawn
            deadline = time.monotonic() + WAIT
            while words not in drawn:
                assert select.select([ours], [], [], deadline - time.monotonic())[0], drawn
                drawn += os.read(ours, 65536)

        read_until(b"ready")
        os.kill(keeper, signal.SIGKILL)
        read_until(b"stale")
        process.send_signal(signal.SIGTERM)
        read_until(b"\x1b[?1049l")
        assert process.wait(WAIT) == -signal.SIGTERM
    os.close(ours)
    assert drawn.count(b"\x1b[2J") == 0
    assert drawn.count(b"\x1b[?1049h") == 1
    assert drawn.count(b"\x1b[H") >= 2
    assert drawn.count(b"\x1b[?25h") == 1, "the cursor comes back"


# -- On a terminal -----------------------------------------------------------------------------


def test_status_and_events_on_a_terminal(cli: Cli, daemon: Daemon, terminal: Terminal) -> None:
    terminal.type("pi-reconciler status")
    assert f"running on {cli.folder}" in terminal.shows("version")
    terminal.clear()
    terminal.type("pi-reconciler events")
    terminal.shows(f"process {daemon.process.pid} works on")
    stale_pair(cli.folder, "demo")
    screen = terminal.shows("session.cleaned")
    assert re.search(
        r"^\d\d:\d\d:\d\d  session.cleaned       demo          keeper dead: socket removed, ",
        screen,
        re.MULTILINE,
    )
    terminal.press("C-c")
    terminal.shows("interrupted")
    terminal.type("echo code $?")
    terminal.shows("code 130")


def test_the_screens_of_the_page_are_what_comes_out(
    cli: Cli, daemon: Daemon, terminal: Terminal
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "watching.md").read_text()
    status, watched, events = re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    terminal.resize(120, 24)
    stale_pair(cli.folder, "old")
    until(lambda: daemon.of("session.cleaned", "old"))
    keepers = [cli.spawn(sid) for sid in ("demo", "other")]
    until(lambda: cli("status", "--json").json["sessions"] == {"ready": 2})

    def comes_out(page: str, last: str) -> None:
        command = page.splitlines()[0]
        terminal.clear()
        terminal.type(command[2:])
        if last == "works on":
            terminal.shows(last)
            os.kill(keepers[0], signal.SIGKILL)
            last = "nothing is there"
        terminal.shows(last)
        wanted = [shape(line, cli.folder) for line in page.splitlines()[1:]]
        until(lambda: shapes(terminal.screen, cli.folder)[-1:] == wanted[-1:], "its last line")
        assert shapes(terminal.screen, cli.folder) == wanted

    comes_out(status, "version")
    comes_out(watched, "other")
    terminal.press("C-c")
    terminal.shows("interrupted")
    comes_out(events, "works on")


def shapes(screen: str, folder: Path) -> list[str]:
    """The shapes of what came out: empty lines and those with the shell's prompt did not."""
    lines = (line for line in screen.splitlines() if line.strip() and not line.startswith("$"))
    return [shape(line, folder) for line in lines]


def shape(line: str, folder: Path) -> str:
    """A line without what differs each time: where the folder is, numbers, and room for them."""
    line = line.replace(str(folder), "/home/you/.pi/dashboard/sessions")
    return re.sub(r" +", " ", re.sub(r"\b(\d+[dhms]?)+\b", "N", line)).rstrip()


def test_a_watched_list_on_a_terminal_follows_fits_and_leaves_no_trace(
    cli: Cli, daemon: Daemon, terminal: Terminal
) -> None:
    assert daemon.process.poll() is None
    keeper = cli.spawn("demo")
    terminal.type("echo before; pi-reconciler ls --watch")
    screen = terminal.shows("ready")
    head, columns, row = screen.splitlines()
    assert head == f"1 session in {cli.folder}"
    assert columns.split() == ["SID", "PHASE", "KEEPER", "AGENT", "AGE", "REASON"]
    assert row.split()[:3] == ["demo", "ready", str(keeper)]
    for number in range(8):
        stale_pair(cli.folder, f"will-go-{number}")
    cli.spawn("other")
    terminal.shows("other")
    terminal.resize(40, 4)
    screen = terminal.shows("… and 1 more")
    assert len(screen.splitlines()) == 4
    assert screen.splitlines()[2].split()[1:3] == ["ready", str(keeper)], "what matters is whole"
    terminal.resize(120, 30)
    until(lambda: len(terminal.screen.splitlines()) == 4)
    os.kill(keeper, signal.SIGKILL)
    until(lambda: "demo" not in terminal.screen)
    assert not terminal.is_as_before()
    terminal.press("C-c")
    screen = terminal.shows("interrupted")
    assert "before" in screen
    assert "SID" not in screen
    assert terminal.is_as_before()
    terminal.type("echo code $?")
    terminal.shows("code 130")


def test_a_watched_list_shows_restarts_where_a_session_has_a_policy(
    cli: Cli, terminal: Terminal
) -> None:
    def heading() -> list[str]:
        return next((line.split() for line in terminal.screen.splitlines() if "SID" in line), [])

    cli.spawn("demo")
    terminal.type("pi-reconciler ls --watch")
    terminal.shows("demo")
    assert heading() == ["SID", "PHASE", "KEEPER", "AGENT", "AGE", "REASON"]
    assert cli("spawn", "kept", "--restart", "always", "--", "cat").code == 0
    until(lambda: heading() == ["SID", "PHASE", "KEEPER", "AGENT", "AGE", "RESTART", "REASON"])
    row = r"^kept +ready +\d+ +\d+ +\d+s +always +keeper proven$"
    until(lambda: re.search(row, terminal.screen, re.MULTILINE))
    cli("stop", "kept")
    until(lambda: heading()[-2:] == ["AGE", "REASON"])


def test_lines_that_are_typed_are_not_written_over(
    cli: Cli, terminal: Terminal, tmp_path: Path
) -> None:
    got = tmp_path / "got"
    cli.spawn("demo", *recorder(got))
    terminal.type("pi-reconciler write demo -")
    terminal.type("hello")
    until(lambda: got.read_text() == "hello\n")
    assert "lines written" not in terminal.screen


def test_a_watched_list_that_ctrl_z_stops_gives_the_terminal_back_and_goes_on(
    cli: Cli, terminal: Terminal
) -> None:
    cli.spawn("demo")
    terminal.type("echo before; pi-reconciler ls --watch")
    terminal.shows("ready")
    terminal.press("C-z")
    screen = terminal.shows("Stopped")
    assert "before" in screen
    assert terminal.is_as_before()
    terminal.type("fg")
    terminal.shows("demo  ready")
    terminal.press("C-c")
    terminal.shows("interrupted")
    assert terminal.is_as_before()
