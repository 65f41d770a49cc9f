"""From a start until the work that was waiting is done."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.leavings import dead_pids, leave
from benchmarks.measuring import Row, Stage, Values
from benchmarks.processes import (
    PEERS,
    ROOT,
    Crowd,
    Daemon,
    ended,
    environment,
    keepers,
    node,
)
from benchmarks.watching import all_gone


def node_scan(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [node(), str(PEERS / "dashboard.cjs"), "scan", str(folder)],
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )


def cold_starts(stage: Stage) -> Values:
    """A start over stale pairs, until none is there.

    The clock starts before the process does, so its runtime's start is in it, and stops when
    no socket and no pid file is there. ``ours`` is the daemon with all its checks and one log
    line a session, ``node`` a scan that forgets dead pids. No session lives.
    """
    values: dict[str, list[float]] = {"ours": [], "node": []}
    for number in range(rounds := stage.of(9, 1)):
        for whose, took in values.items():
            stage.tell(f"cold start: round {number + 1} of {rounds}, {whose}")
            folder = stage.folder()
            pids = dead_pids(stage.of(10_000, 200))
            names = [name for pid in pids for name in leave(folder, f"stale-{pid}", pid)]
            begun = time.perf_counter()
            if whose == "ours":
                with Daemon(folder):
                    took.append((all_gone(names) - begun) * 1000)
            else:
                with ended(node_scan(folder)):
                    took.append((all_gone(names) - begun) * 1000)
    return values


def live_starts(stage: Stage) -> Values:
    """A start beside the crowd, until every session is known to be ready.

    The clock starts before the process does. It stops for ``ours`` when the daemon holds
    pidfds of all keepers and agents, which is the last that it does for a session that is
    ready (it is asked for by a look at its descriptors each millisecond, about 0.1 % of a
    core); for ``node`` when the scan has said how many it found.
    """
    crowd = stage.once(Crowd)
    values: dict[str, list[float]] = {"ours": [], "node": []}
    for number in range(rounds := stage.of(15, 2)):
        stage.tell(f"cold start beside the living: round {number + 1} of {rounds}")
        values["node"].append(_node_beside(crowd))
        values["ours"].append(_ours_beside(crowd))
    return values


def _node_beside(crowd: Crowd) -> float:
    begun = time.perf_counter()
    with ended(scan := node_scan(crowd.folder)):
        assert scan.stdout is not None
        found = json.loads(scan.stdout.readline())
        took = time.perf_counter() - begun
    if found != {"live": len(crowd.keepers), "forgotten": 0}:
        raise RuntimeError(f"the scan found {found}")
    return took * 1000


def _ours_beside(crowd: Crowd) -> float:
    begun = time.perf_counter()
    with Daemon(crowd.folder) as daemon:
        daemon.wait_for_number(len(crowd.pids), pause=0.001)
        return (time.perf_counter() - begun) * 1000


def client_starts(stage: Stage) -> Values:
    """``pi-reconciler write`` of one line to a keeper of ours, as a whole process.

    The clock starts before the process does, and stops when its end was waited for.
    ``python`` is a process that does nothing, of the same interpreter.
    """
    folder = stage.folder()
    values: dict[str, list[float]] = {"ours": [], "python": []}
    program = Path(sys.executable).with_name("pi-reconciler")
    command = [str(program), "--sessions-dir", str(folder), "write", "client", '{"type":"x"}']
    with keepers(stage, folder, ["client"]):
        for _ in range(stage.of(31, 2)):
            values["python"].append(_run([sys.executable, "-I", "-c", "pass"], folder))
            values["ours"].append(_run(command, folder))
    return values


def _run(command: list[str], folder: Path) -> float:
    env = environment(folder)
    begun = time.perf_counter()
    subprocess.run(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - begun) * 1000


COLD = Row(
    name="cold_start",
    work="start over 10,000 stale pairs → empty, with identity checks and the log",
    against="Node scan and clean",
    goal=1,
    unit="ms",
    scene=cold_starts,
    peer="node",
)

LIVE = Row(
    name="cold_start_live",
    work="start beside 1,000 live keepers → all READY",
    against="Node scan",
    goal=2,
    unit="ms",
    scene=live_starts,
    peer="node",
    crowd=True,
)

CLIENT = Row(
    name="client_start",
    work="`pi-reconciler write` as a whole process",
    against="`python -I -c pass`",
    goal=5,
    unit="ms",
    scene=client_starts,
    peer="python",
)
