"""A reconciler as the daemon runs it, and beside it what measures how long its loop is held up.

``lag.py <sessions folder>``: says "ready", works until its input ends, and says the figures.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from pathlib import Path

from reconciler.controller import Reconciler
from reconciler.keeper import KeeperManager
from reconciler.logs import make_logger

TICK = 0.005


class Lag:
    """How long the running loop was kept from its turn, at most.

    Between two ticks passes their pause, and whatever holds the loop up. On a busy machine
    that is other programs most of all, so what is judged is the processor time that the loop's
    own thread has used between two ticks. Another thread of ours that holds Python's lock holds
    the loop up, too: `ours` counts that as well, but on a busy machine far too much of it.

    Attributes:
        loops: the most seconds of processor time that the loop's own thread has taken.
        ours: the most seconds by the clock, without those in which the loop's thread stood in
            the queue for a processor, and no more than this process has used of any.
        wall: the most seconds by the clock, whoever took them.
    """

    def __init__(self) -> None:
        self.ours = self.loops = self.wall = 0.0

    async def tick(self) -> None:
        """Measure, for ever."""
        before = _clocks()
        while True:
            await asyncio.sleep(TICK)
            now = _clocks()
            passed, queued, process, thread = (b - a for a, b in zip(before, now, strict=True))
            wall = passed - TICK
            self.wall = max(self.wall, wall)
            self.ours = max(self.ours, min(wall - queued, process))
            self.loops = max(self.loops, thread)
            before = now


def _clocks() -> tuple[float, float, float, float]:
    """Seconds: by the clock, of this thread in the queue, of the process, of this thread."""
    _, queued, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return time.monotonic(), int(queued) / 1e9, time.process_time(), time.thread_time()


async def main(folder: Path) -> None:
    """Work, and measure, until the input ends."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(0, over.set)
    lag = Lag()
    async with Reconciler(KeeperManager(folder), logger=make_logger(sys.stderr)) as reconciler:
        await reconciler.settled()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        ticks = asyncio.create_task(lag.tick())
        await over.wait()
        ticks.cancel()
    json.dump({"ours": lag.ours, "loops": lag.loops, "wall": lag.wall}, sys.stdout)


if __name__ == "__main__":
    gc.freeze()  # as the daemon does
    asyncio.run(main(Path(sys.argv[1])))
