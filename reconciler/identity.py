"""Whose a process is: the proofs that make a pid a session's keeper in this folder.

Two proofs count, and either is enough: the process runs a known keeper program for the
session and holds a file of this folder open; or it listens on the session's socket. What
is neither proven nor refuted is unverifiable, and nobody touches it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from reconciler.facts import Facts, Life, Processes
from reconciler.folder import Answer, Folder, Peer
from reconciler.layout import (
    KEEPER_PROGRAM,
    Role,
    file_name,
    keeper_arguments,
    mentions_keeper,
)
from reconciler.observations import Keeper, KeeperState, Listening, ProcessId
from reconciler.processes import SYSTEM

KNOWN_PROGRAMS = frozenset({KEEPER_PROGRAM.name, "keeper.cjs"})
"""Base names of the keeper programs that are known without a setting."""

_OURS = frozenset({KEEPER_PROGRAM.name})

NOBODY = Keeper(KeeperState.NONE)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the session's socket said, and who said it."""

    listening: Listening
    listener: ProcessId | None = None
    named: bool = False
    """The answer came from a process of our user and of our pid namespace."""


NOT_ASKED = Asked(Listening.NOT_ASKED)


class Identity:
    """Tells the keepers of one folder from all other processes.

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
        self._programs = programs
        self._processes = processes

    def scan(self) -> Mapping[str, list[int]]:
        """The pids of all processes that run a known keeper program, by session id.

        Whose folder they belong to is not yet looked at: `look` does that.
        """
        found: defaultdict[str, list[int]] = defaultdict(list)
        for pid in self._processes.pids():
            arguments = self._processes.arguments(pid)
            if arguments and (run := keeper_arguments(arguments, self._programs)):
                found[run.sid].append(pid)
        return found

    def proves_keeper(self, sid: str, process: ProcessId) -> bool:
        """Whether a process is, at this moment, a keeper of this folder for ``sid``.

        To be asked after a pidfd of the process is open: then a signal can go out.
        """
        keeper = self.identify(sid, process.pid)
        if keeper.process != process:
            return False
        if keeper.state is KeeperState.PROVEN:
            return True
        listening = self.listening_keeper(sid, self.connect(sid))
        return (
            listening is not None
            and listening.state is KeeperState.PROVEN
            and listening.process == process
        )

    def listening_keeper(self, sid: str, asked: Asked) -> Keeper | None:
        """The keeper that answers on the session's socket, if it can be named."""
        if not asked.named or asked.listener is None:
            return None
        facts = self._processes.facts(asked.listener.pid)
        if facts.process != asked.listener:
            return None
        ours = self.identify(sid, asked.listener.pid).ours
        if not ours and self._serves_elsewhere(sid, asked.listener.pid):
            text = f"keeper {asked.listener.pid} listens here, and serves another folder"
            return _unverifiable(facts, text)
        evidence = f"process {asked.listener.pid} listens on the session's socket"
        return Keeper(KeeperState.PROVEN, facts.process, ours, facts.age, evidence)

    def identify(self, sid: str, pid: int, facts: Facts | None = None) -> Keeper:
        """Who a pid is to the session, by its arguments and what it holds open."""
        facts = facts or self._processes.facts(pid)
        if facts.life is Life.DEAD:
            return NOBODY
        if facts.life is Life.HIDDEN:
            return _unverifiable(facts, f"process {pid} is hidden from us")
        if facts.kernel:
            return Keeper(KeeperState.RECYCLED, facts.process, evidence=f"{pid} is the kernel's")
        if facts.uid != os.geteuid():
            return _unverifiable(facts, f"process {pid} belongs to uid {facts.uid}")
        arguments = self._processes.arguments(pid)
        if arguments is None:
            if self._processes.facts(pid).process != facts.process:
                return NOBODY
            return _unverifiable(facts, f"the arguments of process {pid} cannot be read")
        if self._processes.foreign(pid):
            return _unverifiable(facts, f"process {pid} lives in another pid namespace")
        run = keeper_arguments(arguments, self._programs)
        if run is not None and run.sid == sid:
            return self._keeper_of_this_folder(sid, run.program, facts)
        if any(sid in argument for argument in arguments):
            text = f"process {pid} has the session id among its arguments, its program is not known"
            return _unverifiable(facts, text)
        name = self._processes.program(pid)
        evidence = f"process {pid} is {name or 'another program'}, not a keeper"
        return Keeper(KeeperState.RECYCLED, facts.process, evidence=evidence)

    def _keeper_of_this_folder(self, sid: str, program: str, facts: Facts) -> Keeper:
        if facts.process is None:
            return NOBODY
        pid = facts.process.pid
        match self._processes.holds(pid, self._evidence(sid)):
            case True:
                ours = program == KEEPER_PROGRAM.name
                evidence = f"process {pid} runs {program} for this session and this folder"
                return Keeper(KeeperState.PROVEN, facts.process, ours, facts.age, evidence)
            case False if self._processes.facts(pid).process == facts.process:
                return _unverifiable(facts, f"keeper {pid} has no file of this folder open")
            case None if self._processes.facts(pid).process == facts.process:
                return _unverifiable(facts, f"whose folder keeper {pid} serves cannot be told")
            case _:
                return NOBODY

    def _serves_elsewhere(self, sid: str, pid: int) -> bool:
        """Whether it is a keeper of ours that does not hold this folder: its socket was linked."""
        arguments = self._processes.arguments(pid) or ()
        holds = self._processes.holds(pid, self._evidence(sid))
        return mentions_keeper(arguments, _OURS) and holds is False

    def mentions_keeper(self, pid: int) -> bool:
        """Whether a process may run a keeper of whichever session: to spare it, no more."""
        return mentions_keeper(self._processes.arguments(pid) or (), self._programs)

    def may_serve(self, sid: str, pid: int) -> bool:
        """Whether a process that runs our keeper for ``sid`` may do so for this folder.

        It holds its folder open for life, so what it holds refutes it as well. What has died
        since it was found holds nothing that can be looked at, and serves nobody.
        """
        holds = self._processes.holds(pid, self._evidence(sid))
        return self._processes.facts(pid).life is not Life.DEAD if holds is None else holds

    def _evidence(self, sid: str) -> frozenset[tuple[int, int]]:
        """The folder and the session's logs, by device and inode: a keeper holds one open.

        A log that has another name as well may be that of a keeper of another folder.
        """
        found = {self._folder.key}
        for role in (Role.KEEPER_LOG, Role.LAUNCH_LOG):
            status = self._folder.status(file_name(role, sid))
            if status is not None and status.st_nlink == 1:
                found.add((status.st_dev, status.st_ino))
        return frozenset(found)

    def connect(self, sid: str) -> Asked:
        """Ask the session's socket whether somebody listens, and who."""
        peer = self._folder.ask(file_name(Role.SOCKET, sid))
        match peer.answer:
            case Answer.ACCEPTED:
                return self._named(peer)
            case Answer.BUSY:
                return Asked(Listening.ANSWERED)
            case Answer.REFUSED | Answer.GONE:
                return Asked(Listening.REFUSED)
            case Answer.CANNOT_TELL:
                return NOT_ASKED

    def _named(self, peer: Peer) -> Asked:
        facts = self._processes.facts(peer.pid) if peer.alive and peer.pid else None
        if facts is None or facts.process is None:
            return Asked(Listening.ANSWERED)
        named = facts.uid == os.geteuid() and not self._processes.foreign(peer.pid)
        return Asked(Listening.ANSWERED, facts.process, named=named)


def _unverifiable(facts: Facts, evidence: str) -> Keeper:
    return Keeper(KeeperState.UNVERIFIABLE, facts.process, age=facts.age, evidence=evidence)
