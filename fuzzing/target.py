"""What a fuzz target is: a reader of outside bytes, and the oracle that judges it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

Check = Callable[[bytes], None]
"""Reads one input. Whatever it raises, `ViolationError` or not, is a defect."""


class ViolationError(AssertionError):
    """What was read is not what the oracle says."""


@dataclass(frozen=True, slots=True)
class Target:
    """One reader of outside bytes.

    Attributes:
        name: how it is called on the command line.
        opened: gives the check, with all that it needs around it.
        seeds: inputs to start from: the ordinary, the borders, and what was once found.
        words: pieces that chance alone would take long to write.
        longest: bytes that an input may have.
        runs: executions of an ordinary round.
        short: executions of the round in the test suite.
    """

    name: str
    opened: Callable[[], AbstractContextManager[Check]]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()
    longest: int = 256
    runs: int = 1_000_000
    short: int = 20_000


def pure(check: Check) -> Callable[[], AbstractContextManager[Check]]:
    """For a check that needs nothing around it."""

    @contextlib.contextmanager
    def opened() -> Iterator[Check]:
        yield check

    return opened


def expect(holds: object, what: str) -> None:
    """Raise a `ViolationError` unless it holds."""
    if not holds:
        raise ViolationError(what)
