"""Inputs by seeded chance alone: for where atheris cannot be had, and for the test suite.

It does not see what an input reaches. It is quick, the same everywhere, and needs nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from fuzzing.target import Target


def inputs(target: Target, count: int, seed: int = 0) -> Iterator[bytes]:
    """The target's seeds, then ``count`` inputs made of them."""
    chance = random.Random(f"{target.name} {seed}")  # noqa: S311 - no secret
    yield from target.seeds
    for _ in range(count):
        text = bytearray(chance.choice(target.seeds))
        for _ in range(chance.choice((1, 1, 2, 3, 5, 8))):
            _change(text, target, chance)
        yield bytes(text[: target.longest])


def _change(text: bytearray, target: Target, chance: random.Random) -> None:
    start = chance.randrange(len(text) + 1)
    end = min(len(text), start + chance.choice((0, 1, 1, 2, 4, 16)))
    match chance.randrange(7):
        case 0:
            text[start:end] = b""
        case 1:
            text[start:end] = chance.randbytes(chance.choice((1, 1, 2, 4)))
        case 2:
            text[start:start] = text[start:end] * chance.choice((1, 2, 20))
        case 3:
            text[start:end] = chance.choice(target.words or target.seeds)
        case 4:
            text[start:] = chance.choice(target.seeds)[start:]
        case 5:
            other = chance.choice(target.seeds)
            text[start:end] = other[start:end]
        case _:
            if start < len(text):
                text[start] ^= 1 << chance.randrange(8)
