"""The manager of keepers: spawn, stop, discover. It needs no running daemon.

Stopping walks the same way as the background process does, look by look, until nothing
is left; there is no second way to end a session.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reconciler import launches
from reconciler.agents import AgentProbe
from reconciler.effects import Done, Effects
from reconciler.errors import (
    AlreadyRunningError,
    FolderError,
    NoSuchSessionError,
    ReconcilerError,
    StillAliveError,
    UnverifiableError,
)
from reconciler.folder import Folder
from reconciler.identity import KNOWN_PROGRAMS
from reconciler.ladder import Ladder
from reconciler.launches import Launch
from reconciler.layout import check_sid, concerns, registry_file, sessions_dir, socket_address
from reconciler.leftovers import forget_wish, wish_to_leave
from reconciler.observations import Entry, FileId, KeeperState, Observation, ProcessId
from reconciler.plans import Instant, Plan, Stop, StopAgent, StopLeftovers, Verdict
from reconciler.probe import Probe
from reconciler.processes import Target, is_over
from reconciler.registry import Registry
from reconciler.restarts import RestartLimits, RestartPolicy, recent
from reconciler.spawning import (
    OUR_KEEPER,
    KeeperRequest,
    Started,
    check,
    default_environment,
    environment_to_restart,
    start,
)
from reconciler.state import Desired, Policy, decide


@dataclass(frozen=True, slots=True)
class SpawnedKeeper:
    """A session that was started."""

    sid: str
    keeper_pid: int
    agent_pid: int | None
    socket: str


@dataclass(frozen=True, slots=True)
class KeeperEntry:
    """A session that lives, as discovery gives it."""

    sid: str
    keeper_pid: int
    socket: str


@dataclass(frozen=True, slots=True)
class StoppedSession:
    """A session that was ended."""

    sid: str
    keeper_pid: int | None
    elapsed: float
    """Seconds."""
    leftovers: int = 0
    """Processes that it had started besides its agent, and that were ended with it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One look at one session, and what it comes to."""

    seen: Observation
    plan: Plan


def default_sessions_dir() -> Path:
    """The sessions folder of this user and environment."""
    return sessions_dir(os.environ, Path.home())


class KeeperManager:
    """Starts, ends and finds the keepers of one sessions folder.

    Args:
        sessions_dir: the folder; by default the dashboard's.
        keeper_command: runtime and keeper file that `spawn` runs, without the session id;
            by default our own keeper. Its file's base name counts as a known program.
        programs: base names of further keeper programs that others run here.
        agent_probe: the caller's own word on whether a session's agent lives.
        policy: the times that decisions depend on.
        restart_limits: how fast, and how often, sessions that have a restart policy are started
            again.
        ladder: how processes are ended.
    """

    def __init__(
        self,
        sessions_dir: Path | str | None = None,
        *,
        keeper_command: Sequence[str] = OUR_KEEPER,
        programs: frozenset[str] = frozenset(),
        agent_probe: AgentProbe | None = None,
        policy: Policy | None = None,
        restart_limits: RestartLimits | None = None,
        ladder: Ladder | None = None,
    ) -> None:
        if not keeper_command:
            raise ValueError("keeper_command is empty: give the runtime and the keeper's file")
        self.sessions_dir = Path(sessions_dir or default_sessions_dir()).absolute()
        self.policy = policy or Policy()
        self.restart_limits = restart_limits or RestartLimits()
        self.ladder = ladder or Ladder()
        self.programs = KNOWN_PROGRAMS | programs | {os.path.basename(keeper_command[-1])}
        self.agent_probe = agent_probe
        self._keeper_command = tuple(keeper_command)

    def probe(self, folder: Folder, complain: Callable[[str], None] = lambda _: None) -> Probe:
        """What looks at the sessions of an open folder, set up as this manager is.

        Args:
            folder: the sessions folder, open.
            complain: called once for each state of the spawn registry that is not usable.
        """
        registry = Registry(registry_file(folder.path), complain)
        return Probe(
            folder, programs=self.programs, registry=registry, agent_probe=self.agent_probe
        )

    async def spawn(
        self,
        sid: str | None = None,
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        agent_command: Sequence[str] = (),
        capture: bool = False,
        restart: RestartPolicy = "never",
        ready: bool = True,
        timeout: float = 10.0,  # noqa: ASYNC109 - it is the keeper that is given up, not the call
    ) -> SpawnedKeeper:
        """Start a session; returns when its keeper accepts connections and its agent lives.

        Args:
            sid: the session's id; a new UUID when left out.
            cwd: where keeper and agent run; this process's when left out.
            env: the agent's whole environment; this process's when left out.
            agent_command: program and arguments; ``pi --mode rpc`` when left out.
            capture: the agent's output goes to the keeper log, else nowhere.
            restart: when the reconciler of the folder starts the session again: ``never``,
                ``on-failure`` or ``always``. For the last two all of the above but ``env`` is
                kept in the folder: let no secret stand in ``agent_command``.
            ready: also wait until the agent has lived 300 ms, and fail if it does not.
            timeout: seconds until a keeper that neither comes up nor fails is ended.

        Raises:
            InvalidSessionIdError, InvalidRequestError: a bad argument. Nothing was changed.
            AgentNotFoundError, AgentExitedError, AlreadyRunningError, FolderError,
            KeeperStartError: why the session did not start. Nothing of it is left.
            UnverifiableError: what stands in the folder for it is not ours to replace.
        """
        request = self.request(
            sid,
            cwd=cwd,
            env=env,
            agent_command=agent_command,
            capture=capture,
            restart=restart,
            ready=ready,
            timeout=timeout,
        )
        with self._made_folder() as folder:
            probe = self.probe(folder)
            await self._make_free(request.sid, probe)
            self._forget_launch(folder, request.sid)  # the session before is not started again
            started = await start(request, probe)
            forget_wish(folder, request.sid)  # it was about the session before
            if request.restart != "never":
                await self._note_launch(request, started, probe)
        socket = socket_address(self.sessions_dir, request.sid)
        return SpawnedKeeper(request.sid, started.process.pid, started.agent_pid, socket)

    def request(
        self,
        sid: str | None = None,
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        agent_command: Sequence[str] = (),
        capture: bool = False,
        restart: RestartPolicy = "never",
        ready: bool = True,
        timeout: float = 10.0,
    ) -> KeeperRequest:
        """What `spawn` starts when it is called like this, checked as far as it can be."""
        request = KeeperRequest(
            sid=str(uuid.uuid4()) if sid is None else sid,
            cwd=Path(cwd or Path.cwd()).absolute(),
            env=default_environment() if env is None else env,
            agent_command=tuple(agent_command),
            capture=capture,
            keeper_command=self._keeper_command,
            restart=restart,
            ready=ready,
            timeout=timeout,
        )
        check(request, self.sessions_dir)
        launches.check(_launch(request))
        return request

    def _forget_launch(self, folder: Folder, sid: str) -> bool:
        """From here on the reconciler does not start the session again; whether it would have."""
        try:
            return launches.forget(folder, sid)
        except OSError as error:
            raise FolderError(
                f"sessions folder {str(self.sessions_dir)!r} cannot be written to, to end the "
                f"restarts of session {sid}: {error.strerror}"
            ) from error

    async def _note_launch(self, request: KeeperRequest, started: Started, probe: Probe) -> None:
        """Note down how to start a session again; if that cannot be done it is ended."""
        sid = request.sid
        try:
            with launches.written(probe.folder, sid, _launch(request)) as note:
                await asyncio.to_thread(os.fsync, note)
        except OSError as error:
            await self._take_back(sid, started, probe)
            raise FolderError(
                f"sessions folder {str(self.sessions_dir)!r} cannot be written to, to note down "
                f"how session {sid} is started again: {error.strerror}; so it was ended"
            ) from error

    async def start_again(self, sid: str, judged: FileId) -> SpawnedKeeper:
        """Start a session again that has ended, as its launch note says.

        The attempt is noted down before it is made, so that it counts whatever happens. Should
        the note be removed meanwhile, since somebody stops the session, then what was started is
        ended: they remove it before they look for a keeper, and here it is looked at once the
        keeper can be found. A keeper of ours does so itself, before it starts the agent.

        Args:
            sid: the session's id.
            judged: the note that was judged. With any other nothing is done.

        Raises:
            NoSuchSessionError: the session was stopped, or spawned anew.
            ReconcilerError, OSError: why it did not start. Nothing of it is left.
        """
        with self.open_folder() as folder:
            if folder is None:
                raise NoSuchSessionError(f"no session {sid}: there is no {self.sessions_dir}")
            self.refuse_untrusted(folder)
            probe = self.probe(folder)
            with contextlib.ExitStack() as held:
                try:
                    note = held.enter_context(launches.opened(folder, sid, to_write=True))
                except (FileNotFoundError, launches.NoNoteError) as error:
                    raise NoSuchSessionError(f"session {sid} was stopped") from error
                if note.file != judged:
                    raise NoSuchSessionError(f"session {sid}: its launch note is another one now")
                return await self._start_again(sid, note, probe)

    async def _start_again(self, sid: str, note: launches.Note, probe: Probe) -> SpawnedKeeper:
        launch, now = note.launch, time.monotonic()
        tries = (*recent(note.record.restarts, now, self.restart_limits), now)
        record = replace(note.record, this_boot=True, restarts=tries)
        # Should we be killed now, then what the log says last of the boot before counts no more:
        # all were asked to end then, and this session is none that is over for good.
        note.write(record, failed=not note.record.this_boot)
        request = KeeperRequest(
            sid=sid,
            cwd=Path(launch.cwd),
            env=environment_to_restart(),
            agent_command=launch.agent_command,
            capture=launch.capture,
            keeper_command=launch.keeper_command or OUR_KEEPER,
            again=True,
            ready=False,
        )
        try:
            check(request, self.sessions_dir)
            await self._make_free(sid, probe)
            if self.policy.leftovers == "stop":
                await self.end_leftovers(probe, sid)
            started = await start(request, probe)
        except (AlreadyRunningError, NoSuchSessionError):
            raise
        except Exception:
            note.write(record, failed=True)  # its keeper may have said farewell on our request
            raise
        if not note.stands():
            await self._take_back(sid, started, probe)
            raise NoSuchSessionError(f"session {sid}: it was stopped while it was started again")
        if note.failed:
            note.write(record)
        socket = socket_address(self.sessions_dir, sid)
        return SpawnedKeeper(sid, started.process.pid, started.agent_pid, socket)

    async def _take_back(self, sid: str, started: Started, probe: Probe) -> None:
        """End what was just started, unless it is over: whatever has come since is another's."""
        seen = probe.look(sid)
        if started.process in processes_of(seen):
            await self._stop(seen, probe)

    async def _make_free(self, sid: str, probe: Probe) -> None:
        """Refuse a session id that is in use, and end the agent that a dead keeper left.

        The new keeper's agent pid file will take the place of the only trace of that one.
        """
        seen = probe.look(sid)
        for action in self.refuse_used(seen).actions:
            if isinstance(action, StopAgent):
                done = await Effects(probe, self.ladder).stop(seen, action)
                if not done.success:
                    raise StillAliveError(
                        f"session {sid}: the agent {action.process.pid} of its dead keeper was "
                        f"not ended: {done.detail}"
                    )

    def refuse_used(self, seen: Observation) -> Plan:
        """Refuse a session id that is in use; what has to be done about one that was.

        Raises:
            AlreadyRunningError, UnverifiableError: see `spawn`.
        """
        sid = seen.sid
        if seen.keeper.state is KeeperState.PROVEN and seen.keeper.process is not None:
            pid = seen.keeper.process.pid
            raise AlreadyRunningError(f"session {sid} is running already, its keeper is {pid}")
        plan = decide(seen, Desired.AS_FOUND, self.policy)
        if plan.verdict in {Verdict.REFUSED, Verdict.UNVERIFIABLE}:
            raise UnverifiableError(f"session id {sid} cannot be used here: {plan.reason}")
        return plan

    def make_folder(self) -> None:
        """Make the sessions folder, and those above it, for its user alone.

        Raises:
            OSError: as the system says it.
        """
        paths = (*reversed(self.sessions_dir.parents), self.sessions_dir)
        for path in [path for path in paths if not path.exists()]:
            path.mkdir(mode=0o700, exist_ok=True)  # those above as well, whatever the umask

    @contextlib.contextmanager
    def _made_folder(self) -> Iterator[Folder]:
        try:
            self.make_folder()
            folder = Folder(self.sessions_dir)
        except OSError as error:
            raise FolderError(
                f"sessions folder {str(self.sessions_dir)!r} cannot be used: {error.strerror}"
            ) from error
        with folder:
            self.refuse_untrusted(folder)
            yield folder

    def refuse_untrusted(self, folder: Folder) -> None:
        """Refuse a folder that others could exchange things in.

        Raises:
            FolderError: who, and what to do.
        """
        if reason := folder.distrust():
            raise FolderError(
                f"sessions folder {str(self.sessions_dir)!r} cannot be trusted: {reason}"
            )

    @contextlib.contextmanager
    def open_folder(self) -> Iterator[Folder | None]:
        """The sessions folder, open; None when it is not there.

        Raises:
            FolderError: it is there and cannot be opened.
        """
        try:
            folder = Folder(self.sessions_dir)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            raise FolderError(
                f"sessions folder {str(self.sessions_dir)!r} cannot be read: {error.strerror}"
            ) from error
        with folder:
            yield folder

    def find(self) -> list[Finding]:
        """Look once at every session there is, and judge it. Nothing is changed."""
        with self.open_folder() as folder:
            if folder is None:
                return []
            probe = self.probe(folder)
            suspects = probe.scan_all()
            sids = {sid for name in folder.names() if (sid := concerns(name))}
            looks = (suspects.look(probe, sid) for sid in sids | suspects.sids)
            return [
                self._finding(seen, folder)
                for seen in sorted(looks, key=lambda seen: seen.sid)
                if not seen.empty
            ]

    def _finding(self, seen: Observation, folder: Folder) -> Finding:
        """What a look comes to, for people: a single one takes ages from the files' own times.

        Nobody acts on it. Who acts counts from what it has seen itself.
        """
        if not seen.note.present:  # a look that is in a hurry leaves it out
            note, record = launches.look(folder, seen.sid, seen.now, over=seen.over)
            seen = replace(seen, note=note, record=record)
        dated = replace(
            seen,
            pid_file=_dated(seen.pid_file, seen.now),
            socket=_dated(seen.socket, seen.now),
            agent_file=_dated(seen.agent_file, seen.now),
        )
        plan = decide(dated, Desired.AS_FOUND, self.policy, self.restart_limits)
        return Finding(dated, plan)

    def inspect(self, sid: str) -> Finding:
        """Look once at one session, and judge it. Nothing is changed.

        Raises:
            NoSuchSessionError: nothing of it is there.
        """
        check_sid(sid)
        with self.open_folder() as folder:
            if folder is not None:
                probe = self.probe(folder)
                seen = probe.scan_all().look(probe, sid)
                if not seen.empty:
                    return self._finding(seen, folder)
        raise NoSuchSessionError(f"no session {sid} in {self.sessions_dir}")

    async def discover(self) -> list[KeeperEntry]:
        """The sessions whose keeper lives and whose agent is not known to be gone.

        Nothing is changed: cleaning is the reconciler's.
        """
        alive = {Verdict.READY, Verdict.STARTING, Verdict.UNREACHABLE, Verdict.ADOPT}
        return [
            KeeperEntry(
                finding.seen.sid,
                finding.seen.keeper.process.pid,
                socket_address(self.sessions_dir, finding.seen.sid),
            )
            for finding in self.find()
            if finding.plan.verdict in alive
            and finding.seen.keeper.state is KeeperState.PROVEN
            and finding.seen.keeper.process is not None
        ]

    async def stop(self, sid: str, *, leave: bool = False) -> StoppedSession:
        """End a session; returns when its processes are dead and its files are gone.

        SIGTERM to the keeper's process group, SIGKILL 2 s later; an agent that outlives its
        keeper, and what the session has started besides, is ended the same way.

        Args:
            sid: the session's id.
            leave: leave alone what the session has started besides its agent.

        Raises:
            NoSuchSessionError: nothing of it is there.
            UnverifiableError: whose its process or file is cannot be proven. Nothing was done,
                but that it is not started again.
            FolderError: the folder cannot be used or trusted. Nothing was done.
            StillAliveError: a process hangs in the kernel and outlives SIGKILL.
        """
        check_sid(sid)
        begun = time.monotonic()
        with self.open_folder() as folder:
            if folder is None:
                raise NoSuchSessionError(f"no session {sid}: there is no {self.sessions_dir}")
            kept = self.keep_no_longer(folder, sid)
            probe = self.probe(folder)
            seen = probe.scan_all().look(probe, sid)
            if seen.empty and not kept:
                raise NoSuchSessionError(f"no session {sid} in {self.sessions_dir}")
            self.wish(folder, sid, leave=leave)
            keeper = seen.keeper.process if seen.keeper.state is KeeperState.PROVEN else None
            await self._stop(seen, probe)
            left = 0 if leave else await self.end_leftovers(probe, sid)
        return StoppedSession(sid, keeper.pid if keeper else None, time.monotonic() - begun, left)

    def keep_no_longer(self, folder: Folder, sid: str) -> bool:
        """Whoever stops a session does this first, and looks at it then: so it stays stopped.

        Returns:
            Whether the session had a restart policy.

        Raises:
            FolderError: the folder cannot be trusted, or not be written to. Nothing was done.
        """
        self.refuse_untrusted(folder)
        return self._forget_launch(folder, sid)

    def wish(self, folder: Folder, sid: str, *, leave: bool) -> None:
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
                f"sessions folder {str(self.sessions_dir)!r} cannot be written to, to note down "
                f"what is to be left alone: {error.strerror}"
            ) from error

    async def end_leftovers(
        self,
        probe: Probe,
        sid: str,
        tell: Callable[[Observation, Plan, Done], None] = lambda *_: None,
    ) -> int:
        """End what a session that is over has left, until no more of it comes.

        A session of this name that has come since is another one: then no more is done, nor if
        somebody wishes meanwhile that they be left alone.

        Args:
            probe: looks at the folder.
            sid: the session's id.
            tell: called with what was done.

        Returns:
            How many were ended.

        Raises:
            StillAliveError: more come as they are ended, or they outlive SIGKILL.
        """
        effects = Effects(probe, self.ladder)
        ended: set[ProcessId] = set()
        detail = ""
        for _ in range(_STOP_TRIES):
            suspects = await asyncio.to_thread(probe.scan_all)
            seen = suspects.look(probe, sid)
            if seen.leave or not (seen.over and seen.leftovers):
                await self.outlast(ended)
                return len(ended)
            left = [leftover.process for leftover in seen.leftovers]
            action = StopLeftovers(tuple(left))
            try:
                done = await effects.stop(seen, action)
            except OSError as error:
                raise ReconcilerError(f"session {sid}: {error}") from error
            detail = done.detail
            tell(seen, Plan(Verdict.LEFTOVERS, "not wanted any more", (action,)), done)
            ended.update(process for process in left if is_over(process))
            if not done.success:
                await asyncio.sleep(_STOP_PAUSE)
        raise StillAliveError(f"what session {sid} has started cannot be ended: {detail}")

    async def _stop(self, seen: Observation, probe: Probe) -> None:
        """Look, decide, act, and look again until the session is over."""
        effects = Effects(probe, self.ladder)
        failures = 0
        processes = set(processes_of(seen))
        while (plan := decide(seen, Desired.ABSENT, self.policy)).verdict not in _OVER:
            if not plan.actions and plan.again_after is None:
                raise UnverifiableError(f"session {seen.sid} was left alone: {plan.reason}")
            for action in plan.actions:
                try:
                    if isinstance(action, Instant):
                        done = effects.instant(seen, action)
                    elif isinstance(action, Stop):
                        done = await effects.stop(seen, action)
                    else:  # what is not wanted is not started
                        raise TypeError(f"this is no part of a stop: {action}")
                except OSError as error:
                    raise ReconcilerError(f"session {seen.sid}: {error}") from error
                failures = 0 if done.success else failures + 1
                if failures and "alive" in done.detail:
                    raise StillAliveError(f"session {seen.sid} was not ended: {done.detail}")
                if failures >= _STOP_TRIES:
                    raise UnverifiableError(f"session {seen.sid} was not ended: {done.detail}")
            if plan.again_after is not None or failures:
                await asyncio.sleep(plan.again_after or _STOP_PAUSE)
            seen = probe.look(seen.sid, seen)
            processes |= processes_of(seen)
        await self.outlast(processes)

    async def outlast(self, processes: Iterable[ProcessId]) -> None:
        """Wait for those that have been killed and are not yet through with dying."""
        for process in processes:
            with Target(process, lambda: False) as target:
                if not await target.wait(self.ladder.kill_grace):
                    raise StillAliveError(f"process {process.pid} is alive after SIGKILL")


_OVER = frozenset({Verdict.ABSENT, Verdict.LEFTOVERS})
_STOP_TRIES = 20
_STOP_PAUSE = 0.05


def _launch(request: KeeperRequest) -> Launch:
    return Launch(
        policy=request.restart,
        cwd=str(request.cwd),
        agent_command=tuple(request.agent_command),
        keeper_command=() if request.ours else tuple(request.keeper_command),
        capture=request.capture,
    )


def _dated(entry: Entry, now: float) -> Entry:
    if entry.file is None:
        return entry
    return replace(entry, since=now - max(0.0, time.time() - entry.file.mtime_ns / 1e9))


def processes_of(seen: Observation) -> frozenset[ProcessId]:
    """The processes that end with a session: its proven keepers, and their agent."""
    keepers = (each for each in (seen.keeper, *seen.rivals) if each.state is KeeperState.PROVEN)
    agent = seen.agent.process if seen.agent.proven else None
    found = (*(keeper.process for keeper in keepers), agent)
    return frozenset(process for process in found if process is not None)
