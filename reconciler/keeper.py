"""The manager of keepers: spawn, stop, discover. It needs no running daemon."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reconciler import launches
from reconciler.agents import AgentProbe
from reconciler.errors import FolderError, NoSuchSessionError
from reconciler.findings import Finding, judged
from reconciler.folder import Folder
from reconciler.identity import KNOWN_PROGRAMS
from reconciler.ladder import Ladder
from reconciler.layout import check_sid, concerns, registry_file, sessions_dir, socket_address
from reconciler.observations import FileId, KeeperState, Observation
from reconciler.plans import Verdict
from reconciler.probe import Probe
from reconciler.registry import Registry
from reconciler.requests import OUR_KEEPER, KeeperRequest, check, default_environment
from reconciler.restarts import RestartLimits, RestartPolicy
from reconciler.spawning import Started
from reconciler.starting import Starter, launch_of
from reconciler.state import Policy
from reconciler.stopping import (
    StoppedSession,
    end_leftovers,
    end_session,
    keep_no_longer,
    note_wish,
)


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
            started = await self._starter(folder).start(request)
        return self._spawned(request.sid, started)

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
        launches.check(launch_of(request))
        return request

    def _starter(self, folder: Folder) -> Starter:
        return Starter(self.probe(folder), self.policy, self.restart_limits, self.ladder)

    def _spawned(self, sid: str, started: Started) -> SpawnedKeeper:
        socket = socket_address(self.sessions_dir, sid)
        return SpawnedKeeper(sid, started.process.pid, started.agent_pid, socket)

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
        with self._trusted_folder(sid) as folder:
            started = await self._starter(folder).start_again(sid, judged)
        return self._spawned(sid, started)

    async def restart(self, sid: str, *, leave: bool = False) -> SpawnedKeeper:
        """End a session as `stop` does, and start it again with what it was started with.

        Only a session that was spawned with a restart policy can be: for others nothing is kept.
        It keeps that policy, and its restarts count from anew. Its environment was not kept: it
        gets that of this process. Should this process be killed in between, the reconciler of
        the folder starts the session again.

        Args:
            sid: the session's id.
            leave: leave alone what the session has started besides its agent.

        Raises:
            NoSuchSessionError: nothing of it is there, or somebody has stopped it meanwhile.
            NotKeptError, AgentNotFoundError, InvalidRequestError: it could not be started
                again. Nothing was done.
            UnverifiableError, FolderError, StillAliveError: it was not ended, see `stop`, and
                keeps its policy.
            AlreadyRunningError: somebody else has started one of this name meanwhile.
            AgentExitedError, KeeperStartError: it was ended, and did not come up again. It keeps
                its policy.
        """
        check_sid(sid)
        with self._trusted_folder(sid) as folder:
            started = await self._starter(folder).restart(sid, leave=leave)
        return self._spawned(sid, started)

    @contextlib.contextmanager
    def _trusted_folder(self, sid: str) -> Iterator[Folder]:
        with self.open_folder() as folder:
            if folder is None:
                raise NoSuchSessionError(f"no session {sid}: there is no {self.sessions_dir}")
            self.refuse_untrusted(folder)
            yield folder

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
        return judged(seen, folder, self.policy, self.restart_limits)

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
        with self._trusted_folder(sid) as folder:
            kept = keep_no_longer(folder, sid)
            probe = self.probe(folder)
            seen = probe.scan_all().look(probe, sid)
            if seen.empty and not kept:
                raise NoSuchSessionError(f"no session {sid} in {self.sessions_dir}")
            note_wish(folder, sid, leave=leave)
            keeper = seen.keeper.process if seen.keeper.state is KeeperState.PROVEN else None
            await end_session(seen, probe, self.policy, self.ladder)
            keep_no_longer(folder, sid, over=True)
            left = 0 if leave else await end_leftovers(sid, probe, self.ladder)
        return StoppedSession(sid, keeper.pid if keeper else None, time.monotonic() - begun, left)

    def keep_no_longer(self, folder: Folder, sid: str) -> bool:
        """Whoever stops a session does this first, and looks at it then: so it stays stopped.

        Returns:
            Whether the session had a restart policy.

        Raises:
            FolderError: the folder cannot be trusted, or not be written to. Nothing was done.
        """
        self.refuse_untrusted(folder)
        return keep_no_longer(folder, sid)
