"""Rows of cells as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def aligned(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines in which each column is as wide as its widest cell; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(map(str.ljust, line, widths)).rstrip()
