"""What holds for every observation there is, not only for the rows of the table.

Two ways through them: Hypothesis draws whatever a look can give, ages on either side of
each of the policy's times; and all discrete facts are gone through, each with each. Times
are whole eighths of a second, so that sums are exact and equality may be asked for.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.layout import CLAIM, Role
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
from reconciler.restarts import Ending, RestartLimits, RestartRecord
from reconciler.state import Desired, Policy
from reconciler.state import decide as decide_within

CAMPAIGN = bool(os.environ.get("PI_RECONCILER_CAMPAIGN"))
EXAMPLES = int(os.environ.get("PI_RECONCILER_EXAMPLES", "50000" if CAMPAIGN else "200"))

STEP = 1 if CAMPAIGN else 31
"""Of the 713,000 worlds one in so many is gone through. It divides no count of any fact's
values, so that each pair of values is met all the same."""

NOW = 1024.0
OLD = 64.0
"""An age, in seconds, beyond every time of the policy."""
LIMITS = RestartLimits(first=1, cap=4, window=32, most=4, farewell=10)
POLICY = Policy(settle=2, start_grace=5, orphan_grace=0.5, lost_grace=30, rebind_grace=1)
EIGHTH = 0.125


def decide(
    seen: Observation, desired: Desired, policy: Policy, limits: RestartLimits = LIMITS
) -> Plan:
    return decide_within(seen, desired, policy, limits)


KEEPER = ProcessId(100, 1, "boot")
AGENT = ProcessId(101, 2, "boot")
RIVAL = ProcessId(200, 3, "boot")
STRANGER = ProcessId(300, 4, "boot")
AGAIN = ProcessId(100, 9, "boot")
"""The keeper's pid, in another life."""

WRITTEN = 1_000_000
UNKNOWN_FILE = FileId(0, 0, 0, 0)

V = Verdict
E = EntryKind
K = KeeperState
A = AgentState


LEFTOVERS = ((), (Leftover(STRANGER, "sleep"),), (Leftover(STRANGER, "a"), Leftover(AGAIN, "b")))


# What a look can give.

values = [getattr(room, each.name) for room in (POLICY, LIMITS) for each in fields(room)]
times = sorted({0.0, OLD, *(value for value in values if isinstance(value, float | int))})
ages = st.sampled_from(
    [age for time in times for age in (time - EIGHTH, time, time + EIGHTH) if age >= 0]
)
moments = ages.map(lambda age: NOW - age)
processes = st.sampled_from([KEEPER, AGENT, RIVAL, STRANGER, AGAIN])
files = st.builds(
    FileId,
    st.just(8),
    st.integers(1, 3),
    st.integers(WRITTEN - 1, WRITTEN + 1),
    st.integers(0, 3),
)


def entries(*kinds: EntryKind) -> st.SearchStrategy[Entry]:
    """Entries of these kinds, or nothing."""
    absent = st.builds(Entry, st.just(E.ABSENT), moments)
    return st.one_of(absent, *(st.builds(Entry, st.just(kind), moments, files) for kind in kinds))


unclear = st.builds(Entry, st.sampled_from([E.HOSTILE, E.UNKNOWN]), moments, detail=st.just("why"))
rarely = st.sampled_from([False] * 9 + [True])
named = st.builds(Entry, st.just(E.PID), moments, files, st.sampled_from([100, 101, 200, 300]))
sockets = entries(E.SOCKET, E.SOCKET, E.SOCKET)
answers = st.sampled_from([Listening.ANSWERED, *Listening])
pid_files = named | entries(E.EMPTY, E.BROKEN)
keepers_proven = st.builds(
    Keeper, st.just(K.PROVEN), processes, st.booleans(), ages, st.just("proven")
)
claims = st.builds(
    Keeper,
    st.sampled_from([K.RECYCLED, K.UNVERIFIABLE]),
    processes,
    st.booleans(),
    ages,
    st.just("claimed"),
) | st.just(Keeper(K.UNVERIFIABLE, evidence="hidden"))
agents = st.builds(
    Agent, st.sampled_from(A), moments, st.none() | processes, st.booleans(), st.just("evidence")
)


