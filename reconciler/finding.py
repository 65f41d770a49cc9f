"""Finding the sessions of a folder: by the names in it, and by what only processes tell of.

What is found is asked to be looked at; nothing is judged here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection

from reconciler.folder import Folder
from reconciler.hints import LOOK_AT_PROCESSES
from reconciler.layout import CONCERN, Role, parse_name
from reconciler.leftovers import forget_wish
from reconciler.plans import Verdict
from reconciler.probe import NO_SUSPECTS, Probe, Suspects
from reconciler.removal import is_taken, recover
from reconciler.reports import Reporter
from reconciler.served import Served
from reconciler.sessions import SessionTable
from reconciler.sweep import LogSweeper
from reconciler.workqueue import SLICE

_ENOUGH_SCANS = 3
_NOTHING_THERE = frozenset({Verdict.ABSENT, Verdict.MISSING})


class Finder:
    """Finds what there is, in the parts of a full look: names, processes, logs.

    Args:
        sessions: what is known already.
        hint: called with a session id, and when it is to be looked at.
        reporter: tells what could not be read, and what was swept.
        sweeper: brings the logs into their budget.
    """

    def __init__(
        self,
        sessions: SessionTable,
        hint: Callable[[str, float], None],
        reporter: Reporter,
        sweeper: LogSweeper,
    ) -> None:
        self._sessions = sessions
        self._hint = hint
        self._reporter = reporter
        self._sweeper = sweeper
        self._suspects: dict[str, Suspects] = {}
        self._wishes: set[str] = set()
        self._unneeded: dict[str, int] = {}

    def suspects_of(self, sid: str) -> Suspects:
        """What a scan has found for the next look at a session; it is good for one."""
        return self._suspects.pop(sid, NO_SUSPECTS)

    async def by_names(self, served: Served) -> None:
        """Ask for a look at every session that is known, or that a name stands for.

        Then for a scan, which waits behind all of these: it runs beside the loop, and would take
        the interpreter from it.
        """
        now = time.monotonic()
        for sid in self._sessions:
            self._hint(sid, now)
        try:
            self._wishes = await self._list(served)
        except OSError as error:
            self._tell_half_read(served.folder, error)
        else:
            self._hint(LOOK_AT_PROCESSES, time.monotonic())

    async def _list(self, served: Served) -> set[str]:
        """Go through the names, in slices of time.

        Returns:
            The sessions that have a wish about their leftovers noted down.
        """
        wishes = set()
        end = time.monotonic() + SLICE
        for name in served.folder.names():
            parsed = parse_name(name)
            if parsed is not None and parsed.role in CONCERN:
                self._hint(parsed.sid, time.monotonic())
            elif parsed is not None and parsed.role is Role.LEAVE:
                wishes.add(parsed.sid)
            elif is_taken(name) and not served.may_not_act():
                self._recover(served.folder, name)
            if time.monotonic() > end:
                await asyncio.sleep(0)
                end = time.monotonic() + SLICE
        return wishes

    def _recover(self, folder: Folder, name: str) -> None:
        try:
            if fate := recover(folder, name):
                self._reporter.recovered(name, fate.value)
        except OSError as error:
            self._reporter.not_recovered(name, error)

    async def by_processes(self, served: Served, *, full: bool) -> None:
        """Ask for a look at what only processes tell of: a walk over them, beside the loop.

        Args:
            served: the folder.
            full: it is part of a full look, that has gone through the names before; the logs
                are brought into their budget afterwards.
        """
        try:
            suspects, news = await asyncio.to_thread(self._scan, served.probe)
            for sid in news:
                self._suspects[sid] = suspects
                self._hint(sid, time.monotonic())
            if full:
                if not served.may_not_act():
                    self._forget_wishes(served.folder, suspects.marked.keys())
                await self._sweep_logs(served, suspects.sids)
        except (OSError, RuntimeError) as error:  # for want of a thread Python raises the latter
            self._tell_half_read(served.folder, error)

    def _scan(self, probe: Probe) -> tuple[Suspects, list[str]]:
        """Walk over all processes, in a thread: what was found, and of which sessions it is news.

        Keepers of other folders, of which there may be many, are none.
        """
        suspects, may_serve = probe.scan_all(), probe.identity.may_serve
        rows = (self._sessions.row(sid) for sid in suspects.sids)
        return suspects, [row.sid for row in rows if suspects.news_for(row, may_serve)]

    def _forget_wishes(self, folder: Folder, marked: Collection[str]) -> None:
        """Drop notes about leftovers once several scans in a row have found none.

        One scan can miss a process that is between a fork and an exec.
        """
        sids = self._wishes.difference(marked, self._sessions)
        self._unneeded = {sid: self._unneeded.get(sid, 0) + 1 for sid in sids}
        for sid, scans in self._unneeded.items():
            if scans >= _ENOUGH_SCANS:
                forget_wish(folder, sid)

    async def _sweep_logs(self, served: Served, found: Collection[str]) -> None:
        there = (sid for sid, row in self._sessions.items() if row.phase not in _NOTHING_THERE)
        acting = not served.may_not_act()
        report = await self._sweeper.beside(served.folder, {*found, *there}, act=acting)
        self._reporter.swept(report, acting=acting)

    def _tell_half_read(self, folder: Folder, error: OSError | RuntimeError) -> None:
        if folder.fd >= 0:  # else it is gone, and was closed: that was told
            self._reporter.half_read(folder.path, error)
