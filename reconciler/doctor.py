"""What `doctor` makes of what it has read: whether all is well, what was found, what to do.

Pure: facts go in, a diagnosis comes out. `reconciler.examination` reads the facts.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from reconciler.diagnoses import Diagnosis, ok, problem, warning

_MIB = 1 << 20
LITTLE_SPACE = 64 * _MIB
"""Bytes; below that a few long logs fill the disk."""
FEW_FILES = 1_000
"""Entries that a filesystem can still take: each session needs five."""
FEW_SESSIONS = 100
"""Sessions that the descriptors should do for; each takes two in the daemon."""
_SPARE = 64  # descriptors that the daemon needs for itself, rounded up
_NEWEST_PAST = 1_704_067_200  # 2024-01-01: no clock is right that says less
_MANY_SECONDS = 60.0


# -- The settings ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsFacts:
    """What was read of the settings.

    Attributes:
        path: the file.
        named: it was asked for by --config.
        there: it exists.
        error: all that is wrong with what is said, or nothing.
        variables: how many variables say something.
        writers: who else may write to the file, or nothing.
    """

    path: Path
    named: bool = False
    there: bool = True
    error: str = ""
    variables: int = 0
    writers: str = ""


def judge_settings(facts: SettingsFacts) -> Diagnosis:
    """Whether the settings can be used, and are nobody else's to change."""
    if facts.error:
        which = f" {shlex.quote(str(facts.path))}" if facts.named else ""
        return problem("settings", facts.error, f"pi-reconciler config check{which}")
    if facts.writers:
        found = f"{facts.path} may be written to by {facts.writers}, who can name what you run"
        return problem("settings", found, f"chmod go-w {shlex.quote(str(facts.path))}, or own it")
    file = str(facts.path) if facts.there else f"no {facts.path}: the defaults"
    return ok("settings", file + (f", {facts.variables} by variables" if facts.variables else ""))


# -- The folder --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFacts:
    """What was read of the sessions folder.

    Attributes:
        path: where it is.
        there: it exists.
        error: why it cannot be opened, or not be made, or nothing.
        distrust: why it must not be acted upon, or nothing.
        closed: its mode keeps us from its entries.
        sessions: how many have a socket or a pid file there.
    """

    path: Path
    there: bool = True
    error: str = ""
    distrust: str = ""
    closed: bool = False
    sessions: int = 0


