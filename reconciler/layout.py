"""Names on disk: session ids, paths, and what a file name means.

Pure: nothing here touches the file system. Every function that depends on the
system takes ``platform`` (a value of ``sys.platform``), so the names of Windows
can be computed, and tested, anywhere.
"""

from __future__ import annotations

import enum
import itertools
import posixpath
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

MAX_SID_LENGTH = 90
"""Bytes. ``<sid>.rpc.sock`` must fit into ``sun_path`` when bound relative to the
folder: 104 bytes with the final NUL on macOS (108 on Linux), less ``.rpc.sock``."""

_SID = re.compile(rf"(?!launch-)[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_SID_LENGTH - 1}}}", re.ASCII)

KEEPER_PROGRAM = Path(__file__).parent / "launcher" / "keeper_process.py"
"""Our keeper, as it is run: by path, from its bytecode. No room imports it."""


PREFIX = "PI_RECONCILER_"
"""What every environment variable of ours begins with."""

SESSION_MARKER = "PI_RECONCILER_SESSION"
"""Our keeper sets it to the session id for its agent, and all that this one starts inherits it."""

FOLDER_MARKER = "PI_RECONCILER_FOLDER"
"""Set beside it: the sessions folder, as `folder_mark` writes it."""


CONTROL_SOCKET = ".reconciler.sock"
"""Where the daemon of a sessions folder says how it stands; hidden, and no session's name."""


class InvalidSessionIdError(ValueError):
    """A session id that cannot safely be a part of a file name."""


class Role(enum.Enum):
    """What a name in the sessions folder stands for."""

    SOCKET = "socket"
    PID_FILE = "pid_file"
    AGENT_PID_FILE = "agent_pid_file"
    KEEPER_LOG = "keeper_log"
    LAUNCH_LOG = "launch_log"
    LEAVE = "leave"
    """The user's wish that what the session has started is left alone when it ends."""
    LAUNCH = "launch"
    """What a session with a restart policy was started with."""


CLAIM = (Role.SOCKET, Role.AGENT_PID_FILE, Role.PID_FILE)
"""The roles that claim "a keeper lives", in the order of their removal: the pid file
goes last, since what it says is what condemns the others."""


CONCERN = (*CLAIM, Role.LAUNCH)
"""The roles for which a session is looked at: they claim a keeper, or ask for one."""


_LOGS_AND_NOTES = {
    Role.LAUNCH_LOG: ("keeper-launch-", ".log"),  # before the shorter one that fits it, too
    Role.KEEPER_LOG: ("keeper-", ".log"),
    Role.LEAVE: ("keeper-", ".leave"),
    Role.LAUNCH: ("keeper-", ".launch"),
}
_NAMES = {
    Role.SOCKET: ("", ".rpc.sock"),
    Role.PID_FILE: ("", ".rpc.sock.pid"),
    Role.AGENT_PID_FILE: ("", ".rpc.sock.pi-pid"),
    **_LOGS_AND_NOTES,
}
_WINDOWS_NAMES = {
    Role.PID_FILE: ("pi-rpc-", ".pid"),
    Role.AGENT_PID_FILE: ("pi-rpc-", ".pi-pid"),
    **_LOGS_AND_NOTES,
}


def check_sid(sid: str) -> str:
    """Give ``sid`` back when it can be a part of a file name.

    Args:
        sid: 1 to 90 of the characters ``A-Z a-z 0-9 . _ -``, the first one a letter or
            a digit. ``launch-`` cannot begin one: ``keeper-launch-x.log`` would be both
            the keeper log of ``launch-x`` and the launch log of ``x``.

    Raises:
        InvalidSessionIdError: what is wrong, with the value.
    """
    if not _SID.fullmatch(sid):
        raise InvalidSessionIdError(
            f"session id {sid[: MAX_SID_LENGTH + 8]!r} is not usable: give 1 to "
            f"{MAX_SID_LENGTH} of the characters A-Z a-z 0-9 . _ -, beginning with a letter "
            "or a digit and not with 'launch-' (a UUID is best)"
        )
    return sid


