"""What a daemon takes for itself is not what its sessions get."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WAIT, program_environment, until

SCRIPT = """
import resource, sys
from reconciler.descriptors import raise_limit
from reconciler.requests import OUR_KEEPER
from reconciler.sync import KeeperManager

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
if sys.argv[3] == "raised":
    raise_limit()
    raise_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
command = ["sh", "-c", f"ulimit -Sn > {sys.argv[2]}; exec cat"]
keeper = sys.argv[4:] or OUR_KEEPER
KeeperManager(sys.argv[1], keeper_command=keeper).spawn("demo", agent_command=command)
"""


@pytest.mark.parametrize("how", ["raised", "left"])
def test_an_agent_has_the_limit_that_programs_are_given(
    folder: Path, tmp_path: Path, how: str
) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 512
    told = tmp_path / "limit"
    started(folder, told, how).check_returncode()
    until(lambda: told.exists() and told.read_text(), "the agent runs")
    assert told.read_text() == "512\n"


@pytest.mark.parametrize("how", ["raised", "left"])
def test_a_keeper_of_another_make_has_it_too(folder: Path, tmp_path: Path, how: str) -> None:
    told, keeper = tmp_path / "limit", tmp_path / "keeper"
    keeper.write_text(f"#!/bin/sh\nulimit -Sn > {told}\nexit 1\n")
    keeper.chmod(0o755)
    assert started(folder, told, how, str(keeper)).returncode == 1
    assert told.read_text() == "512\n"


def started(folder: Path, told: Path, how: str, *keeper: str) -> subprocess.CompletedProcess[bytes]:
    """A session is started by a process whose own limit was raised, or left."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(told), how, *keeper],
        env=program_environment(folder),
        timeout=WAIT,
        check=False,
        capture_output=True,
    )