notes = st.builds(Entry, st.just(E.NOTE), moments, files)
records = st.builds(
    RestartRecord,
    st.sampled_from(["on-failure", "always"]),
    st.booleans(),
    st.lists(moments, max_size=5).map(lambda each: tuple(sorted(each))),
    st.booleans(),
    st.sampled_from(Ending),
)


@st.composite
def kept(draw: st.DrawFn) -> Observation:
    """A session that is over, and has a launch note or what stands under its name."""
    good = draw(st.sampled_from([True] * 9 + [False]))
    return replace(
        OVER,
        note=draw(notes if good else unclear),
        record=draw(records) if good else None,
        leftovers=draw(st.sampled_from(LEFTOVERS)),
        leave=draw(st.booleans()),
        remote=draw(st.booleans()),
    )


GONE = Entry(E.ABSENT, NOW - OLD)
OVER = Observation(
    sid="s1",
    now=NOW,
    pid_file=GONE,
    socket=GONE,
    agent_file=GONE,
    keeper=Keeper(K.NONE),
    listening=Listening.NOT_ASKED,
    listener=None,
    agent=Agent(A.GONE, NOW - OLD),
)


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    """Whatever a look can give, and some that it cannot."""
    if draw(st.integers(0, 3)) == 0:
        return draw(kept())
    keeper = draw(st.one_of(keepers_proven, keepers_proven, st.just(Keeper(K.NONE)), claims))
    pid_file = draw(pid_files if keeper.state in {K.NONE, K.PROVEN} else named)
    if keeper.process is not None and pid_file.kind is E.PID and draw(st.booleans()):
        pid_file = replace(pid_file, pid=keeper.process.pid)
    rivals: list[Keeper] = []
    if keeper.state in {K.PROVEN, K.UNVERIFIABLE}:
        rivals = draw(st.lists(keepers_proven, max_size=2, unique_by=lambda rival: rival.process))
    socket = draw(sockets)
    asked = socket.kind is E.SOCKET
    listening = draw(answers) if asked else Listening.NOT_ASKED
    answered = listening is Listening.ANSWERED
    seen = Observation(
        sid="s1",
        now=NOW,
        pid_file=pid_file,
        socket=socket,
        agent_file=draw(pid_files),
        keeper=keeper,
        listening=listening,
        listener=draw(st.none() | st.just(keeper.process) | processes) if answered else None,
        agent=draw(agents),
        rivals=tuple(rival for rival in rivals if rival.process != keeper.process),
        remote=draw(st.booleans()),
        seen_alive=draw(st.booleans()),
        leftovers=draw(st.sampled_from(LEFTOVERS)),
        leave=draw(st.booleans()),
    )
    if draw(rarely):
        return with_entry(seen, draw(st.sampled_from(CLAIM)), draw(unclear))
    return seen


def with_entry(seen: Observation, role: Role, entry: Entry) -> Observation:
    match role:
        case Role.SOCKET:
            return replace(seen, socket=entry, listening=Listening.NOT_ASKED, listener=None)
        case Role.PID_FILE:
            return replace(seen, pid_file=entry)
        case Role.LAUNCH:
            return replace(seen, note=entry, record=None)
        case _:
            return replace(seen, agent_file=entry)


