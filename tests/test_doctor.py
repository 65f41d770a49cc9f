"""What doctor makes of what it has read: a table of facts and diagnoses."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.diagnoses import Diagnosis, State
from reconciler.doctor import (
    DiskFacts,
    FolderFacts,
    LogFacts,
    ProgramFacts,
    ServiceFacts,
    SettingsFacts,
    WatchFacts,
    judge_clock,
    judge_daemon,
    judge_descriptors,
    judge_disk,
    judge_folder,
    judge_kernel,
    judge_log,
    judge_program,
    judge_service,
    judge_settings,
    judge_socket_path,
    judge_watches,
)

HERE = Path("/a b")
NOW = 1_800_000_000.0
GIB = 1 << 30


def folder(**facts: object) -> Diagnosis:
    return judge_folder(FolderFacts(path=HERE, **facts))  # type: ignore[arg-type] # as the row says


def disk(
    kind: str = "ext4",
    *,
    remote: bool = False,
    read_only: bool = False,
    space: int = GIB,
    files: int | None = 10_000,
) -> Diagnosis:
    return judge_disk(
        DiskFacts(kind=kind, remote=remote, read_only=read_only, space=space, files=files)
    )


def program(path: str | None = "/bin/pi", **facts: str) -> Diagnosis:
    return judge_program("agent", ProgramFacts(name="pi", path=path, **facts), "install it")


def service(**facts: object) -> Diagnosis:
    running = {"installed": True, "active": "active", "enabled": True, "lingers": True, "pid": 7}
    return judge_service(ServiceFacts(**{**running, **facts}))  # type: ignore[arg-type] # the same


@pytest.mark.parametrize(
    ("diagnosis", "state", "found", "advice"),
    [
        (judge_settings(SettingsFacts(path=HERE)), "ok", "/a b", ""),
        (judge_settings(SettingsFacts(path=HERE, variables=2)), "ok", "/a b, 2 by variables", ""),
        (judge_settings(SettingsFacts(path=HERE, there=False)), "ok", "no /a b: the def", ""),
        (judge_settings(SettingsFacts(path=HERE, error="bad")), "problem", "bad", "config check"),
        (
            judge_settings(SettingsFacts(path=HERE, named=True, error="bad")),
            "problem",
            "bad",
            "pi-reconciler config check '/a b'",
        ),
        (
            judge_settings(SettingsFacts(path=HERE, writers="everybody")),
            "problem",
            "/a b may be written to by everybody",
            "chmod go-w '/a b'",
        ),
        (folder(sessions=3), "ok", "/a b, nobody else's, sessions: 3", ""),
        (folder(there=False), "ok", "is not there yet", ""),
        (
            folder(there=False, error="you may make none in /"),
            "problem",
            "/a b is not there, and you may make none in /",
            "--sessions-dir",
        ),
        (folder(error="Not a directory"), "problem", "Not a directory", "ls -ld '/a b'"),
        (folder(distrust="mode 0777"), "problem", "mode 0777", "only looks on"),
        (folder(closed=True), "problem", "keeps you out", "chmod u+rwx '/a b'"),
        (disk(), "ok", "ext4, 1024 MiB free", ""),
        (disk(kind=""), "ok", "of an unknown kind", ""),
        (disk(files=None), "ok", "ext4", ""),
        (disk(kind="nfs", remote=True), "warning", "nfs, of the network", "local disk"),
        (disk(read_only=True), "problem", "mounted read-only", "mount it"),
        (disk(space=0), "problem", "full", "make room"),
        (disk(files=0), "problem", "no entry is free", "make room"),
        (disk(space=GIB // 20), "warning", "51 MiB free", "make room"),
        (disk(files=999), "warning", "999 entries free", "make room"),
        (judge_socket_path(107, 107), "ok", "107 bytes with a UUID, of 107", ""),
        (judge_socket_path(108, 107), "warning", "108 bytes", "another make"),
        (judge_watches(WatchFacts(instances=128, watches=9)), "ok", "128 instances, 9 watches", ""),
        (judge_watches(WatchFacts(available=False)), "warning", "no inotify", "resync"),
        (
            judge_watches(WatchFacts(no_instance="Too many open files", instances=128)),
            "problem",
            "none to be had (Too many open files; fs.inotify.max_user_instances is 128)",
            "sysctl -w fs.inotify.max_user_instances=256",
        ),
        (
            judge_watches(WatchFacts(no_watch="No space left on device")),
            "problem",
            "fs.inotify.max_user_watches is not known",
            "sysctl -w fs.inotify.max_user_watches=8192",
        ),
        (judge_descriptors(None, 5), "ok", "no limit", ""),
        (judge_descriptors(264, 5), "ok", "264 at most, enough to hold 100 sessions", ""),
        (judge_descriptors(262, 5), "warning", "99 sessions", "LimitNOFILE="),
        (judge_descriptors(64, 0), "warning", "0 sessions", "LimitNOFILE="),
        (judge_descriptors(1064, 501), "problem", "there are 501", "LimitNOFILE="),
        (judge_kernel(pidfd=True, peer_pidfd=True, version="Linux 7"), "ok", "Linux 7: pidfds", ""),
        (judge_kernel(pidfd=True, peer_pidfd=False, version="L"), "warning", "no SO_PEER", "6.5"),
        (judge_kernel(pidfd=False, peer_pidfd=True, version="L"), "warning", "polled", "5.3"),
        (judge_clock(NOW, synchronized=True, suspended=0.0), "ok", "synchronized", ""),
        (judge_clock(NOW, synchronized=None, suspended=0.0), "ok", "cannot be told", ""),
        (judge_clock(NOW, synchronized=True, suspended=90.2), "ok", "slept for 90 s", ""),
        (judge_clock(NOW, synchronized=False, suspended=0.0), "warning", "not sync", "set-ntp"),
        (judge_clock(12.0, synchronized=True, suspended=0.0), "problem", "12 s since 1970", "ntp"),
        (program(), "ok", "/bin/pi", ""),
        (program(version="1.2"), "ok", "/bin/pi 1.2", ""),
        (program(None), "problem", "pi is not there", "install it"),
        (program(interpreter="node"), "problem", "/bin/pi needs node", "install node"),
        (program(missing="/k.py"), "problem", "/k.py cannot be read", "install it"),
        (judge_log(LogFacts(sink="stdout")), "ok", "standard output", ""),
        (judge_log(LogFacts(sink="file", place="/a")), "ok", "file (/a)", ""),
        (
            judge_log(LogFacts(sink="file", place="/a", trouble="no")),
            "problem",
            "/a: no",
            "log.file",
        ),
        (judge_log(LogFacts(sink="journald", place="/s")), "ok", "journald (/s)", ""),
        (
            judge_log(LogFacts(sink="journald", place="/s", trouble="no")),
            "problem",
            "/s: no",
            "systemd-journald",
        ),
        (service(), "ok", "running, process 7", ""),
        (service(silent="no bus"), "ok", "no service manager to ask (no bus)", ""),
        (service(installed=False), "warning", "not installed", "service install"),
        (service(active="failed"), "problem", "failed", "journalctl"),
        (service(active="reloading"), "ok", "running", ""),
        (service(active="inactive"), "warning", "installed, and inactive", "enable --now"),
        (service(enabled=False), "warning", "not enabled", "enable pi-reconciler"),
        (service(lingers=False), "warning", "log out", "enable-linger"),
        (judge_daemon(None, "", 0), "warning", "nobody holds", "pi-reconciler run"),
        (judge_daemon(0, "", 0), "ok", "cannot be told", ""),
        (
            judge_daemon(9, "python3", 0),
            "ok",
            "process 9 (python3) keeps the folder",
            "",
        ),
        (judge_daemon(9, "python3", 9), "ok", "process 9", ""),
        (
            judge_daemon(9, "python3", 9, silent=True),
            "problem",
            "process 9 (python3) keeps the folder, and does not answer",
            "kill -CONT 9",
        ),
        (judge_daemon(9, "", 9, lacks="pi"), "warning", "no pi on its PATH", "a PATH that has it"),
        (
            judge_daemon(9, "", 8),
            "warning",
            "not the service's (process 8)",
            "process 9 to end",
        ),
    ],
)
def test_what_is_found_gets_a_state_and_an_advice(
    diagnosis: Diagnosis, state: str, found: str, advice: str
) -> None:
    assert diagnosis.state is State(state)
    assert found in diagnosis.found
    assert advice in diagnosis.advice
    assert bool(diagnosis.advice) == (diagnosis.state is not State.OK), "each has its own"
