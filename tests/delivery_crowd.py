"""A crowd of writers in a process of its own, whose memory can be measured.

Usage: delivery_crowd.py FOLDER SID FACE COUNT SIZE TIMEOUT KEYS

Each of COUNT writers writes one message of SIZE bytes, all at once, with TIMEOUT seconds
without progress. Then, for each line on standard input, those that are not delivered do it
again. After each round it says as JSON what it came to: "rounds" has [outcome, bytes handed
over, bytes] for each message, "idle" and "peak" are bytes of resident memory.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path

from reconciler.rpc_writer import BlockingRpcWriter, Delivery, RpcWriter, WritePolicy

FOLDER, SID, FACE, COUNT, SIZE, TIMEOUT, KEYS = sys.argv[1:]
POLICY = WritePolicy(progress_timeout=float(TIMEOUT))
PAD = "p" * int(SIZE)


def memory(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) * 1024


def message(number: int) -> dict[str, object]:
    return {"n": number, "pad": PAD}


def key(number: int) -> str | None:
    return f"{number}" if int(KEYS) else None


def all_async(writers: dict[int, RpcWriter]) -> dict[int, Delivery]:
    async def run() -> list[Delivery]:
        calls = (w.write(SID, message(n), key=key(n)) for n, w in writers.items())
        return await asyncio.gather(*calls)

    return dict(zip(writers, asyncio.run(run()), strict=True))


def all_blocking(writers: dict[int, BlockingRpcWriter]) -> dict[int, Delivery]:
    told: dict[int, Delivery] = {}

    def write(number: int, writer: BlockingRpcWriter) -> None:
        told[number] = writer.write(SID, message(number), key=key(number))

    threads = [threading.Thread(target=write, args=each) for each in writers.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def main() -> None:
    numbers = range(int(COUNT))
    folder = Path(FOLDER)
    calm = {n: RpcWriter(folder, policy=POLICY) for n in numbers}
    blocking = {n: BlockingRpcWriter(folder, policy=POLICY) for n in numbers}
    left = set(numbers)
    idle = memory("VmRSS")
    while True:
        if FACE == "async":
            told = all_async({n: calm[n] for n in sorted(left)})
        else:
            told = all_blocking({n: blocking[n] for n in sorted(left)})
        left -= {n for n, delivery in told.items() if delivery.delivered}
        rows = {n: (d.outcome.value, d.attempts[-1].handed_over, d.size) for n, d in told.items()}
        said = json.dumps({"told": rows, "idle": idle, "peak": memory("VmHWM")})
        sys.stdout.write(said + "\n")
        sys.stdout.flush()
        if not sys.stdin.readline():
            return


main()
