"""The sessions folder, held open: names are looked at, never followed.

Every access goes through one directory descriptor, so that a folder which is moved,
replaced or made a link between two steps cannot lead a step astray. Nothing here blocks:
a FIFO is not opened, a link is not followed, reads are bounded, connects do not wait.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from reconciler import trust
from reconciler.observations import Entry, EntryKind, FileId
from reconciler.processes import has_exited

PID_FILE_LIMIT = 64
"""Bytes read of a pid file: a pid has at most 10 digits."""

PID_LIMIT = 2**31 - 1
"""Larger than any pid of any system (`pid_t` is 32 bits)."""

NETWORK_FILESYSTEMS = frozenset(
    {
        *(
            "9p",
            "afs",
            "ceph",
            "cifs",
            "coda",
            "gfs2",
            "glusterfs",
            "lustre",
            "ncpfs",
            "nfs",
            "nfs4",
        ),
        *("ocfs2", "smb2", "smb3", "smbfs", "virtiofs"),
        *("fuse.glusterfs", "fuse.s3fs", "fuse.sshfs"),
    }
)

_RACY_NS = 1_000_000_000
# A change is stamped with the kernel's tick: another one within it may bear the same time. So a
# file counts as read for good only a good while after its last change (git does the same).

SO_PEERPIDFD = 77  # asm-generic/socket.h, Linux 6.5; 77 on every architecture but three old ones
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFREG: "a file",
}


class Answer(enum.Enum):
    """What a connect to a socket said at once."""

    ACCEPTED = "accepted"
    BUSY = "busy"
    """Its backlog is full: somebody holds it and does not accept. That is alive."""
    REFUSED = "refused"
    GONE = "gone"
    CANNOT_TELL = "cannot_tell"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who listens on a socket, and what the connect said."""

    answer: Answer
    pid: int = 0
    """The listener's pid; 0 when it cannot be named: no answer, another pid namespace, or it
    has bound another name, so that its socket was moved or linked here from elsewhere."""
    alive: bool = False
    """The listener itself, not a later owner of its pid, is known to live."""


