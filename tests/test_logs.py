from __future__ import annotations

import ast
import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from conftest import WAIT

from reconciler.logs import LEVELS, SEVERITIES, flush, get_logger, make_logger, set_level

ROOT = Path(__file__).parent.parent


def line(log: Callable[..., object], stream: io.StringIO, event: str, **values: object) -> Any:  # noqa: ANN401 - JSON
    """What one call writes: exactly one line of strict JSON."""
    begin = stream.tell()
    log(event, **values)
    text = stream.getvalue()[begin:]
    assert text.endswith("\n")
    assert text.count("\n") == 1
    text.encode("utf-8")  # no lone surrogate: any reader can take it

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def say(stream: io.StringIO) -> Callable[..., Any]:
    log = make_logger(stream, "debug")
    return lambda event, **values: line(log.info, stream, event, **values)


# -- The shape of a line -------------------------------------------------------------------


def test_a_line_begins_with_time_level_event_and_the_known_keys(
    say: Callable[..., Any],
) -> None:
    before = datetime.now(UTC)
    told = say("session.cleaned", zone=1, reason="keeper dead", keeper_pid=7, sid="a", apple=2)
    first = ["timestamp", "level", "severity_number", "event", "sid", "keeper_pid", "reason"]
    assert list(told) == [*first, *(key for key in told if key not in first)]
    assert set(told) - set(first) == {"zone", "apple"}
    assert (told["level"], told["severity_number"]) == ("info", 9)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", told["timestamp"])
    time = datetime.fromisoformat(told["timestamp"])
    assert timedelta(0) <= time - before < timedelta(seconds=WAIT)


@pytest.mark.parametrize("level", list(LEVELS))
def test_lines_below_the_level_are_not_written(stream: io.StringIO, level: Any) -> None:  # noqa: ANN401 - a literal
    log = make_logger(stream, level)
    for name in LEVELS:
        getattr(log, name)("event.name")
    written = [json.loads(text)["level"] for text in stream.getvalue().splitlines()]
    assert written == [name for name in LEVELS if LEVELS[name] >= LEVELS[level]]


def test_the_level_of_a_logger_can_change_wherever_it_is_held(stream: io.StringIO) -> None:
    log = make_logger(stream, "error")
    held = log.info
    log.info("one")
    set_level(log, "info")
    log.info("two")
    log.debug("three")
    set_level(log, "error")
    log.info("four")
    held("five")
    assert [json.loads(text)["event"] for text in stream.getvalue().splitlines()] == ["two"]


class NoWords:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


class Odd:
    def __repr__(self) -> str:
        return "odd \ud800"


def circle() -> list[object]:
    items: list[object] = [1]
    items.append(items)
    return items


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (math.nan, None),
        (math.inf, None),
        ({"deep": [-math.inf]}, '{"deep":[null]}'),
        ([1, [2]], "[1,[2]]"),
        ([{}], "[{}]"),
        ([], []),
        ("[[,[{", "[[,[{"),
        ("lone \udc80 surrogate", "lone \\udc80 surrogate"),
        ("two\nlines\r\u2028", "two\nlines\r\u2028"),
        (object, "<class 'object'>"),
        (Odd(), "odd \\ud800"),
        (NoWords(), "<NoWords>"),
        ({(1, 2): 3}, '{"(1, 2)":3}'),
        ({"\ud800": 3}, "{'\\ud800': 3}"),
        (1 << 80, 1 << 80),
        (circle(), "[1, [...]]"),
        (Path("/tmp/x"), "PosixPath('/tmp/x')"),
        ((1, "a"), [1, "a"]),
        ("ü", "ü"),
    ],
)
def test_any_value_becomes_json_and_hurts_no_other(
    say: Callable[..., Any], value: object, told: object
) -> None:
    said = say("event.name", sid="a", value=value, after=1.5)
    assert (said["event"], said["sid"], said["after"]) == ("event.name", "a", 1.5)
    assert said["value"] == told


def test_an_odd_key_is_written_out(say: Callable[..., Any]) -> None:
    assert say("event.name", **{"k\udc80": object})["k\\udc80"] == "<class 'object'>"


