"""A log file that may be renamed under its writer, and that rotates by itself if asked.

All of it happens in the thread that writes lines (`reconciler.sinks`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from reconciler.sinks import PIECE, Descriptor, Sink, SinkError

MODE = 0o640
"""A log's mode, less what the umask takes: a shipper reads it by its group."""

_HOW = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
# Nothing that is no file holds the open up. Reading is for a look at the last byte.
_HOW |= os.O_NOFOLLOW  # a rotation would rename the link


def to_file(path: Path, *, rotate_bytes: int = 0, rotate_keep: int = 5) -> Sink:
    """A sink that appends to a file.

    Args:
        path: the file; made when it is not there, its folder is not.
        rotate_bytes: the size in bytes over which the file becomes ``path.1`` and a new one is
            begun; 0: never.
        rotate_keep: how many older files are kept, ``path.1`` the newest.

    Raises:
        SinkError: it cannot be opened, or is no file.
    """
    try:
        return Sink(LogFile(path, rotate_bytes, rotate_keep))
    except OSError as error:
        raise SinkError(
            f"log file {str(path)!r} cannot be opened: {error.strerror}: {_remedy(path, error)}"
        ) from error


def _remedy(path: Path, error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return f"make the folder {str(path.parent)!r}"
        case errno.ELOOP:
            return "it is a symbolic link: name the file itself"
        case errno.ENOSPC | errno.EDQUOT:
            return "make room, or name one on another disk"
        case errno.EACCES | errno.EPERM:
            return f"put the rights of it and of {str(path.parent)!r} right, or name another"
        case _:
            return "name another"


class LogFile:
    """Appends lines to whatever file has the path.

    Another may rename the file at any time (logrotate, an operator): what is written next goes
    to a new one. Several processes may write to it and rotate it: a lock on the file that is
    about to be renamed lets one of them do so.
    """

    piece = PIECE

    def __init__(self, path: Path, rotate_bytes: int = 0, rotate_keep: int = 5) -> None:
        self._trouble = ""
        self._path = os.path.abspath(path)
        self._most = rotate_bytes
        self._keep = rotate_keep
        self._open()

    @property
    def trouble(self) -> str:
        """What the system said to the last thing that failed; empty when all is well."""
        return self._trouble or self._file.trouble

    def write(self, lines: list[bytes]) -> int:
        """Write them all; what the system refuses is lost."""
        lost = 0
        while lines:
            self._trouble = ""
            lost += self._follow()
            if self._is_full(lines[0]) and self._rotate():
                lost += self._follow()
            if self._trouble and not os.fstat(self._descriptor).st_nlink:
                return lost + len(lines)  # the file that is held was removed: nobody would see them
            fitting = self._fitting(lines)
            lost += self._file.write(lines[:fitting])
            lines = lines[fitting:]
        return lost

    def reset(self) -> None:
        """The rest of a line is the parent's to write."""
        self._file.reset()

    def _open(self) -> None:
        descriptor = os.open(self._path, _HOW, MODE)
        file = Descriptor(descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            file.close()
            raise OSError(errno.EINVAL, "Is not a regular file")
        _end_line(descriptor)
        self._descriptor, self._file = descriptor, file

    def _follow(self) -> int:
        """Write to the file that has the path from here on; how many lines that loses."""
        if self._is_current():
            return 0
        before = self._file
        try:
            self._open()
        except OSError as error:  # the old one goes on: whoever renamed it has what comes, too
            self._trouble = f"{self._path}: {error.strerror}"
            return 0
        lost = before.settle()
        before.close()
        return lost

    def _is_current(self) -> bool:
        with contextlib.suppress(OSError):
            named = os.stat(self._path, follow_symlinks=False)
            return os.path.samestat(os.fstat(self._descriptor), named)
        return False

    def _size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def _is_full(self, line: bytes) -> bool:
        return bool(self._most) and 0 < self._size() > self._most - len(line)

    def _rotate(self) -> bool:
        """Rename the file and its elders; False where that cannot be done now."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
        except OSError:  # another process does it
            return False
        try:
            if self._is_current():
                self._rename()
        except OSError as error:  # it grows on, and is tried again
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._trouble = f"{self._path} cannot be rotated: {error.strerror}"
            return False
        return True

    def _rename(self) -> None:
        """What has the last name is replaced, unless there is a free one before it."""
        names = [self._path, *(f"{self._path}.{number}" for number in range(1, self._keep + 1))]
        free = next((at for at, name in enumerate(names) if not os.path.lexists(name)), self._keep)
        for older, newer in zip(names[free:0:-1], names[free - 1 :: -1], strict=True):
            os.replace(newer, older)

    def _fitting(self, lines: list[bytes]) -> int:
        """How many of the lines go into the file before it is full; one at least."""
        if not self._most:
            return len(lines)
        room = self._most - self._size() - len(lines[0])
        fitting = 1
        while fitting < len(lines) and (room := room - len(lines[fitting])) >= 0:
            fitting += 1
        return fitting


def _end_line(descriptor: int) -> None:
    """End the line in which a writer was killed, or the disk was full: none begins within it."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        with contextlib.suppress(OSError):  # a full disk
            os.write(descriptor, b"\n")
