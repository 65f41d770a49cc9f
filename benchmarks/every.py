"""Every row, and how they are measured."""

from __future__ import annotations

import math
import traceback

from benchmarks import deaths, events, idle, keepers, starts, table, writes
from benchmarks.measuring import Figure, Row, SkippedError, Stage

ROWS: tuple[Row, ...] = (
    *deaths.ROWS,
    events.DROP,
    starts.COLD,
    starts.LIVE,
    *writes.ROWS,
    *keepers.ROWS,
    *idle.ROWS,
    *events.STORM,
    starts.CLIENT,
    deaths.SCALING,
)
"""All rows, in the order in which they are shown."""


def measure(rows: tuple[Row, ...], *, quick: bool) -> dict[str, Figure | str]:
    """Measure rows, and print each as it comes. One that breaks does not stop the others.

    Those that need no crowd come first: it would be there for all to see, for a scan of the
    processes and in the machine's memory.

    Returns:
        By name: the figure, or why the row was skipped. A row that broke is not there.
    """
    results: dict[str, Figure | str] = {}
    for crowd in (False, True):
        with Stage(quick=quick) as stage:
            for row in rows:
                if row.crowd is crowd:
                    _measure(row, stage, results)
    return results


def _measure(row: Row, stage: Stage, results: dict[str, Figure | str]) -> None:
    try:
        figure = row.figure(stage.once(row.scene))
        if not all(map(math.isfinite, (figure.ratio, figure.ours, figure.spread))):
            raise ValueError(f"not finite: {figure}")  # noqa: TRY301 - it is told like the others
    except SkippedError as reason:
        results[row.name] = f"skipped: {reason}"
        stage.tell("")
        print(f"{row.name:<20} {results[row.name]}", flush=True)
    except Exception:  # noqa: BLE001 - one row's trouble is not the others'
        traceback.print_exc()
    else:
        results[row.name] = figure
        stage.tell("")
        print(table.line(row, figure), flush=True)
