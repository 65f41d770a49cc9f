from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest

from reconciler.effects import Done
from reconciler.layout import Role
from reconciler.logs import make_logger
from reconciler.metrics import Metrics
from reconciler.observations import (
    Agent,
    AgentState,
    Entry,
    EntryKind,
    FileId,
    Keeper,
    KeeperState,
    Listening,
    Observation,
    ProcessId,
)
from reconciler.plans import Action, Adopt, Plan, Rebind, Remove, StopAgent, StopKeeper, Verdict
from reconciler.reports import Reporter
from reconciler.sessions import SessionTable

KEEPER = ProcessId(4711, 1, "boot")
AGENT = ProcessId(4712, 2, "boot")
FILE = FileId(1, 2, 3, 4, b"4711")
SEEN = Observation(
    sid="demo",
    now=10.0,
    pid_file=Entry(EntryKind.PID, 1.0, FILE, pid=4711),
    socket=Entry(EntryKind.SOCKET, 1.0, FILE),
    agent_file=Entry(EntryKind.ABSENT, 1.0),
    keeper=Keeper(KeeperState.PROVEN, KEEPER, ours=True, age=9.0, evidence="it listens"),
    listening=Listening.ANSWERED,
    listener=KEEPER,
    agent=Agent(AgentState.ALIVE, 1.0, AGENT, proven=True, evidence="its child"),
)
REMOVE = Remove(((Role.SOCKET, FILE),))
EVIDENCE = {
    "keeper": "proven",
    "keeper_evidence": "it listens",
    "pid_file": "pid",
    "socket": "socket",
    "listening": "answered",
    "agent": "alive",
    "agent_pid": 4712,
    "agent_evidence": "its child",
}


