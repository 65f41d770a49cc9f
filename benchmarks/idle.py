"""What the daemon costs while nothing happens."""

from __future__ import annotations

import time

from benchmarks.measuring import Row, Stage, Values
from benchmarks.processes import Crowd, Daemon, resident, wakeups


def memory(stage: Stage) -> Values:
    """KiB of the daemon for each session that it watches.

    What is resident of one that has looked at the whole crowd and is at rest, less what is of
    one whose folder is empty, by the number of sessions. In turns, each started anew.
    """
    crowd = stage.once(Crowd)
    empty = stage.folder()
    values: list[float] = []
    for number in range(rounds := stage.of(7, 2)):
        stage.tell(f"memory of the daemon: round {number + 1} of {rounds}")
        with Daemon(empty) as daemon:
            daemon.rest()
            before = resident(daemon.pid)
        with Daemon(crowd.folder) as daemon:
            daemon.wait_for(crowd.pids)
            daemon.rest()
            values.append((resident(daemon.pid) - before) / len(crowd.keepers))
    return {"ours": values}


def wakeups_a_second(stage: Stage) -> Values:
    """Voluntary context switches of the daemon a second, of all its threads.

    It watches the crowd, is at rest, and nothing happens in its folder. Each value is the
    mean of a minute, so that one full look, which comes once a minute, is in each.
    """
    crowd = stage.once(Crowd)
    seconds = stage.of(60, 2)
    values: list[float] = []
    with Daemon(crowd.folder) as daemon:
        daemon.wait_for(crowd.pids)
        daemon.rest()
        for number in range(rounds := stage.of(3, 1)):
            stage.tell(f"wakeups of the idle daemon: {number + 1} of {rounds} times {seconds} s")
            before, begun = wakeups(daemon.pid), time.perf_counter()
            time.sleep(seconds)  # it is the measure
            values.append((wakeups(daemon.pid) - before) / (time.perf_counter() - begun))
    return {"ours": values}


ROWS = (
    Row(
        name="daemon_session_kib",
        work="daemon memory per watched live session (1,000)",
        against="",
        goal=4,
        unit="KiB",
        scene=memory,
        crowd=True,
    ),
    Row(
        name="idle_wakeups",
        work="daemon with 1,000 live sessions, nothing happening: voluntary context switches "
        "a second, all threads",
        against="",
        goal=1,
        unit="1/s",
        scene=wakeups_a_second,
        crowd=True,
    ),
)
