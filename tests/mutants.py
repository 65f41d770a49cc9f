"""Change the code of one room after the other, and see that its tests notice: `make mutants`.

mutmut does the changing, on a copy. What no test notices stands in ``mutants.toml``, each with
the reason; one that does not stand there fails the run. Not changed by mutmut: properties and
other decorated functions, and what stands outside of functions.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
EXPLAINED = Path(__file__).with_name("mutants.toml")
COPIED = ("reconciler", "tests", "fuzzing", "docs", "config", "README.md", "Makefile")

ROOMS = {
    "state": (["*"], ["test_state.py"]),
    "sessions": (["*"], ["test_state.py"]),
    "removal": (["*"], ["test_removal.py"]),
    "ladder": (["*"], ["test_ladder.py", "test_effects.py"]),
    "effects": (["*"], ["test_effects.py", "test_leftovers.py"]),
    "processes": (
        ["xǁTargetǁ*", "x_open_pidfd*", "x_has_exited*", "x__settle*"],
        ["test_processes.py"],
    ),
    "identity": (["*"], ["test_identity.py"]),
    "restarts": (["*"], ["test_state.py"]),
    "budget": (["*"], ["test_budget.py"]),
    "endings": (["*"], ["test_endings.py"]),
    "log_lines": (["*"], ["test_log_lines.py"]),
    "lines": (["*"], ["test_lines.py"]),
    "settings": (["*"], ["test_settings.py"]),
    "sources": (["*"], ["test_settings.py"]),
}
"""For each room which functions are changed, and the tests that must notice."""

SKIPPED = "not always_holds and not hides_is_not_dead"
"""Chance is slow here, and what runs as another user cannot read mutmut's files."""

CONFIG = """
[tool.mutmut]
source_paths = ["reconciler"]
only_mutate = ["reconciler/{room}.py"]
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:cacheprovider", "-k", "{skipped}"]
also_copy = {copied}
timeout_constant = 10.0
"""


class Survivor(NamedTuple):
    """A change that no test noticed: the line as it was, and as it became."""

    room: str
    was: str
    now: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"of {', '.join(ROOMS)}")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    given = parser.parse_args()
    if unknown := set(given.rooms) - ROOMS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(ROOMS)}")
    explained = {
        Survivor(each["room"], each["was"], each["now"])
        for each in tomllib.loads(EXPLAINED.read_text())["survivor"]
    }
    row = "{:<10} {:>8} {:>8} {:>10} {:>10} {:>8}".format
    if subprocess.run((*ALONE, "true"), check=False).returncode:
        parser.exit(2, f"a pid namespace is needed, and could not be had: {' '.join(ALONE)}\n")
    print(row("room", "mutants", "killed", "timed out", "explained", "new"))
    new = 0
    for room in given.rooms or ROOMS:
        fates, survivors = mutate(room, given.jobs)
        unknown_ones = [each for each in survivors if each not in explained]
        new += len(unknown_ones)
        total, known = sum(fates.values()), len(survivors) - len(unknown_ones)
        print(
            row(room, total, fates["killed"], fates["timeout"], known, len(unknown_ones)),
            flush=True,
        )
        for each in unknown_ones:
            print(f"- {each.was}\n+ {each.now}\n", flush=True)
    return 1 if new else 0


def mutate(room: str, jobs: int) -> tuple[collections.Counter[str], list[Survivor]]:
    """Let mutmut change a copy of one room: how many came to what, and those that survived."""
    which, tests = ROOMS[room]
    with tempfile.TemporaryDirectory(prefix="pi-mutants-") as place:
        for name in COPIED:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, Path(place, name))
        config = CONFIG.format(
            room=room,
            skipped=SKIPPED,
            tests=json.dumps([f"tests/{test}" for test in tests]),
            copied=json.dumps([name for name in COPIED if name != "reconciler"]),
        )
        Path(place, "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + config)
        ran = _mutmut(
            place,
            "run",
            "--max-children",
            str(jobs),
            *(f"reconciler.{room}.{name}" for name in which),
        )
        told = _mutmut(place, "results", "--all", "true")
        fates = dict(re.findall(r"(\S+): ([\w ]+)$", told, re.MULTILINE))
        fates = {name: fate for name, fate in fates.items() if fate != "not checked"}
        left = [name for name, fate in fates.items() if fate not in {"killed", "timeout"}]
        survivors = [_survivor(room, _mutmut(place, "show", name)) for name in left]
    if not fates:
        raise SystemExit(f"mutmut changed nothing in {room}:\n{ran[-4000:]}")
    return collections.Counter(fates.values()), survivors


ALONE = (
    *("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"),
    *(() if os.geteuid() == 0 else ("--user", "--map-root-user")),
    *("sh", "-c", '"$@"; exit $?', "sh"),  # the first process gets all orphans to wait for
)
"""A changed copy of what kills processes may kill any: it sees none but its own."""


def _mutmut(place: str, *arguments: str) -> str:
    command = (*ALONE, str(Path(sys.executable).with_name("mutmut")), *arguments)
    ran = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    if ran.returncode and arguments[0] != "run":
        raise SystemExit(f"{' '.join(command)} failed:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return ran.stdout


def _survivor(room: str, diff: str) -> Survivor:
    lines: dict[str, Any] = {"-": [], "+": []}
    for line in diff.splitlines():
        if line[:1] in lines and not line.startswith(("---", "+++")):
            lines[line[0]].append(line[1:].strip())
    return Survivor(room, " ".join(lines["-"]), " ".join(lines["+"]))


if __name__ == "__main__":
    sys.exit(main())
