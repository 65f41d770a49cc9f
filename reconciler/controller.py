"""The loop: hints → look → decide → act → look again.

All state is the session table, the queue of hints and who is followed; each is brought
back by one full look, so the process may be killed at any instruction.

Looks and removals are short and run in the event loop, in slices. Ending a process takes
time: it runs as a task of its own, with its session out of the queue until it is through.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Self

from reconciler.budget import LogBudget
from reconciler.control import Control, Tap
from reconciler.effects import Done
from reconciler.errors import (
    FolderError,
    FolderLockedError,
    NoSuchSessionError,
    UnverifiableError,
)
from reconciler.exits import Exits
from reconciler.finding import SLICE, Finder
from reconciler.folder import Folder
from reconciler.hints import AT_ONCE, Hints
from reconciler.keeper import KeeperManager, SpawnedKeeper
from reconciler.layout import check_sid
from reconciler.logs import get_logger
from reconciler.observations import KeeperState, Observation, ProcessId
from reconciler.plans import Instant, Plan, Restart, Stop, Verdict
from reconciler.reports import Log, Reporter
from reconciler.restarting import Restarts
from reconciler.retries import FIRST, Retries
from reconciler.served import Served
from reconciler.sessions import Session, SessionTable
from reconciler.state import Desired, decide
from reconciler.stopping import StoppedSession, end_leftovers, note_wish, outlast, processes_of
from reconciler.sweep import LogSweeper
from reconciler.watcher import LOOK_AT_ALL, SessionsWatcher

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from reconciler.metrics import Metrics

RESYNC = 60.0
"""Seconds between two full looks when nothing asks for one; the design's number."""

LEFTOVER_PAUSE = 1.0
"""Seconds from a session's end until what it left behind is looked for: what ends with it
has ended by then, and one scan does for many that end together."""

LOOK_FOR_LEFTOVERS = "+"
"""The hint to scan for leftovers; no session id can be this."""

