"""The launch note: what a session with a restart policy was started with, kept in its folder.

Whoever spawns the session makes it; whoever stops the session removes it, first of all. The
reconciler makes none, ever: it writes into the one that it has open, so that a note which was
removed meanwhile stays removed.

Two lines of JSON: how to start the session, and what has come of that. The second one is written
in place; should power fail within that write, its boot is none of ours, and it counts as new.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

from reconciler.endings import ending_of
from reconciler.errors import InvalidRequestError, ReconcilerError
from reconciler.facts import boot_id
from reconciler.folder import Folder, file_id
from reconciler.layout import Role, file_name
from reconciler.observations import Entry, EntryKind, FileId
from reconciler.removal import birth_lock
from reconciler.restarts import Ending, RestartPolicy, RestartRecord

LIMIT = 1 << 20
"""Bytes of a note: more than arguments that a person gives, less than what holds up a look."""

_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_POLICIES = frozenset(get_args(RestartPolicy))
_NOTED = _POLICIES - {"never"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to start a session again. Of its environment nothing is kept."""

    policy: RestartPolicy
    cwd: str
    agent_command: tuple[str, ...] = field(default=(), repr=False)  # a secret may stand in it
    keeper_command: tuple[str, ...] = ()
    """Empty: a keeper of ours, wherever it is installed by then."""
    capture: bool = False


class NoNoteError(Exception):
    """What stands there is no launch note: why."""


class Note:
    """A launch note that is open.

    Attributes:
        file: what it was when it was opened.
        launch: how to start the session.
        record: what has come of it; how it has ended is not known here.
        failed: the newest restart did not come up.
        written_at: when that was noted down, in seconds since the epoch, as of its opening.
    """

    def __init__(self, folder: Folder, sid: str, descriptor: int) -> None:
        """Read it.

        Raises:
            NoNoteError: it is none.
            OSError: it cannot be read.
        """
        self._folder, self._name, self._descriptor = folder, file_name(Role.LAUNCH, sid), descriptor
        status = os.fstat(descriptor)
        _refuse(status)
        if status.st_size > LIMIT:
            raise NoNoteError(f"larger than {LIMIT} bytes")
        text = os.pread(descriptor, LIMIT, 0)
        self._head, _, tail = text.partition(b"\n")
        self.file = file_id(status)
        self.written_at = status.st_mtime
        self.launch = _launch(self._head)
        self.record, self.failed = _record(self.launch.policy, tail)

    def write(self, record: RestartRecord, *, failed: bool = False) -> None:
        """Note down what has come of it.

        Raises:
            OSError: it cannot be written.
        """
        tail = _tail(record, failed=failed)
        at = len(self._head) + 1
        if os.pwrite(self._descriptor, tail, at) != len(tail):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._name)
        os.ftruncate(self._descriptor, at + len(tail))
        self.record, self.failed = record, failed

    def stands(self) -> bool:
        """Whether it was not removed, nor replaced, since."""
        status, ours = self._folder.status(self._name), os.fstat(self._descriptor)
        return status is not None and os.path.samestat(status, ours)


@contextlib.contextmanager
def opened(folder: Folder, sid: str, *, to_write: bool = False) -> Iterator[Note]:
    """A session's launch note, open; one that is to be written to is its opener's alone.

    Raises:
        FileNotFoundError: there is none.
        BlockingIOError: somebody else has it to write to.
        NoNoteError, OSError: what stands there is none, or cannot be read.
    """
    name = file_name(Role.LAUNCH, sid)
    status = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
    _refuse(status)
    flags = _OPEN | (os.O_RDWR if to_write else os.O_RDONLY)
    descriptor = os.open(name, flags, dir_fd=folder.fd)
    try:
        if to_write:  # a lock that ends with its process
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Note(folder, sid, descriptor)
    finally:
        os.close(descriptor)


def _refuse(status: os.stat_result) -> None:
    """Refuse what is no file of ours, or one that says what others would have us run."""
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise NoNoteError("no file of ours")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NoNoteError("others may write to it: chmod 600")


def look(folder: Folder, sid: str, now: float, *, over: bool) -> tuple[Entry, RestartRecord | None]:
    """Look at a session's launch note.

    Args:
        folder: the sessions folder.
        sid: the session's id.
        now: monotonic seconds.
        over: the session is, so how it has ended is read, too.

    Raises:
        OSError: no descriptor is left to read how it ended.
    """
    try:
        with opened(folder, sid) as note:
            record = note.record
            if over:
                record = replace(record, ending=_ending(folder, sid, note))
            return Entry(EntryKind.NOTE, now, note.file), record
    except FileNotFoundError:
        return Entry(EntryKind.ABSENT, now), None
    except NoNoteError as error:
        return Entry(EntryKind.HOSTILE, now, detail=str(error)), None
    except OSError as error:
        return Entry(EntryKind.UNKNOWN, now, detail=f"cannot read it ({error.strerror})"), None


