"""Starting a session: its place is made free, its keeper started, and how noted down if need be.

A keeper by itself is started by `reconciler.spawning`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

from reconciler import launches
from reconciler.effects import Effects
from reconciler.errors import (
    AlreadyRunningError,
    FolderError,
    NoSuchSessionError,
    NotKeptError,
    ReconcilerError,
    StillAliveError,
    UnverifiableError,
)
from reconciler.folder import Folder
from reconciler.ladder import Ladder
from reconciler.launches import Launch
from reconciler.layout import Role, file_name
from reconciler.leftovers import forget_wish
from reconciler.observations import FileId, KeeperState, Observation
from reconciler.plans import Plan, StopAgent, Verdict
from reconciler.probe import Probe
from reconciler.processes import is_over
from reconciler.requests import OUR_KEEPER, KeeperRequest, check, environment_to_restart
from reconciler.restarts import RestartLimits, RestartRecord, recent
from reconciler.spawning import Started, start
from reconciler.state import Desired, Policy, decide
from reconciler.stopping import (
    end_leftovers,
    end_session,
    keep_no_longer,
    note_wish,
    processes_of,
)

_PAUSE = 0.05
# Seconds between two looks at whether a session that is just being started again is up.


class Starter:
    """Starts sessions in one open folder.

    Args:
        probe: looks at that folder.
        policy: the times that decisions depend on.
        limits: how often a session is started again.
        ladder: how processes are ended, should something have to be.
    """

    def __init__(self, probe: Probe, policy: Policy, limits: RestartLimits, ladder: Ladder) -> None:
        self._probe = probe
        self._folder = probe.folder
        self._policy = policy
        self._limits = limits
        self._ladder = ladder

    async def start(self, request: KeeperRequest) -> Started:
        """Start a session for the first time; see `KeeperManager.spawn`."""
        sid = request.sid
        async with self._restarts_held_off(request):
            await self._make_free(sid)
            keep_no_longer(self._folder, sid)  # the one before is not started again
        started = await start(request, self._probe)
        forget_wish(self._folder, sid)  # it was about the session before
        if request.restart != "never":
            await self._note_launch(request, started)
        return started

    @contextlib.asynccontextmanager
    async def _restarts_held_off(self, request: KeeperRequest) -> AsyncIterator[None]:
        """Have nobody start the session before again.

        Who is just doing so comes to its end first. Its keeper then has the name, and keeps its
        policy; else it might have looked for that the last time before it is taken away here.
        """
        deadline = time.monotonic() + request.timeout
        with contextlib.ExitStack() as held:
            while True:
                try:
                    held.enter_context(noted(self._folder, request.sid, to_write=True))
                except (NotKeptError, PermissionError):  # what may not be written to holds nobody
                    break
                except AlreadyRunningError:
                    if time.monotonic() > deadline:
                        raise
                    await asyncio.sleep(_PAUSE)
                else:
                    break
            yield

    async def _note_launch(self, request: KeeperRequest, started: Started) -> None:
        """Note down how to start a session again; if that cannot be done it is ended."""
        sid = request.sid
        try:
            with launches.written(self._folder, sid, launch_of(request)) as note:
                await asyncio.to_thread(os.fsync, note)
                if is_over(started.process):  # who stops it may have looked for the note before
                    raise NoSuchSessionError(f"session {sid} was ended while it was started")
        except OSError as error:
            await self._take_back(sid, started)
            raise FolderError(
                f"sessions folder {str(self._folder.path)!r} cannot be written to, to note down "
                f"how session {sid} is started again: {error.strerror}; so it was ended"
            ) from error

    async def start_again(self, sid: str, judged: FileId) -> Started:
        """Start a session again that has ended; see `KeeperManager.start_again`."""
        try:
            with noted(self._folder, sid, to_write=True) as note:
                if note.file != judged:
                    raise NoSuchSessionError(f"session {sid}: its launch note is another one now")
                tries = recent(note.record.restarts, now := time.monotonic(), self._limits)
                record = replace(note.record, this_boot=True, restarts=(*tries, now))
                # Should we be killed now, then what the log says last of the boot before counts
                # no more: all were asked to end then, and this session is none that is over.
                note.write(record, failed=not note.record.this_boot)
                return await self._start_as_noted(request_of(sid, note.launch), note)
        except NotKeptError as error:
            raise NoSuchSessionError(f"session {sid} was stopped") from error

    async def restart(self, sid: str, *, leave: bool) -> Started:
        """End a session, and start it again; see `KeeperManager.restart`.

        Its launch note stays where it is, and says meanwhile that the session has failed: should
        we be killed, then whoever keeps the folder starts it again.
        """
        seen = self._probe.scan_all().look(self._probe, sid)
        if seen.empty:
            raise NoSuchSessionError(f"no session {sid} in {self._folder.path}")
        with noted(self._folder, sid, to_write=True) as note:
            request = replace(request_of(sid, note.launch), ready=True)
            check(request, self._folder.path)
            before, failed = note.record, note.failed
            note.write(RestartRecord(note.launch.policy), failed=True)
            try:
                note_wish(self._folder, sid, leave=leave)
                # Who stops it removes the note first: what is seen without it is a newer session.
                await end_session(seen, self._probe, self._policy, self._ladder, note.stands)
                if not leave:
                    await end_leftovers(sid, self._probe, self._ladder)
            except Exception:
                note.write(before, failed=failed)
                raise
            try:
                started = await self._start_as_noted(request, note)
            except (AlreadyRunningError, NoSuchSessionError):
                raise
            except ReconcilerError as error:
                raise type(error)(f"{error}; it is ended now, and keeps its policy") from error
        forget_wish(self._folder, sid)  # it was about the session before
        return started

    async def _start_as_noted(self, request: KeeperRequest, note: launches.Note) -> Started:
        sid, record = request.sid, note.record
        try:
            check(request, self._folder.path)
            await self._make_free(sid)
            if self._policy.leftovers == "stop":
                await end_leftovers(sid, self._probe, self._ladder)
            started = await start(request, self._probe)
        except (AlreadyRunningError, NoSuchSessionError):
            raise
        except Exception:
            note.write(record, failed=True)  # its keeper may have said farewell on our request
            raise
        if not note.stands():
            await self._take_back(sid, started)
            raise NoSuchSessionError(f"session {sid}: it was stopped while it was started again")
        if note.failed:
            note.write(record)
        return started

    async def _take_back(self, sid: str, started: Started) -> None:
        """End what was just started, unless it is over: whatever has come since is another's."""
        seen = self._probe.look(sid)
        if started.process in processes_of(seen):
            await end_session(seen, self._probe, self._policy, self._ladder)

    async def _make_free(self, sid: str) -> None:
        """Refuse a session id that is in use, and end the agent that a dead keeper left.

        The new keeper's agent pid file will take the place of the only trace of that one.
        """
        seen = self._probe.look(sid)
        for action in refuse_used(seen, self._policy).actions:
            if isinstance(action, StopAgent):
                done = await Effects(self._probe, self._ladder).stop(seen, action)
                if not done.success:
                    raise StillAliveError(
                        f"session {sid}: the agent {action.process.pid} of its dead keeper was "
                        f"not ended: {done.detail}"
                    )


