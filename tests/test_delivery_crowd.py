"""A hundred writers before an agent that is stopped: what it costs, and what arrives."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from delivery_scene import FACES, HASTY, SID, Keeper, Scene, until
from delivery_scene import scene as scene  # noqa: PLC0414 - a fixture
from raw_keeper import MIB, memory

from reconciler.rpc_writer import BlockingRpcWriter, Outcome

COUNT = 100
FILLING = {"n": -1, "pad": "f" * 70_000}
KIB = 1024
KEEPER_BOUND = 16 * MIB
"""What a keeper takes beside the one longest line."""
CALL_BOUND = 64 * KIB
"""What a write takes beside its line, which is there twice while it is made."""
CROWD = Path(__file__).with_name("delivery_crowd.py")


class Crowd:
    """The process with the writers."""

    def __init__(self, folder: Path, face: str, size: int, timeout: float, *, keys: bool) -> None:
        self.face = face
        self.line = size + len('{"n":99,"pad":""}\n') + (len("\199\1") if keys else 0)
        paths = os.pathsep.join(path for path in sys.path if path)
        arguments = (folder, SID, face, COUNT, size, timeout, int(keys))
        self.process = subprocess.Popen(
            [sys.executable, str(CROWD), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        )

    def told(self) -> dict[int, tuple[str, int, int]]:
        """What the round came to; the process stayed within its bound."""
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        made_at_once = 1 if self.face == "async" else COUNT
        bound = COUNT * (self.line + CALL_BOUND) + made_at_once * self.line
        grown = told["peak"] - told["idle"]
        assert grown <= bound, f"the writers grew by {grown / MIB:.1f} of {bound / MIB:.1f} MiB"
        return {int(number): row for number, row in told["told"].items()}

    def again(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"again\n")
        self.process.stdin.flush()

    def close(self) -> None:
        with self.process:
            self.process.kill()


@contextlib.contextmanager
def crowd(
    scene: Scene, face: str, size: int, timeout: float, *, keys: bool
) -> Iterator[tuple[Crowd, Keeper]]:
    """A hundred writers that wait for a stopped agent; its keeper stays within its bound."""
    keeper = scene.keeper("ours")
    keeper.agent.stop()
    idle = memory(keeper.process.pid)
    filling = BlockingRpcWriter(scene.folder, policy=HASTY).write(SID, FILLING)
    assert filling.outcome is Outcome.UNCONFIRMED, "the agent's pipe is full"
    descriptors = open_at(keeper)
    writers = Crowd(scene.folder, face, size, timeout, keys=keys)
    with contextlib.closing(writers):
        if timeout > 1:
            until(lambda: open_at(keeper) >= descriptors + COUNT, "all are connected")
        yield writers, keeper
    grown = memory(keeper.process.pid, "VmHWM") - idle
    bound = KEEPER_BOUND + writers.line
    assert grown <= bound, f"the keeper grew by {grown / MIB:.1f} of {bound / MIB:.1f} MiB"


def open_at(keeper: Keeper) -> int:
    return len(os.listdir(f"/proc/{keeper.process.pid}/fd"))


def arrived(keeper: Keeper) -> Counter[int]:
    """How often each message is at the agent; what filled its pipe aside."""
    counted = Counter(json.loads(line)["n"] for line in keeper.lines())
    del counted[FILLING["n"]]
    return counted


def outcomes(told: dict[int, tuple[str, int, int]]) -> Counter[str]:
    return Counter(outcome for outcome, _, _ in told.values())


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("size", [20 * KIB, MIB], ids=["20-KiB", "1-MiB"])
def test_who_waits_for_it_is_delivered(scene: Scene, face: str, size: int) -> None:
    with crowd(scene, face, size, 60.0, keys=False) as (writers, keeper):
        keeper.agent.go_on()
        told = writers.told()
        assert outcomes(told) == {"delivered": COUNT}
        until(lambda: arrived(keeper).total() == COUNT, "all at the agent")
        assert arrived(keeper) == Counter(range(COUNT))


@pytest.mark.parametrize("face", FACES)
def test_who_gives_up_has_handed_it_over(scene: Scene, face: str) -> None:
    """Lines that fit into a socket's buffer: all that is not said to be kept back arrives."""
    with crowd(scene, face, 20 * KIB, 0.35, keys=False) as (writers, keeper):
        told = writers.told()
        assert set(outcomes(told)) <= {"unconfirmed", "not_delivered"}
        assert outcomes(told)["unconfirmed"] > COUNT // 2
        handed = {n for n, (_, over, _) in told.items() if over}
        assert handed == {n for n, (outcome, _, _) in told.items() if outcome != "not_delivered"}
        assert all(over in {0, size} for _, over, size in told.values())
        keeper.agent.go_on()
        until(lambda: arrived(keeper).total() >= len(handed), "all at the agent")
        assert arrived(keeper) == Counter(handed)


@pytest.mark.parametrize("face", FACES)
def test_who_gives_up_within_a_line_writes_it_again(scene: Scene, face: str) -> None:
    """With a key: whether the first one was cut or not, it arrives once."""
    with crowd(scene, face, 300 * KIB, 0.35, keys=True) as (writers, keeper):
        told = writers.told()
        assert outcomes(told)["unconfirmed"] > COUNT // 2
        assert outcomes(told)["delivered"] == 0
        keeper.agent.go_on()
        while outcomes(told) != {"delivered": len(told)}:
            writers.again()
            told = writers.told()
        until(lambda: arrived(keeper).total() >= COUNT, "all at the agent")
        assert arrived(keeper) == Counter(range(COUNT))
