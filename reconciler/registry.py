"""The dashboard's spawn registry, ``headless-pids.json``: read, never written, never trusted.

It may be absent, stale, half written or of another version. What cannot be read is "not
known", and says so once.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeGuard

import msgspec

from reconciler.layout import Role, file_name

LIMIT = 4 * 1024 * 1024
"""Bytes. A registry of some thousand sessions takes a tenth of it."""


class Registry:
    """Agents' pids by session, from the file as it stands now.

    Args:
        path: the registry file.
        complain: called with the reason once for each state of the file that cannot be read.
    """

    def __init__(self, path: Path, complain: Callable[[str], None] = lambda _: None) -> None:
        self._path = path
        self._complain = complain
        self._state: tuple[int, ...] | None = None
        self._agents: dict[str | int, int] = {}

    def agent_pid(self, sid: str, keeper_pid: int) -> int | None:
        """The agent's pid that the registry gives for a session, or None."""
        self._refresh()
        by_socket = self._agents.get(file_name(Role.SOCKET, sid, "linux"))
        return by_socket or self._agents.get(keeper_pid)

    def _refresh(self) -> None:
        try:
            status = os.stat(self._path, follow_symlinks=False)
        except OSError:
            self._state, self._agents = None, {}
            return
        state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if state == self._state:
            return
        self._state = state
        try:
            self._agents = _agents(self._text(status))
        except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
            self._agents = {}
            self._complain(f"{self._path} is not usable: {error}")

    def _text(self, status: os.stat_result) -> bytes:
        if not stat.S_ISREG(status.st_mode) or status.st_size > LIMIT:
            raise ValueError(f"it must be a file of at most {LIMIT} bytes")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(self._path, flags), "rb") as file:
            return file.read(LIMIT)


def _agents(text: bytes) -> dict[str | int, int]:
    """Agents' pids, by the socket's base name or, where none is given, by the keeper's pid."""
    content = msgspec.json.decode(text)
    entries = content.get("entries") if isinstance(content, Mapping) else None
    if not isinstance(entries, list):
        raise ValueError("it holds no list of entries")  # noqa: TRY004 - it is the file's value
    agents: dict[str | int, int] = {}
    for entry in entries:
        if not isinstance(entry, Mapping) or not _is_pid(agent := entry.get("piPid")):
            continue
        if isinstance(path := entry.get("keeperSockPath"), str):
            agents[os.path.basename(path)] = agent
        elif _is_pid(keeper := entry.get("keeperPid")):
            agents[keeper] = agent
    return agents


def _is_pid(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 < value < 2**31
