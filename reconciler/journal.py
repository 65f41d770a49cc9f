"""The systemd journal as a sink: its native protocol, one field a key.

The protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/. All of it happens in the thread that
writes lines (`reconciler.sinks`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import sys
import weakref
from collections.abc import Mapping

import msgspec

from reconciler.log_lines import PRIORITIES
from reconciler.sinks import PIECE, Sink, SinkError

SOCKET = "/run/systemd/journal/socket"

_PREFIX = "PI_RECONCILER_"
_NAME = 64  # characters of a field's name
_NOT_IN_NAMES = re.compile(r"[^A-Z0-9_]", re.ASCII)
_TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)


def to_journal(path: str = SOCKET) -> Sink:
    """A sink that sends each line to the journal, field by field.

    Args:
        path: journald's native socket.

    Raises:
        SinkError: there is no journald.
    """
    try:
        return Sink(Journal(path))
    except OSError as error:
        raise SinkError(
            f"the journal cannot be reached at {path}: {error.strerror}: "
            "set log.sink to stdout or file where systemd-journald does not run"
        ) from error


class Journal:
    """Sends lines, which are JSON objects, as entries of the journal.

    journald may be restarted meanwhile: each entry is sent to whoever has the path.
    """

    piece = PIECE

    def __init__(self, path: str = SOCKET) -> None:
        self.trouble = ""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        weakref.finalize(self, self._socket.close).atexit = False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as knock:
            knock.connect(path)

    def write(self, lines: list[bytes]) -> int:
        """Send them all; where nobody listens they are lost."""
        self.trouble = ""
        lost = 0
        for line in lines:
            try:
                self._send(entry(msgspec.json.decode(line)))
            except OSError as error:
                self.trouble = f"the journal: {error.strerror}"
                lost += 1
        return lost

    def reset(self) -> None:
        """No line is sent in part."""

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, self._path)
        except OSError as error:
            if error.errno not in _TOO_LARGE:
                raise
            self._hand_over(data)

    def _hand_over(self, data: bytes) -> None:
        """Send what is too large for a datagram as a sealed file in memory."""
        file = os.memfd_create("log-line", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(file, data)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, file.to_bytes(4, sys.byteorder))
            self._socket.sendmsg([b""], [rights], 0, self._path)
        finally:
            os.close(file)


def entry(line: Mapping[str, object]) -> bytes:
    """A log line as the journal's protocol has it.

    The message is for a person's eyes; each key is a field, a list one field for each of its
    items, and what is ``null`` is left out.
    """
    words = (line.get(key) for key in ("event", "sid", "reason", "detail"))
    message = " ".join(str(word) for word in words if word)
    priority = PRIORITIES.get(str(line.get("level")), PRIORITIES["info"])
    fields = [
        _field("MESSAGE", message),
        _field("PRIORITY", str(priority)),
        _field("SYSLOG_IDENTIFIER", "pi-reconciler"),
    ]
    for key, value in line.items():
        name = (_PREFIX + _NOT_IN_NAMES.sub("_", key.upper()))[:_NAME]
        items = value if isinstance(value, list) else [value]
        fields += [_field(name, _text(item)) for item in items if item is not None]
    return b"".join(fields)


def _text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _field(name: str, value: str) -> bytes:
    data = value.encode()
    if "\n" in value:
        return b"%b\n%b%b\n" % (name.encode(), len(data).to_bytes(8, "little"), data)
    return b"%b=%b\n" % (name.encode(), data)