def refuse_used(seen: Observation, policy: Policy) -> Plan:
    """Refuse a session id that is in use; what has to be done about one that was.

    Raises:
        AlreadyRunningError, UnverifiableError: see `KeeperManager.spawn`.
    """
    sid = seen.sid
    if seen.keeper.state is KeeperState.PROVEN and seen.keeper.process is not None:
        pid = seen.keeper.process.pid
        raise AlreadyRunningError(f"session {sid} is running already, its keeper is {pid}")
    plan = decide(seen, Desired.AS_FOUND, policy)
    if plan.verdict in {Verdict.REFUSED, Verdict.UNVERIFIABLE}:
        raise UnverifiableError(f"session id {sid} cannot be used here: {plan.reason}")
    return plan


@contextlib.contextmanager
def noted(folder: Folder, sid: str, *, to_write: bool = False) -> Iterator[launches.Note]:
    """What is noted down to start a session again, open.

    Raises:
        NotKeptError: nothing is, or what stands there is not to be obeyed.
        AlreadyRunningError: somebody else is just starting the session again.
    """
    with contextlib.ExitStack() as held:
        try:
            note = held.enter_context(launches.opened(folder, sid, to_write=to_write))
        except FileNotFoundError:
            raise NotKeptError(
                f"session {sid} was spawned without a restart policy, so what it was started with "
                "was not kept: stop it, and spawn it again (spawn --restart on-failure keeps it)"
            ) from None
        except launches.NoNoteError as error:
            name = file_name(Role.LAUNCH, sid)
            raise NotKeptError(f"session {sid}: {name} is not to be obeyed: {error}") from error
        except BlockingIOError:
            raise AlreadyRunningError(f"session {sid} is just being started again") from None
        yield note


def launch_of(request: KeeperRequest) -> Launch:
    """What is noted down, to start the session of a request again."""
    return Launch(
        policy=request.restart,
        cwd=str(request.cwd),
        agent_command=tuple(request.agent_command),
        keeper_command=() if request.ours else tuple(request.keeper_command),
        capture=request.capture,
    )


def request_of(sid: str, launch: Launch) -> KeeperRequest:
    """What is started when a session is started again, in the environment of this process."""
    return KeeperRequest(
        sid=sid,
        cwd=Path(launch.cwd),
        env=environment_to_restart(),
        agent_command=launch.agent_command,
        capture=launch.capture,
        keeper_command=launch.keeper_command or OUR_KEEPER,
        again=True,
        ready=False,
    )