def every_observation() -> Iterator[Observation]:
    """All discrete facts, each with each; ages on either side of each time of the policy."""
    proven = tuple(
        Keeper(K.PROVEN, KEEPER, ours, age, "proven")
        for ours, age in itertools.product((True, False), (1.0, 10.0, OLD))
    )
    claimed = (
        Keeper(K.NONE),
        Keeper(K.RECYCLED, STRANGER, age=OLD, evidence="recycled"),
        Keeper(K.UNVERIFIABLE, KEEPER, age=OLD, evidence="hidden"),
    )
    file = FileId(8, 1, WRITTEN, 3)
    answers = (
        *((Listening.ANSWERED, who) for who in (KEEPER, AGAIN, RIVAL, STRANGER, None)),
        (Listening.REFUSED, None),
        (Listening.NOT_ASKED, None),
    )
    both = (NOW - EIGHTH, NOW - OLD)
    for keeper, since, bound in itertools.product((*proven, *claimed), both, both):
        absent = Entry(E.ABSENT, since)
        pids = {KEEPER.pid, STRANGER.pid} if keeper.process is None else {keeper.process.pid, 999}
        claims_of_a_file = [Entry(E.PID, since, file, pid) for pid in pids]
        if keeper.state in {K.NONE, K.PROVEN}:
            bare = (Entry(E.EMPTY, since, file), Entry(E.BROKEN, since, file))
            claims_of_a_file += [absent, *bare]
        sockets = [(Entry(E.ABSENT, bound), (Listening.NOT_ASKED, None))] + [
            (Entry(E.SOCKET, bound, replace(file, mtime_ns=WRITTEN + newer)), answer)
            for newer, answer in itertools.product((0, 1), answers)
        ]
        rivals = [()] + [
            (Keeper(K.PROVEN, RIVAL, ours, OLD, "rival"),)
            for ours in (True, False)
            if keeper.state is K.PROVEN
        ]
        agents = [
            Agent(state, since, AGENT if state is A.ALIVE else None, proven, "agent")
            for state, proven in [*itertools.product(A, [False]), (A.ALIVE, True)]
        ]
        for pid_file, (
            socket,
            (listening, listener),
        ), agent_file, agent, beside, remote, alive in itertools.product(
            claims_of_a_file,
            sockets,
            (absent, Entry(E.PID, since, file, AGENT.pid)),
            agents,
            rivals,
            (False, True),
            (False, True),
        ):
            yield Observation(
                sid="s1",
                now=NOW,
                pid_file=pid_file,
                socket=socket,
                agent_file=agent_file,
                keeper=keeper,
                listening=listening,
                listener=listener,
                agent=agent,
                rivals=beside,
                remote=remote,
                seen_alive=alive,
            )


def what_is_left_over() -> Iterator[Observation]:
    """Each state of an agent, beside what its session has started, when all else is gone."""
    for state, leave, leftovers in itertools.product(A, (False, True), LEFTOVERS):
        agent = Agent(state, NOW - OLD)
        yield replace(OVER, agent=agent, leftovers=leftovers, leave=leave)


def what_is_kept() -> Iterator[Observation]:
    """Each policy and ending, before and after each pause, few and many restarts ago."""
    file = FileId(8, 4, WRITTEN, 100)
    for age, remote in itertools.product((0.0, 1.0, 4.0, 10.0, OLD), (False, True)):
        for kind in (E.HOSTILE, E.UNKNOWN):
            yield replace(OVER, note=Entry(kind, NOW - age, detail="why"), remote=remote)
        ended = NOW - age
        restarts = (
            (),
            (ended - 1,),
            (ended - LIMITS.window, ended - 1),
            (ended - LIMITS.window,) * 4,
            (ended - 3, ended - 2, ended - 1, ended),
        )
        for policy, boot, tries, given_up, ending, leftovers in itertools.product(
            ("on-failure", "always"), (True, False), restarts, (False, True), Ending, LEFTOVERS[:2]
        ):
            record = RestartRecord(policy, boot, tries, given_up, ending)
            note = Entry(E.NOTE, ended, file)
            yield replace(OVER, note=note, record=record, remote=remote, leftovers=leftovers)


