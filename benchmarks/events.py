"""From the moment that files appear in the folder until the stale ones are gone."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.deaths import pair_of
from benchmarks.leavings import dead_pids, leave
from benchmarks.measuring import Row, Stage, Values
from benchmarks.processes import Crowd, Daemon, bare
from benchmarks.watching import Going

LOGS = 50
"""Keeper logs that are written to in the storm."""


def drop(folder: Path, sid: str, before: Callable[[], None] = lambda: None) -> float:
    """Milliseconds from right before a stale pair appears until it is gone.

    It is made beside the folder and moved in whole, the socket first, so that what is
    measured is not how fast it is written.

    Args:
        folder: where it appears.
        sid: of which session.
        before: called when all is prepared, right before the clock starts.
    """
    staged = folder.parent / "staged"
    staged.mkdir(exist_ok=True)
    leave(staged, sid, dead_pids(1)[0])
    pair = pair_of(folder, sid)
    with Going(*pair_of(staged, sid)) as going:
        before()
        begun = time.perf_counter()
        for path in pair:
            os.rename(staged / path.name, path)
        return (going.wait(*pair) - begun) * 1000


def drops(stage: Stage) -> Values:
    """A socket that nobody listens on and a pid file that names nobody appear, and go.

    The clock starts right before the two are moved into the folder, and stops when both names
    are gone. ``ours`` is the daemon that watches the crowd, ``bare`` a loop that reads inotify
    and unlinks a pid file and its socket when the pid file appears, in a folder of its own.
    """
    crowd = stage.once(Crowd)
    elsewhere = stage.folder()
    values: dict[str, list[float]] = {"ours": [], "bare": []}
    with Daemon(crowd.folder) as daemon, bare(elsewhere, "drops", str(elsewhere)):
        daemon.wait_for(crowd.pids)
        daemon.rest()
        for number in range(stage.of(200, 3)):
            values["bare"].append(drop(elsewhere, f"bare-{number}"))
            values["ours"].append(drop(crowd.folder, f"drop-{number}"))
    return values


def storms(stage: Stage) -> Values:
    """A stale pair right after a storm of file events, and one in peace, by the same daemon.

    The storm is made by this process, as fast as it can: keeper logs are appended to, foreign
    files are made, written and removed. What counts as an event is what the reconciler asks
    for (made, removed, closed after writing), so the kernel reports some more. The clock
    starts at the pair, right after the last of them, and stops when it is gone. The daemon
    watches the crowd.
    """
    crowd = stage.once(Crowd)
    values: dict[str, list[float]] = {"ours": [], "peace": []}
    with Daemon(crowd.folder) as daemon:
        daemon.wait_for(crowd.pids)
        for number in range(rounds := stage.of(7, 2)):
            stage.tell(f"storm: round {number + 1} of {rounds}")
            daemon.rest()
            values["peace"].append(drop(crowd.folder, f"peace-{number}"))
            daemon.rest()
            weather = functools.partial(storm, crowd.folder, stage.of(200_000, 2000))
            values["ours"].append(drop(crowd.folder, f"storm-{number}", weather))
    values["seconds"] = [took / 1000 for took in values["ours"]]
    return values


def storm(folder: Path, events: int) -> None:
    """So many file events that the reconciler's watch reports, of files that it has no use for."""
    foreign = folder / "foreign.txt"
    made = 0
    for number in itertools.cycle(range(LOGS)):
        if made >= events:
            return
        with (folder / f"keeper-storm-{number}.log").open("ab", buffering=0) as log:
            log.write(b"a line\n")
        with foreign.open("wb", buffering=0) as file:
            file.write(b"a line\n")
        foreign.unlink()
        made += 4  # a log closed; a file made, closed, removed


DROP = Row(
    name="drop_to_clean",
    work="a stale pair appears → gone, 1,000 live sessions watched",
    against="bare inotify read and two unlinks",
    goal=4,
    unit="ms",
    scene=drops,
    peer="bare",
    crowd=True,
)

STORM = (
    Row(
        name="storm",
        work="200,000 file events in the folder, then one stale pair → gone",
        against="the same pair in peace",
        goal=5,
        unit="ms",
        scene=storms,
        peer="peace",
        crowd=True,
    ),
    Row(
        name="storm_seconds",
        work="the same, by the clock",
        against="",
        goal=1,
        unit="s",
        scene=storms,
        ours="seconds",
        crowd=True,
    ),
)
