"""What the background process answers over HTTP, asked as Prometheus or a probe asks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PROGRAM, WAIT, Daemon, program_environment, until
from prometheus_client import CollectorRegistry

from reconciler import KeeperManager, Reconciler, oversight
from reconciler.errors import InvalidRequestError
from reconciler.exposition import AT_ONCE, Exposition, Health
from reconciler.metrics import Metrics
from reconciler.notify import Notifier
from reconciler.oversight import Oversight

WELL = Health(healthy=True, reason="", sessions=2, loop_silence_s=0.5)


def get(port: int, path: str) -> tuple[int, str]:
    """The status and the body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=WAIT) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def health(port: int) -> tuple[int, str]:
    """The status, and the reason that is told."""
    status, body = get(port, "/healthz")
    return status, json.loads(body)["reason"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture
def exposition() -> Iterator[Exposition]:
    made = Exposition("localhost", 0)
    yield made
    made.close()


def test_there_are_two_paths_and_no_others(exposition: Exposition) -> None:
    exposition.start(CollectorRegistry(), lambda: WELL)
    assert get(exposition.port, "/metrics") == (200, "")
    status, body = get(exposition.port, "/healthz")
    assert status == 200
    assert json.loads(body).keys() == {"healthy", "reason", "sessions", "loop_silence_s", "version"}
    assert get(exposition.port, "/")[0] == 404
    assert get(exposition.port, "/metrics/../../etc/passwd")[0] == 404


def test_who_says_nothing_holds_nobody_up_and_no_more_are_let_in_than_can_be_served(
    exposition: Exposition,
) -> None:
    exposition.start(CollectorRegistry(), lambda: WELL)
    address = ("127.0.0.1", exposition.port)
    silent = [socket.create_connection(address) for _ in range(AT_ONCE - 1)]
    assert health(exposition.port) == (200, "")
    silent += [socket.create_connection(address) for _ in range(4)]
    hung_up = 0
    for each in silent[-4:]:  # the first of them may have been served
        each.settimeout(1)
        try:
            hung_up += each.recv(1) == b""
        except TimeoutError:
            continue
        except ConnectionResetError:
            hung_up += 1
    assert hung_up >= 3
    for each in silent:
        each.close()
    until(lambda: _asked(exposition.port) == 200, "there is room again")


def test_a_burst_of_connections_makes_nobody_come_again(exposition: Exposition) -> None:
    address = ("127.0.0.1", exposition.port)  # nobody is let in yet: all of them wait
    with contextlib.ExitStack() as waiting:
        for _ in range(100):
            waiting.enter_context(socket.create_connection(address, timeout=0.5))


def test_who_sends_a_byte_now_and_then_makes_room_for_others(
    exposition: Exposition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reconciler.exposition.PATIENCE", 0.1)  # a client's silence keeps its 5 s
    exposition.start(CollectorRegistry(), lambda: WELL)
    address = ("127.0.0.1", exposition.port)
    slow = [socket.create_connection(address) for _ in range(AT_ONCE)]

    def another_is_answered() -> bool:
        for each in slow:
            with contextlib.suppress(OSError):  # it was hung up on
                each.send(b"G")
        return _asked(exposition.port) == 200

    until(another_is_answered, "there is room for another")
    for each in slow:
        each.close()


def _asked(port: int) -> int:
    try:
        return get(port, "/healthz")[0]
    except (OSError, urllib.error.URLError):
        return 0


def test_closing_waits_for_nobody_and_frees_the_address(
    exposition: Exposition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reconciler.exposition._Handler.timeout", 3 * WAIT)
    exposition.start(CollectorRegistry(), lambda: WELL)
    with socket.create_connection(("127.0.0.1", exposition.port)):
        began = time.monotonic()
        exposition.close()
        assert time.monotonic() - began < WAIT
    Exposition("127.0.0.1", exposition.port).close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])  # noqa: S104 - refused
def test_an_address_that_other_machines_reach_must_be_allowed(host: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"lets other machines in.*--metrics-public"):
        Exposition(host, 0)


def test_an_allowed_one_is_bound() -> None:
    Exposition("0.0.0.0", 0, public=True).close()  # noqa: S104 - it is what is tested


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70 + ".invalid", "1.2.3.4.5"])
def test_a_host_that_is_none_is_a_clear_error(host: str) -> None:
    with pytest.raises(InvalidRequestError, match="is no host that is known here"):
        Exposition(host, 0)


def test_ipv6_works_where_there_is_some() -> None:
    try:
        exposition = Exposition("::1", 0)
    except OSError:
        pytest.skip("no IPv6 here")
    exposition.close()


# -- The program -------------------------------------------------------------------------


