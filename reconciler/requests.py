"""What a keeper is to be started with: asked for, and refused before anything is started."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reconciler.errors import AgentNotFoundError, FolderError, InvalidRequestError
from reconciler.layout import (
    FOLDER_MARKER,
    KEEPER_PROGRAM,
    SESSION_MARKER,
    Role,
    check_sid,
    file_name,
    sessions_dir,
)
from reconciler.restarts import RestartPolicy

OUR_KEEPER = (sys.executable, "-I", "-S", str(KEEPER_PROGRAM))
"""How our keeper is run: isolated, and without ``site``, which halves its start and size."""

_INSIDE = frozenset({SESSION_MARKER, FOLDER_MARKER, "PI_DASHBOARD_SPAWNED"})
_TOKEN = "PI_DASHBOARD_SPAWN_TOKEN"  # noqa: S105 - the name of a variable
_OF_THE_SERVICE = frozenset(
    {
        *("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "MAINPID", "MANAGERPID"),
        *("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "INVOCATION_ID", "JOURNAL_STREAM"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperRequest:
    """What to start. All of it is checked before anything is started.

    Attributes:
        sid: the session's id.
        cwd: the working directory of keeper and agent; must exist.
        env: the environment of keeper and agent.
        agent_command: program and arguments; empty for ``pi --mode rpc``.
        capture: the agent's output goes to the keeper log, else nowhere.
        keeper_command: runtime and keeper file, without the session id.
        restart: when the session is started again after its end.
        again: it is, so only while its launch note stands (as a keeper of ours sees to).
        ready: wait until the agent has lived 300 ms, not only until the keeper listens.
        timeout: seconds until a keeper that neither comes up nor fails is ended.
    """

    sid: str
    cwd: Path
    env: Mapping[str, str] = field(repr=False)  # keys and tokens stand in it
    agent_command: Sequence[str] = field(default=(), repr=False)  # the same
    capture: bool = False
    keeper_command: Sequence[str] = OUR_KEEPER
    restart: RestartPolicy = "never"
    again: bool = False
    ready: bool = True
    timeout: float = 10.0

    @property
    def ours(self) -> bool:
        """Whether the keeper is of our make."""
        return os.path.basename(self.keeper_command[-1]) == KEEPER_PROGRAM.name


def default_environment() -> dict[str, str]:
    """This process's environment, as a new session should get it.

    Inside the agent of another session that one's single-use token is used up: it is not
    passed on.
    """
    inside = not _INSIDE.isdisjoint(os.environ)
    return {key: value for key, value in os.environ.items() if not (inside and key == _TOKEN)}


def environment_to_restart() -> dict[str, str]:
    """This process's environment, as a session that it starts again should get it.

    Of the session's own nothing was kept. What a service manager has told this process is not
    passed on: who had it could speak to that manager in this process's name.
    """
    environment = default_environment()
    return {key: value for key, value in environment.items() if key not in _OF_THE_SERVICE}


def check(request: KeeperRequest, folder: Path) -> None:
    """Refuse a request that cannot succeed, before anything is started.

    Raises:
        InvalidSessionIdError, InvalidRequestError: the request makes no sense.
        AgentNotFoundError: the agent's program is not there.
        FolderError: the folder does not suit the keeper.
    """
    check_sid(request.sid)
    if not request.cwd.is_dir():
        raise InvalidRequestError(f"cwd {str(request.cwd)!r} is not a folder")
    for key, value in request.env.items():
        if not key or "=" in key or not _fits(key + value):
            raise InvalidRequestError(
                f"environment variable {key!r} cannot be set: bad name, a NUL, or no text"
            )
    if not all(map(_fits, request.agent_command)):
        raise InvalidRequestError("the agent's command holds a NUL character, or is no text")
    _check_program(request)
    _check_address(request, folder)


def _fits(text: str) -> bool:
    """Whether a program can be given it; the codec's own error would carry the text along."""
    with contextlib.suppress(UnicodeEncodeError):
        return b"\0" not in os.fsencode(text)
    return False


def _check_program(request: KeeperRequest) -> None:
    program = request.agent_command[0] if request.agent_command else "pi"
    path = request.env.get("PATH", os.defpath)
    named = str(request.cwd / program) if "/" in program else program
    if shutil.which(named, path=path) is None:
        where = "" if "/" in program else " in PATH"
        raise AgentNotFoundError(
            f"agent program {program!r} was not found{where}, or may not be run: install it, "
            "or name another one"
        )


def _check_address(request: KeeperRequest, folder: Path) -> None:
    path = folder / file_name(Role.SOCKET, request.sid)
    size = len(os.fsencode(path))
    limit = 107 if sys.platform == "linux" else 103
    if size > limit and not request.ours:  # ours binds relative to the folder
        raise FolderError(
            f"socket path {str(path)!r} is {size} bytes, over the system's limit of {limit}: "
            "use a shorter sessions folder"
        )
    if not request.ours and home_of(folder) is None:
        raise FolderError(
            f"keeper {request.keeper_command[-1]!r} can only serve a folder that ends in "
            f".pi/dashboard/sessions, not {str(folder)!r}"
        )


def home_of(folder: Path) -> Path | None:
    """The PI_DASHBOARD_HOME that makes a keeper of any make serve this folder, or None."""
    home = folder.parent.parent.parent
    return home if sessions_dir({}, home) == folder else None


def environment_of(request: KeeperRequest) -> dict[str, str]:
    """The environment of the keeper that is started; it gives the agent its own."""
    env = {
        key: value
        for key, value in request.env.items()
        if key not in _INSIDE and not key.startswith("PI_KEEPER_")
    }
    if request.agent_command:
        env["PI_KEEPER_PI_CMD"] = json.dumps(list(request.agent_command[:1]))
        env["PI_KEEPER_PI_ARGS"] = json.dumps(list(request.agent_command[1:]))
    if request.capture:
        env["PI_KEEPER_CAPTURE_PI_OUTPUT"] = "1"
    for name in ("PI_KEEPER_LOG_MAX_BYTES", "PI_KEEPER_LOG_CHECK_INTERVAL_MS"):
        if name in request.env:
            env[name] = request.env[name]
    return env