def base_dir(environ: Mapping[str, str], home: Path) -> Path:
    """The folder that ``.pi`` lies in: ``$PI_DASHBOARD_HOME`` unless unset or blank."""
    override = environ.get("PI_DASHBOARD_HOME", "")
    return Path(override) if override.strip() else home


def sessions_dir(environ: Mapping[str, str], home: Path) -> Path:
    """The sessions folder of the contract, ``<base>/.pi/dashboard/sessions``."""
    return base_dir(environ, home) / ".pi" / "dashboard" / "sessions"


def folder_mark(device: int, inode: int) -> str:
    """A folder as `FOLDER_MARKER` names it: by what it is, not by a path that may move."""
    return f"{device}:{inode}"


def registry_file(folder: Path) -> Path:
    """The dashboard's spawn registry that belongs to a sessions folder."""
    return folder.parent / "headless-pids.json"


def file_name(role: Role, sid: str, platform: str = sys.platform) -> str:
    """The bare name of a session's file in the sessions folder.

    Args:
        role: which file.
        sid: the session's id, not checked here.
        platform: a value of ``sys.platform``.

    Raises:
        ValueError: for the socket on Windows, which is a pipe and has no file.
    """
    try:
        before, after = (_WINDOWS_NAMES if platform == "win32" else _NAMES)[role]
    except KeyError:
        raise ValueError("on Windows the socket is a named pipe, it has no file") from None
    return before + sid + after


def socket_address(folder: Path, sid: str, platform: str = sys.platform) -> str:
    """What a client connects to: a socket's path, on Windows a pipe's name."""
    if platform == "win32":
        return rf"\\.\pipe\pi-rpc-{sid}"
    return str(folder / file_name(Role.SOCKET, sid, platform))


class ParsedName(NamedTuple):
    """What a file name says. ``sid`` is always a valid session id."""

    role: Role
    sid: str


def parse_name(name: str, platform: str = sys.platform) -> ParsedName | None:
    """Read a bare file name: the reverse of `file_name`, or None when it is not ours.

    A name with one of our endings whose rest is no valid session id is not ours.
    """
    names = _WINDOWS_NAMES if platform == "win32" else _NAMES
    for role, (before, after) in names.items():
        if name.endswith(after) and name.startswith(before):
            sid = name[len(before) : -len(after)]
            return ParsedName(role, sid) if _SID.fullmatch(sid) else None
    return None


def claims(name: str, platform: str = sys.platform) -> str | None:
    """The session id that a name claims a keeper for; None for logs and foreign names."""
    parsed = parse_name(name, platform)
    return parsed.sid if parsed and parsed.role in CLAIM else None


def concerns(name: str, platform: str = sys.platform) -> str | None:
    """The session that should be looked at for a name: it claims a keeper, or asks for one."""
    parsed = parse_name(name, platform)
    return parsed.sid if parsed and parsed.role in CONCERN else None


class KeeperArguments(NamedTuple):
    """What a keeper's command line says: the program's base name and the session id."""

    program: str
    sid: str


def keeper_arguments(
    arguments: Sequence[str], programs: frozenset[str], platform: str = sys.platform
) -> KeeperArguments | None:
    """Read a process's arguments as ``<runtime> [-option]... <keeper file> <sid>``, or None.

    A wrapper that stays (``timeout 1d node keeper.cjs <sid>``) names a keeper, and is none.

    Args:
        arguments: a process's arguments, the program first.
        programs: base names of known keeper programs.
        platform: a value of ``sys.platform``.
    """
    for position, (argument, following) in enumerate(itertools.pairwise(arguments)):
        name = (
            PureWindowsPath(argument).name if platform == "win32" else posixpath.basename(argument)
        )
        if name in programs and _SID.fullmatch(following):
            direct = all(option.startswith("-") for option in arguments[1:position])
            return KeeperArguments(name, following) if direct else None
    return None


def mentions_keeper(arguments: Sequence[str], programs: frozenset[str]) -> bool:
    """Whether a process may run a keeper, in whatever way: to spare it needs no proof."""
    return any(
        posixpath.basename(argument) in programs and _SID.fullmatch(following)
        for argument, following in itertools.pairwise(arguments)
    )
