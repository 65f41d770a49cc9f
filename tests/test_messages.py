from __future__ import annotations

import asyncio
import collections
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from delivery_scene import (
    PATIENT,
    SID,
    Face,
    Scene,
)
from delivery_scene import face as face  # noqa: PLC0414 - fixtures
from delivery_scene import scene as scene  # noqa: PLC0414
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reconciler import layout
from reconciler import messages as messages_room
from reconciler.messages import encode_all
from reconciler.rpc_writer import (
    MAX_LINE,
    BlockingRpcWriter,
    InvalidMessageError,
    Message,
    RpcWriter,
    WritePolicy,
    encode,
)
from reconciler.testing import Behaviour

SMALL: Message = {"type": "prompt", "message": "small"}


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ({}, b"{}"),
        ({"a": 1, "b": [True, None, 1.5]}, b'{"a":1,"b":[true,null,1.5]}'),
        (
            {"text": "\u2028 \n \r \0 \U0001f600"},
            b'{"text":"\\u2028 \\n \\r \\u0000 \\ud83d\\ude00"}',
        ),
        (collections.ChainMap({"a": 1}), b'{"a":1}'),
        ({"nested": (1, {"k": "v"})}, b'{"nested":[1,{"k":"v"}]}'),
        ('{"a":1}', b'{"a":1}'),
        ('{"a":1}\n', b'{"a":1}'),
        ('{"a":1}\r\n', b'{"a":1}'),
        ("\u2028é", "\u2028é".encode()),
        (b' {"a": 1} ', b' {"a": 1} '),
        (b"\xc3\xa9\n", b"\xc3\xa9"),
    ],
)
def test_encode(message: Message, line: bytes) -> None:
    assert encode(message) == line + b"\n"


def circle() -> Message:
    made: dict[str, object] = {}
    made["self"] = made
    return made


def pit() -> Message:
    made: dict[str, object] = {}
    for _ in range(100_000):
        made = {"deeper": made}
    return made


SECRET = "hunter2"  # noqa: S105 - a word to look for in errors


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: f"{SECRET}\nx", "a line feed inside"),
        (lambda: f"{SECRET}\n\n", "a line feed inside"),
        (lambda: f"{SECRET}\rx", "a carriage return inside"),
        (lambda: f"{SECRET}\r", "a carriage return inside"),
        (f"{SECRET}\0".encode, "a NUL inside"),
        (lambda: f"{SECRET}\ud800", "not UTF-8"),
        (lambda: SECRET.encode() + b"\xff", "not UTF-8"),
        (lambda: {"text": f"{SECRET}\ud800"}, "not UTF-8"),
        (lambda: {f"{SECRET}\ud800": 1}, "not UTF-8"),
        (lambda: f"\x01k\x01{SECRET}", "begins with 0x01"),
        (lambda: "", "blank"),
        (lambda: b"\n", "blank"),
        (lambda: " \t", "blank"),
        (lambda: "x" * (MAX_LINE + 1), f"at most {MAX_LINE} fit"),
        (lambda: {SECRET: math.nan}, "NaN"),
        (lambda: {SECRET: [math.inf]}, "an infinity"),
        (lambda: {SECRET: {1: 2}}, "a key that is no text"),
        (lambda: {SECRET: {(1, 2): 2}}, "a value or a key that JSON has not"),
        (lambda: {SECRET: object()}, "a value or a key that JSON has not"),
        (lambda: {SECRET: 10**5000}, "a number too long"),
        (circle, "contains itself"),
        (pit, "nests too deep"),
        (lambda: 42, "give a mapping, or one line"),
        (lambda: [SECRET], "give a mapping, or one line"),
    ],
)
def test_refused_before_anything_is_done(
    tmp_path: Path, make: Callable[[], Message], says: str
) -> None:
    message = make()
    writer = BlockingRpcWriter(tmp_path / "not there")
    with pytest.raises(InvalidMessageError, match=says) as caught:
        writer.write(SID, message)
    seen: BaseException | None = caught.value
    while seen is not None:
        assert SECRET not in f"{seen!r} {seen}"
        seen = seen.__context__
    with pytest.raises(InvalidMessageError, match=says):
        asyncio.run(RpcWriter(tmp_path).write(SID, message))
    assert len(writer._desk.lanes) == 0


