"""What a session has started: found by its marker, and proven as keepers are.

Our keeper gives its agent two variables, the session's id and the sessions folder, and all
that the agent starts inherits them. An agent's commands run in sessions of their own, so they
outlive it; once no keeper of the session lives, they are left over.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

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
    keeper_arguments,
)
from reconciler.processes import SYSTEM, Facts, Processes
from reconciler.state import Keeper, KeeperState, Leftover, ProcessId

_MARKERS = (SESSION_MARKER, FOLDER_MARKER)
_DEEPEST = 64
"""Levels of parents that are walked up; a deeper tree proves nothing, and is left alone."""


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
        own = keeper.process if keeper.state is KeeperState.PROVEN else None
        found = (self._identify(sid, pid, own.pid if own else 0) for pid in sorted(set(pids)))
        return tuple(leftover for leftover in found if leftover is not None)

    def proves(self, sid: str, process: ProcessId) -> bool:
        """Whether a process is, at this moment, left over of a session without a keeper.

        To be asked after a pidfd of the process is open: then a signal can go out.
        """
        found = self._identify(sid, process.pid, 0)
        return found is not None and found.process == process

    def _identify(self, sid: str, pid: int, keeper_pid: int) -> Leftover | None:
        facts = self._processes.facts(pid)
        if facts.process is None or facts.dying or facts.uid != os.geteuid():
            return None
        markers = self._processes.variables(pid, _MARKERS)
        arguments = self._processes.arguments(pid)
        if markers != (sid, self._mark) or arguments is None or self._processes.foreign(pid):
            return None
        if self._runs_keeper(arguments) or self._under_keeper(facts, keeper_pid):
            return None
        if pid in self._own_line() or self._processes.facts(pid).process != facts.process:
            return None
        return Leftover(facts.process, os.path.basename(arguments[0])[:64])

    def _runs_keeper(self, arguments: tuple[str, ...]) -> bool:
        return keeper_arguments(arguments, self._programs) is not None

    def _under_keeper(self, facts: Facts, but_for: int) -> bool:
        """Whether a keeper stands above it: then it is the affair of a session that lives.

        The agent of one session can start another one, whose keeper may be of a make that
        passes the first one's marker on.
        """
        for depth, parent in enumerate(self._line(facts)):
            arguments = self._processes.arguments(parent)
            if depth >= _DEEPEST:
                return True
            if arguments and self._runs_keeper(arguments):
                return parent != but_for
        return False

    def _line(self, facts: Facts) -> Iterator[int]:
        """The pids above a process, from its parent up."""
        while facts.parent > 1:
            yield facts.parent
            facts = self._processes.facts(facts.parent)

    def _own_line(self) -> set[int]:
        """We ourselves and those above us: a session may be stopped from inside of it."""
        own = os.getpid()
        return {own, *self._line(self._processes.facts(own))}


def _is_sid(text: str) -> bool:
    try:
        check_sid(text)
    except InvalidSessionIdError:
        return False
    return True


def leaves(folder: Folder, sid: str) -> bool:
    """Whether the user wishes that what the session has started is left alone."""
    return folder.status(file_name(Role.LEAVE, sid)) is not None


def wish_to_leave(folder: Folder, sid: str) -> None:
    """Note that wish down, so that whoever works on the folder knows it.

    Raises:
        OSError: the folder cannot be written to.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    os.close(os.open(file_name(Role.LEAVE, sid), flags, 0o600, dir_fd=folder.fd))


def forget_wish(folder: Folder, sid: str) -> None:
    """The wish has had its time."""
    try:
        os.unlink(file_name(Role.LEAVE, sid), dir_fd=folder.fd)
    except OSError:
        return
