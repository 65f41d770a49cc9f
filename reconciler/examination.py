"""What `doctor` reads: each check by itself, for some seconds at most, and changing nothing."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reconciler import machine
from reconciler.control_client import find
from reconciler.diagnoses import Diagnosis, problem, warning
from reconciler.doctor import (
    DiskFacts,
    FolderFacts,
    LogFacts,
    ProgramFacts,
    ServiceFacts,
    judge_clock,
    judge_daemon,
    judge_descriptors,
    judge_disk,
    judge_folder,
    judge_kernel,
    judge_log,
    judge_program,
    judge_service,
    judge_socket_path,
    judge_watches,
)
from reconciler.folder import NETWORK_FILESYSTEMS as REMOTE
from reconciler.folder import Folder, filesystem_of
from reconciler.journal import SOCKET as JOURNAL
from reconciler.layout import CLAIM, parse_name, socket_address
from reconciler.managers import UNIT, lingers
from reconciler.service import ServiceError, ask

PATIENCE = 3.0
"""Seconds that one check may take: a file on a server that hangs is no answer, too."""

_A_UUID = "00000000-0000-0000-0000-000000000000"
_LONGEST_NAME = 1 << 16  # bytes read of a file that tells a name or a version
_LONGEST_ENVIRONMENT = 1 << 21


@dataclass(frozen=True, slots=True)
class Patient:
    """What is examined.

    Attributes:
        sessions_dir: the folder.
        agent: the agent's program, as the settings or the default name it.
        keeper: the keeper's runtime, and what it is to run.
        log_sink: where the daemon's log goes: ``stdout``, ``file`` or ``journald``.
        log_file: the path of the sink ``file``.
    """

    sessions_dir: Path
    agent: str
    keeper: Sequence[str]
    log_sink: str = "stdout"
    log_file: str = ""


def examine(patient: Patient, patience: float = PATIENCE) -> list[Diagnosis]:
    """Make every check, all at once, and give what they came to in a fixed order."""
    told: queue.SimpleQueue[tuple[str, Diagnosis]] = queue.SimpleQueue()
    for name, check in CHECKS.items():
        work = functools.partial(_tell, told, name, check, patient)
        threading.Thread(target=work, name=name, daemon=True).start()
    deadline = time.monotonic() + patience
    found: dict[str, Diagnosis] = {}
    with contextlib.suppress(queue.Empty):
        while len(found) < len(CHECKS):
            name, diagnosis = told.get(timeout=max(0.0, deadline - time.monotonic()))
            found[name] = diagnosis
    late = f"no answer within {patience:g} s"
    return [found.get(name) or problem(name, late, "find out what hangs there") for name in CHECKS]


def _tell(
    told: queue.SimpleQueue[tuple[str, Diagnosis]],
    name: str,
    check: Callable[[Patient], Diagnosis],
    patient: Patient,
) -> None:
    try:
        diagnosis = check(patient)
    except Exception as error:  # noqa: BLE001 - one check's trouble is not the others'
        diagnosis = warning(name, f"{type(error).__name__}: {error}", "it could not be checked")
    told.put((name, diagnosis))


# -- The folder --------------------------------------------------------------------------------


def _folder(patient: Patient) -> Diagnosis:
    path = patient.sessions_dir
    try:
        with Folder(path) as folder:
            closed = folder.closed_to_us()
            distrust = folder.distrust()
            sessions = 0 if closed else _sessions(folder)
            return judge_folder(
                FolderFacts(path=path, distrust=distrust, closed=closed, sessions=sessions)
            )
    except FileNotFoundError:
        above = _nearest(path)
        may = os.access(above, os.W_OK | os.X_OK)
        error = "" if may else f"you may make none in {above}"
        return judge_folder(FolderFacts(path=path, there=False, error=error))
    except OSError as error:
        return judge_folder(FolderFacts(path=path, error=error.strerror or str(error)))


def _sessions(folder: Folder) -> int:
    names = map(parse_name, folder.names())
    return len({name.sid for name in names if name is not None and name.role in CLAIM})


def _disk(patient: Patient) -> Diagnosis:
    place = _nearest(patient.sessions_dir)
    kind = filesystem_of(os.stat(place).st_dev)
    room = os.statvfs(place)
    return judge_disk(
        DiskFacts(
            kind=kind,
            remote=kind in REMOTE,
            read_only=bool(room.f_flag & os.ST_RDONLY),
            space=room.f_bavail * room.f_frsize,
            files=room.f_favail if room.f_files else None,
        )
    )


def _nearest(path: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(each for each in (path, *path.parents) if os.path.isdir(each))


def _socket_path(patient: Patient) -> Diagnosis:
    size = len(os.fsencode(socket_address(patient.sessions_dir, _A_UUID)))
    return judge_socket_path(size, 107 if sys.platform == "linux" else 103)


# -- The system --------------------------------------------------------------------------------


def _watches(patient: Patient) -> Diagnosis:
    return judge_watches(machine.watches(_nearest(patient.sessions_dir)))


def _descriptors(patient: Patient) -> Diagnosis:
    sessions = 0
    with contextlib.suppress(OSError), Folder(patient.sessions_dir) as folder:
        sessions = _sessions(folder)
    return judge_descriptors(machine.most_descriptors(), sessions)


def _kernel(_: Patient) -> Diagnosis:
    version = f"{platform.system()} {platform.release()}"
    return judge_kernel(
        pidfd=machine.has_pidfds(), peer_pidfd=machine.has_peer_pidfds(), version=version
    )


def _clock(_: Patient) -> Diagnosis:
    return judge_clock(
        time.time(), synchronized=machine.is_synchronized(), suspended=machine.suspended()
    )


# -- Programs ----------------------------------------------------------------------------------


def _agent(patient: Patient) -> Diagnosis:
    advice = "npm install -g @earendil-works/pi-coding-agent, or name yours: agent_command"
    return judge_program("agent", _program(patient.agent), advice)


def _keeper(patient: Patient) -> Diagnosis:
    program = _program(patient.keeper[0])
    missing = [each for each in patient.keeper[1:] if os.path.isabs(each) and not _readable(each)]
    facts = ProgramFacts(
        name=program.name,
        path=program.path,
        interpreter=program.interpreter,
        missing="".join(missing[:1]),
    )
    return judge_program("keeper", facts, "correct keeper_command, or install pi-reconciler again")


def _readable(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.R_OK)


def _program(name: str, search: str | None = None) -> ProgramFacts:
    """A program as it is found on a PATH, ours if none is given."""
    path = shutil.which(name, path=search)
    if path is None:
        return ProgramFacts(name=name, path=None)
    wanted = _interpreter(path)
    absent = wanted if wanted and shutil.which(wanted, path=search) is None else ""
    return ProgramFacts(name=name, path=path, interpreter=absent, version=_version(path))


def _interpreter(path: str) -> str:
    """What a script's first line says that it runs under, or nothing."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        line = file.readline(256)
        words = os.fsdecode(line[2:]).split() if line.startswith(b"#!") else []
        if words and os.path.basename(words[0]) == "env":
            words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        return "".join(words[:1])
    return ""


