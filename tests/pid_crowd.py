"""Numbers of dead keepers and agents given at once to innocents. Runs as a namespace's init.

Usage: pid_crowd.py FOLDER ROUNDS SEED PID_MAX

A daemon cleans the folder, and a second program stops sessions. Says one JSON line for each
round: {"recycled", "sessions", "checks": [[holds, what], ...]}; the first line is {"pid_max"}.
PID_MAX 0 leaves the namespace's own; else it must be a kernel where that is the namespace's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from conftest import NODE_KEEPER, PROGRAM

from reconciler import processes
from reconciler.errors import ReconcilerError
from reconciler.keeper import KeeperManager
from reconciler.layout import KEEPER_PROGRAM

P = ParamSpec("P")
T = TypeVar("T")

BOUND = 30.0
AT_ONCE = 6
TRIES = 50
KINDS = ("killed", "killed", "agent lives on", "stopped", "frozen and stopped", "node")
OURS = [sys.executable, "-I", "-S", str(KEEPER_PROGRAM)]
NODE = ["/usr/bin/env", "node", str(NODE_KEEPER)]
STAYS = "import ctypes, time; ctypes.CDLL(None).prctl(1, 0); print(flush=True); time.sleep(600)"
"""An agent that does not die with its keeper."""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + STAYS


def until(condition: Callable[[], object]) -> bool:
    """Whether it came to that, BOUND seconds at most."""
    deadline = time.monotonic() + BOUND
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return bool(met)


def say(**line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def reap(pid: int) -> None:
    """Wait for a child, so that its number is free."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def reap_all() -> None:
    """Whoever else has died: a namespace's init is everybody's parent."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def start(pid: int, begin: Callable[[], int]) -> int:
    """Start a process with this very number, which is free; 0 when it could not be had."""
    for _ in range(TRIES):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        if (child := begin()) == pid:
            return pid
        os.kill(child, signal.SIGKILL)
        reap(child)
    return 0


def innocent() -> int:
    """A process that blocks every signal, and so shows each that it gets."""
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with contextlib.suppress(OSError):
            os.setsid()
        signal.pause()
    return pid


def harm(pid: int) -> str:
    """What was done to an innocent, or nothing."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    state = fields["State"][0]
    return f"innocent {pid}: {state}, {pending:x}" if pending or state not in "SRD" else ""


@dataclass
class Session:
    sid: str
    kind: str
    keeper: int = 0
    agent: int = 0
    files: list[Path] = field(default_factory=list)
    _held: dict[int, int] = field(default_factory=dict)
    """Descriptors, by pid: of its keeper, then of its agent."""

    def begin(self, folder: Path) -> int:
        """Start its keeper as a child of this process; its pid."""
        agent: list[str] = ["sleep", "600"]
        if self.kind == "agent lives on":
            agent = [sys.executable, "-I", "-S", "-c", random.choice((STAYS, STUBBORN))]
        env = {
            **os.environ,
            "PI_DASHBOARD_HOME": str(folder.parents[2]),
            "PI_KEEPER_PI_CMD": json.dumps(agent),
            "PI_KEEPER_PI_ARGS": "[]",
            "PI_KEEPER_CAPTURE_PI_OUTPUT": "1",
        }
        program = NODE if self.kind == "node" else OURS
        nothing = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
        self.files = [folder / f"{self.sid}.rpc.sock{end}" for end in ("", ".pid", ".pi-pid")]
        self.keeper = os.posix_spawn(
            program[0], [*program, self.sid], env, file_actions=nothing, setsid=True
        )
        return self.keeper

    def is_up(self) -> bool:
        agent_file = self.files[2]
        text = agent_file.read_text() if agent_file.exists() else ""
        if text and not self._held:
            self.agent = int(text)
            self._held = {pid: os.pidfd_open(pid) for pid in (self.keeper, self.agent)}
        return bool(text)

    def is_gone(self) -> bool:
        return not any(map(os.path.lexists, self.files))

    def end(self) -> list[int]:
        """Kill what lives of it, reap it, and give the numbers that are free now.

        By descriptors: what was stopped already may have been reaped, and its number be
        somebody else's.
        """
        for pid, pidfd in self._held.items():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if pid == self.keeper and self.kind == "agent lives on":
                time.sleep(random.uniform(0.0, 0.004))  # somebody else may be ending it
        for pidfd in self._held.values():
            with contextlib.suppress(ChildProcessError):  # an agent that its keeper has reaped
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)
        return [*self._held]


