"""Metrics of the running reconciler, for Prometheus. Loaded only where they are asked for.

What happens is counted where it is logged; what is (how many wait, how long the loop is
silent) is read when somebody asks. ``docs/metrics.md`` explains each.
"""

from __future__ import annotations

import platform
import re
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from reconciler import __version__
from reconciler.budget import Why
from reconciler.deliveries import Delivery
from reconciler.plans import Verdict
from reconciler.pulse import Pulse
from reconciler.sessions import Session, SessionTable
from reconciler.sweep import Report

_SECONDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)

MOST_REASONS: Final = 64
"""Different reasons that a run's metrics name; what comes beyond is ``other``. Some reasons
repeat what stands in a file, and whoever writes there must not fill the memory."""

_LONGEST_REASON: Final = 120
_NUMBER: Final = re.compile(r"\d+")


class DeliveryMetrics:
    """What became of the lines that this process wrote: for `RpcWriter`'s ``on_delivery``.

    An application that writes keeps them; the daemon writes no lines, and has none to count.

    Args:
        registry: where they are exposed, for instance ``prometheus_client.REGISTRY``.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._deliveries = Counter(
            "pi_reconciler_deliveries",
            "Writes that have ended, by outcome and reason.",
            ("outcome", "reason"),
            registry=registry,
        )
        self._latency = Histogram(
            "pi_reconciler_write_seconds",
            "From the call of a write until its outcome was known.",
            ("outcome",),
            buckets=_SECONDS,
            registry=registry,
        )

    def delivered(self, delivery: Delivery) -> None:
        """Count one write; from any thread."""
        outcome = delivery.outcome.value
        self._deliveries.labels(outcome, delivery.reason.value).inc()
        self._latency.labels(outcome).observe(delivery.elapsed)


class Metrics(DeliveryMetrics):
    """The metrics of one reconciler, in a registry of their own.

    Args:
        sessions: the table whose phases are counted when the metrics are read.

    Attributes:
        registry: what to expose.
    """

    def __init__(self, sessions: SessionTable) -> None:
        self.registry = CollectorRegistry()
        super().__init__(self.registry)
        self.registry.register(_Phases(sessions))
        ProcessCollector(registry=self.registry)
        Info("pi_reconciler_build", "Which program this is.", registry=self.registry).info(
            {"version": __version__, "python": platform.python_version()}
        )
        self._reasons: set[str] = set()
        self._verdicts = Counter(
            "pi_reconciler_verdicts",
            "New judgements of sessions, by verdict and reason.",
            ("verdict", "reason"),
            registry=self.registry,
        )
        self._actions = Counter(
            "pi_reconciler_actions",
            "Actions carried out, by event name, reason and result.",
            ("event", "reason", "result"),
            registry=self.registry,
        )
        self._durations = Histogram(
            "pi_reconciler_action_seconds",
            "How long actions took, by event name.",
            ("event",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._errors = Counter(
            "pi_reconciler_session_errors",
            "Looks or actions that ended with an error, by its kind.",
            ("error",),
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

    # What is counted.

    def judged(self, verdict: Verdict, reason: str) -> None:
        """Count one new judgement."""
        self._verdicts.labels(verdict.value, self._label(reason)).inc()

    def acted(self, event: str, reason: str, seconds: float, *, success: bool) -> None:
        """Count one action, and note how long it took."""
        result = "success" if success else "failure"
        self._actions.labels(event, self._label(reason), result).inc()
        self._durations.labels(event).observe(seconds)

    def failed(self, error: Exception) -> None:
        """Count one look or action that ended with an error."""
        self._errors.labels(type(error).__name__).inc()

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

    def _label(self, reason: str) -> str:
        """A reason without its numbers: with a pid in it, each one would be a series."""
        label = _NUMBER.sub("N", reason[:_LONGEST_REASON])
        if label not in self._reasons and len(self._reasons) >= MOST_REASONS:
            return "other"
        self._reasons.add(label)
        return label

    # What is read when somebody asks, from that one's thread.

    def read_reconciler(
        self,
        *,
        queue_depth: Callable[[], int],
        lost_events: Callable[[], int],
        usable: Callable[[], bool],
        dropped: Callable[[], int],
    ) -> None:
        """Tell of what others keep: the queue, the watch, the folder and the log."""
        self._gauge(
            "pi_reconciler_queue_depth",
            "Sessions that are to be looked at now, or are in work.",
            queue_depth,
        )
        self._counter(
            "pi_reconciler_lost_events",
            "Notices by the system that file events were lost; a full look follows each.",
            lost_events,
        )
        self._gauge(
            "pi_reconciler_folder_usable",
            "1: the sessions folder can be acted upon, or is not there; 0: it cannot.",
            usable,
        )
        self._counter(
            "pi_reconciler_log_lines_dropped",
            "Log lines that could not be written.",
            dropped,
        )

    def read_loop(self, pulse: Pulse) -> None:
        """Tell of a loop: how late it is, and how long it has been silent."""
        lag = Histogram(
            "pi_reconciler_loop_lag_seconds",
            "By how much the event loop came too late to a timer, sampled at every beat.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        pulse.listen(lag.observe)
        self._gauge(
            "pi_reconciler_loop_silence_seconds",
            "Since the event loop's last beat: it beats every 5 s, or more often.",
            lambda: pulse.silence,
        )

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        self.registry.register(_Read(lambda: GaugeMetricFamily(name, text, read())))

    def _counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        self.registry.register(_Read(lambda: CounterMetricFamily(name, text, read())))


class _Read(Collector):
    """One metric whose value is asked for at each reading."""

    def __init__(self, family: Callable[[], Metric]) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family()


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
