from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import alive, dead_pid, identity, until
from stand_ins import WAITS, agent_of, keeper_without_agent, kill, running, spawn

from reconciler.agents import SPAWNED, AgentProbe, Agents, Sighting
from reconciler.facts import DEAD, HIDDEN, Facts, Processes
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager
from reconciler.layout import SESSION_MARKER, registry_file
from reconciler.observations import Agent, AgentState, KeeperState
from reconciler.probe import Probe
from reconciler.processes import LINUX
from reconciler.registry import Registry

SID = "5f0e7c1e-0c50-4f0e-9b39-4e4a3a2f3d11"
YEAR = 365 * 24 * 3600
CHILD = """
child = os.fork()
if child: print(os.getpid(), child, flush=True)
signal.pause()
"""


@pytest.fixture
def opened(folder: Path) -> Iterator[Folder]:
    with Folder(folder) as opened:
        yield opened


@pytest.fixture
def probe(opened: Folder) -> Probe:
    return Probe(opened)


class Odd(type(LINUX)):  # type: ignore[misc]
    """The system, but for the answers that a test gives."""

    def __init__(self, **answers: Callable[..., object]) -> None:
        for name, answer in answers.items():
            setattr(self, name, answer)


def pid_file(folder: Path) -> Path:
    return folder / f"{SID}.rpc.sock.pid"


def agent_file(folder: Path) -> Path:
    return folder / f"{SID}.rpc.sock.pi-pid"


def shift(path: Path, seconds: float) -> None:
    """Move a file's own time, as if the clock had been set since."""
    at = time.time() + seconds
    os.utime(path, (at, at))


def probing(opened: Folder, word: AgentProbe) -> Probe:
    return Probe(opened, agent_probe=word)


# The agent of a living keeper.


def test_the_child_that_the_agent_pid_file_names(manager: KeeperManager, probe: Probe) -> None:
    spawn(manager, SID)
    pid = agent_of(manager, SID)
    agent = probe.look(SID).agent
    assert (agent.state, agent.process) == (AgentState.ALIVE, identity(pid))
    assert agent.proven
    assert agent.evidence == f"process {pid} is the keeper's child"


def test_children_are_asked_for_only_where_no_file_names_the_agent(
    manager: KeeperManager, opened: Folder
) -> None:
    """To ask costs two walks in /proc, session by session, at every full look."""
    keeper = spawn(manager, SID).keeper_pid
    agent = identity(agent_of(manager, SID))
    asked: list[int] = []

    def children(pid: int) -> tuple[int, ...]:
        asked.append(pid)
        return (agent.pid,)

    probe = Probe(opened, processes=Odd(children=children))
    assert (probe.look(SID).agent.process, asked) == (agent, [])
    agent_file(manager.sessions_dir).unlink()
    assert (probe.look(SID).agent.process, asked) == (agent, [keeper])


def test_the_child_of_a_keeper_of_another_make(node_manager: KeeperManager, probe: Probe) -> None:
    spawn(node_manager, SID)
    pid = agent_of(node_manager, SID)
    agent = probe.look(SID).agent
    assert (agent.state, agent.process) == (AgentState.ALIVE, identity(pid))


@pytest.mark.parametrize("text", [None, "", "99999999", "recycled"])
def test_the_child_when_the_agent_pid_file_does_not_name_it(
    manager: KeeperManager, probe: Probe, innocent: int, text: str | None
) -> None:
    spawn(manager, SID)
    pid = agent_of(manager, SID)
    path = agent_file(manager.sessions_dir)
    path.unlink()
    if text is not None:
        path.write_text(str(innocent) if text == "recycled" else text)
    assert probe.look(SID).agent.process == identity(pid)