def _ending(folder: Folder, sid: str, note: Note) -> Ending:
    return ending_of(folder, sid, failed_at=note.written_at if note.failed else None)


def check(launch: Launch) -> None:
    """Refuse what could not be noted down.

    Raises:
        InvalidRequestError: no such policy, or too long a command.
    """
    if launch.policy not in _POLICIES:
        allowed = ", ".join(get_args(RestartPolicy))
        raise InvalidRequestError(f"restart policy {launch.policy!r} is none of {allowed}")
    if len(_head(launch)) > LIMIT // 2:
        raise InvalidRequestError(
            "the agent's command is too long to be noted down for a restart: "
            f"{LIMIT // 2} bytes at most"
        )


@contextlib.contextmanager
def written(folder: Folder, sid: str, launch: Launch) -> Iterator[int]:
    """Note down what a session was started with, for this boot of the machine.

    Gives the note, open, to be synced: after a power failure it should be whole. That may take
    long, so it is not done here.

    Raises:
        OSError: it cannot be written, or another note stands there. Nothing is left of it, nor
            if a `ReconcilerError` is raised meanwhile.
    """
    flags = _OPEN | os.O_WRONLY | os.O_CREAT | os.O_EXCL
    name = file_name(Role.LAUNCH, sid)
    text = _head(launch) + b"\n" + _tail(RestartRecord(launch.policy))
    with open(os.open(name, flags, 0o600, dir_fd=folder.fd), "wb") as note:
        try:
            note.write(text)
            note.flush()
            yield note.fileno()
        except (OSError, ReconcilerError):
            forget(folder, sid)
            raise


def forget(folder: Folder, sid: str) -> bool:
    """Remove a session's launch note: from here on nobody starts the session again.

    Returns:
        Whether there was one. What is no file of ours is none.

    Raises:
        OSError: it cannot be removed.
    """
    name = file_name(Role.LAUNCH, sid)
    status = folder.status(name)
    if status is None or not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        return False
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder.fd)
    return True


def forget_judged(folder: Folder, sid: str, judged: FileId) -> bool:
    """Remove the note that was judged, and no other. Whether it is gone.

    A new session makes its note after its keeper has the lock.
    """
    with birth_lock(folder, sid) as free:
        if not free:
            return False
        status = folder.status(file_name(Role.LAUNCH, sid))
        if status is not None and file_id(status) != judged:
            return False
        forget(folder, sid)
        return True


def forget_over(folder: Folder, sid: str) -> bool:
    """Remove the note of a session that is over; a new one of the name has the lock.

    Returns:
        Whether there was one.

    Raises:
        OSError: it cannot be removed.
    """
    with birth_lock(folder, sid) as free:
        return free and forget(folder, sid)


def give_up(folder: Folder, sid: str, judged: FileId) -> bool:
    """Note down that the session is started no more. Whether the note was the judged one.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with opened(folder, sid, to_write=True) as note:
            if note.file != judged:
                return False
            note.write(replace(note.record, given_up=True))
            return True
    except (FileNotFoundError, NoNoteError):
        return False


def _head(launch: Launch) -> bytes:
    return json.dumps(
        {
            "launch": 1,
            "policy": launch.policy,
            "cwd": launch.cwd,
            "agent_command": launch.agent_command,
            "keeper_command": launch.keeper_command,
            "capture": launch.capture,
        }
    ).encode()


def _tail(record: RestartRecord, *, failed: bool = False) -> bytes:
    restarts = [round(float(each), 3) for each in record.restarts]
    more = {"given_up": record.given_up, "failed": failed}
    return json.dumps({"boot": boot_id(), "restarts": restarts} | more).encode() + b"\n"


def _launch(head: bytes) -> Launch:
    said = _object(head)
    match said:
        case {
            "launch": 1,
            "policy": str(policy),
            "cwd": str(cwd),
            "agent_command": list(agent),
            "keeper_command": list(keeper),
            "capture": bool(capture),
        } if policy in _NOTED and all(isinstance(each, str) for each in (*agent, *keeper)):
            return Launch(
                policy=cast("RestartPolicy", policy),
                cwd=cwd,
                agent_command=tuple(agent),
                keeper_command=tuple(keeper),
                capture=capture,
            )
        case _:
            raise NoNoteError("no launch note, or one of another version")


def _record(policy: RestartPolicy, tail: bytes) -> tuple[RestartRecord, bool]:
    """What has come of it in this boot; nothing, if that is not to be read."""
    match _object(tail):
        case {
            "boot": str(boot),
            "restarts": list(restarts),
            "given_up": bool(given_up),
            "failed": bool(failed),
        } if boot == boot_id() and all(isinstance(each, float) for each in restarts):
            return RestartRecord(policy, restarts=tuple(restarts), given_up=given_up), failed
        case _:
            return RestartRecord(policy, this_boot=False), False


def _object(line: bytes) -> Any:  # noqa: ANN401 - plain JSON values
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
