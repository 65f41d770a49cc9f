"""Who a pid is, when it exits, and signals that cannot miss.

A pid is only a number that the kernel uses again. A process here is a `ProcessId`: the
pid, when it started by the kernel's boot clock, and the boot. Signals go through a pidfd
that was opened before the identity was proven, so that they reach that process or none.

`LINUX` reads ``/proc``; `reconciler.portable` says the same through psutil, where there is no
``/proc`` and no pidfd. Both run on Linux, and are tested there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Self

from reconciler.facts import DEAD, HIDDEN, Facts, Life, Processes, boot_id, exists, printable
from reconciler.observations import ProcessId

ARGUMENTS_LIMIT = 128 * 1024
"""Bytes read of a process's arguments; a keeper's take some hundred."""

ENVIRONMENT_LIMIT = 2 * 1024 * 1024
"""Bytes read of a process's environment; the kernel allows a quarter of the stack."""

_PIECE = 16 * 1024
# Bytes for which a read makes room at first.

TO_LOOK = 16
"""Descriptors that no pidfd may take: looking takes some, and who cannot look cannot clean."""

TO_END = 16
"""As many are kept beyond those for holding processes that are being ended."""

_EXITING = 0x4  # PF_EXITING in the flags of /proc/<pid>/stat
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD, there too
_SIGKILL_PENDING = 1 << (signal.SIGKILL - 1)
_NO_LEADER = b"-1"  # the exit signal of a thread: its number is no process's, yet kill() takes it
_SIGNAL_GROUP = 4  # PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9


