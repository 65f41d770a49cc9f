from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import pytest
from conftest import SINK, WAIT

import reconciler
from reconciler import KeeperManager
from reconciler.cli import cli

ROOT = Path(__file__).parent.parent


_TELLING = """
import sys, json
before = set(sys.modules)
CODE
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def modules_after(
    code: str, *arguments: str, variables: Mapping[str, str] = MappingProxyType({})
) -> set[str]:
    """The modules that a process has imported after some code, beside those of a bare one."""
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-c"),
            _TELLING.replace("CODE", code),
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
        # Without coverage in the process: it imports modules of its own.
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HOME": str(ROOT / "none"),
            **variables,
        },
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


# -- Names ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reconciler.__all__)
def test_every_public_name_can_be_had_and_explains_itself(name: str) -> None:
    value = getattr(reconciler, name)
    assert getattr(reconciler, name) is value
    assert name in dir(reconciler)
    if inspect.isclass(value):
        assert value.__module__.startswith("reconciler.")
        assert value.__doc__


def test_a_star_import_brings_them_all_and_no_more() -> None:
    space: dict[str, Any] = {}
    exec("from reconciler import *", space)  # noqa: S102 - allowed at the top of a module alone
    assert set(space) - {"__builtins__"} == set(reconciler.__all__)


def test_the_names_for_type_checkers_are_those_for_the_interpreter() -> None:
    source = (ROOT / "reconciler" / "__init__.py").read_text()
    told = {
        line.rpartition(" as ")[2]
        for line in source.splitlines()
        if line.startswith("    from reconciler.")
    }
    assert told == set(reconciler.__all__)


def test_a_name_that_is_none_is_the_usual_error() -> None:
    with pytest.raises(AttributeError, match="module 'reconciler' has no attribute 'Nothing'"):
        getattr(reconciler, "Nothing")  # noqa: B009 - a type checker knows that it is not there


FOR_THE_ROOMS = {"Probe", "Folder", "KeeperRequest"}
"""What methods without an underscore give that only our own rooms call."""

FACTS = {"Observation", "Plan"}
"""What these are made of is found in their own rooms."""


def test_what_public_classes_hold_and_answer_has_a_public_name_too() -> None:
    shown: set[str] = set()
    for name in reconciler.__all__:
        value = getattr(reconciler, name)
        if inspect.isclass(value) and name not in FACTS:
            shown |= ours_in(inspect.get_annotations(value), vars(sys.modules[value.__module__]))
            for method in vars(value).values():
                if inspect.isfunction(method) and not method.__name__.startswith("_"):
                    given = {"return": method.__annotations__["return"]}
                    shown |= ours_in(given, method.__globals__)
    assert "Finding" in shown
    assert shown - FOR_THE_ROOMS <= set(reconciler.__all__)


def ours_in(hints: dict[str, str], space: dict[str, Any]) -> set[str]:
    """Our own classes that annotations name."""
    words = {
        word
        for key, hint in hints.items()
        if not key.startswith("_")
        for word in re.findall(r"\w+", hint)
    }
    return {
        word
        for word in words
        if inspect.isclass(found := space.get(word)) and found.__module__.startswith("reconciler.")
    }


def test_every_error_is_caught_by_the_base_or_is_a_value_error() -> None:
    for name in reconciler.__all__:
        value = getattr(reconciler, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            assert name.endswith("Error")
            assert issubclass(
                value, (reconciler.ReconcilerError, ValueError, reconciler.StreamBrokenError)
            )


def test_the_version_is_the_distributions() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{reconciler.__version__}"\n' in text


# -- What an import costs ----------------------------------------------------------------------

HEAVY = {
    *("asyncio", "click", "msgspec", "platformdirs", "prometheus_client", "psutil", "rich"),
    *("structlog", "tenacity", "watchdog"),
}


def test_the_bare_import_imports_nothing_else() -> None:
    modules = modules_after("import reconciler")
    assert not packages(modules) & HEAVY
    assert {m for m in modules if m.startswith("reconciler")} == {"reconciler"}
    assert len(modules) < 25, modules


@pytest.mark.parametrize(
    ("name", "not_needed"),
    [
        ("RpcWriter", HEAVY),
        ("Verdict", HEAVY),
        ("NoSuchSessionError", HEAVY),
        ("KeeperManager", HEAVY - {"asyncio", "msgspec"}),
    ],
)
def test_a_name_imports_what_it_needs_alone(name: str, not_needed: set[str]) -> None:
    assert not packages(modules_after(f"from reconciler import {name}")) & not_needed


@pytest.fixture
def demo(folder: Path) -> Path:
    """A folder with a session in it."""
    import asyncio  # noqa: PLC0415 - here alone

    asyncio.run(KeeperManager(folder).spawn("demo", agent_command=SINK))
    return folder


COMMAND = (
    "from reconciler.cli import cli\n"
    "cli.main(sys.argv[1:], prog_name='pi-reconciler', standalone_mode=False)"
)


WRITER = (
    "rpc_writer",
    "exchanges",
    "lanes",
    "link",
    "peers",
    "waiting",
    "messages",
    "accounts",
    "deliveries",
    "trust",
)


def test_write_imports_the_writer_and_little_else(demo: Path) -> None:
    line = '{"type":"get_state","id":"1"}'
    modules = modules_after(COMMAND, "write", "demo", line, "--sessions-dir", str(demo))
    assert packages(modules) & HEAVY == {"click"}, "tenacity comes where a first try failed"
    assert {m for m in modules if m.startswith("reconciler.")} == {
        f"reconciler.{room}"
        for room in (
            *("cli", "commands", "commands.write", "console", "errors", "layout", "settings"),
            *WRITER,
        )
    }


BUDGETS = re.findall(
    r"^\| `pi-reconciler ([^`]+)` \| (\d+) \| ([^|]*) \|$",
    (ROOT / "docs" / "performance.md").read_text(),
    re.MULTILINE,
)
"""A command line, how many modules it may import beside click's, and which of the heavy ones."""


