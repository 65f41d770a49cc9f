"""A pass over one session: look → decide → act, and when to look again.

A look, and what can be done in an instant, is done at once. What takes time (ending a process,
starting a session again) is given back, to be done beside the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from reconciler.exits import Exits
from reconciler.hints import AT_ONCE, LEFTOVER_PAUSE, LOOK_FOR_LEFTOVERS
from reconciler.observations import Observation, ProcessId
from reconciler.plans import Instant, Plan, Restart, Stop, Verdict
from reconciler.probe import Suspects
from reconciler.reports import Reporter
from reconciler.restarting import Restarts
from reconciler.retries import FIRST, Retries
from reconciler.served import Served
from reconciler.sessions import Session, SessionTable
from reconciler.state import decide
from reconciler.workqueue import LongWork


class Passes:
    """Passes over sessions, any number of them, one after the other. Close it when done.

    Args:
        loop: tells of exits.
        sessions: where each look and its judgement go.
        hint: called with a key, and when it is to be looked at.
        reporter: tells what was judged and done.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sessions: SessionTable,
        hint: Callable[[str, float], None],
        reporter: Reporter,
    ) -> None:
        self._sessions = sessions
        self._hint = hint
        self._reporter = reporter
        self._exits = Exits(loop, self._on_exit, reporter.exits_polled)
        self._exited_at: dict[str, float] = {}
        self._retries = Retries()
        self._failures = Retries()
        self._restarts = Restarts()

    def close(self) -> None:
        """Follow nobody any more."""
        self._exits.close()

    def forget_all(self) -> None:
        """What was seen of all sessions is void: their folder has gone."""
        self._exited_at.clear()
        for sid in tuple(self._sessions):
            self._exits.follow(sid, frozenset())
            self._sessions.reset(sid)

    def run(self, sid: str, served: Served, suspects: Suspects) -> LongWork | None:
        """Look at a session, decide, and act.

        Args:
            sid: the session's id.
            served: its folder.
            suspects: what a scan has found since the last look.

        Returns:
            What takes time, if anything does. Until it is through there must be no other pass
            over this session.
        """
        self._reporter.begin()
        try:
            return self._look_and_act(sid, served, suspects)
        except Exception as error:  # noqa: BLE001 - one session's trouble is not the others'
            self._failed(sid, error)
            return None

    def _on_exit(self, sid: str, _: ProcessId) -> None:
        self._exited_at.setdefault(sid, time.monotonic())
        self._hint(sid, AT_ONCE)

    def _look_and_act(self, sid: str, served: Served, suspects: Suspects) -> LongWork | None:
        row, manager = self._sessions.row(sid), served.manager
        seen = suspects.look(served.probe, row.sid, row.seen)  # the text that the table has
        plan = decide(seen, row.desired, manager.policy, manager.restart_limits)
        news = self._sessions.record(seen, plan)
        self._exits.follow(sid, seen.watched)
        if plan.again_after is not None:
            self._hint(sid, seen.now + plan.again_after)
        may_act = not (plan.actions and served.may_not_act())
        if news:
            self._reporter.judged(seen, plan, acting=may_act)
        if seen.over:
            self._exited_at.pop(sid, None)
            if _was_alive(row):
                self._look_for_leftovers()
        if not plan.actions:
            self._rest(sid, plan)
            return None
        if not may_act or not self._may_try(sid, plan):
            return None
        return self._act(seen, plan, served)

    def _rest(self, sid: str, plan: Plan) -> None:
        """Nothing is to be done now."""
        self._failures.forget(sid)
        if plan.verdict is Verdict.UNVERIFIABLE:
            # Nobody may tell us when that ends: what answers on the socket of a dead keeper,
            # say, can be the child that it was just starting. Look again, ever less often.
            now = time.monotonic()
            self._hint(sid, now + self._retries.note(sid, plan.reason, now))
            return
        self._retries.forget(sid)
        if plan.verdict is Verdict.READY:
            self._exited_at.pop(sid, None)

    def _may_try(self, sid: str, plan: Plan) -> bool:
        """Whether it is time to try: an action that does not help is tried ever less often."""
        now = time.monotonic()
        if wait := self._retries.wait(sid, plan.actions, now):
            self._hint(sid, now + wait)
            return False
        self._retries.note(sid, plan.actions, now)
        return True

    def _failed(self, sid: str, error: Exception) -> None:
        now = time.monotonic()
        pause = self._failures.note(sid, type(error), now)
        self._hint(sid, now + pause)
        self._reporter.failed(sid, error, pause, again=pause > FIRST)

    def _act(self, seen: Observation, plan: Plan, served: Served) -> LongWork | None:
        slow = [a for a in plan.actions if not isinstance(a, Instant)]
        for action in plan.actions:
            if isinstance(action, Instant):
                done = served.effects.instant(seen, action)
                self._reporter.done(seen, plan, done, self._since_exit(seen.sid))
        if slow:
            return self._take_time(seen, plan, slow, served)
        if plan.again_after is None:
            self._hint(seen.sid, time.monotonic())
        return None

    async def _take_time(
        self, seen: Observation, plan: Plan, actions: Sequence[Stop | Restart], served: Served
    ) -> None:
        try:
            for action in actions:
                if isinstance(action, Restart):
                    done = await self._restarts.start(served.manager, seen.sid, action)
                else:
                    done = await served.effects.stop(seen, action)
                self._reporter.done(seen, plan, done)
            self._hint(seen.sid, AT_ONCE)
            if plan.verdict is Verdict.LEFTOVERS:  # more may have come while they were ended
                self._look_for_leftovers()
        except Exception as error:  # noqa: BLE001 - one session's trouble is not the others'
            self._failed(seen.sid, error)

    def _since_exit(self, sid: str) -> float | None:
        """Seconds since the exit that this session is looked at for, if there was one."""
        exited_at = self._exited_at.get(sid)
        return None if exited_at is None else time.monotonic() - exited_at

    def _look_for_leftovers(self) -> None:
        self._hint(LOOK_FOR_LEFTOVERS, time.monotonic() + LEFTOVER_PAUSE)


def _was_alive(row: Session) -> bool:
    return row.seen is not None and row.seen.seen_alive and not row.seen.over
