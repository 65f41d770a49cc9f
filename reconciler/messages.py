"""Messages: what can be one line for an agent, and how it goes over the wire."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from operator import contains
from typing import Final, TypeAlias, cast

Message: TypeAlias = Mapping[str, object] | str | bytes
"""What can be written: a JSON object, or one line that is one already."""

MAX_LINE: Final = 64 * 1024 * 1024
"""Bytes of the longest line, without its line feed."""


KEY_MARK: Final = b"\x01"
# Around a key on the wire, and first on a connection with keys: it begins no JSON text.

_ODD: Final = (b"\r", b"\0", KEY_MARK)
# Bytes that a line cannot have, or not at every place.

_TOGETHER = 2000
# Messages that are joined and checked at once.

_LONGEST_KEY = 128
# Characters; what our keeper takes.


class InvalidMessageError(ValueError):
    """A message that cannot be one line for an agent, or a key that cannot be one.

    Its text is not repeated here.
    """


def encode(message: Message) -> bytes:
    r"""One line as it goes over the wire, with its LF.

    Args:
        message: a mapping becomes compact JSON in ASCII, so that no reader trips over
            U+2028. Text (as UTF-8) and bytes are one line and stay as they are, less one
            line end (``\n`` or ``\r\n``) that they may have.

    Raises:
        InvalidMessageError: a line feed, carriage return or NUL inside, 0x01 at its
            beginning, not UTF-8 (lone surrogates included), blank, longer than `MAX_LINE`; of
            a mapping: NaN or an infinity, a key that is no text, anything that JSON has not.
    """
    match message:
        case str():
            line = _line(_utf8(message))
        case bytes():
            line = _line(message)
            if not _is_utf8(line):
                raise InvalidMessageError("the message is not UTF-8")
        case Mapping():
            line = _json(message)
        case _:
            raise InvalidMessageError("give a mapping, or one line as str or bytes")
    if len(line) > MAX_LINE:
        raise InvalidMessageError(f"the message has {len(line)} bytes, at most {MAX_LINE} fit")
    return line + b"\n"


def encode_all(messages: Iterable[Message]) -> tuple[bytes | bytearray, int]:
    """Many lines as they go over the wire, and how many they are.

    Raises:
        InvalidMessageError: as `encode` does, of the first one that is none.
    """
    every = list(messages)
    joined = _joined(every)
    if joined is None:
        return b"".join([encode(message) for message in every]), len(every)
    return joined, len(every)


def _joined(messages: Sequence[Message]) -> bytearray | None:
    """All lines in one, checked as one: of a hundred thousand, in a tenth of the time.

    It is done part by part, each so small that the processor still has it at hand when it is
    looked at again. None where one of them may have to be looked at by itself.
    """
    kinds = set(map(type, messages))
    if len(kinds) != 1 or not kinds <= {str, bytes}:
        return None
    data = bytearray()
    for start in range(0, len(messages), _TOGETHER):
        part = messages[start : start + _TOGETHER]
        if kinds == {str}:
            lines = _lines_of_text(cast("Sequence[str]", part))
        else:
            lines = _lines_of_bytes(cast("Sequence[bytes]", part))
        if lines is None or len(lines) > MAX_LINE or any(odd in lines for odd in _ODD):
            return None
        data += lines
    return data


def _lines_of_text(texts: Sequence[str]) -> bytes | None:
    if any(map(str.isspace, texts)) or any(map(contains, texts, repeat("\n"))) or not all(texts):
        return None
    text = "\n".join((*texts, ""))
    return text.encode() if text.isascii() else None


def _lines_of_bytes(lines: Sequence[bytes]) -> bytes | None:
    if any(map(bytes.isspace, lines)) or any(map(contains, lines, repeat(b"\n"))):
        return None
    data = b"\n".join((*lines, b""))
    return data if data.isascii() and all(lines) else None


def keyed(line: bytes, key: str) -> bytes:
    """A line as it goes to a keeper that understands keys."""
    if not (0 < len(key) <= _LONGEST_KEY and key.isascii() and key.isprintable() and key.strip()):
        raise InvalidMessageError(
            f"the key is not 1 to {_LONGEST_KEY} printable ASCII characters, one no blank"
        )
    return KEY_MARK + key.encode("ascii") + KEY_MARK + line


def _line(text: bytes) -> bytes:
    line = text[:-1].removesuffix(b"\r") if text.endswith(b"\n") else text
    for byte, name in ((b"\n", "a line feed"), (b"\r", "a carriage return"), (b"\0", "a NUL")):
        if byte in line:
            raise InvalidMessageError(f"the message has {name} inside, it must be one line")
    if not line.strip():
        raise InvalidMessageError("the message is blank")
    if line.startswith(KEY_MARK):
        raise InvalidMessageError("the message begins with 0x01, which is kept for keys")
    return line


def _utf8(text: str) -> bytes:
    if text.isascii():
        return text.encode("ascii")
    # Raised outside of the handler: the codec's own error carries the text along.
    with contextlib.suppress(UnicodeEncodeError):
        return text.encode()
    raise InvalidMessageError("the message has lone surrogates, it is not UTF-8")


def _is_utf8(line: bytes) -> bool:
    if line.isascii():
        return True
    with contextlib.suppress(UnicodeDecodeError):
        line.decode()
        return True
    return False


def _json(message: Mapping[str, object]) -> bytes:
    import json  # noqa: PLC0415 - a line that is one already does without

    problem = "it nests too deep"
    try:
        text = json.dumps(dict(message), separators=(",", ":"), allow_nan=False)
    except RecursionError:
        pass
    except TypeError:
        problem = "it has a value or a key that JSON has not"
    except ValueError:
        problem = "it has NaN, an infinity, a number too long, or contains itself"
    else:
        _check_json(message)
        return text.encode("ascii")
    raise InvalidMessageError(f"the message cannot be JSON: {problem}")


def _check_json(message: Mapping[str, object]) -> None:
    """Refuse what `json.dumps` makes into something else: other keys, lone surrogates."""
    values: list[object] = [dict(message)]
    while values:
        match values.pop():
            case str() as text if not text.isascii():
                _utf8(text)
            case dict() as mapping:
                if not all(isinstance(key, str) for key in mapping):
                    raise InvalidMessageError("the message has a key that is no text")
                values.extend(mapping)
                values.extend(mapping.values())
            case list() | tuple() as items:
                values.extend(items)
