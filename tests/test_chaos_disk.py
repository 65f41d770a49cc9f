"""The disk is full, or the folder read-only: the living go on, and the rest is made up for."""

from __future__ import annotations

import contextlib
import errno
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos import CAMPAIGN, Fault
from conftest import NODE_KEEPER, SINK, end_all, root, stale_pair, until
from hampered import Hampered, bystanders, gone, left_by, spawn_all, stale_pairs
from stand_ins import kill

from reconciler.keeper import KeeperManager

CHECKED = "lines still arrive, told once, no busy loop, cleaned once it can be"

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="mounts of Linux"), root]


class Disk:
    """A small filesystem of its own, mounted where the test's home is."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / ".pi" / "dashboard" / "sessions"
        self.folder.mkdir(parents=True, mode=0o700)

    def fill(self) -> None:
        """Fill it to the brim, whatever was freed since, or is just being freed."""
        until(self._is_full, "no page is left")

    def _is_full(self) -> bool:
        with contextlib.suppress(OSError), (self.home / "ballast").open("ab", 0) as file:
            while True:
                file.write(bytes(4096))
        more = self.home / "more"
        try:
            more.write_bytes(bytes(4096))
        except OSError as error:
            return error.errno == errno.ENOSPC
        finally:
            more.unlink(missing_ok=True)
        return False

    def free(self) -> None:
        """Give room again."""
        (self.home / "ballast").unlink()


@pytest.fixture
def disk() -> Iterator[Disk]:
    home = Path(tempfile.mkdtemp(prefix="pi-"))
    options = "size=2m,mode=0700"
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", home], check=False
    ).returncode:
        home.rmdir()
        pytest.skip("nothing can be mounted here")
    disk = Disk(home)
    try:
        yield disk
    finally:
        end_all(disk.folder)
        # Lazily: a keeper that was just killed may still be on its way out.
        subprocess.run(["umount", "--lazy", home], check=True)
        home.rmdir()


def at_rest(fault: Fault, daemon: Hampered) -> None:
    """Check that it neither spins nor fills its log, whatever it is that does not work."""
    seconds = 8.0 if CAMPAIGN else 1.5
    cpu, lines = daemon.cpu(), len(daemon.lines)
    time.sleep(seconds)  # what is measured is how little happens
    share, more = (daemon.cpu() - cpu) / seconds, len(daemon.lines) - lines
    # One that spins takes all of it; a few tries a second on a busy machine, some hundredths.
    fault.holds(share < 0.2, f"{share:.1%} of a processor at rest")
    fault.holds(more <= 8, f"{more} lines at rest")  # what is told to bind is so ever less often


def told_once(fault: Fault, daemon: Hampered, sid: str) -> None:
    """Check that of a session's trouble there is one line."""
    until(lambda: daemon.of("session.failed", sid), f"trouble of {sid} is told")
    fault.holds(len(daemon.of("session.failed", sid)) == 1, f"trouble of {sid} is told once")


@pytest.mark.chaos("the disk full", CHECKED)
def test_full(fault: Fault, disk: Disk, tmp_path: Path) -> None:
    manager, node = KeeperManager(disk.folder), node_manager_of(disk.folder)
    with (
        bystanders(manager, tmp_path / "told") as those,
        Hampered(disk.folder, tmp_path / "log") as daemon,
    ):
        for number in fault.rounds(short=1, full=5):
            name, ours, other, dead = (
                f"round{number}{each}" for each in ("", "-ours", "-other", "-dead")
            )
            spawn_all(node, {other: SINK})
            keepers = spawn_all(manager, dict.fromkeys((dead, ours), SINK))
            stale_pair(disk.folder, f"{name}-stale")
            disk.fill()
            kill(keepers[0].keeper_pid)
            until(gone(disk.folder, [f"{name}-stale", dead]), "what is dead is cleaned")
            for sid in (ours, other):
                pid_file(disk, sid).unlink()
            disk.fill()
            told_once(fault, daemon, other)
            those.unharmed(fault)
            at_rest(fault, daemon)
            disk.free()
            until(functools.partial(names_a_pid, disk, ours), "the keeper writes its pid file")
            until(functools.partial(names_a_pid, disk, other), "the daemon writes the pid file")
            those.unharmed(fault)


