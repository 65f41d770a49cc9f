"""Run the benchmarks: ``python -m benchmarks [NAME...] [--quick]``.

Every figure is a ratio of what was taken in this very run, ours and the peer's in turns: the
machine's speed cancels out, and so does most of its noise. The exit code is 1 when the harness
of a row failed; whether a goal is met is nothing to it.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks import table
from benchmarks.every import ROWS, measure
from benchmarks.measuring import Row


def main(arguments: list[str] | None = None, every: tuple[Row, ...] = ROWS) -> int:
    """Measure, show and write down what was asked for; gives the exit code."""
    given = _parse(arguments, every)
    rows = tuple(row for row in every if row.name in given.names or not given.names)
    print(table.HEADER, flush=True)
    begun = time.monotonic()
    results = measure(rows, quick=given.quick)
    print(f"{time.monotonic() - begun:.0f} s; a star: the goal is met", flush=True)
    table.write_results(rows, results, given.results)
    broken = [row.name for row in rows if row.name not in results]
    if broken:
        print(f"broken: {', '.join(broken)}", file=sys.stderr)
    elif rows == every and not given.quick:
        table.write_page(rows, results)
    return 1 if broken else 0


def _parse(arguments: list[str] | None, every: tuple[Row, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which rows; all by default")
    parser.add_argument("--quick", action="store_true", help="few rounds: does the harness work?")
    parser.add_argument("--results", type=Path, default=table.RESULTS, help="where they go")
    given = parser.parse_args(arguments)
    known = [row.name for row in every]
    if unknown := sorted(set(given.names) - set(known)):
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
    return given


if __name__ == "__main__":
    os.umask(0o022)  # keepers' folders that a group may write to are not trusted
    gc.disable()  # a collection of the harness is no part of any figure
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended
    sys.exit(main())
