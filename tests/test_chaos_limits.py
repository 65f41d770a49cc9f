"""Descriptors, inotify instances and watches run out, or there is no pidfd at all."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import Fault
from conftest import SINK, program_environment, stale_pair, until
from hampered import Hampered, all_goes, bystanders, gone, leave, left_by, spawn_all

from reconciler.keeper import KeeperManager

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux"),
    pytest.mark.skipif(shutil.which("node") is None, reason="node is missing"),
]

CHECKED = "stale cleaned, orphans ended, nothing alive harmed, told once"

FEW = 64
"""Descriptors that the daemon may have: fewer than one for each session."""

_NO_PIDFD = """
import ctypes, os, struct, sys

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

# One look at the number of the system call; pidfd_open is 434 on every architecture.
NUMBER, EQUAL, ANSWER = 0x20, 0x15, 0x06
ALLOWED, NOT_THERE = 0x7FFF0000, 0x00050000 | 38
steps = [(NUMBER, 0, 0, 0), (EQUAL, 0, 1, 434), (ANSWER, 0, 0, NOT_THERE), (ANSWER, 0, 0, ALLOWED)]
text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = Program(len(steps), ctypes.addressof(text))
libc = ctypes.CDLL(None)
no_new_privileges, seccomp, filter_mode = 38, 22, 2
assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
assert libc.prctl(seccomp, filter_mode, ctypes.byref(program), 0, 0) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Becomes a program for which pidfd_open does not exist (ENOSYS), as on Linux before 5.3."""


def leave_inside(daemon: Hampered, folder: Path, name: str) -> tuple[list[str], list[int]]:
    """The same, in the user namespace of the daemon: it cannot look at others closely."""
    code = (
        "import hampered, json, pathlib, sys\n"
        "folder, name = sys.argv[1:]\n"
        "print(json.dumps(hampered.leave(pathlib.Path(folder), name)))"
    )
    text = inside(daemon, sys.executable, "-c", code, str(folder), name)
    sids, pids = json.loads(text)
    return sids, pids


@pytest.mark.chaos("descriptors run out", CHECKED)
@pytest.mark.parametrize(
    ("crowd", "hard"), [(FEW + 6, FEW), (FEW // 3, 4096)], ids=["hard", "lifted"]
)
def test_descriptors(fault: Fault, folder: Path, tmp_path: Path, crowd: int, hard: int) -> None:
    before = ("prlimit", f"--nofile={hard}:{hard}")
    with (
        bystanders(KeeperManager(folder), tmp_path / "told") as those,
        Hampered(folder, tmp_path / "log", before=before, options=("--resync", "1")) as daemon,
    ):
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (FEW, hard))
        sids = [f"crowd{number}" for number in range(crowd)]
        spawn_all(KeeperManager(folder), dict.fromkeys(sids, SINK))
        until(lambda: daemon.told("exits.polled"), "it says that it polls")
        for number in fault.rounds(short=1, full=5):
            all_goes(fault, folder, leave(folder, f"round{number}"))
            those.unharmed(fault)
        fault.holds(len(daemon.told("exits.polled")) == 1, "told once")
        fault.holds(not daemon.told("folder.half_read"), "all could be looked at")
        fault.holds(not daemon.told("session.unverifiable"), "everybody could be told")
        fault.holds(left_by(folder, sids), "the crowd lives")
        if hard > FEW:
            resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
            until(lambda: len(daemon.descriptors("[pidfd]")) >= 2 * crowd, "pidfds again")


@pytest.mark.chaos("no pidfd", CHECKED)
def test_no_pidfd(fault: Fault, folder: Path, tmp_path: Path) -> None:
    before = (sys.executable, "-I", "-S", "-c", _NO_PIDFD)
    with (
        bystanders(KeeperManager(folder), tmp_path / "told") as those,
        Hampered(folder, tmp_path / "log", before=before) as daemon,
    ):
        for number in fault.rounds(short=1, full=10):
            all_goes(fault, folder, leave(folder, f"round{number}"))
            those.unharmed(fault)
        fault.holds(not daemon.descriptors("[pidfd]"), "there is no pidfd")
        fault.holds(len(daemon.told("exits.polled")) == 1, "told once")


def inside(daemon: Hampered, *command: str) -> str:
    """Run a command in the user namespace of the daemon; what it says."""
    enter = ("nsenter", "--preserve-credentials", "--user", f"--target={daemon.process.pid}")
    environment = program_environment(daemon.folder)
    return subprocess.check_output((*enter, *command), env=environment, text=True)


def limit(name: str, value: int) -> tuple[str, ...]:
    """Sets a limit of the user namespace that it runs in, then becomes another program."""
    return ("sh", "-c", f'echo {value} > /proc/sys/user/{name}; exec "$@"', "sh")


def watches(daemon: Hampered) -> int:
    """How many inotify watches the daemon has, as the kernel says it."""
    base = Path(f"/proc/{daemon.process.pid}/fdinfo")
    return sum((base / name).read_text().count("wd:") for name in daemon.descriptors("inotify"))


@pytest.mark.chaos("inotify runs out", CHECKED)
@pytest.mark.parametrize(
    ("name", "low"),
    [("max_inotify_instances", 0), ("max_inotify_watches", 1)],
    ids=["instances", "watches"],
)
def test_inotify(fault: Fault, folder: Path, tmp_path: Path, name: str, low: int) -> None:
    """In a user namespace of its own: the machine's limits are left as they are."""
    before = ("unshare", "--user", "--map-root-user", *limit(name, low))
    with (
        bystanders(KeeperManager(folder), tmp_path / "told") as those,
        Hampered(folder, tmp_path / "log", before=before, options=("--resync", "0.5")) as daemon,
    ):
        for number in fault.rounds(short=1, full=10):
            all_goes(fault, folder, leave_inside(daemon, folder, f"round{number}"))
            those.unharmed(fault)
        fault.holds(watches(daemon) == 0, "nothing is watched")
        fault.holds(len(daemon.told("folder.unwatched")) == 1, "told once")
        inside(daemon, *limit(name, 100), "true")
        until(lambda: watches(daemon) > 2, "it is watched again")
        stale_pair(folder, "after")
        until(gone(folder, ["after"]), "what is left afterwards is cleaned")
        fault.holds(len(daemon.told("folder.unwatched")) == 1, "told once")
