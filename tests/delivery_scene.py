"""Keepers that are real, a folder for them, and both faces of the writer, called alike."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import pytest

from reconciler import exchanges, layout, link, waiting
from reconciler.peers import Peers
from reconciler.rpc_writer import (
    BlockingRpcWriter,
    Delivery,
    ManyDelivery,
    Message,
    RpcWriter,
    WritePolicy,
)
from reconciler.testing import Behaviour, FakeKeeper
from reconciler.trust import Trust
from reconciler.waiting import Moment, Wait

KEEPERS = Path(__file__).with_name("keepers")
SID = "5f0e7c1e-0c50-4f0e-9b39-4e4a3a2f3d11"
BOUND = 20.0
PATIENT = WritePolicy(progress_timeout=10.0)
SLOWEST = WritePolicy(progress_timeout=1.0)
HASTY = WritePolicy(progress_timeout=0.08, backoff=(0.01,))
KINDS = ("ours", "node")
SENDING, RECEIPT = Moment.SENDING, Moment.RECEIPT
T = TypeVar("T")


def until(done: Callable[[], T | None], what: str = "the moment") -> T:
    """Wait for a named moment, with a bound."""
    give_up = time.monotonic() + BOUND
    while not (found := done()):
        assert time.monotonic() < give_up, f"{what} did not come"
        time.sleep(0.001)
    return found


# -- Keepers that are real --------------------------------------------------------------


class Child:
    """A process that can be stopped, and is known to be dead when it is."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    def stop(self) -> None:
        """Stop it, unless it is dead."""
        self.signal(signal.SIGSTOP)
        until(lambda: self._state() in "TZX", "the stop")

    def _state(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "X"

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        assert poll.poll(BOUND * 1000), "it did not end"

    def close(self) -> None:
        os.close(self._descriptor)


class Keeper:
    """A keeper process with an agent that writes down what it reads."""

    def __init__(self, folder: Path, sid: str, kind: str, *agent_options: str) -> None:
        self.folder = folder
        self.sid = sid
        self.kind = kind
        self.record = folder / f"{sid}.{next(_COUNT)}.record"
        agent = [sys.executable, "-I", "-S", str(KEEPERS / "agent.py"), str(self.record)]
        program = {
            "ours": [sys.executable, "-I", "-S", str(layout.KEEPER_PROGRAM)],
            "node": ["node", str(KEEPERS / "keeper.cjs")],
        }[kind]
        self.popen: subprocess.Popen[bytes] = subprocess.Popen(
            [*program, sid],
            env={
                **os.environ,
                "PI_DASHBOARD_HOME": str(folder.parents[2]),
                "PI_KEEPER_SESSIONS_DIR": str(folder),
                "PI_KEEPER_PI_CMD": json.dumps([*agent, *agent_options]),
                "PI_KEEPER_PI_ARGS": "[]",
            },
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.process: Child = Child(self.popen.pid)
        until(lambda: self.record.exists() or self.popen.poll() is not None, "the agent's start")
        assert self.popen.poll() is None, "the keeper has ended"
        name = layout.file_name(layout.Role.AGENT_PID_FILE, sid)
        until(lambda: (folder / name).exists() and (folder / name).read_text(), "the agent's pid")
        self.agent = Child(int((folder / name).read_text()))

    def lines(self) -> list[bytes]:
        """The whole lines that the agent has read by now."""
        ended = self.record.with_name(self.record.name + ".ended")
        text = (ended if ended.exists() else self.record).read_bytes()
        return text.split(b"\n")[:-1]

    def has_only(self, line: bytes) -> bool:
        return self.lines() == [line]

    def close(self) -> None:
        for process in (self.agent, self.process):
            process.kill()
            process.close()
        self.popen.wait()


_COUNT = itertools.count()


@dataclass
class Scene:
    """A sessions folder, and what lives in it."""

    folder: Path
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    keepers: list[Keeper] = field(default_factory=list)
    on_wait: dict[Moment, Callable[[], object]] = field(default_factory=dict)
    every_wait: Callable[[], None] | None = None
    waits_on: socket.socket | None = None
    faked: bool = False

    def keeper(self, kind: str, *agent_options: str, sid: str = SID) -> Keeper:
        keeper = Keeper(self.folder, sid, kind, *agent_options)
        self.stack.callback(keeper.close)
        self.keepers.append(keeper)
        return keeper

    def fake(self, behaviour: Behaviour, *, after: int = 0, keys: bool = False) -> FakeKeeper:
        self.faked = True
        fake = FakeKeeper(self.folder, SID, behaviour, after=after, keys=keys)
        return self.stack.enter_context(fake)

    def path(self, role: layout.Role) -> Path:
        return self.folder / layout.file_name(role, SID)

    def at(self, moment: Moment, act: Callable[[], object]) -> None:
        """Do something once, when the writer is about to wait there."""
        self.on_wait[moment] = act

    def waits(self, wait: Wait) -> None:
        if wait.moment is Moment.SENDING and wait.sock is None:  # only a turn for others
            return
        self.waits_on = wait.sock
        act = self.on_wait.pop(wait.moment, None)
        if act is not None:
            act()
        if self.every_wait is not None:
            self.every_wait()


async def moment(scene: Scene, which: Moment) -> None:
    """Wait until a writer of this loop waits there."""
    reached = asyncio.Event()
    scene.at(which, reached.set)
    await reached.wait()
    await asyncio.sleep(0)


@pytest.fixture
def scene(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    scene = Scene(folder)
    wait_blocking, wait_async = waiting._wait_blocking, waiting._wait_async

    def blocking(wait: Wait) -> None:
        scene.waits(wait)
        wait_blocking(wait)

    async def asynchronous(wait: Wait) -> None:
        scene.waits(wait)
        await wait_async(wait)

    monkeypatch.setattr(waiting, "_wait_blocking", blocking)
    monkeypatch.setattr(waiting, "_wait_async", asynchronous)
    with scene.stack:
        yield scene


def named_as_ours(size: int, *, dies: bool) -> Callable[[Scene], object]:
    """Reads ``size`` bytes, and the end, and then dies or is stuck before it is waited for.

    Only its name says that the agent has got them.
    """

    def arrange(scene: Scene) -> None:
        program = scene.folder / layout.KEEPER_PROGRAM.name
        program.write_text(
            "import os, signal, socket, sys\n"
            "listener = socket.socket(socket.AF_UNIX)\n"
            "listener.bind('.//' + sys.argv[1] + '.rpc.sock')\n"
            "listener.listen()\n"
            "os.write(1, b'ready\\n')\n"
            "client, _ = listener.accept()\n"
            f"client.recv({size}, socket.MSG_WAITALL)\n"
            "client.recv(1)\n"
            "os.write(1, b'read\\n')\n"
            f"{'os.kill(os.getpid(), signal.SIGKILL)' if dies else 'signal.pause()'}\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(program), SID],
            cwd=scene.folder,
            stdout=subprocess.PIPE,
        )
        scene.stack.enter_context(process)
        scene.stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        scene.path(layout.Role.PID_FILE).write_text(str(process.pid))
        if not dies:
            scene.at(Moment.RECEIPT, process.stdout.readline)

    return arrange


def before_connection(
    monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]
) -> None:
    """Do something right before the writer's connection of that number."""
    connect, count = link.connect, itertools.count(1)

    def connecting(folder: Path, sid: str, trust: Trust, peers: Peers) -> link.Link:
        if next(count) == number:
            act()
        return connect(folder, sid, trust, peers)

    monkeypatch.setattr(exchanges, "connect", connecting)


# -- Both faces, called the same way ----------------------------------------------------


class Face(Protocol):
    """What the table needs of a writer."""

    def write(
        self,
        folder: Path,
        message: Message,
        policy: WritePolicy,
        timeout: float | None = None,
        key: str | None = None,
    ) -> Delivery: ...

    def write_many(
        self, folder: Path, messages: Iterable[Message], policy: WritePolicy
    ) -> ManyDelivery: ...

    def stream(
        self, folder: Path, messages: Iterable[Message], policy: WritePolicy
    ) -> ManyDelivery | None: ...


class Blocking:
    def write(
        self,
        folder: Path,
        message: Message,
        policy: WritePolicy,
        timeout: float | None = None,
        key: str | None = None,
    ) -> Delivery:
        return BlockingRpcWriter(folder, policy=policy).write(
            SID, message, timeout=timeout, key=key
        )

    def write_many(
        self, folder: Path, messages: Iterable[Message], policy: WritePolicy
    ) -> ManyDelivery:
        return BlockingRpcWriter(folder, policy=policy).write_many(SID, messages)

    def stream(
        self, folder: Path, messages: Iterable[Message], policy: WritePolicy
    ) -> ManyDelivery | None:
        with BlockingRpcWriter(folder, policy=policy).stream(SID) as stream:
            for message in messages:
                stream.send(message)
        return stream.delivery


class Async:
    def write(
        self,
        folder: Path,
        message: Message,
        policy: WritePolicy,
        timeout: float | None = None,
        key: str | None = None,
    ) -> Delivery:
        return asyncio.run(
            RpcWriter(folder, policy=policy).write(SID, message, timeout=timeout, key=key)
        )

    def write_many(
        self, folder: Path, messages: Iterable[Message], policy: WritePolicy
    ) -> ManyDelivery:
        return asyncio.run(RpcWriter(folder, policy=policy).write_many(SID, messages))

    def stream(
        self, folder: Path, messages: Iterable[Message], policy: WritePolicy
    ) -> ManyDelivery | None:
        async def run() -> ManyDelivery | None:
            async with RpcWriter(folder, policy=policy).stream(SID) as stream:
                for message in messages:
                    await stream.send(message)
            return stream.delivery

        return asyncio.run(run())


FACES: dict[str, Face] = {"blocking": Blocking(), "async": Async()}


@pytest.fixture(params=list(FACES.values()), ids=list(FACES))
def face(request: pytest.FixtureRequest) -> Face:
    found: Face = request.param
    return found
