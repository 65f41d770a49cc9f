"""Run the benchmarks: ``python -m benchmarks [NAME...] [--quick]``.

Every figure is a ratio of medians taken in this very run, ours and the peer's in turns: the
machine's speed cancels out, and so does most of its noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from benchmarks import keepers, kill_to_clean
from benchmarks.measuring import Benchmark

ALL: tuple[Benchmark, ...] = (*kill_to_clean.BENCHMARKS, *keepers.BENCHMARKS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="which ones; all when none is named")
    parser.add_argument("--quick", action="store_true", help="few rounds: does it work at all?")
    given = parser.parse_args()
    known = {benchmark.name: benchmark for benchmark in ALL}
    if unknown := set(given.names) - known.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    results = {}
    print(_row("name", "ratio", "goal", "ours", "peer", "unit", "rounds", "spread"))
    for name in given.names or known:
        benchmark = known[name]
        ours, peer = benchmark.measure(benchmark.quick if given.quick else benchmark.rounds)
        middle = statistics.median(ours), statistics.median(peer)
        result = {
            "ratio": round(middle[0] / middle[1], 3),
            "goal": benchmark.goal,
            "ours": round(middle[0], 4),
            "peer": round(middle[1], 4),
            "unit": benchmark.unit,
            "rounds": len(ours),
            "spread": round(_spread(ours), 3),
        }
        results[name] = result
        print(_row(name, **result), flush=True)
    if not given.quick and not given.names:
        target = Path(__file__).with_name("results.json")
        target.write_text(json.dumps(results, indent=2) + "\n")


def _row(  # noqa: PLR0917 - the columns
    name: str,
    ratio: object,
    goal: object,
    ours: object,
    peer: object,
    unit: object,
    rounds: object,
    spread: object,
) -> str:
    figures = (ratio, goal, ours, peer, rounds, spread)
    return f"{name:<20} " + " ".join(f"{figure!s:>8}" for figure in figures) + f"  {unit}"


def _spread(values: list[float]) -> float:
    """The middle half's width, as a part of the median."""
    if len(values) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


if __name__ == "__main__":
    main()
