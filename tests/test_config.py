"""The units that operators install, each held against what reads it."""

from __future__ import annotations

import configparser
import json
import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WAIT

from reconciler.cli import cli
from reconciler.managers import HARDENED, LABEL, UNIT, unit_text
from reconciler.service import template

CONFIG = Path(__file__).parent.parent / "config"
COPIES = {
    CONFIG / UNIT: UNIT,
    CONFIG / f"{UNIT}.d" / HARDENED: HARDENED,
    CONFIG / f"{LABEL}.plist": f"{LABEL}.plist",
}
"""What is shown in `config/`, and what the package holds it as."""


def directives(text: str) -> dict[str, str]:
    """The service's directives; of one that comes more than once, all."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign] # as the library's docs do
    parser.read_string(text)
    return dict(parser["Service"])


def arguments_are_understood(arguments: list[str]) -> None:
    """The program takes these arguments: click reads them, and runs nothing."""
    program, *rest = arguments
    assert Path(program).name == "pi-reconciler"
    command = cli.get_command(cli.make_context("pi-reconciler", [*rest]), rest[0])
    assert command is not None
    command.make_context(rest[0], rest[1:])


@pytest.mark.parametrize("copy", COPIES, ids=lambda path: path.name)
def test_what_is_shown_is_what_is_installed(copy: Path) -> None:
    told = f"cp reconciler/units/{COPIES[copy]} {copy.relative_to(CONFIG.parent)}"
    assert copy.read_text() == template(COPIES[copy]), told


def test_the_unit_runs_a_command_that_exists_and_leaves_sessions_alone() -> None:
    service = directives(template(UNIT))
    arguments_are_understood(service["ExecStart"].split())
    assert service["Type"] == "notify"
    assert service["KillMode"] == "process"
    assert service["OOMPolicy"] == "continue"
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"].split() == ["2", "78"], "usage and bad settings"


HIDING = {
    "PrivateUsers",
    "ProtectProc",
    "PrivatePIDs",
    "PrivateTmp",
    "ProtectHome",
    "ProtectSystem",
}


def test_nothing_that_agents_would_inherit_is_asked_for_and_each_is_explained() -> None:
    text = template(UNIT)
    asked = set(directives(text))
    hardening = set(directives(template(HARDENED))) | HIDING | {"LimitNOFILE", "ReadWritePaths"}
    assert asked & hardening == set()
    explained = set(re.findall(r"(\w+)=", "".join(re.findall(r"^#.*\n", text, re.MULTILINE))))
    assert hardening - explained <= {"SystemCallErrorNumber"}


def test_the_hardened_one_hides_nothing_that_must_be_seen() -> None:
    assert not HIDING & set(directives(template(HARDENED)))


def test_the_launchd_plist_parses_and_runs_a_command_that_exists() -> None:
    agent = plistlib.loads(template(f"{LABEL}.plist").encode())
    assert agent["Label"] == LABEL
    arguments_are_understood(agent["ProgramArguments"])
    assert agent["AbandonProcessGroup"] is True
    assert agent["RunAtLoad"] is True


# -- systemd-analyze -----------------------------------------------------------------------


@pytest.fixture
def analyze() -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        assert not os.environ.get("CI"), "CI must have systemd-analyze: make tools"
        pytest.skip("needs systemd-analyze")
    return program


def written(folder: Path, *, hardened: bool = False) -> Path:
    """The unit as `systemd-analyze` wants it: with a program that is there."""
    program = folder / "pi-reconciler"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = template(UNIT).replace("%h/.local/bin/pi-reconciler", str(program))
    assert str(program) in text
    if hardened:
        text += "\n" + template(HARDENED)
    (folder / UNIT).write_text(text)
    return folder / UNIT


def analyzed(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        env={"XDG_RUNTIME_DIR": str(folder), "HOME": str(folder), "PATH": "/usr/bin:/bin"},
    )


@pytest.mark.parametrize("odd", ["a b", "100%h", "a$b", "a${HOME}b", "a;b", "größe", "-x=1"])
def test_a_program_is_found_wherever_it_is(analyze: str, tmp_path: Path, odd: str) -> None:
    place = tmp_path / odd
    place.mkdir()
    program = place / "pi-reconciler"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / UNIT).write_text(unit_text((str(program), "run", "--config", "$HOME/a b")))
    done = analyzed(tmp_path, analyze, "--user", "verify", tmp_path / UNIT)
    assert UNIT not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("hardened", [False, True])
def test_the_unit_is_well_formed(analyze: str, tmp_path: Path, *, hardened: bool) -> None:
    done = analyzed(tmp_path, analyze, "--user", "verify", written(tmp_path, hardened=hardened))
    assert UNIT not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


def test_a_broken_unit_would_be_noticed(analyze: str, tmp_path: Path) -> None:
    unit = written(tmp_path)
    unit.write_text(unit.read_text().replace("KillMode=process", "KilMode=x"))
    assert "KilMode" in analyzed(tmp_path, analyze, "--user", "verify", unit).stderr


@pytest.mark.parametrize(("hardened", "most"), [(False, 96), (True, 62)])
def test_the_exposure_is_no_greater_than_is_told(
    analyze: str, tmp_path: Path, *, hardened: bool, most: int
) -> None:
    """docs/service.md says what these figures count, and why they are not lower."""
    unit = written(tmp_path, hardened=hardened)
    command = (analyze, "security", "--offline=true", "--no-pager")
    done = analyzed(tmp_path, *command, f"--threshold={most}", unit)
    assert done.returncode == 0, done.stdout[-200:]
    less = analyzed(tmp_path, *command, f"--threshold={most - 1}", unit)
    assert less.returncode != 0, "the threshold can be lower: say so here and in docs/service.md"
    page = (CONFIG.parent / "docs" / "service.md").read_text()
    assert f"{most / 10:.1f}" in page


# -- What the hardened one allows ----------------------------------------------------------


def test_every_family_of_sockets_that_is_used_is_allowed(tmp_path: Path) -> None:
    families = set(directives(template(HARDENED))["RestrictAddressFamilies"].split())
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