@functools.cache
def worlds() -> tuple[tuple[Desired, Observation], ...]:
    every = ((desired, seen) for seen in every_observation() for desired in Desired)
    left = ((desired, seen) for seen in what_is_left_over() for desired in Desired)
    again = ((desired, seen) for seen in what_is_kept() for desired in Desired)
    return (*itertools.islice(every, 0, None, STEP), *left, *again)


# What each action needs to be seen. Every line is a rule of "What always holds".


def check_plan(seen: Observation, desired: Desired, plan: Plan) -> None:
    kinds = {entry.kind for _, entry in seen.entries}
    assert plan.reason
    if E.HOSTILE in kinds:
        assert (plan.verdict, plan.actions) == (V.REFUSED, ())
    elif E.UNKNOWN in kinds or seen.keeper.state is K.UNVERIFIABLE:
        assert (plan.verdict, plan.actions) == (V.UNVERIFIABLE, ())
    for action in plan.actions:
        check_action(seen, desired, action)
    assert len({type(action) for action in plan.actions}) <= 1, "one step only"
    assert len(set(plan.actions)) == len(plan.actions)
    if plan.again_after is not None:
        longest = max(POLICY.start_grace, POLICY.lost_grace, LIMITS.cap, LIMITS.farewell)
        assert 0 < plan.again_after <= longest
    elif not plan.actions:
        check_rest(seen, desired, plan)


def check_action(seen: Observation, desired: Desired, action: Action) -> None:
    proven = [k for k in (seen.keeper, *seen.rivals) if k.state is K.PROVEN]
    match action:
        case Remove():
            assert not proven
            check_removal(seen, action)
        case StopLeftovers(stopped):
            assert not proven
            assert not any(entry.present for _, entry in seen.entries)
            assert stopped == tuple(leftover.process for leftover in seen.leftovers) != ()
            assert not seen.leave
            pytest.fail("it is the policy to report")
        case StopAgent():
            assert not proven
            check_nobody_answers(seen)
            assert seen.agent.state is A.ALIVE
            assert seen.agent.proven
            assert action.process == seen.agent.process
        case StopKeeper():
            (keeper,) = (k for k in proven if k.process == action.process)
            check_stop(seen, desired, keeper, action)
        case Rebind():
            (keeper,) = (k for k in proven if k.process == action.process)
            assert keeper.ours, "another make ends by SIGHUP"
            assert seen.listener in {None, action.process}
        case Adopt():
            assert action.process == seen.listener, "who is written down is who answers"
            assert action.process == seen.keeper.process
            assert seen.keeper.state is K.PROVEN
            assert not seen.keeper.ours, "ours writes its own"
            assert seen.pid_file.pid != action.process.pid
            assert action.replaced == seen.pid_file.file
            check_settled(seen, seen.pid_file, seen.socket)
        case Restart() | GiveUp() | Forget():
            check_note(seen, desired, action)


def check_note(seen: Observation, desired: Desired, action: Restart | GiveUp | Forget) -> None:
    record, over = seen.record, seen.now - seen.note.since
    assert seen.over, "nothing is left of it that lives or claims to"
    assert desired is not Desired.ABSENT
    assert record is not None
    assert action.note == seen.note.file
    assert record.this_boot or not seen.remote, "it may be another host's"
    assert not record.given_up
    asked = record.ending is Ending.ASKED and record.this_boot
    by_itself = record.ending is Ending.UNKNOWN and record.this_boot
    well = record.policy == "on-failure" and (record.ending is Ending.FINISHED or by_itself)
    if isinstance(action, Forget):
        assert well or (asked and over >= LIMITS.farewell)
        return
    assert not asked, "who asks it to end wins"
    assert not well
    lately = [each for each in record.restarts if 0 <= seen.note.since - each < LIMITS.window]
    too_often = len(lately) >= LIMITS.most
    assert too_often == isinstance(action, GiveUp)
    if isinstance(action, Restart):
        assert over >= min(LIMITS.first * 2 ** len(lately), LIMITS.cap)


