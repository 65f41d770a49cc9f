"""`--dry-run` of the client commands: the same refusals, and nothing done."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    HUNG,
    PROGRAM,
    WAIT,
    alive,
    asynchronous,
    program_environment,
    stale_pair,
)

from reconciler import KeeperManager
from reconciler.requests import default_environment


def run(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    name, *others = arguments
    return subprocess.run(
        (*PROGRAM, name, "--sessions-dir", str(folder), *others),
        check=False,
        capture_output=True,
        text=True,
        env=program_environment(folder),
        input=stdin,
        timeout=WAIT,
    )


def entries(folder: Path) -> dict[str, tuple[int, int]]:
    """What stands in a folder, with what would show a change."""
    return {path.name: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in folder.iterdir()}


AGENT = ("--", "sh", "-c", "exec cat")


def test_spawn_tells_what_it_would_start_and_starts_nothing(folder: Path) -> None:
    shown = run(folder, "spawn", "demo", "--dry-run", "--cwd", "/tmp", *AGENT)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == "would start demo: /usr/bin/sh in /tmp\n".replace(
        "/usr/bin/sh", found("sh")
    )
    told = json.loads(run(folder, "spawn", "--dry-run", "--json", "--cwd", "/tmp", *AGENT).stdout)
    assert told == {
        "dry_run": True,
        "sid": None,
        "agent_program": found("sh"),
        "cwd": "/tmp",
        "socket": None,
        "first": [],
    }
    assert entries(folder) == {}


def found(program: str) -> str:
    which = subprocess.run(("sh", "-c", f"command -v {program}"), check=True, capture_output=True)
    return which.stdout.decode().strip()


def test_spawn_tells_that_it_would_make_the_folder_and_makes_none(
    folder: Path,
) -> None:
    place = folder / "a" / "b"
    shown = run(place, "spawn", "demo", "--dry-run", *AGENT)
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"would make the folder {place}\nwould start demo: ")
    assert entries(folder) == {}


def test_spawn_tells_that_it_would_replace_what_is_stale(folder: Path) -> None:
    stale_pair(folder, "demo")
    before = entries(folder)
    told = json.loads(run(folder, "spawn", "demo", "--dry-run", "--json", *AGENT).stdout)
    assert told["first"] == ["remove socket, pid_file"]
    assert told["socket"] == str(folder / "demo.rpc.sock")
    assert entries(folder) == before


REFUSED: tuple[tuple[str, ...], ...] = (
    ("spawn", "../x", *AGENT),
    ("spawn", "demo", "--cwd", "/nonexistent", *AGENT),
    ("spawn", "demo", "--", "no-such-agent"),
    ("spawn", "taken", *AGENT),
    ("spawn", "hostile", *AGENT),
    ("stop", "none"),
    ("stop",),
    ("write", "none", "{}"),
    ("write", "taken", "a\nb"),
    ("write", "taken", "{}", "--key", ""),
    ("write", "taken", "{}", "more"),
    ("write", "stale", "{}"),
)


@asynchronous
async def test_what_is_refused_is_refused_the_same_way(
    manager: KeeperManager, folder: Path
) -> None:
    await manager.spawn("taken", agent_command=HUNG)
    stale_pair(folder, "stale")
    (folder / "hostile.rpc.sock").symlink_to("/nonexistent")
    before = entries(folder)
    for command in REFUSED:
        name, *others = command
        dry = run(folder, name, "--dry-run", *others)
        real = run(folder, *command)
        assert dry.returncode != 0, command
        assert (dry.returncode, dry.stdout) == (real.returncode, ""), command
        same = dry.stderr.split(" ms", maxsplit=1)[0] == real.stderr.split(" ms", maxsplit=1)[0]
        assert same, (command, dry.stderr, real.stderr)
    assert entries(folder) == before


def test_a_folder_that_is_not_trusted_or_cannot_be_made_is_refused_as_well(
    tmp_path: Path, folder: Path
) -> None:
    folder.chmod(0o777)
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    stale_pair(folder, "demo")
    for place, command in (
        (folder, ("spawn", "demo", *AGENT)),
        (folder, ("stop", "demo")),
        (folder, ("write", "demo", "{}")),
        (tmp_path / "file" / "sessions", ("spawn", "demo", *AGENT)),
    ):
        name, *others = command
        dry, real = run(place, name, "--dry-run", *others), run(place, *command)
        assert dry.returncode == real.returncode != 0, command
        assert dry.stderr == real.stderr
    shown = run(tmp_path / "open" / "sessions", "spawn", "demo", "--dry-run", *AGENT)
    assert shown.returncode == 1
    assert "cannot be trusted" in shown.stderr
    assert not (tmp_path / "open" / "sessions").exists()
    assert run(tmp_path / "open" / "sessions", "spawn", "demo", *AGENT).returncode == 1


@asynchronous
async def test_stop_tells_what_it_would_end_and_ends_nothing(
    manager: KeeperManager, folder: Path
) -> None:
    agent = ("sh", "-c", "setsid sleep 600 & exec cat > /dev/null")
    spawned = await manager.spawn("demo", agent_command=agent, env=default_environment())
    stale_pair(folder, "stale")
    before = entries(folder)
    told = {each["sid"]: each for each in as_json(folder, "stop", "--all")}
    demo = told["demo"]
    (leftover,) = demo["leftovers"]
    assert (demo["keeper_pid"], demo["agent_pid"]) == (spawned.keeper_pid, spawned.agent_pid)
    assert demo["files"] == ["demo.rpc.sock", "demo.rpc.sock.pi-pid", "demo.rpc.sock.pid"]
    assert told["stale"]["files"] == ["stale.rpc.sock", "stale.rpc.sock.pid"]
    assert as_json(folder, "stop", "demo", "--leave")[0]["leftovers"] == []
    shown = run(folder, "stop", "demo", "--dry-run").stdout
    assert shown == (
        f"would stop demo: end keeper {spawned.keeper_pid}, end agent {spawned.agent_pid}, "
        f"end {leftover}, which it has started, "
        "see demo.rpc.sock, demo.rpc.sock.pi-pid, demo.rpc.sock.pid gone\n"
    )
    assert entries(folder) == before
    assert all(map(alive, (spawned.keeper_pid, spawned.agent_pid or 0, leftover)))
    await manager.stop("demo")


def as_json(folder: Path, *command: str) -> list[dict[str, Any]]:
    shown = run(folder, *command, "--dry-run", "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    result: list[dict[str, Any]] = json.loads(shown.stdout)
    return result


@asynchronous
async def test_write_checks_the_lines_and_asks_the_keeper_and_writes_nothing(
    manager: KeeperManager, folder: Path, tmp_path: Path
) -> None:
    got = tmp_path / "got"
    agent = ("sh", "-c", f"exec cat > {got}")
    await manager.spawn("demo", agent_command=agent, env=default_environment())
    shown = run(folder, "write", "demo", '{"a":1}', "--dry-run")
    assert (shown.returncode, shown.stdout) == (0, "would write 8 bytes in 1 line to demo\n")
    shown = run(folder, "write", "demo", "-", "--dry-run", "--json", stdin='{"a":1}\n\n{"b":22}\n')
    told = json.loads(shown.stdout)
    assert (told["dry_run"], told["outcome"], told["total"], told["size"]) == (
        True,
        "delivered",
        2,
        17,
    )
    shown = run(folder, "write", "demo", "-", "--dry-run", stdin='{"a":1}\nx\0y\n')
    assert shown.returncode == 2
    assert "line 2 of standard input: the message has a NUL inside" in shown.stderr
    run(folder, "write", "demo", "last")
    assert got.read_text() == "last\n"
    await manager.stop("demo")


@pytest.mark.parametrize("command", ["spawn", "stop", "write", "run"])
def test_the_help_tells_of_it(folder: Path, command: str) -> None:
    assert "--dry-run" in run(folder, command, "--help").stdout
