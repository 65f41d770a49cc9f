from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import pytest
from chaos import CAMPAIGN, Fault
from conftest import (
    HUNG,
    PROGRAM,
    WAIT,
    alive,
    bare_socket,
    dead_pid,
    end_all,
    happens,
    identity,
    program_environment,
    stale_pair,
    until,
)
from kill_at import CALLS, KILLED
from stand_ins import agent_of, kill, recorder, usurper

from reconciler.keeper import KeeperManager
from reconciler.layout import claims
from reconciler.observations import ProcessId
from reconciler.processes import SYSTEM
from reconciler.removal import is_taken

KILL_AT = (sys.executable, str(Path(__file__).with_name("kill_at.py")))
SOCKET, PID_FILE, AGENT_FILE = ENDINGS = (".rpc.sock", ".rpc.sock.pid", ".rpc.sock.pi-pid")
NO_SUCH_SESSION = 3
SIDES = ("before", "after")

SETTINGS = """
[policy]
settle = 0.3
start_grace = 0.6
orphan_grace = 0.1
lost_grace = 0.7
rebind_grace = 0.3
[ladder]
term_grace = 0.3
"""


def can_follow() -> bool:
    if sys.platform != "linux" or platform.machine() not in CALLS:
        return False
    command = (*KILL_AT, "before", "0", os.devnull, "/bin/true")
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


followed = pytest.mark.skipif(not can_follow(), reason="needs ptrace and seccomp filters")


def process_line(pid: int) -> str:
    return f"{pid} {' '.join(SYSTEM.arguments(pid) or ())}"


class Scene:
    """A folder with sessions in it, and what must have become of them in the end."""

    def __init__(
        self, folder: Path, aside: Path, ours: KeeperManager, other: KeeperManager
    ) -> None:
        self.folder = folder
        self.ours = ours
        self.other = other
        self.stands: dict[str, bytes | None] = {}
        """The names that must stand at the end; of pid files what they must say."""
        self.ended: list[ProcessId] = []
        self.unharmed: list[ProcessId] = []
        self.records: dict[str, Path] = {}
        self.held = contextlib.ExitStack()
        self._aside = aside
        self.innocent = self._innocent()

    def _innocent(self) -> int:
        process = self.held.enter_context(
            subprocess.Popen(recorder(self.record("innocent")), stdin=subprocess.PIPE)
        )
        self.held.callback(process.kill)
        self.unharmed.append(identity(process.pid))
        self.until_up("innocent")
        return process.pid

    def record(self, sid: str) -> Path:
        """Where a recorder writes."""
        self.records[sid] = self._aside / f"{sid}.record"
        return self.records[sid]

    def until_up(self, sid: str) -> None:
        path = self.records[sid]
        until(lambda: path.exists() and path.read_bytes(), f"the recorder of {sid} runs")

    async def session(
        self, sid: str, manager: KeeperManager, *, records: bool = False, lives: bool = True
    ) -> tuple[int, int]:
        """A real session; its keeper's pid and its agent's."""
        command = recorder(self.record(sid)) if records else HUNG
        spawned = await manager.spawn(sid, agent_command=command, ready=False, timeout=60)
        await happens(self.path(sid, AGENT_FILE).exists, "the agent pid file")
        pids = spawned.keeper_pid, await asyncio.to_thread(agent_of, manager, sid)
        if records:
            await asyncio.to_thread(self.until_up, sid)
        if lives:
            self.unharmed += map(identity, pids)
            self.stand(sid, *pids)
        else:
            self.ended += map(identity, pids)
        return pids

    def stand(self, sid: str, keeper: int, agent: int) -> None:
        """The session must stand with all its files in the end."""
        said = (None, str(keeper).encode(), str(agent).encode())
        self.stands |= {f"{sid}{ending}": text for ending, text in zip(ENDINGS, said, strict=True)}

    def path(self, sid: str, ending: str) -> Path:
        return self.folder / f"{sid}{ending}"

    def hide(self, sid: str, ending: str, remover: int = 0) -> None:
        """As a removal does that was killed then."""
        hidden = f".{sid}{ending}.taken-{remover or dead_pid()}"
        self.path(sid, ending).rename(self.folder / hidden)

    def found(self) -> Mapping[str, bytes | None]:
        found: dict[str, bytes | None] = {}
        for name in os.listdir(self.folder):
            if claims(name) or is_taken(name):
                with contextlib.suppress(FileNotFoundError):
                    path = self.folder / name
                    found[name] = path.read_bytes() if path.is_file() else None
        return found

    def is_right(self) -> bool:
        return self.found() == self.stands and not any(alive(each.pid) for each in self.ended)

    def check(self, fault: Fault, when: str) -> None:
        """Everything is as it must be, and nobody was harmed."""
        fault.holds(self.found() == self.stands, f"{when}: {self.found()} is not {self.stands}")
        left = [process_line(each.pid) for each in self.ended if alive(each.pid)]
        fault.holds(not left, f"{when}: {left} must have ended")
        self.check_unharmed(fault, when)

    def check_unharmed(self, fault: Fault, when: str) -> None:
        """Who must live lives, and got no signal."""
        for process in self.unharmed:
            fault.holds(alive(process.pid) and identity(process.pid) == process, f"{when}: lives")
        for sid, path in self.records.items():
            told = path.read_bytes()
            fault.holds(b"signal" not in told, f"{when}: {sid} got no signal: {told!r}")

    def check_writes(self, fault: Fault) -> None:
        """What is written to a session arrives at its agent."""
        for sid in [n.removesuffix(SOCKET) for n in self.stands if n.endswith(SOCKET)]:
            with socket.socket(socket.AF_UNIX) as client:
                answered = client.connect_ex(str(self.path(sid, SOCKET))) == 0
                fault.holds(answered, f"{sid} answers")
                if answered and sid in self.records:
                    client.sendall(b'{"type":"prompt"}\n')
                    self._until_arrived(sid)

    def _until_arrived(self, sid: str) -> None:
        until(lambda: b"prompt" in self.records[sid].read_bytes(), f"the line arrives at {sid}")