def test_an_exception_is_a_text_without_the_values_of_variables(stream: io.StringIO) -> None:
    log = make_logger(stream)

    def fails(secret: str) -> None:
        raise ValueError(f"a prompt of {len(secret)} characters")

    secret = "hunter" + "2"
    with contextlib.suppress(ValueError):
        try:
            fails(secret)
        except ValueError:
            line(log.exception, stream, "session.failed", sid="a")
            raise
    told = json.loads(stream.getvalue())
    assert told["level"] == "error"
    assert isinstance(told["exception"], str)
    assert "ValueError: a prompt of 7 characters" in told["exception"]
    assert "hunter2" not in stream.getvalue()


def test_the_console_form_shows_an_exception_without_the_values_of_variables(
    stream: io.StringIO,
) -> None:
    log = make_logger(stream, form="console")
    secret = "hunter" + "2"
    try:
        secret.index("7")
    except ValueError:
        log.exception("session.failed", odd="\udc80", sid="a")
    text = stream.getvalue()
    assert "ValueError: substring not found" in text
    assert "hunter2" not in text
    assert "\x1b" not in text, "colours are for terminals"


# -- The names of the Elastic Common Schema ----------------------------------------------------


def test_the_ecs_form_is_that_of_the_reference(stream: io.StringIO) -> None:
    text = (ROOT / "docs" / "logs.md").read_text()
    example = re.search(r'^\{"@timestamp".*$', text, re.MULTILINE)
    assert example
    expected = json.loads(example[0])
    log = make_logger(stream, form="ecs")
    told = line(
        log.info,
        stream,
        "session.cleaned",
        sid="demo",
        keeper_pid=4711,
        reason="keeper dead",
        duration_ms=0.2,
    )
    assert told.keys() == expected.keys()
    own = {"@timestamp", "process.pid"}
    assert {key: told[key] for key in told.keys() - own} == {
        key: expected[key] for key in expected.keys() - own
    }
    assert told["process.pid"] == os.getpid()


@pytest.mark.parametrize("duration", [math.nan, math.inf, "long", None, [1]])
def test_an_odd_duration_is_no_duration_of_an_event(stream: io.StringIO, duration: object) -> None:
    told = line(make_logger(stream, form="ecs").info, stream, "event.name", duration_ms=duration)
    assert "event.duration" not in told


def test_an_exception_in_the_ecs_form_is_a_stack_trace(stream: io.StringIO) -> None:
    try:
        int("x")
    except ValueError:
        make_logger(stream, form="ecs").exception("session.failed", sid="a")
    told = json.loads(stream.getvalue())
    assert told["error.stack_trace"].endswith("invalid literal for int() with base 10: 'x'")
    assert told["message"] == "session.failed a"


# -- Whose logger ---------------------------------------------------------------------------


def test_the_applications_structlog_is_respected() -> None:
    with structlog.testing.capture_logs() as told:
        assert structlog.is_configured()
        get_logger().warning("event.name", sid="a")
    structlog.reset_defaults()
    assert told == [{"event": "event.name", "sid": "a", "log_level": "warning"}]


