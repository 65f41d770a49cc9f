"""Exit notices: who is followed, and a callback the moment that one of them dies.

A keeper that dies by SIGKILL leaves no file event. On Linux each followed process has a
pidfd, all pidfds stand in one epoll of our own, and the event loop waits on that one
descriptor. Where a pidfd is not to be had the process is polled instead, and the owner
is told so once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import sys
from collections.abc import Callable, Sequence

from reconciler.facts import Life, Processes
from reconciler.observations import ProcessId
from reconciler.processes import SYSTEM, TO_END, TO_LOOK, open_pidfd

POLL_PERIOD = 0.5
"""Seconds between two looks at processes that have no pidfd."""

Notice = Callable[[str, ProcessId], None]
"""Called with the session id and the process, in the event loop's thread."""


class Exits:
    """The processes that are followed for each session. Close it when done.

    Args:
        loop: the loop whose thread calls ``notice``; all methods belong to that thread.
        notice: called once for each followed process that has exited.
        degraded: called once, with the reason, when polling has to stand in for pidfds.
        processes: how the system is asked.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        notice: Notice,
        degraded: Callable[[str], None] = lambda _: None,
        processes: Processes = SYSTEM,
    ) -> None:
        self._loop = loop
        self._notice = notice
        self._degraded: Callable[[str], None] | None = degraded
        self._processes = processes
        self._followed: dict[str, dict[ProcessId, int | None]] = {}
        self._by_pidfd: dict[int, tuple[str, ProcessId]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._epoll = select.epoll() if sys.platform == "linux" else None
        if self._epoll is not None:
            loop.add_reader(self._epoll.fileno(), self._on_readable)

    def close(self) -> None:
        """Follow nobody any more and give all descriptors back."""
        for sid in tuple(self._followed):
            self.follow(sid, frozenset())
        if self._timer is not None:
            self._timer.cancel()
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def follow(self, sid: str, processes: frozenset[ProcessId]) -> None:
        """Follow exactly these processes for a session, and no others any more."""
        followed = self._followed.get(sid)
        if followed is None:
            if not processes:
                return
            followed = self._followed[sid] = {}
        for process in followed.keys() - processes:
            self._drop(followed.pop(process))
        for process in processes - followed.keys():
            followed[process] = self._add(sid, process)
        if not followed:
            del self._followed[sid]

    def _add(self, sid: str, process: ProcessId) -> int | None:
        pidfd = self._hold(sid, process)
        if pidfd is None:
            self._poll_soon()
        return pidfd

    def _hold(self, sid: str, process: ProcessId) -> int | None:
        """Let the loop wait for a process, if a pidfd of it is to be had."""
        pidfd = self._open(process)
        if pidfd is None or self._epoll is None:
            return None
        self._by_pidfd[pidfd] = (sid, process)
        self._epoll.register(pidfd, select.EPOLLIN)
        return pidfd

    def _open(self, process: ProcessId) -> int | None:
        """A pidfd that is this very process's, or None: then polling finds out its fate."""
        try:
            pidfd = open_pidfd(process.pid, spare=TO_LOOK + TO_END)
        except OSError as error:
            self._tell_degraded(str(error.strerror))
            return None
        facts = self._processes.facts(process.pid)
        if pidfd is not None and facts.process == process:
            return pidfd
        if pidfd is not None:
            os.close(pidfd)
        if facts.life is Life.HIDDEN:
            self._tell_degraded(f"process {process.pid} cannot be looked at")
        elif facts.process == process:
            self._tell_degraded("this system has no pidfds")
        return None

    def _tell_degraded(self, reason: str) -> None:
        if self._degraded is not None:
            self._degraded(reason)
            self._degraded = None

    def _drop(self, pidfd: int | None) -> None:
        if pidfd is None:
            return
        self._by_pidfd.pop(pidfd, None)
        if self._epoll is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(pidfd)
        os.close(pidfd)

    def _on_readable(self) -> None:
        if self._epoll is not None:
            self._exited([self._by_pidfd[pidfd] for pidfd, _ in self._epoll.poll(0)])

    def _exited(self, exited: Sequence[tuple[str, ProcessId]]) -> None:
        for sid, process in exited:
            followed = self._followed.get(sid, {})
            if process in followed:  # a notice before this one may have changed that
                self.follow(sid, frozenset(followed) - {process})
                self._notice(sid, process)

    def _poll_soon(self, delay: float = 0.0) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(delay, self._poll)

    def _poll(self) -> None:
        self._timer = None
        self._exited(
            [
                (sid, process)
                for sid, followed in self._followed.items()
                for process, pidfd in followed.items()
                if pidfd is None and self._is_over(process)
            ]
        )
        if not self._hold_polled():
            self._poll_soon(POLL_PERIOD)

    def _hold_polled(self) -> bool:
        """Descriptors may be had again: try until one is not. Whether nobody is polled now."""
        for sid, followed in self._followed.items():
            for process in [process for process, pidfd in followed.items() if pidfd is None]:
                followed[process] = pidfd = self._hold(sid, process)
                if pidfd is None:
                    return False
        return True

    def _is_over(self, process: ProcessId) -> bool:
        facts = self._processes.facts(process.pid)
        return facts.life is not Life.HIDDEN and facts.process != process
