"""The demonstration: three sessions that are broken, each another way, and put right.

It has a home of its own, that is there only for as long as it lasts, and a reconciler of
its own in this process. What it says has been measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from reconciler.controller import Reconciler
from reconciler.errors import ReconcilerError
from reconciler.keeper import KeeperManager, SpawnedKeeper
from reconciler.ladder import Ladder
from reconciler.layout import CLAIM, Role, file_name, sessions_dir
from reconciler.logs import make_logger
from reconciler.observations import ProcessId
from reconciler.plans import Verdict
from reconciler.processes import Target, is_over
from reconciler.requests import default_environment
from reconciler.rpc_writer import RpcWriter
from reconciler.sessions import Session
from reconciler.stopping import processes_of

T = TypeVar("T")

STAND_IN = (sys.executable, "-I", "-S", "-c", "import sys\nfor line in sys.stdin: pass")
"""An agent for those who have none: it reads what it is told, and does nothing."""

REAL = ("pi", "--mode", "rpc", "--offline", "--no-session")
"""The real agent, without a model, a network or a session of its own."""

KILLED, FROZEN, UNHARMED, DROPPED = "killed", "frozen", "unharmed", "dropped"
"""The sessions of the demonstration, each named for what it meets."""

_PATIENCE = 10.0
# Seconds until sessions that were started must be seen to be ready.

_LONGEST = 10.0
# Seconds that anything may take until it counts as not put right.

_GLANCE = 0.001
_TERM_GRACE = 0.2


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing that was broken.

    Attributes:
        sid: the session.
        broken: what was done to it; empty for the one that nothing was done to.
        put_right: its files are gone and its processes are dead; or it goes on unharmed.
        seconds: from the breaking until then.
        reason: what the reconciler judged.
    """

    sid: str
    broken: str
    put_right: bool
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the demonstration.

    Attributes:
        agent: what stood for the agent: ``pi`` or ``stand-in``.
        scenes: what was broken, in order.
        left: what could not be cleaned away: processes, and the home; empty if all was.
    """

    agent: str
    scenes: tuple[Scene, ...]
    left: tuple[str, ...]

    @property
    def success(self) -> bool:
        """Everything was put right, and nothing is left."""
        return not self.left and all(scene.put_right for scene in self.scenes)


class Audience:
    """Whoever looks on; here nobody does."""

    def opened(self, folder: Path, agent: str) -> None:
        """The home is there."""

    def refused(self, reason: str) -> None:
        """The real agent could not be started: the stand-in will be."""

    def started(self, sessions: Sequence[Session]) -> None:
        """The sessions are up."""

    def breaking(self, sid: str, what: str) -> None:
        """Something is about to be broken."""

    def put_right(self, scene: Scene) -> None:
        """It was put right, or was not; or it is unharmed, or not."""

    def closed(self, left: Sequence[str]) -> None:
        """All was cleaned away, or what is left."""


class Demo:
    """One demonstration.

    Args:
        audience: is told of everything as it happens.
        pause: seconds before each thing is broken, for those who look on.
    """

    def __init__(self, audience: Audience, pause: float = 0.0) -> None:
        self._audience = audience
        self._pause = pause
        self._processes: set[ProcessId] = set()
        self._reasons: dict[str, list[str]] = {}

    async def play(self) -> Outcome:
        """Play it; whatever happens, what was started is ended and what was made is removed.

        Raises:
            ReconcilerError: the sessions could not be started.
            OSError: there can be no home for it.
        """
        home = Path(tempfile.mkdtemp(prefix="pi-"))
        manager = KeeperManager(sessions_dir({}, home), ladder=Ladder(term_grace=_TERM_GRACE))
        try:
            manager.sessions_dir.mkdir(parents=True, mode=0o700)
            async with self._reconciler(manager) as reconciler:
                agent = await self._start(reconciler, home)
                scenes = [scene async for scene in self._scenes(reconciler)]
        finally:
            left = await _to_the_end(self._clean_up(manager, home))
        return Outcome(agent, tuple(scenes), tuple(left))

    @contextlib.asynccontextmanager
    async def _reconciler(self, manager: KeeperManager) -> AsyncIterator[Reconciler]:
        async with Reconciler(manager, logger=make_logger(None)) as reconciler:
            forget = reconciler.sessions.subscribe(self._note)
            try:
                yield reconciler
            finally:
                forget()

    def _note(self, session: Session) -> None:
        """Keep why the reconciler acted, and which processes are to be gone at the end."""
        if session.plan is not None and session.plan.actions:
            reasons = self._reasons.setdefault(session.sid, [])
            if session.reason not in reasons:
                reasons.append(session.reason)
        if session.seen is not None:
            self._processes |= processes_of(session.seen)

    async def _start(self, reconciler: Reconciler, home: Path) -> str:
        """Start three sessions, with the real agent if there is one that runs; its name."""
        env = {**default_environment(), "HOME": str(home)}
        folder = reconciler.manager.sessions_dir
        if shutil.which(REAL[0]) is not None:
            self._audience.opened(folder, "pi")
            try:
                await self._start_three(reconciler, REAL, env)
            except ReconcilerError as error:  # what is called pi there is none that we know
                self._audience.refused(str(error))
            else:
                return "pi"
        self._audience.opened(folder, "stand-in")
        await self._start_three(reconciler, STAND_IN, env)
        return "stand-in"

    async def _start_three(
        self, reconciler: Reconciler, command: Sequence[str], env: dict[str, str]
    ) -> None:
        options = {"agent_command": command, "env": env, "cwd": env["HOME"]}
        sids = (KILLED, FROZEN, UNHARMED)
        spawned = await asyncio.gather(
            *(reconciler.spawn(sid, **options) for sid in sids), return_exceptions=True
        )
        keepers = {up.sid: up.keeper_pid for up in spawned if isinstance(up, SpawnedKeeper)}
        if failures := [each for each in spawned if isinstance(each, BaseException)]:
            for sid in keepers:
                await reconciler.stop(sid)
            raise failures[0]
        ready = (
            reconciler.wait_for(sid, functools.partial(_is_whole, keeper))
            for sid, keeper in keepers.items()
        )
        try:
            async with asyncio.timeout(_PATIENCE):
                self._audience.started(await asyncio.gather(*ready))
        except TimeoutError as error:
            raise ReconcilerError(
                f"the sessions are not seen to be ready after {_PATIENCE:g} s"
            ) from error

    async def _scenes(self, reconciler: Reconciler) -> AsyncIterator[Scene]:
        rows = {sid: reconciler.sessions.row(sid) for sid in (KILLED, FROZEN, UNHARMED)}
        seen = {sid: row.seen for sid, row in rows.items() if row.seen is not None}
        keepers = {sid: each.keeper.process for sid, each in seen.items()}
        agents = {sid: each.agent.process for sid, each in seen.items()}

        def kill_keeper() -> None:
            _send(keepers[KILLED], signal.SIGKILL)

        def freeze_keeper_and_kill_agent() -> None:
            _send(keepers[FROZEN], signal.SIGSTOP)
            _send(agents[FROZEN], signal.SIGSTOP, signal.SIGKILL)

        folder, dead = reconciler.manager.sessions_dir, await _dead_pid()
        yield await self._scene(
            reconciler, KILLED, f"SIGKILL to its keeper {_pid(keepers[KILLED])}", kill_keeper
        )
        what = (
            f"its agent {_pid(agents[FROZEN])} hangs and is killed, while its keeper "
            f"{_pid(keepers[FROZEN])} hangs as well (SIGSTOP)"
        )
        yield await self._scene(reconciler, FROZEN, what, freeze_keeper_and_kill_agent)
        what = f"a socket that nobody listens on, and a pid file of the dead process {dead}"
        yield await self._scene(
            reconciler, DROPPED, what, lambda: _drop_stale_pair(folder, DROPPED, dead)
        )
        yield await self._unharmed(reconciler, rows[UNHARMED])

    async def _scene(
        self, reconciler: Reconciler, sid: str, what: str, act: Callable[[], None]
    ) -> Scene:
        """Break something, and wait until it is put right."""
        self._audience.breaking(sid, what)
        await asyncio.sleep(self._pause)
        seen = reconciler.sessions.row(sid).seen
        processes = processes_of(seen) if seen else frozenset()
        folder = reconciler.manager.sessions_dir
        begun = time.monotonic()
        act()
        put_right = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST):
                while _files(folder, sid) or not all(map(is_over, processes)):  # noqa: ASYNC110 - files and processes
                    await asyncio.sleep(_GLANCE)
                put_right = True
        reason = "; ".join(self._reasons.get(sid, ["its keeper has cleaned up by itself"]))
        scene = Scene(sid, what, put_right, time.monotonic() - begun, reason)
        self._audience.put_right(scene)
        return scene

    async def _unharmed(self, reconciler: Reconciler, before: Session) -> Scene:
        """The session that nothing was done to: it is the same one, and takes a line."""
        begun = time.monotonic()
        writer = RpcWriter(reconciler.manager.sessions_dir)
        delivery = await writer.write(UNHARMED, {"type": "get_state", "id": "1"})
        now = reconciler.sessions.row(UNHARMED)
        same = (now.keeper_pid, now.agent_pid) == (before.keeper_pid, before.agent_pid)
        put_right = delivery.delivered and same and now.phase is Verdict.READY
        reason = f"a line to it: {delivery.outcome.value}"
        scene = Scene(UNHARMED, "", put_right, time.monotonic() - begun, reason)
        self._audience.put_right(scene)
        return scene

    async def _clean_up(self, manager: KeeperManager, home: Path) -> list[str]:
        """End what was started, remove what was made, and tell what is left all the same."""
        left = []
        for finding in manager.find():
            self._processes |= processes_of(finding.seen)
            try:
                await manager.stop(finding.seen.sid)
            except (ReconcilerError, OSError) as error:
                left.append(str(error))
        left += [f"process {each.pid}" for each in self._processes if not is_over(each)]
        shutil.rmtree(home, ignore_errors=True)
        if home.exists():
            left.append(f"folder {home}")
        self._audience.closed(left)
        return left


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await what must come to its end, also when this is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _send(process: ProcessId | None, *numbers: signal.Signals) -> None:
    """Send signals to a process that was proven, and to no other."""
    if process is None:
        return
    with Target(process, lambda: True) as target:
        for number in numbers:
            target.send(number)


def _pid(process: ProcessId | None) -> int:
    return process.pid if process else 0


def _is_whole(keeper: int, session: Session) -> bool:
    ready = session.phase is Verdict.READY and session.agent_pid is not None
    return ready and session.keeper_pid == keeper


def _files(folder: Path, sid: str) -> list[str]:
    names = (file_name(role, sid) for role in CLAIM)
    return [name for name in names if os.path.lexists(folder / name)]


async def _dead_pid() -> int:
    """The pid of a process of ours that has ended."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", "-c", "")
    await process.wait()
    return process.pid


def _drop_stale_pair(folder: Path, sid: str, pid: int) -> None:
    """Leave what a keeper leaves that was killed while no reconciler ran."""
    with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(folder):  # a path may be too long
        bound.bind(file_name(Role.SOCKET, sid))
    (folder / file_name(Role.PID_FILE, sid)).write_text(str(pid))
