"""Every command: once as a person types it on a terminal, and once in a pipe."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from conftest import WAIT, Daemon
from terminal import Terminal, a_terminal
from test_cli import Cli
from test_cli import cli as cli  # noqa: PLC0414 - a fixture

from reconciler.cli import cli as group


class Said(NamedTuple):
    """A command line, and what comes out: on the screen, and of a pipe from end to end."""

    typed: str
    shown: str
    piped: str


# In an order in which they can be typed one after the other; NAME is the session.
COMMANDS = (
    Said(
        "run --once --dry-run", r"reconciler\.stopped", r'{"timestamp".*"reconciler\.stopped".*}\n'
    ),
    Said("spawn NAME --restart on-failure -- cat", r"^NAME \d+", r"NAME \d+\n"),
    Said('write NAME \'{"id":"1"}\'', r"^ended", r""),
    Said("ls", r"SID +PHASE .*\n(.*\n)*NAME +ready", r"SID +PHASE .*\nNAME +ready .*\n"),
    Said("inspect NAME", r"phase +ready, because: keeper proven", r"session NAME in .*nothing\n"),
    Said("logs NAME", r"\d\d:\d\d:\d\d\S* +info +keeper ready: NAME", r"({[^\n]*}\n)+"),
    Said("status", r"^running on .*\n *pid +\d+", r"running on .*\nversion [^\n]*\n"),
    Said(
        "service install --dry-run",
        r"^would run systemctl --user restart pi-reconciler",
        r"would run systemctl --user show .*would write /.* restart pi-reconciler\.service\n",
    ),
    Said("config path", r"config\.toml", r"/.*/config\.toml\n"),
    Said("doctor || true", r"folder .*, nobody else's", r"ok +settings .*"),
    Said("completion bash", r"complete .*pi-reconciler", r"# .*complete [^\n]* pi-reconciler\n"),
    Said("demo", r"no process and no file is left", r"In a folder of its own.*is left\.\n"),
    Said("restart NAME", r"^NAME restarted, its keeper", r"NAME restarted, its keeper is \d+\n"),
    Said("stop NAME", r"^NAME stopped", r"NAME stopped\n"),
)
ELSEWHERE = {"events": "test_status.py"}
"""Commands that last, and the tests that show them on both."""


def named(said: Said) -> str:
    return said.typed.split()[0]


def test_none_is_left_out() -> None:
    known = {*map(named, COMMANDS), *ELSEWHERE}
    assert known == set(group.list_commands(click.Context(group)))
    for name, module in ELSEWHERE.items():
        text = Path(__file__).with_name(module).read_text()
        assert re.search(rf"def test_\w*{name}\w*terminal", text)


@pytest.fixture
def shell(tmp_path: Path, cli: Cli) -> Iterator[Terminal]:
    """A terminal whose shell knows `pi-reconciler`, beside a daemon."""
    program = tmp_path / "bin" / "pi-reconciler"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m reconciler "$@"\n')
    program.chmod(0o755)
    cli.env["PATH"] = f"{program.parent}:{cli.env['PATH']}"
    daemon = Daemon(cli.folder, tmp_path / "log")
    try:
        with a_terminal(tmp_path, cli.env) as made:
            yield made
    finally:
        daemon.end()


def test_on_a_terminal(shell: Terminal) -> None:
    for number, said in enumerate(COMMANDS):
        command = said.typed.replace("NAME", "here")
        shell.type(f"clear; pi-reconciler {command}; echo ended-{number} $?")
        screen = shell.shows(f"ended-{number} 0")
        assert re.search(said.shown.replace("NAME", "here"), screen, re.MULTILINE), screen


def test_in_a_pipe(cli: Cli, shell: Terminal) -> None:
    del shell  # its daemon and its program are what is needed
    for said in COMMANDS:
        done = subprocess.run(
            ["sh", "-c", f"pi-reconciler {said.typed.replace('NAME', 'there')}"],
            env=cli.env,
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )
        assert done.returncode == 0, done
        assert re.fullmatch(said.piped.replace("NAME", "there"), done.stdout, re.DOTALL), done
        assert "\x1b" not in done.stdout + done.stderr, "no colours for a program"