Row = Callable[[Scene, str], Awaitable[object]]


async def stale(scene: Scene, sid: str) -> None:
    await asyncio.to_thread(stale_pair, scene.folder, sid)


async def bare(scene: Scene, sid: str) -> None:
    await asyncio.to_thread(bare_socket, scene.path(sid, SOCKET))


async def broken(scene: Scene, sid: str) -> None:
    scene.path(sid, PID_FILE).write_text("x")
    scene.path(sid, AGENT_FILE).touch()


async def recycled(scene: Scene, sid: str) -> None:
    await bare(scene, sid)
    scene.path(sid, PID_FILE).write_text(str(scene.innocent))


async def left_hidden(scene: Scene, sid: str) -> None:
    await stale(scene, sid)
    scene.hide(sid, SOCKET)
    scene.hide(sid, PID_FILE, scene.innocent)  # the remover's pid is another's by now


async def lives(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.ours, records=True)


async def other_lives(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.other, records=True)


async def hidden_alive(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.ours)
    scene.hide(sid, PID_FILE)


async def other_hidden_alive(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.other)
    scene.hide(sid, SOCKET)  # it would not bind again


async def orphan(scene: Scene, sid: str, manager: KeeperManager | None = None) -> None:
    keeper, agent = await scene.session(sid, manager or scene.ours, lives=False)
    os.kill(keeper, signal.SIGSTOP)
    kill(agent)


async def other_orphan(scene: Scene, sid: str) -> None:
    await orphan(scene, sid, scene.other)


async def orphan_agent(scene: Scene, sid: str) -> None:
    keeper, _ = await scene.session(sid, scene.other, lives=False)
    kill(keeper)


async def usurped(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.other, lives=False)
    second = scene.held.enter_context(usurper(scene.other, sid))
    agent = agent_of(scene.other, sid)
    scene.unharmed += map(identity, (second, agent))
    scene.stand(sid, second, agent)