def test_the_child_that_the_registry_names(manager: KeeperManager, opened: Folder) -> None:
    """Where the keeper's children cannot be read."""
    keeper = spawn(manager, SID).keeper_pid
    pid = agent_of(manager, SID)
    agent_file(manager.sessions_dir).unlink()
    path = registry_file(manager.sessions_dir)
    path.write_text(json.dumps({"entries": [{"keeperPid": keeper, "piPid": pid}]}))
    blind = Odd(children=lambda _: None)
    look = Probe(opened, registry=Registry(path), processes=blind).look
    assert look(SID).agent.process == identity(pid)
    path.write_text(json.dumps({"entries": [{"keeperPid": keeper, "piPid": os.getpid()}]}))
    assert look(SID).agent.state is AgentState.UNKNOWN


def test_a_zombie_is_gone(manager: KeeperManager, probe: Probe) -> None:
    """The keeper is stopped, so it cannot see the end of its agent."""
    keeper = spawn(manager, SID).keeper_pid
    os.kill(keeper, signal.SIGSTOP)
    kill(agent_of(manager, SID))
    agent = probe.look(SID).agent
    assert (agent.state, agent.evidence) == (AgentState.GONE, "the keeper's child is a zombie")


@pytest.mark.parametrize(
    ("word", "state"),
    [(True, AgentState.ALIVE), (None, AgentState.ALIVE), (False, AgentState.GONE)],
)
def test_the_callers_word_on_an_agent_that_lives(
    manager: KeeperManager, opened: Folder, *, word: bool | None, state: AgentState
) -> None:
    keeper = spawn(manager, SID).keeper_pid
    asked: list[tuple[str, int]] = []

    def say(sid: str, pid: int) -> bool | None:
        asked.append((sid, pid))
        return word

    agent = probing(opened, say).look(SID).agent
    assert agent.state is state
    assert asked == [(SID, keeper)]
    assert agent.proven == (word is not False)


@pytest.mark.parametrize(
    ("word", "state"),
    [(True, AgentState.ALIVE), (None, AgentState.GONE), (False, AgentState.GONE)],
)
def test_the_callers_word_on_an_agent_that_is_dead(
    manager: KeeperManager, opened: Folder, *, word: bool | None, state: AgentState
) -> None:
    keeper = spawn(manager, SID).keeper_pid
    os.kill(keeper, signal.SIGSTOP)
    kill(agent_of(manager, SID))
    agent = probing(opened, lambda *_: word).look(SID).agent
    assert (agent.state, agent.proven, agent.process) == (state, False, None)


def test_no_agent_was_ever_seen(opened: Folder, probe: Probe) -> None:
    with keeper_without_agent(opened.path, SID) as (pid,):
        pid_file(opened.path).write_text(str(pid))
        assert probe.look(SID).agent.state is AgentState.NEVER_SEEN
        blind = Probe(opened, processes=Odd(children=lambda _: None))
        assert blind.look(SID).agent.state is AgentState.UNKNOWN


def test_an_agent_that_was_seen_and_is_gone(opened: Folder, probe: Probe) -> None:
    with keeper_without_agent(opened.path, SID, code=CHILD) as (pid, child):
        pid_file(opened.path).write_text(str(pid))
        first = probe.look(SID, now=1.0)
        assert first.agent.process == identity(child)
        unseen = Probe(opened, processes=Odd(children=lambda _: ()))
        os.kill(child, signal.SIGKILL)
        until(lambda: not alive(child))
        second = unseen.look(SID, first, now=2.0)
        assert (second.agent.state, second.agent.since) == (AgentState.GONE, 2.0)
        assert second.agent.evidence == f"agent {child} was seen alive, and is gone"
        third = unseen.look(SID, second, now=3.0)
        assert third.agent == second.agent


