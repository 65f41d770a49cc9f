"""Ending a session, and what it has left behind.

It walks the same way as the background process does, look by look, until nothing is left;
there is no second way to end a session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from reconciler import launches
from reconciler.effects import Done, Effects
from reconciler.errors import (
    FolderError,
    NoSuchSessionError,
    ReconcilerError,
    StillAliveError,
    UnverifiableError,
)
from reconciler.folder import Folder
from reconciler.ladder import Ladder
from reconciler.leftovers import forget_wish, wish_to_leave
from reconciler.observations import KeeperState, Observation, ProcessId
from reconciler.plans import Action, Instant, Plan, Stop, StopLeftovers, Verdict
from reconciler.probe import Probe
from reconciler.processes import Target, is_over
from reconciler.state import Desired, Policy, decide

_OVER = frozenset({Verdict.ABSENT, Verdict.LEFTOVERS})
_STOP_TRIES = 20
_STOP_PAUSE = 0.05


@dataclass(frozen=True, slots=True)
class StoppedSession:
    """A session that was ended."""

    sid: str
    keeper_pid: int | None
    elapsed: float
    """Seconds."""
    leftovers: int = 0
    """Processes that it had started besides its agent, and that were ended with it."""


def keep_no_longer(folder: Folder, sid: str, *, over: bool = False) -> bool:
    """From here on the reconciler does not start the session again.

    Args:
        folder: the sessions folder.
        sid: the session's id.
        over: it was ended meanwhile. Who has spawned it may have noted its policy down just
            before that; a new session of its name is left alone.

    Returns:
        Whether the session had a restart policy.

    Raises:
        FolderError: the folder cannot be written to. Nothing was done.
    """
    try:
        return (launches.forget_over if over else launches.forget)(folder, sid)
    except OSError as error:
        raise FolderError(
            f"sessions folder {str(folder.path)!r} cannot be written to, to end the "
            f"restarts of session {sid}: {error.strerror}"
        ) from error


def note_wish(folder: Folder, sid: str, *, leave: bool) -> None:
    """Note down, for whoever works on the folder, what is to become of leftovers.

    Raises:
        FolderError: the folder cannot be written to. Nothing was changed.
    """
    if not leave:
        forget_wish(folder, sid)
        return
    try:
        wish_to_leave(folder, sid)
    except OSError as error:
        raise FolderError(
            f"sessions folder {str(folder.path)!r} cannot be written to, to note down "
            f"what is to be left alone: {error.strerror}"
        ) from error


async def end_session(
    seen: Observation,
    probe: Probe,
    policy: Policy,
    ladder: Ladder,
    still_the_one: Callable[[], bool] = lambda: True,
) -> None:
    """Look, decide, act, and look again until the session is over.

    Args:
        seen: the newest look at it.
        probe: looks at the folder.
        policy: the times that decisions depend on.
        ladder: how processes are ended.
        still_the_one: asked after each look; if not, it was another session that was seen.

    Raises:
        NoSuchSessionError: it is not the one any more. The other one was left alone.
        UnverifiableError: whose its process or file is cannot be proven.
        StillAliveError: a process hangs in the kernel and outlives SIGKILL.
        ReconcilerError: the system refused.
    """
    effects = Effects(probe, ladder)
    failures = 0
    processes = set(processes_of(seen))
    while (plan := decide(seen, Desired.ABSENT, policy)).verdict not in _OVER:
        if not still_the_one():
            raise NoSuchSessionError(f"session {seen.sid} was stopped meanwhile")
        if not plan.actions and plan.again_after is None:
            raise UnverifiableError(f"session {seen.sid} was left alone: {plan.reason}")
        for action in plan.actions:
            done = await _act(effects, seen, action)
            failures = 0 if done.success else failures + 1
            if failures and "alive" in done.detail:
                raise StillAliveError(f"session {seen.sid} was not ended: {done.detail}")
            if failures >= _STOP_TRIES:
                raise UnverifiableError(f"session {seen.sid} was not ended: {done.detail}")
        if plan.again_after is not None or failures:
            await asyncio.sleep(plan.again_after or _STOP_PAUSE)
        seen = probe.look(seen.sid, seen)
        processes |= processes_of(seen)
    await outlast(processes, ladder)


async def _act(effects: Effects, seen: Observation, action: Action) -> Done:
    try:
        if isinstance(action, Instant):
            return effects.instant(seen, action)
        if isinstance(action, Stop):
            return await effects.stop(seen, action)
    except OSError as error:
        raise ReconcilerError(f"session {seen.sid}: {error}") from error
    raise TypeError(f"this is no part of a stop: {action}")  # what is not wanted is not started


async def end_leftovers(
    sid: str,
    probe: Probe,
    ladder: Ladder,
    tell: Callable[[Observation, Plan, Done], None] = lambda *_: None,
) -> int:
    """End what a session that is over has left, until no more of it comes.

    A session of this name that has come since is another one: then no more is done, nor if
    somebody wishes meanwhile that they be left alone.

    Args:
        sid: the session's id.
        probe: looks at the folder.
        ladder: how processes are ended.
        tell: called with what was done.

    Returns:
        How many were ended.

    Raises:
        StillAliveError: more come as they are ended, or they outlive SIGKILL.
        ReconcilerError: the system refused, or the folder has gone.
    """
    effects = Effects(probe, ladder)
    ended: set[ProcessId] = set()
    detail = ""
    for _ in range(_STOP_TRIES):
        suspects = await asyncio.to_thread(probe.scan_all)
        try:
            seen = suspects.look(probe, sid)
        except OSError as error:  # the folder may have gone
            raise ReconcilerError(f"session {sid}: {error}") from error
        if seen.leave or not (seen.over and seen.leftovers):
            await outlast(ended, ladder)
            return len(ended)
        left = [leftover.process for leftover in seen.leftovers]
        action = StopLeftovers(tuple(left))
        done = await _act(effects, seen, action)
        detail = done.detail
        tell(seen, Plan(Verdict.LEFTOVERS, "not wanted any more", (action,)), done)
        ended.update(process for process in left if is_over(process))
        if not done.success:
            await asyncio.sleep(_STOP_PAUSE)
    raise StillAliveError(f"what session {sid} has started cannot be ended: {detail}")


async def outlast(processes: Iterable[ProcessId], ladder: Ladder) -> None:
    """Wait for those that have been killed and are not yet through with dying."""
    for process in processes:
        with Target(process, lambda: False) as target:
            if not await target.wait(ladder.kill_grace):
                raise StillAliveError(f"process {process.pid} is alive after SIGKILL")


def processes_of(seen: Observation) -> frozenset[ProcessId]:
    """The processes that end with a session: its proven keepers, and their agent."""
    keepers = (each for each in (seen.keeper, *seen.rivals) if each.state is KeeperState.PROVEN)
    agent = seen.agent.process if seen.agent.proven else None
    found = (*(keeper.process for keeper in keepers), agent)
    return frozenset(process for process in found if process is not None)
