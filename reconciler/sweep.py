"""Keeping the logs of a folder within their budget, and harming no log that is in use.

A log is caught before anything is done with it: under the lock that a keeper of ours holds
for life it is moved to a hidden name, so that nobody can open it any more. It is gone on
with only if it is the log that was judged, no keeper has come for the session, and nobody
has it open for writing (told by the kernel: it grants a read lease). Else it is put back.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import math
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from reconciler.budget import Log, LogBudget, Step, Why, grown, steps
from reconciler.folder import Folder, file_id
from reconciler.layout import CLAIM, Role, claims, file_name, parse_name
from reconciler.removal import Fate, birth_lock, hidden_name, is_taken, may_be_at_work, remover_of

T = TypeVar("T")

_LOGS = frozenset({Role.KEEPER_LOG, Role.LAUNCH_LOG})
_BLOCK = 1024 * 1024
_NEVER = threading.Event()
_LASTS = 2

BELIEVED = 3600.0
"""Seconds after its start from which a daemon lets logs go for their age: by then a machine that
has started with a wrong clock has set it."""

_WORK, _REST = 0.0005, 0.001
# Seconds of work after which the interpreter is left to the event loop, and for how long.


@dataclass(frozen=True, slots=True)
class Swept:
    """What became of the logs that one reason had chosen."""

    why: Why
    logs: tuple[str, ...]
    """Those that were removed or cut (or would be), the oldest first."""
    freed: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one sweep has found and done."""

    swept: tuple[Swept, ...]
    grown: tuple[Log, ...]
    """Logs of living sessions that are longer than one log may be, and were the last time: each
    once, as long as it stays so."""
    kept: int
    """Bytes of all session logs afterwards."""
    failures: tuple[str, ...] = ()
    """What could not be done, and why."""


class LogSweeper:
    """Sweeps the logs of one folder, each time it is asked to. To be run beside the loop.

    Args:
        budget: what the logs may cost.

    Attributes:
        budget: the same; another one holds from the next sweep on.
    """

    def __init__(self, budget: LogBudget) -> None:
        self.budget = budget
        self._started = time.time(), _elapsed()
        self._grown: dict[str, int] = {}  # in how many sweeps in a row a log was too long

    async def beside(self, folder: Folder, living: Collection[str], *, act: bool) -> Report:
        """Sweep in a thread, by a descriptor of its own. Cancelled, it ends its step first.

        Arguments and errors are those of `sweep`.
        """
        stop = threading.Event()
        with folder.again() as own:
            sweep = functools.partial(self.sweep, own, living, act=act, stop=stop)
            work = asyncio.get_running_loop().run_in_executor(None, sweep)
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                stop.set()
                await asyncio.wait((work,))
                raise

    def sweep(
        self,
        folder: Folder,
        living: Collection[str],
        *,
        act: bool = True,
        stop: threading.Event = _NEVER,
    ) -> Report:
        """Bring the logs into their budget. A log that fails does not hold the others up.

        Args:
            folder: the sessions folder, open.
            living: sessions that are not known to be over, besides those that have a socket
                or a pid file.
            act: do it; else only tell what would be done.
            stop: set when it must come to its end; what is begun then is put back.

        Raises:
            OSError: the folder cannot be read.
        """
        budget = self.budget  # one sweep goes by one
        failures: list[str] = []
        names = list(folder.names())
        if act and not folder.remote and recover_logs(folder, names, failures):
            names = list(folder.names())
        logs = survey(folder, names, living)
        done: list[Step] = []
        for step in _gently(steps(logs, budget, self._now())):
            if stop.is_set():
                break
            try:
                if not act or carry_out(folder, step, stop) is Fate.REMOVED:
                    done.append(step)
            except OSError as error:
                failures.append(f"{step.log.name}: {error.strerror}")
        kept = sum(log.file.size for log in logs) - sum(step.freed for step in done)
        return Report(tuple(_by_reason(done)), self._lasting(logs, budget), kept, tuple(failures))

    def _now(self) -> float:
        """The time of day, but for what a clock that was set forward has added to it.

        Minus infinity until the clock has had the time to be set.
        """
        wall, elapsed = self._started
        passed = _elapsed() - elapsed
        return min(time.time(), wall + passed) if passed >= BELIEVED else -math.inf

    def _lasting(self, logs: Sequence[Log], budget: LogBudget) -> tuple[Log, ...]:
        """Living logs that are too long for the second time: the first time may end by itself."""
        now = grown(logs, budget)
        self._grown = {log.name: self._grown.get(log.name, 0) + 1 for log in now}
        return tuple(log for log in now if self._grown[log.name] == _LASTS)


def _gently(work: Iterable[T]) -> Iterator[T]:
    """Go through the work with rests: two threads share the interpreter, and one is the loop's."""
    begun = time.perf_counter()
    for each in work:
        yield each
        if time.perf_counter() - begun > _WORK:
            time.sleep(_REST)
            begun = time.perf_counter()


