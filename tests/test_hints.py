from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from reconciler.hints import AT_ONCE, Hints

keys = st.sampled_from("abcd")
times = st.sampled_from([AT_ONCE, 1.0, 2.0, 3.0, 5.0, 8.0])


def drain(hints: Hints, now: float) -> list[str]:
    taken = []
    while (key := hints.take(now)) is not None:
        taken.append(key)
    return taken


def test_equal_hints_are_joined() -> None:
    hints = Hints()
    for due in (3.0, 2.0, 5.0, 2.0):
        hints.add("a", due)
    assert hints.depth(10.0) == 1
    assert hints.next_due() == 2.0
    assert drain(hints, 10.0) == ["a"]


def test_the_earliest_due_comes_first() -> None:
    hints = Hints()
    hints.add("late", 9.0)
    hints.add("b", 2.0)
    hints.add("a", 1.0)
    hints.add("dead", AT_ONCE)
    assert drain(hints, 2.0) == ["dead", "a", "b"]
    assert hints.next_due() == 9.0


def test_nothing_is_given_out_before_it_is_due() -> None:
    hints = Hints()
    hints.add("a", 2.0)
    assert hints.take(1.999) is None
    assert hints.take(2.0) == "a"


def test_a_key_in_work_is_not_given_out_again() -> None:
    hints = Hints()
    hints.add("a", 1.0)
    assert hints.take(1.0) == "a"
    hints.add("a", 7.0)
    hints.add("a", 4.0)
    hints.add("a", 6.0)
    assert hints.take(100.0) is None
    assert hints.next_due() is None
    assert hints.depth(10.0) == 1
    hints.release("a")
    assert hints.next_due() == 4.0
    assert hints.take(4.0) == "a"
    hints.release("a")
    assert hints.depth(10.0) == 0


def test_release_of_a_key_that_is_not_in_work_does_nothing() -> None:
    hints = Hints()
    hints.add("a", 1.0)
    hints.release("a")
    hints.release("b")
    assert drain(hints, 1.0) == ["a"]


def test_busy_until() -> None:
    hints = Hints()
    assert not hints.busy_until(9.0)
    hints.add("a", 5.0)
    assert not hints.busy_until(5.0)
    assert hints.busy_until(5.1)
    assert hints.take(5.0) == "a"
    assert hints.busy_until(0.0)
    hints.release("a")
    assert not hints.busy_until(9.0)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(keys, times), max_size=40))
def test_many_additions_are_as_one_each(added: list[tuple[str, float]]) -> None:
    hints = Hints()
    for key, due in added:
        hints.add(key, due)
    earliest = {key: min(d for k, d in added if k == key) for key, _ in added}
    assert drain(hints, 10.0) == sorted(earliest, key=lambda key: (earliest[key], key))


class AgainstNaive(RuleBasedStateMachine):
    """The queue beside the plainest thing that could be meant by it."""

    def __init__(self) -> None:
        super().__init__()
        self.hints = Hints()
        self.now = 0.0
        self.waiting: dict[str, float] = {}
        self.in_work: dict[str, list[float]] = {}

    @rule(key=keys, due=times)
    def add(self, key: str, due: float) -> None:
        self.hints.add(key, due)
        if key in self.in_work:
            self.in_work[key].append(due)
        else:
            self.waiting[key] = min(due, self.waiting.get(key, due))

    @rule(step=st.sampled_from([0.0, 0.5, 3.0]))
    def take(self, step: float) -> None:
        self.now += step
        due = {key: at for key, at in self.waiting.items() if at <= self.now}
        expected = min(due, key=lambda key: (due[key], key), default=None)
        assert self.hints.take(self.now) == expected
        if expected is not None:
            del self.waiting[expected]
            self.in_work[expected] = []

    @precondition(lambda self: self.in_work)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.in_work)))
        self.hints.release(key)
        if asked := self.in_work.pop(key):
            self.waiting[key] = min(asked)

    @invariant()
    def same(self) -> None:
        due = [key for key, at in self.waiting.items() if at <= self.now]
        assert self.hints.depth(self.now) == len(due) + len(self.in_work)
        assert self.hints.next_due() == min(self.waiting.values(), default=None)
        horizon = self.now + 2.0
        busy = bool(self.in_work) or any(at < horizon for at in self.waiting.values())
        assert self.hints.busy_until(horizon) == busy


AgainstNaive.TestCase.settings = settings(max_examples=50, stateful_step_count=40, derandomize=True)
TestAgainstNaive = AgainstNaive.TestCase