def check_nobody_answers(seen: Observation) -> None:
    """No keeper lives that could be one of these files': known, not only not heard of."""
    assert seen.keeper.state in {K.NONE, K.RECYCLED}
    if seen.socket.present:
        assert seen.listening is Listening.REFUSED
    assert seen.seen_alive or not seen.remote
    if seen.pid_file.kind is not E.PID:
        check_settled(seen, *(entry for _, entry in seen.entries if entry.present))
    elif not seen.seen_alive and is_newer(seen.socket, seen.pid_file):
        check_settled(seen, seen.socket)


def check_settled(seen: Observation, *unproven: Entry) -> None:
    for entry in unproven:
        assert seen.now - entry.since >= POLICY.settle


def is_newer(entry: Entry, than: Entry) -> bool:
    return (entry.file or UNKNOWN_FILE).mtime_ns > (than.file or UNKNOWN_FILE).mtime_ns


def check_removal(seen: Observation, action: Remove) -> None:
    check_nobody_answers(seen)
    assert seen.agent.state in {A.GONE, A.NEVER_SEEN}
    judged = [(role, entry.file) for role, entry in seen.entries if entry.present]
    assert list(action.entries) == judged, "what was seen, all of it, and nothing else"
    assert judged
    roles = [role for role, _ in judged]
    assert roles == [role for role in CLAIM if role in roles], "the pid file goes last"


def check_stop(seen: Observation, desired: Desired, keeper: Keeper, action: StopKeeper) -> None:
    usurped = bool(seen.rivals) and seen.listener is not None
    assert not action.at_once or (usurped and not keeper.ours)
    if usurped:
        owners = {k.process for k in (seen.keeper, *seen.rivals)}
        assert seen.listener in owners - {action.process}, "the one that listens lives"
        assert min(k.age for k in (seen.keeper, *seen.rivals)) >= POLICY.start_grace
        return
    assert seen.listener in {None, action.process}
    if desired is Desired.ABSENT:
        return
    gone = seen.agent.state is A.GONE and seen.now - seen.agent.since >= POLICY.orphan_grace
    named = seen.agent_file.kind is E.PID or keeper.age >= POLICY.start_grace
    lost = not (seen.socket.present or seen.pid_file.present or keeper.ours)
    slow = keeper.age >= max(POLICY.lost_grace, POLICY.start_grace)
    settled = seen.now - seen.socket.since >= POLICY.settle
    assert (gone and named and not seen.rivals) or (lost and slow and settled)


def check_rest(seen: Observation, desired: Desired, plan: Plan) -> None:
    """No action, and no look asked for: only where a person must help, or all is well."""
    match plan.verdict:
        case V.ABSENT | V.MISSING:
            assert not any(entry.present for _, entry in seen.entries)
            assert seen.keeper.state is K.NONE
            assert seen.agent.state in {A.GONE, A.NEVER_SEEN}, "not known is not gone"
            assert not seen.leftovers
            assert (plan.verdict is V.MISSING) == (desired is Desired.PRESENT)
            assert desired is Desired.ABSENT or not seen.note.present
        case V.READY:
            assert seen.keeper.state is K.PROVEN
            assert seen.keeper.process is not None
            assert desired is not Desired.ABSENT
            assert seen.socket.present
            assert seen.pid_file.pid == seen.keeper.process.pid
            assert seen.agent.state is not A.GONE
            assert not seen.rivals
        case V.UNREACHABLE:
            assert desired is not Desired.ABSENT, "an unwanted keeper is ended"
            assert not seen.keeper.ours, "ours binds again"
            assert seen.listening is not Listening.ANSWERED
        case V.LEFTOVERS:
            assert seen.over
            assert seen.leftovers
        case V.GIVEN_UP:
            assert seen.record is not None
            assert seen.record.given_up
        case V.REFUSED:
            assert any(entry.kind is E.HOSTILE for _, entry in entries_of(seen))
        case V.UNVERIFIABLE:
            assert doubt(seen), "nothing is doubtful here"
        case _:
            pytest.fail(f"{plan.verdict} ends nowhere")


