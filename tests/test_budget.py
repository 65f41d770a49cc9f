from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.budget import FIRST_DAY, Log, LogBudget, Step, Why, grown, steps
from reconciler.observations import FileId

NOW = 2_000_000_000.0
BUDGET = LogBudget(total=1000, each=200, age=500)


def log(sid: str, size: int, age: float, *, ended: bool = True, launch: bool = False) -> Log:
    name = f"keeper-{'launch-' if launch else ''}{sid}.log"
    return Log(name, sid, FileId(1, hash(name), int((NOW - age) * 1e9), size), ended)


def told(logs: list[Log], budget: LogBudget = BUDGET) -> list[tuple[str, Why, int]]:
    return [(step.log.sid, step.why, step.keep) for step in steps(logs, budget, NOW)]


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ([], []),
        ([log("a", 200, 500)], []),
        ([log("a", 200, 501)], [("a", Why.AGE, 0)]),
        ([log("a", 0, 501)], [("a", Why.AGE, 0)]),
        ([log("a", 201, 1)], [("a", Why.EACH, 100)]),
        ([log("a", 201, 501)], [("a", Why.AGE, 0)]),
        ([log("a", 9000, 501, ended=False)], []),
        ([log("a", 100, -900)], []),
        # A launch log is as young as the keeper log beside it.
        ([log("a", 9, 900, launch=True), log("a", 9, 5)], []),
        ([log("a", 9, 900, launch=True), log("a", 9, 501)], [("a", Why.AGE, 0)] * 2),
        # The oldest go until the rest fits in.
        (
            [log("new", 200, 1), *(log(f"s{n}", 200, 10 + n) for n in range(5))],
            [("s4", Why.TOTAL, 0)],
        ),
        # What is cut anyway counts with what is left of it.
        (
            [log("long", 5000, 1), *(log(f"s{n}", 180, 9) for n in range(5))],
            [("long", Why.EACH, 100)],
        ),
        ([log("long", 5000, 99), log("b", 950, 1, ended=False)], [("long", Why.TOTAL, 0)]),
        # Those of the living count, and stay.
        (
            [log("alive", 5000, 400, ended=False), log("a", 150, 2), log("b", 150, 1)],
            [("a", Why.TOTAL, 0), ("b", Why.TOTAL, 0)],
        ),
        (
            [log("alive", 850, 400, ended=False), log("a", 150, 2), log("b", 150, 1)],
            [("a", Why.TOTAL, 0)],
        ),
    ],
)
def test_what_goes(logs: list[Log], expected: list[tuple[str, Why, int]]) -> None:
    assert told(logs) == expected
    assert told(logs[::-1]) == expected


def test_what_was_written_by_a_clock_that_had_not_been_set_is_of_no_known_age() -> None:
    unset, long = log("a", 9, NOW - 5), log("b", 201, NOW - 6)
    assert told([unset, long]) == [("b", Why.EACH, 100)]
    living = log("c", 950, 1, ended=False)
    assert told([unset, long, living]) == [("a", Why.TOTAL, 0), ("b", Why.TOTAL, 0)]
    assert told([log("d", 9, NOW - FIRST_DAY)]) == [("d", Why.AGE, 0)], "from that day on it is"


def test_what_is_cut_keeps_whole_bytes_and_one_at_least() -> None:
    for each, keep in ((3, 1), (1, 1)):
        budget = LogBudget(total=1000, each=each, age=500)
        assert told([log("a", 9, 1)], budget) == [("a", Why.EACH, keep)]


def test_only_a_log_of_a_living_session_that_is_too_long_is_told_of() -> None:
    long = log("a", 201, 1, ended=False)
    assert grown([long, log("b", 200, 1, ended=False), log("c", 201, 1)], BUDGET) == (long,)


LOGS = st.lists(
    st.builds(
        log,
        st.sampled_from("abcdefgh"),
        st.integers(0, 400),
        st.floats(-100, 1000),
        ended=st.booleans(),
        launch=st.booleans(),
    ),
    max_size=20,
    unique_by=lambda log: log.name,
)


@given(LOGS)
def test_whatever_there_is_the_rest_fits_in_and_no_younger_one_goes_before_an_older(
    logs: list[Log],
) -> None:
    chosen = {step.log.name: step for step in steps(logs, BUDGET, NOW)}
    assert all(step.log.ended and step.freed >= 0 for step in chosen.values())
    kept = {
        each.name: chosen.get(each.name, Step(each, Why.EACH, each.file.size)).keep for each in logs
    }
    ended = [each for each in logs if each.ended]
    assert sum(kept.values()) <= BUDGET.total or not any(kept[each.name] for each in ended)
    assert all(kept[each.name] <= BUDGET.each for each in ended)
    removed = {name for name, step in chosen.items() if step.why is Why.TOTAL}
    last = {each.sid: max(o.file.mtime_ns for o in logs if o.sid == each.sid) for each in logs}
    youngest = max((last[each.sid] for each in logs if each.name in removed), default=0)
    for each in ended:
        if last[each.sid] < youngest:
            assert not kept[each.name]


@given(LOGS)
def test_a_second_sweep_has_nothing_more_to_do(logs: list[Log]) -> None:
    done = {step.log.name: step.keep for step in steps(logs, BUDGET, NOW)}
    left = [
        Log(
            each.name,
            each.sid,
            FileId(1, 1, each.file.mtime_ns, done.get(each.name, each.file.size)),
            each.ended,
        )
        for each in logs
        if done.get(each.name, 1)
    ]
    assert not steps(left, BUDGET, NOW)
