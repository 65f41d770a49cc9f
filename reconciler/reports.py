"""What is told of sessions: one log line with the evidence, and the metrics.

Every verdict that acts is told with what it stands on; one that only has to be known is
told once; a quiet world tells nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from reconciler.effects import Done
from reconciler.observations import Observation
from reconciler.plans import (
    Adopt,
    Forget,
    GiveUp,
    Plan,
    Rebind,
    Remove,
    Restart,
    StopAgent,
    StopKeeper,
    StopLeftovers,
    Verdict,
)
from reconciler.sweep import Report, Swept

if TYPE_CHECKING:
    from reconciler.metrics import Metrics

_TOLD_ONCE: Mapping[Verdict, str] = {
    Verdict.REFUSED: "session.refused",
    Verdict.UNVERIFIABLE: "session.unverifiable",
    Verdict.MISSING: "session.missing",
    Verdict.UNREACHABLE: "session.unreachable",
    Verdict.LEFTOVERS: "session.leftovers",
}
_EVENTS: Mapping[type, str] = {
    Remove: "session.cleaned",
    StopKeeper: "keeper.stopped",
    StopAgent: "agent.stopped",
    StopLeftovers: "leftovers.stopped",
    Rebind: "keeper.told_to_bind",
    Adopt: "keeper.adopted",
    Restart: "session.restarted",
    GiveUp: "session.given_up",
    Forget: "session.not_restarted",
}
_FAILURES: Mapping[type, str] = {Restart: "session.restart_failed"}
ACTIONS = frozenset(_EVENTS.values())
"""The events that tell of something done."""

_MOST = 20
"""Leftovers, or logs, that one line names; it counts them all."""

_GROWN = "log of a living session too long"

_RECONCILE_ID = ContextVar("reconcile_id", default=0)
"""Which look a line belongs to; a task that a look has started keeps that look's."""


class Log(Protocol):
    """What is asked of a logger: structlog's filtering ones will do."""

    def is_enabled_for(self, level: int, /) -> bool:
        """Whether it takes lines of this level."""

    def debug(self, event: str, **fields: Any) -> Any:  # noqa: ANN401 - structlog's own
        """Tell what is for those who look for a defect."""

    def info(self, event: str, **fields: Any) -> Any:  # noqa: ANN401 - the same
        """Tell what was done."""

    def warning(self, event: str, **fields: Any) -> Any:  # noqa: ANN401 - the same
        """Tell what somebody should look at."""

    def error(self, event: str, **fields: Any) -> Any:  # noqa: ANN401 - the same
        """Tell what went wrong."""


