"""One look at one session: its files and its processes become an `Observation`.

Facts only. What follows from them is decided elsewhere; nothing is changed here. The
previous look is the only memory: an entry that did not change keeps its age, a process
that was proven and is still the same stays proven.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from reconciler import launches
from reconciler.agents import AgentProbe, Agents, Sighting
from reconciler.facts import Processes
from reconciler.folder import Folder, file_id
from reconciler.identity import KNOWN_PROGRAMS, NOBODY, NOT_ASKED, Asked, Identity
from reconciler.layout import Role, check_sid, file_name
from reconciler.leftovers import Leftovers, leaves
from reconciler.observations import (
    Agent,
    Entry,
    EntryKind,
    Keeper,
    KeeperState,
    Leftover,
    Listening,
    Observation,
    ProcessId,
)
from reconciler.processes import SYSTEM
from reconciler.registry import Registry
from reconciler.sessions import Session


@dataclass(frozen=True, slots=True)
class Suspects:
    """What a walk over all processes has found, by session id: pids, nothing proven yet."""

    keepers: Mapping[str, Sequence[int]]
    marked: Mapping[str, Sequence[int]]

    @property
    def sids(self) -> frozenset[str]:
        """All sessions of which something was found."""
        return frozenset(self.keepers) | frozenset(self.marked)

    def news_for(self, row: Session, may_serve: Callable[[str, int], bool]) -> bool:
        """Whether a session should be looked at for what was found of it.

        What is marked is of interest only once its session has no keeper.

        Args:
            row: what is known of the session.
            may_serve: whether a keeper of that id may be one of this folder; asked of those
                that are not known.
        """
        sid, known = row.sid, row.keeper_pid
        if any(pid != known and may_serve(sid, pid) for pid in self.keepers.get(sid, ())):
            return True
        left = {left.process.pid for left in row.seen.leftovers} if row.seen else set()
        return known is None and set(self.marked.get(sid, ())) != left

    def look(self, probe: Probe, sid: str, before: Observation | None = None) -> Observation:
        """Look at one session, with what was found of it."""
        keepers, marked = self.keepers.get(sid, ()), self.marked.get(sid, ())
        return probe.look(sid, before, scanned=keepers, marked=marked)


NO_SUSPECTS = Suspects({}, {})


class Probe:
    """Looks at the sessions of one folder.

    Args:
        folder: the sessions folder, open.
        programs: base names of known keeper programs.
        registry: the dashboard's spawn registry, or None not to ask it.
        agent_probe: the caller's own word on agents, asked first.
        processes: how the system is asked.

    Attributes:
        folder: the folder.
        identity: the proofs that go with it.
        leftovers: finds what its sessions have started.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        programs: frozenset[str] = KNOWN_PROGRAMS,
        registry: Registry | None = None,
        agent_probe: AgentProbe | None = None,
        processes: Processes = SYSTEM,
    ) -> None:
        self.folder = folder
        self.identity = Identity(folder, programs, processes)
        self.leftovers = Leftovers(folder, programs, processes)
        self._agents = Agents(programs, registry, agent_probe, processes)
        self._processes = processes

    def look(
        self,
        sid: str,
        before: Observation | None = None,
        *,
        now: float | None = None,
        scanned: Iterable[int] = (),
        marked: Iterable[int] = (),
    ) -> Observation:
        """Look at one session now.

        Args:
            sid: the session's id.
            before: the look before this one, if there was one in this folder.
            now: monotonic seconds; the clock's own when left out.
            scanned: pids of keepers for this session that a `scan` has found.
            marked: pids that carry its marker, found by a scan right before that one.
        """
        check_sid(sid)
        scanned = tuple(scanned)
        now = time.monotonic() if now is None else now
        pid_file, socket, agent_file = self._entries(sid, before, now)
        claimed = self._claimed(sid, pid_file, before)
        asked = self._ask(sid, socket, claimed, before)
        keeper = self._keeper(sid, claimed, asked)
        rivals = self._rivals(
            sid, keeper, {*scanned, *(each.pid for each in _once_proven(before)), *_named(asked)}
        )
        if keeper.state in {KeeperState.NONE, KeeperState.RECYCLED}:
            keeper, *rivals = rivals or [self._without_proof(sid, before) or keeper]
        leftovers = self._left(sid, keeper, before, scanned, marked)
        agent = self._agents.find(Sighting(sid, now, keeper, pid_file, agent_file), before)
        seen = Observation(
            sid=sid,
            now=now,
            pid_file=pid_file,
            socket=socket,
            agent_file=agent_file,
            keeper=keeper,
            listening=asked.listening,
            # Not held twice: a daemon watches thousands.
            listener=keeper.process if asked.listener == keeper.process else asked.listener,
            agent=agent,
            rivals=tuple(rivals),
            remote=self.folder.remote,
            seen_alive=_seen_alive(keeper, pid_file, socket, before),
            leftovers=_without(leftovers, agent),
            leave=bool(leftovers) and leaves(self.folder, sid),
        )
        # While it is being cleaned up nobody asks, and each microsecond counts.
        asked_for = keeper.state is KeeperState.PROVEN or seen.over
        return self._with_note(seen, before) if asked_for else seen

    def _with_note(self, seen: Observation, before: Observation | None) -> Observation:
        """With the launch note: what is to become of a session once it is over."""
        status = None
        with contextlib.suppress(OSError):  # the folder is closed to us: its other names say so
            status = self.folder.status(file_name(Role.LAUNCH, seen.sid))
        if status is None:
            return seen
        known = before if before is not None and before.over == seen.over else None
        if known and not seen.over and known.note.file == file_id(status):
            return replace(seen, note=known.note, record=known.record)
        note, record = launches.look(self.folder, seen.sid, seen.now, over=seen.over)
        if known:
            note = _aged(note, known.note)
        return replace(seen, note=note, record=record)

    def scan(self) -> Mapping[str, list[int]]:
        """The pids of all processes that run a known keeper program, by session id."""
        return self.identity.scan()

    def scan_all(self) -> Suspects:
        """All that a walk over the processes can find.

        First what sessions have started, and then the keepers: so a keeper that lived when
        its session's processes were found is found, too.
        """
        marked = self.leftovers.scan()
        return Suspects(self.scan(), marked)

    def _left(
        self,
        sid: str,
        keeper: Keeper,
        before: Observation | None,
        scanned: Sequence[int],
        marked: Iterable[int],
    ) -> tuple[Leftover, ...]:
        """What the session has started, unless a keeper may live that cannot be proven."""
        known = before.leftovers if before is not None else ()
        pids = {*marked, *(leftover.process.pid for leftover in known)}
        if not pids:
            return ()
        if keeper.state is not KeeperState.PROVEN:
            hidden = any(self.identity.may_serve(sid, pid) for pid in scanned)
            if hidden or keeper.state is KeeperState.UNVERIFIABLE:
                return ()
        return self.leftovers.find(sid, keeper, pids)

    def _entries(
        self, sid: str, before: Observation | None, now: float
    ) -> tuple[Entry, Entry, Entry]:
        """The pid file first: a keeper binds its socket before it writes that."""
        pid_file = self._pid_entry(Role.PID_FILE, sid, before.pid_file if before else None, now)
        known = before.agent_file if before else None
        agent_file = self._pid_entry(Role.AGENT_PID_FILE, sid, known, now)
        if sys.platform == "win32":
            socket = Entry(EntryKind.ABSENT, now)
        else:
            socket = self.folder.socket_entry(file_name(Role.SOCKET, sid), now)
        return pid_file, _aged(socket, before.socket if before else None), agent_file

    def _pid_entry(self, role: Role, sid: str, before: Entry | None, now: float) -> Entry:
        return _aged(self.folder.pid_entry(file_name(role, sid), now, before=before), before)

    def _claimed(self, sid: str, pid_file: Entry, before: Observation | None) -> Keeper:
        """Who the pid file names."""
        if pid_file.kind is not EntryKind.PID:
            return NOBODY
        facts = self._processes.facts(pid_file.pid)
        if before is not None and facts.process is not None:
            known = before.keeper
            if known.state is KeeperState.PROVEN and known.process == facts.process:
                return replace(known, age=facts.age)
        return self.identity.identify(sid, pid_file.pid, facts)

    def _ask(self, sid: str, socket: Entry, claimed: Keeper, before: Observation | None) -> Asked:
        """Connect to the socket, unless it is known to be this proven keeper's."""
        if socket.kind is not EntryKind.SOCKET:
            return NOT_ASKED
        if (
            before is not None
            and claimed.state is KeeperState.PROVEN
            and before.socket.file == socket.file
            and before.listener == claimed.process
        ):
            return Asked(Listening.ANSWERED, before.listener, named=True)
        return self.identity.connect(sid)

    def _keeper(self, sid: str, claimed: Keeper, asked: Asked) -> Keeper:
        """The session's keeper: who the pid file names, or else who listens."""
        if claimed.state is KeeperState.PROVEN:
            return claimed
        if claimed.state is KeeperState.UNVERIFIABLE and claimed.process != asked.listener:
            return claimed
        return self.identity.listening_keeper(sid, asked) or claimed

    def _rivals(self, sid: str, keeper: Keeper, suspects: Iterable[int]) -> list[Keeper]:
        """Other keepers of this folder for the session, the oldest first."""
        known = keeper.process.pid if keeper.process else 0
        found = (self.identity.identify(sid, pid) for pid in suspects if pid != known)
        proven = [each for each in found if each.state is KeeperState.PROVEN]
        return sorted(proven, key=lambda each: -each.age)

    def _without_proof(self, sid: str, before: Observation | None) -> Keeper | None:
        """A keeper that was proven and lives on, though nothing proves it any more.

        Its files are gone, and its logs with them. It is not dead, and its agent no orphan.
        """
        for process in _once_proven(before):
            known = self.identity.identify(sid, process.pid)
            if known.state is KeeperState.UNVERIFIABLE and self._lives_on(process):
                return known
        return None

    def _lives_on(self, process: ProcessId) -> bool:
        """It is not about to be dead: then it has closed its files, and goes as it should."""
        facts = self._processes.facts(process.pid)
        return facts.process == process and not facts.dying


def _without(leftovers: tuple[Leftover, ...], agent: Agent) -> tuple[Leftover, ...]:
    return tuple(leftover for leftover in leftovers if leftover.process != agent.process)


def _aged(entry: Entry, before: Entry | None) -> Entry:
    if before is None or entry is before:
        return entry
    if (before.kind, before.file) == (entry.kind, entry.file):
        return replace(entry, since=before.since)
    return entry


def _named(asked: Asked) -> Iterable[int]:
    return (asked.listener.pid,) if asked.named and asked.listener else ()


def _once_proven(before: Observation | None) -> tuple[ProcessId, ...]:
    """The keepers that the look before has proven; files may be gone while they live."""
    keepers = (before.keeper, *before.rivals) if before else ()
    return tuple(
        each.process
        for each in keepers
        if each.state is KeeperState.PROVEN and each.process is not None
    )


def _seen_alive(keeper: Keeper, pid_file: Entry, socket: Entry, before: Observation | None) -> bool:
    """Whether this observer saw the keeper of these very files alive."""
    if keeper.state is KeeperState.PROVEN:
        return True
    if before is None or not before.seen_alive or before.pid_file.file != pid_file.file:
        return False
    return not socket.present or before.socket.file == socket.file