def judge_folder(facts: FolderFacts) -> Diagnosis:
    """Whether the folder is there, ours, and nobody else's."""
    path, quoted = str(facts.path), shlex.quote(str(facts.path))
    if not facts.there and facts.error:
        advice = "make it as who may, your own; or name another one, --sessions-dir"
        return problem("folder", f"{path} is not there, and {facts.error}", advice)
    if not facts.there:
        return ok("folder", f"{path} is not there yet: the daemon or the first session makes it")
    if facts.error:
        return problem("folder", f"{path} cannot be opened: {facts.error}", f"ls -ld {quoted}")
    if facts.distrust:
        advice = "until then the daemon only looks on, and nothing is written or started there"
        return problem("folder", f"{path}: {facts.distrust}", advice)
    if facts.closed:
        return problem("folder", f"{path}: its mode keeps you out", f"chmod u+rwx {quoted}")
    return ok("folder", f"{path}, nobody else's, sessions: {facts.sessions}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """What was read of the filesystem under the folder.

    Attributes:
        kind: its name, as ``ext4``; empty where it cannot be told.
        remote: it is one of the network.
        read_only: it is mounted so.
        space: bytes that we may still take.
        files: entries that it can still take; None where it does not count them.
    """

    kind: str
    remote: bool
    read_only: bool
    space: int
    files: int | None


def judge_disk(facts: DiskFacts) -> Diagnosis:
    """Whether sessions can live there."""
    kind = facts.kind or "of an unknown kind"
    if facts.read_only:
        return problem("filesystem", f"{kind}, mounted read-only", "mount it to be written to")
    if facts.space == 0 or facts.files == 0:
        what = f"{kind}, full" if facts.space == 0 else f"{kind}, no entry is free (inodes)"
        return problem("filesystem", what, "make room: no session can be started")
    room = f"{kind}, {facts.space // _MIB} MiB free"
    if facts.space < LITTLE_SPACE or (facts.files is not None and facts.files < FEW_FILES):
        free = room if facts.space < LITTLE_SPACE else f"{kind}, {facts.files} entries free"
        return warning("filesystem", free, "make room before sessions fail to start")
    if facts.remote:
        found = f"{kind}, of the network: only what this daemon itself saw alive is cleaned there"
        return warning("filesystem", found, "set sessions_dir to a folder on a local disk")
    return ok("filesystem", room)


def judge_socket_path(size: int, limit: int) -> Diagnosis:
    """Whether every keeper can listen in the folder.

    Args:
        size: bytes of the path of a session's socket, whose id is a UUID.
        limit: the system's longest.
    """
    found = f"{size} bytes with a UUID, of {limit}"
    advice = "keepers of another make and their clients cannot use it (ours can): shorten the path"
    return ok("socket path", found) if size <= limit else warning("socket path", found, advice)


# -- The system --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchFacts:
    """What was read of the kernel's file events.

    Attributes:
        available: the system has inotify.
        no_instance: why no instance could be had, or nothing.
        no_watch: why no watch could be set, or nothing.
        instances: how many a user may have; None where that cannot be read.
        watches: the same.
    """

    available: bool = True
    no_instance: str = ""
    no_watch: str = ""
    instances: int | None = None
    watches: int | None = None


def judge_watches(facts: WatchFacts) -> Diagnosis:
    """Whether the daemon can watch the folder."""
    if not facts.available:
        advice = "nothing to do: a smaller `resync` lets it look more often"
        return warning("file events", "this system has no inotify: the folder is polled", advice)
    for failure, what, limit in (
        (facts.no_instance, "max_user_instances", facts.instances),
        (facts.no_watch, "max_user_watches", facts.watches),
    ):
        if failure:
            found = f"none to be had ({failure}; fs.inotify.{what} is {limit or 'not known'})"
            more = f"sysctl -w fs.inotify.{what}={(limit or 4096) * 2}"
            advice = f"as root: {more} (and the same in /etc/sysctl.d); until then it is polled"
            return problem("file events", found, advice)
    return ok("file events", f"inotify, {facts.instances} instances, {facts.watches} watches")


def judge_descriptors(limit: int | None, sessions: int) -> Diagnosis:
    """Whether the daemon can hold every session.

    Args:
        limit: how many descriptors a process of ours may have at most; None: no limit.
        sessions: how many there are now.
    """
    if limit is None:
        return ok("descriptors", "no limit")
    capacity = max(0, limit - _SPARE) // 2
    found = f"{limit} at most, enough to hold {capacity} sessions"
    advice = "raise LimitNOFILE= in the unit, or `ulimit -Hn`: the exits of the others are polled"
    if capacity < sessions:
        return problem("descriptors", f"{found}, and there are {sessions}", advice)
    few = capacity < FEW_SESSIONS
    return warning("descriptors", found, advice) if few else ok("descriptors", found)


def judge_kernel(*, pidfd: bool, peer_pidfd: bool, version: str) -> Diagnosis:
    """Whether processes can be held and proven.

    Args:
        pidfd: a process can be held.
        peer_pidfd: the kernel names who listens on a socket, safe from recycled pids.
        version: the kernel's.
    """
    if not pidfd:
        advice = "Linux 5.3 or newer, without a filter of system calls that forbids pidfd_open"
        return warning("kernel", f"{version}: no pidfds, exits are polled", advice)
    if not peer_pidfd:
        advice = "Linux 6.5 or newer proves more; nothing else is lost"
        return warning("kernel", f"{version}: pidfds, but no SO_PEERPIDFD", advice)
    return ok("kernel", f"{version}: pidfds, SO_PEERPIDFD")


def judge_clock(now: float, *, synchronized: bool | None, suspended: float) -> Diagnosis:
    """Whether the times in the logs can be believed; decisions do not depend on them.

    Args:
        now: seconds since 1970, as the wall clock has it.
        synchronized: with other clocks; None where that cannot be told.
        suspended: seconds since boot for which the machine slept.
    """
    slept = f"; slept for {suspended:.0f} s since boot" if suspended > _MANY_SECONDS else ""
    advice = "timedatectl set-ntp true (only log times suffer, ages are counted otherwise)"
    if now < _NEWEST_PAST:
        return problem("clock", f"it says {now:.0f} s since 1970, long ago{slept}", advice)
    if synchronized is False:
        return warning("clock", f"not synchronized{slept}", advice)
    told = "synchronized" if synchronized else "whether it is synchronized cannot be told"
    return ok("clock", told + slept)


# -- Programs ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramFacts:
    """What was read of a program.

    Attributes:
        name: as it is asked for.
        path: where it is; None: nowhere.
        interpreter: what it needs to run and is not on PATH, or nothing.
        version: as its package says it, or nothing.
        missing: a file that it is to run and that is not there, or nothing.
    """

    name: str
    path: str | None
    interpreter: str = ""
    version: str = ""
    missing: str = ""


def judge_program(check: str, facts: ProgramFacts, advice: str) -> Diagnosis:
    """Whether a program can be run."""
    if facts.path is None:
        return problem(check, f"{facts.name} is not there, or not to be run", advice)
    if facts.interpreter:
        found = f"{facts.path} needs {facts.interpreter}, which is not on PATH"
        return problem(check, found, f"install {facts.interpreter}, or put it on PATH")
    if facts.missing:
        return problem(check, f"{facts.missing} cannot be read", advice)
    return ok(check, f"{facts.path}{f' {facts.version}' if facts.version else ''}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFacts:
    """What was read of where the daemon's log goes.

    Attributes:
        sink: ``stdout``, ``file`` or ``journald``.
        place: the file, or the journal's socket.
        trouble: why it cannot be written to, or nothing.
    """

    sink: str
    place: str = ""
    trouble: str = ""


def judge_log(facts: LogFacts) -> Diagnosis:
    """Whether the daemon's lines arrive."""
    if facts.trouble:
        to_file = "see to its folder and rights, or name another one: log.file"
        to_journal = "start systemd-journald, or choose another sink: log.sink"
        advice = to_file if facts.sink == "file" else to_journal
        return problem("log", f"{facts.place}: {facts.trouble}", advice)
    return ok("log", f"{facts.sink} ({facts.place})" if facts.place else "standard output")


# -- The daemon --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceFacts:
    """What the service manager says.

    Attributes:
        silent: why it says nothing, or nothing.
        installed: it knows the unit.
        active: the unit's state, as ``active``.
        enabled: it is started at the next login, or at boot.
        lingers: it runs without a login.
        pid: of its main process, or 0.
    """

    silent: str = ""
    installed: bool = False
    active: str = ""
    enabled: bool = False
    lingers: bool = False
    pid: int = 0


def judge_service(facts: ServiceFacts) -> Diagnosis:
    """Whether something starts the daemon."""
    if facts.silent:
        return ok("service", f"no service manager to ask ({facts.silent})")
    if not facts.installed:
        return warning("service", "not installed", "pi-reconciler service install")
    if facts.active == "failed":
        return problem("service", "failed", "journalctl --user -u pi-reconciler")
    if facts.active not in {"active", "reloading"}:
        advice = "systemctl --user enable --now pi-reconciler"
        return warning("service", f"installed, and {facts.active or 'not running'}", advice)
    if not facts.enabled:
        return warning("service", "running, not enabled", "systemctl --user enable pi-reconciler")
    if not facts.lingers:
        advice = "loginctl enable-linger, if sessions run on without you"
        return warning("service", "running, but it ends when you log out", advice)
    return ok("service", f"running, process {facts.pid}")


def judge_daemon(
    holder: int | None, program: str, service: int, *, silent: bool = False, lacks: str = ""
) -> Diagnosis:
    """Whether somebody keeps the folder right, and who.

    Args:
        holder: the process that has the folder's lock; None: nobody, 0: that cannot be told.
        program: what that process runs.
        service: the process of the service, or 0.
        silent: it listens, and does not answer.
        lacks: what is not on its PATH, and the agent needs to run: so no session is started again.
    """
    if holder is None:
        advice = "pi-reconciler run, or service install: until then nothing is put right by itself"
        return warning("daemon", "nobody holds the folder's lock", advice)
    if not holder:
        return ok("daemon", "who holds the folder's lock cannot be told: see pi-reconciler status")
    found = f"process {holder} ({program or 'not known'}) keeps the folder"
    if silent:
        advice = (
            f"kill -CONT {holder} if it was stopped; if it hangs, kill -ABRT {holder} tells where"
        )
        return problem("daemon", f"{found}, and does not answer: it hangs, or was stopped", advice)
    if service and holder != service:
        advice = f"the service waits for process {holder} to end: stop one of the two"
        return warning("daemon", f"{found}, not the service's (process {service})", advice)
    if lacks:
        advice = "start it with a PATH that has it, for sessions that it is to start again"
        return warning("daemon", f"{found}, and has no {lacks} on its PATH", advice)
    return ok("daemon", found)
