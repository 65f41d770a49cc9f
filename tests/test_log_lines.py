"""Whatever is logged: one line of flat JSON, short enough for a log shipper."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from reconciler.log_lines import LONGEST, PRIORITIES, SEVERITIES, encode, render
from reconciler.logs import LEVELS, make_logger
from reconciler.sinks import Sink


def strict(line: bytes) -> dict[str, Any]:
    """A line as a strict reader takes it."""
    assert b"\n" not in line
    assert len(line) < LONGEST, "with its LF it is as long as it may be at most"
    text = line.decode("utf-8", "strict")
    text.encode("utf-8", "strict")

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs), "no key twice"
        return dict(pairs)

    told: dict[str, Any] = json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    json.dumps(told, ensure_ascii=False).encode("utf-8", "strict")  # no surrogate, escaped or not
    assert all(is_flat(value) for value in told.values())
    msgspec.json.decode(line)
    return told


def is_flat(value: object) -> bool:
    if isinstance(value, list):
        return not any(isinstance(item, list | dict) for item in value)
    return not isinstance(value, dict)


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


class Broken:
    def __repr__(self) -> str:
        return "\ud800" * 5000


@dataclasses.dataclass
class Record:
    inner: object = None


TEXTS = st.text(st.characters(codec=None), max_size=40) | st.builds(
    lambda text, times: text * times,
    st.text(st.characters(codec=None), min_size=1, max_size=3),
    st.sampled_from([100, 3000, 9000]),
)
SCALARS = (
    TEXTS
    | st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**4000)
    | st.builds(pow, st.just(10), st.just(5000))  # more digits than Python writes out
    | st.floats()
    | st.binary(max_size=9000)
    | st.dates()
    | st.decimals()
    | st.builds(Unspeakable)
    | st.builds(Broken)
    | st.sampled_from([object, math.nan, 1j, ..., SEVERITIES, dt.UTC, decimal.Decimal("sNaN")])
)
MANY = st.lists(TEXTS, min_size=1, max_size=1).map(lambda one: one * 200)
VALUES = st.recursive(
    SCALARS | MANY,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(TEXTS | st.integers(), inner, max_size=5)
        | st.builds(Record, inner)
        | st.frozensets(TEXTS | st.integers(), max_size=3)
    ),
    max_leaves=8,
)
EVENTS = st.dictionaries(TEXTS, VALUES, max_size=8) | st.builds(
    lambda number, value: {f"key_{at}": value for at in range(number)},
    st.sampled_from([200, 1000]),
    SCALARS,
)
ODD = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    max_examples=40,
    phases=[Phase.explicit, Phase.generate],
)


class Collected(Sink):
    """A sink that keeps its lines."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[bytes] = []

    def msg(self, line: bytes) -> None:
        self.lines.append(line)

    debug = info = warning = error = critical = msg


@ODD
@given(EVENTS)
def test_any_fields_become_one_short_flat_line(fields: dict[str, Any]) -> None:
    strict(render(fields))


RESERVED = {"event", "self", "level", "exc_info", "stack_info"}


@ODD
@given(SCALARS, EVENTS, st.sampled_from(list(LEVELS)), st.sampled_from(["json", "ecs"]))
def test_any_event_in_any_form_and_level_becomes_one_short_flat_line(
    event: Any,  # noqa: ANN401 - whatever there is
    fields: dict[str, Any],
    level: Any,  # noqa: ANN401 - a literal
    form: Any,  # noqa: ANN401 - a literal
) -> None:
    sink = Collected()
    more = {key: value for key, value in fields.items() if key not in RESERVED}
    getattr(make_logger(sink, "debug", form), level)(event, **more)
    (line,) = sink.lines
    told = strict(line)
    stamp, severity = ("timestamp", "severity_number")
    if form == "ecs":
        stamp, severity = ("@timestamp", "event.severity")
    assert told[severity] == SEVERITIES[level]
    assert told[stamp].endswith("Z")


