from __future__ import annotations

from dataclasses import replace

import pytest

from reconciler.layout import Role
from reconciler.observations import (
    Agent,
    AgentState,
    Entry,
    EntryKind,
    FileId,
    Keeper,
    KeeperState,
    Leftover,
    Listening,
    Observation,
    ProcessId,
)
from reconciler.plans import (
    Action,
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
from reconciler.restarts import Ending, RestartLimits, RestartPolicy, RestartRecord
from reconciler.sessions import Session, SessionTable
from reconciler.state import Desired, Policy, decide

NOW = 1000.0
OLD = 100.0
"""An age, in seconds, beyond every time of the policy."""
POLICY = Policy()  # settle 2 s, start grace 5 s, orphan grace 0.5 s, rebind grace 1 s

KEEPER = ProcessId(100, 1, "boot")
AGENT = ProcessId(101, 2, "boot")
RIVAL = ProcessId(200, 3, "boot")
STRANGER = ProcessId(300, 4, "boot")

WRITTEN = 1_000_000
SOCKET_FILE = FileId(8, 1, WRITTEN, 0)
PID_FILE = FileId(8, 2, WRITTEN, 3, b"100")
AGENT_FILE = FileId(8, 3, WRITTEN, 3, b"101")
EMPTY_FILE = FileId(8, 2, WRITTEN, 0)

ABSENT = Entry(EntryKind.ABSENT, NOW - OLD)
SOCKET = Entry(EntryKind.SOCKET, NOW - OLD, SOCKET_FILE)
PID = Entry(EntryKind.PID, NOW - OLD, PID_FILE, KEEPER.pid)
EMPTY = Entry(EntryKind.EMPTY, NOW - OLD, EMPTY_FILE)
BROKEN = Entry(EntryKind.BROKEN, NOW - OLD, EMPTY_FILE, detail="not a pid")
AGENT_PID = Entry(EntryKind.PID, NOW - OLD, AGENT_FILE, AGENT.pid)
HOSTILE = Entry(EntryKind.HOSTILE, NOW - OLD, detail="a FIFO")
UNREADABLE = Entry(EntryKind.UNKNOWN, NOW - OLD, detail="cannot read it")
OTHERS_PID = replace(PID, pid=STRANGER.pid)

NONE = Keeper(KeeperState.NONE)
OURS = Keeper(KeeperState.PROVEN, KEEPER, ours=True, age=OLD, evidence="ours")
OTHER = Keeper(KeeperState.PROVEN, KEEPER, ours=False, age=OLD, evidence="node")
RECYCLED = Keeper(KeeperState.RECYCLED, STRANGER, age=OLD, evidence="sleep")
CANNOT_TELL = Keeper(KeeperState.UNVERIFIABLE, STRANGER, age=OLD, evidence="hidden")
SECOND = Keeper(KeeperState.PROVEN, RIVAL, ours=False, age=OLD, evidence="node")

ALIVE = Agent(AgentState.ALIVE, NOW - OLD, AGENT, proven=True, evidence="agent outlived its keeper")
MAYBE = Agent(AgentState.UNKNOWN, NOW - OLD, evidence="process 101 may be its agent")
UNPROVEN = Agent(AgentState.ALIVE, NOW - OLD, AGENT, evidence="the probe says so")
GONE = Agent(AgentState.GONE, NOW - OLD, evidence="gone")
NEVER = Agent(AgentState.NEVER_SEEN, NOW - OLD)

REMOVE_PID = Remove(((Role.PID_FILE, PID_FILE),))
REMOVE_SOCKET = Remove(((Role.SOCKET, SOCKET_FILE),))
REMOVE_ALL = Remove(
    ((Role.SOCKET, SOCKET_FILE), (Role.AGENT_PID_FILE, AGENT_FILE), (Role.PID_FILE, PID_FILE))
)
LEFT = (Leftover(STRANGER, "sleep"),)
STOP_LEFT = StopLeftovers((STRANGER,))
V = Verdict


def aged(entry: Entry, seconds: float) -> Entry:
    return replace(entry, since=NOW - seconds)


def newer(entry: Entry) -> Entry:
    """Made later than the pid file, as their own times say."""
    assert entry.file is not None
    return replace(entry, file=replace(entry.file, mtime_ns=WRITTEN + 1))


def healthy(
    *,
    pid_file: Entry = PID,
    socket: Entry = SOCKET,
    agent_file: Entry = AGENT_PID,
    keeper: Keeper = OURS,
    listening: Listening = Listening.ANSWERED,
    listener: ProcessId | None = KEEPER,
    agent: Agent = ALIVE,
    rivals: tuple[Keeper, ...] = (),
    remote: bool = False,
    seen_alive: bool = True,
) -> Observation:
    """A session in order, but for what is said otherwise."""
    return Observation(
        sid="s1",
        now=NOW,
        pid_file=pid_file,
        socket=socket,
        agent_file=agent_file,
        keeper=keeper,
        listening=listening,
        listener=listener,
        agent=agent,
        rivals=rivals,
        remote=remote,
        seen_alive=seen_alive,
    )


def left(
    *,
    pid_file: Entry = PID,
    socket: Entry = SOCKET,
    agent_file: Entry = AGENT_PID,
    keeper: Keeper = NONE,
    listening: Listening | None = None,
    listener: ProcessId | None = None,
    agent: Agent = NEVER,
    remote: bool = False,
    seen_alive: bool = False,
) -> Observation:
    """What a dead keeper has left, found for the first time, but for what is said otherwise."""
    asked = Listening.REFUSED if socket.kind is EntryKind.SOCKET else Listening.NOT_ASKED
    return healthy(
        pid_file=pid_file,
        socket=socket,
        agent_file=agent_file,
        keeper=keeper,
        listening=listening or asked,
        listener=listener,
        agent=agent,
        remote=remote,
        seen_alive=seen_alive,
    )


def nothing(*, keeper: Keeper = NONE, agent: Agent = NEVER) -> Observation:
    return left(pid_file=ABSENT, socket=ABSENT, agent_file=ABSENT, keeper=keeper, agent=agent)


def over(*, leave: bool = False) -> Observation:
    """A session of which only what it had started is there."""
    return replace(nothing(), leftovers=LEFT, leave=leave)


NOTE_FILE = FileId(8, 4, WRITTEN, 200)
AGAIN, GIVE_UP, FORGET = Restart(NOTE_FILE), GiveUp(NOTE_FILE), Forget(NOTE_FILE)


def kept(
    ending: Ending,
    policy: RestartPolicy = "always",
    *,
    after: float = OLD,
    tries: tuple[float, ...] = (),
    this_boot: bool = True,
    given_up: bool = False,
) -> Observation:
    """A session with a restart policy that has been over for some seconds.

    ``tries`` are its restarts, in seconds before it was over.
    """
    ended = NOW - after
    restarts = tuple(ended - before for before in tries)
    note = Entry(EntryKind.NOTE, ended, NOTE_FILE)
    record = RestartRecord(policy, this_boot, restarts, given_up, ending)
    return replace(nothing(), note=note, record=record)


def fileless(*, keeper: Keeper, agent: Agent = ALIVE) -> Observation:
    """A keeper that a scan of processes has found, without any file."""
    return healthy(
        pid_file=ABSENT,
        socket=ABSENT,
        agent_file=ABSENT,
        keeper=keeper,
        listening=Listening.NOT_ASKED,
        listener=None,
        agent=agent,
    )


def young(keeper: Keeper, age: float) -> Keeper:
    return replace(keeper, age=age)


Row = tuple[str, Observation, Verdict, tuple[Action, ...], float | None]
FOUND = Desired.AS_FOUND

# What is seen, the verdict, what is done, and seconds until the next look.
TABLE: tuple[Row, ...] = (
    # starting: a socket without a pid file, or an empty or broken one, younger than settle
    ("starting, bare socket", left(pid_file=ABSENT, agent_file=ABSENT, socket=aged(SOCKET, 0)),
     V.STARTING, (), 2.0),
    ("starting, bare socket, nearly settled",
     left(pid_file=ABSENT, agent_file=ABSENT, socket=aged(SOCKET, 1.75)), V.STARTING, (), 0.25),
    ("starting, empty pid file", left(pid_file=aged(EMPTY, 0.5)), V.STARTING, (), 1.5),
    ("starting, broken pid file", left(pid_file=aged(BROKEN, 0.5)), V.STARTING, (), 1.5),
    ("starting, old empty pid file, young socket",
     left(pid_file=EMPTY, socket=aged(SOCKET, 1.0)), V.STARTING, (), 1.0),
    ("starting, only an agent pid file",
     left(pid_file=ABSENT, socket=ABSENT, agent_file=aged(AGENT_PID, 1.0)), V.STARTING, (), 1.0),
    ("starting, old pid file names a dead one, the socket is newer and young",
     left(socket=aged(newer(SOCKET), 0.5)), V.STARTING, (), 1.5),
    ("starting, the same with a recycled pid",
     left(socket=aged(newer(SOCKET), 0.5), keeper=RECYCLED), V.STARTING, (), 1.5),
    # booting: the keeper is proven, no agent yet, younger than the start grace
    ("booting", healthy(keeper=young(OTHER, 1.0), agent=NEVER), V.STARTING, (), 4.0),
    ("booting, before its socket", fileless(keeper=young(OURS, 1.0), agent=NEVER),
     V.STARTING, (), 4.0),
    ("booting, before its pid file",
     healthy(pid_file=aged(ABSENT, 1.5), socket=aged(SOCKET, 0.5), keeper=young(OTHER, 1)),
     V.STARTING, (), 1.5),
    ("booting, the grace is over", healthy(keeper=young(OTHER, 5.0), agent=NEVER),
     V.READY, (), None),
    # ready
    ("ready, ours", healthy(), V.READY, (), None),
    ("ready, another make", healthy(keeper=OTHER), V.READY, (), None),
    ("ready, young with its agent", healthy(keeper=young(OURS, 0.1)), V.READY, (), None),
    ("ready, agent not known", healthy(agent=MAYBE), V.READY, (), None),
    ("ready, agent alive by word alone", healthy(agent=UNPROVEN), V.READY, (), None),
    ("ready, never seen an agent for long", healthy(agent=NEVER), V.READY, (), None),
    ("ready, stopped keeper with a full backlog", healthy(listener=None), V.READY, (), None),
    ("ready, socket not asked", healthy(listening=Listening.NOT_ASKED, listener=None),
     V.READY, (), None),
    ("ready, on a network filesystem", healthy(remote=True), V.READY, (), None),
    # stale: dead, recycled, or broken and old; and the socket, if any, refuses
    ("stale, dead", left(), V.STALE, (REMOVE_ALL,), None),
    ("stale, dead a moment ago, seen alive before",
     left(pid_file=aged(PID, 0), socket=aged(SOCKET, 0), agent=GONE, seen_alive=True),
     V.STALE, (REMOVE_ALL,), None),
    ("stale, found, pid file not older than its socket",
     left(pid_file=aged(PID, 0), socket=aged(SOCKET, 0)), V.STALE, (REMOVE_ALL,), None),
    ("stale, the socket is newer, and settled", left(socket=aged(newer(SOCKET), 2.0)),
     V.STALE, (replace(REMOVE_ALL, entries=(
         (Role.SOCKET, replace(SOCKET_FILE, mtime_ns=WRITTEN + 1)), *REMOVE_ALL.entries[1:])),),
     None),
    ("stale, recycled", left(keeper=RECYCLED), V.STALE, (REMOVE_ALL,), None),
    ("stale, pid file alone", left(socket=ABSENT, agent_file=ABSENT), V.STALE, (REMOVE_PID,), None),
    ("stale, empty and settled", left(pid_file=aged(EMPTY, 2.0), socket=ABSENT, agent_file=ABSENT),
     V.STALE, (Remove(((Role.PID_FILE, EMPTY_FILE),)),), None),
    ("stale, broken and old", left(pid_file=BROKEN, socket=ABSENT, agent_file=ABSENT),
     V.STALE, (Remove(((Role.PID_FILE, EMPTY_FILE),)),), None),
    ("stale, its socket has gone a moment ago",
     left(socket=aged(ABSENT, 0), agent_file=ABSENT), V.STALE, (REMOVE_PID,), None),
    ("stale, agent known gone", left(agent=GONE), V.STALE, (REMOVE_ALL,), None),
    ("stale, network filesystem, but seen alive here", left(remote=True, seen_alive=True),
     V.STALE, (REMOVE_ALL,), None),
    # bare socket
    ("bare socket, refuses, settled",
     left(pid_file=ABSENT, agent_file=ABSENT, socket=aged(SOCKET, 2.0)),
     V.STALE, (REMOVE_SOCKET,), None),
    ("bare socket, answered by another make", healthy(pid_file=ABSENT, keeper=OTHER),
     V.ADOPT, (Adopt(KEEPER, None),), None),
    ("bare socket, answered by ours", healthy(pid_file=ABSENT), V.ADOPT, (Rebind(KEEPER),), 1.0),
    ("bare socket, answered by nobody that can be named",
     left(pid_file=ABSENT, listening=Listening.ANSWERED), V.UNVERIFIABLE, (), None),
    ("adopt, the pid file names another", healthy(pid_file=OTHERS_PID, keeper=OTHER),
     V.ADOPT, (Adopt(KEEPER, PID_FILE),), None),
    ("adopt, the pid file is empty and settled",
     healthy(pid_file=aged(EMPTY, 2.0), keeper=OTHER), V.ADOPT, (Adopt(KEEPER, EMPTY_FILE),), None),
    ("adopt, not before the pid file has settled",
     healthy(pid_file=aged(EMPTY, 1.0), keeper=OTHER), V.STARTING, (), 1.0),
    ("adopt, not where who answers cannot be named",
     healthy(pid_file=OTHERS_PID, keeper=OTHER, listener=None), V.UNVERIFIABLE, (), None),
    ("adopt, not where the socket could not be asked",
     healthy(pid_file=ABSENT, keeper=OTHER, listening=Listening.NOT_ASKED, listener=None),
     V.UNVERIFIABLE, (), None),
    ("adopt, ours looks itself", healthy(pid_file=ABSENT, listener=None),
     V.ADOPT, (Rebind(KEEPER),), 1.0),
    # orphan keeper: the agent is known gone, for 500 ms
    ("orphan keeper, may end by itself", healthy(agent=replace(GONE, since=NOW - 0.25)),
     V.ORPHAN, (), 0.25),
    ("orphan keeper", healthy(agent=replace(GONE, since=NOW - 0.5)),
     V.ORPHAN, (StopKeeper(KEEPER),), None),
    ("orphan keeper of another make", healthy(keeper=OTHER, agent=GONE),
     V.ORPHAN, (StopKeeper(KEEPER),), None),
    ("orphan keeper, young, nothing says that the child was its agent",
     healthy(agent_file=ABSENT, keeper=young(OTHER, 1.0), agent=GONE), V.ORPHAN, (), 4.0),
    ("orphan keeper without a socket", healthy(socket=ABSENT, listening=Listening.NOT_ASKED,
                                               agent=GONE),
     V.ORPHAN, (StopKeeper(KEEPER),), None),
    # orphan agent: the keeper is dead, the agent is alive and proven
    ("orphan agent", left(agent=ALIVE), V.ORPHAN_AGENT, (StopAgent(AGENT),), None),
    ("orphan agent, recycled keeper pid", left(keeper=RECYCLED, agent=ALIVE),
     V.ORPHAN_AGENT, (StopAgent(AGENT),), None),
    ("orphan agent, no file is left", nothing(agent=ALIVE),
     V.ORPHAN_AGENT, (StopAgent(AGENT),), None),
    ("orphan agent, not proven", left(agent=UNPROVEN), V.UNVERIFIABLE, (), None),
    ("orphan agent, not known", left(agent=MAYBE), V.UNVERIFIABLE, (), None),
    ("orphan agent, not known, no file is left", nothing(agent=MAYBE), V.UNVERIFIABLE, (), None),
    # unreachable: the keeper is proven, its socket gone for longer than settle
    ("unreachable, ours", healthy(socket=aged(ABSENT, 2.0), listening=Listening.NOT_ASKED),
     V.UNREACHABLE, (Rebind(KEEPER),), 1.0),
    ("unreachable, ours, its socket refuses", healthy(listening=Listening.REFUSED, listener=None),
     V.UNREACHABLE, (Rebind(KEEPER),), 1.0),
    ("unreachable, another make",
     healthy(socket=ABSENT, listening=Listening.NOT_ASKED, keeper=OTHER), V.UNREACHABLE, (), None),
    ("unreachable, nearly settled",
     healthy(socket=aged(ABSENT, 1.5), listening=Listening.NOT_ASKED, keeper=OTHER),
     V.STARTING, (), 0.5),
    ("unreachable, not settled",
     healthy(socket=aged(ABSENT, 0.5), listening=Listening.NOT_ASKED, keeper=OTHER),
     V.STARTING, (), 1.5),
    # usurped: two proven keepers of this folder for one sid
    ("usurped, the first owns the socket", healthy(keeper=OTHER, rivals=(SECOND,)),
     V.USURPED, (StopKeeper(RIVAL, at_once=True),), None),
    ("usurped, the second owns the socket",
     healthy(keeper=OTHER, rivals=(SECOND,), listener=RIVAL),
     V.USURPED, (StopKeeper(KEEPER, at_once=True),), None),
    ("usurped, the loser is ours and removes only its own",
     healthy(rivals=(SECOND,), listener=RIVAL), V.USURPED, (StopKeeper(KEEPER),), None),
    ("usurped, two losers",
     healthy(keeper=OTHER, rivals=(SECOND, replace(SECOND, process=STRANGER, ours=True))),
     V.USURPED, (StopKeeper(RIVAL, at_once=True), StopKeeper(STRANGER)), None),
    ("usurped, the second may be ending",
     healthy(keeper=OTHER, rivals=(young(SECOND, 3.0),)), V.USURPED, (), 2.0),
    ("usurped, the second may be ending, nearly over",
     healthy(keeper=OTHER, rivals=(young(SECOND, 4.5),)), V.USURPED, (), 0.5),
    ("usurped, the grace is over",
     healthy(keeper=OTHER, rivals=(young(SECOND, 5.0),)),
     V.USURPED, (StopKeeper(RIVAL, at_once=True),), None),
    ("usurped, nobody is known to listen", healthy(rivals=(SECOND,), listener=None),
     V.UNVERIFIABLE, (), None),
    ("usurped, a stranger listens", healthy(rivals=(SECOND,), listener=STRANGER),
     V.UNVERIFIABLE, (), None),
    ("usurped, there is no socket", healthy(rivals=(SECOND,), socket=ABSENT,
                                            listening=Listening.NOT_ASKED, listener=None),
     V.UNREACHABLE, (Rebind(KEEPER),), 1.0),
    # lost keeper: no file at all
    ("lost, ours", fileless(keeper=OURS), V.LOST, (Rebind(KEEPER),), 1.0),
    ("lost, another make", fileless(keeper=OTHER), V.LOST, (StopKeeper(KEEPER),), None),
    ("lost, another make, may be slow", fileless(keeper=young(OTHER, 10.0)), V.STARTING, (), 20.0),
    ("lost, another make, the grace is nearly over", fileless(keeper=young(OTHER, 29.5)),
     V.STARTING, (), 0.5),
    ("lost, another make, the grace is over", fileless(keeper=young(OTHER, 30.0)),
     V.LOST, (StopKeeper(KEEPER),), None),
    ("lost, may be starting", fileless(keeper=young(OTHER, 4.5)), V.STARTING, (), 0.5),
    ("lost, ours, the start grace is over", fileless(keeper=young(OURS, 5.0)),
     V.LOST, (Rebind(KEEPER),), 1.0),
    # hostile: whatever else is seen
    ("hostile socket", healthy(socket=HOSTILE), V.REFUSED, (), None),
    ("hostile pid file", left(pid_file=HOSTILE), V.REFUSED, (), None),
    ("hostile agent pid file", left(agent_file=HOSTILE), V.REFUSED, (), None),
    ("hostile beside an orphan", healthy(socket=HOSTILE, agent=GONE), V.REFUSED, (), None),
    # foreign: cannot tell
    ("foreign keeper", healthy(keeper=CANNOT_TELL, listener=None), V.UNVERIFIABLE, (), None),
    ("foreign keeper, refusing socket", left(keeper=CANNOT_TELL), V.UNVERIFIABLE, (), None),
    ("foreign keeper, agent gone", left(keeper=CANNOT_TELL, agent=GONE), V.UNVERIFIABLE, (), None),
    ("foreign listener, dead pid", left(listening=Listening.ANSWERED), V.UNVERIFIABLE, (), None),
    ("foreign listener, recycled pid", left(keeper=RECYCLED, listening=Listening.ANSWERED),
     V.UNVERIFIABLE, (), None),
    ("foreign listener on a living keeper's socket", healthy(listener=STRANGER),
     V.UNVERIFIABLE, (), None),
    ("foreign listener on a living keeper's socket, its agent gone",
     healthy(listener=STRANGER, agent=GONE), V.UNVERIFIABLE, (), None),
    ("socket that could not be asked", left(listening=Listening.NOT_ASKED),
     V.UNVERIFIABLE, (), None),
    ("unreadable entry", healthy(pid_file=UNREADABLE), V.UNVERIFIABLE, (), None),
    ("another host", left(remote=True), V.UNVERIFIABLE, (), None),
    ("another host, bare socket", left(pid_file=ABSENT, agent_file=ABSENT, remote=True),
     V.UNVERIFIABLE, (), None),
    # restarting: it is over, and its policy asks for another one
    ("restart, killed", kept(Ending.KILLED), V.RESTARTING, (AGAIN,), None),
    ("restart, failed", kept(Ending.FAILED), V.RESTARTING, (AGAIN,), None),
    ("restart, finished", kept(Ending.FINISHED), V.RESTARTING, (AGAIN,), None),
    ("restart, ended by itself, how is not known", kept(Ending.UNKNOWN), V.RESTARTING, (AGAIN,),
     None),
    ("restart on failure, killed", kept(Ending.KILLED, "on-failure"), V.RESTARTING, (AGAIN,), None),
    ("restart on failure, failed", kept(Ending.FAILED, "on-failure"), V.RESTARTING, (AGAIN,), None),
    ("restart, not before its time", kept(Ending.KILLED, after=0.25), V.RESTARTING, (), 0.75),
    ("restart, its time has come", kept(Ending.KILLED, after=1.0), V.RESTARTING, (AGAIN,), None),
    ("restart, the second waits twice as long", kept(Ending.KILLED, after=1.0, tries=(5,)),
     V.RESTARTING, (), 1.0),
    ("restart, the fourth", kept(Ending.KILLED, after=1.0, tries=(50, 30, 10)),
     V.RESTARTING, (), 7.0),
    ("restart, no longer than the cap", kept(Ending.KILLED, after=1.0, tries=tuple(range(9))),
     V.RESTARTING, (), 59.0),
    ("restart, what is long ago does not count", kept(Ending.KILLED, after=1.0, tries=(600, 900)),
     V.RESTARTING, (AGAIN,), None),
    ("restart, the machine was started anew", kept(Ending.KILLED, this_boot=False),
     V.RESTARTING, (AGAIN,), None),
    ("restart, asked to end as the machine went down", kept(Ending.ASKED, this_boot=False),
     V.RESTARTING, (AGAIN,), None),
    ("restart on failure, the same", kept(Ending.ASKED, "on-failure", this_boot=False),
     V.RESTARTING, (AGAIN,), None),
    # given up
    ("give up", kept(Ending.FAILED, tries=tuple(range(10))), V.GIVEN_UP, (GIVE_UP,), None),
    ("give up, at once", kept(Ending.FAILED, after=0.0, tries=tuple(range(10))),
     V.GIVEN_UP, (GIVE_UP,), None),
    ("given up", kept(Ending.FAILED, given_up=True), V.GIVEN_UP, (), None),
    # not again
    ("asked to end", kept(Ending.ASKED, after=2.0), V.STOPPING, (), 8.0),
    ("asked to end, its farewell is just over", kept(Ending.ASKED, after=10.0),
     V.STOPPING, (FORGET,), None),
    ("asked to end, and the machine stands", kept(Ending.ASKED), V.STOPPING, (FORGET,), None),
    ("on failure, asked to end", kept(Ending.ASKED, "on-failure"), V.STOPPING, (FORGET,), None),
    ("on failure, ended well", kept(Ending.FINISHED, "on-failure", after=0.0),
     V.STOPPING, (FORGET,), None),
    ("on failure, ended well in an earlier boot",
     kept(Ending.FINISHED, "on-failure", this_boot=False), V.STOPPING, (FORGET,), None),
    ("on failure, ended by itself, how is not known", kept(Ending.UNKNOWN, "on-failure"),
     V.STOPPING, (FORGET,), None),
    ("another host's", replace(kept(Ending.KILLED, this_boot=False), remote=True),
     V.UNVERIFIABLE, (), None),
    ("this host's, on a network filesystem", replace(kept(Ending.KILLED), remote=True),
     V.RESTARTING, (AGAIN,), None),
    ("hostile launch note", replace(nothing(), note=HOSTILE), V.REFUSED, (), None),
    ("unreadable launch note", replace(nothing(), note=UNREADABLE), V.UNVERIFIABLE, (), None),
    ("restart, with leftovers", replace(kept(Ending.KILLED), leftovers=LEFT),
     V.RESTARTING, (AGAIN,), None),
    # but not while something of it is there
    ("a launch note beside a living agent", replace(kept(Ending.KILLED), agent=ALIVE),
     V.ORPHAN_AGENT, (StopAgent(AGENT),), None),
    ("a launch note beside an agent that may live", replace(kept(Ending.KILLED), agent=MAYBE),
     V.UNVERIFIABLE, (), None),
    # nothing
    ("nothing", nothing(), V.ABSENT, (), None),
    ("nothing, agent known gone", nothing(agent=GONE), V.ABSENT, (), None),
)  # fmt: skip


@pytest.mark.parametrize(
    ("seen", "verdict", "actions", "again"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_decision_table(
    seen: Observation, verdict: Verdict, actions: tuple[Action, ...], again: float | None
) -> None:
    plan = decide(seen, Desired.AS_FOUND, POLICY)
    assert (plan.verdict, plan.actions, plan.again_after) == (verdict, actions, again)
    assert plan.reason


WISHED: tuple[tuple[str, Desired, Observation, Verdict, tuple[Action, ...]], ...] = (
    ("unwanted", Desired.ABSENT, healthy(), V.STOPPING, (StopKeeper(KEEPER),)),
    ("unwanted, another make", Desired.ABSENT, healthy(keeper=OTHER), V.STOPPING,
     (StopKeeper(KEEPER),)),
    ("unwanted, still starting", Desired.ABSENT, healthy(keeper=young(OURS, 0.1), agent=NEVER),
     V.STOPPING, (StopKeeper(KEEPER),)),
    ("unwanted, no file left", Desired.ABSENT, fileless(keeper=OTHER), V.STOPPING,
     (StopKeeper(KEEPER),)),
    ("unwanted, another listens on its socket", Desired.ABSENT, healthy(listener=STRANGER),
     V.UNVERIFIABLE, ()),
    ("unwanted, dead", Desired.ABSENT, left(), V.STALE, (REMOVE_ALL,)),
    ("unwanted, gone", Desired.ABSENT, nothing(), V.ABSENT, ()),
    ("unwanted, cannot tell", Desired.ABSENT, healthy(keeper=CANNOT_TELL), V.UNVERIFIABLE, ()),
    ("unwanted, hostile", Desired.ABSENT, healthy(socket=HOSTILE), V.REFUSED, ()),
    ("unwanted, usurped", Desired.ABSENT, healthy(rivals=(SECOND,)), V.USURPED,
     (StopKeeper(RIVAL, at_once=True),)),
    ("unwanted, usurped, and no socket is left", Desired.ABSENT,
     healthy(keeper=OTHER, rivals=(SECOND,), socket=ABSENT, listening=Listening.NOT_ASKED,
             listener=None), V.STOPPING, (StopKeeper(KEEPER),)),
    ("wanted", Desired.PRESENT, healthy(), V.READY, ()),
    ("wanted, orphan", Desired.PRESENT, healthy(agent=GONE), V.ORPHAN, (StopKeeper(KEEPER),)),
    ("wanted, dead", Desired.PRESENT, left(), V.STALE, (REMOVE_ALL,)),
    ("missing", Desired.PRESENT, nothing(), V.MISSING, ()),
    ("wanted, and to be restarted", Desired.PRESENT, kept(Ending.KILLED), V.RESTARTING, (AGAIN,)),
    ("unwanted, and once to be restarted", Desired.ABSENT, kept(Ending.KILLED), V.ABSENT, ()),
    ("unwanted, hostile launch note", Desired.ABSENT, replace(nothing(), note=HOSTILE),
     V.REFUSED, ()),
    ("leftovers", FOUND, over(), V.LEFTOVERS, ()),
    ("unwanted, leftovers", Desired.ABSENT, over(), V.LEFTOVERS, ()),
    ("unwanted, leftovers to be left alone", Desired.ABSENT, over(leave=True), V.LEFTOVERS, ()),
    ("leftovers of a session that lives", FOUND, replace(healthy(), leftovers=LEFT), V.READY, ()),
    ("leftovers beside files", FOUND, replace(left(), leftovers=LEFT), V.STALE, (REMOVE_ALL,)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("desired", "seen", "verdict", "actions"), [r[1:] for r in WISHED], ids=[r[0] for r in WISHED]
)
def test_what_is_wanted(
    desired: Desired, seen: Observation, verdict: Verdict, actions: tuple[Action, ...]
) -> None:
    plan = decide(seen, desired, POLICY)
    assert (plan.verdict, plan.actions) == (verdict, actions)


@pytest.mark.parametrize(
    ("leave", "actions"), [(False, (STOP_LEFT,)), (True, ())], ids=["end", "left on purpose"]
)
def test_the_policy_may_end_leftovers(*, leave: bool, actions: tuple[Action, ...]) -> None:
    plan = decide(over(leave=leave), FOUND, Policy(leftovers="stop"))
    assert (plan.verdict, plan.actions) == (Verdict.LEFTOVERS, actions)


def test_the_policy_may_end_leftovers_before_a_restart() -> None:
    seen = replace(kept(Ending.KILLED), leftovers=LEFT)
    plan = decide(seen, FOUND, Policy(leftovers="stop"))
    assert (plan.verdict, plan.actions) == (Verdict.LEFTOVERS, (STOP_LEFT,))
    left_alone = decide(replace(seen, leave=True), FOUND, Policy(leftovers="stop"))
    assert left_alone.actions == (AGAIN,)


def test_the_limits_of_restarts_can_be_chosen() -> None:
    limits = RestartLimits(first=5, cap=7, window=60, most=2, farewell=3)

    def plan(seen: Observation) -> Plan:
        return decide(seen, FOUND, POLICY, limits)

    assert plan(kept(Ending.KILLED, after=1)).again_after == 4
    assert plan(kept(Ending.KILLED, after=1, tries=(9,))).again_after == 6
    assert plan(kept(Ending.KILLED, tries=(9, 9))).actions == (GIVE_UP,)
    assert plan(kept(Ending.KILLED, tries=(99, 9))).actions == (AGAIN,)
    assert plan(kept(Ending.ASKED, after=1)).again_after == 2


def test_leftovers_are_watched_and_keep_a_session_from_being_gone() -> None:
    assert STRANGER in over().watched
    assert over().over
    assert not over().empty


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (left(), "keeper dead"),
        (left(keeper=RECYCLED), "pid recycled by another process"),
        (left(pid_file=EMPTY), "pid file empty and old"),
        (left(pid_file=BROKEN), "pid file broken and old"),
        (left(pid_file=ABSENT), "no pid file, and nobody listens"),
        (healthy(socket=HOSTILE, pid_file=HOSTILE), "socket: a FIFO, pid_file: a FIFO"),
        (healthy(keeper=CANNOT_TELL), "hidden"),
        (left(agent=MAYBE), "keeper dead, process 101 may be its agent"),
        (over(), "session over, what it started lives on"),
        (over(leave=True), "left alone on purpose"),
    ],
)
def test_reasons(seen: Observation, reason: str) -> None:
    assert decide(seen, FOUND, POLICY).reason == reason


REASONS = {
    V.STARTING: {
        "a keeper may be starting",
        "no agent seen yet",
        "pid file to be written",
        "no socket yet",
        "no socket that answers yet",
        "no file yet",
    },
    V.READY: {"keeper proven"},
    V.STALE: {
        "keeper dead",
        "pid recycled by another process",
        "pid file empty and old",
        "pid file broken and old",
        "no pid file, and nobody listens",
    },
    V.ADOPT: {"keeper listens, its pid file does not name it"},
    V.ORPHAN: {"agent gone, keeper should end by itself", "agent gone, keeper lives on"},
    V.ORPHAN_AGENT: {"keeper dead, its agent lives on"},
    V.UNREACHABLE: {
        "keeper without a socket",
        "keeper without a socket, and it knows no way to bind again",
    },
    V.USURPED: {"a second keeper may be ending", "another keeper owns the socket"},
    V.LOST: {"keeper without a socket", "keeper without any file"},
    V.STOPPING: {
        "not wanted any more",
        "asked to end just now",
        "asked to end",
        "ended well",
        "ended by itself, how is not known",
    },
    V.RESTARTING: {
        "keeper killed",
        "agent failed",
        "agent ended",
        "the machine was started anew",
        "keeper killed, started again after a pause",
    },
    V.GIVEN_UP: {"restarted too often"},
    V.MISSING: {"wanted, and nothing is there"},
    V.ABSENT: {"nothing is there"},
    V.UNVERIFIABLE: {
        "another process listens on the keeper's socket",
        "the socket could not be asked",
        "two keepers, and neither is known to listen",
        "the socket answers, by whom cannot be told",
        "network filesystem: the keeper may be on another host",
        "network filesystem: another host may have started it",
    },
}
"""What each verdict may say; people search their logs for these very words."""


def test_reasons_are_constant_phrases() -> None:
    decided = [decide(seen, FOUND, POLICY) for _, seen, *_ in TABLE]
    decided += [decide(seen, desired, POLICY) for _, desired, seen, *_ in WISHED]
    said: dict[Verdict, set[str]] = {verdict: set() for verdict in REASONS}
    for plan in decided:
        if plan.verdict in said:
            said[plan.verdict].add(plan.reason)
    said[V.UNVERIFIABLE] -= {f"{what}: {UNREADABLE.detail}" for what in ("pid_file", "launch")}
    said[V.UNVERIFIABLE] -= {CANNOT_TELL.evidence}
    said[V.UNVERIFIABLE] -= {f"keeper dead, {agent.evidence}" for agent in (UNPROVEN, MAYBE)}
    assert said == REASONS


def test_the_times_are_the_policys() -> None:
    long = Policy(settle=50, start_grace=60, orphan_grace=200, rebind_grace=7)
    bare = left(pid_file=ABSENT, agent_file=ABSENT, socket=aged(SOCKET, 49))
    assert decide(bare, FOUND, long).again_after == 1
    assert decide(healthy(keeper=young(OTHER, 59), agent=NEVER), FOUND, long).again_after == 1
    assert decide(healthy(agent=GONE), FOUND, long).again_after == 200 - OLD
    assert decide(fileless(keeper=OURS), FOUND, long).again_after == 7


@pytest.mark.parametrize(
    ("seen", "watched"),
    [
        (healthy(), {KEEPER, AGENT}),
        (healthy(agent=GONE), {KEEPER}),
        (healthy(rivals=(SECOND,)), {KEEPER, AGENT, RIVAL}),
        (healthy(keeper=CANNOT_TELL, agent=MAYBE), {STRANGER}),
        (left(keeper=RECYCLED), {STRANGER}),
        (left(agent=ALIVE), {AGENT}),
        (nothing(), set()),
    ],
)
def test_whose_exit_brings_the_next_look(seen: Observation, watched: set[ProcessId]) -> None:
    assert seen.watched == watched


def test_a_proven_keeper_without_a_process_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="has a process"):
        decide(healthy(keeper=Keeper(KeeperState.PROVEN)), FOUND, POLICY)


# The table of sessions.


def judged(seen: Observation, desired: Desired = FOUND) -> tuple[Observation, Plan]:
    return seen, decide(seen, desired, POLICY)


def test_a_row_is_recorded_and_read() -> None:
    table = SessionTable()
    assert "s1" not in table
    assert table.record(*judged(healthy()))
    row = table["s1"]
    assert list(table) == ["s1"]
    assert len(table) == 1
    assert (row.phase, row.reason) == (V.READY, "keeper proven")
    assert (row.keeper_pid, row.agent_pid) == (KEEPER.pid, AGENT.pid)
    assert row.desired is FOUND


def test_a_row_without_a_look() -> None:
    row = Session("s1")
    assert (row.phase, row.reason) == (V.STARTING, "not looked at yet")
    assert (row.keeper_pid, row.agent_pid) == (None, None)


@pytest.mark.parametrize(
    ("seen", "pids"),
    [
        (left(keeper=RECYCLED), (None, None)),
        (healthy(keeper=CANNOT_TELL), (None, AGENT.pid)),
        (healthy(agent=GONE), (KEEPER.pid, None)),
        (healthy(agent=replace(UNPROVEN, process=None)), (KEEPER.pid, None)),
    ],
)
def test_pids_are_those_that_are_known(
    seen: Observation, pids: tuple[int | None, int | None]
) -> None:
    row = Session("s1", seen=seen, plan=decide(seen, FOUND, POLICY))
    assert (row.keeper_pid, row.agent_pid) == pids


def test_a_session_of_which_nothing_is_left_leaves_the_table() -> None:
    table = SessionTable()
    table.want("s1", Desired.ABSENT)
    table.record(*judged(healthy(), Desired.ABSENT))
    assert table["s1"].phase is V.STOPPING
    assert table.record(*judged(nothing(), Desired.ABSENT))
    assert "s1" not in table
    assert table.row("s1").desired is FOUND


def test_a_wanted_session_stays_though_nothing_is_there() -> None:
    table = SessionTable()
    table.want("s1", Desired.PRESENT)
    assert table["s1"].phase is V.STARTING
    table.record(*judged(nothing(), Desired.PRESENT))
    assert (table["s1"].phase, table["s1"].desired) == (V.MISSING, Desired.PRESENT)


def test_a_wish_keeps_what_was_seen() -> None:
    table = SessionTable()
    table.record(*judged(healthy()))
    table.want("s1", Desired.ABSENT)
    assert table["s1"].seen == healthy()
    assert table["s1"].desired is Desired.ABSENT
    table.record(*judged(healthy(agent=GONE), Desired.ABSENT))
    assert table["s1"].desired is Desired.ABSENT


def test_reset_forgets_what_was_seen_but_not_what_is_wanted() -> None:
    table = SessionTable()
    table.record(*judged(healthy()))
    table.reset("s1")
    assert "s1" not in table
    table.want("s1", Desired.PRESENT)
    table.record(*judged(healthy(), Desired.PRESENT))
    table.reset("s1")
    assert table["s1"] == Session("s1", Desired.PRESENT)
    table.reset("never there")
    assert list(table) == ["s1"]


def test_subscribers_are_told_of_changes_alone() -> None:
    table = SessionTable()
    told: list[tuple[Verdict, int | None]] = []
    unsubscribe = table.subscribe(lambda row: told.append((row.phase, row.agent_pid)))
    assert table.record(*judged(healthy()))
    assert not table.record(*judged(replace(healthy(), now=NOW + 1)))
    assert told == [(V.READY, AGENT.pid)]
    # A pid that changes under the same verdict is a change, but no new judgement.
    assert not table.record(*judged(healthy(agent=replace(ALIVE, process=STRANGER))))
    assert told[1:] == [(V.READY, STRANGER.pid)]
    table.reset("s1")
    unsubscribe()
    unsubscribe()
    table.record(*judged(left()))
    assert told[2:] == [(V.ABSENT, None)]


def test_what_subscribers_are_told_of_a_session_that_leaves() -> None:
    table = SessionTable()
    told: list[Session] = []
    table.subscribe(told.append)
    table.want("s1", Desired.ABSENT)
    table.record(*judged(healthy(), Desired.ABSENT))
    table.record(*judged(nothing(), Desired.ABSENT))
    assert [(row.sid, row.phase) for row in told] == [("s1", V.STOPPING), ("s1", V.ABSENT)]
    assert told[-1].desired is FOUND


def test_subscribers_are_told_of_a_reset() -> None:
    table = SessionTable()
    table.want("s1", Desired.PRESENT)
    table.record(*judged(healthy(), Desired.PRESENT))
    told: list[Session] = []
    table.subscribe(told.append)
    table.reset("s1")
    assert told == [Session("s1", Desired.PRESENT)]


def test_a_look_at_nothing_of_a_session_that_is_not_known() -> None:
    table = SessionTable()
    assert not table.record(*judged(nothing()))
    assert list(table) == []


def test_a_wish_for_a_session_that_is_not_known() -> None:
    table = SessionTable()
    table.want("s1", Desired.PRESENT)
    assert table["s1"] == Session("s1", Desired.PRESENT)


def test_a_subscribers_trouble_is_its_own() -> None:
    trouble = RuntimeError("of a subscriber")
    complaints: list[Exception] = []
    told: list[Session] = []

    def fail(_: Session) -> None:
        raise trouble

    table = SessionTable(complaints.append)
    table.subscribe(fail)
    table.subscribe(told.append)
    table.record(*judged(healthy()))
    assert complaints == [trouble]
    assert [row.phase for row in told] == [V.READY]


def test_subscribers_may_leave_while_they_are_told() -> None:
    table = SessionTable()
    told: list[str] = []

    def once(row: Session) -> None:
        told.append(row.sid)
        leave()

    leave = table.subscribe(once)
    table.subscribe(lambda row: told.append(row.sid))
    table.record(*judged(healthy()))
    table.record(*judged(left()))
    assert told == ["s1", "s1", "s1"]


def recorded(table: SessionTable, seen: Observation) -> bool:
    return table.record(seen, decide(seen, table.row("s1").desired, POLICY))


@pytest.mark.parametrize(
    ("wanted", "then"),
    [
        (Desired.ABSENT, Desired.AS_FOUND),
        (Desired.PRESENT, Desired.PRESENT),
        (Desired.AS_FOUND, Desired.AS_FOUND),
    ],
)
def test_a_wish_for_absence_ends_when_only_leftovers_are_there(
    wanted: Desired, then: Desired
) -> None:
    table = SessionTable()
    table.want("s1", wanted)
    recorded(table, over())
    assert table["s1"].desired is then
    assert table["s1"].phase is Verdict.LEFTOVERS


def test_leftovers_are_news_when_there_are_others_than_before() -> None:
    one, other = Leftover(STRANGER, "sleep"), Leftover(RIVAL, "cat")
    table = SessionTable()
    assert recorded(table, replace(over(), leftovers=(one,)))
    assert not recorded(table, replace(over(), leftovers=(one,)))
    assert recorded(table, replace(over(), leftovers=(one, other)))
    assert not recorded(table, replace(over(), leftovers=(other,)))
    assert recorded(table, replace(over(), leftovers=(one,)))
    assert recorded(table, left())
    assert not recorded(table, replace(left(), leftovers=(one,)))