def entries_of(seen: Observation) -> tuple[tuple[Role, Entry], ...]:
    return (*seen.entries, (Role.LAUNCH, seen.note))


def doubt(seen: Observation) -> bool:
    """Whether something is not known that has to be known before a hand is laid on."""
    living = seen.keeper.state is K.PROVEN
    unnamed = seen.socket.present and seen.listener is None
    return (
        any(entry.kind is E.UNKNOWN for _, entry in entries_of(seen))
        or (seen.remote and seen.record is not None and not seen.record.this_boot)
        or seen.keeper.state is K.UNVERIFIABLE
        or (living and unnamed)
        or (living and seen.listener not in {None, seen.keeper.process})
        or (not living and unnamed and seen.listening is not Listening.REFUSED)
        or (not living and seen.listening is Listening.ANSWERED)
        or (not living and seen.remote and not seen.seen_alive)
        or (not living and seen.agent.state is A.UNKNOWN)
        or (not living and seen.agent.state is A.ALIVE and not seen.agent.proven)
        or (not living and seen.agent.state is A.ALIVE and seen.agent.process is None)
    )


# What must not matter.


def each_action_has_its_proof(seen: Observation, desired: Desired) -> None:
    check_plan(seen, desired, decide(seen, desired, POLICY))


def what_time_it_is_does_not_matter(seen: Observation, desired: Desired) -> None:
    plan = decide(seen, desired, POLICY)
    for by in (-NOW, EIGHTH, 2.0**20):
        assert decide(moved(seen, by), desired, POLICY) == plan


def moved(seen: Observation, by: float) -> Observation:
    """The same, seen at another time."""

    def later(entry: Entry) -> Entry:
        return replace(entry, since=entry.since + by)

    return replace(
        seen,
        now=seen.now + by,
        pid_file=later(seen.pid_file),
        socket=later(seen.socket),
        agent_file=later(seen.agent_file),
        agent=replace(seen.agent, since=seen.agent.since + by),
        note=later(seen.note),
        record=seen.record
        and replace(seen.record, restarts=tuple(each + by for each in seen.record.restarts)),
    )


def a_wall_clock_that_was_set_does_not_matter(seen: Observation, desired: Desired) -> None:
    """The files' own times say which is the newer one, and no more."""

    def dated(entry: Entry, by: int) -> Entry:
        file = entry.file
        return replace(entry, file=file and replace(file, mtime_ns=file.mtime_ns + by))

    for by in (-(10**18), 1, 10**18):
        other = replace(
            seen,
            pid_file=dated(seen.pid_file, by),
            socket=dated(seen.socket, by),
            agent_file=dated(seen.agent_file, by),
            note=dated(seen.note, by),
        )
        plan, twin = decide(seen, desired, POLICY), decide(other, desired, POLICY)
        assert replace(twin, actions=()) == replace(plan, actions=())
        assert kinds_and_processes(twin) == kinds_and_processes(plan)


def kinds_and_processes(plan: Plan) -> list[tuple[type[Action], ProcessId | None]]:
    return [(type(action), getattr(action, "process", None)) for action in plan.actions]


def the_order_of_rivals_does_not_matter(seen: Observation, desired: Desired) -> None:
    plan = decide(seen, desired, POLICY)
    twin = decide(replace(seen, rivals=seen.rivals[::-1]), desired, POLICY)
    assert set(twin.actions) == set(plan.actions)
    assert replace(twin, actions=()) == replace(plan, actions=())


