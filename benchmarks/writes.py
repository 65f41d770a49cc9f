"""Lines to a keeper."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

from benchmarks.measuring import Row, Stage, Values
from benchmarks.processes import (
    PEERS,
    Helper,
    bare,
    ended,
    node,
    rest,
    start_keeper,
    wait_for_agent,
)
from benchmarks.writer import lines

BATCH = 50
"""Writes of one side before it is the other's turn."""

QUIET = 0.02
"""Seconds without work after which writers and keepers are at rest."""

SIZE = 200
"""Bytes of a line of `many`, the line feed included."""


def writer(folder: Path, sid: str) -> Helper:
    """Ours, in a process of its own."""
    return Helper([sys.executable, "-m", "benchmarks.writer", str(folder), sid], folder)


def writes(stage: Stage) -> Values:
    """One line after the other, each on a new connection.

    The clock starts before each call and stops when it returns, in the writing process, which
    is warm. ``ours``: `reconciler.sync.RpcWriter.write` to a keeper of ours, which returns with
    the receipt that the line is in the agent's input (the face for asyncio takes a third more).
    ``node``: a write to the Node keeper by the dashboard's rules, which returns once the line is
    with the kernel. The rates are those of the same batches, what lies between two calls
    included. A batch begins once all four are at rest: a write without a receipt leaves its
    keeper with work that is not in its figure, and must not be in ours.
    """
    folder = stage.folder()
    values: dict[str, list[float]] = {"ours": [], "node": [], "ours_rate": [], "node_rate": []}
    dashboard = [node(), str(PEERS / "dashboard.cjs"), "write", str(folder), "node"]
    keepers = start_keeper(folder, "ours"), start_keeper(folder, "node", ours=False)
    with (
        ended(*keepers),
        writer(folder, _ready(folder, "ours")) as ours,
        Helper(dashboard, _served(folder, "node")) as peer,
    ):
        for number in range(-2, stage.of(40, 3)):  # the first two rounds are to get warm
            for whose, helper in (("ours", ours), ("node", peer)):
                rest([ours.pid, peer.pid, *(keeper.pid for keeper in keepers)], QUIET)
                told = json.loads(helper.ask(str(BATCH)))
                if number >= 0:
                    values[whose] += told["each"]
                    values[f"{whose}_rate"].append(BATCH / told["all"])
    return values


def _ready(folder: Path, sid: str) -> str:
    wait_for_agent(folder, sid)
    return sid


def _served(folder: Path, sid: str) -> Path:
    wait_for_agent(folder, sid)
    return folder


def many(stage: Stage) -> Values:
    """Many lines through one connection.

    ``ours``: `RpcWriter.write_many` from text to the receipt that the last of them is in the
    agent's input; the agent is ``cat``. ``bare``: one ``sendall`` of the same bytes, to a
    process that reads and discards, until that has closed its side at the end of them. Both
    clocks start before the connection is made.
    """
    folder = stage.folder()
    count = stage.of(100_000, 2000)
    megabytes = count * SIZE / 1e6
    values: dict[str, list[float]] = {"ours": [], "bare": []}
    path = folder.parent / "drain"
    with (
        ended(start_keeper(folder, "ours")),
        writer(folder, _ready(folder, "ours")) as ours,
        bare(folder, "drain", str(path)) as reader,
    ):
        data = "".join(f"{line}\n" for line in lines(count, SIZE)).encode()
        for number in range(-1, stage.of(21, 2)):
            took = float(ours.ask(f"many {count} {SIZE}"))
            limit = _send_all(path, data)
            if int(reader.answer()) != len(data):
                raise RuntimeError("the reader has not had it all")
            if number >= 0:
                values["ours"].append(megabytes / took)
                values["bare"].append(megabytes / limit)
    return values


def _send_all(path: Path, data: bytes) -> float:
    begun = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        client.recv(1)
        return time.perf_counter() - begun


ROWS = (
    Row(
        name="write_latency",
        work="one line on a new connection, with receipt, to our keeper",
        against="Node's write, without receipt, to the Node keeper",
        goal=0.6,
        unit="ms",
        scene=writes,
        peer="node",
    ),
    Row(
        name="write_rate",
        work="sequential writes a second, same pair",
        against="Node's",
        goal=2,
        at_least=True,
        unit="1/s",
        scene=writes,
        ours="ours_rate",
        peer="node_rate",
    ),
    Row(
        name="write_many",
        work="100,000 lines of 200 bytes, with receipt",
        against="bare socket `sendall` to a draining reader",
        goal=0.5,
        at_least=True,
        unit="MB/s",
        scene=many,
        peer="bare",
    ),
)
