"""Our keeper beside one in Node: how fast it is up, and what it holds in memory."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.measuring import Row, Stage, Values
from benchmarks.processes import ended, socket_of, start_keeper, until, wait_for_agent
from benchmarks.watching import IN_CREATE, IN_MOVED_TO, accepting, notices


def starts(stage: Stage) -> Values:
    """A keeper is started by its command, and accepts connections.

    The clock starts before the process does, and stops when a connect to its socket goes
    through; until the socket is there we sleep on the folder's notices.
    """
    folder = stage.folder()
    values: dict[str, list[float]] = {"ours": [], "node": []}
    for number in range(stage.of(41, 2)):
        for whose, took in values.items():
            took.append(_start(folder, f"{whose}-{number}", ours=whose == "ours"))
    return values


def _start(folder: Path, sid: str, *, ours: bool) -> float:
    with notices(IN_CREATE | IN_MOVED_TO, folder) as descriptor:
        begun = time.perf_counter()
        with ended(start_keeper(folder, sid, ours=ours)):
            took = accepting(socket_of(folder, sid), descriptor) - begun
            wait_for_agent(folder, sid)  # it is killed only once it is whole
    return took * 1000


def memory(stage: Stage) -> Values:
    """MiB of a keeper that is ready and idle, by the kernel's account of its memory.

    Resident is all of it that is in memory, what it shares with others included; private is
    what nobody shares. Another of its kind lives beside it, as is usual: alone on a machine,
    the pages of a runtime's own file would count as private, too. No clock.
    """
    folder = stage.folder()
    values: dict[str, list[float]] = {}
    for number in range(stage.of(9, 2)):
        for whose in ("ours", "node"):
            resident, private = _memory(folder, f"{whose}-{number}", ours=whose == "ours")
            values.setdefault(whose, []).append(resident)
            values.setdefault(f"{whose}_private", []).append(private)
    return values


def _memory(folder: Path, sid: str, *, ours: bool) -> tuple[float, float]:
    log = folder / f"keeper-{sid}.log"
    other = start_keeper(folder, f"{sid}-other", ours=ours)
    with ended(keeper := start_keeper(folder, sid, ours=ours), other):
        wait_for_agent(folder, f"{sid}-other")
        until(lambda: log.exists() and "keeper ready" in log.read_text(), "it is ready")
        lines = Path(f"/proc/{keeper.pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return sizes["Rss"] / 1024, (sizes["Private_Clean"] + sizes["Private_Dirty"]) / 1024


ROWS = (
    Row(
        name="keeper_start",
        work="spawn → accepts connections",
        against="Node keeper",
        goal=0.5,
        unit="ms",
        scene=starts,
        peer="node",
    ),
    Row(
        name="keeper_rss",
        work="resident memory of an idle keeper",
        against="Node keeper",
        goal=0.3,
        unit="MiB",
        scene=memory,
        peer="node",
    ),
    Row(
        name="keeper_private",
        work="private memory of an idle keeper",
        against="Node keeper",
        goal=0.7,
        unit="MiB",
        scene=memory,
        ours="ours_private",
        peer="node_private",
    ),
)
