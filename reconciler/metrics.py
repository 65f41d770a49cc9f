"""Metrics of the running reconciler, for Prometheus. Loaded only where they are asked for.

They are told, not kept: every figure is counted where its event is logged.
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from reconciler.budget import Why
from reconciler.state import Session, SessionTable, Verdict
from reconciler.sweep import Report

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """The metrics of one reconciler, in a registry of their own.

    Args:
        sessions: the table whose phases are counted when the metrics are read.

    Attributes:
        registry: what to expose.
    """

    def __init__(self, sessions: SessionTable) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Phases(sessions))
        self._actions = Counter(
            "pi_reconciler_actions",
            "Actions carried out, by event name, reason and result.",
            ("event", "reason", "result"),
            registry=self.registry,
        )
        self._clean = Histogram(
            "pi_reconciler_exit_to_clean_seconds",
            "From the notice of a keeper's death until its files were gone.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._full_looks = Counter(
            "pi_reconciler_full_looks",
            "Looks at the whole folder: at start, at lost events, and at every resync.",
            registry=self.registry,
        )

        self._logs_swept = Counter(
            "pi_reconciler_logs_swept",
            "Logs of ended sessions removed or cut to stay within the budget, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self._log_bytes = Gauge(
            "pi_reconciler_log_bytes",
            "Bytes of all session logs in the folder, as of the last full look.",
            registry=self.registry,
        )
        for why in Why:
            self._logs_swept.labels(why.value)

    def acted(self, event: str, reason: str, *, success: bool) -> None:
        """Count one action."""
        self._actions.labels(event, reason, "success" if success else "failure").inc()

    def cleaned(self, seconds: float) -> None:
        """Note how long the files of a dead keeper stayed after its death was known."""
        self._clean.observe(seconds)

    def looked_at_all(self) -> None:
        """Count one full look."""
        self._full_looks.inc()

    def swept(self, report: Report, *, acting: bool) -> None:
        """Note what the logs take, and count what was removed or cut of them."""
        self._log_bytes.set(report.kept)
        for each in report.swept if acting else ():
            self._logs_swept.labels(each.why.value).inc(len(each.logs))

    def serve(self, host: str, port: int) -> tuple[WSGIServer, threading.Thread]:
        """Expose the metrics over HTTP, in a thread of their own.

        Raises:
            OSError: the address cannot be bound.
        """
        return start_http_server(port, host, registry=self.registry)


class _Phases(Collector):
    """Counts the sessions by phase at the moment of reading.

    The table belongs to the event loop's thread, and metrics are read in another: so each
    change is noted as it is told, in a dictionary that can be copied in one step.
    """

    def __init__(self, sessions: SessionTable) -> None:
        self._phases = {sid: session.phase for sid, session in sessions.items()}
        sessions.subscribe(self._note)

    def _note(self, session: Session) -> None:
        if session.phase is Verdict.ABSENT:
            self._phases.pop(session.sid, None)
        else:
            self._phases[session.sid] = session.phase

    def collect(self) -> Iterator[GaugeMetricFamily]:
        phases = Tally(self._phases.copy().values())
        family = GaugeMetricFamily(
            "pi_reconciler_sessions", "Sessions known, by phase.", labels=("phase",)
        )
        for phase in Verdict:
            if phase is not Verdict.ABSENT:
                family.add_metric((phase.value,), phases[phase])
        yield family