LOOK_AT_PROCESSES = "&"
"""The hint to scan for what no file tells of; no session id can be this."""


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
        self._control = Control(self._log, self.sessions) if control and not dry_run else None
        self._hints = Hints()
        self._finder = Finder(
            self.sessions, self._hint, self._may_not_act, self._reporter, self._sweeper
        )
        self._inbox: set[str] = set()
        self._inbox_lock = threading.Lock()
        self._folder: Served | None = None
        self._complaint = ""
        self._retries = Retries()
        self._restarts = Restarts()
        self._failures = Retries()
        self._exited_at: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._closed = False

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
        if self._closed:
            raise RuntimeError("a Reconciler is entered once: make another one")
        self._loop = asyncio.get_running_loop()
        self._exits = Exits(self._loop, self._on_exit, self._on_degraded)
        try:
            self._serve_folder()
            self._refuse_second()
            self._watcher = SessionsWatcher(
                self.manager.sessions_dir, self._hint_from_thread, self._on_unwatchable
            )
        except BaseException:
            self._close()
            raise
        self._log.info(
            "reconciler.started", folder=str(self.manager.sessions_dir), dry_run=self.dry_run
        )
        self._start_watching()
        self._hint(LOOK_AT_ALL, AT_ONCE)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the loop. Keepers, agents and files are left as they are.

        A session that is just being started again is waited for.
        """
        self._closed = True
        self._stop_watching()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._close()
        self._log.info("reconciler.stopped", folder=str(self.manager.sessions_dir))

    def _refuse_second(self) -> None:
        if self._folder is not None and self._folder.locked_by_other:
            raise FolderLockedError(self._folder.why_not)

    def _close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._exits.close()
        if self._folder is not None:
            self._folder.close()
            self._folder = None

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
        if self._folder is not None:
            self._folder.go_by(manager)
        self.manager, self._resync = manager, resync
        self._sweeper.budget = log_budget or LogBudget()
        self._hint(LOOK_AT_ALL, AT_ONCE)

    # What callers ask for.

    @property
    def trouble(self) -> str:
        """Why the folder cannot be looked at, or not be acted upon, as of the last full look.

        Empty when all is well, and while there is no folder. May be asked from any thread.
        """
        return self._complaint

    @property
    def queue_depth(self) -> int:
        """How many sessions are to be looked at now, or are in work. From any thread."""
        return self._hints.depth(time.monotonic())

    @property
    def lost_events(self) -> int:
        """How often the system has said that file events were lost. From any thread."""
        return self._watcher.overflows

    async def spawn(self, sid: str | None = None, **options: Any) -> SpawnedKeeper:  # noqa: ANN401 - the manager's
        """Start a session that is wanted from now on; see `KeeperManager.spawn`."""
        spawned = await self.manager.spawn(sid, **options)
        self.sessions.want(spawned.sid, Desired.PRESENT)
        self._hint(spawned.sid, AT_ONCE)
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
        kept = self._keep_no_longer(sid)
        try:
            seen = self.manager.inspect(sid).seen
        except NoSuchSessionError:
            self.sessions.want(sid, Desired.ABSENT)  # a wish that it were there ends, too
            self._hint(sid, AT_ONCE)
            if not kept:
                raise
            await self.wait_for(sid, _is_over)  # it may be being started again
            return StoppedSession(sid, None, time.monotonic() - begun)
        keeper = seen.keeper.process if seen.keeper.state is KeeperState.PROVEN else None
        if (reason := self._may_not_act()) or self._folder is None:
            raise UnverifiableError(f"session {sid} was left alone: {reason}")
        note_wish(self._folder.folder, sid, leave=leave)
        before = self.sessions.row(sid).desired
        if before is Desired.ABSENT:  # another stop is under way: its wish is none to go back to
            before = Desired.AS_FOUND
        await self._end(sid, before)
        await outlast(processes_of(seen), self.manager.ladder)
        self._hint(LOOK_FOR_LEFTOVERS, time.monotonic() + LEFTOVER_PAUSE)
        left = 0
        if not leave and self._folder is not None:
            left = await end_leftovers(
                sid, self._folder.probe, self.manager.ladder, self._tell_done
            )
        elapsed = time.monotonic() - begun
        return StoppedSession(sid, keeper.pid if keeper else None, elapsed, left)

    def _keep_no_longer(self, sid: str) -> bool:
        """From here on it is not started again; whether it would have been."""
        if self._folder is None or self._may_not_act():
            return False
        return self.manager.keep_no_longer(self._folder.folder, sid)

    async def _end(self, sid: str, before: Desired) -> None:
        """Want a session to be absent, and wait until that is so, or cannot be."""
        if self.sessions.row(sid).phase is Verdict.LEFTOVERS:
            self.sessions.reset(sid)  # by what is known; one may have come since
        self.sessions.want(sid, Desired.ABSENT)
        self._hint(sid, AT_ONCE)
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
        met: asyncio.Future[Session] = self._loop.create_future()

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
        horizon = time.monotonic() + self.manager.policy.settle + 0.5
        self._hint(LOOK_AT_ALL, AT_ONCE)
        while (  # noqa: ASYNC110 - the queue, tasks and a thread in one
            self._inbox or self._tasks or self._draining or self._hints.busy_until(horizon)
        ):
            await asyncio.sleep(0.005)
        if self._complaint:
            raise FolderError(f"{str(self.manager.sessions_dir)!r}: {self._complaint}")

    # Hints come in.

    def _hint(self, key: str, due: float) -> None:
        self._hints.add(key, due)
        self._wake()

    def _hint_from_thread(self, key: str) -> None:
        with self._inbox_lock:
            first = not self._inbox
            self._inbox.add(key)
        if first:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._empty_inbox)

    def _empty_inbox(self) -> None:
        with self._inbox_lock:
            keys, self._inbox = self._inbox, set()
        now = time.monotonic()
        for key in keys:
            self._hints.add(key, now)
        self._wake()

    def _start_watching(self) -> None:
        self._watcher.start()
        if self._watcher.descriptor is not None:
            self._loop.add_reader(self._watcher.descriptor, self._read_events)

    def _stop_watching(self) -> None:
        if self._watcher.descriptor is not None:
            self._loop.remove_reader(self._watcher.descriptor)
        self._watcher.stop()

    def _read_events(self) -> None:
        now = time.monotonic()
        for sid in self._watcher.read():
            self._hints.add(sid, now)
        self._wake()

    def _on_exit(self, sid: str, _: ProcessId) -> None:
        self._exited_at.setdefault(sid, time.monotonic())
        self._hint(sid, AT_ONCE)

    def _wake(self) -> None:
        """See to it that `_drain` runs when the next hint is due."""
        if self._draining or self._closed:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._hints.next_due()
        if due is None:
            return
        wait = due - time.monotonic()
        if wait > 0:
            self._timer = self._loop.call_later(wait, self._drain)
        else:
            self._draining = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Look at all sessions that are due, for one slice of time."""
        self._draining = False
        if self._closed:
            return
        end = time.monotonic() + SLICE
        try:
            while (key := self._hints.take(now := time.monotonic())) is not None:
                if key == LOOK_AT_ALL:
                    self._look_at_all()
                elif key in {LOOK_FOR_LEFTOVERS, LOOK_AT_PROCESSES}:
                    self._look_at_processes(key)
                else:
                    self._reconcile(key)
                if now > end:
                    break
        finally:
            self._wake()

    # One session.

    def _reconcile(self, sid: str) -> None:
        self._reporter.begin()
        acting = False
        try:
            if self._folder is not None:
                acting = self._look_and_act(sid, self._folder)
        except Exception as error:  # noqa: BLE001 - one session's trouble is not the others'
            self._failed(sid, error)
        finally:
            if not acting:
                self._hints.release(sid)

    def _look_and_act(self, sid: str, served: Served) -> bool:
        """Look, decide and act; whether a task has the session in work now."""
        row = self.sessions.row(sid)
        suspects = self._finder.suspects_of(sid)
        seen = suspects.look(served.probe, sid, row.seen)
        plan = decide(seen, row.desired, self.manager.policy, self.manager.restart_limits)
        news = self.sessions.record(seen, plan)
        self._exits.follow(sid, seen.watched)
        if plan.again_after is not None:
            self._hints.add(sid, seen.now + plan.again_after)
        may_act = not (plan.actions and self._may_not_act())
        if news:
            self._reporter.judged(seen, plan, acting=may_act)
        if seen.over:
            self._exited_at.pop(sid, None)
            if _was_alive(row):
                self._hints.add(LOOK_FOR_LEFTOVERS, time.monotonic() + LEFTOVER_PAUSE)
        if not plan.actions:
            self._rest(sid, plan)
            return False
        if not may_act or not self._may_try(sid, plan):
            return False
        return self._act(seen, plan, served)

    def _rest(self, sid: str, plan: Plan) -> None:
        """Nothing is to be done now."""
        self._failures.forget(sid)
        if plan.verdict is Verdict.UNVERIFIABLE:
            # Nobody may tell us when that ends: what answers on the socket of a dead keeper,
            # say, can be the child that it was just starting. Look again, ever less often.
            now = time.monotonic()
            self._hints.add(sid, now + self._retries.note(sid, plan.reason, now))
            return
        self._retries.forget(sid)
        if plan.verdict is Verdict.READY:
            self._exited_at.pop(sid, None)

    def _may_try(self, sid: str, plan: Plan) -> bool:
        """Whether it is time to try: an action that does not help is tried ever less often."""
        now = time.monotonic()
        if wait := self._retries.wait(sid, plan.actions, now):
            self._hints.add(sid, now + wait)
            return False
        self._retries.note(sid, plan.actions, now)
        return True

    def _failed(self, sid: str, error: Exception) -> None:
        now = time.monotonic()
        pause = self._failures.note(sid, type(error), now)
        self._hints.add(sid, now + pause)
        self._reporter.failed(sid, error, pause, again=pause > FIRST)

    def _act(self, seen: Observation, plan: Plan, served: Served) -> bool:
        slow = [a for a in plan.actions if not isinstance(a, Instant)]
        for action in plan.actions:
            if isinstance(action, Instant):
                self._tell_done(seen, plan, served.effects.instant(seen, action))
        if slow:
            self._begin(self._take_time(seen, plan, slow, served))
            return True
        if plan.again_after is None:
            self._hints.add(seen.sid, time.monotonic())
        return False

    def _tell_done(self, seen: Observation, plan: Plan, done: Done) -> None:
        exited_at = self._exited_at.get(seen.sid)
        since_exit = time.monotonic() - exited_at if exited_at is not None else None
        self._reporter.done(seen, plan, done, since_exit)

    async def _take_time(
        self,
        seen: Observation,
        plan: Plan,
        actions: Sequence[Stop | Restart],
        served: Served,
    ) -> None:
        try:
            for action in actions:
                if isinstance(action, Restart):
                    done = await self._restarts.start(self.manager, seen.sid, action)
                else:
                    done = await served.effects.stop(seen, action)
                self._tell_done(seen, plan, done)
            self._hints.add(seen.sid, AT_ONCE)
            if plan.verdict is Verdict.LEFTOVERS:  # more may have come while they were ended
                self._hints.add(LOOK_FOR_LEFTOVERS, time.monotonic() + LEFTOVER_PAUSE)
        except Exception as error:  # noqa: BLE001 - one session's trouble is not the others'
            self._failed(seen.sid, error)
        finally:
            self._hints.release(seen.sid)
            self._wake()

    # All sessions.

    def _look_at_all(self) -> None:
        """Ask for a look at every session that has a file, a keeper or a row."""
        if self.metrics is not None:
            self.metrics.looked_at_all()
        try:
            self._serve_folder()
            self._watcher.recheck()
            if self._folder is not None and self._folder.folder.closed_to_us():
                self._complain("folder.unusable", "cannot be read: Permission denied")
            elif self._folder is not None:
                why_not = "" if self.dry_run else self._folder.why_not
                self._complain("folder.observed_only", why_not)
                self._hint_all(self._folder)
        except OSError as error:
            self._complain("folder.unusable", f"cannot be read: {error.strerror}")
        finally:
            self._hints.release(LOOK_AT_ALL)
            self._hints.add(LOOK_AT_ALL, time.monotonic() + self._resync)

    def _hint_all(self, served: Served) -> None:
        now = time.monotonic()
        for sid in self.sessions:
            self._hints.add(sid, now)
        self._begin(self._find_all(served))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task that ends with the loop."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _find_all(self, served: Served) -> None:
        """Find all sessions: first the names in the folder, then what only a scan can find.

        The scan waits in the queue behind all that was found by then: it runs beside the loop,
        and would take the interpreter from it.
        """
        if await self._finder.by_names(served):
            self._hint(LOOK_AT_PROCESSES, time.monotonic())

    def _look_at_processes(self, key: str) -> None:
        """Scan for what ended sessions have left, or for all that no file tells of."""
        if self._folder is None:
            self._hints.release(key)
        else:
            self._begin(self._find_by_processes(key, self._folder))

    async def _find_by_processes(self, key: str, served: Served) -> None:
        full = key == LOOK_AT_PROCESSES
        try:
            found = await self._finder.by_processes(served, full=full)
        finally:
            self._hints.release(key)
            self._wake()
        if full and found is not None:
            await self._finder.sweep_logs(served, found)

    def _serve_folder(self) -> None:
        """Hold the folder that the path leads to now, if any, and its lock."""
        if self._folder is not None and not self._folder.folder.in_place():
            self._leave_folder()
        if self._folder is None:
            try:
                folder = Folder(self.manager.sessions_dir)
            except FileNotFoundError:
                self._complaint = ""
                return
            except OSError as error:
                self._complain("folder.unusable", f"cannot be opened: {error.strerror}")
                return
            self._folder = Served(folder, self.manager, self._on_registry, self._control)
        if not self.dry_run:
            self._folder.take_lock()

    def _leave_folder(self) -> None:
        """The folder is gone or another one stands in its place: what was seen is void."""
        if self._folder is None:
            return
        self._log.warning("folder.gone", folder=str(self.manager.sessions_dir))
        self._folder.close()
        self._folder = None
        self._complaint = ""
        for sid in tuple(self.sessions):
            self._exits.follow(sid, frozenset())
            self.sessions.reset(sid)

    def _may_not_act(self) -> str:
        if self.dry_run:
            return "dry run"
        return self._folder.may_not_act() if self._folder is not None else "there is no folder"

    # Telling.

    def _complain(self, event: str, reason: str) -> None:
        """Say what is wrong with the folder, once for each reason."""
        if reason and reason != self._complaint:
            self._log.warning(event, folder=str(self.manager.sessions_dir), reason=reason)
        self._complaint = reason

    def _on_subscriber_error(self, error: Exception) -> None:
        self._log.error("subscriber.failed", reason=f"{type(error).__name__}: {error}")

    def _on_registry(self, reason: str) -> None:
        self._log.warning("registry.unusable", reason=reason)

    def _on_degraded(self, reason: str) -> None:
        self._log.warning("exits.polled", reason=reason)

    def _on_unwatchable(self, reason: str) -> None:
        self._log.warning("folder.unwatched", reason=reason)


def _is_over(row: Session) -> bool:
    """Nothing is left of a session but what it has started, or it cannot be ended."""
    ends = {Verdict.ABSENT, Verdict.LEFTOVERS, Verdict.REFUSED, Verdict.UNVERIFIABLE}
    return row.plan is not None and row.phase in ends


def _was_alive(row: Session) -> bool:
    return row.seen is not None and row.seen.seen_alive and not row.seen.over
