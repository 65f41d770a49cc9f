"""How results are shown: on the terminal, and as a table and a plot in docs/performance.md."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks.measuring import Figure, Row
from benchmarks.processes import ROOT

RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- written by `make bench`: begin -->", "<!-- written by `make bench`: end -->"

Results = Mapping[str, Figure | str]
"""By row: its figure, or why there is none."""

_BAR = 30
# Characters of a plot's bar at which the goal stands.

_WIDEST = 60
# Characters of the longest bar; one that would be longer ends in an arrow.


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


HEADER = (
    f"{'name':<20} {'ratio':>8} {'goal':>10}    {'ours':>9} {'peer':>9} {'unit':<5} "
    f"{'rounds':>6} {'spread':>6}"
)


def line(row: Row, figure: Figure) -> str:
    """One row on the terminal; a star stands where the goal is met."""
    met = "*" if row.met(figure.ratio) else " "
    peer = "-" if figure.peer is None else number(figure.peer)
    return (
        f"{row.name:<20} {number(figure.ratio):>8} {row.goal_text:>10} {met}  "
        f"{number(figure.ours):>9} {peer:>9} {row.unit:<5} {figure.rounds:>6} "
        f"{figure.spread:>6.0%}"
    )


def write_results(rows: tuple[Row, ...], results: Results, path: Path = RESULTS) -> None:
    """``results.json``: what this run has measured, and nothing of an earlier one.

    ``better`` says whether the ratio is to be below the goal or above.
    """
    found = {
        row.name: asdict(figure) | {"better": "higher" if row.at_least else "lower"}
        for row in rows
        if isinstance(figure := results.get(row.name), Figure)
    }
    path.write_text(json.dumps(found, indent=2) + "\n")


def write_page(rows: tuple[Row, ...], results: Results, page: Path = PAGE) -> None:
    """Put table and plot between the two marks of the page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has lost its marks")
    body = "\n\n".join((_where(), _markdown(rows, results), _plot(rows, results)))
    page.write_text(f"{before}{begin}\n\n{body}\n\n{end}{after}")


def _where() -> str:
    day = dt.datetime.now(dt.UTC).date()
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False)
    return (
        f"Measured on {day}: {os.cpu_count()} cores, Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}, Node {node.stdout.strip().removeprefix('v')}."
    )


def _markdown(rows: tuple[Row, ...], results: Results) -> str:
    lines = [
        "| name | work | against | ratio | goal | ours | peer | rounds | spread |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figure = results[row.name]
        start = f"| `{row.name}` | {row.work} | {row.against or 'none'} |"
        if isinstance(figure, str):
            lines.append(f"{start} {figure} | {row.goal_text} | | | | |")
            continue
        mark = "" if row.met(figure.ratio) else " (missed)"
        peer = "none" if figure.peer is None else f"{number(figure.peer)} {row.unit}"
        lines.append(
            f"{start} {number(figure.ratio)}{mark} | {row.goal_text} | {number(figure.ours)} "
            f"{row.unit} | {peer} | {figure.rounds} | {figure.spread:.0%} |"
        )
    return "\n".join(lines)


def _plot(rows: tuple[Row, ...], results: Results) -> str:
    """How much of its goal each figure takes: a bar that ends before the mark has met it."""
    lines = ["```text", f"{'':<20} {'0':<{_BAR}}goal"]
    for row in rows:
        figure = results[row.name]
        if isinstance(figure, str):
            continue
        share = row.goal / figure.ratio if row.at_least else figure.ratio / row.goal
        lines.append(f"{row.name:<20} {_bar(share)} {share:.2f}")
    return "\n".join((*lines, "```"))


def _bar(share: float) -> str:
    length = max(1, round(share * _BAR))
    if length > _WIDEST:
        return f"{'█' * _BAR}┃{'█' * (_WIDEST - _BAR - 1)}▶"
    if length > _BAR:
        return f"{'█' * _BAR}┃{'█' * (length - _BAR)}"
    return f"{'█' * length}{' ' * (_BAR - length)}┃"
