"""What is seen, what is wanted, and what to do about it.

Pure: no clock, no file, no process is touched here. `decide` is the decision table of
the project; `SessionTable` keeps the newest row of each session in memory.

All times are seconds on a monotonic clock. Nothing here reads a wall clock: a clock that
was set must condemn nobody.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from reconciler.layout import Role
from reconciler.restarts import RestartLimits, RestartRecord, Step, next_step


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process and no other: a pid alone is used again by the kernel."""

    pid: int
    started: int
    """Clock ticks since boot (Linux), microseconds since 1970 (elsewhere)."""
    boot_id: str


@dataclass(frozen=True, slots=True)
class FileId:
    """One state of one directory entry, exact enough to be judged and then removed."""

    device: int
    inode: int
    mtime_ns: int
    size: int
    text: bytes = b""
    """What a pid file says, as far as it was read (64 bytes)."""


class EntryKind(enum.Enum):
    """What stands under one of a session's names."""

    ABSENT = "absent"
    SOCKET = "socket"
    PID = "pid"
    EMPTY = "empty"
    BROKEN = "broken"
    HOSTILE = "hostile"
    UNKNOWN = "unknown"
    NOTE = "note"
    """A launch note."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One look at one of a session's names.

    ``since`` is when the observer first saw the entry in this very state. It, and not
    the file's own time, tells an entry's age.
    """

    kind: EntryKind
    since: float
    file: FileId | None = None
    pid: int = 0
    detail: str = ""
    changed_ns: int = 0
    """When it changed last (``ctime``), if its content was read so much later that no change
    since can bear the same time; else 0."""

    @property
    def present(self) -> bool:
        """Whether anything stands there."""
        return self.kind is not EntryKind.ABSENT


class KeeperState(enum.Enum):
    """What is known of the process that a session's files claim."""

    NONE = "none"
    PROVEN = "proven"
    RECYCLED = "recycled"
    UNVERIFIABLE = "unverifiable"


@dataclass(frozen=True, slots=True)
class Keeper:
    """The keeper of a session, as far as it can be told."""

    state: KeeperState
    process: ProcessId | None = None
    ours: bool = False
    """It runs our program, so it understands SIGHUP as "bind again"."""
    age: float = 0.0
    """Seconds since the process started, by the kernel's boot clock."""
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A process that a session has started: it carries its marker, and is not its agent.

    It is left over once no keeper of the session lives.
    """

    process: ProcessId
    name: str
    """Its program's base name; its arguments may hold secrets."""


class Listening(enum.Enum):
    """What a connect to a session's socket said."""

    NOT_ASKED = "not_asked"
    REFUSED = "refused"
    ANSWERED = "answered"


