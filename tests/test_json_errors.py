"""With --json whatever fails is JSON on standard output, too: one rule for all commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from terminal import Terminal
from test_cli import LINE, Cli
from test_cli import cli as cli  # noqa: PLC0414 - a fixture
from test_status import terminal as terminal  # noqa: PLC0414 - a fixture

from reconciler import __all__ as public
from reconciler import errors
from reconciler.cli import cli as group
from reconciler.console import kind_of

# FILE is a file where a folder should be, BAD a settings file that is no good.
FAILURES = (
    ("spawn demo --json -- no-such-agent", 1, "agent_not_found"),
    ("spawn ../x --json -- cat --json", 2, "invalid_session_id"),
    ("spawn demo --cwd FILE --json -- cat", 2, "invalid_request"),
    ("write none {} --json", 3, "no_such_session"),
    ("ls --json --sessions-dir FILE/x", 1, "folder"),
    ("inspect none --json", 3, "no_such_session"),
    ("inspect --json", 2, "usage"),
    ("logs none --json", 3, "no_such_session"),
    ("logs none --bogus --json", 2, "usage"),
    ("stop none --json", 3, "no_such_session"),
    ("stop none --dry-run --json", 3, "no_such_session"),
    ("restart none --json", 3, "no_such_session"),
    ("status --json --config BAD", 78, "bad_settings"),
    ("events ../x --json", 2, "invalid_session_id"),
    ("service status more --json", 2, "usage"),
    ("config show --json --config BAD", 78, "bad_settings"),
    ("config check --json one two", 2, "usage"),
    ("doctor more --json", 2, "usage"),
    ("demo more --json", 2, "usage"),
    ("no-such-command --json", 2, "usage"),
)


def with_json(command: click.Command, name: str = "") -> Iterator[str]:
    """The commands that have --json."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for each in command.list_commands(context):
            found = command.get_command(context, each)
            assert found is not None
            yield from with_json(found, f"{name} {each}".strip())
    elif any(each.name == "as_json" for each in command.params):
        yield name


def test_none_is_left_out() -> None:
    for name in with_json(group):
        assert any(line.startswith(f"{name} ") for line, _, _ in FAILURES), name


@pytest.mark.parametrize(("line", "code", "kind"), FAILURES)
def test_a_failure_is_json_too(cli: Cli, tmp_path: Path, line: str, code: int, kind: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "bad.toml").write_text("resync = -1")
    line = line.replace("FILE", str(tmp_path / "file")).replace("BAD", str(tmp_path / "bad.toml"))
    ended = cli(*line.split())
    (told,) = ended.json if isinstance(ended.json, list) else [ended.json]
    assert (ended.code, told["kind"]) == (code, kind)
    assert ended.err == f"pi-reconciler: {told['error']}\n"
    plain = cli(*(word for word in line.split() if word != "--json"))
    assert (plain.code, plain.err) == (code, ended.err)
    assert plain.out == ""


def test_what_else_is_known_stands_beside_it(cli: Cli) -> None:
    told = cli("write", "none", LINE, "--json").json
    assert (told["outcome"], told["reason"], told["unsent"]) == ("not_delivered", "no_socket", 1)
    cli.spawn("here")
    ended = cli("restart", "here", "none", "--json")
    assert ended.code == 1
    assert [(each["restarted"], each["kind"]) for each in ended.json] == [
        (False, "not_kept"),
        (False, "no_such_session"),
    ]


def test_what_comes_after_the_dashes_is_the_agents(cli: Cli) -> None:
    assert cli("spawn", "demo", "--", "no-such-agent", "--json").out == ""


def test_on_a_terminal(terminal: Terminal) -> None:
    terminal.type("pi-reconciler inspect none --json; echo code $?")
    screen = terminal.shows("code 3")
    assert (
        json.loads(screen[screen.index("{") : screen.index("}") + 1])["kind"] == "no_such_session"
    )
    assert "pi-reconciler: no session none in" in screen


@pytest.mark.parametrize("nowhere", ["> /dev/full", ">&-"])
def test_who_cannot_be_told_gets_the_exit_code(cli: Cli, nowhere: str) -> None:
    shell = f"exec {sys.executable} -m reconciler inspect none --json {nowhere}"
    done = subprocess.run(["sh", "-c", shell], env=cli.env, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 3
    assert re.fullmatch(rb"pi-reconciler: no session none [^\n]+\n", done.stderr)


def test_every_error_of_the_library_has_its_word_on_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text()
    words = set(re.findall(r"`(\w+)`", page.partition("| `kind` |")[2].partition("More words")[0]))
    for name in public:
        kind = getattr(errors, name, None)
        if kind is not None and issubclass(kind, errors.ReconcilerError):
            assert kind is errors.ReconcilerError or kind_of(kind("")) in words