class _Linux:
    """Processes by ``/proc``, a few reads each and no walk over all of them."""

    _tick = os.sysconf("SC_CLK_TCK") if sys.platform == "linux" else 100

    def facts(self, pid: int) -> Facts:
        try:
            descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return HIDDEN if exists(pid) else DEAD
        try:
            line, uid = os.read(descriptor, 4096), os.fstat(descriptor).st_uid
        except ProcessLookupError:
            return DEAD
        finally:
            os.close(descriptor)
        # The name in parentheses may hold anything, so the fields count from the last one.
        fields = line[line.rindex(b")") + 2 :].split()
        zombie = fields[0] in b"ZX"
        if (zombie and int(fields[17]) <= 1) or fields[35] == _NO_LEADER:
            return DEAD
        started, flags = int(fields[19]), int(fields[6])
        return Facts(
            Life.ALIVE,
            ProcessId(pid, started, boot_id()),
            parent=int(fields[1]),
            group=int(fields[2]),
            session=int(fields[3]),
            age=time.clock_gettime(time.CLOCK_BOOTTIME) - started / self._tick,
            uid=uid,
            # A zombie that is alive is a first thread that ended before the others.
            dying=self._threads_die(pid) if zombie else _dies(flags, int(fields[28])),
            kernel=bool(flags & _KERNEL_THREAD),
        )

    def _threads_die(self, pid: int) -> bool:
        """Whether none of the threads will run its own code again."""
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            return False
        lines = [_read(f"/proc/{pid}/task/{thread}/stat", 4096) for thread in threads]
        states = [line[line.rindex(b")") + 2 :].split() for line in lines if line]
        return all(
            fields[0] in b"ZX" or _dies(int(fields[6]), int(fields[28])) for fields in states
        )

    def arguments(self, pid: int) -> tuple[str, ...] | None:
        text = _read(f"/proc/{pid}/cmdline", ARGUMENTS_LIMIT)
        if not text:
            return None
        return tuple(os.fsdecode(part) for part in text.removesuffix(b"\0").split(b"\0"))

    def program(self, pid: int) -> str:
        try:
            path = os.readlink(f"/proc/{pid}/exe")
        except OSError:
            return ""
        return printable(os.path.basename(path.removesuffix(" (deleted)")))

    def variable(self, pid: int, name: str) -> str | None:
        values = self.variables(pid, (name,))
        return values[0] if values is not None else None

    def variables(self, pid: int, names: Sequence[str]) -> tuple[str, ...] | None:
        text = _read(f"/proc/{pid}/environ", ENVIRONMENT_LIMIT)
        if not text:
            return None
        parts = b"\0" + text
        return tuple(_value(parts, b"\0" + os.fsencode(name) + b"=") for name in names)

    def children(self, pid: int) -> tuple[int, ...] | None:
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            return None
        texts = [_read(f"/proc/{pid}/task/{thread}/children", 65536) for thread in threads]
        if None in texts:
            return None
        return tuple(int(child) for text in texts if text for child in text.split())

    def holds(self, pid: int, files: Collection[tuple[int, int]]) -> bool | None:
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            return None
        for name in names:
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/{pid}/fd/{name}")
                if (status.st_dev, status.st_ino) in files:
                    return True
        return False

    def foreign(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/{pid}/ns/pid") != _own_namespace()
        return False

    def catches(self, pid: int, number: signal.Signals) -> bool:
        _, found, rest = (_read(f"/proc/{pid}/status", 65536) or b"").partition(b"\nSigCgt:")
        return not found or bool(int(rest.split()[0], 16) >> (number - 1) & 1)

    def pids(self) -> Iterable[int]:
        return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _value(parts: bytes, wanted: bytes) -> str:
    _, found, rest = parts.partition(wanted)
    return os.fsdecode(rest.partition(b"\0")[0]) if found else ""


def _dies(flags: int, pending: int) -> bool:
    return bool(flags & _EXITING or pending & _SIGKILL_PENDING)


@functools.cache
def _own_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _read(path: str, limit: int) -> bytes | None:
    """What a file of ``/proc`` says, so many bytes at most; None when it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        text = os.read(descriptor, min(limit, _PIECE))
        if len(text) == _PIECE < limit:  # seldom: room for all of it is not got each time
            text += os.read(descriptor, limit - _PIECE)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return text


LINUX: Final[Processes] = _Linux()


def _portable() -> Processes:
    from reconciler.portable import PORTABLE  # noqa: PLC0415 - psutil takes a tenth of a start

    return PORTABLE


SYSTEM: Final[Processes] = LINUX if sys.platform == "linux" else _portable()
"""What this system is asked by."""


def is_over(process: ProcessId) -> bool:
    """Whether a process is dead, or will not run its own code again."""
    facts = SYSTEM.facts(process.pid)
    return facts.life is not Life.HIDDEN and (facts.process != process or facts.dying)


def has_exited(pidfd: int) -> bool:
    """Whether the process of a pidfd is dead; a zombie is."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


class Target:
    """A process that a signal cannot miss. Close it, or use it as a context manager.

    It is opened for a process whose identity was proven before; the proof is asked for
    again after the pidfd is open, and only then may a signal go out. Where there is no
    pidfd the proof is asked for before each signal, which leaves a gap of microseconds.
    """

    def __init__(
        self, process: ProcessId, prove: Callable[[], bool], processes: Processes = SYSTEM
    ) -> None:
        """Open the process.

        Args:
            process: whom to hold.
            prove: says whether the pid is still whom the caller means.
            processes: how the system is asked.

        Raises:
            OSError: no descriptor is left. Nothing was signalled, try again later.
            Exception: whatever ``prove`` raises.
        """
        self.process = process
        self._processes = processes
        self._prove = prove
        self._pidfd = open_pidfd(process.pid)
        try:
            self._proven = self._is_process() and prove()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go. May be called twice."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_process(self) -> bool:
        return self._processes.facts(self.process.pid).process == self.process

    @property
    def proven(self) -> bool:
        """The process was alive and proven after it was held."""
        return self._proven

    @property
    def exited(self) -> bool:
        """Whether it is dead; a zombie is."""
        if self._pidfd is not None:
            return has_exited(self._pidfd)
        return not self._is_process()

    def send(self, number: signal.Signals, *, group: bool = False) -> bool:
        """Send a signal; False when it was not sent: not proven, or dead already.

        Args:
            number: the signal.
            group: to the whole process group, if the process leads one.
        """
        if not self._proven:
            return False
        group = group and self._leads()
        try:
            if self._pidfd is None:
                return self._send_by_pid(number, group=group)
            if group:
                self._send_to_group(self._pidfd, number)
            else:
                signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def _leads(self) -> bool:
        return self._processes.facts(self.process.pid).group == self.process.pid

    def _send_to_group(self, pidfd: int, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(pidfd, number, None, _SIGNAL_GROUP)
        except ProcessLookupError:
            raise
        except OSError:  # before Linux 6.9: a group's number is safe while its leader lives
            if has_exited(pidfd):
                raise ProcessLookupError from None
            os.killpg(self.process.pid, number)

    def _send_by_pid(self, number: signal.Signals, *, group: bool) -> bool:
        if not (self._is_process() and self._prove()):
            return False
        (os.killpg if group else os.kill)(self.process.pid, number)
        return True

    async def wait(self, seconds: float) -> bool:
        """Wait for its end, ``seconds`` at most; whether it is dead."""
        if self._pidfd is None:
            return await self._wait_by_polling(seconds)
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._pidfd, _settle, ended)
        try:
            async with asyncio.timeout(seconds):
                await ended
        except TimeoutError:
            return self.exited
        finally:
            loop.remove_reader(self._pidfd)
        return True

    async def _wait_by_polling(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self.exited:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def open_pidfd(pid: int, *, spare: int = TO_LOOK) -> int | None:
    """A pidfd of a process; None when it is gone, or the system has no pidfds.

    Args:
        pid: the process.
        spare: how many descriptors must be left, though of a low limit no more than half.

    Raises:
        OSError: the system has pidfds and gives none now (no descriptors left).
    """
    try:
        pidfd = os.pidfd_open(pid)
    except (AttributeError, ProcessLookupError):
        return None
    except OSError as error:
        if error.errno in {errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.ENOENT}:
            return None  # the last two: the number of a thread
        raise
    if leaves_free(pidfd, spare):
        return pidfd
    os.close(pidfd)
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def leaves_free(descriptor: int, spare: int) -> bool:
    """Whether so many may be opened beside a descriptor: it is the lowest that was free."""
    import resource  # noqa: PLC0415 - Windows has none

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = soft if soft != resource.RLIM_INFINITY else sys.maxsize
    return descriptor < limit - min(spare, limit // 2)
