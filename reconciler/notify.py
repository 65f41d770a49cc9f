"""What a service manager is told: systemd's notify protocol, over the socket it names.

Telling never waits and never fails: the manager's trouble is not ours. Where no manager
asks to be told, nothing is done.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

_LONGEST_STATUS = 200
# Characters: systemctl shows a status in one line.


class Notifier:
    """Tells the service manager, if there is one that asks for it.

    Args:
        environ: where the manager says how: ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and
            ``WATCHDOG_PID``, as systemd's ``sd_notify`` and ``sd_watchdog_enabled`` have it.
            They are taken out, so that no child takes itself for the one who is meant.

    Attributes:
        watchdog: seconds within which the manager wants a sign of life; None: it wants none.
    """

    def __init__(self, environ: dict[str, str] | os._Environ[str]) -> None:
        self._address = _address(environ)
        self.watchdog = _watchdog(environ) if self._address else None
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            environ.pop(name, None)
        self._socket: socket.socket | None = None
        if self._address:
            with contextlib.suppress(OSError):  # no descriptor is left
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.setblocking(False)

    def __bool__(self) -> bool:
        """Whether anybody is told."""
        return self._socket is not None

    def close(self) -> None:
        """Tell nothing any more. May be called twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ready(self) -> None:
        """It has started, or has taken its new settings."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """It takes new settings now; `ready` ends that, whether they were good or not."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """It was asked to end, and does."""
        self._tell("STOPPING=1")

    def alive(self) -> None:
        """Its loop turns."""
        self._tell("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Say in one line how it is."""
        line = "".join(char if char.isprintable() else "?" for char in text)
        self._tell(f"STATUS={line[:_LONGEST_STATUS]}")

    def _tell(self, *assignments: str) -> None:
        if self._socket is None:
            return
        message = "\n".join(assignments).encode()
        with contextlib.suppress(OSError):  # it is gone, or does not read
            self._socket.sendto(message, self._address)


def _address(environ: Mapping[str, str]) -> str:
    """The socket's address; ``@`` begins an abstract one. Empty: there is none that we know."""
    named = environ.get("NOTIFY_SOCKET", "")
    if named.startswith("/") and len(named) > 1:
        return named
    if named.startswith("@") and len(named) > 1:
        return "\0" + named[1:]
    return ""


def _watchdog(environ: Mapping[str, str]) -> float | None:
    """Seconds, if they are meant for this process."""
    microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not microseconds.isascii() or not microseconds.isdigit() or int(microseconds) == 0:
        return None
    if pid and pid != str(os.getpid()):
        return None
    return int(microseconds) / 1e6
