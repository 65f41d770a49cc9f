"""Whatever can be put into the folder: pid files, names, sockets and entries of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from chaos import Fault
from conftest import PROGRAM, SINK, WAIT, Daemon, alive, identity, program_environment, until
from innocents import harm, innocents
from lateness import lateness
from neighbours import another_folder, daemon_on
from stand_ins import listening, running

from reconciler.errors import ReconcilerError
from reconciler.keeper import KeeperManager
from reconciler.observations import ProcessId
from reconciler.processes import SYSTEM
from reconciler.rpc_writer import BlockingRpcWriter

GIB = 1 << 30
RATIO = 10
"""How much longer a keeper's files may stay there than in a clean folder, in the median."""
LEAST = 0.005
"""Seconds: what is faster than this is not told from another."""
FOREIGN_NAMES = 3000

TEXTS: Mapping[str, bytes] = {
    "empty": b"",
    "NULs": b"\0" * 20,
    "negative": b"-5",
    "minus-one": b"-1",
    "zero": b"0",
    "zeros": b"0" * 63,
    "leading-zeros": b"0000001x",
    "2-31": b"%d" % 2**31,
    "2-63": b"%d" % 2**63,
    "2-64-and-1": b"%d" % (2**64 + 1),
    "unicode-digits": "١٢٣".encode(),
    "superscript": "²".encode(),
    "plus": b"+1",
    "exponent": b"1e3",
    "hex": b"0x10",
    "underscore": b"1_0",
    "several-lines": b"12\n34\n",
    "leading-spaces": b"  12",
    "carriage-return": b"12\r\n",
    "long": b"9" * 5000,
    "latin": b"\xff\xfe1",
}
"""What pid files that name nobody say; they are old after the settle time, and go."""

NAMES = (
    b"with space.rpc.sock.pid",
    b"line\nfeed.rpc.sock.pid",
    b"..rpc.sock",
    b"...rpc.sock.pid",
    b".rpc.sock",
    b".rpc.sock.pid",
    b"..%2f.rpc.sock",
    b"\xff\xfe.rpc.sock.pid",
    b"\x1b[31mred.rpc.sock",
    "é.rpc.sock.pid".encode(),
    b"UPPER.RPC.SOCK",
    b"s1.rpc.sock.PID",
    b"-rf.rpc.sock.pid",
    b"x" * 246 + b".rpc.sock",
    b"x" * 91 + b".rpc.sock.pid",
    b"s1.rpc.sock.pid~",
    b"s1.rpc.sock.pid.tmp",
    b"pi-rpc-s1.pid",
    b"$(reboot).rpc.sock",
    b".s1.rpc.sock.taken-",
    b".s1.rpc.sock.taken-999999999999",
)
"""Names that are nobody's: they stay as they are."""

RUBBISH = """
import selectors, threading
folder, name = sys.argv[1:]
listener = socket.socket(socket.AF_UNIX)
os.chdir(folder)
listener.bind(name)
listener.listen(64)
print(os.getpid(), flush=True)
def flood(client):
    try:
        while True: client.sendall(b"\\x00rubbish\\xff" * 4096)
    except OSError: client.close()
while True:
    client, _ = listener.accept()
    threading.Thread(target=flood, args=(client,), daemon=True).start()
"""

Entry = tuple[int, int, int, int]


