"""Whoever reads the log is slow, stopped or gone, or the disk hangs: nobody waits for that."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from conftest import WAIT, program_environment, stale_pair, until

from reconciler import sinks
from reconciler.logs import flush, make_logger

PAGE = 4096


def small(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PAGE)


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_bytes().splitlines()]


class Pipe:
    """A pipe of one page that nobody reads but the test."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        small(writing)
        self.reader = open(reading, "rb", buffering=0)  # noqa: SIM115 - closed by the fixture
        self.stream: TextIO = open(writing, "w")  # noqa: SIM115 - the same

    def read(self, until_number: int) -> list[dict[str, Any]]:
        """All lines up to one."""
        seen = b""
        while f'"number":{until_number}'.encode() not in seen or not seen.endswith(b"\n"):
            seen += self.reader.read(PAGE)
        return [json.loads(line) for line in seen.splitlines()]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.stream.close()
    made.reader.close()  # whoever writes to it still is refused, and ends
    flush(WAIT)


def test_lines_that_wait_for_the_reader_come_whole_and_in_order(pipe: Pipe) -> None:
    log = make_logger(pipe.stream)
    for number in range(300):
        log.info("event.name", number=number, text="x" * (number * 37 % 5000))
    assert flush(0.0) > 0
    told = pipe.read(299)
    assert [line["number"] for line in told] == list(range(300))
    assert not any("lines_dropped" in line for line in told)
    assert flush(WAIT) == 0


def test_what_is_too_much_to_wait_is_dropped_and_counted(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "BACKLOG", 20_000)
    log = make_logger(pipe.stream)
    for number in range(200):
        log.info("event.name", number=number, text="x" * 300)
    log.info("event.name", number=200)
    told = pipe.read(19)
    assert [line["number"] for line in told][:20] == list(range(20))
    while flush(0.01):
        told += [json.loads(line) for line in pipe.reader.read(1 << 20).splitlines()]
    log.info("event.name", number=201)
    told += pipe.read(201)
    found = [line["number"] for line in told]
    assert found == sorted(set(found)), "in order, none twice"
    assert told[-1]["lines_dropped"] == 202 - len(told) > 0


def test_a_line_longer_than_all_that_may_wait_is_dropped(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "BACKLOG", 1000)
    log = make_logger(pipe.stream)
    log.info("event.name", number=0, text="x" * 1000)
    log.info("event.name", number=1)
    assert [(line["number"], line["lines_dropped"]) for line in pipe.read(1)] == [(1, 1)]


def test_a_stopped_reader_gets_everything_when_it_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with (
        file.open("wb") as target,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=target) as cat,
    ):
        assert cat.stdin is not None
        small(cat.stdin.fileno())
        cat.send_signal(signal.SIGSTOP)
        with open(os.dup(cat.stdin.fileno()), "w") as stream:
            log = make_logger(stream)
            for number in range(200):
                log.info("event.name", number=number, text="x" * 300)
            assert flush(0.0) > 0
            cat.send_signal(signal.SIGCONT)
            assert flush(WAIT) == 0
            del log
        until(lambda: file.read_bytes().count(b"\n") == 200)
        cat.kill()
    assert numbers(file) == list(range(200))


def test_a_fifo_whose_reader_has_gone_away_drops_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    first = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with path.open("w") as stream:
        os.close(first)
        log = make_logger(stream)
        for number in range(3):
            log.info("event.name", number=number)
        assert flush(WAIT) == 0, "refused, all three"
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as second:
            log.info("event.name", number=3)
            assert flush(WAIT) == 0
            (told,) = map(json.loads, second.readlines())
    assert (told["number"], told["lines_dropped"]) == (3, 3)


def test_a_pipe_that_never_blocks_is_waited_for_in_the_thread(pipe: Pipe) -> None:
    os.set_blocking(pipe.stream.fileno(), False)
    log = make_logger(pipe.stream)
    for number in range(100):
        log.info("event.name", number=number, text="x" * 300)
    assert [line["number"] for line in pipe.read(99)] == list(range(100))


