"""Starting a keeper, and knowing what came of it.

A keeper of ours tells its progress through a pipe (``PI_KEEPER_NOTIFY_FD``), so nothing
is polled and every failure arrives with its reason. Keepers of another make are watched
from outside, by their files. Either way the keeper becomes nobody's child: a short-lived
process in between starts it, so its starter never has a zombie to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from reconciler.descriptors import given_limit
from reconciler.errors import (
    AgentExitedError,
    AgentNotFoundError,
    AlreadyRunningError,
    FolderError,
    KeeperStartError,
    NoSuchSessionError,
    ReconcilerError,
    StillAliveError,
)
from reconciler.ladder import Ladder, end
from reconciler.layout import Role, file_name
from reconciler.observations import AgentState, KeeperState, Listening, Observation, ProcessId
from reconciler.plans import Remove
from reconciler.probe import Probe
from reconciler.processes import SYSTEM, Target
from reconciler.removal import remove, remove_logs
from reconciler.requests import KeeperRequest, environment_of, home_of
from reconciler.state import Desired, Policy, decide

AGENT_PROOF = 0.3
"""Seconds that an agent must live to count as started; the contract's 300 ms."""

_POLL = 0.01
_TAIL = 2000
_DETACH = (
    "import os, resource, sys\n"
    "if os.fork(): os._exit(0)\n"
    "os.setsid()\n"
    "os.write(int(sys.argv[1]), b'{\"pid\":%d}\\n' % os.getpid())\n"
    "os.close(int(sys.argv[1]))\n"
    "soft, (_, most) = sys.argv[2], resource.getrlimit(resource.RLIMIT_NOFILE)\n"
    "if soft: resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), most))\n"
    "os.execvp(sys.argv[3], sys.argv[3:])\n"
)
_MARK = "PI_KEEPER_LAUNCH"
_ERRORS: Mapping[str, type[ReconcilerError]] = {
    "already_running": AlreadyRunningError,
    "agent_missing": AgentNotFoundError,
    "agent_exited": AgentExitedError,
    "stopped": NoSuchSessionError,
}


@dataclass(frozen=True, slots=True)
class Started:
    """A keeper that has come up."""

    process: ProcessId
    agent_pid: int | None


async def start(request: KeeperRequest, probe: Probe) -> Started:
    """Start a keeper and wait until it has come up.

    Raises:
        ReconcilerError: why it did not, as its class. Nothing of it is left then.
    """
    new_logs = _missing_logs(request, probe)
    try:
        with _turn(request, probe):
            async with _launched(request, probe) as launch, asyncio.timeout(request.timeout):
                if request.ours:
                    return await _told(request, launch, probe)
                return await _watched(request, launch, probe)
    except AlreadyRunningError:
        raise
    except TimeoutError:
        told = _tail(request, probe)
        _clean(request, probe, new_logs)
        raise KeeperStartError(
            f"the keeper of session {request.sid} neither came up nor failed within "
            f"{request.timeout:g} s, so it was ended{told}"
        ) from None
    except BaseException:
        _clean(request, probe, new_logs)
        raise


@contextlib.contextmanager
def _turn(request: KeeperRequest, probe: Probe) -> Iterator[None]:
    """Start one keeper of another make at a time. One of ours takes a lock by itself.

    Raises:
        AlreadyRunningError: one is being started, or was before it was our turn.
    """
    if request.ours:
        yield
        return
    sid = request.sid
    with _launch_log(request, probe) as log:  # not the one that the keeper gets, and keeps open
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunningError(f"session {sid} is just being started") from None
        seen = probe.look(sid, scanned=probe.scan().get(sid, ()))
        if seen.keeper.state is KeeperState.PROVEN:
            raise AlreadyRunningError(f"session {sid}: its keeper lives")
        yield


def _missing_logs(request: KeeperRequest, probe: Probe) -> list[str]:
    names = [file_name(role, request.sid) for role in (Role.KEEPER_LOG, Role.LAUNCH_LOG)]
    return [name for name in names if probe.folder.status(name) is None]


