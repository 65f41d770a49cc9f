"""What a service manager is told: its socket is a real one, held by the test."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROGRAM, WAIT, program_environment, stale_pair, until

from reconciler.notify import Notifier


class Listening:
    """A manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(WAIT)
        self.messages: list[str] = []

    def read(self) -> list[str]:
        """All messages so far."""
        self.socket.setblocking(False)
        try:
            while True:
                self.messages.append(self.socket.recv(4096).decode())
        except BlockingIOError:
            return self.messages


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Listening]:
    listening = Listening(str(tmp_path / "notify"))
    yield listening
    listening.socket.close()


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(tmp_path / "notify")}


def test_each_state_is_one_message(manager: Listening, environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    before = time.monotonic_ns() // 1000
    notifier.ready()
    notifier.status("2 ready\nREADY=0 \x1b[31m\udc80é")
    notifier.alive()
    notifier.reloading()
    notifier.stopping()
    told = manager.read()
    assert told[:3] == ["READY=1", "STATUS=2 ready?READY=0 ?[31m?é", "WATCHDOG=1"]
    reloading, clock = told[3].split("\n")
    assert reloading == "RELOADING=1"
    assert before <= int(clock.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert told[4:] == ["STOPPING=1"]
    assert "NOTIFY_SOCKET" not in environ, "no child is to speak in our name"
    notifier.close()
    notifier.close()
    notifier.ready()
    assert len(manager.read()) == 5
    assert not notifier


def test_what_is_for_us_alone_is_taken_out_whether_there_is_a_manager_or_not() -> None:
    for address in ("", "/x", "@x"):
        ours = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "5000000", "WATCHDOG_PID": ""}
        environ = {**ours, "OTHER": "1"}
        notifier = Notifier(environ)
        assert environ == {"OTHER": "1"}
        assert notifier.watchdog == (5.0 if address else None)
        assert bool(notifier) == bool(address)
        notifier.close()


def test_a_manager_may_name_no_process_and_want_no_sign_of_life(environ: dict[str, str]) -> None:
    for more, watchdog in (({"WATCHDOG_USEC": "5000000"}, 5.0), ({}, None)):
        notifier = Notifier({**environ, **more})
        assert notifier.watchdog == watchdog
        notifier.close()


def test_without_a_descriptor_nobody_is_told(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    def none_left(*_: int) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as broken:
        broken.setattr(socket, "socket", none_left)
        notifier = Notifier(environ)
    assert not notifier
    notifier.ready()


def test_an_abstract_socket_is_a_socket_too() -> None:
    name = f"pi-reconciler-test-{os.getpid()}"
    listening = Listening("\0" + name)
    with listening.socket:
        notifier = Notifier({"NOTIFY_SOCKET": "@" + name})
        notifier.ready()
        assert listening.read() == ["READY=1"]
        notifier.close()


@pytest.mark.parametrize("address", ["", "@", "/", "relative/path", "vsock:2:1234", "/no/such"])
def test_who_is_not_there_is_told_nothing_and_nothing_fails(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address} if address else {})
    assert bool(notifier) == (address == "/no/such")
    notifier.ready()
    notifier.close()


def test_a_manager_that_does_not_read_holds_nobody_up(
    manager: Listening, environ: dict[str, str]
) -> None:
    notifier = Notifier(environ)
    began = time.monotonic()
    for _ in range(2000):
        notifier.status("x" * 1000)
    assert time.monotonic() - began < WAIT / 2
    assert 0 < len(manager.read()) < 2000
    assert max(map(len, manager.messages)) < 220
    notifier.close()


@pytest.mark.parametrize(
    ("microseconds", "pid", "seconds"),
    [
        ("30000000", "", 30.0),
        ("500000", "ours", 0.5),
        ("500000", "1", None),
        ("0", "", None),
        ("-5", "", None),
        ("٣", "", None),
        ("many", "", None),
        ("", "", None),
    ],
)
def test_a_watchdog_is_ours_if_it_says_so(
    microseconds: str,
    pid: str,
    seconds: float | None,
    manager: Listening,
    environ: dict[str, str],
) -> None:
    assert manager.read() == []
    notifier = Notifier(
        environ
        | {"WATCHDOG_USEC": microseconds, "WATCHDOG_PID": pid.replace("ours", str(os.getpid()))}
    )
    assert notifier.watchdog == seconds
    notifier.close()


# -- The program -----------------------------------------------------------------------


@pytest.fixture
def daemon(folder: Path, manager: Listening, environ: dict[str, str]) -> Iterator[Running]:
    running = Running(folder, manager, environ | {"WATCHDOG_USEC": "400000"})
    yield running
    running.process.kill()
    running.process.wait()


class Running:
    """The background process, as a service manager starts it."""

    def __init__(self, folder: Path, manager: Listening, environ: dict[str, str]) -> None:
        self.folder = folder
        self.manager = manager
        self.process = subprocess.Popen(
            [*PROGRAM, "run", "--log-form", "json", "--sessions-dir", str(folder)],
            env=program_environment(folder) | environ,
            stdout=subprocess.DEVNULL,
        )

    def count(self, message: str) -> int:
        return self.manager.read().count(message)

    def told(self, message: str) -> None:
        until(lambda: self.count(message), message)


def test_the_program_tells_when_it_is_ready_that_it_is_alive_and_that_it_ends(
    daemon: Running,
) -> None:
    daemon.told("READY=1")
    assert daemon.count("STOPPING=1") == 0
    daemon.told("STATUS=no sessions")
    stale_pair(daemon.folder, "old")
    daemon.told("STATUS=no sessions; last: old stale (keeper dead)")
    alive = daemon.count("WATCHDOG=1")
    until(lambda: daemon.count("WATCHDOG=1") >= alive + 3, "it lives on")
    daemon.process.terminate()
    assert daemon.process.wait(WAIT) == 0
    assert daemon.manager.read()[-1] == "STOPPING=1"
    assert daemon.count("READY=1") == 1


def test_many_changes_are_told_at_most_once_a_second(daemon: Running) -> None:
    daemon.told("READY=1")
    began = time.monotonic()
    for number in range(30):
        stale_pair(daemon.folder, f"old{number}")
        daemon.manager.read()
    until(lambda: not [*daemon.folder.glob("*.rpc.sock")], "all is cleaned")
    until(lambda: any("last: " in each for each in daemon.manager.read()), "it is told")
    told = [each for each in daemon.manager.read() if each.startswith("STATUS=")]
    assert len(told) <= 2 + (time.monotonic() - began)
    assert len(set(told)) == len(told)


def test_new_settings_are_announced_and_ended_even_if_they_are_bad(
    folder: Path, manager: Listening, environ: dict[str, str]
) -> None:
    settings = folder.parents[2] / "pi-reconciler" / "config.toml"
    settings.parent.mkdir()
    settings.write_text("resync = 30\n")
    daemon = Running(folder, manager, environ)
    try:
        daemon.told("READY=1")
        settings.write_text("resync = -1\n")
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: daemon.count("READY=1") == 2, "ready again")
        told = [each.partition("\n")[0] for each in manager.read() if "STATUS" not in each]
        assert told == ["READY=1", "RELOADING=1", "READY=1"]
        assert daemon.count("WATCHDOG=1") == 0, "nobody has asked for it"
    finally:
        daemon.process.terminate()
        assert daemon.process.wait(WAIT) == 0