@ODD
@given(
    TEXTS, st.sampled_from([None, True, "text", (), (1, 2), ("a", "b", "c"), ValueError("\ud800")])
)
def test_any_exception_becomes_one_short_flat_line(text: str, how: object) -> None:
    sink = Collected()
    log = make_logger(sink, "debug", "json")
    try:
        int(text + "x")
    except ValueError:
        log.exception("session.failed", exc_info=how)
    (line,) = sink.lines
    assert strict(line)["event"] == "session.failed"


def test_what_is_no_flat_value_is_told_as_a_text() -> None:
    told = strict(render({"a": {"b": 1}, "c": [[1]], "d": [1], "e": 1j, "f": Unspeakable()}))
    assert told == {"a": '{"b":1}', "c": "[[1]]", "d": [1], "e": "1j", "f": "<Unspeakable>"}
    assert strict(render({"a": [[1]]})) == {"a": "[[1]]"}
    assert strict(render({"a": {"b": 1}})) == {"a": '{"b":1}'}


# -- What is cut ------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["event.name", ["event", "name"]], ids=["text", "list"])
def test_a_line_as_long_as_it_may_be_is_left_alone(event: object) -> None:
    empty = len(render({"event": event, "text": ""}))
    text = "x" * (LONGEST - 1 - empty)
    assert strict(render({"event": event, "text": text})) == {"event": event, "text": text}
    told = strict(render({"event": event, "text": text + "x"}))
    assert told["truncated"] > 0


def test_the_longest_values_lose_their_middle_and_the_others_nothing() -> None:
    fields = {
        "event": "event.name",
        "exception": "Traceback" + "x" * 20_000 + "ValueError: the end",
        "detail": "y" * 20_000,
        "sid": "s" * 90,
        "leftovers": ["4801 sleep"] * 5,
    }
    line = render(fields)
    told = strict(line)
    assert len(line) > LONGEST - 50, "what there is room for is kept"
    assert abs(len(told["exception"]) - len(told["detail"])) < 10, "all to the same length"
    assert told["exception"].startswith("Tracebackxxx")
    assert told["exception"].endswith("xxxValueError: the end")
    assert "…" in told["exception"]
    assert (told["sid"], told["leftovers"]) == (fields["sid"], fields["leftovers"])
    assert told["truncated"] == len(json.dumps(fields, separators=(",", ":"))) - (
        len(line) - len(f',"truncated":{told["truncated"]}')
    )


def test_characters_are_never_cut_in_halves() -> None:
    for text in ("ü", "€", "😀", "\0", '"', "\\", "\u2028"):
        told = strict(render({"event": "event.name", "text": text * 9000}))
        head, tail = told["text"].split("…")
        assert set(head) == set(tail) == {text}
        assert len(head) == len(tail)


def test_where_there_are_too_many_keys_the_last_ones_are_left_out() -> None:
    told = strict(render({"event": "event.name", **{f"key_{at}": at for at in range(5000)}}))
    assert list(told)[:3] == ["event", "key_0", "key_1"]
    assert list(told)[-1] == "truncated"
    assert 150 < len(told) < 5000


def test_what_is_for_a_program_of_ours_is_neither_flat_nor_short() -> None:
    fields = {"sessions": {"ready": 1}, "text": "x" * 2 * LONGEST}
    assert json.loads(encode(fields)) == fields
    told = strict(encode({"event": "event.name", "odd": "\udc80", "text": fields["text"]}))
    assert told["odd"] == "\\udc80"
    assert told["truncated"] > LONGEST, "what is no JSON is told with care"


def test_every_level_has_its_number_for_opentelemetry_and_for_syslog() -> None:
    assert {level: SEVERITIES[level] for level in LEVELS} == {
        "debug": 5,
        "info": 9,
        "warning": 13,
        "error": 17,
    }
    assert {level: PRIORITIES[level] for level in LEVELS} == {
        "debug": 7,
        "info": 6,
        "warning": 4,
        "error": 3,
    }
