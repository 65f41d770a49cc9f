"""The clock is set by a year while it runs, for one side or the other, and file times move.

libfaketime stands between a process and its clock: the machine's own is never touched.
"""

from __future__ import annotations

import glob
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from chaos import Fault
from conftest import until
from hampered import Hampered, all_goes, bystanders, gone, leave, stale_pairs

from reconciler.folder import Folder
from reconciler.keeper import KeeperManager
from reconciler.plans import Verdict
from reconciler.portable import PORTABLE
from reconciler.probe import Probe
from reconciler.requests import default_environment
from reconciler.state import Desired, Policy, decide

CHECKED = "nobody condemned, the dead still cleaned"
YEAR = 365 * 24 * 3600
LIBRARY = next(iter(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")), "")

faketime = pytest.mark.skipif(not LIBRARY, reason="libfaketime is missing (Debian: faketime)")
linux = pytest.mark.skipif(sys.platform != "linux", reason="moves the clock of Linux processes")


class Clock:
    """A clock that can be set, for the processes that are started under it.

    Args:
        path: the file that says what it shows.
        monotonic: it moves the monotonic clocks and that since boot as well.
    """

    def __init__(self, path: Path, *, monotonic: bool = False) -> None:
        self._path = path
        self.environment = {
            "LD_PRELOAD": LIBRARY,
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",
            "NO_FAKE_STAT": "1",  # what a file's time is does not follow the clock
            **({} if monotonic else {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}),
        }
        self.set(0)

    def set(self, seconds: int) -> None:
        """Move it to so many seconds from the true time."""
        new = self._path.with_suffix(".new")
        new.write_text(f"{seconds:+d}")
        new.replace(self._path)


@linux
@faketime
@pytest.mark.chaos("the clock set by a year", CHECKED)
@pytest.mark.parametrize("whose", ["the daemon's", "the keepers'"])
def test_clock(fault: Fault, folder: Path, tmp_path: Path, whose: str) -> None:
    clock = Clock(tmp_path / "clock")
    daemons = clock.environment if whose == "the daemon's" else {}
    keepers = default_environment() | (clock.environment if not daemons else {})
    with (
        bystanders(KeeperManager(folder), tmp_path / "told", env=keepers) as those,
        Hampered(folder, tmp_path / "log", environment=daemons) as daemon,
    ):
        for number in fault.rounds(short=1, full=5):
            for jump in (YEAR, -YEAR):
                clock.set(jump)
                all_goes(fault, folder, leave(folder, f"round{number}-{jump}"))
                those.unharmed(fault)
            daemon.crash_and_restart()
            those.unharmed(fault)
        fault.holds(not daemon.told("keeper.told_to_bind"), "no keeper is thought to be lost")
        if daemons:
            years = {line["timestamp"][:4] for line in daemon.lines}
            fault.holds(len(years) >= 3, f"its clock was set: {years}")


@linux
@faketime
@pytest.mark.chaos("all clocks a year off", CHECKED)
@pytest.mark.parametrize("offset", [YEAR, -YEAR], ids=["ahead", "behind"])
def test_all_clocks(fault: Fault, folder: Path, tmp_path: Path, offset: int) -> None:
    """The monotonic clocks, too, from the daemon's start: the age of every process is wrong."""
    clock = Clock(tmp_path / "clock", monotonic=True)
    clock.set(offset)
    with (
        bystanders(KeeperManager(folder), tmp_path / "told") as those,
        Hampered(folder, tmp_path / "log", environment=clock.environment) as daemon,
    ):
        for number in fault.rounds(short=1, full=5):
            all_goes(fault, folder, leave(folder, f"round{number}"))
            those.unharmed(fault)
            daemon.crash_and_restart()


def claims_of(folder: Path, sid: str) -> list[Path]:
    return sorted(folder.glob(f"{sid}.rpc.sock*"))


@linux
@pytest.mark.chaos("file times moved", CHECKED)
def test_file_times(fault: Fault, folder: Path, tmp_path: Path) -> None:
    now = os.stat(folder).st_mtime
    times = (now + YEAR, now - YEAR, 0, 2**33)
    with (
        bystanders(KeeperManager(folder), tmp_path / "told") as those,
        Hampered(folder, tmp_path / "log") as daemon,
    ):
        for number in fault.rounds(short=1, full=5):
            for which in range(3):  # socket, pid file, agent pid file: each alone
                for at, time in enumerate(times):
                    for keeper in those.keepers:
                        os.utime(claims_of(folder, keeper.sid)[which], (time, time))
                    left = f"round{number}-{which}-{at}"
                    daemon.process.send_signal(signal.SIGSTOP)  # it is as fast as we are
                    stale_pairs(folder, [left])
                    for path in claims_of(folder, left):
                        os.utime(path, (time, time))
                    daemon.process.send_signal(signal.SIGCONT)
                    until(gone(folder, [left]), "what is dead is cleaned")
                those.unharmed(fault)
            daemon.crash_and_restart()
            those.unharmed(fault)
        fault.holds(not daemon.told("keeper.stopped"), "no keeper was ended")
        fault.holds(not daemon.told("agent.stopped"), "no agent was ended")


@linux
@pytest.mark.chaos("create_time moved", CHECKED)
def test_create_time(
    fault: Fault, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only psutil tells who a process is, its start moves with the clock."""
    boot_time = psutil._pslinux.boot_time
    with bystanders(KeeperManager(folder), tmp_path / "told") as those, Folder(folder) as opened:
        probe = Probe(opened, processes=PORTABLE)
        for _ in fault.rounds(short=3, full=30):
            for keeper in those.keepers:
                seen = probe.look(keeper.sid)
                for jump in (YEAR, -YEAR, 0):
                    monkeypatch.setattr(
                        psutil._pslinux, "boot_time", lambda by=jump: boot_time() + by
                    )
                    seen = probe.look(keeper.sid, seen)
                    plan = decide(seen, Desired.AS_FOUND, Policy(start_grace=0.0))
                    fault.holds(
                        plan.verdict is Verdict.READY, f"it is {plan.verdict}: {plan.reason}"
                    )
                    fault.holds(not plan.actions, "nothing is done")
            those.unharmed(fault)
