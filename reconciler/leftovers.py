"""What a session has started: found by its marker, and proven as keepers are.

Our keeper gives its agent two variables, the session's id and the sessions folder, and all
that the agent starts inherits them. An agent's commands run in sessions of their own, so they
outlive it; once no keeper of the session lives, they are left over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from reconciler.facts import Facts, Processes
from reconciler.folder import Folder
from reconciler.identity import KNOWN_PROGRAMS
from reconciler.layout import (
    FOLDER_MARKER,
    SESSION_MARKER,
    InvalidSessionIdError,
    Role,
    check_sid,
    file_name,
    folder_mark,
    mentions_keeper,
    parse_name,
)
from reconciler.observations import Keeper, KeeperState, Leftover, ProcessId
from reconciler.processes import SYSTEM

_MARKERS = (SESSION_MARKER, FOLDER_MARKER)
SHARED_SERVERS = frozenset(
    {"tmux", "screen", "zellij", "dbus-daemon", "dbus-broker", "gpg-agent", "ssh-agent", "ssh"}
)
"""Programs of which one serves all sessions of a user, whoever has started it first: by the
base name of what they run. They are no session's leftovers, nor is what stands below them."""

_DEEPEST = 64
"""Levels of parents that are walked up; a deeper tree proves nothing, and is left alone."""


@dataclass(frozen=True, slots=True)
class _Spared:
    """Whom nobody may take for a leftover, by pid."""

    named: frozenset[int]
    """Nor what stands below these."""
    ours: frozenset[int]
    """Those who look, and those above them: a session may be stopped from inside of it."""
    but_for: int
    """The session's own living keeper: what stands below it is the session's."""


class Leftovers:
    """Finds what the sessions of one folder have started.

    Args:
        folder: the sessions folder, open.
        programs: base names of known keeper programs.
        processes: how the system is asked.
    """

    def __init__(
        self,
        folder: Folder,
        programs: frozenset[str] = KNOWN_PROGRAMS,
        processes: Processes = SYSTEM,
    ) -> None:
        self._folder = folder
        self._mark = folder_mark(*folder.key)
        self._programs = programs
        self._processes = processes

    def scan(self) -> Mapping[str, list[int]]:
        """The pids of all processes that carry a marker of this folder, by session id.

        A walk over all processes; never on the way from a death to clean.
        """
        found: defaultdict[str, list[int]] = defaultdict(list)
        for pid in self._processes.pids():
            markers = self._processes.variables(pid, _MARKERS)
            if markers is not None and markers[1] == self._mark and _is_sid(markers[0]):
                found[markers[0]].append(pid)
        return found

    def find(self, sid: str, keeper: Keeper, pids: Iterable[int]) -> tuple[Leftover, ...]:
        """Those of ``pids`` that the session has started, the agent among them.

        Args:
            sid: the session's id.
            keeper: its keeper; what stands under a living one is that session's own.
            pids: what a scan has found, or the look before.
        """
        own = keeper.process.pid if keeper.process and keeper.state is KeeperState.PROVEN else 0
        spared = self._spared(but_for=own)
        found = (self._identify(sid, pid, spared) for pid in sorted(set(pids)))
        return tuple(leftover for leftover in found if leftover is not None)

    def proves(self, sid: str, process: ProcessId) -> bool:
        """Whether a process is, at this moment, left over of a session without a keeper.

        To be asked after a pidfd of the process is open: then a signal can go out.
        """
        found = self._identify(sid, process.pid, self._spared())
        return found is not None and found.process == process

    def _identify(self, sid: str, pid: int, spared: _Spared) -> Leftover | None:
        facts = self._processes.facts(pid)
        if facts.process is None or facts.dying or facts.uid != os.geteuid():
            return None
        markers = self._processes.variables(pid, _MARKERS)
        if markers != (sid, self._mark) or self._processes.foreign(pid):
            return None
        if pid in spared.ours or pid == spared.but_for or self._is_spared(pid, spared):
            return None
        if self._is_below(facts, spared):
            return None
        name = self._processes.program(pid)
        if self._processes.facts(pid).process != facts.process:
            return None
        return Leftover(facts.process, name)

    def _spared(self, but_for: int = 0) -> _Spared:
        """Whom nobody may take for a leftover.

        Whoever a pid file of the folder names counts, proven or not: to spare needs no proof.
        So does the reconciler that works on the folder.
        """
        named = (
            self._folder.pid_entry(name, 0.0).pid
            for name in self._folder.names()
            if (parsed := parse_name(name)) is not None and parsed.role is Role.PID_FILE
        )
        own = os.getpid()
        return _Spared(
            named=frozenset({*named, self._folder.lock_holder() or own}) - {but_for},
            ours=frozenset({own, *self._line(self._processes.facts(own))}),
            but_for=but_for,
        )

    def _is_spared(self, pid: int, spared: _Spared) -> bool:
        arguments = self._processes.arguments(pid)
        return pid != spared.but_for and (
            pid in spared.named
            or arguments is None
            or mentions_keeper(arguments, self._programs)
            or self._processes.program(pid) in SHARED_SERVERS
        )

    def _is_below(self, facts: Facts, spared: _Spared) -> bool:
        """Whether a keeper or a shared server stands above it: then it is their affair.

        The agent of one session can start another one, whose keeper may be of a make that
        passes the first one's marker on; and what others have put into a server is theirs.
        """
        for depth, parent in enumerate(self._line(facts)):
            if parent == spared.but_for:
                return False
            if depth >= _DEEPEST or (parent not in spared.ours and self._is_spared(parent, spared)):
                return True
        return False

    def _line(self, facts: Facts) -> Iterator[int]:
        """The pids above a process, from its parent up."""
        while facts.parent > 1:
            yield facts.parent
            facts = self._processes.facts(facts.parent)


def _is_sid(text: str) -> bool:
    try:
        check_sid(text)
    except InvalidSessionIdError:
        return False
    return True


def leaves(folder: Folder, sid: str) -> bool:
    """Whether the user wishes that what the session has started is left alone."""
    status = folder.status(file_name(Role.LEAVE, sid))
    return status is not None and _is_ours(status)


def wish_to_leave(folder: Folder, sid: str) -> None:
    """Note that wish down, so that whoever works on the folder knows it.

    Raises:
        OSError: the folder cannot be written to, or something else stands under the name.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    name = file_name(Role.LEAVE, sid)
    descriptor = os.open(name, flags, 0o600, dir_fd=folder.fd)
    try:
        if not _is_ours(os.fstat(descriptor)):
            raise OSError(errno.EPERM, "what stands there is no file of ours", name)
    finally:
        os.close(descriptor)


def forget_wish(folder: Folder, sid: str) -> None:
    """The wish has had its time."""
    if leaves(folder, sid):
        with contextlib.suppress(OSError):
            os.unlink(file_name(Role.LEAVE, sid), dir_fd=folder.fd)


def _is_ours(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