class AgentState(enum.Enum):
    """What is known of a session's agent. No answer is UNKNOWN, not GONE."""

    ALIVE = "alive"
    GONE = "gone"
    NEVER_SEEN = "never_seen"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Agent:
    """The agent of a session, as far as it can be told."""

    state: AgentState
    since: float
    process: ProcessId | None = None
    proven: bool = False
    """It is known to be this session's agent, so it may be signalled."""
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at one session: facts and since when they hold, no judgement."""

    sid: str
    now: float
    pid_file: Entry
    socket: Entry
    agent_file: Entry
    keeper: Keeper
    listening: Listening
    listener: ProcessId | None
    """Who answers on the socket; None when nobody was asked, or nobody can be named."""
    agent: Agent
    rivals: tuple[Keeper, ...] = ()
    """Other proven keepers of this folder for the same session."""
    remote: bool = False
    """The folder lies on a network filesystem: the keeper may live on another host."""
    seen_alive: bool = False
    """This observer itself saw the keeper of these files alive."""
    leftovers: tuple[Leftover, ...] = ()
    """What it has started, as far as a scan has looked for it."""
    leave: bool = False
    """The user wishes that what it has started is left alone."""
    note: Entry = Entry(EntryKind.ABSENT, 0.0)
    """Its launch note, looked for while its keeper lives and once it is over."""
    record: RestartRecord | None = None
    """What that says of restarts, if it can be read; how it ended is known once it is over."""

    @property
    def entries(self) -> tuple[tuple[Role, Entry], ...]:
        """The files that claim a keeper, in the order of their removal."""
        return (
            (Role.SOCKET, self.socket),
            (Role.AGENT_PID_FILE, self.agent_file),
            (Role.PID_FILE, self.pid_file),
        )

    @property
    def empty(self) -> bool:
        """Nothing of the session is there."""
        return self.over and not self.leftovers and not self.note.present

    @property
    def over(self) -> bool:
        """Neither a claim nor a keeper nor an agent is there, and that is known."""
        return (
            not any(entry.present for _, entry in self.entries)
            and self.keeper.process is None
            and self.agent.state in {AgentState.GONE, AgentState.NEVER_SEEN}
        )

    @property
    def watched(self) -> frozenset[ProcessId]:
        """The processes whose exit should bring the next look."""
        alive = (
            self.keeper.process if self.keeper.state is not KeeperState.NONE else None,
            self.agent.process if self.agent.state is AgentState.ALIVE else None,
            *(rival.process for rival in self.rivals),
            *(leftover.process for leftover in self.leftovers[:1]),  # the next one after it
        )
        return frozenset(process for process in alive if process is not None)


class Desired(enum.Enum):
    """What is wanted of a session."""

    AS_FOUND = "as_found"
    """Found on disk: wanted as long as its keeper lives."""
    PRESENT = "present"
    ABSENT = "absent"


class Verdict(enum.Enum):
    """The rows of the decision table. Their values are what users see as ``phase``."""

    ABSENT = "absent"
    STARTING = "starting"
    READY = "ready"
    STALE = "stale"
    ADOPT = "adopt"
    ORPHAN = "orphan"
    ORPHAN_AGENT = "orphan_agent"
    UNREACHABLE = "unreachable"
    USURPED = "usurped"
    LOST = "lost"
    STOPPING = "stopping"
    MISSING = "missing"
    REFUSED = "refused"
    UNVERIFIABLE = "unverifiable"
    LEFTOVERS = "leftovers"
    RESTARTING = "restarting"
    GIVEN_UP = "given_up"


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove these entries, if they are still what was judged."""

    entries: tuple[tuple[Role, FileId], ...]


@dataclass(frozen=True, slots=True)
class StopKeeper:
    """End a keeper by the ladder; ``at_once``: by SIGKILL alone.

    A usurped keeper of another make is killed at once, since its own end would delete
    the files of the keeper that took its place.
    """

    process: ProcessId
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class StopAgent:
    """End an agent that outlived its keeper."""

    process: ProcessId


@dataclass(frozen=True, slots=True)
class StopLeftovers:
    """End what a session has started and left behind."""

    processes: tuple[ProcessId, ...]


@dataclass(frozen=True, slots=True)
class Rebind:
    """Tell a keeper of ours to make its socket and pid file again."""

    process: ProcessId


@dataclass(frozen=True, slots=True)
class Adopt:
    """Write the pid file of a keeper that listens but is not named by it."""

    process: ProcessId
    replaced: FileId | None


@dataclass(frozen=True, slots=True)
class Restart:
    """Start a session again, if its launch note still is what was judged."""

    note: FileId


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Note down that a session is started no more."""

    note: FileId


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove the launch note of a session that is over for good."""

    note: FileId


Stop = StopKeeper | StopAgent | StopLeftovers
"""What takes time: a process is given a chance to end by itself."""

Instant = Remove | Rebind | Adopt | GiveUp | Forget

Action = Instant | Stop | Restart


@dataclass(frozen=True, slots=True)
class Plan:
    """What `decide` answers.

    One step only: after its actions the session is looked at again, and the next step
    follows from what is then to be seen.
    """

    verdict: Verdict
    reason: str
    """A constant phrase; figures and names stand in the observation."""
    actions: tuple[Action, ...] = ()
    again_after: float | None = None
    """Seconds until the next look if nothing happens; None: the resync is enough."""


_NOTHING = Plan(Verdict.ABSENT, "nothing is there")


