"""Carrying out a plan: signals by the ladder, removals, adoptions.

Every action proves once more, at the moment of acting, what the look has seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from reconciler import launches
from reconciler.facts import Processes
from reconciler.ladder import Ladder, end
from reconciler.layout import Role, file_name
from reconciler.observations import KeeperState, Observation, ProcessId
from reconciler.plans import (
    Action,
    Adopt,
    Forget,
    GiveUp,
    Instant,
    Rebind,
    Remove,
    Stop,
    StopAgent,
    StopKeeper,
    StopLeftovers,
)
from reconciler.probe import Probe
from reconciler.processes import SYSTEM, Target
from reconciler.removal import Removal, remove

_ANOTHER = "another launch note stands there"


@dataclass(frozen=True, slots=True)
class Done:
    """What came of one action."""

    action: Action
    success: bool
    detail: str
    duration: float
    """Seconds."""


class Effects:
    """Acts on the sessions of one folder.

    Args:
        probe: looks at that folder, and holds the proofs.
        ladder: how processes are ended.
        processes: how the system is asked.
    """

    def __init__(
        self, probe: Probe, ladder: Ladder | None = None, processes: Processes = SYSTEM
    ) -> None:
        self._probe = probe
        self._ladder = ladder or Ladder()
        self._processes = processes

    def instant(self, seen: Observation, action: Instant) -> Done:
        """Carry out an action that needs no waiting.

        Raises:
            OSError: the system refused; nothing was left half done.
        """
        start = time.monotonic()
        success, detail = self._act(seen.sid, action)
        return Done(action, success, detail, time.monotonic() - start)

    def _act(self, sid: str, action: Instant) -> tuple[bool, str]:
        match action:
            case Remove():
                removal = remove(self._probe.folder, sid, action.entries)
                return removal.complete, _told(removal)
            case Rebind():
                told = self._rebind(sid, action.process)
                return told, "told to bind again" if told else "not the keeper any more"
            case Adopt():
                written = self._adopt(sid, action)
                return written, "pid file written" if written else "the pid file has changed"
            case GiveUp(note):
                noted = launches.give_up(self._probe.folder, sid, note)
                return noted, "noted down" if noted else _ANOTHER
            case Forget(note):
                gone = launches.forget_judged(self._probe.folder, sid, note)
                return gone, "launch note removed" if gone else _ANOTHER

    async def stop(self, seen: Observation, action: Stop) -> Done:
        """End processes by the ladder, and return when they are dead or no more can be done.

        Raises:
            OSError: no descriptor is left to hold the process by. Nothing was signalled.
        """
        start = time.monotonic()
        if isinstance(action, StopLeftovers):
            success, detail = await self._stop_leftovers(seen.sid, action.processes)
        else:
            success, detail = await self._stop_one(seen, action)
        return Done(action, success, detail, time.monotonic() - start)

    async def _stop_leftovers(self, sid: str, processes: Sequence[ProcessId]) -> tuple[bool, str]:
        """All at the same time, each by itself: one is no proof of another in its group."""
        with contextlib.ExitStack() as held:
            targets = self._hold_leftovers(sid, processes, held)
            ends = await asyncio.gather(
                *(end(target, self._ladder, still=still) for target, still in targets)
            )
        details = Tally(detail for _, detail in ends)
        if unheld := len(processes) - len(targets):
            details["not held yet, too many at once"] = unheld
        told = ", ".join(f"{count} {detail}" for detail, count in details.items())
        return not unheld and all(success for success, _ in ends), told

    def _hold_leftovers(
        self, sid: str, processes: Iterable[ProcessId], held: contextlib.ExitStack
    ) -> list[tuple[Target, Callable[[], bool]]]:
        """As many as there are descriptors for; the next look brings the rest."""
        targets: list[tuple[Target, Callable[[], bool]]] = []
        for process in processes:
            prove = functools.partial(self._probe.leftovers.proves, sid, process)
            try:
                target = held.enter_context(Target(process, prove, self._processes))
            except OSError:
                if not targets:
                    raise
                break
            targets.append((target, prove))
        return targets

    async def _stop_one(
        self, seen: Observation, action: StopKeeper | StopAgent
    ) -> tuple[bool, str]:
        at_once = isinstance(action, StopKeeper) and action.at_once
        group = isinstance(action, StopKeeper) and not seen.rivals  # the winner may be in it
        with contextlib.ExitStack() as held:
            target = held.enter_context(self._target(seen, action))
            # Its agents first, while the keeper proves them: else, were we killed in between,
            # nobody could tell any more whose they are. It must not see them go.
            if at_once and target.send(signal.SIGSTOP):
                try:
                    for agent in self._agents_of(seen, action.process, held):
                        await end(agent, self._ladder)
                except BaseException:
                    target.send(signal.SIGKILL)  # nobody would wake it
                    raise
            success, detail = await end(target, self._ladder, group=group, at_once=at_once)
        return success, detail

    def _target(self, seen: Observation, action: StopKeeper | StopAgent) -> Target:
        def prove() -> bool:
            if isinstance(action, StopKeeper):
                return self._probe.identity.proves_keeper(seen.sid, action.process)
            return seen.agent.proven and seen.agent.process == action.process

        return Target(action.process, prove, self._processes)

    def _agents_of(
        self, seen: Observation, keeper: ProcessId, held: contextlib.ExitStack
    ) -> list[Target]:
        """What a keeper that gets no chance to end its agent would leave behind.

        Held, and proven to be its children, while it lives. A child that is a keeper itself,
        or that listens, is nobody's agent.
        """
        targets = []
        for pid in self._processes.children(keeper.pid) or ():
            process = self._processes.facts(pid).process
            if process is not None and process != seen.listener:
                prove = functools.partial(self._is_agent_of, seen.sid, process, keeper)
                targets.append(held.enter_context(Target(process, prove, self._processes)))
        return targets

    def _is_agent_of(self, sid: str, process: ProcessId, keeper: ProcessId) -> bool:
        facts = self._processes.facts(process.pid)
        known = self._probe.identity.identify(sid, process.pid, facts)
        return (
            facts.parent == keeper.pid
            and known.state is not KeeperState.PROVEN
            and not self._probe.identity.mentions_keeper(process.pid)
        )

    def _rebind(self, sid: str, process: ProcessId) -> bool:
        def prove() -> bool:
            return self._probe.identity.proves_keeper(sid, process)

        with Target(process, prove, self._processes) as target:
            # A keeper that was held up at its very start does not catch the signal yet.
            return self._processes.catches(process.pid, signal.SIGHUP) and target.send(
                signal.SIGHUP
            )

    def _adopt(self, sid: str, action: Adopt) -> bool:
        """Write the pid file of a listening keeper, in place of the one that was judged."""
        folder, name = self._probe.folder, file_name(Role.PID_FILE, sid)
        if not self._probe.identity.proves_keeper(sid, action.process):
            return False
        if action.replaced is not None:
            removal = remove(folder, sid, ((Role.PID_FILE, action.replaced),), listening=True)
            if not removal.complete:
                return False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(name, flags, 0o600, dir_fd=folder.fd)
            try:
                os.write(descriptor, str(action.process.pid).encode())
            except OSError:
                os.unlink(name, dir_fd=folder.fd)
                raise
            finally:
                os.close(descriptor)
            return True
        return False


def _told(removal: Removal) -> str:
    if removal.locked:
        return "a keeper holds the session's lock"
    return ", ".join(f"{role.value} {fate.value}" for role, fate in removal.fates)