@pytest.mark.parametrize(
    ("written", "state"),
    [
        pytest.param(0.0, AgentState.GONE, id="by this keeper"),
        pytest.param(-60.0, AgentState.NEVER_SEEN, id="by its forerunner"),
        pytest.param(-YEAR, AgentState.NEVER_SEEN, id="before the clock was set forward"),
        pytest.param(+60.0, AgentState.NEVER_SEEN, id="before the clock was set back"),
        pytest.param(+YEAR, AgentState.NEVER_SEEN, id="before the clock was set back by a year"),
    ],
)
def test_an_agent_that_the_keeper_wrote_down_and_that_is_gone(
    opened: Folder, probe: Probe, written: float, state: AgentState
) -> None:
    with keeper_without_agent(opened.path, SID) as (pid,):
        pid_file(opened.path).write_text(str(pid))
        agent_file(opened.path).write_text(str(dead_pid()))
        shift(agent_file(opened.path), written)
        assert probe.look(SID).agent.state is state


def test_what_another_keeper_wrote_down_tells_nothing_of_this_ones_agent(
    opened: Folder, probe: Probe
) -> None:
    with keeper_without_agent(opened.path, SID) as (pid,):
        agent_file(opened.path).write_text(str(dead_pid()))
        for text, state in ((str(dead_pid()), AgentState.NEVER_SEEN), (str(pid), AgentState.GONE)):
            pid_file(opened.path).write_text(text)
            seen = probe.look(SID, scanned=(pid,))
            assert seen.keeper.process == identity(pid)
            assert seen.agent.state is state


@pytest.mark.parametrize("known_by", ["an earlier look", "its pid file"])
def test_an_agent_that_is_hidden_is_not_gone(opened: Folder, known_by: str) -> None:
    with keeper_without_agent(opened.path, SID, code=CHILD) as (pid, child):
        pid_file(opened.path).write_text(str(pid))
        before = None
        if known_by == "an earlier look":
            before = Probe(opened).look(SID, now=1.0)
            assert before.agent.process == identity(child)
        else:
            agent_file(opened.path).write_text(str(child))
        hides = Odd(
            children=lambda _: (),
            facts=lambda pid: HIDDEN if pid == child else LINUX.facts(pid),
        )
        look = Probe(opened, processes=hides).look
        seen = look(SID, before, now=2.0)
        assert (seen.keeper.process, seen.agent.state) == (identity(pid), AgentState.UNKNOWN)
        assert seen.agent.evidence == f"process {child} is hidden from us"
        assert look(SID, seen, now=3.0).agent.state is not AgentState.GONE
        kill(pid)
        for known in (before, seen):
            assert look(SID, known, now=4.0).agent.state is not AgentState.GONE
        if before is not None:
            left = look(SID, before, now=4.0).agent
            assert (left.state, left.process) == (AgentState.UNKNOWN, before.agent.process)
            unseen = look(SID, seen, now=4.0)
            again = Probe(opened).look(SID, unseen, now=5.0).agent
            assert again.state is not AgentState.GONE


def test_since_when_a_state_holds(opened: Folder, probe: Probe) -> None:
    with keeper_without_agent(opened.path, SID, code=CHILD) as (pid, child):
        pid_file(opened.path).write_text(str(pid))
        first = probe.look(SID, now=10.0)
        second = probe.look(SID, first, now=20.0)
        assert (first.agent.since, second.agent.since) == (10.0, 10.0)
        os.kill(child, signal.SIGKILL)
        until(lambda: not alive(child))
        third = probe.look(SID, second, now=30.0)
        assert (third.agent.state, third.agent.since) == (AgentState.GONE, 30.0)
        kill(pid)
        fourth = probe.look(SID, third, now=40.0)
        assert fourth.agent.since == 40.0
        assert probe.look(SID, fourth, now=50.0).agent.since == 40.0


def test_of_a_keeper_that_cannot_be_told_the_agent_cannot_either(
    opened: Folder, probe: Probe
) -> None:
    with running(WAITS, SID) as (pid,):
        pid_file(opened.path).write_text(str(pid))
        assert probe.look(SID).agent.state is AgentState.UNKNOWN


