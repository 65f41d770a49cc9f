"""A crowd at once: keepers that are killed in one instant, stale pairs that all appear.

The reconciler runs in a process of its own, where a task beside it measures how long the loop
was kept from its turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from chaos import CAMPAIGN, Fault
from conftest import program_environment
from hampered import bystanders, left_by, spawn_all, stale_pairs

from reconciler.keeper import KeeperManager

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the loop's figures are Linux's")

CHECKED = "all clean, nothing alive harmed, the loop never blocked over 50 ms"
LONGEST = 0.050
"""Seconds of its own for which the loop may be kept from its turn; `lag.py` says how."""

LAG = Path(__file__).with_name("lag.py")
CROWD = 1000 if CAMPAIGN else 150
PAIRS = 5000 if CAMPAIGN else 1000


RENAME = """
import os, sys
begin, end = sys.argv[1:]
for name in sorted(os.listdir(begin)):
    os.rename(os.path.join(begin, name), os.path.join(end, name))
"""
"""Moves all from one folder to another, the socket of each pair first."""


@contextlib.contextmanager
def measured(fault: Fault, folder: Path) -> Iterator[int]:
    """Have a reconciler work meanwhile, its pid; check how long its loop was held up."""
    with subprocess.Popen(
        (sys.executable, LAG, str(folder)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=program_environment(folder),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process.pid
            process.stdin.close()
            longest = json.loads(process.stdout.readline())
        finally:
            process.kill()
    fault.holds(longest["loops"] < LONGEST, f"the loop was held up, at most (s): {longest}")
    sys.stdout.write(f"held up, at most: {longest}\n")


def all_gone(folder: Path, sids: Sequence[str]) -> None:
    """Wait until nothing of a crowd is left; seldom look, for that takes a processor, too."""
    give_up = time.monotonic() + (300 if CAMPAIGN else 30)
    while left := left_by(folder, sids):
        assert time.monotonic() < give_up, f"{len(left)} of {len(sids)} sessions' files are left"
        time.sleep(0.1)


@pytest.mark.chaos("keepers killed at once", CHECKED)
def test_killed(fault: Fault, folder: Path, tmp_path: Path) -> None:
    manager = KeeperManager(folder)
    with bystanders(manager, tmp_path / "told") as those:
        for number in fault.rounds(short=1, full=1):
            sids = [f"round{number}-{each}" for each in range(CROWD)]
            keepers = spawn_all(manager, dict.fromkeys(sids, ("cat",)))
            command = ["kill", "-KILL", *(str(keeper.keeper_pid) for keeper in keepers)]
            with measured(fault, folder):
                subprocess.run(command, check=True)
                all_gone(folder, sids)
            those.unharmed(fault)


@pytest.mark.chaos("stale pairs at once", CHECKED)
def test_stale(fault: Fault, folder: Path, tmp_path: Path) -> None:
    manager = KeeperManager(folder)
    prepared = folder.with_name("prepared")
    with bystanders(manager, tmp_path / "told") as those:
        for number in fault.rounds(short=1, full=3):
            prepared.mkdir()
            sids = [f"round{number}-{each}" for each in range(PAIRS)]
            stale_pairs(prepared, sids)
            command = [sys.executable, "-I", "-S", "-c", RENAME, str(prepared), str(folder)]
            with measured(fault, folder) as pid:
                os.kill(pid, signal.SIGSTOP)  # so that they all come before it looks at one
                subprocess.run(command, check=True)
                os.kill(pid, signal.SIGCONT)
                all_gone(folder, sids)
            prepared.rmdir()
            those.unharmed(fault)
