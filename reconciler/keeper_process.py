"""The keeper: a socket in front of the standard input of one agent.

Run by path, ``python -I -S keeper_process.py <sid>``; nobody imports it. One process, one
thread, the standard library alone.

What it promises:

* **One keeper for a session id, ever.** A ``flock`` on the keeper log dies with its holder;
  with the lock in hand, a socket that still answers belongs to a keeper that does not lock,
  and is left alone. Only a socket that refuses is replaced.
* **Lines arrive whole, in order, unmixed.** Lines that end in LF go verbatim to the agent;
  a client that breaks off leaves nothing of its last line with the agent.
* **The receipt is true, even if the keeper is killed in the middle.** The kernel turns what
  is unread when a socket is closed, by whatever way, into a reset at the other end. So the end
  of a line is looked at (``MSG_PEEK``) and leaves the socket only once it is in the agent's
  pipe: a client that shut its sending side and then reads end-of-stream knows that the pipe
  has all of it. Anything else is a reset. (Known for Linux; other systems close without one.)
* **A last piece without LF** is forwarded, with one, when it is a whole JSON object or list of
  at most 256 KiB. Otherwise it is dropped and its sender sees a reset, for the last byte of an
  unfinished line stays unread. One exception: a sender of more than 64 bytes that fell silent
  within a line for 100 ms gets its last byte taken too, as with a small send buffer it may be
  waiting for just that; should it break off there, it sees end-of-stream, not a reset.
* **A key makes sending again safe.** On a connection that begins with ``KEY_MARK`` each line is
  preceded by a key: ``KEY_MARK key KEY_MARK line LF``. A line whose key is among the newest 1024
  that went into the pipe is taken, with a receipt, and not forwarded again. That this keeper
  does so shows in the name its socket is bound by, which every client can ask the kernel for.
* **A slow agent slows its clients, not the keeper's memory.** Nothing is read while the pipe is
  full. A connection holds up to 32 KiB of an unfinished line; beyond that it needs the one
  buffer for long lines (64 MiB), and loses it when others wait for it and it brings less than
  1 MiB in 2 s. Of 256 connections the one without progress for the longest, 1 s at least, makes
  room for one that waits at the door.
* **The agent dies with the keeper** (Linux: parent-death signal), and the keeper with the agent.
* **Idle means idle.** No timer runs at rest, unless the agent's output is captured.

Exit codes: 0 the agent has ended, or SIGTERM or SIGINT came; 1 the agent could not be started,
or lived less than 300 ms; 2 fatal at start; 3 a live keeper already holds this session id.
SIGHUP: look whether the socket and the pid file are still there, and make them again.

The log is JSON lines, and never holds a line's text. Over its cap it is cut in place to its
newer half; what a capturing agent writes between the last block's copy and the cut, a matter of
microseconds, is lost.
"""

from __future__ import annotations

import enum
import errno
import json
import mmap
import os
import re
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable

try:
    import fcntl
    import resource
except ImportError:
    sys.stderr.write("keeper_process: this keeper needs a POSIX system\n")
    raise SystemExit(2) from None

SESSION_ID = re.compile(r"(?!launch-)[A-Za-z0-9][A-Za-z0-9._-]{0,89}", re.ASCII)

# Exit codes.
NO_AGENT = 1
FATAL = 2
ALREADY_RUNNING = 3

BACKLOG = 512
MAX_CONNECTIONS = 256
CHUNK = 256 * 1024  # bytes looked at in one turn; the default socket buffer fits in
SHORT_LINE = 32 * 1024  # bytes of an unfinished line that any connection may hold
LONG_LINE = 64 * 1024 * 1024  # bytes without LF; a longer line is refused
LAST_PIECE = 256 * 1024  # bytes; parsing JSON costs up to 30 times its size
SAFE_TO_HOLD = 64  # bytes in all; a kernel buffer this small never keeps a sender waiting

PID_FILE = 64  # bytes read of a pid file; one that is longer says no pid

KEY_MARK = 0x01  # begins no JSON text, and nothing that an agent understands
KEY_LENGTH = 128  # bytes
KEYS = 1024  # the newest ones are remembered, for as long as keeper and agent live
SHOWS_KEYS = ".//"  # before the socket's name when it is bound: the same file, and a sign

READY_AFTER = 0.3  # seconds that an agent must live
LOCK_PATIENCE = 2.0  # seconds: a predecessor may be dying, a remover holds the lock briefly
BIND_PATIENCE = 0.2  # seconds: a keeper of another kind may be between bind and listen
RETRY_EVERY = 0.02  # seconds
HOLD_LAST_BYTE = 0.1  # seconds; then its sender may wait for the kernel buffer it is in
LEASE = 2.0  # seconds in which the holder of the long line's buffer must bring ...
LEASE_BYTES = 1024 * 1024  # ... this much, while others wait for it
SILENCE = 1.0  # seconds without progress after which a connection may have to make room
SAY_AGAIN_AFTER = 10.0  # seconds between two log lines on the same kind of refusal

WELCOME_TURNS = 3  # for a new connection at once: a key, lines, the end
PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT

SEVERITIES = {"info": 9, "warning": 13, "error": 17}  # OpenTelemetry's severity_number
TEXT = 1200  # bytes of a text in a log line, of which there are six: so 8,000 are never reached

LF = 0x0A
STDERR = 2
ENDING = (signal.SIGTERM, signal.SIGINT)
RESET_FOR_AGENT = (*ENDING, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ)
NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_WRONLY


class Despite:
    """Go on despite these errors: what ``contextlib.suppress`` does, for 0.1 MiB less."""

    def __init__(self, *errors: type[Exception]) -> None:
        self._errors = errors

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, self._errors)