def encoded(messages: list[Message]) -> bytes | str:
    """What all of them are on the wire, one by one; or why the first that is none is none."""
    try:
        return b"".join(map(encode, messages))
    except InvalidMessageError as error:
        return str(error)


ODD = st.text(st.sampled_from('a{}" \t\n\r\v\f\0\x01\x1c\x85\u00e9\u2028\ud800'), max_size=4)
PLAIN = st.text(st.sampled_from('ab{}" '), min_size=1, max_size=4).map("{0}x".format)


TEXTS = st.lists(st.one_of(PLAIN, PLAIN, ODD, ODD.map("{0}x".format)), min_size=1, max_size=5)
BYTES = TEXTS.map(lambda texts: [text.encode("utf-8", "surrogatepass") for text in texts])


@pytest.mark.parametrize("together", [1, 2, 2000])
@settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(messages=st.one_of(TEXTS, BYTES))
def test_a_batch_is_its_messages_one_by_one(
    messages: list[Message], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reconciler.messages._TOGETHER", together)
    told = encoded(messages)
    if isinstance(told, str):
        with pytest.raises(InvalidMessageError, match=re.escape(told)):
            encode_all(messages)
        return
    assert encode_all(messages) == (told, len(messages))


@pytest.mark.parametrize("kind", [str, bytes])
def test_lines_of_one_kind_are_joined_as_one(kind: type[str | bytes]) -> None:
    lines = [f'{{"n":{n}}}' for n in range(5000)]
    given_lines = lines if kind is str else [line.encode() for line in lines]
    data = messages_room._joined(given_lines)
    assert data is not None
    assert bytes(data) == "".join(f"{line}\n" for line in lines).encode()


@pytest.mark.parametrize("messages", [[], "text", b"bytes", {"a": 1}])
def test_a_batch_is_a_list_of_messages(tmp_path: Path, messages: list[Message]) -> None:
    with pytest.raises(InvalidMessageError):
        BlockingRpcWriter(tmp_path).write_many(SID, messages)


def test_a_batch_with_one_invalid_message_sends_nothing(scene: Scene) -> None:
    keeper = scene.fake(Behaviour.RECEIPT)
    writer = BlockingRpcWriter(scene.folder)
    with pytest.raises(InvalidMessageError):
        writer.write_many(SID, [{"n": 1}, ""])
    assert writer.write(SID, {"n": 2}).delivered
    assert keeper.received == (b'{"n":2}',)


@pytest.mark.parametrize("sid", ["", "../x", "a/b", "launch-x", "x" * 91, "a\n"])
def test_a_session_id_is_checked_first(tmp_path: Path, sid: str) -> None:
    for writer in (BlockingRpcWriter(tmp_path), RpcWriter(tmp_path)):
        with pytest.raises(layout.InvalidSessionIdError):
            writer.stream(sid)
    with pytest.raises(layout.InvalidSessionIdError):
        BlockingRpcWriter(tmp_path).write(sid, SMALL)


@pytest.mark.parametrize("timeout", [-1, math.nan])
def test_a_timeout_is_checked_first(scene: Scene, face: Face, timeout: float) -> None:
    keeper = scene.fake(Behaviour.RECEIPT)
    with pytest.raises(ValueError, match="timeout"):
        face.write(scene.folder, SMALL, PATIENT, timeout)
    assert keeper.received == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"progress_timeout": 0.0},
        {"progress_timeout": math.inf},
        {"progress_timeout": math.nan},
        {"backoff": (-1.0,)},
        {"backoff": (math.nan,)},
    ],
)
def test_a_policy_is_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WritePolicy(**wrong)  # type: ignore[arg-type]


def test_the_seeds_numbers_are_the_defaults() -> None:
    policy = WritePolicy()
    assert (policy.attempts, policy.progress_timeout) == (3, 0.350)
    assert policy.backoff == (0.050, 0.150)
