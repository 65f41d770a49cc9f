"""The loop: hints → look → decide → act → look again.

All state is the session table, the queue of hints and who is followed; each is brought
back by one full look, so the process may be killed at any instruction.

Here its parts are put together: the work queue gives out keys, `Passes` work on one session,
`Finder` finds them all, `Holder` holds the folder; what they ask for goes to the queue again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Self

from reconciler.budget import LogBudget
from reconciler.control import Control, Tap
from reconciler.errors import (
    FolderError,
    FolderLockedError,
    NoSuchSessionError,
    UnverifiableError,
)
from reconciler.finding import Finder
from reconciler.hints import (
    AT_ONCE,
    LEFTOVER_PAUSE,
    LOOK_AT_ALL,
    LOOK_AT_PROCESSES,
    LOOK_FOR_LEFTOVERS,
)
from reconciler.keeper import KeeperManager, SpawnedKeeper
from reconciler.layout import check_sid
from reconciler.logs import get_logger
from reconciler.observations import KeeperState
from reconciler.passes import Passes
from reconciler.plans import Verdict
from reconciler.reports import Log, Reporter
from reconciler.served import Holder
from reconciler.sessions import Session, SessionTable
from reconciler.state import Desired
from reconciler.stopping import (
    StoppedSession,
    end_leftovers,
    keep_no_longer,
    note_wish,
    outlast,
    processes_of,
)
from reconciler.sweep import LogSweeper
from reconciler.watcher import SessionsWatcher
from reconciler.workqueue import LongWork, WorkQueue

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from reconciler.metrics import Metrics

RESYNC = 60.0
"""Seconds between two full looks when nothing asks for one; the design's number."""


