"""What operators install beside the program, held against what it really exposes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import WAIT
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from reconciler.deliveries import Delivery, Outcome, Reason
from reconciler.metrics import MOST_REASONS, DeliveryMetrics, Metrics
from reconciler.plans import Verdict
from reconciler.pulse import Pulse
from reconciler.sessions import SessionTable
from reconciler.sweep import Report

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "config" / "prometheus"
RULES = PROMETHEUS / "pi-reconciler.rules.yml"
DASHBOARD = ROOT / "config" / "grafana" / "pi-reconciler.json"
PAGE = ROOT / "docs" / "metrics.md"


def full() -> Metrics:
    """Metrics that have seen one of everything."""
    metrics = Metrics(SessionTable())
    metrics.judged(Verdict.STALE, "keeper dead")
    metrics.acted("session.cleaned", "keeper dead", 0.001, success=True)
    metrics.failed(OSError("full"))
    metrics.cleaned(0.001)
    metrics.looked_at_all()
    metrics.delivered(delivery(Outcome.DELIVERED, Reason.RECEIPT))
    metrics.swept(Report(swept=(), grown=(), kept=100), acting=True)
    metrics.read_loop(Pulse())
    metrics.read_reconciler(
        queue_depth=lambda: 3, lost_events=lambda: 1, usable=lambda: True, dropped=lambda: 2
    )
    return metrics


def delivery(outcome: Outcome, reason: Reason) -> Delivery:
    return Delivery(sid="demo", outcome=outcome, reason=reason, attempts=(), elapsed=0.002, size=10)


def families() -> dict[str, Metric]:
    """All that is exposed, by the name that a query uses."""
    suffixes = {"counter": "_total", "info": "_info"}
    return {
        family.name + suffixes.get(family.type, ""): family for family in full().registry.collect()
    }


def labels(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels} - {"le"}


def test_the_page_lists_every_metric_with_its_type_and_labels_and_no_others() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    told = {name: (kind, set(re.findall(r"\w+", names))) for name, kind, names, _, _ in rows}
    found = {
        name: ("gauge" if family.type == "info" else family.type, labels(family))
        for name, family in families().items()
    }
    assert told == found
    explained = {name for name, _, _, says, do in rows if says and do}
    assert explained >= {name for name in found if name.startswith("pi_reconciler")}


def test_every_metric_says_what_it_is_in_a_sentence() -> None:
    for name, family in families().items():
        assert re.fullmatch(r"[A-Z0-9].*\.", family.documentation), name


# -- promtool ------------------------------------------------------------------------


@pytest.fixture
def promtool() -> str:
    made = ROOT / ".tools" / "promtool"
    program = str(made) if made.exists() else shutil.which("promtool")
    if program is None:
        assert not os.environ.get("CI"), "CI must have promtool: make .tools/promtool"
        pytest.skip("promtool is not there: make .tools/promtool (needs apt-get)")
    return program


def check(*command: str | Path, given: bytes = b"") -> str:
    """Run a check that must pass in silence or success; what it printed."""
    done = subprocess.run(command, input=given, capture_output=True, timeout=WAIT, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def test_promtool_finds_nothing_to_complain_of_in_the_metrics(promtool: str) -> None:
    assert check(promtool, "check", "metrics", given=generate_latest(full().registry)) == ""


def test_promtool_would_complain(promtool: str) -> None:
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=b"# TYPE things_total gauge\nthings_total 1\n",
        capture_output=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode != 0


def test_the_configuration_and_the_alerts_are_valid(promtool: str) -> None:
    assert "SUCCESS" in check(promtool, "check", "config", PROMETHEUS / "prometheus.yml")


def test_each_alert_comes_when_it_should_and_only_then(promtool: str) -> None:
    assert "SUCCESS" in check(promtool, "test", "rules", PROMETHEUS / "pi-reconciler.test.yml")


def test_the_alerts_tests_would_notice_one_that_does_not_come(
    promtool: str, tmp_path: Path
) -> None:
    shutil.copy(PROMETHEUS / "pi-reconciler.test.yml", tmp_path)
    text = RULES.read_text()
    assert "folder_usable == 0" in text
    (tmp_path / RULES.name).write_text(text.replace("folder_usable == 0", "folder_usable == 7"))
    done = subprocess.run(
        [promtool, "test", "rules", tmp_path / "pi-reconciler.test.yml"],
        capture_output=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode != 0


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    rules = RULES.read_text()
    alerts = re.findall(r"alert: (\w+)", rules)
    tests = (PROMETHEUS / "pi-reconciler.test.yml").read_text()
    assert len(alerts) > 10
    for alert in alerts:
        assert tests.count(alert) >= 2, f"{alert} comes, and does not come"
    for key in ("severity", "summary", "action"):
        assert rules.count(f"{key}: ") >= len(alerts)


# -- Names in queries --------------------------------------------------------------------

PARTS = ("_bucket", "_count", "_sum")


def named(query: str) -> set[str]:
    """The metrics that a query names."""
    return set(re.findall(r"\b(?:pi_reconciler|process)_\w+", query))


def exists(name: str) -> bool:
    known = families()
    base = next((name.removesuffix(part) for part in PARTS if name.endswith(part)), name)
    return name in known or (base in known and known[base].type == "histogram")


def test_every_alert_names_metrics_that_exist() -> None:
    expressions = re.findall(r"expr: (.*)", RULES.read_text())
    names = set().union(*map(named, expressions))
    assert len(names) > 10
    assert {name for name in names if not exists(name)} == set()


def queries() -> list[str]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    variables = [
        each["query"]["query"]
        for each in dashboard["templating"]["list"]
        if each["type"] == "query"
    ]
    return variables + [
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    ]


def test_every_query_of_the_dashboard_names_metrics_that_exist() -> None:
    assert len(queries()) > 15
    for query in queries():
        assert named(query), query
        assert {name for name in named(query) if not exists(name)} == set()
    assert not exists("pi_reconciler_nothing_total")


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = {name for query in queries() for name in named(query)}
    bases = {name.removesuffix("_bucket") for name in shown}
    assert {name for name in families() if name.startswith("pi_reconciler")} <= bases


def test_every_query_of_the_dashboard_parses(promtool: str, tmp_path: Path) -> None:
    rules = [
        {"record": f"query:{number}", "expr": plain(query)}
        for number, query in enumerate(queries())
        if not query.startswith("label_values")
    ]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    check(promtool, "check", "rules", "--lint=none", path)


def plain(query: str) -> str:
    """With the dashboard's variables put in."""
    return query.replace("$__rate_interval", "5m").replace("$instance", ".*")


