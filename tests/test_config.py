from __future__ import annotations

import configparser
import json
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import WAIT

from reconciler.cli import cli

CONFIG = Path(__file__).parent.parent / "config"
UNIT = CONFIG / "pi-reconciler.service"
PLIST = CONFIG / "io.github.pi-reconciler.plist"


def unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign] # as the library's docs do
    parser.read_string(UNIT.read_text())
    return parser


def arguments_are_understood(arguments: list[str]) -> None:
    """The program takes these arguments: click reads them, and runs nothing."""
    program, *rest = arguments
    assert Path(program).name == "pi-reconciler"
    command = cli.get_command(click.Context(cli), rest[0])
    assert command is not None
    command.make_context(rest[0], rest[1:])


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_the_systemd_unit_is_well_formed(tmp_path: Path) -> None:
    program = tmp_path / "pi-reconciler"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = UNIT.read_text().replace("%h/.local/bin/pi-reconciler", str(program))
    assert str(program) in text
    (tmp_path / UNIT.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", tmp_path / UNIT.name],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        env={"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert UNIT.name not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_a_broken_unit_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / UNIT.name).write_text(UNIT.read_text().replace("KillMode=process", "KilMode=x"))
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", tmp_path / UNIT.name],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        env={"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert "KilMode" in done.stderr


def test_the_systemd_unit_runs_a_command_that_exists_and_leaves_sessions_alone() -> None:
    service = unit()["Service"]
    arguments_are_understood(service["ExecStart"].split())
    assert service["KillMode"] == "process"
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"].split() == ["2", "78"], "usage and bad settings"
    for hidden in ("PrivateUsers", "ProtectProc", "PrivatePIDs", "PrivateTmp"):
        assert hidden not in service, "it must see all processes and folders of its user"


def test_the_launchd_plist_parses_and_runs_a_command_that_exists() -> None:
    with PLIST.open("rb") as file:
        agent = plistlib.load(file)
    assert PLIST.stem == agent["Label"]
    arguments_are_understood(agent["ProgramArguments"])
    assert agent["AbandonProcessGroup"] is True
    assert agent["RunAtLoad"] is True


def test_the_units_restrictions_let_the_program_do_its_work(tmp_path: Path) -> None:
    """Every family of sockets that a service of the unit uses is allowed by it."""
    families = set(unit()["Service"]["RestrictAddressFamilies"].split())
    script = (
        "import socket, sys\n"
        "used = set()\n"
        "sys.addaudithook(lambda e, a: used.add(a[1]) if e == 'socket.__new__' else None)\n"
        "from reconciler.cli import cli\n"
        f"cli.main(['run', '--once', '--sessions-dir', {str(tmp_path)!r},"
        " '--metrics', '127.0.0.1:0', '--log-level', 'error'], standalone_mode=False)\n"
        "import json; print(json.dumps([socket.AddressFamily(f).name for f in used]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT, check=True
    )
    used = set(json.loads(done.stdout))
    assert "AF_INET" in used, "the metrics were exposed"
    assert used <= families
