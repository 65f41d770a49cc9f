"""Innocents: processes that nobody may signal, and that show it when somebody does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from conftest import identity, until
from stand_ins import running

from reconciler.observations import ProcessId
from reconciler.processes import SYSTEM

BLOCKED = """
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
pids = [os.getpid()]
for _ in range(COUNT):
    if (child := os.fork()) == 0:
        os.setsid()
        signal.pause()
    pids.append(child)
print(*pids, flush=True)
signal.pause()
"""
"""All signals are blocked: one that comes stays pending, and can be seen from outside."""


@contextlib.contextmanager
def innocents(count: int = 1, **environment: str) -> Iterator[list[ProcessId]]:
    """Processes of our user that lead groups of their own and record the signals they get."""
    code = BLOCKED.replace("COUNT", str(count))
    with running(code, env={**os.environ, **environment}) as (_, *pids):
        until(lambda: all(SYSTEM.facts(pid).group == pid for pid in pids), "they lead groups")
        yield [identity(pid) for pid in pids]


def harm(innocent: ProcessId) -> str:
    """What was done to an innocent, or nothing."""
    if SYSTEM.facts(innocent.pid).process != innocent:
        return f"process {innocent.pid} was killed"
    status = Path(f"/proc/{innocent.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    if pending := int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16):
        return f"process {innocent.pid} got signals: mask {pending:x}"
    if fields["State"].startswith("T"):
        return f"process {innocent.pid} was stopped"
    return ""