def _clean(request: KeeperRequest, probe: Probe, new_logs: Sequence[str]) -> None:
    """Remove what a keeper that has not come up left behind.

    Another one may have come up for the session meanwhile; then the logs are its own.
    """
    seen = probe.look(request.sid, scanned=probe.scan().get(request.sid, ()))
    if seen.keeper.process is not None:
        return
    plan = decide(seen, Desired.AS_FOUND, Policy())
    for action in plan.actions:
        if isinstance(action, Remove):
            remove(probe.folder, request.sid, action.entries)
    remove_logs(probe.folder, request.sid, new_logs)


class _Launch:
    """A keeper that is coming up: what is told of it, and which processes it is.

    Attributes:
        notices: what the keeper, or the process in between, tells through a pipe.
        keeper: the keeper, once it was told of.
        mark: stands in the environment of each of its processes, but not in its agent's.
    """

    def __init__(self, request: KeeperRequest, probe: Probe) -> None:
        self.notices = asyncio.StreamReader()
        self.keeper: ProcessId | None = None
        self.mark = uuid.uuid4().hex
        self._request = request
        self._probe = probe

    def hold(self, pid: object) -> None:
        """Take in the keeper's pid."""
        if isinstance(pid, int) and self.keeper is None:
            self.keeper = SYSTEM.facts(pid).process

    async def read_pid(self) -> None:
        """Take in the pid of a keeper of another make: it is told before that runs."""
        if line := await self.notices.readline():
            self.hold(json.loads(line)["pid"])

    async def abandon(self, between: subprocess.Popen[bytes], *, at_once: bool) -> None:
        """End what was started, the process in between first: then no more can come."""
        between.kill()
        between.wait()
        if not self._request.ours and self.keeper is None:
            await self.read_pid()
        while processes := self._processes():
            for process in processes:
                with Target(process, lambda: True) as target:
                    dead, detail = await end(target, Ladder(), group=True, at_once=at_once)
                if not dead:
                    raise StillAliveError(f"keeper {process.pid} is {detail}")

    def _processes(self) -> list[ProcessId]:
        """The keeper that was told of, and all that carry the mark."""
        pids = self._probe.scan().get(self._request.sid, ())
        marked = (pid for pid in pids if SYSTEM.variable(pid, _MARK) == self.mark)
        found = [process for pid in marked if (process := SYSTEM.facts(pid).process)]
        if self.keeper and SYSTEM.facts(self.keeper.pid).process == self.keeper:
            found.append(self.keeper)
        return found


@contextlib.asynccontextmanager
async def _launched(request: KeeperRequest, probe: Probe) -> AsyncIterator[_Launch]:
    """Start the keeper. If it does not come up, nothing of it runs any more afterwards.

    The keeper of another make that finds itself second is killed at once: its own end
    would delete the files of the first.
    """
    reading, writing = os.pipe()
    launch = _Launch(request, probe)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(launch.notices), os.fdopen(reading, "rb")
    )
    try:
        try:
            with _launch_log(request, probe) as log:
                between = _run(request, probe, log, writing, launch.mark)
        finally:
            os.close(writing)
        try:
            yield launch
        except BaseException as error:
            second = isinstance(error, AlreadyRunningError)
            await launch.abandon(between, at_once=second and not request.ours)
            raise
        finally:
            between.wait()
    finally:
        transport.close()


def _run(
    request: KeeperRequest, probe: Probe, log: int, notify: int, mark: str
) -> subprocess.Popen[bytes]:
    """Run the process in between. It ends as soon as the keeper goes on by itself."""
    env = {**environment_of(request), _MARK: mark}
    command = [*request.keeper_command, request.sid]
    folder = probe.folder.path.absolute()
    limit = given_limit()
    soft = "" if limit is None else str(limit)
    if request.ours:
        env["PI_KEEPER_SESSIONS_DIR"] = str(folder)
        env["PI_KEEPER_NOTIFY_FD"] = str(notify)
        env["PI_KEEPER_DETACH"] = "1"
        if request.again:
            env["PI_KEEPER_LAUNCH_NOTE"] = file_name(Role.LAUNCH, request.sid)
        env["PI_KEEPER_NOFILE"] = soft
    else:
        env["PI_DASHBOARD_HOME"] = str(home_of(folder))
        command = [sys.executable, "-I", "-S", "-c", _DETACH, str(notify), soft, *command]
    try:
        return subprocess.Popen(
            command,
            cwd=request.cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(notify,),
            start_new_session=True,
        )
    except OSError as error:
        raise KeeperStartError(f"{command[0]!r} could not be started: {error}") from error