def run_once(folder: Path, *options: str, settings: str = "") -> subprocess.CompletedProcess[str]:
    config = folder.parent / "config.toml"
    config.write_text(settings)
    command = (*PROGRAM, "run", "--once", "--sessions-dir", str(folder), "--config", str(config))
    return subprocess.run(
        [*command, *options],
        env=program_environment(folder),
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


@pytest.mark.parametrize(
    ("options", "settings", "code", "told"),
    [
        (("--metrics", "0.0.0.0:0"), "", 2, "metrics: '0.0.0.0' lets other machines in"),
        (("--metrics", "0.0.0.0:0", "--metrics-public"), "", 0, ""),
        ((), 'metrics.address = "0.0.0.0:0"', 78, "metrics: '0.0.0.0' lets other machines in"),
        ((), 'metrics.address = "localhost:99999"', 78, "'localhost:99999' is not HOST:PORT"),
        (("--metrics", "9464"), "", 2, "'9464' is not HOST:PORT"),
    ],
)
def test_where_it_answers_is_said_by_a_flag_or_the_settings(
    folder: Path, options: tuple[str, ...], settings: str, code: int, told: str
) -> None:
    done = run_once(folder, *options, settings=settings)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == (1 if told else 0)


def test_an_address_that_is_taken_ends_it_with_one_line(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        done = run_once(folder, "--metrics", where)
    assert done.returncode == 1
    assert done.stderr == (
        f"pi-reconciler: metrics cannot be exposed on {where}: Address already in use\n"
    )


def test_a_folder_that_cannot_be_acted_upon_is_unhealthy_until_it_can(
    folder: Path, tmp_path: Path
) -> None:
    port = free_port()
    daemon = Daemon(folder, tmp_path / "log", "--metrics", f"127.0.0.1:{port}")
    try:
        until(lambda: health(port) == (200, ""))
        folder.chmod(0o777)
        until(lambda: health(port)[0] == 503)
        assert "others" in health(port)[1] or "write" in health(port)[1]
        assert "pi_reconciler_folder_usable 0.0\n" in get(port, "/metrics")[1]
        folder.chmod(0o700)
        until(lambda: health(port) == (200, ""))
        assert "pi_reconciler_folder_usable 1.0\n" in get(port, "/metrics")[1]
        assert "_created" not in get(port, "/metrics")[1]
    finally:
        assert daemon.end() == 0


# -- A loop that is stuck ----------------------------------------------------------------------


def test_a_stuck_loop_is_told_of_while_it_is_stuck(
    folder: Path, exposition: Exposition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oversight, "PERIOD", 0.02)
    monkeypatch.setattr(oversight, "STUCK", 0.3)
    free, stuck = threading.Event(), threading.Event()
    told: list[tuple[int, str]] = []

    def ask(hold: Callable[[], None], end: Callable[[], None]) -> None:
        try:
            until(lambda: health(exposition.port) == (200, ""), "healthy")
            hold()
            stuck.wait(WAIT)
            until(lambda: health(exposition.port)[0] == 503, "unhealthy")
            told.append(health(exposition.port))
            free.set()
            until(lambda: health(exposition.port) == (200, ""), "healthy again")
            told.append(health(exposition.port))
            told.append(get(exposition.port, "/metrics"))
        finally:
            free.set()
            end()

    def hold_up() -> None:
        stuck.set()
        free.wait(WAIT)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        async with (
            Reconciler(KeeperManager(folder), metrics=Metrics) as reconciler,
            Oversight(reconciler, Notifier({}), exposition),
        ):
            asking = threading.Thread(
                target=ask,
                args=(
                    lambda: loop.call_soon_threadsafe(hold_up),
                    lambda: loop.call_soon_threadsafe(ended.set),
                ),
            )
            asking.start()
            await ended.wait()
            asking.join()

    asyncio.run(main())
    assert told[0][0] == 503
    assert told[0][1].startswith("the event loop has been stuck for ")
    assert told[1] == (200, "")
    lags = [line for line in told[2][1].splitlines() if line.startswith("pi_reconciler_loop_lag")]
    slow = [float(line.split()[1]) for line in lags if line.endswith("_sum") or "_sum " in line]
    assert slow[0] >= 0.25, "the beat after it came late, and that was noted"


def test_an_idle_daemon_with_metrics_wakes_up_less_than_once_a_second(
    folder: Path, tmp_path: Path
) -> None:
    port = free_port()
    daemon = Daemon(folder, tmp_path / "log", "--metrics", f"127.0.0.1:{port}")
    try:
        until(lambda: health(port) == (200, ""))
        until(lambda: quiet(daemon.process.pid), "a second with one wake-up at most")
    finally:
        assert daemon.end() == 0


def quiet(pid: int) -> bool:
    """Whether a process wakes up once at most within a second from now."""
    before = switches(pid)
    time.sleep(1)
    return switches(pid) - before <= 1


def switches(pid: int) -> int:
    """How often the threads of a process went to sleep by themselves."""
    return sum(
        int(line.split()[1])
        for thread in os.listdir(f"/proc/{pid}/task")
        for line in Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines()
        if line.startswith("voluntary_ctxt_switches")
    )