@pytest.mark.parametrize(("line", "most", "heavy"), BUDGETS)
def test_a_client_command_stays_within_its_budget(
    demo: Path, line: str, most: str, heavy: str
) -> None:
    run, end = COMMAND.splitlines()[1], "\nexcept SystemExit: pass"
    code = f"{COMMAND.splitlines()[0]}\ntry:\n    {run}{end}"
    before, dashes, agent = line.replace("SID", "demo").partition(" -- ")
    arguments = [*before.split(), "--sessions-dir", str(demo)]
    modules = modules_after(code, *arguments, *([dashes.strip(), agent] if agent else []))
    assert packages(modules) & HEAVY <= {"click", *re.findall(r"\w+", heavy)}
    click = modules_after("import click; click.echo()")
    assert len(modules - click) <= int(most), sorted(modules - click)


def test_every_command_but_those_that_last_has_a_budget() -> None:
    lasting = {"run", "demo"}
    names = {name for name in cli.list_commands(click.Context(cli)) if name not in lasting}
    assert {line.split()[0] for line, _, _ in BUDGETS} == names


def test_completing_a_session_looks_at_no_process(demo: Path) -> None:
    code = (
        "import os, sys\n"
        "os.environ.update(_PI_RECONCILER_COMPLETE='bash_complete', COMP_CWORD='2')\n"
        "os.environ['COMP_WORDS'] = 'pi-reconciler write '\n"
        "os.environ['PI_RECONCILER_SESSIONS_DIR'] = sys.argv[1]\n"
        "from reconciler.cli import cli\n"
        "try: cli.main([], prog_name='pi-reconciler')\n"
        "except SystemExit: pass"
    )
    modules = modules_after(code, str(demo))
    assert "click.shell_completion" in modules
    assert packages(modules) & HEAVY == {"click"}


def test_the_daemon_imports_nothing_that_draws_encrypts_exposes_or_is_for_other_systems(
    folder: Path,
) -> None:
    modules = modules_after(COMMAND, "run", "--once", "--sessions-dir", str(folder))
    assert not packages(modules) & {"rich", "ssl", "prometheus_client", "platformdirs", "psutil"}
    assert {"asyncio", "structlog", "watchdog"} <= packages(modules)


def test_help_imports_no_room_that_works() -> None:
    modules = modules_after(
        "from reconciler.cli import cli\n"
        "cli.main(['run', '--help'], prog_name='pi-reconciler', standalone_mode=False)"
    )
    assert packages(modules) & HEAVY == {"click"}


def test_a_settings_file_costs_only_where_there_is_one(demo: Path, tmp_path: Path) -> None:
    settings = tmp_path / "config.toml"
    settings.write_text("resync = 30\n")
    line = '{"type":"get_state","id":"1"}'
    arguments = ["write", "demo", line, "--sessions-dir", str(demo)]
    modules = modules_after(COMMAND, *arguments, "--config", str(settings))
    assert "reconciler.schema" in modules
    assert packages(modules) & HEAVY == {"click", "msgspec"}, "nothing that logs or waits"
    variable = {"PI_RECONCILER_RESYNC": "30"}
    assert "reconciler.schema" in modules_after(COMMAND, *arguments, variables=variable)


def test_the_variables_that_are_often_set_cost_nothing(demo: Path) -> None:
    line = '{"type":"get_state","id":"1"}'
    variables = {"PI_RECONCILER_SESSIONS_DIR": str(demo), "PI_RECONCILER_SESSION": "outer"}
    modules = modules_after(COMMAND, "write", "demo", line, variables=variables)
    assert not packages(modules) & {"msgspec", "tomllib"}


def test_no_room_imports_the_keeper_process() -> None:
    rooms = ("cli", "controller", "keeper", "schema", "screens", "sync", "testing")
    modules = modules_after("import " + ", ".join(f"reconciler.{room}" for room in rooms))
    assert "reconciler.keeper_process" not in modules