def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is a fake: a write that does not return before it is let go."""
    arrived, let_go, write = threading.Event(), threading.Event(), os.write

    def hangs(descriptor: int, data: bytes) -> int:
        arrived.set()
        let_go.wait(WAIT)
        return write(descriptor, data)

    with (tmp_path / "log").open("w") as stream, monkeypatch.context() as patch:
        patch.setattr("reconciler.sinks.os.write", hangs)
        log = make_logger(stream)
        log.info("event.name", number=0)
        assert arrived.wait(WAIT)
        for number in range(1, 1000):
            log.info("event.name", number=number)
        assert flush(0.0) == 1000
        let_go.set()
        assert flush(WAIT) == 0
    assert numbers(tmp_path / "log") == list(range(1000))


def test_the_thread_ends_when_nobody_logs_and_another_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "_LINGER", 0.01)
    with (tmp_path / "log").open("w") as stream:
        log = make_logger(stream)
        for number in range(3):
            log.info("event.name", number=number)
            until(lambda: not any(each.name == "log" for each in threading.enumerate()))
    assert numbers(tmp_path / "log") == [0, 1, 2]


def in_a_process(code: str, **how: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401 - Popen's own
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code], env=env, **how)


def test_the_end_waits_for_lines_but_not_for_long_and_says_how_many_are_left(pipe: Pipe) -> None:
    code = (
        "import sys; from reconciler.logs import make_logger\n"
        "log = make_logger(sys.stdout, form='json')\n"
        "for number in range(100): log.info('event.name', number=number, text='x' * 300)\n"
    )
    with in_a_process(code, stdout=pipe.stream, stderr=subprocess.PIPE) as process:
        _, err = process.communicate(timeout=WAIT)
    pipe.stream.close()
    told = [json.loads(line) for line in pipe.reader.readall().splitlines()]
    assert process.returncode == 0
    assert [line["number"] for line in told] == list(range(len(told)))
    left = int(err.removeprefix(b"pi-reconciler: ").split()[0])
    assert len(told) + left == 100
    assert left


def test_the_end_says_what_a_full_disk_did_not_take() -> None:
    code = (
        "import sys; from reconciler.logs import make_logger\n"
        "log = make_logger(sys.stdout, form='json')\n"
        "for number in range(3): log.info('event.name', number=number)\n"
    )
    with (
        open("/dev/full", "wb") as full,
        in_a_process(code, stdout=full, stderr=subprocess.PIPE) as process,
    ):
        _, err = process.communicate(timeout=WAIT)
    assert err == b"pi-reconciler: 3 log lines could not be written before the end\n"


def test_after_a_fork_each_writes_its_own_lines_once(tmp_path: Path) -> None:
    code = (
        "import os, sys; from reconciler.logs import make_logger\n"
        "log = make_logger(sys.stdout, form='json')\n"
        "for number in range(100): log.info('event.name', number=number)\n"
        "child = os.fork()\n"
        "log.info('event.name', number=100 + bool(child))\n"
        "if child: os.waitpid(child, 0)\n"
    )
    path = tmp_path / "log"
    with path.open("ab") as file, in_a_process(code, stdout=file) as process:
        assert process.wait(WAIT) == 0
    told = numbers(path)
    assert sorted(told) == list(range(102))
    assert [number for number in told if number < 100] == list(range(100))


DAEMON = (  # the program, but that less may wait: so few sessions as a test has fill it
    "import reconciler.sinks; reconciler.sinks.BACKLOG = 20_000\n"
    "from reconciler.cli import main; main()"
)


def test_the_daemon_cleans_while_its_output_is_a_full_pipe(folder: Path, pipe: Pipe) -> None:
    sids = [f"dead-{number}" for number in range(200)]
    for sid in sids:
        stale_pair(folder, sid)
    command = [sys.executable, "-c", DAEMON, "run", "--sessions-dir", str(folder)]
    process = subprocess.Popen(
        command, stdout=pipe.stream, stderr=subprocess.PIPE, env=program_environment(folder)
    )
    pipe.stream.close()
    try:
        until(lambda: not any(folder.glob("dead-*")), "all are gone, and nobody reads")
        stale_pair(folder, "one-more")
        until(lambda: not any(folder.glob("one-more*")), "it works on")
        seen, asked = b"", False
        while b"reconciler.stopped" not in seen:
            seen += (piece := pipe.reader.read(PAGE))
            if not asked and len(seen) > 12_000:  # there is room now
                process.send_signal(signal.SIGTERM)
                asked = True
            assert piece, seen
        _, err = process.communicate(timeout=WAIT)
    finally:
        process.kill()
        process.wait()
    told = [json.loads(line) for line in seen.splitlines()]
    assert (process.returncode, err) == (0, b"")
    cleaned = {line["sid"] for line in told if line["event"] == "session.cleaned"}
    assert told[-1]["event"] == "reconciler.stopped"
    assert told[-1]["lines_dropped"] == len({*sids, "one-more"} - cleaned) > 0
