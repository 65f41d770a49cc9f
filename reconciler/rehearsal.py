"""Dry runs: what a command would do, found out as the command itself does, and nothing done."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reconciler.errors import FolderError, NoSuchSessionError, UnverifiableError
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager
from reconciler.layout import Role, file_name, socket_address
from reconciler.observations import EntryKind, KeeperState, Observation
from reconciler.plans import Verdict
from reconciler.requests import KeeperRequest, check
from reconciler.screens import action_words
from reconciler.starting import noted, refuse_used, request_of
from reconciler.state import Desired, decide
from reconciler.stopping import processes_of
from reconciler.trust import distrust_below

_ENDED = frozenset({Verdict.ABSENT, Verdict.LEFTOVERS})


@dataclass(frozen=True, slots=True)
class Start:
    """What `spawn` would do.

    Attributes:
        sid: the session's id.
        program: the agent's program, as it was found.
        cwd: where keeper and agent would run.
        socket: what the keeper would listen on.
        first: what would be done before the keeper is started, in words.
    """

    sid: str
    program: str
    cwd: str
    socket: str
    first: tuple[str, ...]


def spawn(manager: KeeperManager, sid: str | None, **options: Any) -> Start:  # noqa: ANN401 - the manager's
    """Find out what `KeeperManager.spawn` would do.

    Raises:
        InvalidSessionIdError, InvalidRequestError, AgentNotFoundError, AlreadyRunningError,
        FolderError, UnverifiableError: as `spawn` would, before it starts anything.
    """
    request = manager.request(sid, **options)
    try:
        with Folder(manager.sessions_dir) as folder:
            manager.refuse_untrusted(folder)
            _check_writable(folder)
            seen = manager.probe(folder).look(request.sid)
            refuse_used(seen, manager.policy)
            first = _cleared(seen, manager, folder)
    except FileNotFoundError:
        _check_place(manager.sessions_dir)
        first = [f"make the folder {manager.sessions_dir}"]
    except OSError as error:
        raise _unusable(manager.sessions_dir, error.strerror) from error
    socket = socket_address(manager.sessions_dir, request.sid)
    return Start(request.sid, _program(request), str(request.cwd), socket, tuple(first))


def _program(request: KeeperRequest) -> str:
    """The agent's program, as it would be found."""
    program = request.agent_command[0] if request.agent_command else "pi"
    named = str(request.cwd / program) if "/" in program else program
    return shutil.which(named, path=request.env.get("PATH", os.defpath)) or program


def _cleared(seen: Observation, manager: KeeperManager, folder: Folder) -> list[str]:
    """What of the session before would go, in words."""
    words = [
        action_words(action) for action in decide(seen, Desired.ABSENT, manager.policy).actions
    ]
    if folder.status(file_name(Role.LAUNCH, seen.sid)) is not None:
        words.append("remove its launch note")
    return words


def _check_place(folder: Path) -> None:
    """Refuse a folder that could not be made, or not be trusted once it is made."""
    above = next(path for path in folder.parents if os.path.lexists(path))
    try:
        descriptor = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(folder, error.strerror) from error
    try:
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=descriptor, effective_ids=True):
            raise _unusable(folder, os.strerror(errno.EACCES))
        if reason := distrust_below(descriptor, above):
            raise FolderError(f"sessions folder {str(folder)!r} cannot be trusted: {reason}")
    finally:
        os.close(descriptor)


def _check_writable(folder: Folder) -> None:
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=folder.fd, effective_ids=True):
        raise _unusable(folder.path, os.strerror(errno.EACCES))


def _unusable(folder: Path, reason: str | None) -> FolderError:
    return FolderError(f"sessions folder {str(folder)!r} cannot be used: {reason}")


@dataclass(frozen=True, slots=True)
class End:
    """What `stop` would do.

    Attributes:
        sid: the session's id.
        keeper_pid: its keeper; None when none lives.
        agent_pid: its agent, if that is known and proven.
        leftovers: what else of it would be ended.
        files: names in the folder that would be gone afterwards.
    """

    sid: str
    keeper_pid: int | None
    agent_pid: int | None
    leftovers: tuple[int, ...]
    files: tuple[str, ...]


def stop(manager: KeeperManager, sid: str, *, leave: bool = False) -> End:
    """Find out what `KeeperManager.stop` would do.

    Raises:
        NoSuchSessionError, UnverifiableError, FolderError: as `stop` would.
    """
    seen = manager.inspect(sid).seen
    with manager.open_folder() as folder:
        if folder is None:
            raise NoSuchSessionError(f"no session {sid}: there is no {manager.sessions_dir}")
        manager.refuse_untrusted(folder)
        _check_writable(folder)
    plan = decide(seen, Desired.ABSENT, manager.policy)
    if plan.verdict not in _ENDED and not plan.actions and plan.again_after is None:
        raise UnverifiableError(f"session {sid} would be left alone: {plan.reason}")
    keeper = seen.keeper.process if seen.keeper.state is KeeperState.PROVEN else None
    agent = seen.agent.process if seen.agent.proven else None
    own = {each.pid for each in processes_of(seen)}
    others = [each.process.pid for each in seen.leftovers if each.process.pid not in own]
    return End(
        sid,
        keeper.pid if keeper else None,
        agent.pid if agent else None,
        () if leave else tuple(others),
        _files(seen),
    )


def restart(manager: KeeperManager, sid: str, *, leave: bool = False) -> tuple[End, str, str]:
    """Find out what `KeeperManager.restart` would end, the program it would start, and where.

    Raises:
        NoSuchSessionError, NotKeptError, AgentNotFoundError, InvalidRequestError,
        UnverifiableError, FolderError: as `restart` would.
    """
    end = stop(manager, sid, leave=leave)
    with Folder(manager.sessions_dir) as folder, noted(folder, sid) as note:
        request = request_of(sid, note.launch)
    check(request, manager.sessions_dir)
    return replace(end, files=()), _program(request), str(request.cwd)


def _files(seen: Observation) -> tuple[str, ...]:
    entries = (
        (Role.SOCKET, seen.socket),
        (Role.AGENT_PID_FILE, seen.agent_file),
        (Role.PID_FILE, seen.pid_file),
        (Role.LAUNCH, seen.note),
    )
    return tuple(
        file_name(role, seen.sid)
        for role, entry in entries
        if entry.kind not in {EntryKind.ABSENT, EntryKind.HOSTILE}
    )
