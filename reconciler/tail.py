"""Reading a session's log from its end, and following it while it grows, is cut, or replaced."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from reconciler.lines import read_line

_BLOCK = 64 * 1024
_SEEN = 4096
"""Bytes of what was read last that are remembered: by them the place in a cut log is found."""


class UnreadableLogError(Exception):
    """What stands under a log's name is not read: no regular file, or not ours."""


class LogFile:
    """A log, opened without following links. Close it, or use it as a context manager.

    Args:
        folder: the sessions folder.
        name: the log's name.

    Raises:
        FileNotFoundError: there is none.
        UnreadableLogError: it is no regular file, or another user's.
        OSError: it cannot be opened.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / name
        self._fd = _open(self._path)
        self._offset = 0
        self._seen = b""
        self._begun: list[bytes] = []  # the pieces of a line that has no end yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def go_to(self, *, count: int | None = None, since: float | None = None) -> None:
        """Go to the last lines, or to the first one since a moment; to the later of the two.

        Args:
            count: so many lines.
            since: seconds since the epoch. A line without a time belongs to the one before
                it that has one; in a log without any the time of its last change counts.
        """
        end = os.fstat(self._fd).st_size
        starts = [0]
        if count is not None:
            starts.append(self._last(count, end))
        if since is not None:
            starts.append(self._since(since, end))
        self._offset = max(starts)
        before = max(0, self._offset - _SEEN)
        self._seen = os.pread(self._fd, self._offset - before, before)

    def _last(self, count: int, end: int) -> int:
        start = end
        for number, (offset, _) in enumerate(self._backward(end) if count else (), 1):
            start = offset
            if number == count:
                break
        return start

    def _since(self, since: float, end: int) -> int:
        start = None
        for offset, raw in self._backward(end):
            stamp = read_line(raw).stamp
            if stamp is not None and stamp < since:
                return end if start is None else start
            if stamp is not None:
                start = offset
        if start is None:
            return 0 if os.fstat(self._fd).st_mtime >= since else end
        return start

    def _backward(self, end: int) -> Iterator[tuple[int, bytes]]:
        """The lines before ``end``, the last one first, each with where it begins."""
        pieces: list[bytes] = []
        begin, is_last = end, True
        while begin > 0:
            size = min(_BLOCK, begin)
            begin -= size
            first, *others = os.pread(self._fd, size, begin).split(b"\n")
            offset = begin + size
            for piece in reversed(others):
                offset -= len(piece)
                line = b"".join([piece, *reversed(pieces)])
                if line or not is_last:
                    yield offset, line
                pieces, is_last, offset = [], False, offset - 1
            pieces.append(first)
        line = b"".join(reversed(pieces))
        if line or not is_last:
            yield 0, line

    def lines(self) -> Iterator[bytes]:
        """The lines from here to the end, the unfinished last one as well."""
        yield from self._new_lines()
        yield from self._unfinished()

    def news(self) -> Iterator[bytes]:
        """The lines that were finished since the last call, in this log or in a newer one.

        A log that was cut in place goes on after what was read last; one that was emptied, or
        that another has replaced, from its beginning.
        """
        yield from self._new_lines()
        if not self._is_replaced():
            return
        try:
            newer = _open(self._path)
        except (OSError, UnreadableLogError):
            return  # gone already, or nothing to be read
        yield from self._new_lines()
        yield from self._unfinished()
        os.close(self._fd)
        self._fd, self._offset, self._seen = newer, 0, b""
        yield from self._new_lines()

    def _is_replaced(self) -> bool:
        with contextlib.suppress(OSError):
            return not os.path.samestat(os.lstat(self._path), os.fstat(self._fd))
        return False

    def _new_lines(self) -> Iterator[bytes]:
        if os.fstat(self._fd).st_size != self._offset and not self._is_where_it_was():
            self._offset = self._place()
        while block := os.pread(self._fd, _BLOCK, self._offset):
            self._offset += len(block)
            self._seen = (self._seen + block)[-_SEEN:]
            *finished, rest = block.split(b"\n")
            if finished:
                yield b"".join([*self._begun, finished[0]])
                yield from finished[1:]
                self._begun = []
            if rest:
                self._begun.append(rest)

    def _unfinished(self) -> Iterator[bytes]:
        if self._begun:
            yield b"".join(self._begun)
        self._begun = []

    def _is_where_it_was(self) -> bool:
        size = len(self._seen)
        return os.pread(self._fd, size, self._offset - size) == self._seen

    def _place(self) -> int:
        """Where what was read last ends now; the beginning if it is not there any more."""
        seen, end = self._seen, os.fstat(self._fd).st_size
        if len(seen) == _SEEN:  # a log that was shorter was not cut, but emptied
            while end > 0:
                begin = max(0, end - _BLOCK)
                block = os.pread(self._fd, end - begin + _SEEN - 1, begin)
                if (found := block.rfind(seen)) >= 0:
                    return begin + found + _SEEN
                end = begin
        self._seen, self._begun = b"", []
        return 0


def _open(path: Path) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if stat.S_ISLNK(os.lstat(path).st_mode):
        raise UnreadableLogError(f"{str(path)!r} is a symbolic link: it is not followed")
    descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        return descriptor
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableLogError(f"{str(path)!r} is no regular file: it is not read")
    raise UnreadableLogError(f"{str(path)!r} belongs to uid {status.st_uid}: it is not read")
