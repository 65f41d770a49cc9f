from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SINK, stale_pair
from prometheus_client.parser import text_string_to_metric_families

from reconciler import KeeperManager, Reconciler
from reconciler.exposition import Exposition, Health
from reconciler.metrics import Metrics
from reconciler.observations import (
    Agent,
    AgentState,
    Entry,
    EntryKind,
    Keeper,
    KeeperState,
    Listening,
    Observation,
)
from reconciler.plans import Plan, Verdict
from reconciler.sessions import SessionTable


def scraped(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What Prometheus would take in."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def label(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


class Served:
    """Makes metrics, and exposes them over HTTP until it is closed."""

    def __init__(self) -> None:
        self.exposition = Exposition("127.0.0.1", 0)
        self.port = self.exposition.port
        self.health = Health(healthy=True, reason="", sessions=0, loop_silence_s=0.1)

    def __call__(self, sessions: SessionTable) -> Metrics:
        metrics = Metrics(sessions)
        self.exposition.start(metrics.registry, lambda: self.health)
        return metrics

    def close(self) -> None:
        self.exposition.close()
        self.exposition.close()


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


def test_a_scrape_tells_what_was_really_done(folder: Path, served: Served) -> None:
    manager = KeeperManager(folder)

    async def main() -> None:
        stale_pair(folder, "old")
        async with Reconciler(manager, metrics=served) as reconciler:
            spawned = await reconciler.spawn("demo", agent_command=SINK)
            await reconciler.wait_for("demo", lambda row: row.phase is Verdict.READY)
            await reconciler.settled()
            told = await asyncio.to_thread(scraped, served.port)
            assert told[label("pi_reconciler_sessions", phase="ready")] == 1
            assert told[label("pi_reconciler_sessions", phase="stale")] == 0
            cleaned = {"event": "session.cleaned", "reason": "keeper dead", "result": "success"}
            assert told[label("pi_reconciler_actions_total", **cleaned)] == 1
            assert told[label("pi_reconciler_exit_to_clean_seconds_count")] == 0
            assert told[label("pi_reconciler_full_looks_total")] >= 1

            os.kill(spawned.keeper_pid, signal.SIGKILL)
            await reconciler.wait_for("demo", lambda row: row.phase is Verdict.MISSING)
            told = await asyncio.to_thread(scraped, served.port)
            assert told[label("pi_reconciler_sessions", phase="ready")] == 0
            assert told[label("pi_reconciler_sessions", phase="missing")] == 1
            assert told[label("pi_reconciler_actions_total", **cleaned)] == 2
            assert told[label("pi_reconciler_exit_to_clean_seconds_count")] == 1
            assert 0 <= told[label("pi_reconciler_exit_to_clean_seconds_sum")] < 10

    asyncio.run(main())


def test_every_phase_but_absent_has_a_figure_and_every_metric_explains_itself(
    served: Served,
) -> None:
    served(SessionTable())
    phases = {dict(labels).get("phase") for _, labels in scraped(served.port)} - {None}
    assert phases == {verdict.value for verdict in Verdict} - {"absent"}
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    names = {
        "pi_reconciler_sessions": "gauge",
        "pi_reconciler_actions_total": "counter",
        "pi_reconciler_exit_to_clean_seconds": "histogram",
        "pi_reconciler_full_looks_total": "counter",
    }
    for name, kind in names.items():
        assert re.search(rf"^# HELP {name} [A-Z].*\.$", text, re.MULTILINE)
        assert f"# TYPE {name} {kind}\n" in text


def seen(sid: str) -> Observation:
    nothing = Entry(EntryKind.ABSENT, 0.0)
    return Observation(
        sid=sid,
        now=0.0,
        pid_file=nothing,
        socket=nothing,
        agent_file=nothing,
        keeper=Keeper(KeeperState.NONE),
        listening=Listening.NOT_ASKED,
        listener=None,
        agent=Agent(AgentState.UNKNOWN, 0.0),
    )


@pytest.fixture
def _restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_restless")
def test_sessions_can_be_counted_in_one_thread_while_they_come_and_go_in_another() -> None:
    table = SessionTable()
    metrics = Metrics(table)
    for number in range(500):
        table.record(seen(f"s{number}"), Plan(Verdict.READY, "keeper proven"))
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            for number in range(400, 600):
                table.record(seen(f"s{number}"), Plan(Verdict.READY, "keeper proven"))
            for number in range(400, 600):
                table.record(seen(f"s{number}"), Plan(Verdict.ABSENT, "nothing is there"))

    changing = threading.Thread(target=come_and_go)
    changing.start()
    try:
        for _ in range(300):
            count = metrics.registry.get_sample_value("pi_reconciler_sessions", {"phase": "ready"})
            assert count is not None
            assert 400 <= count <= 600
    finally:
        ended.set()
        changing.join()
    assert len(table) == 400
    count = metrics.registry.get_sample_value("pi_reconciler_sessions", {"phase": "ready"})
    assert count == 400


def test_sessions_that_were_there_before_are_counted_and_a_reset_is_followed() -> None:
    table = SessionTable()
    table.record(seen("a"), Plan(Verdict.STALE, "keeper dead"))
    registry = Metrics(table).registry
    assert registry.get_sample_value("pi_reconciler_sessions", {"phase": "stale"}) == 1
    table.reset("a")
    assert registry.get_sample_value("pi_reconciler_sessions", {"phase": "stale"}) == 0


def test_an_address_that_is_taken_is_an_error(served: Served) -> None:
    with pytest.raises(OSError, match="Address already in use"):
        Exposition("127.0.0.1", served.port)
