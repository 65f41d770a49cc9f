"""One target under atheris, in a process of its own: libFuzzer never returns.

Run by `fuzzing.__main__` as ``python -m fuzzing.engine NAME [libFuzzer's arguments]``.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

WATCHED = ["reconciler", "tomllib"]
"""What coverage is taken of."""


def main() -> None:
    atheris: Any = importlib.import_module("atheris")  # not in every environment, see Makefile
    with atheris.instrument_imports(include=WATCHED):
        every = importlib.import_module("fuzzing.every")
    name, *arguments = sys.argv[1:]
    with every.TARGETS[name].opened() as check:
        atheris.Setup([name, *arguments], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
