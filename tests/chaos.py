"""The campaign of faults: rounds, what is checked in each, and a row in the table at the end.

A test marked ``chaos`` names its fault and takes the ``fault`` fixture. `make test` runs a
short round of each; `make chaos` (PI_RECONCILER_CAMPAIGN=1) the full number.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest

CAMPAIGN = bool(os.environ.get("PI_RECONCILER_CAMPAIGN"))
"""Whether the full campaign runs, not the short round of each fault."""

_ROW = "chaos"
_HEADING = ("fault", "rounds", "checks", "violations", "seconds", "must hold")


class Fault:
    """One fault under test: counts its rounds and checks, and collects what did not hold.

    Attributes:
        violations: what did not hold, in words. Any makes the test fail when it is over.
    """

    def __init__(self, name: str, checked: str) -> None:
        self.violations: list[str] = []
        self._name = name
        self._checked = checked
        self._rounds = 0
        self._checks = 0

    def rounds(self, *, short: int, full: int) -> Iterator[int]:
        """The rounds to do, counted: few in a test run, many in a campaign."""
        for number in range(full if CAMPAIGN else short):
            self._rounds += 1
            yield number

    def count(self, rounds: int, checks: int = 0) -> None:
        """Count rounds that were not taken from `rounds`, and checks that did not need `holds`."""
        self._rounds += rounds
        self._checks += checks

    def holds(self, condition: object, what: str) -> None:
        """Check one thing. What does not hold is noted, and the round goes on."""
        self._checks += 1
        if not condition:
            self.violations.append(f"round {self._rounds}: {what}")

    def row(self, failed: int) -> dict[str, Any]:
        """The counts so far."""
        return {
            "fault": self._name,
            "rounds": self._rounds,
            "must hold": self._checked,
            "checks": self._checks,
            "violations": len(self.violations) + failed,
        }


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Fault:
    """The fault that the test's ``chaos`` marker names: ``chaos(fault, checked)``."""
    marker = request.node.get_closest_marker(_ROW)
    assert marker is not None, "mark the test: @pytest.mark.chaos(fault, what is checked)"
    return Fault(*marker.args)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    fault = pyfuncitem.funcargs.get("fault")
    if not isinstance(fault, Fault):
        return (yield)
    failed = 1
    try:
        result = yield
        failed = 0
    finally:
        pyfuncitem.user_properties.append((_ROW, fault.row(failed)))
    if fault.violations:
        pytest.fail("\n".join(fault.violations))
    return result


class Table:
    """Collects the rows of all faults, from whichever process they ran in, and prints them."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for name, row in report.user_properties:
            if name == _ROW and isinstance(row, dict):
                self._add({**row, "seconds": report.duration})

    def _add(self, row: dict[str, Any]) -> None:
        """Parametrised tests of one fault share its row."""
        total = self._rows.setdefault(row["fault"], row | dict.fromkeys(_COUNTS, 0))
        for key in _COUNTS:
            total[key] += row[key]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._rows:
            return
        terminalreporter.section("faults", sep="-")
        rows = [row | {"seconds": f"{row['seconds']:.1f}"} for row in self._rows.values()]
        cells = [_HEADING, *(tuple(str(row[key]) for key in _HEADING) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            terminalreporter.write_line("  ".join(map(str.ljust, line, widths)).rstrip())


_COUNTS = ("rounds", "checks", "violations", "seconds")