def node_manager_of(folder: Path) -> KeeperManager:
    return KeeperManager(folder, keeper_command=("node", str(NODE_KEEPER)))


def pid_file(disk: Disk, sid: str) -> Path:
    return disk.folder / f"{sid}.rpc.sock.pid"


def names_a_pid(disk: Disk, sid: str) -> bool:
    return pid_file(disk, sid).read_text().isdigit()


@pytest.mark.chaos("the log's disk full", CHECKED)
def test_full_for_the_log(fault: Fault, disk: Disk, folder: Path, tmp_path: Path) -> None:
    manager = KeeperManager(folder)
    log = disk.home / "log"
    with bystanders(manager, tmp_path / "told") as those, Hampered(folder, log) as daemon:
        for number in fault.rounds(short=3, full=30):
            disk.fill()
            cpu = daemon.cpu()
            sids = [f"round{number}-{each}" for each in range(24)]
            stale_pairs(folder, sids)
            until(gone(folder, sids), "it cleans all the same")
            fault.holds(daemon.cpu() - cpu < 1.0, "it does not spin")
            disk.free()
            after = f"round{number}-after"
            stale_pair(folder, after)
            [line] = cleaned(daemon, after)
            fault.holds(line.get("lines_dropped", 0) > 0, "it says that lines are missing")
            fault.holds(len(daemon.lines) > 0, "each line is whole")
        those.unharmed(fault)


def cleaned(daemon: Hampered, sid: str) -> list[dict[str, Any]]:
    """Wait until it tells that a session was cleaned."""
    until(lambda: daemon.of("session.cleaned", sid), "it tells again")
    return daemon.of("session.cleaned", sid)


class Shut:
    """Makes a folder read-only to a daemon alone; keepers have their files open and go on.

    Attributes:
        before: what stands before the daemon's command line.
    """

    before: tuple[str, ...] = ()

    def shut(self, daemon: Hampered) -> None:
        raise NotImplementedError

    def open(self, daemon: Hampered) -> None:
        raise NotImplementedError


class Remounted(Shut):
    """The folder is a mount of the daemon's own mount namespace."""

    before = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$0"; exec "$@"')

    def shut(self, daemon: Hampered) -> None:
        self._remount(daemon, "ro")

    def open(self, daemon: Hampered) -> None:
        self._remount(daemon, "rw")

    def _remount(self, daemon: Hampered, how: str) -> None:
        enter = ("nsenter", "--mount", f"--target={daemon.process.pid}")
        remount = ("mount", "-o", f"remount,bind,{how}", str(daemon.folder))
        subprocess.run((*enter, *remount), check=True)


class Forbidden(Shut):
    """Nobody may write to the folder, and the daemon has no power over that."""

    before = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")

    def shut(self, daemon: Hampered) -> None:
        daemon.folder.chmod(0o500)

    def open(self, daemon: Hampered) -> None:
        daemon.folder.chmod(0o700)


@pytest.mark.chaos("the folder read-only", CHECKED)
@pytest.mark.parametrize("how", [Remounted(), Forbidden()], ids=["remounted", "forbidden"])
def test_read_only(fault: Fault, folder: Path, tmp_path: Path, how: Shut) -> None:
    manager = KeeperManager(folder)
    before = (*how.before, str(folder)) if isinstance(how, Remounted) else how.before
    with (
        bystanders(manager, tmp_path / "told") as those,
        Hampered(folder, tmp_path / "log", before=before) as daemon,
    ):
        for number in fault.rounds(short=1, full=5):
            sids = [f"round{number}-{each}" for each in range(3)]
            keepers = spawn_all(manager, dict.fromkeys(sids, SINK))
            how.shut(daemon)
            try:
                kill(*(keeper.keeper_pid for keeper in keepers))
                for sid in sids:
                    told_once(fault, daemon, sid)
                those.unharmed(fault)
                at_rest(fault, daemon)
                fault.holds(len(left_by(folder, sids)) == 3 * len(sids), "all is left")
            finally:
                how.open(daemon)
            until(gone(folder, sids), "all is cleaned")
            those.unharmed(fault)