async def other_lost(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.other, lives=False)
    for ending in ENDINGS:
        scene.path(sid, ending).unlink()


async def lost(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.ours, records=True)
    for ending in ENDINGS:
        scene.path(sid, ending).unlink()
    del scene.stands[f"{sid}{AGENT_FILE}"]  # a keeper makes that at its agent's start alone


async def unnamed(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.ours, records=True)
    scene.path(sid, PID_FILE).unlink()


async def other_unnamed(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.other, records=True)
    scene.path(sid, PID_FILE).unlink()


async def other_misnamed(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.other, records=True)
    scene.path(sid, PID_FILE).write_text(str(scene.innocent))


async def unreachable(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.ours, records=True)
    scene.path(sid, SOCKET).unlink()


async def other_unreachable(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.other, records=True)
    scene.path(sid, SOCKET).unlink()
    del scene.stands[f"{sid}{SOCKET}"]


async def healthy(scene: Scene, sid: str) -> None:
    await scene.session(sid, scene.ours, lives=False)


async def hung(scene: Scene, sid: str) -> None:
    keeper, _ = await scene.session(sid, scene.ours, lives=False)
    os.kill(keeper, signal.SIGSTOP)


async def other_hung(scene: Scene, sid: str) -> None:
    keeper, _ = await scene.session(sid, scene.other, lives=False)
    os.kill(keeper, signal.SIGSTOP)


UNWANTED = (healthy, hung, other_hung)
GROUPS: Mapping[str, tuple[Row, ...]] = {
    "remove": (stale, bare, broken, recycled, left_hidden, hidden_alive, other_hidden_alive),
    "end": (orphan, other_orphan, orphan_agent, usurped, other_lost, lives, other_lives),
    "mend": (lost, unnamed, other_unnamed, other_misnamed, unreachable, other_unreachable),
}
SHORT = {"remove": (("before", 9), ("after", 4)), "end": (("before", 11),), "mend": (("after", 7),)}


def _name(row: Row) -> str:
    return str(getattr(row, "__name__", row))