AboutLeftovers = Literal["report", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What decisions depend on: times in seconds, the design's numbers, and one choice."""

    settle: float = 2.0
    """How long files without a keeper's proof must stay as they are to count as left."""
    start_grace: float = 5.0
    """How long a keeper may take until its agent is seen."""
    orphan_grace: float = 0.5
    """How long a keeper may outlive its agent; a healthy one ends by itself."""
    lost_grace: float = 30.0
    """How long a keeper of another make may take until its first file: it is not asked to
    bind, but ended. Three times as long as a spawn waits for one."""
    rebind_grace: float = 1.0
    """How long a keeper may take to bind again after it was told to."""
    leftovers: AboutLeftovers = "report"
    """What is done about what a session has left behind. A `stop` always ends it."""


_LIMITS = RestartLimits()


def decide(
    seen: Observation, desired: Desired, policy: Policy, limits: RestartLimits = _LIMITS
) -> Plan:
    """Judge one session. Pure; one row of the decision table a ``return``.

    Args:
        seen: the newest look.
        desired: what is wanted of the session.
        policy: the times to go by.
        limits: how fast, and how often, sessions that have a restart policy are started again.
    """
    if hostile := _details(seen, EntryKind.HOSTILE):
        return Plan(Verdict.REFUSED, hostile)
    if unreadable := _details(seen, EntryKind.UNKNOWN):
        return Plan(Verdict.UNVERIFIABLE, unreadable)
    match seen.keeper.state:
        case KeeperState.PROVEN:
            return _decide_living(seen, desired, policy)
        case KeeperState.UNVERIFIABLE:
            return Plan(Verdict.UNVERIFIABLE, seen.keeper.evidence)
        case KeeperState.NONE | KeeperState.RECYCLED:
            return _decide_dead(seen, desired, policy, limits)


def _details(seen: Observation, kind: EntryKind) -> str:
    return ", ".join(
        f"{role.value}: {entry.detail}" for role, entry in seen.entries if entry.kind is kind
    )


def _decide_living(seen: Observation, desired: Desired, policy: Policy) -> Plan:
    """The rows of a keeper that lives and is proven."""
    keeper = _living(seen.keeper)
    if seen.rivals:
        return _decide_usurped(seen, keeper, desired, policy)
    if seen.listener is not None and seen.listener != keeper:
        return Plan(Verdict.UNVERIFIABLE, "another process listens on the keeper's socket")
    if desired is Desired.ABSENT:
        return _unwanted(keeper)
    if seen.agent.state is AgentState.GONE:
        return _decide_orphan(seen, keeper, policy)
    if not seen.socket.present or seen.listening is Listening.REFUSED:
        return _decide_unreachable(seen, keeper, policy)
    if seen.pid_file.pid != keeper.pid:
        return _decide_unnamed(seen, keeper, policy)
    if seen.agent.state is AgentState.NEVER_SEEN and seen.keeper.age < policy.start_grace:
        wait = policy.start_grace - seen.keeper.age
        return Plan(Verdict.STARTING, "no agent seen yet", again_after=wait)
    return Plan(Verdict.READY, "keeper proven")


def _living(keeper: Keeper) -> ProcessId:
    if keeper.process is None:
        raise ValueError(f"a proven keeper has a process, this one has none: {keeper}")
    return keeper.process


def _unwanted(keeper: ProcessId) -> Plan:
    return Plan(Verdict.STOPPING, "not wanted any more", (StopKeeper(keeper),))


def _decide_usurped(seen: Observation, keeper: ProcessId, desired: Desired, policy: Policy) -> Plan:
    """Two keepers for one session: the one that owns the listening socket stays."""
    keepers = (seen.keeper, *seen.rivals)
    young = policy.start_grace - min(each.age for each in keepers)
    if young > 0:
        return Plan(Verdict.USURPED, "a second keeper may be ending", again_after=young)
    if not seen.socket.present and desired is Desired.ABSENT:
        return _unwanted(keeper)
    if not seen.socket.present:
        return _decide_unreachable(seen, keeper, policy)
    losers = tuple(each for each in keepers if each.process != seen.listener)
    if len(losers) == len(keepers):
        return Plan(Verdict.UNVERIFIABLE, "two keepers, and neither is known to listen")
    stops = tuple(StopKeeper(_living(loser), at_once=not loser.ours) for loser in losers)
    return Plan(Verdict.USURPED, "another keeper owns the socket", stops)


def _decide_orphan(seen: Observation, keeper: ProcessId, policy: Policy) -> Plan:
    wait = policy.orphan_grace - (seen.now - seen.agent.since)
    if seen.agent_file.kind is not EntryKind.PID:  # a child of its youth need not be its agent
        wait = max(wait, policy.start_grace - seen.keeper.age)
    if wait > 0:
        return Plan(Verdict.ORPHAN, "agent gone, keeper should end by itself", again_after=wait)
    return Plan(Verdict.ORPHAN, "agent gone, keeper lives on", (StopKeeper(keeper),))


def _decide_unreachable(seen: Observation, keeper: ProcessId, policy: Policy) -> Plan:
    """The keeper lives, and its socket is gone or dead."""
    lost = not seen.pid_file.present and not seen.socket.present
    verdict = Verdict.LOST if lost else Verdict.UNREACHABLE
    young = policy.start_grace - seen.keeper.age
    if lost and young > 0:
        return Plan(Verdict.STARTING, "no socket yet", again_after=young)
    unsettled = policy.settle - (seen.now - seen.socket.since)
    if unsettled > 0:
        return Plan(Verdict.STARTING, "no socket that answers yet", again_after=unsettled)
    if seen.keeper.ours:
        return Plan(verdict, "keeper without a socket", (Rebind(keeper),), policy.rebind_grace)
    if lost and (slow := policy.lost_grace - seen.keeper.age) > 0:
        return Plan(Verdict.STARTING, "no file yet", again_after=slow)
    if lost:
        return Plan(verdict, "keeper without any file", (StopKeeper(keeper),))
    return Plan(verdict, "keeper without a socket, and it knows no way to bind again")


def _decide_unnamed(seen: Observation, keeper: ProcessId, policy: Policy) -> Plan:
    """The keeper lives and listens, but the pid file does not name it."""
    unsettled = policy.settle - (seen.now - max(seen.socket.since, seen.pid_file.since))
    if unsettled > 0:
        return Plan(Verdict.STARTING, "pid file to be written", again_after=unsettled)
    reason = "keeper listens, its pid file does not name it"
    if seen.keeper.ours:
        return Plan(Verdict.ADOPT, reason, (Rebind(keeper),), policy.rebind_grace)
    if seen.listener != keeper:  # the pid file may be that of who does listen
        return Plan(Verdict.UNVERIFIABLE, "the socket answers, by whom cannot be told")
    return Plan(Verdict.ADOPT, reason, (Adopt(keeper, seen.pid_file.file),))


def _decide_dead(
    seen: Observation, desired: Desired, policy: Policy, limits: RestartLimits
) -> Plan:
    """The rows in which no keeper is proven to live."""
    if seen.over:
        return _decide_over(seen, desired, policy, limits)
    if seen.listening is Listening.ANSWERED:
        return Plan(Verdict.UNVERIFIABLE, "the socket answers, by whom cannot be told")
    if seen.socket.present and seen.listening is not Listening.REFUSED:
        return Plan(Verdict.UNVERIFIABLE, "the socket could not be asked")
    if seen.remote and not seen.seen_alive:
        return Plan(Verdict.UNVERIFIABLE, "network filesystem: the keeper may be on another host")
    if (unsettled := _unsettled(seen, policy)) > 0:
        return Plan(Verdict.STARTING, "a keeper may be starting", again_after=unsettled)
    if seen.agent.state is AgentState.ALIVE and seen.agent.proven and seen.agent.process:
        stop = (StopAgent(seen.agent.process),)
        return Plan(Verdict.ORPHAN_AGENT, "keeper dead, its agent lives on", stop)
    if seen.agent.state in {AgentState.ALIVE, AgentState.UNKNOWN}:
        return Plan(Verdict.UNVERIFIABLE, f"keeper dead, {seen.agent.evidence}")
    entries = tuple((role, entry.file) for role, entry in seen.entries if entry.file)
    return Plan(Verdict.STALE, _why_stale(seen), (Remove(entries),))


def _decide_over(
    seen: Observation, desired: Desired, policy: Policy, limits: RestartLimits
) -> Plan:
    """Neither files nor processes claim the session any more."""
    if seen.note.present and seen.record is None:
        unreadable = seen.note.kind is EntryKind.UNKNOWN
        verdict = Verdict.UNVERIFIABLE if unreadable else Verdict.REFUSED
        return Plan(verdict, f"{Role.LAUNCH.value}: {seen.note.detail}")
    to_stop = seen.leftovers and policy.leftovers == "stop" and not seen.leave
    if seen.record and seen.note.file and desired is not Desired.ABSENT and not to_stop:
        return _decide_restart(seen, seen.record, seen.note.file, limits)
    if seen.leftovers:
        return _decide_leftovers(seen, policy)
    if desired is Desired.PRESENT:
        return Plan(Verdict.MISSING, "wanted, and nothing is there")
    return _NOTHING


def _decide_restart(
    seen: Observation, record: RestartRecord, note: FileId, limits: RestartLimits
) -> Plan:
    """The session is over, and its launch note asks for a judgement."""
    if seen.remote and not record.this_boot:
        return Plan(Verdict.UNVERIFIABLE, "network filesystem: another host may have started it")
    step, reason, wait = next_step(record, seen.now - seen.note.since, seen.now, limits)
    match step:
        case Step.RESTART:
            return Plan(Verdict.RESTARTING, reason, (Restart(note),))
        case Step.WAIT:
            return Plan(Verdict.RESTARTING, reason, again_after=wait)
        case Step.GIVE_UP:
            return Plan(Verdict.GIVEN_UP, reason, (GiveUp(note),))
        case Step.REST:
            return Plan(Verdict.GIVEN_UP, reason)
        case Step.LINGER:
            return Plan(Verdict.STOPPING, reason, again_after=wait)
        case Step.FORGET:
            return Plan(Verdict.STOPPING, reason, (Forget(note),))


def _decide_leftovers(seen: Observation, policy: Policy) -> Plan:
    """The session is over, and what it has started is not."""
    if seen.leave:
        return Plan(Verdict.LEFTOVERS, "left alone on purpose")
    stop = StopLeftovers(tuple(leftover.process for leftover in seen.leftovers))
    actions = (stop,) if policy.leftovers == "stop" else ()
    return Plan(Verdict.LEFTOVERS, "session over, what it started lives on", actions)


def _unsettled(seen: Observation, policy: Policy) -> float:
    """Seconds until the files of a dead or unnamed keeper count as left behind.

    A pid file that names a dead process condemns the files that were there when it was
    written, at once. A socket made after it may be a new keeper's, between its bind and
    its listen; a file without such a pid file may be one that is just being born.
    """
    if seen.pid_file.kind is EntryKind.PID:
        if seen.seen_alive or not _newer(seen.socket, seen.pid_file):
            return 0.0
        young = seen.socket.since
    else:
        ages = [entry.since for _, entry in seen.entries if entry.present]
        young = max(ages, default=-math.inf)
    return policy.settle - (seen.now - young)


def _newer(entry: Entry, than: Entry) -> bool:
    if entry.file is None or than.file is None:
        return False
    return entry.file.mtime_ns > than.file.mtime_ns


def _why_stale(seen: Observation) -> str:
    match seen.pid_file.kind:
        case EntryKind.PID if seen.keeper.state is KeeperState.RECYCLED:
            return "pid recycled by another process"
        case EntryKind.PID:
            return "keeper dead"
        case EntryKind.EMPTY | EntryKind.BROKEN:
            return f"pid file {seen.pid_file.kind.value} and old"
        case _:
            return "no pid file, and nobody listens"


@dataclass(frozen=True, slots=True)
class Session:
    """A session as it stands in the table: desired state, actual state, judgement."""

    sid: str
    desired: Desired = Desired.AS_FOUND
    seen: Observation | None = None
    plan: Plan | None = None

    @property
    def phase(self) -> Verdict:
        """The newest verdict; STARTING before the first look."""
        return self.plan.verdict if self.plan else Verdict.STARTING

    @property
    def reason(self) -> str:
        """Why, in a constant phrase."""
        return self.plan.reason if self.plan else "not looked at yet"

    @property
    def keeper_pid(self) -> int | None:
        """The proven keeper's pid, or None."""
        if self.seen is None or self.seen.keeper.state is not KeeperState.PROVEN:
            return None
        return self.seen.keeper.process.pid if self.seen.keeper.process else None

    @property
    def agent_pid(self) -> int | None:
        """The living agent's pid, or None."""
        if self.seen is None or self.seen.agent.state is not AgentState.ALIVE:
            return None
        return self.seen.agent.process.pid if self.seen.agent.process else None


Listener = Callable[[Session], None]


class SessionTable(Mapping[str, Session]):
    """The desired and the actual state of every known session, in memory.

    A mapping from session id to `Session`. It holds nothing that a fresh look at the
    world would not bring back, but for what was asked of it through the API.

    Args:
        complain: called with what a subscriber has raised; the others are told all the same.
    """

    def __init__(self, complain: Callable[[Exception], None] = lambda _: None) -> None:
        self._complain = complain
        self._rows: dict[str, Session] = {}
        self._listeners: dict[object, Listener] = {}

    def __getitem__(self, sid: str) -> Session:
        return self._rows[sid]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, sid: str) -> Session:
        """The row of ``sid``; for one that is not in the table a row that says so."""
        return self._rows.get(sid) or Session(sid, plan=_NOTHING)

    def want(self, sid: str, desired: Desired) -> None:
        """Say what is wanted of a session."""
        self._rows[sid] = replace(self._rows.get(sid) or Session(sid), desired=desired)

    def reset(self, sid: str) -> None:
        """Forget what was seen of a session; what is wanted of it stays."""
        row = self.row(sid)
        if row.desired is Desired.AS_FOUND:
            self._rows.pop(sid, None)
        else:
            self._rows[sid] = Session(sid, row.desired)
        self._tell(row, self.row(sid))

    def record(self, seen: Observation, plan: Plan) -> bool:
        """Take in a look and its judgement; tell subscribers if the judgement is new.

        A session of which nothing is left, and nothing is wanted, leaves the table. A wish
        that it were absent ends when it is over: the next one of its name is not meant.

        Returns:
            Whether the verdict or its reason differs from the one before, or there are
            leftovers that were not known.
        """
        before = self.row(seen.sid)
        after = Session(seen.sid, before.desired, seen, plan)
        if plan.verdict is Verdict.ABSENT:
            after = replace(after, desired=Desired.AS_FOUND)
            self._rows.pop(seen.sid, None)
        else:
            if plan.verdict is Verdict.LEFTOVERS and after.desired is Desired.ABSENT:
                after = replace(after, desired=Desired.AS_FOUND)
            self._rows[seen.sid] = after
        self._tell(before, after)
        known = before.seen.leftovers if before.seen else ()
        return _judgement(before) != _judgement(after) or (
            plan.verdict is Verdict.LEFTOVERS and not set(seen.leftovers) <= set(known)
        )

    def _tell(self, before: Session, after: Session) -> None:
        if _face(before) != _face(after):
            for listener in tuple(self._listeners.values()):
                try:
                    listener(after)
                except Exception as error:  # noqa: BLE001 - a subscriber's trouble is its own
                    self._complain(error)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with each changed row; the returned callable ends that."""
        key = object()
        self._listeners[key] = listener
        return lambda: (self._listeners.pop(key, None), None)[1]


def _judgement(session: Session) -> tuple[object, ...]:
    return session.phase, session.reason


def _face(session: Session) -> tuple[object, ...]:
    """What a reader of the table can tell two rows apart by."""
    record = session.seen.record if session.seen else None
    kept = (record.policy, record.restarts) if record else ()
    return (*_judgement(session), session.keeper_pid, session.agent_pid, kept)
