"""From the death of keepers until their files are gone."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import statistics
import time
from pathlib import Path

from benchmarks.measuring import Row, SkippedError, Stage, Values, p99
from benchmarks.processes import (
    PEERS,
    PYTHON,
    Crowd,
    Daemon,
    Helper,
    Supervised,
    agent_file_of,
    bare,
    ended,
    keepers,
    number_in,
    pid_file_of,
    rest,
    socket_of,
    start_keeper,
    until,
    wait_for_agent,
)
from benchmarks.watching import Going, all_gone

SIZES = (10, 100, 1000, 5000)
"""Live sessions of the row ``scaling``."""


def pair_of(folder: Path, sid: str) -> tuple[Path, Path]:
    """The two files that a keeper leaves."""
    return socket_of(folder, sid), pid_file_of(folder, sid)


def kill(folder: Path, sid: str, pid: int) -> float:
    """Milliseconds from right before SIGKILL goes out until socket and pid file are gone."""
    pair = pair_of(folder, sid)
    with Going(*pair) as going:
        begun = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        return (going.wait(*pair) - begun) * 1000


def kills(stage: Stage) -> Values:
    """A keeper of ours is killed, and its files go; others live on.

    The clock starts right before the signal and stops when both names are gone, so the
    keeper's own dying is in all three figures. In each round three keepers are started and
    wait until they are watched and all is at rest; then each is killed once, in turn:

    - ``ours``: by the daemon, which watches the crowd and its agents (two pidfds each);
    - ``bare``: by a bare loop that holds pidfds of the very same crowd;
    - ``s6``: by an ``s6-supervise`` of its own, with a finish script of one ``rm``.

    The last two work in a folder of their own, as the daemon would clean it, too. The
    daemon's own account (``told``, its log's ``since_exit_ms``: from the notice of the exit to
    the removal) must be within what was measured from outside, by the medians (it may have to
    wait for a core between a removal and its clock), or the row is broken.
    """
    crowd = stage.once(Crowd)
    elsewhere = stage.folder()
    values: dict[str, list[float]] = {"ours": [], "bare": []}
    with Daemon(crowd.folder) as daemon, bare(elsewhere, "deaths") as loop:
        for pid in crowd.pids:
            loop.ask(str(pid))
        daemon.wait_for(crowd.pids)
        for number in range(rounds := stage.of(120, 2)):
            stage.tell(f"kill to clean: round {number + 1} of {rounds}")
            for name, took in _kill_each(crowd.folder, elsewhere, daemon, loop, number).items():
                values.setdefault(name, []).append(took)
        values["told"] = _told(daemon, values["ours"])
    return values


def _kill_each(
    folder: Path, elsewhere: Path, daemon: Daemon, loop: Helper, number: int
) -> dict[str, float]:
    ours, limit, s6 = (f"{whose}-{number}" for whose in ("ours", "bare", "s6"))
    with contextlib.ExitStack() as stack:
        first, second = start_keeper(folder, ours), start_keeper(elsewhere, limit)
        stack.enter_context(ended(first, second))
        victims = {"ours": (folder, ours, first.pid), "bare": (elsewhere, limit, second.pid)}
        agent = wait_for_agent(folder, ours)
        wait_for_agent(elsewhere, limit)
        loop.ask(" ".join(map(str, (second.pid, *pair_of(elsewhere, limit)))))
        with contextlib.suppress(SkippedError):
            supervised = stack.enter_context(Supervised(elsewhere, s6))
            victims["s6"] = (elsewhere, s6, supervised.keeper_pid)
        daemon.wait_for([first.pid, agent])
        daemon.rest()
        turn = number % len(victims)
        names = [*victims]
        return {name: kill(*victims[name]) for name in names[turn:] + names[:turn]}


def _told(daemon: Daemon, took: list[float]) -> list[float]:
    """What the daemon says of each kill, which must fit into what was seen from outside."""

    def told() -> dict[str, float]:
        lines = daemon.told("session.cleaned")
        return {line["sid"]: line["since_exit_ms"] for line in lines}

    sids = [f"ours-{number}" for number in range(len(took))]
    until(lambda: told().keys() >= set(sids), "the log tells of every kill")
    said = told()
    account = [said[sid] for sid in sids]
    if statistics.median(account) > statistics.median(took):
        raise RuntimeError(f"by the log {account} ms, from outside {took} ms")
    return account


def mass_kill(stage: Stage) -> Values:
    """All keepers of a folder are killed at once; their files go. Nobody else lives.

    The clock starts before the first of the signals, which go out one after the other from
    one loop, and stops when no socket and no pid file is there. The keepers are real ones of
    ours with an agent each, started anew for each round: as many for the daemon as for the
    bare loop.
    """
    values: dict[str, list[float]] = {"ours": [], "bare": []}
    for number in range(stage.of(5, 1)):
        for whose, took in values.items():
            took.append(_mass_kill(stage, f"{whose}-{number}"))
    return values


def _mass_kill(stage: Stage, name: str) -> float:
    folder = stage.folder()
    sids = [f"{name}-{n:04}" for n in range(stage.sessions)]
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(keepers(stage, folder, sids))
        pids = [keeper.pid for keeper in live.values()]
        if name.startswith("bare"):
            loop = stack.enter_context(bare(folder, "deaths"))
            for sid, keeper in live.items():
                loop.ask(" ".join(map(str, (keeper.pid, *pair_of(folder, sid)))))
        else:
            daemon = stack.enter_context(Daemon(folder))
            agents = [number_in(agent_file_of(folder, sid)) for sid in sids]
            daemon.wait_for([*pids, *agents])
            daemon.rest()
        names = [str(path) for sid in sids for path in pair_of(folder, sid)]
        begun = time.perf_counter()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return (all_gone(names) - begun) * 1000


def scaling(stage: Stage) -> Values:
    """The same as ``ours`` of `kills`, by four daemons at once: each watches another number.

    What is killed is a real keeper of ours. Those who live beside it are light stand-ins
    (``peers/nursery.py``): thousands of real ones would not fit into the machine. All four
    crowds live all the time, and in each round, when all four daemons are at rest, one keeper
    is killed in each folder, in turn.
    """
    sizes = stage.of_each(SIZES, (1, 2, 4, 8))
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * sizes[-1] + 1000:
        raise SkippedError(f"{sizes[-1]} sessions need more open files than the hard limit")
    values: dict[str, list[float]] = {str(size): [] for size in SIZES}
    with contextlib.ExitStack() as stack:
        scenes = []
        for size in sizes:
            folder = stage.folder()
            stage.tell(f"scaling: starting {size} sessions")
            stack.enter_context(_nursery(folder, size))
            daemon = stack.enter_context(Daemon(folder))
            daemon.wait_for_number(2 * size)
            scenes.append((folder, daemon))
        for number in range(rounds := stage.of(21, 2)):
            stage.tell(f"scaling: round {number + 1} of {rounds}")
            took = _kill_in_each(scenes, number)
            for name, milliseconds in zip(values, took, strict=True):
                values[name].append(milliseconds)
    return values | {"ours": _slowest(values)}


def _slowest(values: dict[str, list[float]]) -> list[float]:
    """The values of the size with the highest median."""
    return max(values.values(), key=statistics.median)


def _kill_in_each(scenes: list[tuple[Path, Daemon]], number: int) -> list[float]:
    sid = f"ours-{number}"
    with contextlib.ExitStack() as stack:
        victims = [start_keeper(folder, sid) for folder, _ in scenes]
        stack.enter_context(ended(*victims))
        for (folder, daemon), victim in zip(scenes, victims, strict=True):
            daemon.wait_for([victim.pid, wait_for_agent(folder, sid)])
        rest([daemon.pid for _, daemon in scenes])
        took = [0.0] * len(scenes)
        for step in range(len(scenes)):
            place = (number + step) % len(scenes)
            took[place] = kill(scenes[place][0], sid, victims[place].pid)
        return took


def _nursery(folder: Path, size: int) -> Helper:
    program = folder.parents[2] / "keeper.cjs"
    program.write_text("read -r _\n")
    return Helper(
        [*PYTHON, str(PEERS / "nursery.py"), str(folder), str(program), str(size)], folder
    )


LIMIT = "bare loop: pidfd, epoll, two unlinks"

ROWS = (
    Row(
        name="kill_to_clean_limit",
        work="SIGKILL a keeper → socket and pid file gone, 1,000 live sessions watched",
        against=LIMIT,
        goal=3,
        unit="ms",
        scene=kills,
        peer="bare",
        crowd=True,
    ),
    Row(
        name="kill_to_clean_s6",
        work="the same",
        against="s6 with its finish script",
        goal=0.1,
        unit="ms",
        scene=kills,
        peer="s6",
        crowd=True,
    ),
    Row(
        name="kill_to_clean_p99",
        work="the same, 99th percentile",
        against="s6's median",
        goal=1,
        unit="ms",
        scene=kills,
        peer="s6",
        statistic=p99,
        crowd=True,
    ),
    Row(
        name="mass_kill",
        work="1,000 keepers killed at once → folder empty",
        against=LIMIT,
        goal=4,
        unit="ms",
        scene=mass_kill,
        peer="bare",
    ),
)

SCALING = Row(
    name="scaling",
    work="kill to clean at 10, 100, 1,000, 5,000 sessions, the slowest of them",
    against="at 10",
    goal=1.5,
    unit="ms",
    scene=scaling,
    peer="10",
)
