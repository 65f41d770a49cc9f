"""Removing what was judged, and nothing that has come since.

Between the look and the removal a new keeper may have come. So an entry is compared, then
moved to a hidden name, and what was really caught is looked at once more: if it is not
what was judged it is put back where it was. A keeper of ours cannot even be born
meanwhile: it and the removal take the same lock.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from reconciler.facts import Life
from reconciler.folder import Answer, Folder, file_id
from reconciler.layout import Role, claims, file_name
from reconciler.observations import Entry, EntryKind, FileId
from reconciler.processes import SYSTEM

_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_HIDDEN = re.compile(r"\.(?P<name>.+)\.taken-(?P<remover>[0-9]{1,10})")


class Fate(enum.Enum):
    """What became of one entry."""

    REMOVED = "removed"
    GONE = "gone"
    """It was not there any more."""
    CHANGED = "changed"
    """Something newer stands there. It was left alone, or put back."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What became of a session's entries."""

    fates: tuple[tuple[Role, Fate], ...]
    locked: bool = False
    """A keeper for the session lives, is being born or dies right now: nothing was done."""

    @property
    def complete(self) -> bool:
        """All that was judged is gone."""
        return not self.locked and all(fate is not Fate.CHANGED for _, fate in self.fates)


def remove(
    folder: Folder,
    sid: str,
    entries: tuple[tuple[Role, FileId], ...],
    *,
    listening: bool = False,
) -> Removal:
    """Remove these entries of a session, each only if it still is what was judged.

    Args:
        folder: the sessions folder.
        sid: the session's id.
        entries: what was judged, in the order of removal.
        listening: a keeper listens for the session, and that is known. Otherwise a socket
            that stands when a pid file is taken is a new keeper's.

    Raises:
        OSError: the folder cannot be written to. What was caught was put back.
    """
    with birth_lock(folder, sid) as free:
        if not free:
            return Removal((), locked=True)
        fates = []
        for role, judged in entries:
            name, socket = file_name(role, sid), file_name(Role.SOCKET, sid)
            fates.append((role, _take(folder, name, judged, "" if listening else socket)))
            if fates[-1][1] is Fate.CHANGED:
                break
        return Removal(tuple(fates))


def remove_logs(folder: Folder, sid: str, names: Iterable[str]) -> None:
    """Remove log files of a session of which no keeper of ours lives."""
    with birth_lock(folder, sid) as free:
        for name in names if free else ():
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder.fd)


@contextlib.contextmanager
def birth_lock(folder: Folder, sid: str) -> Iterator[bool]:
    """Hold the lock that a keeper of ours holds for life, the one on its log, if it is free."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(file_name(Role.KEEPER_LOG, sid), flags, dir_fd=folder.fd)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        yield True  # no log, or nothing that a keeper would lock
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def _take(folder: Folder, name: str, judged: FileId, socket: str) -> Fate:
    here = folder.status(name)
    if here is None:
        return Fate.GONE
    hidden = hidden_name(name)
    # What it says is read only once it was caught: then nobody changes it by its name.
    if file_id(here, judged.text) != judged or folder.status(hidden) is not None:
        return Fate.CHANGED
    try:
        os.rename(name, hidden, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
    except FileNotFoundError:
        return Fate.GONE
    try:
        caught = _look(folder, hidden)
        if caught.file == judged and not _in_use(folder, hidden, caught, socket):
            os.unlink(hidden, dir_fd=folder.fd)
            return Fate.REMOVED
    except OSError:
        _put_back(folder, hidden, name)
        raise
    _put_back(folder, hidden, name)
    return Fate.CHANGED


def hidden_name(name: str) -> str:
    """Under which name this process hides an entry."""
    return f".{name}.taken-{os.getpid()}"


def _look(folder: Folder, name: str) -> Entry:
    """The entry as a look would see it, by the kind that stands there."""
    status = folder.status(name)
    if status is not None and stat.S_ISSOCK(status.st_mode):
        return folder.socket_entry(name, 0.0, status)
    return folder.pid_entry(name, 0.0, status)


def _in_use(folder: Folder, hidden: str, caught: Entry, socket: str) -> bool:
    """Whether a keeper has come that goes on with what was caught.

    One may have opened the pid file before it was moved, to write it anew in place, and not
    have come to that yet. But it has bound its socket before.
    """
    if caught.kind is EntryKind.SOCKET:
        return folder.ask(hidden).answer is not Answer.REFUSED
    return bool(socket) and folder.status(socket) is not None


def _put_back(folder: Folder, hidden: str, name: str) -> None:
    """Give an entry its name again; if a newer one has taken the name, that one counts."""
    with contextlib.suppress(FileExistsError):
        os.link(hidden, name, src_dir_fd=folder.fd, dst_dir_fd=folder.fd, follow_symlinks=False)
    os.unlink(hidden, dir_fd=folder.fd)


def is_taken(name: str) -> bool:
    """Whether a name is a hidden one that a removal has given."""
    return _HIDDEN.fullmatch(name) is not None


def remover_of(hidden: str) -> tuple[str, int]:
    """The name that an entry had before, and the pid of who has hidden it.

    Raises:
        ValueError: it is no hidden name; ask `is_taken` first.
    """
    parts = _HIDDEN.fullmatch(hidden)
    if parts is None:
        raise ValueError(f"{hidden!r} is no name that a removal has given")
    return parts["name"], int(parts["remover"])


def recover(folder: Folder, name: str) -> Fate | None:
    """Finish what a removal that was itself killed has left under a hidden name.

    What lives, or may live, is put back; what is dead is removed. Not to be called while
    this very process removes something.

    Args:
        folder: the sessions folder.
        name: a name for which `is_taken` holds.

    Returns:
        What became of it; None when it was left alone, since its remover is at work.
    """
    parts = _HIDDEN.fullmatch(name)
    if parts is None or claims(original := parts["name"]) is None:
        return None
    if may_be_at_work(folder, int(parts["remover"])):
        return None
    entry = _look(folder, name)
    if not entry.present:
        return Fate.GONE
    if entry.kind in {EntryKind.HOSTILE, EntryKind.UNKNOWN}:
        return None
    if folder.remote or not _is_dead(folder, name, entry):
        _put_back(folder, name, original)
        return Fate.CHANGED
    os.unlink(name, dir_fd=folder.fd)
    return Fate.REMOVED


def may_be_at_work(folder: Folder, remover: int) -> bool:
    """Whether a process may be the one that gave a hidden name, or its pid is another's by now.

    Who removes holds the folder open all the while.
    """
    if remover == os.getpid():  # in a container each start may get the same pid
        return False
    if SYSTEM.facts(remover).life is Life.DEAD:
        return False
    return sys.platform != "linux" or SYSTEM.holds(remover, {folder.key}) is not False


def _is_dead(folder: Folder, name: str, entry: Entry) -> bool:
    """Whether nobody stands behind an entry; an empty pid file may be about to be filled."""
    if entry.kind is EntryKind.SOCKET:
        return folder.ask(name).answer is Answer.REFUSED
    return entry.kind is EntryKind.PID and SYSTEM.facts(entry.pid).life is Life.DEAD