class Stage:
    """Plays a scene: kill the program at one call, start it again, see what came of it."""

    def __init__(
        self, folder: Path, aside: Path, ours: KeeperManager, other: KeeperManager, fault: Fault
    ) -> None:
        self.folder = folder
        self.killed_at: set[str] = set()
        """The calls, by name, at which the program was killed."""
        self._aside = aside
        self._managers = ours, other
        self._fault = fault
        self._settings = aside / "settings.toml"
        self._settings.write_text(SETTINGS)
        self._common = ("--config", str(self._settings), "--sessions-dir", str(folder))

    @contextlib.contextmanager
    def scene(self, rows: tuple[Row, ...]) -> Iterator[Scene]:
        for path in self._aside.glob("*.record"):
            path.unlink()
        scene = Scene(self.folder, self._aside, *self._managers)

        async def build() -> None:
            await asyncio.gather(*(row(scene, _name(row)) for row in rows))

        with scene.held:
            try:
                asyncio.run(build())
                yield scene
            finally:
                end_all(self.folder)
                for path in self.folder.iterdir():
                    path.unlink()

    def killed(self, side: str, number: int, *command: str) -> bool:
        """Run the program, killed at one call; whether it came to that."""
        self._fault.count(1)
        report = self._aside / "calls"
        done = subprocess.run(
            (*KILL_AT, side, str(number), str(report), *PROGRAM, *command, *self._common),
            capture_output=True,
            text=True,
            env=program_environment(self.folder),
            timeout=60,
            check=False,
        )
        calls = report.read_text().splitlines()
        if done.returncode == KILLED:
            assert len(calls) == number, calls
            self.killed_at.add(calls[-1].split()[0])
        return done.returncode == KILLED

    def start_again(self, scene: Scene) -> None:
        """An undisturbed run, until everything is right."""
        log_file = self._aside / "log"
        with (
            log_file.open("wb") as log,
            subprocess.Popen(
                (*PROGRAM, "run", "--log-form", "json", *self._common),
                stdout=log,
                stderr=log,
                env=program_environment(self.folder),
            ) as process,
        ):
            try:
                until(lambda: b"reconciler.started" in log_file.read_bytes(), "it runs")
                with contextlib.suppress(pytest.fail.Exception):  # what is wrong is told below
                    until(scene.is_right, "it converges")
                process.terminate()
                assert process.wait(WAIT) == 0
            finally:
                process.kill()

    def stop_again(self) -> None:
        """An undisturbed call to end what is to be ended, or was already."""
        command = (*PROGRAM, "stop", *map(_name, UNWANTED), *self._common)
        done = subprocess.run(
            command, capture_output=True, env=program_environment(self.folder), check=False
        )
        assert done.returncode in {0, NO_SUCH_SESSION}, done.stderr

    def round_of_stopping(self, side: str, number: int) -> bool:
        """One round of a caller that ends sessions; whether it was killed at that."""
        with self.scene((*UNWANTED, lives, other_lives)) as scene:
            killed = self.killed(side, number, "stop", *map(_name, UNWANTED))
            scene.check_unharmed(self._fault, f"stop, {side} {number}")
            self.stop_again()
            self.start_again(scene)
            scene.check(self._fault, f"stop, {side} {number}")
            scene.check_writes(self._fault)
        return killed

    def round(self, rows: tuple[Row, ...], side: str, number: int) -> bool:
        """One round; whether the program was killed before it was through."""
        with self.scene(rows) as scene:
            killed = self.killed(side, number, "run", "--once")
            if not killed:  # some is done by keepers that were told to, after the pass
                until(scene.is_right, "an uninterrupted pass comes through")
            scene.check_unharmed(self._fault, f"{side} {number}")
            self.start_again(scene)
            scene.check(self._fault, f"{side} {number}")
            scene.check_writes(self._fault)
        return killed


@pytest.fixture
def stage(
    folder: Path, tmp_path: Path, manager: KeeperManager, node_manager: KeeperManager, fault: Fault
) -> Stage:
    return Stage(folder, tmp_path, manager, node_manager, fault)


FAULT = pytest.mark.chaos(
    "killed at a system call", "started again: as after a whole pass, nobody harmed"
)
EXPECTED = {
    "remove": {"flock", "renameat", "unlinkat", "linkat"},
    "end": {"flock", "renameat", "unlinkat", "pidfd_send_signal"},
    "mend": {"flock", "renameat", "unlinkat", "openat", "write", "pidfd_send_signal"},
}


@FAULT
@followed
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("group", GROUPS)
def test_a_pass_that_was_killed_comes_to_the_same_end(
    stage: Stage, fault: Fault, group: str
) -> None:
    def play(side: str, number: int) -> bool:
        return stage.round(GROUPS[group], side, number)

    at_each_call(play, fault, SHORT[group])
    if CAMPAIGN:
        fault.holds(stage.killed_at >= EXPECTED[group], f"killed at {stage.killed_at} alone")


@FAULT
@followed
@pytest.mark.timeout(3600)
def test_a_stop_that_was_killed_comes_to_the_same_end(stage: Stage, fault: Fault) -> None:
    at_each_call(stage.round_of_stopping, fault, (("after", 6),))
    if CAMPAIGN:
        expected = {"pidfd_send_signal", "flock", "renameat", "unlinkat"}
        fault.holds(stage.killed_at >= expected, f"killed at {stage.killed_at} alone")


def at_each_call(
    play: Callable[[str, int], bool], fault: Fault, short: tuple[tuple[str, int], ...]
) -> None:
    """Play with a kill before, and after, each call until a whole pass comes through."""
    if not CAMPAIGN:
        for side, number in short:
            fault.holds(play(side, number), f"killed {side} call {number}")
        return
    for side in SIDES:
        for number in itertools.count(1):
            if not play(side, number):
                break
