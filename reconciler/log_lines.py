"""One log line: strict, flat JSON in UTF-8, never longer than a log shipper takes.

No value, however odd, makes a call here fail. What is no flat JSON value is told as a text, and
a line that is too long loses the middle of its longest values.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

LONGEST = 8000
"""Bytes of a line with its LF: rsyslog cuts at 8,096 (its ``maxMessageSize``)."""

SEVERITIES: Mapping[str, int] = {"debug": 5, "info": 9, "warning": 13, "error": 17, "critical": 21}
"""OpenTelemetry's ``severity_number`` of each level."""

PRIORITIES: Mapping[str, int] = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""syslog's priority of each level, which journald has, too."""

_LEAST = 40
# Bytes that a value keeps at least; keys for which there is no room are left out.


def render(fields: Mapping[str, object], truncated: str = "truncated") -> bytes:
    """Render fields as one line, without its LF.

    Args:
        fields: the line's keys and values, in their order, the most important first.
        truncated: the key that says how many bytes were left out, where some were.
    """
    try:
        line = _ENCODER.encode(fields)
    except Exception:  # noqa: BLE001 - a value that is no JSON, in whatever way
        return _with_care(fields, truncated)
    if len(line) >= LONGEST or line.count(b"{") > 1 or b"[" in line:
        return _with_care(fields, truncated)  # it has lists, perhaps, or no more than brackets
    return line


def encode(fields: Mapping[str, object]) -> bytes:
    """Fields as JSON of whatever depth and length; as `render` where some value is no JSON."""
    try:
        return _ENCODER.encode(fields)
    except Exception:  # noqa: BLE001 - as above
        return _with_care(fields, "truncated")


def _with_care(fields: Mapping[str, object], truncated: str) -> bytes:
    """The same, value by value."""
    values = {_encode(_words(key)): _flat(value) for key, value in fields.items()}
    size = _size(values)
    if size >= LONGEST:
        room = LONGEST - len(f',"{truncated}":{size}\n')
        values = _shortened(values, room)
        values[_encode(truncated)] = b"%d" % (size - _size(values))
    return b"{" + b",".join(key + b":" + value for key, value in values.items()) + b"}"


def _size(values: Mapping[bytes, bytes]) -> int:
    return 1 + sum(len(key) + len(value) + 2 for key, value in values.items())


def _flat(value: object) -> bytes:
    """A value as JSON; a text of what it looks like if it cannot be, or is not flat."""
    try:
        encoded = _ENCODER.encode(value)
        return _encode(encoded.decode()) if _is_nested(encoded) else encoded
    except Exception:  # noqa: BLE001 - as above
        return _encode(_words(value))


def _is_nested(encoded: bytes) -> bool:
    if encoded.startswith(b"["):
        return any(isinstance(item, list | dict) for item in msgspec.json.decode(encoded))
    return encoded.startswith(b"{")


def _encode(text: str) -> bytes:
    """A text as JSON, where lone surrogates are written out."""
    return _ENCODER.encode(text.encode(errors="backslashreplace").decode())


def _shortened(values: Mapping[bytes, bytes], room: int) -> dict[bytes, bytes]:
    """The values in so many bytes: the longest ones are cut, all to the same length."""
    kept = dict(values)
    room -= _size(dict.fromkeys(kept, b""))
    while room < _LEAST * len(kept):
        key, _ = kept.popitem()
        room += len(key) + 2
    share = _share([len(value) for value in kept.values()], room)
    return {
        key: value if len(value) <= share else _cut(value, share) for key, value in kept.items()
    }


def _share(sizes: list[int], room: int) -> int:
    """The length at which to cut, so that all sizes fit into the room together."""
    waiting = len(sizes)
    for size in sorted(sizes):
        if size > room // waiting:
            return room // waiting
        room -= size
        waiting -= 1
    return room


def _cut(value: bytes, size: int) -> bytes:
    """A value without its middle, as a text: both ends tell most, of a traceback above all."""
    text = msgspec.json.decode(value, type=str) if value.startswith(b'"') else value.decode()
    keep = size
    while True:
        half = keep // 2
        short = _encode(f"{text[:half]}…{text[len(text) - half :]}")
        if len(short) <= size:
            return short
        keep -= 2 + (len(short) - size) // _WIDEST


_WIDEST = 6  # bytes of one character in JSON: \u0000


def _words(value: object) -> str:
    try:
        return value if isinstance(value, str) else repr(value)
    except Exception:  # noqa: BLE001 - its own repr fails
        return f"<{type(value).__name__}>"


_ENCODER: msgspec.json.Encoder = msgspec.json.Encoder(enc_hook=_words)