class Crowd:
    """The sessions of one round after the other, and who has their numbers then."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        self.checks: list[tuple[bool, str]] = []
        self.log = log
        daemon = [*PROGRAM, "run", "--log-form", "json", "--sessions-dir", str(folder)]
        with log.open("ab") as file:
            self.daemon = subprocess.Popen(daemon, stdout=file, stderr=file)
        stopper = [sys.executable, __file__, "--stopper", str(folder)]
        self.stopper = subprocess.Popen(stopper, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.heirs: list[Session] = []
        self._slowed: list[subprocess.Popen[bytes]] = []
        self._count = 0

    def holds(self, condition: object, what: str) -> None:
        self.checks.append((bool(condition), what))

    def session(self, kind: str = "") -> Session:
        self._count += 1
        # Long, so that it is in nobody's arguments by chance: such a one is left alone.
        sid = f"s{self._count}-{random.getrandbits(64):x}"
        return Session(sid, kind or random.choice(KINDS))

    def ask_stop(self, session: Session) -> None:
        if self.stopper.stdin is not None:
            self.stopper.stdin.write(f"{session.sid}\n".encode())
            self.stopper.stdin.flush()

    def round(self) -> None:
        self.checks = []
        sessions = [*self.heirs, *(self.session() for _ in range(AT_ONCE - len(self.heirs)))]
        for session in sessions:
            if not session.keeper:
                session.begin(self.folder)
        for session in sessions:
            up, told = until(session.is_up), f"{session.sid} ({session.kind}) is up"
            self.holds(up, told if up else f"{told}: {self.log_of(session)}")
        with self._slow():
            self._act(sessions)
            blameless = self._end(sessions)
        until(lambda: all(session.is_gone() for session in sessions))
        for session in sessions:
            told = f"the files of {session.sid} ({session.kind}) go"
            if not session.is_gone():
                told = f"{told}: {self.log_of(session)}"
            self.holds(session.is_gone(), told)
        for session in self.heirs:
            self.holds(until(session.is_up), f"the keeper {session.sid} with another's number")
            self.holds(harm_of_keeper(session) == "", harm_of_keeper(session))
        for pid in blameless:
            self.holds(not (told := harm(pid)), told)
            os.kill(pid, signal.SIGKILL)
            reap(pid)
        reap_all()
        self.holds(self.daemon.poll() is None, "the daemon runs")
        recycled = len(blameless) + len(self.heirs)
        say(recycled=recycled, sessions=len(sessions), checks=self.checks)

    @contextlib.contextmanager
    def _slow(self) -> Iterator[None]:
        """Mostly one who might act is frozen in whatever it does, until others have the numbers."""
        slow = random.choice(([], [self.daemon], [self.stopper], [self.daemon, self.stopper]))
        try:
            self._slowed = slow
            yield
        finally:
            for program in slow:
                program.send_signal(signal.SIGCONT)

    def log_of(self, session: Session) -> str:
        """What the daemon said of it last, and its keeper."""
        lines = self.log.read_text().splitlines()
        said = [line for line in lines if f'"{session.sid}"' in line][-1:]
        with contextlib.suppress(FileNotFoundError):
            said += (self.folder / f"keeper-{session.sid}.log").read_text().splitlines()[-2:]
        return " ".join(said)

    def _act(self, sessions: list[Session]) -> None:
        for session in sessions:
            if session.kind == "frozen and stopped":
                os.kill(session.keeper, signal.SIGSTOP)  # our child, and not yet reaped
            if "stopped" in session.kind:
                self.ask_stop(session)
        latest = 2.1 if random.random() < 0.1 else 0.03  # SIGKILL follows SIGTERM after 2 s
        time.sleep(random.uniform(0.0, latest))
        for program in self._slowed:
            program.send_signal(signal.SIGSTOP)

    def _end(self, sessions: list[Session]) -> list[int]:
        """End them, and give their numbers away at once; the innocents that have them now."""
        random.shuffle(sessions)
        first, *others = sessions
        self.heirs = self._inherit(first.end()[0])
        numbers = (number for session in others for number in session.end())
        return [pid for number in numbers if (pid := start(number, innocent))]

    def _inherit(self, number: int) -> list[Session]:
        """Another session's keeper gets a number."""
        heir = self.session(random.choice(("killed", "stopped")))
        return [heir] if start(number, lambda: heir.begin(self.folder)) else []


def harm_of_keeper(session: Session) -> str:
    """What was done to a session that lives, or nothing."""
    for pid in (session.keeper, session.agent):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "SRD":
            return f"{session.sid}: {pid} was harmed"
    return "" if all(map(os.path.lexists, session.files)) else f"{session.sid} lost files"


def preempted(function: Callable[P, T]) -> Callable[P, T]:
    """The same, but for the system taking the processor away for a while before and after."""

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        time.sleep(random.uniform(0.0, 0.02))
        try:
            return function(*args, **kwargs)
        finally:
            time.sleep(random.uniform(0.0, 0.02))

    return call


async def stopper(folder: Path) -> None:
    """Stop each session that is named on standard input, all at once."""
    processes.open_pidfd = preempted(processes.open_pidfd)
    signal.pidfd_send_signal = preempted(signal.pidfd_send_signal)
    manager = KeeperManager(folder)
    tasks = set()

    async def stop(sid: str) -> None:
        with contextlib.suppress(ReconcilerError):  # it is gone already, or was left alone
            await manager.stop(sid)

    while sid := (await asyncio.to_thread(sys.stdin.readline)).strip():
        tasks.add(task := asyncio.create_task(stop(sid)))
        task.add_done_callback(tasks.discard)


def main(folder: Path, rounds: int, seed: int, pid_max: int) -> None:
    random.seed(seed)
    if pid_max:
        Path("/proc/sys/kernel/pid_max").write_text(str(pid_max))
    say(pid_max=int(Path("/proc/sys/kernel/pid_max").read_text()))
    sys.stdin.readline()  # the word that nobody else's has moved
    crowd = Crowd(folder, folder.parent / "daemon.log")
    until(lambda: "reconciler.started" in (folder.parent / "daemon.log").read_text())
    for _ in range(rounds):
        crowd.round()
    stopper_end = crowd.stopper.poll()
    say(recycled=0, sessions=0, checks=[(stopper_end is None, "the stopper runs")])


if sys.argv[1] == "--stopper":
    asyncio.run(stopper(Path(sys.argv[2])))
else:
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
