"""Completion, in the shells themselves: what they would offer after a Tab."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WAIT, bare_socket
from test_cli import COMMANDS, Cli
from test_cli import cli as cli  # noqa: PLC0414 - a fixture


def needs(tool: str) -> str:
    """A program of the system; without it the test is skipped, in CI it fails."""
    path = shutil.which(tool)
    if path is None:
        assert not os.environ.get("CI"), f"CI must have {tool}: make tools"
        pytest.skip(f"{tool} is not installed: make tools (as root)")
    return path


@pytest.fixture
def shell_env(tmp_path: Path, cli: Cli) -> dict[str, str]:
    """An environment in which `pi-reconciler` is found, over a folder with three sessions."""
    program = tmp_path / "bin" / "pi-reconciler"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m reconciler "$@"\n')
    program.chmod(0o755)
    for sid in ("alpha", "alto"):
        bare_socket(cli.folder / f"{sid}.rpc.sock")
    (cli.folder / "keeper-beta.log").touch()
    (cli.folder / "notes.txt").touch()
    return {**cli.env, "PATH": f"{program.parent}{os.pathsep}{cli.env['PATH']}", "TERM": "dumb"}


BASH = """
eval "$(pi-reconciler completion bash)"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_pi_reconciler pi-reconciler
printf '%s\\n' "${COMPREPLY[@]}"
"""


def bash(env: dict[str, str], *words: str) -> list[str]:
    """What bash would offer for the last of these words."""
    return run(env, needs("bash"), "--norc", "-c", BASH, "bash", "pi-reconciler", *words)


def run(env: dict[str, str], *command: str) -> list[str]:
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=WAIT, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_options_choices_and_sessions(shell_env: dict[str, str]) -> None:
    assert set(bash(shell_env, "")) >= set(COMMANDS)
    assert bash(shell_env, "in") == ["inspect"]
    assert bash(shell_env, "ls", "--w") == ["--watch"]
    assert bash(shell_env, "completion", "") == ["bash", "zsh", "fish"]
    assert bash(shell_env, "write", "al") == ["alpha", "alto"]


def test_sessions_are_those_of_the_folder_that_is_named(
    shell_env: dict[str, str], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    bare_socket(elsewhere / "gamma.rpc.sock")
    assert bash(shell_env, "write", "--sessions-dir", str(elsewhere), "") == ["gamma"]
    assert bash(shell_env, "--sessions-dir", str(elsewhere), "stop", "") == ["gamma"]
    broken = tmp_path / "broken.toml"
    broken.write_text("nonsense = 1\n")
    assert bash(shell_env, "--config", str(broken), "stop", "") == []
    shell_env["PI_RECONCILER_SESSIONS_DIR"] = str(tmp_path / "gone")
    assert bash(shell_env, "stop", "") == []


@pytest.mark.parametrize("command", ["write", "inspect", "stop", "events"])
def test_every_command_that_takes_a_session_offers_them(
    shell_env: dict[str, str], command: str
) -> None:
    assert bash(shell_env, command, "alp") == ["alpha"]
    assert bash(shell_env, command, "b") == [], "of this one there is only a log"


def test_logs_are_offered_of_those_that_are_gone_too(shell_env: dict[str, str]) -> None:
    assert bash(shell_env, "logs", "") == ["alpha", "alto", "beta"]


def test_nothing_is_wrong_with_the_bash_script(cli: Cli) -> None:
    script = cli("completion", "bash").out
    done = subprocess.run(
        [needs("shellcheck"), "--shell", "bash", "--severity", "style", "-"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_bash_completes_on_a_key(shell_env: dict[str, str], tmp_path: Path) -> None:
    """The whole way: a Tab on a terminal."""
    from terminal import a_terminal  # noqa: PLC0415 - here alone

    with a_terminal(tmp_path, shell_env) as terminal:
        terminal.type('eval "$(pi-reconciler completion bash)"; echo is"" ready')
        terminal.shows("is ready")
        terminal.hold("pi-reconciler write alp")
        terminal.press("Tab")
        terminal.shows("$ pi-reconciler write alpha")


FISH = "pi-reconciler completion fish | source; complete --do-complete 'pi-reconciler {}'"


def test_fish_completes(shell_env: dict[str, str], tmp_path: Path) -> None:
    fish = needs("fish")
    env = {**shell_env, "HOME": str(tmp_path), "PI_DASHBOARD_HOME": shell_env["HOME"]}

    def offered(line: str) -> list[str]:
        return run(env, fish, "--no-config", "-c", FISH.format(line))

    assert offered("write al") == ["alpha", "alto"]
    assert sorted(offered("completion ")) == ["bash", "fish", "zsh"]
    assert "--watch" in offered("ls --w")


ZSH = """
autoload -Uz compinit; compinit -D -u
eval "$(pi-reconciler completion zsh)"
compadd() { printf '%s\\n' "${completions[@]}"; }
_describe() { printf '%s\\n' "${completions_with_descriptions[@]%%:*}"; }
words=("$@") CURRENT=$#
_pi_reconciler_completion
"""


def test_zsh_completes(shell_env: dict[str, str]) -> None:
    zsh = needs("zsh")

    def offered(*words: str) -> list[str]:
        return run(shell_env, zsh, "-f", "-c", ZSH, "zsh", "pi-reconciler", *words)

    assert offered("write", "al") == ["alpha", "alto"]
    assert offered("completion", "") == ["bash", "zsh", "fish"]
    assert set(offered("")) >= set(COMMANDS)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "no COMP_WORDS and no COMP_CWORD"),
        ({"COMP_WORDS": "pi-reconciler "}, "no COMP_CWORD"),
        ({"COMP_WORDS": "pi-reconciler ", "COMP_CWORD": "x"}, "no number in COMP_CWORD"),
        ({"_PI_RECONCILER_COMPLETE": "1"}, "no such completion"),
    ],
)
def test_without_what_the_tab_key_sets_it_says_what_is_missing(
    cli: Cli, variables: dict[str, str], words: str
) -> None:
    cli.env.update({"_PI_RECONCILER_COMPLETE": "bash_complete", **variables})
    told = cli.fails(2)
    assert f"and there is {words}: unset it" in told
    cli.env["_PI_RECONCILER_COMPLETE"] = "bash_source"
    assert cli().code == 0