class Desk:
    """A reporter, what it told, and what it counted."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        self.metrics = Metrics(SessionTable())
        self.reporter = Reporter(make_logger(self._stream, "debug"), self.metrics)

    @property
    def told(self) -> dict[str, Any]:
        """The one line since the last time."""
        (line,) = self._stream.getvalue().splitlines()
        self._stream.seek(0)
        self._stream.truncate()
        told = json.loads(line)
        assert isinstance(told, dict)
        return told

    def count(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def desk() -> Desk:
    return Desk()


ACTIONS: list[tuple[Action, str]] = [
    (REMOVE, "session.cleaned"),
    (StopKeeper(KEEPER), "keeper.stopped"),
    (StopAgent(AGENT), "agent.stopped"),
    (Rebind(KEEPER), "keeper.told_to_bind"),
    (Adopt(KEEPER, None), "keeper.adopted"),
]


@pytest.mark.parametrize(("action", "event"), ACTIONS)
def test_an_action_is_told_with_its_evidence_and_counted(
    desk: Desk, action: Action, event: str
) -> None:
    plan = Plan(Verdict.STALE, "keeper dead", (action,))
    desk.reporter.begin()
    desk.reporter.done(SEEN, plan, Done(action, success=True, detail="so", duration=0.0015), None)
    told = desk.told
    told.pop("timestamp")
    assert told == {
        "level": "info",
        "severity_number": 9,
        "event": event,
        "sid": "demo",
        "keeper_pid": 4711,
        "reason": "keeper dead",
        "reconcile_id": 1,
        "verdict": "stale",
        **EVIDENCE,
        "detail": "so",
        "duration_ms": 1.5,
    }
    labels = {"event": event, "reason": "keeper dead"}
    assert desk.count("pi_reconciler_actions_total", **labels, result="success") == 1
    assert desk.count("pi_reconciler_actions_total", **labels, result="failure") is None


@pytest.mark.parametrize(("action", "event"), ACTIONS)
def test_an_action_that_failed_is_a_warning_and_counted_apart(
    desk: Desk, action: Action, event: str
) -> None:
    plan = Plan(Verdict.STALE, "keeper dead", (action,))
    desk.reporter.done(SEEN, plan, Done(action, success=False, detail="no", duration=0.0), 0.5)
    told = desk.told
    assert (told["event"], told["level"]) == ("action.failed", "warning")
    assert (told["action"], told["detail"]) == (type(action).__name__, "no")
    assert "since_exit_ms" not in told
    labels = {"event": event, "reason": "keeper dead"}
    assert desk.count("pi_reconciler_actions_total", **labels, result="failure") == 1
    assert desk.count("pi_reconciler_exit_to_clean_seconds_count") == 0


def test_a_clean_after_a_death_tells_and_counts_how_long_it_took(desk: Desk) -> None:
    plan = Plan(Verdict.STALE, "keeper dead", (REMOVE,))
    desk.reporter.done(SEEN, plan, Done(REMOVE, success=True, detail="", duration=0.0), 0.0042)
    assert desk.told["since_exit_ms"] == 4.2
    assert desk.count("pi_reconciler_exit_to_clean_seconds_count") == 1
    assert desk.count("pi_reconciler_exit_to_clean_seconds_sum") == 0.0042
    assert desk.count("pi_reconciler_exit_to_clean_seconds_bucket", le="0.0025") == 0
    assert desk.count("pi_reconciler_exit_to_clean_seconds_bucket", le="0.005") == 1


def test_only_a_clean_tells_of_the_death_before_it(desk: Desk) -> None:
    stop = StopAgent(AGENT)
    plan = Plan(Verdict.ORPHAN_AGENT, "keeper dead", (stop,))
    desk.reporter.done(SEEN, plan, Done(stop, success=True, detail="", duration=0.0), 0.5)
    assert "since_exit_ms" not in desk.told


def test_the_keeper_that_was_stopped_is_the_one_that_is_named(desk: Desk) -> None:
    stop = StopKeeper(replace(KEEPER, pid=4713), at_once=True)
    plan = Plan(Verdict.USURPED, "another keeper owns the socket", (stop,))
    for success in (True, False):
        desk.reporter.done(SEEN, plan, Done(stop, success, detail="", duration=0.0), None)
        told = desk.told
        assert (told["sid"], told["keeper_pid"], told["reason"]) == ("demo", 4713, plan.reason)


def test_a_plan_that_may_not_be_carried_out_is_told(desk: Desk) -> None:
    plan = Plan(Verdict.STALE, "keeper dead", (REMOVE, StopKeeper(KEEPER)))
    desk.reporter.judged(SEEN, plan, acting=False)
    told = desk.told
    assert (told["event"], told["level"]) == ("session.planned", "info")
    assert told["actions"] == ["Remove", "StopKeeper"]
    desk.reporter.judged(SEEN, plan, acting=True)
    assert desk.told["level"] == "debug"


@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_verdict_without_actions_is_told_where_somebody_must_know(
    desk: Desk, verdict: Verdict
) -> None:
    desk.reporter.judged(SEEN, Plan(verdict, "so it is"), acting=True)
    told = desk.told
    warned = {"refused", "unverifiable", "missing", "unreachable", "leftovers"}
    assert (told["event"], told["level"]) == (
        (f"session.{verdict.value}", "warning")
        if verdict.value in warned
        else ("session.seen", "debug")
    )
    assert {key: told[key] for key in EVIDENCE} == EVIDENCE


def test_what_says_nothing_is_left_out_and_the_pid_file_names_the_keeper(desk: Desk) -> None:
    seen = replace(
        SEEN,
        keeper=Keeper(KeeperState.NONE),
        agent=Agent(AgentState.NEVER_SEEN, 1.0),
        listening=Listening.REFUSED,
    )
    desk.reporter.judged(seen, Plan(Verdict.STALE, "keeper dead"), acting=True)
    told = desk.told
    assert told["keeper_pid"] == 4711
    assert not {"keeper_evidence", "agent_evidence", "agent_pid"} & set(told)
    nobody = replace(seen, pid_file=Entry(EntryKind.ABSENT, 1.0))
    desk.reporter.judged(nobody, Plan(Verdict.STALE, "keeper dead"), acting=True)
    assert desk.told["keeper_pid"] is None


def test_each_look_has_a_number_of_its_own(desk: Desk) -> None:
    plan = Plan(Verdict.READY, "keeper proven")
    numbers = []
    for _ in range(3):
        desk.reporter.begin()
        desk.reporter.judged(SEEN, plan, acting=True)
        numbers.append(desk.told["reconcile_id"])
    assert numbers == [1, 2, 3]


def test_an_error_is_told_with_when_it_is_tried_again(desk: Desk) -> None:
    desk.reporter.failed("demo", OSError(24, "Too many open files"), 0.2)
    told = desk.told
    assert (told["event"], told["level"]) == ("session.failed", "error")
    assert told["reason"] == "OSError: [Errno 24] Too many open files"
    assert (told["sid"], told["retry_ms"]) == ("demo", 200)


def test_metrics_are_no_condition() -> None:
    stream = io.StringIO()
    reporter = Reporter(make_logger(stream))
    plan = Plan(Verdict.STALE, "keeper dead", (REMOVE,))
    reporter.done(SEEN, plan, Done(REMOVE, success=True, detail="", duration=0.0), 0.5)
    assert json.loads(stream.getvalue())["since_exit_ms"] == 500.0
