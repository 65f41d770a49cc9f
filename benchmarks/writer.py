"""Ours of the writing rows, in a process of its own: the writers, as an application uses them.

``python -m benchmarks.writer FOLDER SID``: a number on its standard input is answered by
``{"each": [...], "all": ...}``, the milliseconds of each of so many writes and the seconds of
all of them, one after the other; ``many`` and two numbers by the seconds in which so many lines
of so many bytes were delivered.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
import time
from pathlib import Path

from reconciler.rpc_writer import BlockingRpcWriter, Outcome, RpcWriter

LINE = '{"type":"get_state","id":"1"}'


@functools.cache
def lines(count: int, size: int) -> tuple[str, ...]:
    """Lines of JSON that have so many bytes, the line feed included, each another."""
    frame = len('{"id":"00000000","text":""}\n')
    return tuple(f'{{"id":"{n:08}","text":"{"x" * (size - frame)}"}}' for n in range(count))


def writes(writer: BlockingRpcWriter, sid: str, count: int) -> dict[str, object]:
    each = []
    begun = time.perf_counter()
    for _ in range(count):
        start = time.perf_counter()
        delivery = writer.write(sid, LINE)
        each.append((time.perf_counter() - start) * 1000)
        if not delivery.delivered:
            raise RuntimeError(f"a write has failed: {delivery}")
    return {"each": each, "all": time.perf_counter() - begun}


async def many(writer: RpcWriter, sid: str, count: int, size: int) -> float:
    messages = lines(count, size)
    begun = time.perf_counter()
    delivery = await writer.write_many(sid, messages)
    took = time.perf_counter() - begun
    if delivery.outcome is not Outcome.DELIVERED:
        raise RuntimeError(f"a write has failed: {delivery}")
    return took


async def main(folder: str, sid: str) -> None:
    writer, blocking = RpcWriter(Path(folder)), BlockingRpcWriter(Path(folder))
    print("ready", flush=True)
    while line := sys.stdin.readline():  # nothing else is to be done in this loop meanwhile
        match line.split():
            case ["many", count, size]:
                print(await many(writer, sid, int(count), int(size)), flush=True)
            case [count]:
                print(json.dumps(writes(blocking, sid, int(count))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