def test_a_loop_that_is_stuck_is_silent_and_its_end_says_where_it_was_stuck(
    folder: Path, manager: Listening, environ: dict[str, str]
) -> None:
    held = (
        "import asyncio, signal, sys, time\n"
        "from reconciler.cli import main\n"
        "stands = sys.argv.pop()\n"
        "before = asyncio.run\n"
        "async def beside(work):\n"
        "    def stand_still():\n"
        "        open(stands, 'x').close()\n"
        "        time.sleep(600)\n"
        "    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, stand_still)\n"
        "    await work\n"
        "asyncio.run = lambda work: before(beside(work))\n"
        "main()\n"
    )
    stands = folder.parent / "stands still"
    command = [sys.executable, "-c", held, "run", "--sessions-dir", str(folder), str(stands)]
    stuck = subprocess.Popen(
        command,
        env=program_environment(folder) | environ | {"WATCHDOG_USEC": "200000"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: manager.read().count("WATCHDOG=1") > 2, "it lives")
        stuck.send_signal(signal.SIGUSR1)
        until(stands.exists, "its loop stands still")
        silent = manager.read().count("WATCHDOG=1")
        time.sleep(0.5)
        assert manager.read().count("WATCHDOG=1") == silent
        stuck.send_signal(signal.SIGABRT)  # as systemd does
        _, said = stuck.communicate(timeout=WAIT)
        assert stuck.returncode == -signal.SIGABRT
        assert "in stand_still" in said
    finally:
        stuck.kill()
        stuck.communicate()