class Folder:
    """One sessions folder, by descriptor. Close it, or use it as a context manager.

    Attributes:
        path: where it was opened. For people: no access goes through it.
        fd: the directory descriptor.
        key: device and inode.
        remote: it lies on a network filesystem.
    """

    def __init__(self, path: Path, *, at: int | None = None) -> None:
        """Open the folder, or the one that a descriptor ``at`` has open.

        Raises:
            FileNotFoundError, NotADirectoryError, PermissionError, OSError: as the system
                says it.
        """
        self.path = path
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self.fd = os.open(path, flags) if at is None else os.open(".", flags, dir_fd=at)
        self._client: socket.socket | None = None
        self._locked = False
        status = os.fstat(self.fd)
        self.key = (status.st_dev, status.st_ino)
        self.remote = filesystem_of(status.st_dev) in NETWORK_FILESYSTEMS

    def close(self) -> None:
        """Close the descriptor, and with it any lock on the folder. May be called twice."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def again(self) -> Folder:
        """The same folder by a descriptor of its own, without the lock: for another thread."""
        return Folder(self.path, at=self.fd)

    def in_place(self) -> bool:
        """Whether the path still leads to this very folder."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.key

    def closed_to_us(self) -> bool:
        """Whether its mode keeps us from its entries; we may have opened it before."""
        return not os.access(".", os.R_OK | os.X_OK, dir_fd=self.fd, effective_ids=True)

    def distrust(self) -> str:
        """Why what stands in the folder must not be acted upon, or nothing."""
        return trust.distrust(self.fd, self.path)

    def distrust_itself(self) -> str:
        """The same for the folder alone, at the cost of one call to the system."""
        return trust.distrust_itself(os.fstat(self.fd))

    def lock(self) -> bool:
        """Take the folder for one reconciler; False when another one has it.

        The lock is the kernel's (flock on the directory): it leaves no file, and ends
        with the process however that ends.
        """
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._locked = True
        return True

    def lock_holder(self) -> int | None:
        """The pid that holds the folder's lock, or None when it cannot be told."""
        if self._locked:
            return os.getpid()
        device, inode = self.key
        wanted = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
        with contextlib.suppress(OSError), open("/proc/locks", encoding="ascii") as locks:
            for line in locks:
                fields = line.split()
                if fields[1:2] == ["FLOCK"] and fields[-3] == wanted:
                    return int(fields[-4])
        return None

    def names(self) -> Iterator[str]:
        """The names in the folder as they stand now, those that are text only."""
        with os.scandir(self.fd) as entries:
            for entry in entries:
                name = os.fsdecode(entry.name)
                if name.isprintable():  # lone surrogates (not UTF-8) and control characters
                    yield name

    def status(self, name: str) -> os.stat_result | None:
        """``lstat`` of a name, or None when nothing is there."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def socket_entry(self, name: str, now: float, status: os.stat_result | None = None) -> Entry:
        """Look at a name under which a socket should stand; ``status``: as it was just seen."""
        try:
            status = status or self.status(name)
        except OSError as error:
            return Entry(EntryKind.UNKNOWN, now, detail=f"cannot look at it ({error.strerror})")
        if status is None:
            return Entry(EntryKind.ABSENT, now)
        if hostile := _hostile(status, stat.S_IFSOCK):
            return Entry(EntryKind.HOSTILE, now, detail=hostile)
        return Entry(EntryKind.SOCKET, now, file_id(status))

    def pid_entry(
        self,
        name: str,
        now: float,
        status: os.stat_result | None = None,
        before: Entry | None = None,
    ) -> Entry:
        """Look at a name under which a pid file should stand, and read it.

        Args:
            name: the name.
            now: monotonic seconds.
            status: as it was just seen.
            before: what the look before has seen there. If it has not changed since, it is not
                read again: in a folder at rest that would be the only use of the disk.
        """
        try:
            status = status or self.status(name)
            if status is None:
                return Entry(EntryKind.ABSENT, now)
            if hostile := _hostile(status, stat.S_IFREG):
                return Entry(EntryKind.HOSTILE, now, detail=hostile)
            if before is not None and not self.remote and _unchanged(before, status):
                return before
            text, status = self._read(name)
        except FileNotFoundError:
            return Entry(EntryKind.ABSENT, now)
        except OSError as error:
            return Entry(EntryKind.UNKNOWN, now, detail=f"cannot read it ({error.strerror})")
        if hostile := _hostile(status, stat.S_IFREG):
            return Entry(EntryKind.HOSTILE, now, detail=hostile)
        return _pid_entry(text, status, now)

    def _read(self, name: str) -> tuple[bytes, os.stat_result]:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=self.fd)
        try:
            return os.read(descriptor, PID_FILE_LIMIT), os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def ask(self, name: str) -> Peer:
        """Connect to a socket of the folder and hang up: does somebody listen, and who?

        Never waits. On Linux the inode is pinned first, so a link put under the name is
        not followed, and a path over the 108 bytes of ``sun_path`` is no matter.
        """
        client = self._unused_client()
        try:
            self._connect(client, name)
        except OSError as error:
            if isinstance(error, ConnectionRefusedError) and sys.platform == "linux":
                self._client = client  # as good as new: most who are asked are dead
            else:
                client.close()
            return Peer(_said(error))
        with client:
            return _peer(client, name, self.key)

    def connect(self, name: str) -> socket.socket:
        """A connection to whoever listens on a socket of the folder; it does not block.

        Raises:
            FileNotFoundError, ConnectionRefusedError: nobody does.
            BlockingIOError: somebody does, and takes no connection now.
            OSError: as the system says it.
        """
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.setblocking(False)
            self._connect(client, name)
        except BaseException:
            client.close()
            raise
        return client

    def _unused_client(self) -> socket.socket:
        client, self._client = self._client, None
        if client is None:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.setblocking(False)
        return client

    def _connect(self, client: socket.socket, name: str) -> None:
        """Connect to the socket that stands under ``name`` now."""
        if sys.platform != "linux":
            client.connect(str(self.path / name))
            return
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=self.fd)
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK), name)
            client.connect(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)


def _said(error: OSError) -> Answer:
    """What a failed connect says of who listens."""
    match error:
        case BlockingIOError():
            return Answer.BUSY
        case ConnectionRefusedError():
            return Answer.REFUSED
        case FileNotFoundError():
            return Answer.GONE
        case _:
            return Answer.CANNOT_TELL


def file_id(status: os.stat_result, text: bytes = b"") -> FileId:
    """What tells one state of an entry from any other."""
    return FileId(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size, text)


def _hostile(status: os.stat_result, wanted: int) -> str:
    """Why an entry is not to be touched, or nothing."""
    if (kind := stat.S_IFMT(status.st_mode)) != wanted:
        return f"{_KINDS.get(kind, 'an unknown kind of entry')} where {_KINDS[wanted]} belongs"
    if status.st_uid != os.geteuid():
        return f"owned by uid {status.st_uid}"
    return ""


def _pid_entry(text: bytes, status: os.stat_result, now: float) -> Entry:
    file = file_id(status, text)
    changed = status.st_ctime_ns if time.time_ns() - status.st_ctime_ns > _RACY_NS else 0
    digits = text.removesuffix(b"\n")
    whole = len(text) < PID_FILE_LIMIT
    if not text:
        return Entry(EntryKind.EMPTY, now, file, changed_ns=changed)
    if not (whole and digits.isdigit() and 0 < (pid := int(digits)) <= PID_LIMIT):
        return Entry(EntryKind.BROKEN, now, file, detail="not a pid", changed_ns=changed)
    return Entry(EntryKind.PID, now, file, pid, changed_ns=changed)


def _unchanged(before: Entry, status: os.stat_result) -> bool:
    """Whether a pid file still says what it said: its ``ctime``, which nobody can set, tells."""
    return (
        before.file is not None
        and before.changed_ns == status.st_ctime_ns
        and before.file == file_id(status, before.file.text)
    )


def _peer(client: socket.socket, name: str, folder: tuple[int, int]) -> Peer:
    """Name the listener. With ``SO_PEERPIDFD`` its life is certain, not only its number."""
    if sys.platform != "linux" or not _is_bound_here(client.getpeername(), name, folder):
        return Peer(Answer.ACCEPTED)
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    try:
        descriptor = client.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        return Peer(Answer.ACCEPTED, pid, alive=error.errno == errno.ENOPROTOOPT)
    try:
        return Peer(Answer.ACCEPTED, pid, alive=not has_exited(descriptor))
    finally:
        os.close(descriptor)


def _is_bound_here(bound: str, name: str, folder: tuple[int, int]) -> bool:
    """Whether what a listener has bound is this name, and not that of another folder.

    A path that leads nowhere any more, and one that was relative, do not tell the folder.
    """
    place, base = os.path.split(bound)
    if base != name:
        return False
    if not os.path.isabs(place):
        return True
    try:
        status = os.stat(place)
    except OSError:
        return True
    return (status.st_dev, status.st_ino) == folder


def filesystem_of(device: int) -> str:
    """The type of the mounted filesystem with this device number, or an empty string."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[2] == wanted:
                return fields[fields.index("-") + 1]
    return ""