def in_a_process(code: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout, done.stderr


def test_the_librarys_own_lines_go_to_stderr_and_structlog_stays_as_it_was() -> None:
    out, err = in_a_process(
        "import structlog; from reconciler.logs import get_logger\n"
        "log = get_logger(); log.debug('event.low'); log.info('event.name', sid='a')\n"
        "assert not structlog.is_configured()\n"
    )
    assert out == ""
    (told,) = map(json.loads, err.splitlines())
    assert (told["event"], told["sid"], told["level"]) == ("event.name", "a", "info")


def test_a_reconciler_in_an_application_logs_as_the_application_does(tmp_path: Path) -> None:
    out, err = in_a_process(
        "import asyncio, structlog\n"
        "structlog.configure(processors=[structlog.processors.KeyValueRenderer(key_order=['event'])],\n"
        "    logger_factory=structlog.PrintLoggerFactory())\n"
        "from reconciler import KeeperManager, Reconciler\n"
        "async def main():\n"
        f"    async with Reconciler(KeeperManager({str(tmp_path)!r})): pass\n"
        "asyncio.run(main())\n"
    )
    assert err == ""
    assert [text.split(" ")[0] for text in out.splitlines()] == [
        "event='reconciler.started'",
        "event='reconciler.stopped'",
    ]


# -- Broken and full pipes -------------------------------------------------------------------


def test_what_nobody_reads_is_dropped_without_an_error() -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as stream:
        log = make_logger(stream)
        os.close(reading)
        for number in range(3):
            log.info("event.name", number=number)
            assert flush(WAIT) == 0, "it was tried"


def test_a_stream_that_was_closed_is_no_error() -> None:
    stream = open(os.devnull, "w")  # noqa: SIM115 - closed below
    log = make_logger(stream)
    stream.close()
    log.info("event.name")
    closed = io.StringIO()
    log = make_logger(closed)
    closed.close()
    log.info("event.name")


def test_no_stream_at_all_is_no_error() -> None:
    make_logger(None).error("event.name")


# -- The reference of events -------------------------------------------------------------------

NAME = re.compile(
    r"(?!keeper\.cjs)(reconciler|settings|session|keeper|agent|leftovers|action|folder|exits|removal|registry|subscriber|logs|control)\.[a-z_]+"
)


RARE = {"_refuse", "say_rarely"}
"""How the keeper tells of refusals: by the last part of the event's name."""


def emitted(paths: list[Path]) -> set[str]:
    """The event names in the code: its constants that are one, and the kinds of refusals."""
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Constant(value=str(text)) if NAME.fullmatch(text):
                    names.add(text)
                case ast.Call(func=ast.Attribute(attr=method), args=[*args]) if method in RARE:
                    kinds = [str(a.value) for a in args if isinstance(a, ast.Constant)]
                    names |= {f"keeper.{kind}" for kind in kinds[:1]}
                case _:
                    pass
    return names


def documented(heading: str) -> set[str]:
    """The events of one chapter of the reference, each a heading of its own."""
    text = (ROOT / "docs" / "logs.md").read_text()
    chapter = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert chapter, heading
    return set(re.findall(r"^### `([a-z_.]+)`", chapter[1], re.MULTILINE))


def test_every_event_of_the_reconciler_is_in_the_reference_and_no_other() -> None:
    paths = [p for p in (ROOT / "reconciler").glob("*.py") if p.name != "keeper_process.py"]
    names = emitted(paths)
    assert "session.cleaned" in names
    assert names == documented("Events of the reconciler")


def test_every_event_of_the_keeper_is_in_the_reference_and_no_other() -> None:
    names = emitted([ROOT / "reconciler" / "keeper_process.py"])
    assert "keeper.ready" in names
    assert names == documented("Events of a keeper")


def test_every_example_of_the_reference_is_a_line_of_its_event() -> None:
    text = (ROOT / "docs" / "logs.md").read_text()
    general = re.sub(r"^### .*?(?=^## |\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    for section in sections:
        name = section.split("`")[1]
        example = re.search(r"^```json\n(.*)\n```$", section, re.MULTILINE)
        assert example, name
        told = json.loads(example[1])
        assert told["event"] == name
        assert told["severity_number"] == SEVERITIES[told["level"]]
        for key in set(told) - {"timestamp", "level", "event", "sid"}:
            assert f"`{key}`" in section + general, (name, key)
        assert "**Do:**" in section, name


def test_a_full_disk_tears_no_line(tmp_path: Path) -> None:
    """The system takes a part of the line for which there is no room, as a full disk does."""
    path = tmp_path / "log"
    code = (
        "import resource, sys\n"
        "from reconciler.logs import dropped, flush, make_logger\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "with open(sys.argv[1], 'w') as stream:\n"
        "    log = make_logger(stream)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))\n"
        "    log.info('event.name', number=1, text='x' * 200)\n"
        "    log.info('event.name', number=2)\n"
        "    assert flush(20) == 0\n"
        "    assert stream.seek(0, 2) == 100\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "    log.info('event.name', number=3)\n"
        "    assert dropped() == 1\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    subprocess.run([sys.executable, "-c", code, path], check=True, env={"PYTHONPATH": paths})
    first, last = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["number"], first["text"]) == (1, "x" * 200)
    assert (last["number"], last["lines_dropped"]) == (3, 1)
