"""Pids that are recycled faster than anybody can look, in a pid namespace of their own."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos import CAMPAIGN, Fault
from conftest import program_environment, root
from stand_ins import ending

HERE = Path(__file__).parent
PID_MAX = Path("/proc/sys/kernel/pid_max")
INSIDE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
NUMBERS = 600
"""Numbers in the namespace: some hundred forks and they come again.

The kernel gives the first 300 once; threads need one each, and on a busy machine the dead keep
theirs for a while.
"""
SHORT, FULL = 6, 350
SEED = int(os.environ.get("PI_RECONCILER_SEED", "1"))


def pid_max_is_the_namespaces() -> bool:
    """Before Linux 6.14 it is the whole machine's."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    return version is not None and tuple(map(int, version.groups())) >= (6, 14)


def crowd(folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """What the program in the namespace says, round by round."""
    before = PID_MAX.read_text()
    numbers = NUMBERS if pid_max_is_the_namespaces() else 0
    program = [sys.executable, str(HERE / "pid_crowd.py"), str(folder)]
    env = program_environment(folder)
    env["PYTHONPATH"] = os.pathsep.join((str(HERE.parent), env["PYTHONPATH"]))
    with ending(
        subprocess.Popen(
            [*INSIDE, *program, *map(str, (rounds, SEED, numbers))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert numbers in {0, told["pid_max"]}
        if PID_MAX.read_text() != before:
            PID_MAX.write_text(before)
            pytest.fail("the machine's own pid_max has moved, and was put back")
        process.stdin.write("go\n")
        process.stdin.flush()
        for line in process.stdout:
            yield json.loads(line)
        assert process.wait() == 0


@root
@pytest.mark.root
@pytest.mark.timeout(1800)
@pytest.mark.chaos(
    "pids recycled at once",
    "no innocent process or keeper that got a dead one's number is signalled; stale files go",
)
def test_numbers_of_the_dead_are_given_to_innocents_at_once(folder: Path, fault: Fault) -> None:
    recycled = 0
    for told in crowd(folder, FULL if CAMPAIGN else SHORT):
        fault.count(told["recycled"])
        recycled += told["recycled"]
        for condition, what in told["checks"]:
            fault.holds(condition, what)
        if fault.violations:
            break  # what follows would wait in vain, too
    fault.holds(recycled > SHORT * 4, f"only {recycled} numbers were recycled")