def entry(path: bytes) -> Entry | None:
    """What tells an entry from any other, or None."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns


class Hostile:
    """What stands in the folder, and what must become of it."""

    def __init__(self, folder: Path, number: int, blameless: list[ProcessId], daemon: int) -> None:
        self._folder = os.fsencode(folder)
        self._number = number
        self._people = {"daemon": daemon, "tests": os.getpid(), "innocent": blameless[0].pid}
        self.going: list[bytes] = []
        self.staying: dict[bytes, Entry | None] = {}

    def path(self, name: str) -> bytes:
        return os.path.join(self._folder, os.fsencode(f"{name}-{self._number}"))

    def plant(self) -> None:
        self._pid_files()
        self._kinds()
        self._names()

    def _pid_files(self) -> None:
        pids = {who: b"%d" % pid for who, pid in self._people.items()}
        for what, text in (*TEXTS.items(), *pids.items()):
            self._write(self.path(what) + b".rpc.sock.pid", text)
            self._write(self.path(f"agent-{what}") + b".rpc.sock.pi-pid", text)
        for name in (b".rpc.sock.pid", b".rpc.sock.pi-pid"):
            huge = self.path("huge") + name
            self._write(huge, b"")
            os.truncate(huge, GIB)
        self._write(self.path("init") + b".rpc.sock.pid", b"1")  # ours or not: it may stay or go

    def _write(self, path: bytes, text: bytes) -> None:
        with open(path, "wb") as file:
            file.write(text)
        self.going.append(path)

    def _kinds(self) -> None:
        aim = self.path("aim")
        with open(aim, "wb") as file:
            file.write(b"%d" % self._people["innocent"])
        self._stays(aim)
        makes: Mapping[str, Callable[[bytes], None]] = {
            "link": lambda path: os.symlink(aim, path),
            "dangling": lambda path: os.symlink(b"/nowhere", path),
            "loop": lambda path: os.symlink(path, path),
            "hole": os.mkfifo,
            "folder": os.mkdir,
        }
        if os.geteuid() == 0:
            device = os.makedev(1, 5)  # /dev/zero: it can be read for ever
            makes = {**makes, "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, device)}
        for kind, make in makes.items():
            for ending in (b".rpc.sock", b".rpc.sock.pid", b".rpc.sock.pi-pid"):
                path = self.path(f"{kind}{ending.count(b'.')}{len(ending)}") + ending
                make(path)
                self._stays(path)

    def _names(self) -> None:
        for name in NAMES:
            path = os.path.join(self._folder, name)
            if not os.path.lexists(path):
                with open(path, "wb") as file:
                    file.write(b"%d" % self._people["innocent"])
            self._stays(path)

    def _stays(self, path: bytes) -> None:
        self.staying[path] = entry(path)

    def ask_to_stop(self, manager: KeeperManager) -> None:
        """A user asks to stop the sessions whose pid files name people."""
        for who in self._people:
            with contextlib.suppress(ReconcilerError):  # the daemon was faster
                asyncio.run(manager.stop(f"{who}-{self._number}"))

    def gone(self) -> bool:
        return not any(map(os.path.lexists, self.going[:-1]))

    def clear(self) -> None:
        for path in (*self.going, *self.staying):
            with contextlib.suppress(FileNotFoundError):
                is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
                (os.rmdir if is_folder else os.unlink)(path)


@contextlib.contextmanager
def sockets(folder: Path) -> Iterator[list[int]]:
    """Somebody accepts nothing, somebody never stops talking, somebody is frozen."""
    with contextlib.ExitStack() as stack:
        (hangs,) = stack.enter_context(listening(folder, "hangs.rpc.sock", backlog=1))
        (frozen,) = stack.enter_context(listening(folder, "frozen.rpc.sock", backlog=0))
        os.kill(frozen, signal.SIGSTOP)
        rubbish = running(RUBBISH, str(folder), "talks.rpc.sock")
        yield [hangs, frozen, *stack.enter_context(rubbish)]


def foreign_names(folder: Path) -> None:
    for number in range(FOREIGN_NAMES):
        (folder / f"foreign-{number}.{number % 7}.rpc.sock.txt").touch()


def kill_to_clean(manager: KeeperManager, sid: str) -> float:
    """Seconds from a keeper's SIGKILL until its files are gone, but for the machine's lateness."""
    spawned = asyncio.run(manager.spawn(sid, agent_command=SINK, ready=False, timeout=60))
    until((manager.sessions_dir / f"{sid}.rpc.sock.pi-pid").exists)
    time.sleep(0.05)  # the daemon has seen it, most likely: else the median has one more outlier
    socket = manager.sessions_dir / f"{sid}.rpc.sock"
    files = [Path(f"{socket}{ending}") for ending in ("", ".pid", ".pi-pid")]
    with lateness() as late:
        os.kill(spawned.keeper_pid, signal.SIGKILL)
        begun = time.perf_counter()
        while any(map(os.path.lexists, files)):
            assert time.perf_counter() - begun < WAIT, f"{sid} is cleaned"
            time.sleep(0.0002)
        return max(0.0, time.perf_counter() - begun - late())


def commands_end(folder: Path) -> list[str]:
    """The commands of a client that did not end well in this folder."""
    env = program_environment(folder)
    wrong = []
    for command in (["ls", "--json"], ["run", "--once", "--dry-run"]):
        done = subprocess.run(
            [*PROGRAM, "--sessions-dir", str(folder), *command],
            capture_output=True,
            env=env,
            timeout=60,
            check=False,
        )
        if done.returncode != 0 or b"Traceback" in done.stderr:
            wrong.append(f"{command}: {done.returncode}, {done.stderr[-300:]!r}")
    return wrong


def live_session(manager: KeeperManager, record: Path) -> tuple[ProcessId, ProcessId]:
    agent = ("/bin/sh", "-c", 'exec cat > "$0"', str(record))
    spawned = asyncio.run(manager.spawn("lives", agent_command=agent, timeout=60))
    assert spawned.agent_pid is not None
    return identity(spawned.keeper_pid), identity(spawned.agent_pid)


def _has_arrived(line: bytes, record: Path) -> bool:
    return line in record.read_bytes()


@pytest.mark.timeout(900)
@pytest.mark.chaos(
    "hostile files, names and sockets",
    "who is named by a pid file and who lives is not harmed; foreign entries stay; broken "
    "ones go; a killed keeper is cleaned as fast as in a clean folder",
)
def test_hostile_entries_of_every_kind(
    manager: KeeperManager, daemon: Daemon, tmp_path: Path, fault: Fault
) -> None:
    folder, record = manager.sessions_dir, tmp_path / "record"
    here, there = [], []
    with contextlib.ExitStack() as stack:
        clean = KeeperManager(stack.enter_context(another_folder(folder)))
        stack.enter_context(daemon_on(clean.sessions_dir, tmp_path / "clean.log"))
        blameless = stack.enter_context(innocents(2))
        listeners = [identity(pid) for pid in stack.enter_context(sockets(folder))]
        lives = live_session(manager, record)
        foreign_names(folder)
        for number in fault.rounds(short=1, full=40):
            hostile = Hostile(folder, number, blameless, daemon.process.pid)
            hostile.plant()
            hostile.ask_to_stop(manager)
            for each in range(3):
                here.append(kill_to_clean(manager, f"h{number}-{each}"))
                there.append(kill_to_clean(clean, f"c{number}-{each}"))
            until(hostile.gone, "what names nobody is gone")
            for path, before in hostile.staying.items():
                fault.holds(entry(path) == before, f"{path!r} stays as it is")
            for innocent in blameless:
                fault.holds(not (told := harm(innocent)), told)
            for process in (*lives, *listeners):
                fault.holds(SYSTEM.facts(process.pid).process == process, f"{process} lives")
            sent = BlockingRpcWriter(folder).write("lives", {"n": number}, timeout=20)
            fault.holds(sent.delivered, f"a write to a live session: {sent.outcome}")
            line = f'"n":{number}'.encode()
            until(functools.partial(_has_arrived, line, record), "it arrives")
            talked = BlockingRpcWriter(folder).write("talks", {"n": number}, timeout=1)
            fault.holds(not talked.delivered, "a talking socket gives no receipt")
            hostile.clear()
        wrong = commands_end(folder)
        fault.holds(not wrong, f"{wrong}")
        left = sum(1 for name in os.listdir(folder) if name.startswith("foreign-"))
        fault.holds(left == FOREIGN_NAMES, "foreign names stay")
        fault.holds(alive(daemon.process.pid), "the daemon lives")
        fault.holds("session.failed" not in daemon.log.read_text(), "no look has failed")
    medians = statistics.median(here), statistics.median(there)
    told = f"kill to clean: {medians[0] * 1000:.2f} ms among hostile entries, "
    told += f"{medians[1] * 1000:.2f} ms in a clean folder"
    fault.holds(medians[0] <= RATIO * max(medians[1], LEAST), told)
    sys.stdout.write(f"{told}\n")