def _version(path: str) -> str:
    """The version in the package.json that a program of npm's comes with, or nothing."""
    for place in Path(os.path.realpath(path)).parents[:4]:
        with contextlib.suppress(OSError, ValueError), open(place / "package.json", "rb") as file:
            found = json.loads(file.read(_LONGEST_NAME))
            return str(found.get("version", "")) if isinstance(found, dict) else ""
    return ""


# -- The log -----------------------------------------------------------------------------------


def _log(patient: Patient) -> Diagnosis:
    match patient.log_sink:
        case "file" if not patient.log_file:
            place, trouble = "log.file", "it names no file"
        case "file":
            place = os.path.abspath(os.path.expanduser(patient.log_file))
            trouble = _unwritable(place)
        case "journald":
            place, trouble = JOURNAL, _unreachable(JOURNAL)
        case _:
            place = trouble = ""
    return judge_log(LogFacts(sink=patient.log_sink, place=place, trouble=trouble))


def _unwritable(path: str) -> str:
    """Why a file cannot be written to, or made, or nothing. It is not opened."""
    if os.path.lexists(path):
        if not os.path.isfile(path):
            return "it is no regular file"
        return "" if os.access(path, os.W_OK) else "it may not be written to"
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"nothing may be made in {folder}"


def _unreachable(path: str) -> str:
    """Why nobody takes datagrams on a socket, or nothing. None is sent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        try:
            client.connect(path)
        except OSError as error:
            return error.strerror or str(error)
    return ""


# -- The daemon --------------------------------------------------------------------------------


def _service(_: Patient) -> Diagnosis:
    return judge_service(_service_facts())


def _service_facts() -> ServiceFacts:
    names = "LoadState,ActiveState,UnitFileState,MainPID"
    try:
        done = ask(("systemctl", "--user", "show", UNIT, "--property", names), _soon)
    except ServiceError as error:
        return ServiceFacts(silent=str(error))
    if done.returncode:
        return ServiceFacts(silent=done.stderr.strip().partition("\n")[0])
    said = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return ServiceFacts(
        installed=said.get("LoadState") == "loaded",
        active=said.get("ActiveState", ""),
        enabled=said.get("UnitFileState") in {"enabled", "enabled-runtime", "static", "linked"},
        lingers=lingers(os.getuid()),
        pid=int(said.get("MainPID", "0")),
    )


def _soon(command: Sequence[str], **how: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401 - run's own
    """Run a command that has ended before its check is given up."""
    return subprocess.run(command, **{**how, "timeout": PATIENCE * 0.8})  # noqa: PLW1510 - in how


def _daemon(patient: Patient) -> Diagnosis:
    if sys.platform != "linux":  # where the kernel lists no locks
        return judge_daemon(0, "", 0)
    holder = None
    with contextlib.suppress(OSError), Folder(patient.sessions_dir) as folder:
        holder = folder.lock_holder()
    if not holder:
        return judge_daemon(holder, "", 0)
    found = find(patient.sessions_dir)
    if found.stream:
        found.stream.close()
    agent = _program(patient.agent, _search_path(holder))
    lacks = agent.interpreter if agent.path else agent.name
    pid = _service_facts().pid
    return judge_daemon(holder, _runs(holder), pid, silent=found.silent, lacks=lacks)


def _runs(pid: int) -> str:
    """What a process is called; its arguments are not told."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", "rb") as file:
        return os.fsdecode(file.read(_LONGEST_NAME)).strip()
    return ""


def _search_path(pid: int) -> str | None:
    """The PATH that a process was started with; of its environment nothing else is kept."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        for each in file.read(_LONGEST_ENVIRONMENT).split(b"\0"):
            if each.startswith(b"PATH="):
                return os.fsdecode(each.removeprefix(b"PATH="))
    return None


CHECKS: Mapping[str, Callable[[Patient], Diagnosis]] = {
    "folder": _folder,
    "filesystem": _disk,
    "socket path": _socket_path,
    "file events": _watches,
    "descriptors": _descriptors,
    "kernel": _kernel,
    "clock": _clock,
    "agent": _agent,
    "keeper": _keeper,
    "log": _log,
    "service": _service,
    "daemon": _daemon,
}
"""Every check, in the order in which they are told."""
