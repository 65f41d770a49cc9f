from __future__ import annotations

import pytest

from reconciler.retries import FIRST, LAST, Retries


def test_the_first_try_is_free() -> None:
    assert Retries().wait("a", "remove", 100.0) == 0.0


def test_the_same_is_tried_less_and_less_often_up_to_a_minute() -> None:
    retries = Retries()
    pauses = [retries.note("a", "remove", 0.0) for _ in range(12)]
    assert pauses == [min(LAST, FIRST * 2**n) for n in range(12)]
    assert (pauses[0], pauses[1], pauses[-1]) == (0.1, 0.2, 60.0)
    for _ in range(2000):  # no number grows without bound
        assert retries.note("a", "remove", 0.0) == LAST


@pytest.mark.parametrize(("passed", "left"), [(0.0, 0.1), (0.075, 0.025), (0.1, 0.0), (5.0, 0.0)])
def test_what_is_left_to_wait_follows_the_callers_clock(passed: float, left: float) -> None:
    retries = Retries()
    retries.note("a", "remove", 50.0)
    assert retries.wait("a", "remove", 50.0 + passed) == pytest.approx(left)


def test_something_new_may_be_tried_at_once_and_begins_anew() -> None:
    retries = Retries()
    for _ in range(5):
        retries.note("a", "remove", 0.0)
    assert retries.wait("a", "stop", 0.0) == 0.0
    assert retries.note("a", "stop", 0.0) == FIRST
    assert retries.wait("a", "remove", 0.0) == 0.0, "only the newest counts"


def test_sessions_do_not_wait_for_each_other() -> None:
    retries = Retries()
    retries.note("a", "remove", 0.0)
    assert retries.wait("b", "remove", 0.0) == 0.0
    assert retries.wait("a", "remove", 0.0) > 0.0


def test_what_went_well_is_forgotten() -> None:
    retries = Retries()
    retries.note("a", "remove", 0.0)
    retries.forget("a")
    retries.forget("never seen")
    assert retries.wait("a", "remove", 0.0) == 0.0
    assert retries.note("a", "remove", 0.0) == FIRST
