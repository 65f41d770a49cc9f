"""How the program's own log is written: what an operator may choose.

Apart from `reconciler.logs`, so that who reads the settings need not load what logs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from reconciler.ranges import Range

Level = Literal["debug", "info", "warning", "error"]
Form = Literal["auto", "json", "ecs", "console"]
Where = Literal["stdout", "file", "journald"]

_BYTES = Range(0, 1 << 50, "a whole number of bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """How the program's own log is written.

    Attributes:
        level: the lowest level that is written.
        form: how a line looks; ``auto``: console on a terminal, JSON elsewhere.
        sink: where the lines go.
        file: the path of the sink ``file``; ``~`` is the home folder.
        rotate_bytes: the size over which that file is renamed and begun anew; 0: never.
        rotate_keep: how many renamed ones are kept.
    """

    level: Level = "info"
    form: Form = "auto"
    sink: Where = "stdout"
    file: str = ""
    rotate_bytes: Annotated[int, _BYTES] = 0
    rotate_keep: int = 5