def a_process_is_more_than_its_pid(seen: Observation, desired: Desired) -> None:
    """Other processes under the same numbers are treated as those were, each as its own."""

    def of(process: ProcessId | None) -> ProcessId | None:
        return process and replace(process, started=100 - process.started)

    def renamed(keeper: Keeper) -> Keeper:
        return replace(keeper, process=of(keeper.process))

    other = replace(
        seen,
        keeper=renamed(seen.keeper),
        rivals=tuple(map(renamed, seen.rivals)),
        listener=of(seen.listener),
        agent=replace(seen.agent, process=of(seen.agent.process)),
    )
    plan, twin = decide(seen, desired, POLICY), decide(other, desired, POLICY)
    expected = [(kind, of(process)) for kind, process in kinds_and_processes(plan)]
    assert kinds_and_processes(twin) == expected
    assert replace(twin, actions=()) == replace(plan, actions=())


# More doubt is never more action; a wish is no proof.


def doubt_takes_actions_away_and_brings_none(seen: Observation, desired: Desired) -> None:
    known = deadly(decide(seen, desired, POLICY))
    for doubted in doubts(seen):
        assert deadly(decide(doubted, desired, POLICY)) <= known, doubted


def doubts(seen: Observation) -> Iterator[Observation]:
    """The same world, of which a little less is known."""
    for role, entry in entries_of(seen) if seen.note.present else seen.entries:
        yield with_entry(seen, role, Entry(E.UNKNOWN, seen.now, detail="cannot read it"))
        just_come = with_entry(seen, role, replace(entry, since=seen.now))
        known = {"listening": seen.listening, "listener": seen.listener, "record": seen.record}
        yield replace(just_come, **known)  # type: ignore[arg-type]
    yield replace(seen, keeper=replace(seen.keeper, state=K.UNVERIFIABLE))
    yield replace(seen, keeper=replace(seen.keeper, age=0.0))
    yield replace(seen, agent=replace(seen.agent, proven=False))
    yield replace(seen, agent=replace(seen.agent, since=seen.now))
    yield replace(seen, leave=True)
    yield replace(seen, remote=True)
    yield replace(seen, seen_alive=False)
    if seen.listener in {None, seen.keeper.process}:
        yield replace(seen, listener=None)
    if seen.listening is Listening.REFUSED:
        yield replace(seen, listening=Listening.NOT_ASKED)
    if seen.agent.state is not A.GONE or seen.keeper.state is not K.PROVEN:
        yield replace(seen, agent=replace(seen.agent, state=A.UNKNOWN, proven=False))


def deadly(plan: Plan) -> set[Action]:
    """What cannot be taken back: a bind that is asked for in vain does no harm."""
    return {action for action in plan.actions if not isinstance(action, Rebind)}


def a_session_that_is_not_wanted_needs_the_same_proofs(seen: Observation, _: Desired) -> None:
    found, unwanted = (decide(seen, wish, POLICY) for wish in (Desired.AS_FOUND, Desired.ABSENT))
    if seen.keeper.state is K.PROVEN:
        assert all(isinstance(action, StopKeeper | Rebind) for action in unwanted.actions)
    else:
        without_wish = replace(seen, note=GONE, record=None) if seen.record else seen
        assert unwanted == decide(without_wish, Desired.AS_FOUND, POLICY)
        assert seen.record or unwanted == found


def a_wish_for_a_session_brings_no_action(seen: Observation, _: Desired) -> None:
    found, wanted = (decide(seen, wish, POLICY) for wish in (Desired.AS_FOUND, Desired.PRESENT))
    assert wanted == found or (found.verdict, wanted.verdict) == (V.ABSENT, V.MISSING)
    assert wanted.actions == found.actions


# Time.


def the_look_that_is_asked_for_comes_at_the_very_moment(
    seen: Observation, desired: Desired
) -> None:
    """Any look before brings the same plan, and the rest of the wait; that one another."""
    plan = decide(seen, desired, POLICY)
    if plan.actions or plan.again_after is None:
        return
    wait = plan.again_after
    for before in (EIGHTH / 2, wait / 2, wait - EIGHTH / 2):
        early = decide(passed(seen, before), desired, POLICY)
        assert early == replace(plan, again_after=wait - before)
    then = decide(passed(seen, wait), desired, POLICY)
    assert replace(then, again_after=None) != replace(plan, again_after=None)


