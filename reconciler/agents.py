"""The agent of a session: the child of a living keeper, or what a dead one left behind.

"No answer" is not "gone". A keeper counts as an orphan, and an agent as left behind, only
on positive evidence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from reconciler.facts import Facts, Life, Processes
from reconciler.identity import KNOWN_PROGRAMS
from reconciler.layout import SESSION_MARKER, keeper_arguments
from reconciler.observations import (
    Agent,
    AgentState,
    Entry,
    EntryKind,
    Keeper,
    KeeperState,
    Observation,
    ProcessId,
)
from reconciler.processes import SYSTEM
from reconciler.registry import Registry

AgentProbe = Callable[[str, int], bool | None]
"""The caller's own word on an agent: session id and keeper's pid → alive, gone (False), or
not known (None). It is called in the event loop's thread and must not block."""

SPAWNED = "PI_DASHBOARD_SPAWNED"
"""Every keeper sets it to ``1`` for its agent."""

BIRTH_WINDOW = (-1.0, 5.0)
"""Seconds from an agent's start until its pid file was written; keepers do so right after
the start. A clock that was set puts every process outside of it, which makes the agent
unverifiable and harms nobody."""


class Sighting(NamedTuple):
    """What a look has seen by the time that it asks for the agent."""

    sid: str
    now: float
    keeper: Keeper
    pid_file: Entry
    agent_file: Entry


class Agents:
    """Finds agents.

    Args:
        programs: base names of known keeper programs.
        registry: the dashboard's spawn registry, or None not to ask it.
        agent_probe: the caller's own word, asked first.
        processes: how the system is asked.
    """

    def __init__(
        self,
        programs: frozenset[str] = KNOWN_PROGRAMS,
        registry: Registry | None = None,
        agent_probe: AgentProbe | None = None,
        processes: Processes = SYSTEM,
    ) -> None:
        self._programs = programs
        self._registry = registry
        self._agent_probe = agent_probe
        self._processes = processes

    def find(
        self,
        seen: Sighting,
        before: Observation | None,
    ) -> Agent:
        """The agent of the session.

        Args:
            seen: the look under way.
            before: the look before it.
        """
        keeper = seen.keeper
        same_keeper = before is not None and before.keeper.process == keeper.process
        if keeper.state is KeeperState.UNVERIFIABLE:
            found = Agent(AgentState.UNKNOWN, seen.now, evidence="its keeper cannot be told")
        elif keeper.state is KeeperState.PROVEN and keeper.process is not None:
            found = self._of_living(
                seen, keeper.process, before.agent if before and same_keeper else None
            )
        else:
            found = self._of_dead(seen, before.agent if before else None)
        if before is not None and same_keeper and before.agent.state is found.state:
            found = replace(found, since=before.agent.since)
            return before.agent if found == before.agent else found  # not held twice
        return found

    def _of_living(self, seen: Sighting, keeper: ProcessId, before: Agent | None) -> Agent:
        """The agent of a living keeper: its direct child."""
        word = self._agent_probe(seen.sid, keeper.pid) if self._agent_probe else None
        if word is False:
            return Agent(AgentState.GONE, seen.now, evidence="the caller's probe says so")
        registered = self._registry.agent_pid(seen.sid, keeper.pid) if self._registry else None
        if child := self._child_among((seen.agent_file.pid, registered), keeper, seen.now):
            return child
        children = self._processes.children(keeper.pid)  # not asked for where a file names it
        if child := self._child_among(children or (), keeper, seen.now):
            return child
        if word is True:
            return Agent(AgentState.ALIVE, seen.now, evidence="the caller's probe says so")
        if children is None:
            return Agent(AgentState.UNKNOWN, seen.now, evidence="the keeper's children are hidden")
        known = before.process.pid if before is not None and before.process else None
        for pid in (seen.agent_file.pid, registered, known, *children):
            if pid and self._processes.facts(pid).life is Life.HIDDEN:
                text = f"process {pid} is hidden from us"
                process = before.process if before is not None else None
                return Agent(AgentState.UNKNOWN, seen.now, process, evidence=text)
        if evidence := _evidence_of_end(seen, before, children):
            return Agent(AgentState.GONE, seen.now, evidence=evidence)
        return Agent(AgentState.NEVER_SEEN, seen.now)

    def _child_among(
        self, pids: Iterable[int | None], parent: ProcessId, now: float
    ) -> Agent | None:
        found = (self._child(pid, parent, now) for pid in pids if pid)
        return next((child for child in found if child is not None), None)

    def _child(self, pid: int, parent: ProcessId, now: float) -> Agent | None:
        """The agent, when the pid is the keeper's living child: that is the proof."""
        facts = self._processes.facts(pid)
        if facts.process is None or facts.parent != parent.pid:
            return None
        evidence = f"process {pid} is the keeper's child"
        return Agent(AgentState.ALIVE, now, facts.process, proven=True, evidence=evidence)

    def _of_dead(self, seen: Sighting, before: Agent | None) -> Agent:
        """The agent that a dead keeper left behind, if it can be found."""
        if before is not None and before.proven and before.process is not None:
            facts = self._processes.facts(before.process.pid)
            if facts.life is Life.HIDDEN:
                text = f"process {before.process.pid} is hidden from us"
                return replace(before, state=AgentState.UNKNOWN, since=seen.now, evidence=text)
            if facts.process == before.process and not facts.dying:
                return self._outlived(seen, before, before.process)
            return Agent(AgentState.GONE, seen.now, evidence="it was seen alive, and is gone")
        registered = None
        if self._registry is not None and seen.pid_file.pid:
            registered = self._registry.agent_pid(seen.sid, seen.pid_file.pid)
        for pid in (seen.agent_file.pid, registered):
            if pid:
                return self._left(seen, pid)
        return Agent(AgentState.NEVER_SEEN, seen.now)

    def _outlived(self, seen: Sighting, before: Agent, process: ProcessId) -> Agent:
        """The child of a keeper that is dead: its agent, unless it is the keeper itself.

        A keeper that detaches is the child of its first process until that one ends.
        """
        arguments = self._processes.arguments(process.pid)
        if arguments is None and self._processes.facts(process.pid).process == process:
            text = f"the arguments of process {process.pid} cannot be read"
            return replace(before, state=AgentState.UNKNOWN, since=seen.now, evidence=text)
        run = keeper_arguments(arguments, self._programs) if arguments else None
        if run is not None and run.sid == seen.sid:
            evidence = f"process {process.pid} is a keeper that has just detached"
            return Agent(AgentState.NEVER_SEEN, seen.now, evidence=evidence)
        return replace(before, since=seen.now)

    def _left(self, seen: Sighting, pid: int) -> Agent:
        """Whether a process is what the dead keeper of the session left behind."""
        facts = self._processes.facts(pid)
        gone = Agent(AgentState.GONE, seen.now, evidence=f"agent {pid} is gone")
        if facts.life is Life.DEAD or facts.dying:
            return gone
        text = f"process {pid} may be its agent"
        maybe = Agent(AgentState.UNKNOWN, seen.now, facts.process, evidence=text)
        if facts.life is Life.HIDDEN:
            return maybe
        variables = self._processes.variables(pid, (SESSION_MARKER, SPAWNED))
        if variables is None:
            return maybe if self._processes.facts(pid).process == facts.process else gone
        marker, spawned = variables
        parent = self._session_of_keeper(facts.parent)
        if parent and seen.sid in {parent, marker}:
            return maybe  # a living keeper's, of whichever folder: nobody's leftover
        if parent or spawned != "1" or marker not in {"", seen.sid}:
            return replace(gone, evidence=f"pid {pid} is another process now")
        if not (marker or _born_for(seen, facts)):
            return maybe
        text = f"agent {pid} outlived its keeper"
        return Agent(AgentState.ALIVE, seen.now, facts.process, proven=True, evidence=text)

    def _session_of_keeper(self, pid: int) -> str:
        """The session of the keeper that a process is, by its arguments; empty: it is none."""
        arguments = self._processes.arguments(pid)
        run = keeper_arguments(arguments, self._programs) if arguments else None
        return run.sid if run else ""


