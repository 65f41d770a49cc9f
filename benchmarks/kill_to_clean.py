"""From SIGKILL of a keeper until its socket and pid file are gone, among live sessions.

The peer is the limit: a bare loop that holds a pidfd on every keeper in one epoll and, when
one dies, unlinks its two files. It checks nothing and tells nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import (
    Benchmark,
    Times,
    accepts,
    killed_at_the_end,
    start_keeper,
    wait_until,
)

SESSIONS = 100
REST = 0.5  # seconds until what a start brings with it (a walk over all processes) is through
RUN = (sys.executable, "-m", "reconciler", "run", "--log-form", "json")

BARE = """
import os, select, sys
folder = sys.argv[1]
epoll, files = select.epoll(), {}
for name in os.listdir(folder):
    if name.endswith(".pid"):
        pidfd = os.pidfd_open(int(open(os.path.join(folder, name)).read()))
        epoll.register(pidfd, select.EPOLLIN)
        files[pidfd] = os.path.join(folder, name)
print("ready", flush=True)
while True:
    for pidfd, _ in epoll.poll():
        os.unlink(files[pidfd].removesuffix(".pid"))
        os.unlink(files[pidfd])
        epoll.unregister(pidfd)
"""


def measure(rounds: int) -> tuple[Times, Times]:
    ours: Times = []
    peer: Times = []
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / ".pi" / "dashboard" / "sessions"
        folder.mkdir(parents=True, mode=0o700)
        keepers = {
            f"live-{n}": start_keeper(folder, f"live-{n}", ours=True) for n in range(SESSIONS)
        }
        with killed_at_the_end(list(keepers.values())):
            for sid in keepers:
                wait_until((folder / f"{sid}.rpc.sock.pi-pid").exists)
            for number in range(rounds):
                peer.append(_bare(folder, f"bare-{number}"))
                ours.append(_reconciled(folder, f"ours-{number}"))
    return ours, peer


def _bare(folder: Path, sid: str) -> float:
    victim = _victim(folder, sid)
    with killed_at_the_end([victim]):
        loop = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", BARE, str(folder)], stdout=subprocess.PIPE
        )
        with killed_at_the_end([loop]):
            assert loop.stdout is not None
            assert loop.stdout.readline() == b"ready\n"
            took = _kill(folder, sid, victim)
            loop.stdout.close()
    (folder / f"{sid}.rpc.sock.pi-pid").unlink()
    return took


def _reconciled(folder: Path, sid: str) -> float:
    victim = _victim(folder, sid)
    with killed_at_the_end([victim]):
        loop = subprocess.Popen(
            [*RUN, "--sessions-dir", str(folder), "--log-level", "debug"],
            stdout=subprocess.PIPE,
        )
        with killed_at_the_end([loop]):
            assert loop.stdout is not None
            waited = {sid, *(f"live-{n}" for n in range(SESSIONS))}
            while waited:
                line = loop.stdout.readline().decode()
                waited = {s for s in waited if f'"sid":"{s}"' not in line or '"ready"' not in line}
            time.sleep(REST)
            took = _kill(folder, sid, victim)
            loop.stdout.close()
    return took


def _victim(folder: Path, sid: str) -> subprocess.Popen[bytes]:
    victim = start_keeper(folder, sid, ours=True)
    wait_until((folder / f"{sid}.rpc.sock.pi-pid").exists)
    assert accepts(folder / f"{sid}.rpc.sock")
    return victim


def _kill(folder: Path, sid: str, victim: subprocess.Popen[bytes]) -> float:
    """Milliseconds from the signal until both files are gone."""
    paths = [str(folder / f"{sid}.rpc.sock"), str(folder / f"{sid}.rpc.sock.pid")]
    begun = time.perf_counter()
    victim.kill()
    while any(map(os.path.lexists, paths)):
        if time.perf_counter() - begun > 10:
            raise TimeoutError(f"{paths} were not cleaned")
        time.sleep(0.00002)  # two cores: a watcher that spins would take one from the watched
    return (time.perf_counter() - begun) * 1000


BENCHMARKS = (Benchmark("kill_to_clean_limit", 3, "ms", measure, rounds=15, quick=3),)
