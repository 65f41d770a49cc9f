"""Our keeper beside one in Node: how fast it is up, and what it holds in memory."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.measuring import (
    Benchmark,
    Times,
    accepts,
    killed_at_the_end,
    start_keeper,
    wait_until,
)


def _start(*, ours: bool, number: int, folder: Path) -> float:
    """Milliseconds from the start of the process until its socket accepts."""
    sid = f"{'ours' if ours else 'node'}-{number}"
    begun = time.perf_counter()
    keeper = start_keeper(folder, sid, ours=ours)
    with killed_at_the_end([keeper]):
        wait_until(lambda: accepts(folder / f"{sid}.rpc.sock"))
        return (time.perf_counter() - begun) * 1000


def _memory(field: str, *, ours: bool, number: int, folder: Path) -> float:
    """MiB of an idle keeper, by one field of the kernel's own account."""
    sid = f"{'ours' if ours else 'node'}-{number}"
    keeper = start_keeper(folder, sid, ours=ours)
    with killed_at_the_end([keeper]):
        wait_until(lambda: "keeper ready" in _text(folder / f"keeper-{sid}.log"))
        lines = Path(f"/proc/{keeper.pid}/smaps_rollup").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        names = ("Private_Clean", "Private_Dirty") if field == "private" else ("Rss",)
        return sum(sizes[name] for name in names) / 1024


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _in_turns(what: str, rounds: int) -> tuple[Times, Times]:
    ours: Times = []
    peer: Times = []
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / ".pi" / "dashboard" / "sessions"
        folder.mkdir(parents=True, mode=0o700)
        for number in range(rounds):
            for values, is_ours in ((ours, True), (peer, False)):
                if what == "start":
                    values.append(_start(ours=is_ours, number=number, folder=folder))
                else:
                    values.append(_memory(what, ours=is_ours, number=number, folder=folder))
    return ours, peer


def measure_start(rounds: int) -> tuple[Times, Times]:
    return _in_turns("start", rounds)


def measure_rss(rounds: int) -> tuple[Times, Times]:
    return _in_turns("rss", rounds)


def measure_private(rounds: int) -> tuple[Times, Times]:
    return _in_turns("private", rounds)


BENCHMARKS = (
    Benchmark("keeper_start", 0.5, "ms", measure_start, rounds=21, quick=3),
    Benchmark("keeper_rss", 0.3, "MiB", measure_rss, rounds=5, quick=2),
    Benchmark("keeper_private", 0.7, "MiB", measure_private, rounds=5, quick=2),
)
