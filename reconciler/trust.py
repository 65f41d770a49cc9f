"""Whether a folder can be trusted: nobody but us and root may exchange what stands in it."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

_LATELY = 1.0
# Seconds for which a look at the folders above counts: it costs a tenth of a write.

_DEEPEST = 512
# Folders that are walked up; a way without an end is not trusted.


def distrust(descriptor: int, path: Path) -> str:
    """Why others could exchange what stands in a folder, and what to do; or nothing.

    The folder must be ours and closed to others' writing. Those above it, as they really are
    (links on the way do not count), must be root's or ours, and closed or sticky: who can
    write there can put another folder in its place. Where an access list (POSIX ACL) is set,
    the mode's group bits are its mask: no group or user that it names may do more than they
    say, so that the mode alone tells, and ``chmod g-w`` mends.

    Args:
        descriptor: the folder, open; ``O_PATH`` will do.
        path: where it was opened, for people.
    """
    return distrust_itself(os.fstat(descriptor)) or _distrust_above(descriptor, path)


def distrust_below(descriptor: int, path: Path) -> str:
    """Why a folder of ours that is made in this one could not be trusted, or nothing."""
    trusted = {0, os.geteuid(), os.stat("/").st_uid}
    if reason := _distrust_ancestor(os.fstat(descriptor), trusted):
        return f"{str(path)!r} {reason}"
    return _distrust_above(descriptor, path)


class Trust:
    """`distrust` for one who asks often: the folders above are looked at once a second."""

    def __init__(self) -> None:
        self._trusted: tuple[int, int] | None = None
        self._until = 0.0

    def distrust(self, descriptor: int, path: Path) -> str:
        """`distrust`, as it was within the last second for the folders above."""
        status, now = os.fstat(descriptor), time.monotonic()
        folder = (status.st_dev, status.st_ino)
        if folder != self._trusted or now >= self._until:
            if reason := _distrust_above(descriptor, path):
                return distrust_itself(status) or reason
            self._trusted, self._until = folder, now + _LATELY
        return distrust_itself(status)


def distrust_at(path: Path) -> str:
    """`distrust` of the folder that the path leads to now.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return distrust(descriptor, path)
    finally:
        os.close(descriptor)


def distrust_itself(status: os.stat_result) -> str:
    """`distrust`, but for the folders above."""
    if status.st_uid != os.geteuid():
        return f"the folder belongs to uid {status.st_uid}, not to us (uid {os.geteuid()})"
    if writers := _writers(status):
        return f"{writers[0]} may write to the folder ({_mode(status)}): chmod {writers[1]} it"
    return ""


def _distrust_above(descriptor: int, path: Path) -> str:
    # The owner of / is root, also where root has another number (a user namespace).
    trusted = {0, os.geteuid(), os.stat("/").st_uid}
    try:
        for up, status in _above(descriptor):
            if reason := _distrust_ancestor(status, trusted):
                return f"{os.path.realpath(path / up)!r}, above the folder, {reason}"
    except OSError as error:
        return f"the folders above it cannot be looked at ({error.strerror})"
    return ""


def _distrust_ancestor(status: os.stat_result, trusted: set[int]) -> str:
    if status.st_uid not in trusted:
        return f"belongs to uid {status.st_uid}, who can exchange the folder"
    if (writers := _writers(status)) and not status.st_mode & stat.S_ISVTX:
        return f"is open to writing by {writers[0]} ({_mode(status)}): chmod {writers[1]} it"
    return ""


def _above(descriptor: int) -> Iterator[tuple[str, os.stat_result]]:
    """The way up to each folder above this one, the nearest first, and its status."""
    root, below = os.stat("/"), os.fstat(descriptor)
    for depth in range(1, _DEEPEST):
        up = "/".join([".."] * depth)
        status = os.stat(up, dir_fd=descriptor)
        # A folder that is mounted on its own child looks like its own parent, too.
        if os.path.samestat(status, below) and os.path.samestat(status, root):
            return
        yield up, status
        below = status
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _writers(status: os.stat_result) -> tuple[str, str] | None:
    """Who else may write there, and the change of mode that ends it."""
    if status.st_mode & stat.S_IWOTH:
        return "everybody", "go-w"
    if status.st_mode & stat.S_IWGRP:
        return "its group or those whom its access list names", "g-w"
    return None


def _mode(status: os.stat_result) -> str:
    return f"mode {stat.S_IMODE(status.st_mode):04o}"