def test_the_dashboards_panels_do_not_overlap_and_have_names() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


# -- What the labels hold --------------------------------------------------------------------


def samples(registry: CollectorRegistry, name: str) -> Iterator[dict[str, str]]:
    for family in registry.collect():
        yield from (sample.labels for sample in family.samples if sample.name == name)


def test_a_reason_with_a_pid_in_it_is_one_series_and_reasons_without_end_are_not_kept() -> None:
    metrics = Metrics(SessionTable())
    for pid in range(100):
        metrics.judged(Verdict.UNVERIFIABLE, f"process {pid} is not to be told")
    name = "pi_reconciler_verdicts_total"
    assert [each["reason"] for each in samples(metrics.registry, name)] == [
        "process N is not to be told"
    ]
    for number in range(2 * MOST_REASONS):
        metrics.judged(Verdict.REFUSED, "x" * number + "\n" + "y" * 1000)
    reasons = {each["reason"] for each in samples(metrics.registry, name)}
    assert len(reasons) == MOST_REASONS + 1
    assert "other" in reasons
    assert max(map(len, reasons)) <= 120


def test_deliveries_are_counted_by_what_became_of_them() -> None:
    registry = CollectorRegistry()
    metrics = DeliveryMetrics(registry)
    metrics.delivered(delivery(Outcome.DELIVERED, Reason.RECEIPT))
    metrics.delivered(delivery(Outcome.UNCONFIRMED, Reason.BROKEN))
    metrics.delivered(delivery(Outcome.DELIVERED, Reason.RECEIPT))
    found = {"outcome": "delivered", "reason": "receipt"}
    assert registry.get_sample_value("pi_reconciler_deliveries_total", found) == 2
    assert registry.get_sample_value("pi_reconciler_write_seconds_count", {"outcome": "delivered"})


def test_the_pages_example_does_what_it_says(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "-W", "error", tmp_path / "example.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    assert done.stdout == "True\n"
