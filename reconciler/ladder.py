"""How a process is ended: SIGTERM, a grace, SIGKILL."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who reads the settings need not load it
    from reconciler.processes import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """Seconds to wait after each signal.

    2 s after SIGTERM are the dashboard's; what SIGKILL does not end in 2 s more hangs in
    the kernel, and waiting longer would not help.
    """

    term_grace: float = 2.0
    kill_grace: float = 2.0


async def end(
    target: Target,
    ladder: Ladder,
    *,
    group: bool = False,
    at_once: bool = False,
    still: Callable[[], bool] = lambda: True,
) -> tuple[bool, str]:
    """End a process and wait until it is dead.

    Args:
        target: the process, held and proven.
        ladder: how long to wait after each signal.
        group: signal the process group that it leads, if it leads one.
        at_once: SIGKILL alone.
        still: asked before each signal: whether it is still to be ended. A keeper closes its
            proof while it ends; a leftover may have become something else.

    Returns:
        Whether it is dead, and how that came in words for a log.
    """
    if target.exited:
        return True, "dead already"
    if not target.proven:
        return False, "not proven any more, not signalled"
    steps = ((signal.SIGTERM, ladder.term_grace), (signal.SIGKILL, ladder.kill_grace))
    for number, grace in steps[at_once:]:
        if not (still() and target.send(number, group=group)) and not target.exited:
            return False, "not proven any more, not signalled"
        if await target.wait(grace):
            return True, f"ended by {number.name}"
    return False, "alive after SIGKILL"
