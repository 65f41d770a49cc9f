"""Keepers that are born while the logs of their forerunners go."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import CAMPAIGN, Fault
from stand_ins import ending
from test_removal import until_it_is_up

from reconciler.budget import LogBudget
from reconciler.folder import Folder
from reconciler.layout import CLAIM, KEEPER_PROGRAM, file_name
from reconciler.sweep import LogSweeper

SID = "5f0e7c1e-0c50-4f0e-9b39-4e4a3a2f3d11"
KEEPER_LOG, LAUNCH_LOG = f"keeper-{SID}.log", f"keeper-launch-{SID}.log"
BUDGETS = {
    "removed": LogBudget(total=0, each=1000, age=1e12),
    "cut": LogBudget(total=10**9, each=1000, age=1e12),
}
RACE = pytest.mark.chaos(
    "a keeper born while its forerunner's logs are swept",
    "it keeps both its logs and all its lines, each round",
)


@pytest.fixture
def in_memory() -> Iterator[Folder]:
    """A folder where files cost no disk: a race of many rounds should not wait for one."""
    shared = "/dev/shm"
    path = Path(tempfile.mkdtemp(prefix="pi-", dir=shared if os.path.isdir(shared) else None))
    with Folder(path) as opened:
        yield opened
    shutil.rmtree(path)


BORN = """
import os, sys
logs = sys.argv[1:]
while (order := sys.stdin.buffer.raw.read(8)):
    opened = [os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) for log in logs]
    for log in opened:
        os.write(log, b"born " + order + b"\\n")
    os.write(1, b"b")
    sys.stdin.buffer.raw.read(1)
    for log in opened:
        os.write(log, b"ends " + order + b"\\n")
        os.close(log)
    os.write(1, b"e")
"""


@RACE
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fate", BUDGETS)
def test_a_keeper_of_another_make_comes_while_its_forerunners_logs_are_swept(
    in_memory: Folder, fault: Fault, fate: str
) -> None:
    rounds = 100_000 if CAMPAIGN else 1500
    dice, met = random.Random(fate), Counter[str]()
    paths = [in_memory.path / name for name in (KEEPER_LOG, LAUNCH_LOG)]
    sweeper = LogSweeper(BUDGETS[fate])
    command = [sys.executable, "-I", "-S", "-c", BORN, *map(str, paths)]
    with ending(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    ) as born:
        assert born.stdin is not None
        assert born.stdout is not None
        for number in range(rounds):
            for path in paths:
                path.write_bytes(b"an old line\n" * 200)
            order = b"%08d" % number
            born.stdin.write(order)
            begin = time.perf_counter() + dice.random() * 0.0003
            while time.perf_counter() < begin:
                pass
            report = sweeper.sweep(in_memory, ())
            assert born.stdout.read(1) == b"b"
            assert not sweeper.sweep(in_memory, ()).swept, number
            born.stdin.write(b"e")
            assert born.stdout.read(1) == b"e"
            for path in paths:
                told = path.read_bytes()
                assert told.endswith(b"born %b\nends %b\n" % (order, order)), (number, path)
            assert sorted(in_memory.names()) == sorted(path.name for path in paths), number
            met["swept" if report.swept else "left alone"] += 1
        born.stdin.close()
    fault.count(rounds, checks=4 * rounds)
    assert met["swept"], "the keeper always came first: this was no race"
    assert met["left alone"], "the keeper always came last: this was no race"


@RACE
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fate", BUDGETS)
def test_a_keeper_of_ours_comes_while_its_forerunners_logs_are_swept(
    in_memory: Folder, fault: Fault, fate: str
) -> None:
    rounds = 1500 if CAMPAIGN else 8
    dice = random.Random(fate)
    sweeper = LogSweeper(BUDGETS[fate])
    for number in range(rounds):
        for name in (KEEPER_LOG, LAUNCH_LOG):
            with (in_memory.path / name).open("ab") as log:
                log.write(b"an old line\n" * 200)
        launch = os.open(in_memory.path / LAUNCH_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", KEEPER_PROGRAM, SID],
            env={
                **os.environ,
                "PI_KEEPER_SESSIONS_DIR": str(in_memory.path),
                "PI_KEEPER_PI_CMD": '["sleep"]',
                "PI_KEEPER_PI_ARGS": '["600"]',
            },
            stdout=launch,
            stderr=launch,
        )
        with ending(keeper):
            status = os.fstat(launch)
            os.close(launch)
            begin = time.perf_counter() + dice.random() * 0.05
            while time.perf_counter() < begin:
                pass
            while in_memory.pid_entry(f"{SID}.rpc.sock.pid", 0).pid != keeper.pid:
                sweeper.sweep(in_memory, ())
                assert keeper.poll() is None, number
            until_it_is_up(in_memory, keeper.pid)
            sweeper.sweep(in_memory, ())
            assert os.path.samestat(status, (in_memory.path / LAUNCH_LOG).stat()), number
            holds_its_log(in_memory, keeper.pid)
            keeper.send_signal(signal.SIGKILL)
            keeper.wait()
        for role in CLAIM:
            (in_memory.path / file_name(role, SID)).unlink(missing_ok=True)
    fault.count(rounds, checks=3 * rounds)


def holds_its_log(folder: Folder, keeper: int) -> None:
    """The log under the name is locked by the keeper, and has its first line."""
    with (folder.path / KEEPER_LOG).open("rb") as log:
        with pytest.raises(BlockingIOError):
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lines = [line for line in log if b'"keeper.start"' in line]
    assert any(b'"keeper_pid": %d' % keeper in line for line in lines)