@contextlib.contextmanager
def _launch_log(request: KeeperRequest, probe: Probe) -> Iterator[int]:
    """The launch log, for what a keeper says before it has a log of its own."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    name = file_name(Role.LAUNCH_LOG, request.sid)
    try:
        try:
            log = os.open(name, flags, 0o600, dir_fd=probe.folder.fd)
        except BlockingIOError:  # a sweep asks, for microseconds, whether somebody writes to it
            time.sleep(_POLL)
            log = os.open(name, flags, 0o600, dir_fd=probe.folder.fd)
    except OSError as error:
        raise FolderError(
            f"sessions folder {str(probe.folder.path)!r} is not usable: cannot write {name}: "
            f"{error.strerror}"
        ) from error
    try:
        yield log
    finally:
        os.close(log)


async def _told(request: KeeperRequest, launch: _Launch, probe: Probe) -> Started:
    """Follow what a keeper of ours says of itself."""
    last = "ready" if request.ready else "listening"
    while line := await launch.notices.readline():
        notice = json.loads(line)
        launch.hold(notice.get("pid"))
        if notice["event"] == "failed":
            error = _ERRORS.get(notice["reason"], KeeperStartError)
            said = _last_words(request, probe) if request.capture else ""
            raise error(f"session {request.sid}: {notice['detail']}{said}")
        if notice["event"] == last:
            if launch.keeper is None:
                break  # it was dead before it could be seen
            return Started(launch.keeper, notice.get("agent_pid"))
    raise KeeperStartError(
        f"the keeper of session {request.sid} died while it started{_tail(request, probe)}"
    )


async def _watched(request: KeeperRequest, launch: _Launch, probe: Probe) -> Started:
    """Watch a keeper of another make from outside until it is what it should be."""
    await launch.read_pid()
    loop = asyncio.get_running_loop()
    seen: Observation | None = None
    alive_since: float | None = None
    while (keeper := launch.keeper) and SYSTEM.facts(keeper.pid).process == keeper:
        seen = probe.look(request.sid, seen)
        if seen.keeper.state is KeeperState.PROVEN and seen.keeper.process != keeper:
            raise AlreadyRunningError(f"session {request.sid}: its keeper lives")
        listens = seen.listening is Listening.ANSWERED and seen.pid_file.pid == keeper.pid
        alive = listens and seen.agent.state is AgentState.ALIVE
        alive_since = (alive_since or loop.time()) if alive else None
        proven = alive_since is not None and loop.time() - alive_since >= AGENT_PROOF
        if proven or (listens and not request.ready):
            return Started(keeper, seen.agent.process.pid if seen.agent.process else None)
        await asyncio.sleep(_POLL)
    raise KeeperStartError(
        f"the keeper of session {request.sid} ended while it started{_tail(request, probe)}"
    )


def _tail(request: KeeperRequest, probe: Probe) -> str:
    """The end of what the keeper's logs say, for an error."""
    for role in (Role.KEEPER_LOG, Role.LAUNCH_LOG):
        if lines := _last_lines(role, request, probe):
            return f"; its log ends: {lines[-1]}"
    return ""


def _last_words(request: KeeperRequest, probe: Probe) -> str:
    """The last line that a captured agent has said, for an error."""
    lines = _last_lines(Role.KEEPER_LOG, request, probe)
    said = [line for line in lines if '"keeper_pid"' not in line]
    return f"; it said: {said[-1]}" if said else ""


def _last_lines(role: Role, request: KeeperRequest, probe: Probe) -> list[str]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        descriptor = os.open(file_name(role, request.sid), flags, dir_fd=probe.folder.fd)
        with open(descriptor, "rb") as log:
            log.seek(max(0, os.fstat(descriptor).st_size - _TAIL))
            return log.read(_TAIL).decode(errors="replace").strip().splitlines()
    return []