# What a dead keeper has left.


def left_by_dead_keeper(folder: Path, agent: int, keeper: int | None = None) -> None:
    pid_file(folder).write_text(str(keeper or dead_pid()))
    agent_file(folder).write_text(str(agent))


def environment(marker: str | None, spawned: str | None) -> dict[str, str]:
    given = {SESSION_MARKER: marker, SPAWNED: spawned, "PATH": os.environ["PATH"]}
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize(
    ("marker", "spawned", "written", "state"),
    [
        pytest.param(SID, "1", 0, AgentState.ALIVE, id="marked"),
        pytest.param(SID, "1", -YEAR, AgentState.ALIVE, id="marked, clock set forward"),
        pytest.param(SID, "1", YEAR, AgentState.ALIVE, id="marked, clock set back"),
        pytest.param("another", "1", 0, AgentState.GONE, id="marked for another session"),
        pytest.param(SID, None, 0, AgentState.GONE, id="not spawned by a keeper"),
        pytest.param(None, None, 0, AgentState.GONE, id="recycled"),
        pytest.param(None, "0", 0, AgentState.GONE, id="spawned says no"),
        pytest.param(None, "1", 0, AgentState.ALIVE, id="born when it was written down"),
        pytest.param(None, "1", 4, AgentState.ALIVE, id="written down late"),
        pytest.param(None, "1", 60, AgentState.UNKNOWN, id="born long before"),
        pytest.param(None, "1", -60, AgentState.UNKNOWN, id="born long after"),
        pytest.param(None, "1", -YEAR, AgentState.UNKNOWN, id="clock set forward by a year"),
        pytest.param(None, "1", YEAR, AgentState.UNKNOWN, id="clock set back by a year"),
    ],
)
def test_an_agent_that_may_have_outlived_its_keeper(
    opened: Folder,
    *,
    marker: str | None,
    spawned: str | None,
    written: float,
    state: AgentState,
) -> None:
    probe = Probe(opened)
    with running(env=environment(marker, spawned)) as (pid,):
        left_by_dead_keeper(opened.path, pid)
        shift(agent_file(opened.path), written)
        agent = probe.look(SID).agent
        assert agent.state is state
        assert agent.proven == (state is AgentState.ALIVE)
        if state is not AgentState.GONE:
            assert agent.process == identity(pid)


SESSION = """
if os.fork():
    os.wait()
    signal.pause()
os.setsid()
leader = os.getpid()
if os.fork() == 0:
    os.write(1, b"%d %d %d\\n" % (os.getppid(), leader, os.getpid()))
    while os.getppid() == leader: pass
    signal.pause()
signal.pause()
"""


def test_an_agent_is_known_by_the_session_that_its_dead_keeper_led(
    opened: Folder, probe: Probe
) -> None:
    with running(SESSION, env=environment(None, "1")) as (_, leader, pid):
        kill(leader)
        left_by_dead_keeper(opened.path, pid, leader)
        shift(agent_file(opened.path), -YEAR)
        assert LINUX.facts(pid).session == leader
        agent = probe.look(SID).agent
        assert (agent.state, agent.proven) == (AgentState.ALIVE, True)
        assert agent.process == identity(pid)
        pid_file(opened.path).write_text(str(dead_pid()))
        assert probe.look(SID).agent.state is AgentState.UNKNOWN


def test_the_session_of_a_process_that_only_has_the_dead_keepers_pid_proves_nothing(
    opened: Folder, probe: Probe
) -> None:
    code = SESSION.replace("while os.getppid() == leader: pass", "")
    with running(code, env=environment(None, "1")) as (_, leader, pid):
        left_by_dead_keeper(opened.path, pid, leader)
        shift(agent_file(opened.path), -YEAR)
        seen = probe.look(SID)
        assert (seen.keeper.state, LINUX.facts(pid).session) == (KeeperState.RECYCLED, leader)
        assert (seen.agent.state, seen.agent.proven) == (AgentState.UNKNOWN, False)


