"""A reconciler whose times are short, in a process of its own that a test may kill.

``python hasty_daemon.py <folder>`` answers each line of its standard input, a JSON list of a
method and a session id, by a line of JSON. `HastyDaemon` is the other end of that.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from reconciler.controller import Reconciler
from reconciler.errors import ReconcilerError
from reconciler.keeper import KeeperManager
from reconciler.ladder import Ladder
from reconciler.state import Policy

POLICY = Policy(settle=0.2, start_grace=0.3, orphan_grace=0.1, lost_grace=3.0, rebind_grace=0.2)
LADDER = Ladder(term_grace=0.3)
RESYNC = 1.0


def tell(said: object) -> None:
    sys.stdout.write(f"{json.dumps(said)}\n")
    sys.stdout.flush()


async def main(folder: Path) -> None:
    manager = KeeperManager(folder, policy=POLICY, ladder=LADDER)
    async with Reconciler(manager, resync=RESYNC) as reconciler:
        tell("started")
        while line := await asyncio.to_thread(sys.stdin.readline):
            method, sid = json.loads(line)
            try:
                said = await answer(reconciler, method, sid)
            except ReconcilerError as error:
                said = {"error": type(error).__name__, "text": str(error)}
            tell(said)


async def answer(reconciler: Reconciler, method: str, sid: str) -> Any:  # noqa: ANN401 - JSON
    match method:
        case "stop":
            async with asyncio.timeout(30):
                stopped = await reconciler.stop(sid)
            return {"keeper": stopped.keeper_pid}
        case "want":
            spawned = await reconciler.spawn(
                sid, agent_command=("sleep", "600"), ready=False, timeout=60
            )
            return {"keeper": spawned.keeper_pid}
        case "settled":
            async with asyncio.timeout(30):
                return await reconciler.settled()
        case _:
            return {sid: row.phase.value for sid, row in reconciler.sessions.items()}


class HastyDaemon:
    """The process, and what is asked of it."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder = folder
        self.log = log
        self._process: subprocess.Popen[str] | None = None

    @property
    def up(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": paths},
            )
        assert self._read() == "started"

    def ask(self, method: str, sid: str = "") -> Any:  # noqa: ANN401 - JSON
        assert self._process is not None
        assert self._process.stdin is not None
        print(json.dumps([method, sid]), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:  # noqa: ANN401 - JSON
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the daemon has ended; its log:\n{self.log.read_text()}"
        return json.loads(line)

    def end(self, *, crash: bool) -> None:
        if self._process is None:
            return
        if crash:
            self._process.kill()
        self._process.communicate()
        self._process = None

    def complaints(self) -> list[str]:
        """What it has logged as its own failures."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines())
        return [json.dumps(line) for line in lines if line["level"] in {"error", "critical"}]


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
