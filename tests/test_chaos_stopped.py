"""Keepers and agents are stopped for longer than every timeout, and then go on."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from chaos import CAMPAIGN, Fault
from conftest import NODE_KEEPER, alive, identity, until
from hampered import PATIENT, Hampered, all_goes, bystanders, is_ready, leave, recorder, spawn_these
from stand_ins import agent_of

from reconciler.deliveries import Delivery, Outcome
from reconciler.keeper import KeeperManager, SpawnedKeeper
from reconciler.rpc_writer import BlockingRpcWriter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the writer needs Linux")

CHECKED = "silence not taken for death, no word lost, doubled or told wrong"

# Longer than every time of the settings: 30 s of grace for a lost keeper is the longest.
PAUSE = 35.0 if CAMPAIGN else 1.5


class Stopped:
    """A session some of whose processes are stopped.

    Args:
        keeper: the session.
        told: where its agent writes down what comes.
        which: whom to stop: keeper, agent, or both.
    """

    def __init__(
        self, manager: KeeperManager, keeper: SpawnedKeeper, told: Path, which: str
    ) -> None:
        self.sid = keeper.sid
        self.told = told
        self._manager = manager
        agent = agent_of(manager, keeper.sid)
        pids = {"keeper": [keeper.keeper_pid], "agent": [agent]}
        self._stopped = pids.get(which, [keeper.keeper_pid, agent])
        self._identities = [identity(pid) for pid in (keeper.keeper_pid, agent)]
        self._deliveries: dict[str, Delivery] = {}

    def signal(self, number: signal.Signals) -> None:
        for pid in self._stopped:
            os.kill(pid, number)

    def write(self, word: str) -> None:
        writer = BlockingRpcWriter(self._manager.sessions_dir)
        self._deliveries[word] = writer.write(self.sid, {"say": word})

    def words(self) -> list[str]:
        lines = [line for line in self.told.read_text().splitlines() if line.startswith("{")]
        return [json.loads(line)["say"] for line in lines]

    def holds(self, fault: Fault) -> None:
        """Check what it went through: it lives, and each word's outcome was the truth."""
        for process in self._identities:
            same = alive(process.pid) and identity(process.pid) == process
            fault.holds(same, f"{self.sid}: process {process.pid} lives on")
        last = BlockingRpcWriter(self._manager.sessions_dir, policy=PATIENT)
        fault.holds(last.write(self.sid, {"say": "last"}).delivered, f"{self.sid}: a line after")
        until(lambda: "last" in self.words(), f"{self.sid}: the last word")
        words = self.words()
        fault.holds(len(words) == len(set(words)), f"{self.sid}: none twice: {words}")
        for word, delivery in self._deliveries.items():
            arrived = word in words
            match delivery.outcome:
                case Outcome.DELIVERED:
                    fault.holds(arrived, f"{self.sid}: {word} has a receipt, and arrives")
                case Outcome.NOT_DELIVERED:
                    fault.holds(not arrived, f"{self.sid}: {word} was not delivered")
                case Outcome.UNCONFIRMED:  # it may arrive or not; told so, it is no lie
                    fault.holds(delivery.reason, f"{self.sid}: {word} says why")
        signals = [line for line in self.told.read_text().splitlines() if "signal" in line]
        # SIGCONT is what this test sends.
        fault.holds(set(signals) <= {f"signal {signal.SIGCONT}"}, f"{self.sid}: {signals}")


@pytest.mark.chaos("keepers and agents stopped", CHECKED)
def test_stopped(fault: Fault, folder: Path, tmp_path: Path) -> None:
    ours = KeeperManager(folder)
    node = KeeperManager(folder, keeper_command=("node", str(NODE_KEEPER)))
    kinds = list(itertools.product((ours, node), ("keeper", "agent", "both")))
    with bystanders(ours, tmp_path / "told") as those, Hampered(folder, tmp_path / "log") as daemon:
        for number in fault.rounds(short=1, full=3):
            told = [tmp_path / f"round{number}-{each}" for each in range(len(kinds))]
            keepers = spawn_these(
                (manager, path.name, recorder(path))
                for (manager, _), path in zip(kinds, told, strict=True)
            )
            for path in told:
                until(functools.partial(is_ready, path), "the agent listens")
            sessions = [
                Stopped(manager, keeper, path, which)
                for (manager, which), keeper, path in zip(kinds, keepers, told, strict=True)
            ]
            for session in sessions:
                session.signal(signal.SIGSTOP)
            for session in sessions:
                session.write("early")
            time.sleep(PAUSE / 2)  # what is shown is that nothing comes of it
            daemon.crash_and_restart()
            for session in sessions:
                session.write("late")
            left = leave(folder, f"round{number}-left")
            all_goes(fault, folder, left)
            time.sleep(PAUSE / 2)
            fault.holds(not acted_on(daemon, sessions), "nothing was done about them")
            for session in sessions:
                session.signal(signal.SIGCONT)
            for session in sessions:
                session.holds(fault)
            fault.holds(not acted_on(daemon, sessions), "nothing was done about them")
            those.unharmed(fault)


def acted_on(daemon: Hampered, sessions: list[Stopped]) -> list[str]:
    """The log's lines on these sessions: of what is well there are none."""
    sids = {session.sid for session in sessions}
    return [f"{line['event']} {line['sid']}" for line in daemon.lines if line.get("sid") in sids]
