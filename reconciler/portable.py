"""Processes by psutil, where there is no ``/proc`` and no pidfd: macOS and Windows.

It runs on Linux, too, and is tested there. Nobody loads it where it is not needed: psutil takes
a tenth of a start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

import psutil

from reconciler.facts import DEAD, HIDDEN, Facts, Life, Processes, boot_id, exists, printable
from reconciler.observations import ProcessId


class _Portable:
    """Processes by psutil: macOS and Windows, and Linux without ``/proc/<pid>/task``."""

    def facts(self, pid: int) -> Facts:
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                if process.status() == psutil.STATUS_ZOMBIE:
                    return DEAD
                created = process.create_time()
                return Facts(
                    Life.ALIVE,
                    ProcessId(pid, round(created * 1_000_000), boot_id()),
                    parent=process.ppid(),
                    group=_or_zero(os.getpgid, pid),
                    session=_or_zero(os.getsid, pid),
                    age=max(0.0, time.time() - created),
                    uid=process.uids().effective,
                )
        except psutil.ZombieProcess:
            return DEAD
        except (psutil.Error, OSError, ValueError, OverflowError):
            return HIDDEN if exists(pid) else DEAD

    def arguments(self, pid: int) -> tuple[str, ...] | None:
        try:
            return tuple(psutil.Process(pid).cmdline()) or None
        except (psutil.Error, OSError):
            return None

    def program(self, pid: int) -> str:
        try:
            return printable(os.path.basename(psutil.Process(pid).exe()))
        except (psutil.Error, OSError):
            return ""

    def variable(self, pid: int, name: str) -> str | None:
        try:
            return psutil.Process(pid).environ().get(name, "")
        except (psutil.Error, OSError):
            return None

    def variables(self, pid: int, names: Sequence[str]) -> tuple[str, ...] | None:
        values = [self.variable(pid, name) for name in names]
        return None if None in values else tuple(value or "" for value in values)

    def children(self, pid: int) -> tuple[int, ...] | None:
        try:
            return tuple(child.pid for child in psutil.Process(pid).children())
        except (psutil.Error, OSError):
            return None

    def holds(self, pid: int, files: Collection[tuple[int, int]]) -> bool | None:
        try:
            paths = [file.path for file in psutil.Process(pid).open_files()]
        except (psutil.Error, OSError):
            return None
        for path in paths:
            with contextlib.suppress(OSError):
                status = os.stat(path)
                if (status.st_dev, status.st_ino) in files:
                    return True
        return False

    def foreign(self, pid: int) -> bool:  # noqa: ARG002 - these systems have no such thing
        return False

    def catches(self, pid: int, number: signal.Signals) -> bool:  # noqa: ARG002 - cannot be told
        return True

    def pids(self) -> Iterable[int]:
        return psutil.pids()


def _or_zero(function: Callable[[int], int], pid: int) -> int:
    try:
        return function(pid)
    except OSError:
        return 0


PORTABLE: Final[Processes] = _Portable()
"""The system, asked by psutil."""