def time_alone_takes_no_action_back(seen: Observation, desired: Desired) -> None:
    plan = decide(seen, desired, POLICY)
    for later in (EIGHTH, POLICY.settle, OLD) if plan.actions else ():
        assert decide(passed(seen, later), desired, POLICY) == plan


def what_is_only_waited_for_ends(seen: Observation, desired: Desired) -> None:
    """If nothing changes, the looks that were asked for end in an action or in rest."""
    for _ in range(5):
        plan = decide(seen, desired, POLICY)
        if plan.actions or plan.again_after is None:
            return
        seen = passed(seen, plan.again_after)
    pytest.fail("it is looked at again and again")


def patience_changes_when_and_not_what(seen: Observation, desired: Desired) -> None:
    """A policy without patience does at once what the other one does in the end."""
    patient = decide(passed(seen, OLD), desired, POLICY)
    hasty = decide(seen, desired, HASTY, AT_ONCE)
    assert (hasty.verdict, hasty.actions) == (patient.verdict, patient.actions)


HASTY = Policy(settle=0, start_grace=0, orphan_grace=0, lost_grace=0)
AT_ONCE = replace(LIMITS, first=0, cap=0, farewell=0)


def passed(seen: Observation, seconds: float) -> Observation:
    """The same world, later."""

    def older(keeper: Keeper) -> Keeper:
        return replace(keeper, age=keeper.age + seconds)

    return replace(
        seen,
        now=seen.now + seconds,
        keeper=older(seen.keeper),
        rivals=tuple(map(older, seen.rivals)),
    )


Law = Callable[[Observation, Desired], None]

LAWS: tuple[Law, ...] = (
    each_action_has_its_proof,
    what_time_it_is_does_not_matter,
    a_wall_clock_that_was_set_does_not_matter,
    the_order_of_rivals_does_not_matter,
    a_process_is_more_than_its_pid,
    doubt_takes_actions_away_and_brings_none,
    a_session_that_is_not_wanted_needs_the_same_proofs,
    a_wish_for_a_session_brings_no_action,
    the_look_that_is_asked_for_comes_at_the_very_moment,
    time_alone_takes_no_action_back,
    what_is_only_waited_for_ends,
    patience_changes_when_and_not_what,
)
each_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@each_law
@settings(max_examples=EXAMPLES, derandomize=not CAMPAIGN, deadline=None)
@given(seen=observations(), desired=st.sampled_from(Desired))
def test_what_always_holds(law: Law, seen: Observation, desired: Desired) -> None:
    law(seen, desired)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@each_law
def test_what_always_holds_in_every_world(law: Law) -> None:
    for desired, seen in worlds():
        try:
            law(seen, desired)
        except AssertionError as error:
            plan = decide(seen, desired, POLICY)
            raise AssertionError(f"{desired}\n{seen}\n{plan}\n{error}") from error


@pytest.mark.parametrize(
    ("desired", "never"),
    [
        (Desired.AS_FOUND, {V.MISSING}),
        (Desired.PRESENT, {V.ABSENT}),
        (
            Desired.ABSENT,
            {
                *(V.READY, V.MISSING, V.ORPHAN, V.LOST, V.ADOPT, V.UNREACHABLE),
                *(V.RESTARTING, V.GIVEN_UP),
            },
        ),
    ],
)
def test_the_worlds_that_are_gone_through_have_all_verdicts(
    desired: Desired, never: set[Verdict]
) -> None:
    verdicts = {decide(seen, wish, POLICY).verdict for wish, seen in worlds() if wish is desired}
    assert verdicts == set(Verdict) - never
