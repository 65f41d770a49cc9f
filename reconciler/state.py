"""What is wanted of a session, and what follows from what is seen of it.

Pure: no clock, no file, no process is touched here. `decide` is the decision table of
the project: an `Observation` in, a `Plan` out.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Literal

from reconciler.layout import Role
from reconciler.observations import (
    AgentState,
    Entry,
    EntryKind,
    FileId,
    Keeper,
    KeeperState,
    Listening,
    Observation,
    ProcessId,
)
from reconciler.plans import (
    NOTHING_THERE,
    Adopt,
    Forget,
    GiveUp,
    Plan,
    Rebind,
    Remove,
    Restart,
    StopAgent,
    StopKeeper,
    StopLeftovers,
    Verdict,
)
from reconciler.restarts import RestartLimits, RestartRecord, Step, next_step


class Desired(enum.Enum):
    """What is wanted of a session."""

    AS_FOUND = "as_found"
    """Found on disk: wanted as long as its keeper lives."""
    PRESENT = "present"
    ABSENT = "absent"


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
_READY = Plan(Verdict.READY, "keeper proven")  # one for all the sessions that are


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
    kinds = [entry.kind for _, entry in seen.entries]
    if EntryKind.HOSTILE in kinds:
        return Plan(Verdict.REFUSED, _details(seen, EntryKind.HOSTILE))
    if EntryKind.UNKNOWN in kinds:
        return Plan(Verdict.UNVERIFIABLE, _details(seen, EntryKind.UNKNOWN))
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
    return _READY


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
    return NOTHING_THERE


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
