"""A crowd at once: keepers that are killed in one instant, stale pairs that all appear.

The reconciler runs in a process of its own, where a task beside it measures how long the loop
was kept from its turn.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import CAMPAIGN, Fault
from conftest import program_environment, until
from hampered import bystanders, gone, spawn_all, stale_pairs

from reconciler.keeper import KeeperManager

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the loop's figures are Linux's")

CHECKED = "all clean, nothing alive harmed, the loop never blocked over 50 ms"
LONGEST = 0.050
"""Seconds for which the loop may be kept from its turn."""

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
def measured(fault: Fault, folder: Path) -> Iterator[None]:
    """Have a reconciler work meanwhile; check how long its loop was held up."""
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
            yield
            process.stdin.close()
            longest = json.loads(process.stdout.readline())
        finally:
            process.kill()
    fault.holds(longest["ours"] < LONGEST, f"the loop was held up, at most (s): {longest}")
    sys.stdout.write(f"held up, at most: {longest}\n")


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
                until(gone(folder, sids), "all is clean")
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
            with measured(fault, folder):
                subprocess.run(command, check=True)
                until(gone(folder, sids), "all is clean")
            prepared.rmdir()
            those.unharmed(fault)