def _evidence_of_end(seen: Sighting, before: Agent | None, children: tuple[int, ...]) -> str:
    """Why the agent of a living keeper that has no living child is known to be gone.

    What the agent pid file says counts when the pid file beside it is this keeper's.
    """
    if before is not None and before.process is not None:
        return f"agent {before.process.pid} was seen alive, and is gone"
    if before is not None and before.state is AgentState.GONE:
        return before.evidence
    if children:
        return "the keeper's child is a zombie"
    written = _wall_age(seen.agent_file)
    own = seen.keeper.process is not None and seen.pid_file.pid == seen.keeper.process.pid
    if own and written is not None and 0 <= written <= seen.keeper.age:
        return f"agent {seen.agent_file.pid}, which the keeper wrote down, is gone"
    return ""


def _born_for(seen: Sighting, facts: Facts) -> bool:
    """Whether a process started as the agent of the keeper that the files name.

    It is in the session (setsid) that the keeper led, whose pid is nobody's now: the kernel
    gives a pid to nobody else while it stands for a session. Or it started when its pid file
    was written.
    """
    if facts.session == seen.pid_file.pid != 0 and seen.keeper.state is KeeperState.NONE:
        return True
    written = _wall_age(seen.agent_file)
    if written is None or facts.process is None or facts.process.pid != seen.agent_file.pid:
        return False
    earliest, latest = BIRTH_WINDOW
    return earliest <= facts.age - written <= latest


def _wall_age(entry: Entry) -> float | None:
    """Seconds since a pid file was written, by the wall clock: evidence, never an age."""
    if entry.kind is not EntryKind.PID or entry.file is None:
        return None
    return time.time() - entry.file.mtime_ns / 1e9
