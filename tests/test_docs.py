"""What the README shows is what comes out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import WAIT, end_all, until

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
END = "--- end of output ---"
AGENT = ROOT / ".tools" / "agent" / "node_modules" / ".bin"


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def commands(page: str = README) -> list[tuple[str, str]]:
    """A page's commands, as pairs of a command and what it prints."""
    parts = re.split(r"^\$ ", "".join(blocks("console", page)), flags=re.MULTILINE)[1:]
    return [(command, said) for command, _, said in (part.partition("\n") for part in parts)]


def plain(text: str, home: Path) -> str:
    """Without what differs each time: pids, ages, and where home is."""
    text = text.replace(str(home), "HOME").replace("/home/you", "HOME")
    return re.sub(r" +", " ", re.sub(r"\d+", "N", text)).strip()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    end_all(tmp_path / ".pi" / "dashboard" / "sessions")


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PI_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return inherited | {"HOME": str(home), "PATH": path, "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs are of an empty environment into which the wheel was installed."""
    place = tmp_path_factory.mktemp("wheel")
    python = place / "env" / "bin" / "python"
    for command in (
        (sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", place),
        (sys.executable, "-m", "venv", place / "env"),
    ):
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
    return python.parent


TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()


@pytest.mark.agent
@pytest.mark.timeout(600)  # what the wheel needs is fetched
@pytest.mark.parametrize(
    ("page", "where"), [(README, "here"), (README, "installed"), (TUTORIAL, "here")]
)
def test_the_tour(
    home: Path, environment: dict[str, str], page: str, where: str, request: pytest.FixtureRequest
) -> None:
    """What comes out is what the page shows: of this tree, and of its wheel elsewhere."""
    if not (AGENT / "pi").exists():
        assert not os.environ.get("CI"), "CI must have the real agent: make agent"
        pytest.skip("the real pi agent is not installed: make agent (needs npm)")
    programs = Path(sys.executable).parent
    if where == "installed":
        programs = request.getfixturevalue("installed")
    environment["PATH"] = f"{programs}:{AGENT}:{environment['PATH']}"
    log = home / "run.log"
    with log.open("wb") as stdout:
        daemon = subprocess.Popen(
            [programs / "pi-reconciler", "run"], env=environment, stdout=stdout
        )
    shell = subprocess.Popen(
        ["bash"],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        until(lambda: "reconciler.started" in log.read_text())
        for command, said in commands(page):
            said_to = command.replace("/tmp", str(home)).replace("$PWD/.venv/bin", str(programs))
            assert comes_out(shell, said_to, plain(said, home), home) == plain(said, home), command
            if command.startswith("kill"):  # a person is slower than this loop
                until(lambda: '"session.cleaned"' in log.read_text())
    finally:
        shell.kill()
        shell.communicate()
        daemon.terminate()
        assert daemon.wait(20) == 0
    if shown := set(re.findall(r'"(\w+)":', "".join(blocks("json", page)))):
        line = next(line for line in log.read_text().splitlines() if "session.cleaned" in line)
        assert set(re.findall(r'"(\w+)":', line)) == shown


def comes_out(shell: subprocess.Popen[str], command: str, wanted: str, home: Path) -> str:
    """What a command prints; one that the page sleeps before is run until it prints that."""
    command, pauses = re.subn(r"^sleep \d+; ", "", command)
    give_up = time.monotonic() + WAIT
    while True:
        printed = plain(run(shell, command), home)
        if printed == wanted or not pauses or time.monotonic() > give_up:
            return printed


def run(shell: subprocess.Popen[str], command: str) -> str:
    """One command in the shell that stays open; what it printed."""
    assert shell.stdin is not None
    assert shell.stdout is not None
    shell.stdin.write(f"{command}\necho '{END}'\n")
    shell.stdin.flush()
    printed: list[str] = []
    for line in shell.stdout:
        if line.strip() == END:
            return "".join(printed)
        printed.append(line)
    pytest.fail(f"the shell ended in: {command}")


def test_the_library_example(home: Path, environment: dict[str, str]) -> None:
    (example,) = blocks("python")
    assert printed_by(example.replace("/tmp", str(home)), home, environment) == "delivered\n"


SCENE = """
import asyncio
from reconciler.sync import KeeperManager

sid = KeeperManager().spawn(agent_command=["cat"]).sid

async def main() -> None:
{example}
    print(delivery.outcome.value)

asyncio.run(main())
KeeperManager().stop(sid)
"""


def test_the_delivery_example(home: Path, environment: dict[str, str]) -> None:
    (example,) = blocks("python", (ROOT / "docs" / "delivery.md").read_text())
    script = SCENE.format(example=textwrap.indent(example, "    "))
    assert printed_by(script, home, environment) == "delivered\n"


def printed_by(script: str, home: Path, environment: dict[str, str]) -> str:
    """What a script that ends well prints."""
    path = home / "example.py"
    path.write_text(script)
    ran = subprocess.run(
        [sys.executable, "-W", "error", path],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    broken = [
        f"{page.name}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#]+)", page.read_text())
        if not link.startswith("http") and not (page.parent / link).exists()
    ]
    assert broken == []


def test_the_two_commands_are_there() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"run", "test"} <= set(targets)
    assert {line.split()[1] for line in blocks("sh")[0].splitlines() if line} == {"run", "test"}


@pytest.mark.parametrize(("page", "at_least"), [("security.md", 40), ("reliability.md", 30)])
def test_every_test_that_a_page_names_is_there(page: str, at_least: int) -> None:
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", (ROOT / "docs" / page).read_text())
    missing = [
        f"{module}.py::{test}"
        for module, test in named
        if not re.search(rf"^(async )?def {test}\(", text_of(module), re.MULTILINE)
    ]
    assert missing == []
    assert len(named) > at_least


def text_of(module: str) -> str:
    path = ROOT / "tests" / f"{module}.py"
    return path.read_text() if path.exists() else ""