def _elapsed() -> float:
    """Seconds since some moment, those in which the machine slept counted as well."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _by_reason(done: Sequence[Step]) -> Iterator[Swept]:
    for why in Why:
        of_it = [step for step in done if step.why is why]
        if of_it:
            names = tuple(step.log.name for step in of_it)
            yield Swept(why, names, sum(step.freed for step in of_it))


def survey(folder: Folder, names: Collection[str], living: Collection[str]) -> list[Log]:
    """The session logs among these names: regular files of our own, links not followed.

    On a network filesystem a keeper may live on another host: there no session is known to
    be over.
    """
    claimed = {sid for name in names if (sid := claims(name))}.union(living)
    logs = []
    for name in _gently(names):
        parsed = parse_name(name)
        if parsed is None or parsed.role not in _LOGS:
            continue
        status = _status(folder, name)
        if status is not None:
            ended = not folder.remote and parsed.sid not in claimed
            logs.append(Log(name, parsed.sid, file_id(status), ended))
    return logs


def _status(folder: Folder, name: str) -> os.stat_result | None:
    """What stands there, if it is a regular file of our own."""
    with contextlib.suppress(OSError):
        status = folder.status(name)
        if status and stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
            return status
    return None


def carry_out(folder: Folder, step: Step, stop: threading.Event = _NEVER) -> Fate:
    """Remove or cut one log, if it still is what was judged and nobody uses it.

    Returns:
        ``REMOVED`` when it was removed, or cut.

    Raises:
        OSError: it cannot be done. What was caught was put back.
    """
    log, hidden = step.log, hidden_name(step.log.name)
    with birth_lock(folder, log.sid) as free:
        fate = _catch(folder, log, hidden) if free else Fate.CHANGED
    if fate is not Fate.REMOVED:
        return fate
    if not step.keep:
        os.unlink(hidden, dir_fd=folder.fd)
        return Fate.REMOVED
    try:
        return Fate.REMOVED if _cut(folder, hidden, step, stop) else Fate.CHANGED
    finally:
        _put_back(folder, hidden, log.name)


def _catch(folder: Folder, log: Log, hidden: str) -> Fate:
    """Move a log to its hidden name, and make sure that it is nobody's: else put it back."""
    here = folder.status(log.name)
    if here is None:
        return Fate.GONE
    if file_id(here) != log.file or folder.status(hidden) is not None:
        return Fate.CHANGED
    try:
        os.rename(log.name, hidden, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
    except FileNotFoundError:
        return Fate.GONE
    nobodys = False
    try:
        with _opened(folder, hidden, os.O_RDONLY) as descriptor:
            nobodys = (
                file_id(os.fstat(descriptor)) == log.file
                and not _is_written(descriptor)
                and not _is_claimed(folder, log.sid)
            )
    finally:
        if not nobodys:
            _put_back(folder, hidden, log.name)
    return Fate.REMOVED if nobodys else Fate.CHANGED


@contextlib.contextmanager
def _opened(folder: Folder, name: str, flags: int) -> Iterator[int]:
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=folder.fd)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_claimed(folder: Folder, sid: str) -> bool:
    """Whether a keeper has come for the session, or may have."""
    return any(folder.status(file_name(role, sid)) is not None for role in CLAIM)


def _is_written(descriptor: int) -> bool:
    """Whether somebody has a file open for writing, opened read-only by us.

    The kernel grants a read lease only where nobody has. Where there are no leases (not
    Linux, some filesystems) the lock and the missing files must do.
    """
    if sys.platform != "linux":
        return False
    try:
        # Whoever opens it meanwhile makes the kernel send a signal: this one, which is ignored.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _put_back(folder: Folder, hidden: str, name: str) -> None:
    """Give a log its name again. If a newer one has taken that, `recover_logs` decides."""
    with contextlib.suppress(FileExistsError):
        os.link(hidden, name, src_dir_fd=folder.fd, dst_dir_fd=folder.fd, follow_symlinks=False)
        os.unlink(hidden, dir_fd=folder.fd)


def _cut(folder: Folder, hidden: str, step: Step, stop: threading.Event) -> bool:
    """Cut a log in place to its newest bytes, from the start of a line; whether that was done.

    It takes no room on a disk that may be full. The newest bytes stay where they are until
    the end, so that it can begin anew after a crash at any moment. What has another name as
    well, or was put under the hidden one, may be a file of somebody else: it is not written to.
    """
    with _opened(folder, hidden, os.O_RDWR) as descriptor:
        status = os.fstat(descriptor)
        if status.st_nlink != 1 or file_id(status) != step.log.file:
            return False
        source, target = _line_start(descriptor, status.st_size - step.keep), 0
        try:
            while block := os.pread(descriptor, _BLOCK, source + target):
                if stop.is_set():
                    return False
                target += os.pwrite(descriptor, block, target)
            os.ftruncate(descriptor, target)
        finally:
            os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))
    return True


def _line_start(descriptor: int, offset: int) -> int:
    """The start of the first line at or after the offset; the offset if there is none."""
    at = offset - 1
    while block := os.pread(descriptor, _BLOCK, at):
        found = block.find(b"\n")
        if found >= 0 and at + found + 1 < os.fstat(descriptor).st_size:
            return at + found + 1
        at += len(block)
    return offset


def recover_logs(folder: Folder, names: Collection[str], failures: list[str]) -> int:
    """Give the logs their names again that a sweep which was itself killed has left hidden.

    One whose name a newer log has taken is removed, unless somebody writes to it.

    Returns:
        How many there were.
    """
    recovered = 0
    for hidden in names:
        name, remover = remover_of(hidden) if is_taken(hidden) else ("", 0)
        parsed = parse_name(name)
        if parsed is None or parsed.role not in _LOGS or may_be_at_work(folder, remover):
            continue
        if _status(folder, hidden) is None:
            continue
        try:
            _put_back(folder, hidden, name)
            _remove_older(folder, hidden)
        except OSError as error:
            failures.append(f"{hidden}: {error.strerror}")
        else:
            recovered += 1
    return recovered


def _remove_older(folder: Folder, hidden: str) -> None:
    """Remove a log that could not be put back, if it is nobody's."""
    with contextlib.suppress(FileNotFoundError), _opened(folder, hidden, os.O_RDONLY) as descriptor:
        if not _is_written(descriptor):
            os.unlink(hidden, dir_fd=folder.fd)
