from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.lines import as_json, moment, parts, read_line, safe

STAMP = datetime(2026, 3, 1, 9, 0, 0, 100_000, UTC).timestamp()
OURS = (
    b'{"timestamp": "2026-03-01T09:00:00.100Z", "level": "warning", "event": "keeper.no_room",'
    b' "message": "a silent connection", "sid": "demo", "keeper_pid": 4711, "unsaid": 3}'
)
THEIRS = b"2026-03-01T09:00:00.100Z keeper ready: demo"


@pytest.mark.parametrize(
    ("raw", "stream", "stamp"),
    [
        (OURS, "keeper", STAMP),
        (OURS.replace(b": ", b":"), "keeper", STAMP),
        (THEIRS, "keeper", STAMP),
        (b"2026-03-01T09:00:00Z x", "keeper", STAMP - 0.1),
        (b"", "agent", None),
        (b"hello", "agent", None),
        (b'{"type":"response","id":"1"}', "agent", None),
        (
            b'{"timestamp": "2026-03-01T09:00:00.100Z", "event": "theirs", "message": ""}',
            "agent",
            None,
        ),
        (b'{"timestamp": "soon", "event": "keeper.ready", "message": ""}', "agent", None),
        (b'{"timestamp": 5, "event": "keeper.ready", "message": ""}', "agent", None),
        (b'{"timestamp": "2026-03-01T09:00:00.100Z", "event": "keeper.ready"', "agent", None),
        (b'{"timestamp": "' + b"[" * 100_000, "agent", None),
        (b"2026-13-01T09:00:00.100Z the month is none", "agent", None),
        (b"\xff\x00 2026-03-01T09:00:00.100Z", "agent", None),
    ],
)
def test_whose_a_line_is_and_when_it_was_written(raw: bytes, stream: str, stamp: float) -> None:
    line = read_line(raw)
    assert (line.stream, line.stamp, line.raw) == (stream, stamp, raw)
    assert read_line(raw, launch=True).stream == "launch"


def test_a_line_as_json_has_the_fields_of_the_keeper_or_the_text_of_the_agent() -> None:
    told = json.loads(as_json(read_line(OURS), "other"))
    assert told["sid"] == "other", "the log's name counts, not what stands in it"
    assert (told["stream"], told["event"], told["unsaid"]) == ("keeper", "keeper.no_room", 3)
    assert json.loads(as_json(read_line(b"\xffx"), "demo")) == {
        "sid": "demo",
        "stream": "agent",
        "line": "\ufffdx",
    }
    theirs = json.loads(as_json(read_line(THEIRS + b"\xff"), "demo"))
    assert (theirs["stream"], theirs["message"]) == ("keeper", "keeper ready: demo\ufffd")
    assert read_line(b"x").fields == {}


def test_a_number_that_json_does_not_know_is_told_by_its_text() -> None:
    line = OURS.replace(b"3}", b"[1.5, NaN, -Infinity, 1e999]}")

    def refuse(text: str) -> None:
        pytest.fail(f"{text} is no JSON")

    told = json.loads(as_json(read_line(line), "demo"), parse_constant=refuse)
    assert told["unsaid"] == [1.5, "NaN", "-Infinity", "1e999"]


@pytest.mark.parametrize(
    "stamp",
    ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "9999-12-31T23:59:59.999999Z"],
)
def test_a_line_from_beyond_the_calendar_is_the_agents(stamp: str) -> None:
    line = read_line(OURS.replace(b"2026-03-01T09:00:00.100Z", stamp.encode()))
    assert (line.stream, line.stamp) == ("agent", None)
    assert parts(line)[0] == ""


@given(st.binary())
def test_any_line_is_one_line_of_json_and_can_be_shown(raw: bytes) -> None:
    line = read_line(raw)
    told = as_json(line, "demo")
    assert "\n" not in told
    assert json.loads(told)["sid"] == "demo"
    assert all(each.replace("\t", "").isprintable() for each in parts(line))


def test_a_line_for_a_person() -> None:
    when, level, text = parts(read_line(OURS))
    local = datetime.fromtimestamp(STAMP, UTC).astimezone()
    assert when == f"{local:%b %d %H:%M:%S}.100"
    assert (level, text) == ("warning", "a silent connection unsaid=3")
    assert parts(read_line(b"a\x1b[31m\tb")) == ("", "", "a\\x1b[31m\tb")
    assert parts(read_line(b"a\xffb"))[2] == "a\\xffb"
    assert parts(read_line(THEIRS)) == (when, "", "keeper ready: demo")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢 🙂", "plain é 漢 🙂"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("a\rb\nc\x00", "a\\rb\\nc\\x00"),
        ("\u202eevil", "\\u202eevil"),
        ("\ud800", "\\ud800"),
        ("a\tb", "a\tb"),
    ],
)
def test_what_acts_on_a_terminal_is_written_out(text: str, shown: str) -> None:
    assert safe(text) == shown


NOW = datetime(2026, 3, 5, 12, 0, tzinfo=timezone(timedelta(hours=2)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", NOW - timedelta(seconds=90)),
        ("5m", NOW - timedelta(minutes=5)),
        ("2h", NOW - timedelta(hours=2)),
        ("3d", NOW - timedelta(days=3)),
        ("1w", NOW - timedelta(days=7)),
        ("1d12h", NOW - timedelta(hours=36)),
        ("2026-03-01T09:00:00Z", datetime(2026, 3, 1, 9, tzinfo=UTC)),
        ("2026-03-01T09:00:00.5+02:00", datetime(2026, 3, 1, 7, 0, 0, 500_000, tzinfo=UTC)),
        ("2026-03-01 09:00", datetime(2026, 3, 1, 9).astimezone()),
        ("2026-03-01", datetime(2026, 3, 1).astimezone()),
    ],
)
def test_a_moment(text: str, expected: datetime) -> None:
    assert moment(text, NOW) == expected.timestamp()


@pytest.mark.parametrize(
    "text", ["", "5", "m", "-5m", "5 m", "5y", "yesterday", "٣m", "999999999w"]
)
def test_what_is_no_moment_is_refused_with_what_to_give(text: str) -> None:
    allowed = "give a span as 90s, 5m, 2h or 3d, or a time as 2026-03-01T09:00:00Z"
    with pytest.raises(ValueError, match=f"is no moment: {allowed}$"):
        moment(text, NOW)
