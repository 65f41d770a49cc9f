"""Seeing that files come and go, without spinning: the machine's cores are for the measured.

Each wait ends with the moment (``time.perf_counter``) at which it was seen. What it takes to be
woken is the same for ours and for the peer, and is a part of both figures.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

WAIT = 60.0
"""Seconds until a benchmark gives up what must come. A bound, not a pause."""

IN_ATTRIB, IN_MOVED_TO, IN_CREATE, IN_DELETE_SELF = 0x4, 0x80, 0x100, 0x400

_STEP = 0.001
# Seconds between two looks at many names.

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def notices(mask: int, *paths: Path) -> Iterator[int]:
    """An inotify descriptor on some paths."""
    descriptor = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    try:
        for path in paths:
            if _libc.inotify_add_watch(descriptor, os.fsencode(path), mask) < 0:
                raise OSError(ctypes.get_errno(), "inotify_add_watch", str(path))
        yield descriptor
    finally:
        os.close(descriptor)


def _next(descriptor: int, deadline: float, what: str) -> None:
    """Sleep until there is a notice, and take all that there are."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(max(0.0, deadline - time.perf_counter()) * 1000):
        raise TimeoutError(f"waited {WAIT:g} s in vain: {what}")
    os.read(descriptor, 65536)


class Going:
    """Waits until a few files are gone, woken by the files themselves.

    A context manager, entered while the files are there (under whatever name): a notice comes
    when a file loses its name for good, and nothing else that happens in the folder wakes us.
    """

    def __init__(self, *files: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._descriptor = self._stack.enter_context(notices(IN_ATTRIB | IN_DELETE_SELF, *files))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait(self, *names: Path) -> float:
        """Wait until none of the names is there."""
        paths = [str(name) for name in names]
        deadline = time.perf_counter() + WAIT
        while any(map(os.path.lexists, paths)):
            _next(self._descriptor, deadline, f"{paths} are gone")
        return time.perf_counter()


def all_gone(names: Sequence[str], seconds: float = WAIT) -> float:
    """Wait until none of many names is there.

    One look for each name that is gone, and one a millisecond for the first that is not: that
    is the resolution, and next to no work. (Notices would come by the thousand.)
    """
    deadline = time.perf_counter() + seconds
    for name in names:
        while os.path.lexists(name):
            if time.perf_counter() > deadline:
                raise TimeoutError(f"waited {seconds:g} s in vain: {name} is gone")
            time.sleep(_STEP)
    return time.perf_counter()


def accepting(path: Path, descriptor: int) -> float:
    """Wait until a socket accepts, woken by notices of its folder."""
    deadline = time.perf_counter() + WAIT
    while not os.path.lexists(path):
        _next(descriptor, deadline, f"{path} is there")
    while not accepts(path):  # bound, and not yet listening: that takes microseconds
        if time.perf_counter() > deadline:
            raise TimeoutError(f"waited {WAIT:g} s in vain: {path} accepts")
        time.sleep(0.00005)
    return time.perf_counter()


def accepts(path: Path) -> bool:
    """Whether a socket accepts connections."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