class Reporter:
    """Tells of sessions.

    Args:
        log: where the lines go.
        metrics: what is counted beside them, if anything.
    """

    def __init__(self, log: Log, metrics: Metrics | None = None) -> None:
        self._log = log
        self._metrics = metrics
        self._looks = 0
        self._sweep_failures: frozenset[str] = frozenset()
        self._planned: tuple[Swept, ...] = ()

    def begin(self) -> None:
        """A session is looked at: what is told from here on belongs to this look."""
        self._looks += 1
        _RECONCILE_ID.set(self._looks)

    def judged(self, seen: Observation, plan: Plan, *, acting: bool) -> None:
        """The judgement of a session is a new one."""
        if self._metrics is not None:
            self._metrics.judged(plan.verdict, plan.reason)
        if plan.actions and not acting:
            actions = [type(action).__name__ for action in plan.actions]
            self._tell(self._log.info, "session.planned", seen, plan, actions=actions)
        elif plan.verdict in _TOLD_ONCE and not plan.actions and not seen.leave:
            self._tell(self._log.warning, _TOLD_ONCE[plan.verdict], seen, plan)
        elif self._log.is_enabled_for(logging.DEBUG):  # what nobody reads is not put together
            self._tell(self._log.debug, "session.seen", seen, plan)

    def done(
        self, seen: Observation, plan: Plan, done: Done, since_exit: float | None = None
    ) -> None:
        """An action was carried out, or could not be; some time after an exit was noticed."""
        event = _EVENTS[type(done.action)]
        if self._metrics is not None:
            self._metrics.acted(event, plan.reason, done.duration, success=done.success)
        more: dict[str, object] = {
            "detail": done.detail,
            "duration_ms": round(done.duration * 1000, 3),
        }
        if isinstance(done.action, StopKeeper | Rebind | Adopt):
            more["keeper_pid"] = done.action.process.pid
        if not done.success:
            action = type(done.action).__name__
            failed = _FAILURES.get(type(done.action), "action.failed")
            self._tell(self._log.warning, failed, seen, plan, action=action, **more)
            return
        if isinstance(done.action, Remove) and since_exit is not None:
            more["since_exit_ms"] = round(since_exit * 1000, 3)
            if self._metrics is not None:
                self._metrics.cleaned(since_exit)
        log = self._log.warning if isinstance(done.action, GiveUp) else self._log.info
        self._tell(log, event, seen, plan, **more)

    def failed(self, sid: str, error: Exception, retry: float, *, again: bool = False) -> None:
        """Looking at a session, or acting on it, ended with an error: a new one, or again."""
        if self._metrics is not None:
            self._metrics.failed(error)
        log = self._log.debug if again else self._log.error
        log(
            "session.failed",
            sid=sid,
            keeper_pid=None,
            reason=f"{type(error).__name__}: {error}",
            reconcile_id=_RECONCILE_ID.get(),
            retry_ms=round(retry * 1000),
        )

    def swept(self, report: Report, *, acting: bool) -> None:
        """The logs were brought into their budget, or would be."""
        if acting or report.swept != self._planned:
            for each in report.swept:
                self._log.info(
                    "logs.swept" if acting else "logs.planned",
                    reason=each.why.value,
                    count=len(each.logs),
                    bytes=each.freed,
                    logs=list(each.logs[:_MOST]),
                )
        self._planned = () if acting else report.swept
        for log in report.grown:
            self._log.warning(
                "logs.grown", sid=log.sid, reason=_GROWN, log=log.name, bytes=log.file.size
            )
        for failure in report.failures:
            if failure not in self._sweep_failures:
                self._log.warning("logs.sweep_failed", reason=failure)
        self._sweep_failures = frozenset(report.failures)
        if self._metrics is not None:
            self._metrics.swept(report, acting=acting)

    def exits_polled(self, reason: str) -> None:
        """Not every exit is told by the system: some processes are looked at again and again."""
        self._log.warning("exits.polled", reason=reason)

    def half_read(self, folder: Path, error: OSError | RuntimeError) -> None:
        """Not all of a folder could be read."""
        why = error.strerror if isinstance(error, OSError) else error
        reason = f"not all could be looked at: {why}"
        self._log.warning("folder.half_read", folder=str(folder), reason=reason)

    def recovered(self, name: str, fate: str) -> None:
        """A removal that was cut off was brought to its end."""
        self._log.warning("removal.recovered", name=name, fate=fate)

    def not_recovered(self, name: str, error: OSError) -> None:
        """A removal that was cut off could not be brought to its end."""
        self._log.error("removal.failed", name=name, error=str(error.strerror))

    def _tell(
        self, log: Callable[..., Any], event: str, seen: Observation, plan: Plan, **more: object
    ) -> None:
        process = seen.keeper.process
        told: dict[str, object] = {
            "sid": seen.sid,
            "keeper_pid": process.pid if process else seen.pid_file.pid or None,
            "reason": plan.reason,
            "reconcile_id": _RECONCILE_ID.get(),
            "verdict": plan.verdict.value,
            **_evidence(seen),
            **more,
        }
        log(event, **told)


def _evidence(seen: Observation) -> dict[str, object]:
    """What a verdict stands on, without what says nothing."""
    evidence: dict[str, object] = {
        "keeper": seen.keeper.state.value,
        "keeper_evidence": seen.keeper.evidence,
        "pid_file": seen.pid_file.kind.value,
        "socket": seen.socket.kind.value,
        "listening": seen.listening.value,
        "agent": seen.agent.state.value,
        "agent_pid": seen.agent.process.pid if seen.agent.process else None,
        "agent_evidence": seen.agent.evidence,
    }
    told = {key: value for key, value in evidence.items() if value not in ("", None)}
    if left := seen.leftovers:
        told["leftovers"] = [f"{each.process.pid} {each.name}" for each in left[:_MOST]]
        told["leftover_count"] = len(left)
    if record := seen.record:
        told["policy"], told["ending"] = record.policy, record.ending.value
        told["restarts"] = len(record.restarts)
    return told