def test_a_pid_file_that_names_nobody_leads_no_session(opened: Folder) -> None:
    with running(env=environment(None, "1")) as (pid,):
        agent_file(opened.path).write_text(str(pid))
        shift(agent_file(opened.path), -YEAR)
        orphan = Odd(facts=lambda pid: replace(LINUX.facts(pid), session=0))
        seen = Probe(opened, processes=orphan).look(SID)
        assert seen.pid_file.pid == 0
        assert seen.agent.state is AgentState.UNKNOWN


def test_a_child_whose_arguments_cannot_be_read_may_be_a_keeper(
    opened: Folder, probe: Probe
) -> None:
    """No descriptor to read them with, say."""
    with keeper_without_agent(opened.path, SID, code=CHILD) as (pid, child):
        pid_file(opened.path).write_text(str(pid))
        before = probe.look(SID)
        kill(pid)
        blind = Probe(opened, processes=Odd(arguments=lambda _: None))
        seen = blind.look(SID, before)
        assert seen.agent.state is AgentState.UNKNOWN
        assert seen.agent.evidence == f"the arguments of process {child} cannot be read"
        assert "a keeper that has just detached" in probe.look(SID, seen).agent.evidence


def test_the_child_of_a_living_keeper_is_nobodys_leftover(opened: Folder) -> None:
    """Of whichever folder, and though all else fits."""
    with keeper_without_agent(opened.path.parent, "s2", code=CHILD) as (_, child):
        marked = Odd(
            variables=lambda _, names: tuple({SESSION_MARKER: SID, SPAWNED: "1"}[n] for n in names)
        )
        left_by_dead_keeper(opened.path, child)
        agent = Probe(opened, processes=marked).look(SID).agent
        assert (agent.state, agent.proven) == (AgentState.UNKNOWN, False)
        assert agent.evidence == f"process {child} may be its agent"


@pytest.mark.parametrize("marker", ["s2", ""])
def test_the_agent_of_another_sessions_keeper_has_only_a_number_in_common(
    opened: Folder, marker: str
) -> None:
    """The dead session's agent has ended, and its number was given away."""
    with keeper_without_agent(opened.path, "s2", code=CHILD) as (_, child):
        marked = Odd(variables=lambda *_: (marker, "1"))
        left_by_dead_keeper(opened.path, child)
        agent = Probe(opened, processes=marked).look(SID).agent
        assert (agent.state, agent.process) == (AgentState.GONE, None)
        assert agent.evidence == f"pid {child} is another process now"


def test_the_child_of_a_keeper_of_the_same_session_may_be_its_agent(opened: Folder) -> None:
    with keeper_without_agent(opened.path.parent, SID, code=CHILD) as (_, child):
        marked = Odd(variables=lambda *_: ("", "1"))
        left_by_dead_keeper(opened.path, child)
        agent = Probe(opened, processes=marked).look(SID).agent
        assert (agent.state, agent.proven) == (AgentState.UNKNOWN, False)


def test_an_environment_that_cannot_be_read_says_nothing(opened: Folder, probe: Probe) -> None:
    with running(env={}) as (pid,):
        left_by_dead_keeper(opened.path, pid)
        assert LINUX.variable(pid, SESSION_MARKER) is None
        agent = probe.look(SID).agent
        assert (agent.state, agent.proven) == (AgentState.UNKNOWN, False)


def answers(*facts: Facts) -> Callable[[int], Facts]:
    """Answers in turn, the last one for ever; of other pids the truth."""
    left = list(facts)
    pids = {each.process.pid for each in facts if each.process}

    def answer(pid: int) -> Facts:
        if pid not in pids:
            return LINUX.facts(pid)
        return left.pop(0) if len(left) > 1 else left[0]

    return answer


