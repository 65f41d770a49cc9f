"""A second folder of the same user, and daemons on folders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from conftest import PROGRAM, Daemon, end_all


@contextlib.contextmanager
def another_folder(folder: Path, home: str = "b") -> Iterator[Path]:
    """A sessions folder in a home of its own, beside that of ``folder``."""
    path = folder.parents[2] / home / ".pi" / "dashboard" / "sessions"
    path.mkdir(parents=True, mode=0o700)
    try:
        yield path
    finally:
        end_all(path)


@contextlib.contextmanager
def daemon_on(folder: Path, log: Path, program: Sequence[str] = PROGRAM) -> Iterator[Daemon]:
    """The background process on a folder, killed at the end."""
    daemon = Daemon(folder, log, program=program)
    try:
        yield daemon
    finally:
        daemon.process.kill()
        daemon.process.wait()
