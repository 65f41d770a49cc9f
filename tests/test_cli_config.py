from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WAIT
from test_cli import Cli, cli
from test_public_api import COMMAND, HEAVY, modules_after, packages

from reconciler.schema import KEYS

__all__ = ["cli"]

ROOT = Path(__file__).parent.parent


@pytest.fixture
def settings(cli: Cli) -> Path:
    """The settings file of the user, with something in it."""
    path = Path(cli.env["HOME"]) / ".config" / "pi-reconciler" / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("resync = 30\n[log]\nlevel = 'warning'\n")
    return path


def test_show_tells_every_key_and_who_says_it(cli: Cli, settings: Path) -> None:
    cli.env["PI_RECONCILER_LOG_LEVEL"] = "debug"
    ended = cli("config", "show")
    rows = [re.split(r" {2,}", line) for line in ended.out.splitlines()]
    assert rows[0] == ["KEY", "VALUE", "FROM"]
    assert [row[0] for row in rows[1:]] == list(KEYS)
    assert ["resync", "30.0", "file"] in rows
    assert ["log.level", '"debug"', "variable PI_RECONCILER_LOG_LEVEL"] in rows
    assert ["log.form", '"auto"', "default"] in rows
    assert ended.err == ""
    told = cli("config", "show", "--json").json
    assert told["file"] == str(settings)
    assert told["file_exists"] is True
    assert told["settings"]["resync"] == {
        "value": 30.0,
        "from": "file",
        "source": str(settings),
        "default": 60.0,
        "allowed": "seconds above 0, 86400 at most",
        "variable": "PI_RECONCILER_RESYNC",
        "sighup": True,
    }


def test_show_changed_leaves_out_what_is_as_delivered(cli: Cli, tmp_path: Path) -> None:
    shown = cli("config", "show", "--changed", "--sessions-dir", tmp_path).out.splitlines()
    assert [re.split(r" {2,}", line) for line in shown[1:]] == [
        ["sessions_dir", json.dumps(str(tmp_path)), "flag --sessions-dir"]
    ]
    assert "variable PI_RECONCILER_SESSIONS_DIR" in cli("config", "show", "--changed").out
    assert cli("config", "show", "--changed", "--json").json["settings"].keys() == {"sessions_dir"}


def test_show_refuses_bad_settings_as_every_command_does(cli: Cli, settings: Path) -> None:
    settings.write_text("resink = 1")
    assert "resink is no setting (did you mean resync?)" in cli.fails(78, "config", "show")
    cli.env["PI_RECONCILER_LOG_LEVL"] = "debug"
    settings.write_text("")
    assert "PI_RECONCILER_LOG_LEVL is no setting" in cli.fails(78, "ls")


def test_check_tells_each_problem_on_a_line_of_its_own(cli: Cli, settings: Path) -> None:
    bad = settings.parent / "bad.toml"
    bad.write_text("resink = 1\nagent_command = 's3cret'\n[log]\nlevel = 'loud'\n")
    ended = cli("config", "check", bad)
    assert ended.code == 78
    assert [line.partition(" is ")[0] for line in ended.out.splitlines()] == [
        f"{bad}: resink",
        f"{bad}: agent_command",
        f"{bad}: log.level",
    ]
    assert "s3cret" not in ended.out + ended.err
    told = cli("config", "check", bad, "--json")
    assert told.code == 78
    assert told.json == {"file": str(bad), "problems": ended.out.splitlines()}


def test_check_of_what_is_right_is_0(cli: Cli, settings: Path) -> None:
    assert cli("config", "check").out == f"{settings}: no problem\n"
    assert cli("config", "check", "--quiet").out == ""
    assert cli("config", "check", "--json").json == {"file": str(settings), "problems": []}
    assert cli("config", "check", ROOT / "config" / "pi-reconciler.toml").code == 0


def test_check_looks_at_the_variables_unless_a_file_is_named(cli: Cli, settings: Path) -> None:
    cli.env["PI_RECONCILER_RESYNC"] = "0"
    ended = cli("config", "check")
    assert (ended.code, ended.out.partition(" is ")[0]) == (78, "environment: PI_RECONCILER_RESYNC")
    assert cli("config", "check", settings).code == 0
    assert cli("config", "check", settings.parent / "none.toml").code == 78


def test_schema_prints_the_published_file(cli: Cli) -> None:
    published = ROOT / "config" / "pi-reconciler.schema.json"
    assert cli("config", "schema").out == published.read_text()


def test_path_says_which_file_is_read(cli: Cli, settings: Path) -> None:
    assert cli("config", "path").out == f"{settings}\n"
    assert cli("config", "path", "--config", "other.toml").out == "other.toml\n"
    assert cli("config", "path", env={"PI_RECONCILER_CONFIG": "/x.toml"}).out == "/x.toml\n"


def test_config_alone_explains_itself(cli: Cli) -> None:
    ended = cli("config")
    assert ended.code == 2
    assert "check" in ended.out


@pytest.mark.parametrize("command", ["show", "check", "schema", "path"])
def test_each_explains_itself_with_an_example(cli: Cli, command: str) -> None:
    assert "pi-reconciler" in cli("config", command, "--help").out.partition("Options:")[0]


def test_where_the_file_is_needs_nothing_that_reads_it() -> None:
    assert packages(modules_after(COMMAND, "config", "path")) & HEAVY == {"click"}


def test_the_page_of_settings_shows_what_comes_out(cli: Cli, tmp_path: Path) -> None:
    del cli.env["PI_RECONCILER_SESSIONS_DIR"]
    page = (ROOT / "docs" / "settings.md").read_text()
    (tmp_path / "bad.toml").write_text("resink = 30\n[policy]\nsettle = -1\n")
    (tmp_path / "pi-reconciler").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m reconciler "$@"\n'
    )
    (tmp_path / "pi-reconciler").chmod(0o755)
    blocks = re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for command, said in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", "".join(blocks), re.MULTILINE):
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=tmp_path,
            env={**cli.env, "PATH": f"{tmp_path}:{cli.env['PATH']}"},
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )
        assert done.stdout + done.stderr == said, command
