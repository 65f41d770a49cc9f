"""Which values a setting may have: for a room's dataclass to say, without what checks it."""

from __future__ import annotations

from typing import NamedTuple


class Range(NamedTuple):
    """The numbers from ``low`` to ``high``, as in ``Annotated[int, Range(0, 1 << 30, "bytes")]``.

    Attributes:
        low: the lowest.
        high: the highest.
        unit: what they count, for an error's words.
        above: ``low`` itself is none of them.
    """

    low: float
    high: float
    unit: str = "a whole number"
    above: bool = False

    def __str__(self) -> str:
        if self.above:
            return f"{self.unit} above {self.low}, {self.high} at most"
        return f"{self.unit} from {self.low} to {self.high}"


class Pattern(NamedTuple):
    """The texts that a regular expression finds something in, as in ``Annotated[str, Pattern(…)]``.

    Attributes:
        regex: the expression.
        words: what it allows, for an error's words.
    """

    regex: str
    words: str

    def __str__(self) -> str:
        return self.words
