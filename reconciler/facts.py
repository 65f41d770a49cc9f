"""What can be known of a process, and what whoever tells it has to answer."""

from __future__ import annotations

import contextlib
import enum
import functools
import os
import signal
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from reconciler.observations import ProcessId


class Life(enum.Enum):
    """Whether a pid stands for a process now."""

    DEAD = "dead"
    """No such process, or a zombie."""
    ALIVE = "alive"
    HIDDEN = "hidden"
    """There is one, and the system does not let us see it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One look at one pid."""

    life: Life
    process: ProcessId | None = None
    parent: int = 0
    group: int = 0
    session: int = 0
    age: float = 0.0
    """Seconds since it started, by the boot clock."""
    uid: int = -1
    dying: bool = False
    """It is on its way out, or SIGKILL is pending: it will not run its own code again."""
    kernel: bool = False
    """A thread of the kernel: it has no arguments, and is nobody's keeper."""


DEAD: Final = Facts(Life.DEAD)
HIDDEN: Final = Facts(Life.HIDDEN)


class Processes(Protocol):
    """How the system is asked about its processes. No call raises for a pid's sake."""

    def facts(self, pid: int) -> Facts:
        """Look at one pid."""

    def arguments(self, pid: int) -> tuple[str, ...] | None:
        """The arguments, the program first; None when they cannot be read or are gone."""

    def program(self, pid: int) -> str:
        """The base name of the file that it runs, printable; empty when it cannot be read.

        Not its arguments: a program may write anything there, secrets among it.
        """

    def variable(self, pid: int, name: str) -> str | None:
        """A variable of the environment that the process started with.

        An empty string when it is not set, None when the environment cannot be read.
        """

    def variables(self, pid: int, names: Sequence[str]) -> tuple[str, ...] | None:
        """Several of them, in one read; None when the environment cannot be read."""

    def children(self, pid: int) -> tuple[int, ...] | None:
        """The pids of its children, zombies among them; None when they cannot be read."""

    def holds(self, pid: int, files: Collection[tuple[int, int]]) -> bool | None:
        """Whether it has one of these open, by device and inode; None: cannot be told."""

    def foreign(self, pid: int) -> bool:
        """Whether it is known to live in another pid namespace than we do."""

    def catches(self, pid: int, number: signal.Signals) -> bool:
        """Whether it has a handler for a signal; where that cannot be told it is taken so."""

    def pids(self) -> Iterable[int]:
        """All pids there are."""


@functools.cache
def boot_id() -> str:
    """An id of this boot of the machine."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    import psutil  # noqa: PLC0415 - it takes a tenth of the daemon's start

    return str(int(psutil.boot_time()))


def exists(pid: int) -> bool:
    """Whether a pid is anybody's, one whom the system hides from us included."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def printable(name: str) -> str:
    """A program's name as it can be shown."""
    return "".join(each for each in name if each.isprintable())[:64]