class StartError(Exception):
    """The keeper cannot start: its exit code, one constant word, and what a person reads."""

    def __init__(self, code: int, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.reason = reason


class AgentDeafError(Exception):
    """The agent has closed its standard input."""


class Answer(enum.Enum):
    """What a connect to a socket's name says about its listener."""

    ALIVE = enum.auto()
    REFUSED = enum.auto()
    ABSENT = enum.auto()
    UNKNOWN = enum.auto()


# --- the folder ---------------------------------------------------------------------------


def _inode(seen: os.stat_result) -> tuple[int, int]:
    return seen.st_dev, seen.st_ino


def _is_ours(seen: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    return is_kind(seen.st_mode) and seen.st_uid == os.geteuid()


class Folder:
    """The sessions folder, held open for life; every name is looked up relative to it.

    So a path may be of any length, and whoever asks whose folder this keeper serves finds the
    descriptor.
    """

    def __init__(self, path: bytes) -> None:
        before = os.umask(0o077)
        try:
            os.makedirs(path, exist_ok=True)
        finally:
            os.umask(before)
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @property
    def mark(self) -> bytes:
        """The folder by what it is, not by a path that may move."""
        status = os.fstat(self.fd)
        return b"%d:%d" % (status.st_dev, status.st_ino)

    def entry(self, name: str) -> os.stat_result | None:
        """What stands under the name, links not followed; None when nothing does."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open(self, name: str, flags: int) -> int:
        """Open a regular file of ours without ever blocking, else raise OSError."""
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self.fd)
        if not _is_ours(os.fstat(fd), stat.S_ISREG):
            os.close(fd)
            raise OSError(errno.EPERM, "not a regular file of ours", name)
        os.set_blocking(fd, True)
        return fd

    def read_pid(self, name: str) -> int | None:
        """The pid that a pid file names; None when there is none, or not a readable one."""
        try:
            fd = self.open(name, os.O_RDONLY)
        except OSError:
            return None
        try:
            text = os.read(fd, PID_FILE)
        finally:
            os.close(fd)
        if len(text) == PID_FILE:  # there may be more: half of a number would be another one
            return None
        digits = text.strip()
        return int(digits) if digits.isdigit() and 0 < int(digits) < 2**31 else None

    def write_pid(self, name: str, pid: int) -> None:
        """Create a pid file, decimal digits and no LF, in place of a stale one of ours."""
        self.unlink(name, lambda seen: _is_ours(seen, stat.S_ISREG))
        fd = os.open(name, NEW_FILE, 0o600, dir_fd=self.fd)
        try:
            os.write(fd, b"%d" % pid)
        except OSError:
            os.unlink(name, dir_fd=self.fd)
            raise
        finally:
            os.close(fd)

    def unlink(self, name: str, only_if: Callable[[os.stat_result], bool]) -> None:
        """Remove the name if what stands there is meant; that it is gone already is success."""
        seen = self.entry(name)
        if seen is not None and only_if(seen):
            with Despite(FileNotFoundError):
                os.unlink(name, dir_fd=self.fd)

    def connect(self, name: str) -> Answer:
        """Knock at a socket. EAGAIN is a backlog that is full: its listener lives."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
            knock.setblocking(False)
            try:
                code = self._knock(knock, name)
            except OSError as error:  # the name is gone, or too long to connect to
                code = error.errno or errno.ENAMETOOLONG
        if code in (0, errno.EAGAIN, errno.EINPROGRESS):
            return Answer.ALIVE
        known = {errno.ECONNREFUSED: Answer.REFUSED, errno.ENOENT: Answer.ABSENT}
        return known.get(code, Answer.UNKNOWN)

    def _knock(self, knock: socket.socket, name: str) -> int:
        """Connect to whatever the name is now; on Linux by its inode, so of any length."""
        if sys.platform != "linux":
            return self._inside(knock.connect_ex, name)
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            return knock.connect_ex(f"/proc/self/fd/{found}")
        finally:
            os.close(found)

    def listen(self, name: str) -> socket.socket:
        """Bind and listen, never open to others; EADDRINUSE if anything has the name."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._inside(listener.bind, SHOWS_KEYS + name)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        finally:
            os.umask(before)
        listener.setblocking(False)
        return listener

    def take_away(self, name: str, judged: os.stat_result) -> bool:
        """Remove a socket that refuses; False if another was caught, which is put back."""
        hidden = f".{name}.taken-{os.getpid()}"
        try:
            os.rename(name, hidden, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except FileNotFoundError:
            return True
        caught = self.entry(hidden)
        meant = caught is not None and _inode(caught) == _inode(judged)
        gone = meant and self.connect(hidden) is Answer.REFUSED
        with Despite(FileExistsError):  # then it stays hidden, for others to judge
            if not gone:
                os.link(hidden, name, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
            os.unlink(hidden, dir_fd=self.fd)
        return gone

    def _inside(self, act: Callable[[str], int | None], name: str) -> int:
        # Not held for longer: a descriptor of a folder says that this keeper serves it.
        cwd = os.open(".", getattr(os, "O_PATH", os.O_RDONLY) | os.O_CLOEXEC)
        try:
            os.fchdir(self.fd)
            return act(name) or 0
        finally:
            os.fchdir(cwd)
            os.close(cwd)


# --- the log ------------------------------------------------------------------------------


class Log:
    """The keeper log: the lock that makes this keeper the only one, and its JSON lines.

    The lock belongs to the descriptor, so that it dies with this process; the agent's output
    goes through another open of the file. A disk that is full costs lines, never the keeper.
    """

    def __init__(self, folder: Folder, sid: str, cap: int) -> None:
        self.name = f"keeper-{sid}.log"
        self._sid = sid
        self._cap = cap  # bytes
        self._folder = folder
        self._said: dict[str, tuple[float, int]] = {}  # kind -> when said, times since
        self._fd = self._open()

    def lock(self) -> bool:
        """Take the lock now or not at all. Whoever removed the log meanwhile ended its lock."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        else:
            held = self._is_current(self._fd)
        if not held and not self._is_current(self._fd):
            os.close(self._fd)
            self._fd = self._open()
        return held

    def open_for_agent(self) -> int:
        """A second open of the log, without the lock, for the agent's output."""
        fd = self._open(os.O_WRONLY | os.O_APPEND)
        if not self._is_current(self._fd):
            os.close(fd)
            raise OSError(errno.ESTALE, "the log was replaced", self.name)
        return fd

    def say(self, level: str, event: str, message: str, **more: object) -> None:
        """Append one line; cut the log when it has grown over its cap."""
        with Despite(OSError):
            os.write(self._fd, _record(level, event, message, self._sid, more))
        self.cut()

    def say_rarely(self, kind: str, message: str, **more: object) -> None:
        """Warn of a refusal, at most every 10 s for its kind: no client can fill the log."""
        now = time.monotonic()
        when, times = self._said.get(kind, (-SAY_AGAIN_AFTER, 0))
        if now - when < SAY_AGAIN_AFTER:
            self._said[kind] = (when, times + 1)
            return
        self._said[kind] = (now, 0)
        self.say("warning", f"keeper.{kind}", message, unsaid=times, **more)

    def unsaid(self) -> dict[str, object]:
        """How often refusals came since they were last said: all, and each kind."""
        kinds = {f"unsaid_{kind}": times for kind, (_, times) in self._said.items() if times}
        return {"unsaid": sum(kinds.values()), **kinds}

    def cut(self) -> None:
        """Cut the log over its cap to its newer half, from the start of a line, in place."""
        with Despite(OSError):
            size = os.fstat(self._fd).st_size
            if size > self._cap:
                flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_APPEND)
                try:
                    self._move_down(self._line_start(size - self._cap // 2))
                finally:
                    fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)

    def _move_down(self, source: int) -> None:
        target = 0
        while target < self._cap and (block := os.pread(self._fd, CHUNK, source + target)):
            target += os.pwrite(self._fd, block, target)
        os.ftruncate(self._fd, target)

    def _line_start(self, offset: int) -> int:
        """The start of the first line at or after the offset; the offset if there is none."""
        at = offset - 1
        while block := os.pread(self._fd, CHUNK, at):
            found = block.find(b"\n")
            if found >= 0:
                return at + found + 1
            at += len(block)
        return offset

    def _open(self, flags: int = os.O_RDWR | os.O_APPEND | os.O_CREAT) -> int:
        """Open it; a sweep of logs asks, for microseconds, by a lease, whether somebody has it."""
        patience = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                return self._folder.open(self.name, flags)
            except BlockingIOError:
                if time.monotonic() > patience:
                    raise
                time.sleep(RETRY_EVERY)

    def _is_current(self, fd: int) -> bool:
        named = self._folder.entry(self.name)
        return named is not None and _inode(named) == _inode(os.fstat(fd))


def _record(level: str, event: str, message: str, sid: str, more: dict[str, object]) -> bytes:
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    known = {"timestamp": stamp, "level": level, "severity_number": SEVERITIES[level]}
    known |= {"event": event, "message": message, "sid": sid, "keeper_pid": os.getpid()} | more
    left_out = 0
    for key, value in known.items():
        if isinstance(value, str):
            known[key], less = _short(value)
            left_out += less
    if left_out:
        known["truncated"] = left_out
    return json.dumps(known).encode() + b"\n"


def _short(text: str) -> tuple[str, int]:
    """A text that any reader of JSON takes, and how many bytes were cut out of its middle."""
    text = text.encode("utf-8", "backslashreplace").decode()  # no lone surrogates
    size = len(json.dumps(text))
    if size <= TEXT:
        return text, 0
    keep = TEXT
    while len(json.dumps(text)) > TEXT:
        text = f"{text[: keep // 2]}\u2026{text[-(keep // 2) :]}"
        keep = keep * 3 // 4
    return text, size - len(json.dumps(text))


# --- what the keeper waits for ------------------------------------------------------------

if sys.platform == "linux":

    class Poller:
        """Waits for descriptors. Reading is told once per arrival, not for as long as it lasts.

        That is what lets the last byte of an unfinished line lie unread at no cost.
        """

        def __init__(self) -> None:
            self._epoll = select.epoll()

        def add(self, fd: int) -> None:
            """Tell of every arrival, and of the other side's end."""
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)

        def remove(self, fd: int) -> None:
            """Tell no more; a descriptor that is closed is removed by that."""
            self._epoll.unregister(fd)

        def await_room(self, fd: int) -> None:
            """Tell as long as the pipe takes bytes."""
            self._epoll.register(fd, select.EPOLLOUT)

        def poll(self, timeout: float | None) -> list[tuple[int, bool]]:
            """Descriptors that have news; True: the other side will send no more."""
            ended = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
            return [(fd, bool(flags & ended)) for fd, flags in self._epoll.poll(timeout)]

else:

    class Poller:
        """The same on kqueue."""

        def __init__(self) -> None:
            self._kqueue = select.kqueue()
            self._filters: dict[int, int] = {}

        def add(self, fd: int) -> None:
            """Tell of every arrival, and of the other side's end."""
            self._change(fd, select.KQ_FILTER_READ, select.KQ_EV_ADD | select.KQ_EV_CLEAR)

        def remove(self, fd: int) -> None:
            """Tell no more; a descriptor that is closed is removed by that."""
            self._change(fd, self._filters[fd], select.KQ_EV_DELETE)

        def await_room(self, fd: int) -> None:
            """Tell as long as the pipe takes bytes."""
            self._change(fd, select.KQ_FILTER_WRITE, select.KQ_EV_ADD)

        def poll(self, timeout: float | None) -> list[tuple[int, bool]]:
            """Descriptors that have news; True: the other side will send no more."""
            news = self._kqueue.control(None, 64, timeout)
            return [(event.ident, bool(event.flags & select.KQ_EV_EOF)) for event in news]

        def _change(self, fd: int, kind: int, flags: int) -> None:
            self._filters[fd] = kind
            self._kqueue.control([select.kevent(fd, kind, flags)], 0)


# --- the wire -----------------------------------------------------------------------------


class Connection:
    """One client: its socket, and what was taken out of it of a line that has no end yet."""

    __slots__ = (
        "brought",
        "ended",
        "eof",
        "have",
        "key",
        "keyed",
        "sent",
        "since",
        "sock",
        "store",
        "tight",
        "total",
    )

    def __init__(self, sock: socket.socket, now: float) -> None:
        self.sock = sock
        self.store: bytearray | mmap.mmap | None = None
        self.have = 0  # bytes in the store
        self.sent = 0  # bytes of these in the agent's pipe
        self.total = 0  # bytes taken out of the socket
        self.brought = 0  # bytes since the last progress
        self.since = now  # when it last made progress
        self.eof = False  # the client has shut its sending side: all is in the socket
        self.tight = False  # its send buffer may be too small for a byte to be held back
        self.keyed = False  # its lines have keys
        self.key = b""  # of the line under way; taken out of the socket
        self.ended = -1  # unread bytes of a last piece without LF that is complete


class Wire:
    """The connections, and the agent's pipe on which their complete lines take turns.

    What holds at every instant: a byte that is an LF, or comes before one that has arrived
    unread, left its socket only if it is in the pipe, or in the store of a line whose LF is
    still unread. Being killed anywhere is therefore a reset for every client whose lines are
    not all in the pipe.
    """

    def __init__(self, poller: Poller, log: Log, pipe: int) -> None:
        self._poller = poller
        self._log = log
        self._pipe = pipe
        self._buffer = bytearray(CHUNK)
        self._chunk = memoryview(self._buffer)
        self._listener: socket.socket | None = None
        self._connections: dict[int, Connection] = {}
        self._ready: dict[Connection, None] = {}  # may have bytes; in order of their turns
        self._held: dict[Connection, float] = {}  # one byte kept unread, since when
        self._owner: Connection | None = None  # has begun a line in the pipe, and not ended it
        self._holder: Connection | None = None  # has the long line's buffer
        self._waiters: dict[Connection, None] = {}  # want it, in order
        self._lease = 0.0  # until when the holder must have made progress
        self._keys: dict[bytes, None] = {}  # of lines in the pipe, the newest last
        self._full = False  # the pipe takes no more
        self._deaf = False  # the agent reads no more
        self._knocks = False  # somebody may wait at the door while there is no room
        self._more = False  # somebody may wait at the door, though there is room

    # What the loop calls.

    def open(self, listener: socket.socket) -> None:
        """Accept from this listener; what waits at the one before is let in first."""
        self.accept()
        if self._listener is not None:
            self._poller.remove(self._listener.fileno())
            self._listener.close()
        self._listener = listener
        self._poller.add(listener.fileno())

    def accept(self) -> None:
        """Let in whoever waits, as long as there is room, but not for ever."""
        self._more = False
        if self._listener is None:
            return
        for _ in range(MAX_CONNECTIONS):
            self._knocks = len(self._connections) >= MAX_CONNECTIONS
            if self._knocks:
                return
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptors left, most likely
                self._knocks = True
                return
            try:
                self._admit(sock)
            except OSError:
                sock.close()
        self._more = True

    def news(self, fd: int, *, eof: bool) -> None:
        """Bytes, or the end, have arrived for a connection."""
        connection = self._connections.get(fd)
        if connection is not None:
            connection.eof |= eof
            self._held.pop(connection, None)
            self._ready[connection] = None

    def room(self) -> None:
        """The pipe takes bytes again."""
        if self._full:
            self._full = False
            self._poller.remove(self._pipe)
            now = time.monotonic()
            for connection in self._ready:  # that it could not be read was not its fault
                connection.since = now

    def work_waits(self) -> bool:
        """Whether ``serve`` would do anything."""
        return self._more or (not self._full and bool(self._ready or self._owner))

    def serve(self) -> None:
        """One turn for each connection that may have bytes, as long as the pipe takes them."""
        if self._more:
            self.accept()
        if self._owner is not None and not self._full:
            self._serve(self._owner)
        for connection in list(self._ready):
            if self._full:
                return
            if connection in self._ready:
                self._serve(connection)
            if connection.eof and connection in self._ready and not self._full:
                self._serve(connection)  # most likely its last: its client waits for the end

    def deadline(self) -> float:
        """When ``tick`` has something to do, by ``time.monotonic``; infinity: never."""
        if not (self._held or self._waiters or self._knocks):
            return float("inf")
        times = []
        if self._held:
            times.append(next(iter(self._held.values())) + HOLD_LAST_BYTE)
        if self._waiters:
            times.append(self._lease)
        if self._knocks:
            times.extend(each.since + SILENCE for each in self._silent())
        return min(times, default=float("inf"))

    def tick(self) -> None:
        """Carry out what has come due."""
        if not (self._held or self._waiters or self._knocks):
            return
        now = time.monotonic()
        for connection, since in list(self._held.items()):
            if since + HOLD_LAST_BYTE > now:
                break
            del self._held[connection]
            connection.tight = True
            self._ready[connection] = None
        if self._waiters and self._lease <= now:
            self._end_lease(now)
        while self._knocks and self._make_room(now):
            pass

    # One turn.

    def _serve(self, connection: Connection) -> None:
        self._ready.pop(connection, None)
        try:
            self._turn(connection)
        except AgentDeafError:
            self._deafen()
        except OSError:
            self._fail(connection)

    def _turn(self, connection: Connection) -> None:
        if connection.ended >= 0:
            self._forward_last(connection)
            return
        try:
            size = connection.sock.recv_into(self._buffer, CHUNK, PEEK)
        except BlockingIOError:
            return
        connection.eof |= size == 0
        connection.keyed |= connection.total == 0 < size and self._buffer[0] == KEY_MARK
        if connection.keyed and size and not connection.key:
            self._take_key(connection, size)
            return
        find = self._buffer.find if connection.keyed else self._buffer.rfind
        lines = find(LF, 0, size) + 1
        if lines and connection.key in self._keys and connection is not self._owner:
            self._skip(connection, lines)
        elif lines:
            self._forward(connection, lines)
        elif connection.eof and size <= 1:
            self._finish(connection, size)
        else:
            self._keep(connection, size)

    def _take_key(self, connection: Connection, size: int) -> None:
        """Take the key before a line out of the socket, once a byte of the line is there.

        That byte stays unread: a client that breaks off here sees a reset.
        """
        end = self._buffer.find(KEY_MARK, 1, min(size, KEY_LENGTH + 2))
        if self._buffer[0] != KEY_MARK or (end < 0 and size >= KEY_LENGTH + 2) or end == 1:
            self._refuse(connection, "bad_key", "a line had no key, or too long a one")
        elif 1 < end < size - 1:
            connection.key = bytes(self._chunk[1:end])
            self._consume(connection, self._chunk[: end + 1])
            self._ready[connection] = None
        elif connection.eof:
            self._refuse(connection, "broken_line", "a client broke off within a line")

    def _skip(self, connection: Connection, size: int) -> None:
        """The line with this key is in the pipe already: take this one, and forward nothing."""
        self._release(connection)
        self._consume(connection, self._chunk[:size])
        connection.key = b""
        self._progress(connection)
        self._ready[connection] = None

    def _remember(self, connection: Connection) -> None:
        """The line with this key is in the pipe now."""
        if connection.key:
            self._keys[connection.key] = None
            if len(self._keys) > KEYS:
                del self._keys[next(iter(self._keys))]
            connection.key = b""

    def _forward(self, connection: Connection, size: int) -> None:
        """Move what is stored, and complete lines from the socket, into the pipe."""
        if connection.have + self._buffer.find(LF) > LONG_LINE:
            self._refuse(connection, "line_too_long", "a line was longer than 64 MiB")
            return
        wrote = 0
        if self._push_store(connection):
            wrote = self._write(self._chunk[:size])
            self._consume(connection, self._chunk[:wrote])
        if wrote:
            within = self._buffer[wrote - 1] != LF
            self._owner = connection if within else None
            if not within:
                self._remember(connection)
            self._progress(connection)
        if self._full and self._owner is not connection and not wrote:
            self._ready = {connection: None} | self._ready  # it keeps its turn
        else:
            self._ready[connection] = None

    def _keep(self, connection: Connection, size: int) -> None:
        """Store an unfinished line's bytes; the last stays unread, to turn an end into a reset."""
        if connection.have + size > LONG_LINE:
            self._refuse(connection, "line_too_long", "a line was longer than 64 MiB")
            return
        take = size if connection.tight else size - 1
        store = self._store_for(connection, connection.have + take)
        if store is None:
            return  # it is woken when the long line's buffer is free, or more arrives
        with memoryview(store) as view, view[connection.have : connection.have + take] as free:
            self._consume(connection, free)
        connection.have += take
        connection.brought += take
        if connection.brought >= LEASE_BYTES:
            self._progress(connection)
        if connection.eof or size == CHUNK:
            self._ready[connection] = None
        elif connection.total > SAFE_TO_HOLD and not connection.tight:
            self._held[connection] = time.monotonic()

    def _finish(self, connection: Connection, unread: int) -> None:
        """At its end, with none or one byte unread: the receipt, a last piece, or a reset."""
        if connection.have + unread == 0:
            self._close(connection)
            return
        store, have = connection.store, connection.have
        last = bytes(self._chunk[:unread])
        if (
            store is None
            or connection.keyed
            or have > LAST_PIECE
            or not _is_complete(store[:have] + last)
        ):
            self._refuse(connection, "broken_line", "a client broke off within a line")
            return
        store[have : have + unread + 1] = last + b"\n"
        connection.have += unread + 1
        connection.ended = unread
        self._forward_last(connection)

    def _forward_last(self, connection: Connection) -> None:
        if self._push_store(connection):
            self._consume(connection, self._chunk[: connection.ended])
            self._owner = None
            self._close(connection)
        else:
            self._ready[connection] = None

    def _push_store(self, connection: Connection) -> bool:
        """Write what is stored into the pipe; True once none is left."""
        if connection.store is None:
            self._release(connection)
            return True
        view = memoryview(connection.store)
        with view, view[connection.sent : connection.have] as rest:
            connection.sent += self._write(rest)
        if connection.sent:
            self._owner = connection
        if connection.sent < connection.have:
            return False
        self._release(connection)
        return True

    def _write(self, data: memoryview) -> int:
        """Write what the pipe takes; less than all means that it is full."""
        try:
            wrote = os.write(self._pipe, data)
        except BlockingIOError:
            wrote = 0
        except BrokenPipeError:
            raise AgentDeafError from None
        if wrote < len(data):
            self._full = True
            self._poller.await_room(self._pipe)
        return wrote

    def _consume(self, connection: Connection, into: memoryview) -> None:
        """Take bytes that were seen out of the socket."""
        done = 0
        while done < len(into):
            got = connection.sock.recv_into(into[done:])
            if not got:
                raise ConnectionResetError
            done += got
        connection.total += done

    # The bounds.

    def _store_for(self, connection: Connection, size: int) -> bytearray | mmap.mmap | None:
        """A store of at least this size, or None while the long line's buffer is taken."""
        if size <= SHORT_LINE:
            connection.store = connection.store or bytearray(SHORT_LINE + 2)
        elif self._holder is not connection:
            if self._holder is not None or next(iter(self._waiters), connection) is not connection:
                if not self._waiters:
                    self._lease = time.monotonic() + LEASE
                self._waiters[connection] = None
                return None
            self._waiters.pop(connection, None)
            self._holder = connection
            self._progress(connection)
            # Mapped, so that its memory comes as it is filled and goes back at once.
            mapped = mmap.mmap(-1, LONG_LINE + 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if connection.store is not None:
                mapped[: connection.have] = connection.store[: connection.have]
            connection.store = mapped
        return connection.store

    def _release(self, connection: Connection) -> None:
        """Give up the store, and the place in the line for the long one."""
        connection.store = None
        connection.have = connection.sent = 0
        self._waiters.pop(connection, None)
        if self._holder is connection:
            self._holder = None
        if self._holder is None and self._waiters:
            self._ready[next(iter(self._waiters))] = None

    def _progress(self, connection: Connection) -> None:
        connection.brought = 0
        connection.since = time.monotonic()
        if self._holder is connection:
            self._lease = connection.since + LEASE

    def _end_lease(self, now: float) -> None:
        holder = self._holder
        if holder is None or holder is self._owner or holder in self._ready:
            self._lease = now + LEASE  # it waits for the agent, or for its turn
        else:
            self._refuse(holder, "slow_line", "a long line came too slowly while others waited")

    def _silent(self) -> list[Connection]:
        busy = self._ready.keys() | self._waiters.keys() | {self._owner}
        return [each for each in self._connections.values() if each not in busy]

    def _make_room(self, now: float) -> bool:
        """Close the connection without progress for the longest, if it is long enough."""
        first = min(self._silent(), key=lambda each: each.since, default=None)
        if first is None or first.since + SILENCE > now:
            return False
        door = select.poll()
        if self._listener is not None:
            door.register(self._listener, select.POLLIN)
        self._knocks = bool(door.poll(0))
        if self._knocks:
            self._refuse(first, "no_room", "a silent connection made room for another")
        return self._knocks

    # Coming and going.

    def _admit(self, sock: socket.socket) -> None:
        uid = _peer_uid(sock)
        if uid != os.geteuid():
            sock.close()
            self._log.say_rarely("connection_refused", "a client of another user", uid=uid)
        elif self._deaf:
            sock.close()
            self._log.say_rarely("connection_refused", "the agent reads no more")
        else:
            self._welcome(sock.fileno(), Connection(sock, time.monotonic()))

    def _welcome(self, fd: int, connection: Connection) -> None:
        """Serve at once what has come already: of a short line, often all, the end included.

        Where others have bytes waiting, they came first.
        """
        self._connections[fd] = connection
        alone = not self._ready
        self._ready[connection] = None
        for _ in range(WELCOME_TURNS if alone else 0):
            if self._full or self._owner is not None or connection not in self._ready:
                break
            self._serve(connection)
        if fd in self._connections:
            try:
                self._poller.add(fd)
            except OSError:  # the kernel has no memory, or no watch, left for it
                self._fail(connection)

    def _refuse(self, connection: Connection, kind: str, message: str) -> None:
        """Close with bytes unread, which its client sees as a reset."""
        self._log.say_rarely(kind, message, bytes_held=connection.have)
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        """Close the socket: end-of-stream for its client if all was taken, else a reset."""
        fd = connection.sock.fileno()
        del self._connections[fd]
        self._ready.pop(connection, None)
        self._held.pop(connection, None)
        connection.sock.close()
        self._release(connection)
        if self._knocks:
            self.accept()

    def _fail(self, connection: Connection) -> None:
        within = connection is self._owner
        self._refuse(connection, "connection_failed", "a connection failed")
        if within:  # half a line is in the pipe and cannot be ended: nothing may follow it
            self._deafen()

    def _deafen(self) -> None:
        """The agent takes no more: every client gets a reset, for as long as the agent lives."""
        self._deaf = True
        self._owner = None
        self.room()
        self._log.say("warning", "keeper.agent_deaf", "the agent has closed its standard input")
        for connection in list(self._connections.values()):
            self._close(connection)


def _is_complete(piece: bytes | bytearray) -> bool:
    """Whether this is a whole JSON object or list; of a number one could never know."""
    if piece.lstrip()[:1] not in (b"{", b"["):
        return False
    try:
        json.loads(piece)
    except (ValueError, RecursionError):
        return False
    return True


def _peer_uid(sock: socket.socket) -> int:
    """The user who connected. Linux ``struct ucred`` and macOS ``xucred`` have it at 4."""
    if sys.platform == "linux":
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    else:
        credentials = sock.getsockopt(0, 1, 76)  # SOL_LOCAL, LOCAL_PEERCRED
    return int.from_bytes(credentials[4:8], sys.byteorder)


# --- the agent ----------------------------------------------------------------------------


class Agent:
    """The child process: its pid, the pipe to its standard input, and how its exec went."""

    def __init__(self, command: list[bytes], environment: dict[bytes, bytes], output: int) -> None:
        """Fork and exec; raise OSError when not even a process can be had."""
        keeper = os.getpid()
        stdin, self.stdin = os.pipe()
        self.report, report = os.pipe()  # closed by exec, or tells why there was none
        self.started = float("inf")
        os.set_blocking(self.stdin, False)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _become_agent(keeper, (stdin, output, output), report, command, environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(stdin)
        os.close(report)

    def exec_error(self) -> str | None:
        """Why the program could not be started; None: it runs, from now on."""
        said = os.read(self.report, 16)
        os.close(self.report)
        self.report = -1  # its number may be a connection's next
        self.started = time.monotonic()
        return os.strerror(int(said)) if said else None

    def reap(self) -> int | None:
        """The exit code if it has ended, negative for a signal; None while it lives."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            return 0
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> None:
        """SIGKILL, and wait for the end: 2 s at most, a device may hold a process longer."""
        os.kill(self.pid, signal.SIGKILL)
        give_up = time.monotonic() + 2
        while self.reap() is None and time.monotonic() < give_up:
            time.sleep(0.002)


def _become_agent(
    keeper: int,
    stdio: tuple[int, int, int],
    report: int,
    command: list[bytes],
    environment: dict[bytes, bytes],
) -> None:
    """In the child: never returns."""
    try:
        # At once, and not only at exec: should the keeper be killed now, nobody listens.
        kept = sorted({*stdio, report})
        for first, last in zip([2, *kept], [*kept, 1 << 16], strict=True):
            os.closerange(max(3, first + 1), last)
        _die_with(keeper)
        signal.set_wakeup_fd(-1)
        for number in RESET_FOR_AGENT:
            signal.signal(number, signal.SIG_DFL)
        for target, source in enumerate(stdio):
            os.dup2(source, target)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execvpe(command[0], command, environment)  # noqa: S606 - an exec is the point
    except OSError as error:
        os.write(report, b"%d" % (error.errno or 0))
    finally:
        os._exit(127)


def _die_with(keeper: int) -> None:
    """Have the kernel kill this process when the keeper dies, even if that was just now."""
    if sys.platform == "linux":
        with Despite(ImportError):  # loaded here so that the keeper stays small
            import ctypes  # noqa: PLC0415

            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != keeper:
        os._exit(127)


# --- the keeper ---------------------------------------------------------------------------


class Keeper:
    """One session's keeper: ``start`` it, then ``run`` it to its exit code."""

    def __init__(self, sid: str, environ: dict[bytes, bytes], notice: Notice) -> None:
        self._sid = sid
        self._environ = environ
        self._notice = notice
        self._socket_name = f"{sid}.rpc.sock"
        self._pid_name = f"{sid}.rpc.sock.pid"
        self._agent_pid_name = f"{sid}.rpc.sock.pi-pid"
        self._capture = environ.get(b"PI_KEEPER_CAPTURE_PI_OUTPUT") == b"1"
        self._check_every = self._number(b"PI_KEEPER_LOG_CHECK_INTERVAL_MS", 5000, 10) / 1000
        self._check_at = time.monotonic() + self._check_every if self._capture else float("inf")
        self._ready = False
        self._exit_code: int | None = None
        try:
            self._folder = Folder(_sessions_dir(environ))
            cap = self._number(b"PI_KEEPER_LOG_MAX_BYTES", 128 * 1024 * 1024, 1024)
            self._log = Log(self._folder, sid, cap)
        except (OSError, ValueError) as error:
            raise StartError(FATAL, "log", f"no log: {error}") from None

    # The start.

    def start(self) -> None:
        """Lock, bind, pid file, agent, in this order; StartError leaves no file of ours behind."""
        self._lock()
        try:
            self._watch_signals()
            self._bind(stale=(self._agent_pid_name, self._pid_name))
            self._say("info", "keeper.start", "keeper starts")
            self._write_pid()
            self._spawn()
        except StartError as error:
            self._remove_files()
            if error.code != ALREADY_RUNNING:  # whoever finds a live keeper touches nothing
                self._say("error", "keeper.failed", str(error), reason=error.reason)
            raise
        except OSError as error:
            self._remove_files()
            raise StartError(FATAL, "system", str(error)) from None

    def _lock(self) -> None:
        give_up = time.monotonic() + LOCK_PATIENCE
        while not self._log.lock():  # its holder may be dying, or only removing files
            alive = self._folder.connect(self._socket_name) is Answer.ALIVE
            if alive or time.monotonic() > give_up:
                raise StartError(
                    ALREADY_RUNNING, "already_running", "a live keeper holds this session id"
                )
            time.sleep(RETRY_EVERY)

    def _watch_signals(self) -> None:
        self._poller = Poller()
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (*ENDING, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._poller.add(self._wake)

    def _bind(self, stale: Iterable[str] = ()) -> None:
        """Listen on the socket's name, in place of one that refuses, never of one that answers."""
        try:
            self._clear_socket()
            for name in stale:
                self._folder.unlink(name, lambda seen: _is_ours(seen, stat.S_ISREG))
            self._listener = self._folder.listen(self._socket_name)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # lost a race, so somebody lives
                raise StartError(
                    ALREADY_RUNNING, "already_running", "another took the socket"
                ) from None
            raise StartError(FATAL, "bind", f"cannot listen: {error}") from None
        bound = self._folder.entry(self._socket_name)
        self._bound = _inode(bound) if bound else None

    def _clear_socket(self) -> None:
        told_dead = self._predecessor_is_dead()
        give_up = time.monotonic() + (0 if told_dead else BIND_PATIENCE)
        while (seen := self._folder.entry(self._socket_name)) is not None:
            if not _is_ours(seen, stat.S_ISSOCK):
                raise StartError(FATAL, "bind", "the socket's name is taken by what is not ours")
            answer = self._folder.connect(self._socket_name)
            if answer is Answer.ALIVE:
                raise StartError(ALREADY_RUNNING, "already_running", "the session's socket answers")
            if answer is Answer.UNKNOWN:
                raise StartError(FATAL, "bind", "cannot tell whether the session's socket is alive")
            if answer is Answer.REFUSED and time.monotonic() >= give_up:
                if not self._folder.take_away(self._socket_name, seen):
                    raise StartError(ALREADY_RUNNING, "already_running", "another took the socket")
                return
            time.sleep(RETRY_EVERY)

    def _predecessor_is_dead(self) -> bool:
        """Whether the pid file says so; StartError if it names a live keeper of this session."""
        pid = self._folder.read_pid(self._pid_name)
        if pid is None or pid == os.getpid():
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        with Despite(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if self._sid.encode() in file.read(65536).split(b"\0")[1:]:
                raise StartError(
                    ALREADY_RUNNING, "already_running", "the pid file names a live keeper"
                )
        return False

    def _write_pid(self) -> None:
        try:
            self._folder.write_pid(self._pid_name, os.getpid())
        except OSError as error:
            raise StartError(FATAL, "pid_file", f"no pid file: {error}") from None
        self._heed_stop()
        self._say("info", "keeper.listening", f"listening on {self._socket_name}")
        self._notice.tell("listening", pid=os.getpid())

    def _heed_stop(self) -> None:
        """Look once more whether the session is to be started again, now that we can be found.

        Whoever stops it removes its launch note first, and looks for keepers then.
        """
        note = self._environ.get(b"PI_KEEPER_LAUNCH_NOTE", b"").decode(errors="surrogateescape")
        if note and self._folder.entry(note) is None:
            raise StartError(FATAL, "stopped", "it was stopped while it was started again")

    def _spawn(self) -> None:
        command = self._strings(b"PI_KEEPER_PI_CMD", [b"pi"]) or [b"pi"]
        command += self._strings(b"PI_KEEPER_PI_ARGS", [b"--mode", b"rpc"])
        kept = {k: v for k, v in self._environ.items() if not k.startswith(b"PI_KEEPER_")}
        kept[b"PI_DASHBOARD_SPAWNED"] = b"1"
        kept[b"PI_RECONCILER_SESSION"] = self._sid.encode()
        kept[b"PI_RECONCILER_FOLDER"] = self._folder.mark
        output = self._output()
        try:
            self._agent = Agent(command, kept, output)
        except OSError as error:
            raise StartError(
                NO_AGENT, "agent_missing", f"no process for the agent: {error}"
            ) from None
        finally:
            os.close(output)
        _dump_no_core()
        self._wire = Wire(self._poller, self._log, self._agent.stdin)
        self._wire.open(self._listener)
        self._poller.add(self._agent.report)

    def _output(self) -> int:
        if self._capture:
            try:
                return self._log.open_for_agent()
            except OSError as error:
                self._say("warning", "keeper.no_capture", f"the output is discarded: {error}")
        return os.open(os.devnull, os.O_WRONLY)

    # The loop.

    def run(self) -> int:
        """Serve until the agent has ended or a signal says stop; the exit code."""
        try:
            while self._exit_code is None:
                for fd, eof in self._poller.poll(self._pause()):
                    self._dispatch(fd, eof=eof)
                self._tick()
                self._wire.serve()
        except Exception as error:  # our own fault; the traceback goes to the launch log
            self._say("error", "keeper.crashed", "the keeper has failed", error=repr(type(error)))
            raise
        finally:
            self._remove_files()
            if self._agent.reap() is None:
                self._agent.kill()
        self._say("info", "keeper.stop", "keeper stopped", **self._log.unsaid())
        return self._exit_code

    def _pause(self) -> float | None:
        if self._wire.work_waits():
            return 0
        due = min(self._wire.deadline(), self._ready_at(), self._check_at)
        return None if due == float("inf") else max(0, due - time.monotonic())

    def _dispatch(self, fd: int, *, eof: bool) -> None:
        if fd == self._listener.fileno():
            self._wire.accept()
        elif fd == self._agent.stdin:
            self._wire.room()
        elif fd == self._wake:
            self._on_signals()
        elif fd == self._agent.report:
            self._on_exec()
        else:
            self._wire.news(fd, eof=eof)

    def _tick(self) -> None:
        now = time.monotonic()
        self._wire.tick()
        if now >= self._ready_at() and self._exit_code is None and not self._has_ended():
            self._ready = True
            self._say("info", "keeper.ready", f"keeper ready: {self._sid}")
            self._notice.tell("ready", pid=os.getpid(), agent_pid=self._agent.pid)
            self._notice.close()
        if now >= self._check_at:
            self._check_at = now + self._check_every
            self._log.cut()

    def _ready_at(self) -> float:
        return float("inf") if self._ready else self._agent.started + READY_AFTER

    def _on_exec(self) -> None:
        if self._agent.report < 0:
            return
        self._poller.remove(self._agent.report)
        error = self._agent.exec_error()
        if error is not None:
            self._give_up("agent_missing", f"the agent could not be started: {error}")
            return
        self._say("info", "keeper.agent_started", "agent started", agent_pid=self._agent.pid)
        try:
            self._folder.write_pid(self._agent_pid_name, self._agent.pid)
        except OSError as failure:
            self._say("warning", "keeper.no_agent_pid_file", f"no agent pid file: {failure}")

    def _on_signals(self) -> None:
        arrived = set(os.read(self._wake, 4096))
        if signal.SIGCHLD in arrived and self._has_ended():
            return
        if arrived & set(ENDING):
            self._exit_code = 0
        elif signal.SIGHUP in arrived:
            self._remake_files()

    def _has_ended(self) -> bool:
        """Whether the agent has; then that is told. Its time may be over before the signal came."""
        code = self._agent.reap()
        if code is not None:
            self._on_exec()
            if self._exit_code is None:
                self._on_agent_exit(code)
        return code is not None

    def _on_agent_exit(self, code: int) -> None:
        how = f"with code {code}" if code >= 0 else f"by signal {-code}"
        said = {"exit_code": code} if code >= 0 else {"signal": -code}
        self._say("info", "keeper.agent_exited", f"agent ended {how}", **said)
        if not self._ready:  # nobody was told that it is; by the clock we may be late
            self._give_up("agent_exited", f"the agent ended {how} within 300 ms")
        else:
            self._exit_code = 0

    def _give_up(self, reason: str, detail: str) -> None:
        self._say("error", "keeper.failed", detail, reason=reason)
        self._notice.tell("failed", code=NO_AGENT, reason=reason, detail=detail)
        self._notice.close()
        self._exit_code = NO_AGENT

    # The files.

    def _remake_files(self) -> None:
        """Make the socket and the pid file again if they are gone, or another's dead ones."""
        try:
            if not self._is_bound(self._folder.entry(self._socket_name)):
                self._bind()
                self._wire.open(self._listener)
                self._say("info", "keeper.rebound", f"listening on {self._socket_name} again")
            if self._folder.read_pid(self._pid_name) != os.getpid():
                self._folder.write_pid(self._pid_name, os.getpid())
                self._say("info", "keeper.pid_file_remade", "the pid file was made again")
        except (StartError, OSError) as error:
            self._say("warning", "keeper.rebind_failed", f"left as it is: {error}")

    def _remove_files(self) -> None:
        """Remove what is ours, the pid file last."""
        with Despite(OSError):
            if hasattr(self, "_bound"):
                self._folder.unlink(self._socket_name, self._is_bound)
            if hasattr(self, "_agent"):
                self._remove_pid(self._agent_pid_name, self._agent.pid)
            self._remove_pid(self._pid_name, os.getpid())

    def _remove_pid(self, name: str, pid: int) -> None:
        if self._folder.read_pid(name) == pid:
            self._folder.unlink(name, lambda _: True)

    def _is_bound(self, seen: os.stat_result | None) -> bool:
        return seen is not None and self._bound == _inode(seen)

    # The settings.

    def _strings(self, name: bytes, default: list[bytes]) -> list[bytes]:
        """A JSON list of strings from the environment; broken is logged, without its value."""
        if name not in self._environ:
            return default
        try:
            return [_argument(each) for each in _list(json.loads(self._environ[name]))]
        except (ValueError, RecursionError):
            text = f"{name.decode()} is not a JSON list of strings: the default is used"
            self._say("warning", "keeper.broken_setting", text, setting=name.decode())
            return default

    def _number(self, name: bytes, default: int, least: int) -> int:
        text = self._environ.get(name, b"")
        number = int(text) if text.isdigit() and len(text) < 16 else 0  # noqa: PLR2004
        return number if number >= least else default

    def _say(self, level: str, event: str, message: str, **more: object) -> None:
        self._log.say(level, event, message, **more)


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError("not a list")  # noqa: TRY004 - what json raises on broken text, too
    return value


def _argument(value: object) -> bytes:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("not a string that a program can be given")
    return value.encode("utf-8", "surrogateescape")  # arguments need not be text


class Notice:
    """Tells whoever started this keeper how far it is: JSON lines, by PI_KEEPER_NOTIFY_FD.

    ``{"event":"listening","pid"}``, ``{"event":"ready","pid","agent_pid"}``, or
    ``{"event":"failed","code","reason","detail"}``; then it is closed.
    """

    def __init__(self, number: bytes) -> None:
        self._fd = -1
        with Despite(OSError, ValueError, OverflowError):
            if number.isdigit() and int(number) > STDERR:
                os.fstat(int(number))
                self._fd = int(number)

    def tell(self, event: str, **more: object) -> None:
        """Write one line, or none where that would block or nobody reads."""
        if self._fd >= 0:
            with Despite(OSError):
                room = select.poll()
                room.register(self._fd, select.POLLOUT)
                if room.poll(0):
                    os.write(self._fd, json.dumps({"event": event} | more).encode() + b"\n")

    def close(self) -> None:
        """Tell no more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _sessions_dir(environ: dict[bytes, bytes]) -> bytes:
    folder = environ.get(b"PI_KEEPER_SESSIONS_DIR", b"")
    if not folder:
        base = environ.get(b"PI_DASHBOARD_HOME", b"")
        base = base if base.strip() else os.path.expanduser(b"~")
        folder = os.path.join(base, b".pi", b"dashboard", b"sessions")
    elif not os.path.isabs(folder):
        raise ValueError("PI_KEEPER_SESSIONS_DIR is not an absolute path")
    return folder


def _close_off_descriptors() -> None:
    """Let the agent inherit none, and never let one of ours be taken for stdin or stdout."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(fd)
    for number in os.listdir("/dev/fd"):
        with Despite(OSError):
            if int(number) > STDERR:
                os.set_inheritable(int(number), False)


def _dump_no_core() -> None:
    """Keep prompts out of core files. The agent, started before, has the limit it was given.

    1 and not 0: it keeps core files from a program that they are piped to as well, see core(5).
    """
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    if most:
        with Despite(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (1, most))


def _limit_descriptors(soft: bytes) -> None:
    """Have as many as programs are given, and the agent with it, not as many as a daemon takes."""
    with Despite(OSError, ValueError, OverflowError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), most))


def _detach() -> None:
    """Go on as nobody's child, so that whoever started us has no zombie to wait for."""
    if os.fork():
        os._exit(0)
    os.setsid()


def main(arguments: list[str]) -> int:
    """Be the keeper of the session that the one argument names; the exit code."""
    if os.environb.get(b"PI_KEEPER_DETACH") == b"1":
        _detach()
    if soft := os.environb.get(b"PI_KEEPER_NOFILE"):
        _limit_descriptors(soft)
    notice = Notice(os.environb.get(b"PI_KEEPER_NOTIFY_FD", b""))
    _close_off_descriptors()
    sid = arguments[0] if arguments else ""
    try:
        if len(arguments) != 1 or not SESSION_ID.fullmatch(sid):
            raise StartError(FATAL, "bad_sid", "exactly one session id is needed")  # noqa: TRY301
        keeper = Keeper(sid, dict(os.environb), notice)
        keeper.start()
    except StartError as error:
        more = {"code": error.code, "reason": error.reason}
        with Despite(OSError):
            os.write(STDERR, _record("error", "keeper.failed", str(error), sid[:100], more))
        notice.tell("failed", **more, detail=str(error))
        return error.code
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
