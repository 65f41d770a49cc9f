"""Starting sessions again beside the loop, a few at a time."""

from __future__ import annotations

import asyncio
import time

from reconciler.effects import Done
from reconciler.errors import ReconcilerError
from reconciler.keeper import KeeperManager
from reconciler.plans import Restart

RESTARTS_AT_ONCE = 4
"""Sessions that are being started again at the same time: each takes a thread, of which the
event loop has five at least, and some 20 ms of a core."""


class Restarts:
    """The restarts that are under way."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(RESTARTS_AT_ONCE)

    async def start(self, manager: KeeperManager, sid: str, action: Restart) -> Done:
        """Start a session again, in a thread: what it is started in may be a disk that hangs."""
        async with self._turns:
            begun = time.monotonic()
            started = asyncio.create_task(
                asyncio.to_thread(lambda: asyncio.run(manager.start_again(sid, action.note)))
            )
            try:
                spawned = await asyncio.shield(started)
            except asyncio.CancelledError:  # a thread goes on: until then the folder stays ours
                await asyncio.gather(started, return_exceptions=True)
                raise
            except (ReconcilerError, ValueError) as error:
                # What follows may be the end of a log, and that may hold what an agent was given.
                success, detail = False, str(error).partition("; ")[0]
            else:
                success, detail = True, f"keeper {spawned.keeper_pid} started"
            return Done(action, success, detail, time.monotonic() - begun)