@pytest.mark.parametrize(
    ("change", "state"),
    [
        pytest.param([{"dying": True}], AgentState.GONE, id="dying"),
        pytest.param([{}, DEAD], AgentState.GONE, id="ends while its environment is read"),
    ],
)
def test_an_agent_at_its_end(
    opened: Folder, change: list[dict[str, bool] | Facts], state: AgentState
) -> None:
    with running(env={}) as (pid,):
        truth = LINUX.facts(pid)
        told = [c if isinstance(c, Facts) else replace(truth, **c) for c in change]  # type: ignore[arg-type]
        left_by_dead_keeper(opened.path, pid)
        assert Probe(opened, processes=Odd(facts=answers(*told))).look(SID).agent.state is state


def test_a_hidden_process_may_be_the_agent(opened: Folder) -> None:
    pid_file(opened.path).write_text(str(dead_pid()))
    agent_file(opened.path).write_text("12")
    odd = Odd(facts=lambda pid: HIDDEN if pid == 12 else LINUX.facts(pid))
    agent = Probe(opened, processes=odd).look(SID).agent
    assert (agent.state, agent.proven) == (AgentState.UNKNOWN, False)


def test_a_dead_agent_of_a_dead_keeper(opened: Folder, probe: Probe) -> None:
    left_by_dead_keeper(opened.path, dead_pid())
    assert probe.look(SID).agent.state is AgentState.GONE


def test_nothing_tells_of_an_agent(opened: Folder, probe: Probe) -> None:
    pid_file(opened.path).write_text(str(dead_pid()))
    assert probe.look(SID).agent.state is AgentState.NEVER_SEEN


def test_an_agent_that_the_registry_tells_of(opened: Folder) -> None:
    path = registry_file(opened.path)
    probe = Probe(opened, registry=Registry(path))
    with running(env=environment(SID, "1")) as (pid,):
        keeper = dead_pid()
        pid_file(opened.path).write_text(str(keeper))
        path.write_text(json.dumps({"entries": [{"keeperPid": keeper, "piPid": pid}]}))
        agent = probe.look(SID).agent
        assert (agent.process, agent.proven) == (identity(pid), True)


def test_an_agent_that_only_the_registry_tells_of_needs_more_than_its_age(opened: Folder) -> None:
    path = registry_file(opened.path)
    probe = Probe(opened, registry=Registry(path))
    with running(env=environment(None, "1")) as (pid,):
        keeper = dead_pid()
        pid_file(opened.path).write_text(str(keeper))
        path.write_text(json.dumps({"entries": [{"keeperPid": keeper, "piPid": pid}]}))
        assert probe.look(SID).agent.state is AgentState.UNKNOWN


def test_an_agent_that_was_seen_as_the_child_of_the_dead_keeper(
    node_manager: KeeperManager, probe: Probe
) -> None:
    """That is proof enough, without any file or mark."""
    keeper = spawn(node_manager, SID).keeper_pid
    pid = agent_of(node_manager, SID)
    os.kill(pid, signal.SIGSTOP)  # the end of its input would end it
    before = probe.look(SID)
    kill(keeper)
    agent_file(node_manager.sessions_dir).unlink()
    after = probe.look(SID, before)
    assert (after.agent.state, after.agent.process) == (AgentState.ALIVE, identity(pid))
    assert after.agent.proven
    kill(pid)
    last = probe.look(SID, after)
    assert (last.agent.state, last.agent.process) == (AgentState.GONE, None)
    assert last.agent.evidence == "it was seen alive, and is gone"


def test_without_any_source(opened: Folder) -> None:
    """A bare finder works on facts alone."""
    system: Processes = LINUX
    seen = Probe(opened).look(SID)
    sighting = Sighting(SID, seen.now, seen.keeper, seen.pid_file, seen.agent_file)
    found = Agents(processes=system).find(sighting, None)
    assert found == Agent(AgentState.NEVER_SEEN, seen.now)