class Reconciler:
    """Keeps one sessions folder right for as long as it is entered.

    ``async with Reconciler() as reconciler:`` runs the loop in the background.

    Args:
        manager: the folder, its keepers and the times to go by; by default
            ``KeeperManager()``.
        resync: seconds between two full looks.
        dry_run: decide and tell everything, and do nothing. It takes no lock, so it can
            run beside a reconciler that acts.
        logger: where to log; by default the application's structlog, or JSON on stderr.
        metrics: makes the metrics of the session table, for instance
            `reconciler.metrics.Metrics`; none are kept by default.
        log_budget: what the logs of the folder may cost; those of ended sessions go.
        control: answer `pi-reconciler status` and `events` on a socket in the folder. One
            that only looks on does not.

    Attributes:
        sessions: the desired and the actual state of every session, readable at any time
            from the event loop's thread.
        metrics: what counts, if anything does.
    """

    def __init__(
        self,
        manager: KeeperManager | None = None,
        *,
        resync: float = RESYNC,
        dry_run: bool = False,
        logger: FilteringBoundLogger | None = None,
        metrics: Callable[[SessionTable], Metrics] | None = None,
        log_budget: LogBudget | None = None,
        control: bool = False,
    ) -> None:
        self.manager = manager or KeeperManager()
        self.sessions = SessionTable(self._on_subscriber_error)
        self.dry_run = dry_run
        self._resync = resync
        self._log = Tap(logger or get_logger())
        self._sweeper = LogSweeper(log_budget or LogBudget())
        self.metrics = metrics(self.sessions) if metrics else None
        self._reporter = Reporter(self._log, self.metrics)
        control_socket = Control(self._log, self.sessions) if control and not dry_run else None
        self._holder = Holder(self._log, control_socket, dry_run=dry_run)
        self._queue = WorkQueue(self._work)
        self._finder = Finder(self.sessions, self._queue.add, self._reporter, self._sweeper)
        self._entered = False

    @property
    def log(self) -> Log:
        """What the reconciler tells by: who tells by it, too, is heard on the control socket."""
        return self._log

    # Life.

    async def __aenter__(self) -> Self:
        """Lock the folder if it is there, watch it, and begin.

        Raises:
            FolderLockedError: another reconciler works on the folder.
        """
        if self._entered:
            raise RuntimeError("a Reconciler is entered once: make another one")
        self._entered = True
        async with contextlib.AsyncExitStack() as life:
            self._hold_folder(life)
            loop = asyncio.get_running_loop()
            self._passes = Passes(loop, self.sessions, self._queue.add, self._reporter)
            life.callback(self._passes.close)
            self._watcher = SessionsWatcher(
                self.manager.sessions_dir, self._queue.add_from_thread, self._on_unwatchable
            )
            life.push_async_callback(self._queue.close)
            life.callback(self._stop_watching)
            self._log.info(
                "reconciler.started", folder=str(self.manager.sessions_dir), dry_run=self.dry_run
            )
            self._queue.open()
            self._start_watching()
            self._queue.add(LOOK_AT_ALL, AT_ONCE)
            self._life = life.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the loop. Keepers, agents and files are left as they are.

        A session that is just being started again is waited for.
        """
        await self._life.aclose()
        self._log.info("reconciler.stopped", folder=str(self.manager.sessions_dir))

    def _hold_folder(self, life: contextlib.AsyncExitStack) -> None:
        life.callback(self._holder.close)
        served = self._holder.hold(self.manager)
        if served is not None and served.locked_by_other:
            raise FolderLockedError(served.why_not)

    def go_by(
        self, manager: KeeperManager, *, resync: float, log_budget: LogBudget | None = None
    ) -> None:
        """Go by another manager of the same folder, from the next look on.

        What is being ended is ended as it was begun. Nothing is changed where this raises.

        Args:
            manager: how sessions are looked at, judged, started and ended.
            resync: seconds between two full looks.
            log_budget: what the logs of the folder may cost.

        Raises:
            ValueError: it is another folder's.
        """
        if manager.sessions_dir != self.manager.sessions_dir:
            raise ValueError(f"the folder stays {str(self.manager.sessions_dir)!r} while this runs")
        if self._holder.served is not None:
            self._holder.served.go_by(manager)
        self.manager, self._resync = manager, resync
        self._sweeper.budget = log_budget or LogBudget()
        self._queue.add(LOOK_AT_ALL, AT_ONCE)

    # What callers ask for.

    @property
    def trouble(self) -> str:
        """Why the folder cannot be looked at, or not be acted upon, as of the last full look.

        Empty when all is well, and while there is no folder. May be asked from any thread.
        """
        return self._holder.trouble

    @property
    def queue_depth(self) -> int:
        """How many sessions are to be looked at now, or are in work. From any thread."""
        return self._queue.depth

    @property
    def lost_events(self) -> int:
        """How often the system has said that file events were lost. From any thread."""
        return self._watcher.overflows

    async def spawn(self, sid: str | None = None, **options: Any) -> SpawnedKeeper:  # noqa: ANN401 - the manager's
        """Start a session that is wanted from now on; see `KeeperManager.spawn`."""
        spawned = await self.manager.spawn(sid, **options)
        self.sessions.want(spawned.sid, Desired.PRESENT)
        self._queue.add(spawned.sid, AT_ONCE)
        return spawned

    async def stop(self, sid: str, *, leave: bool = False) -> StoppedSession:
        """End a session; returns when its processes are dead and its files are gone.

        Args:
            sid: the session's id.
            leave: leave alone what the session has started besides its agent.

        Raises:
            NoSuchSessionError: nothing of it is there.
            UnverifiableError: whose its process or file is cannot be proven, or this
                reconciler may not act. Nothing was done, but that it is not started again,
                and what was wanted of the session before is wanted again. (A call that is
                cancelled leaves it unwanted.)
        """
        begun = time.monotonic()
        check_sid(sid)
        served, reason = self._holder.served, self._holder.may_not_act()
        kept = False  # from here on it is not started again
        if served is not None and not reason:
            kept = self.manager.keep_no_longer(served.folder, sid)
        try:
            found = await asyncio.to_thread(self.manager.inspect, sid)  # all processes are scanned
        except NoSuchSessionError:
            self.sessions.want(sid, Desired.ABSENT)  # a wish that it were there ends, too
            self._queue.add(sid, AT_ONCE)
            if not kept:
                raise
            await self.wait_for(sid, _is_over)  # it may be being started again
            return StoppedSession(sid, None, time.monotonic() - begun)
        seen = found.seen
        keeper = seen.keeper.process if seen.keeper.state is KeeperState.PROVEN else None
        served, reason = self._holder.served, self._holder.may_not_act()  # as of now
        if served is None or reason:
            raise UnverifiableError(f"session {sid} was left alone: {reason}")
        note_wish(served.folder, sid, leave=leave)
        before = self.sessions.row(sid).desired
        if before is Desired.ABSENT:  # another stop is under way: its wish is none to go back to
            before = Desired.AS_FOUND
        await self._end(sid, before)
        if (served := self._holder.served) is not None:
            keep_no_longer(served.folder, sid, over=True)
        await outlast(processes_of(seen), self.manager.ladder)
        self._queue.add(LOOK_FOR_LEFTOVERS, time.monotonic() + LEFTOVER_PAUSE)
        left = 0
        if not leave and (served := self._holder.served) is not None:
            left = await end_leftovers(sid, served.probe, self.manager.ladder, self._reporter.done)
        elapsed = time.monotonic() - begun
        return StoppedSession(sid, keeper.pid if keeper else None, elapsed, left)

    async def _end(self, sid: str, before: Desired) -> None:
        """Want a session to be absent, and wait until that is so, or cannot be."""
        if self.sessions.row(sid).phase is Verdict.LEFTOVERS:
            self.sessions.reset(sid)  # by what is known; one may have come since
        self.sessions.want(sid, Desired.ABSENT)
        self._queue.add(sid, AT_ONCE)
        session = await self.wait_for(sid, _is_over)
        if session.phase in {Verdict.REFUSED, Verdict.UNVERIFIABLE}:
            self.sessions.want(sid, before)
            raise UnverifiableError(f"session {sid} was left alone: {session.reason}")

    async def wait_for(self, sid: str, condition: Callable[[Session], bool]) -> Session:
        """Wait until a session is as described; put `asyncio.timeout` around it for a bound.

        Args:
            sid: the session's id.
            condition: called with the session's row now, and whenever it has changed. A
                session that is not there has the phase ``ABSENT``.
        """
        met: asyncio.Future[Session] = asyncio.get_running_loop().create_future()

        def look(session: Session) -> None:
            if session.sid != sid or met.done():
                return
            try:
                if condition(session):
                    met.set_result(session)
            except Exception as error:  # noqa: BLE001 - it is the waiter's
                met.set_exception(error)

        unsubscribe = self.sessions.subscribe(look)
        try:
            look(self.sessions.row(sid))
            return await met
        finally:
            unsubscribe()

    async def changes(self) -> AsyncIterator[Session]:
        """Every changed row of the table, as it changes, from now on."""
        changed: asyncio.Queue[Session] = asyncio.Queue()
        unsubscribe = self.sessions.subscribe(changed.put_nowait)
        try:
            while True:
                yield await changed.get()
        finally:
            unsubscribe()

    async def settled(self) -> None:
        """Wait until one full look has been done, and all that follows from it.

        What can only be told later than the settle time (a keeper that is slow to show
        its agent, an action that failed and is to be tried again) is not waited for.

        Raises:
            FolderError: the folder cannot be looked at, or not be acted upon.
        """
        self._queue.add(LOOK_AT_ALL, AT_ONCE)
        while self._queue.busy_until(time.monotonic()):  # noqa: ASYNC110 - as below
            await asyncio.sleep(0.005)
        # The settle time of what that look has found begins with it, however late it was.
        horizon = time.monotonic() + self.manager.policy.settle + 0.5
        while self._queue.busy_until(horizon):  # noqa: ASYNC110 - tasks and a thread in one
            await asyncio.sleep(0.005)
        if self.trouble:
            raise FolderError(f"{str(self.manager.sessions_dir)!r}: {self.trouble}")

    # Hints come in.

    def _start_watching(self) -> None:
        self._watcher.start()
        if self._watcher.descriptor is not None:
            loop = asyncio.get_running_loop()
            loop.add_reader(self._watcher.descriptor, self._read_events)

    def _stop_watching(self) -> None:
        if self._watcher.descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._watcher.descriptor)
        self._watcher.stop()

    def _read_events(self) -> None:
        now = time.monotonic()
        for sid in self._watcher.read():
            self._queue.add(sid, now)

    # Hints are followed.

    def _work(self, key: str) -> LongWork | None:
        if key == LOOK_AT_ALL:
            return self._look_at_all()
        served = self._holder.served
        if served is None:
            return None
        if key in {LOOK_AT_PROCESSES, LOOK_FOR_LEFTOVERS}:
            return self._finder.by_processes(served, full=key == LOOK_AT_PROCESSES)
        return self._passes.run(key, served, self._finder.suspects_of(key))

    def _look_at_all(self) -> LongWork | None:
        """Look at the folder, then at every session that has a file, a keeper or a row."""
        if self.metrics is not None:
            self.metrics.looked_at_all()
        self._queue.add(LOOK_AT_ALL, time.monotonic() + self._resync)
        if self._holder.has_lost():
            self._passes.forget_all()
        served = self._holder.check(self.manager)
        self._watcher.recheck()
        return None if served is None else self._finder.by_names(served)

    # Telling.

    def _on_subscriber_error(self, error: Exception) -> None:
        self._log.error("subscriber.failed", reason=f"{type(error).__name__}: {error}")

    def _on_unwatchable(self, reason: str) -> None:
        self._log.warning("folder.unwatched", reason=reason)


def _is_over(row: Session) -> bool:
    """Nothing is left of a session but what it has started, or it cannot be ended."""
    ends = {Verdict.ABSENT, Verdict.LEFTOVERS, Verdict.REFUSED, Verdict.UNVERIFIABLE}
    return row.plan is not None and row.phase in ends
