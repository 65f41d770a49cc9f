"""Those who watch over a running reconciler: whoever reads its metrics, and its service manager.

Everything here is told from the event loop itself, so that a loop that is stuck tells nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
from collections import Counter as Tally
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self

from reconciler.notify import Notifier
from reconciler.pulse import PERIOD, STUCK, Pulse
from reconciler.sessions import Session, SessionTable

if TYPE_CHECKING:
    from reconciler.controller import Reconciler
    from reconciler.exposition import Exposition, Health
    from reconciler.metrics import Metrics

STATUS_PAUSE: Final = 1.0
"""Seconds between two status lines, at the least."""


class Oversight:
    """Tells of a reconciler for as long as it is entered, inside that one's own block.

    Args:
        reconciler: it has begun.
        exposition: where its metrics and health are to be had, if anywhere.
        notifier: the service manager.
        dropped: says how many log lines were dropped.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        notifier: Notifier,
        exposition: Exposition | None = None,
        dropped: Callable[[], int] = int,
    ) -> None:
        self._reconciler = reconciler
        self._notifier = notifier
        self._exposition = exposition
        self._dropped = dropped
        wanted = [PERIOD] if exposition is not None else []
        if notifier.watchdog is not None:
            wanted.append(notifier.watchdog / 2)
        self._pulse = Pulse(min(wanted)) if wanted else None
        self._status = _Status(reconciler.sessions, notifier) if notifier else None

    async def __aenter__(self) -> Self:
        """Begin: the reconciler is ready."""
        if self._pulse is not None:
            if self._notifier.watchdog is not None:
                _tell_where_it_is_stuck()
                self._pulse.listen(lambda _: self._notifier.alive())
            if self._exposition is not None and self._reconciler.metrics is not None:
                self._expose(self._exposition, self._reconciler.metrics, self._pulse)
            self._pulse.start()
        self._notifier.ready()
        if self._status is not None:
            self._status.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """End: the reconciler is about to."""
        self._notifier.stopping()
        if self._status is not None:
            self._status.stop()
        if self._pulse is not None:
            self._pulse.stop()
        if self._exposition is not None:
            await asyncio.to_thread(self._exposition.close)
        self._notifier.close()

    def _expose(self, exposition: Exposition, metrics: Metrics, pulse: Pulse) -> None:
        reconciler = self._reconciler
        metrics.read_reconciler(
            queue_depth=lambda: reconciler.queue_depth,
            lost_events=lambda: reconciler.lost_events,
            usable=lambda: not reconciler.trouble,
            dropped=self._dropped,
        )
        metrics.read_loop(pulse)
        exposition.start(metrics.registry, lambda: health(reconciler, pulse))


def _tell_where_it_is_stuck() -> None:
    """Have the watchdog's SIGABRT write to standard error where each thread stands."""
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # there is none, or it is closed
        faulthandler.enable()


def health(reconciler: Reconciler, pulse: Pulse) -> Health:
    """How a reconciler is; from any thread."""
    from reconciler.exposition import Health  # noqa: PLC0415 - only where there is one

    silence = pulse.silence
    reason = reconciler.trouble
    if silence > STUCK:
        reason = f"the event loop has been stuck for {silence:.0f} s"
    return Health(
        healthy=not reason,
        reason=reason,
        sessions=len(reconciler.sessions),
        loop_silence_s=round(silence, 3),
    )


class _Status:
    """Keeps the manager's status line true: at most one a second, and only a new one."""

    def __init__(self, sessions: SessionTable, notifier: Notifier) -> None:
        self._sessions = sessions
        self._notifier = notifier
        self._last = ""  # what was told
        self._act = ""
        self._timer: asyncio.TimerHandle | None = None
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._unsubscribe = self._sessions.subscribe(self._on_change)
        self._tell()

    def stop(self) -> None:
        self._unsubscribe()
        if self._timer is not None:
            self._timer.cancel()

    def _on_change(self, session: Session) -> None:
        if session.plan is not None and session.plan.actions:
            self._act = f"; last: {session.sid} {session.phase.value} ({session.reason})"
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(STATUS_PAUSE, self._tell)

    def _tell(self) -> None:
        self._timer = None
        phases = Tally(session.phase.value for session in self._sessions.values())
        parts = [f"{count} {phase}" for phase, count in sorted(phases.items())]
        text = (", ".join(parts) or "no sessions") + self._act
        if text != self._last:
            self._last = text
            self._notifier.status(text)
