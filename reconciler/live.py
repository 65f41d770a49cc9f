"""The sessions as they change: a table that stays on the terminal, or a JSON line a change."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from reconciler import screens
from reconciler.controller import Reconciler

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_SECOND = 1.0
# Between two looks at the clock: ages are shown in seconds.

_GATHER = 0.05
# Seconds in which changes come together in one picture.

_STYLES = {"ready": "green", "starting": "cyan", "stopping": "cyan"}
_FRAME = 3
# Lines of the screen that show no session: the title, the heading, and what is not shown.


async def print_changes(
    reconciler: Reconciler, write: Callable[[str], None], check: Callable[[], None]
) -> None:
    """Write every session as it is found, and again whenever it has changed, as JSON lines.

    Args:
        reconciler: one that only looks on.
        write: takes a line.
        check: called once a second while nothing changes.
    """
    changed: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    folder = reconciler.manager.sessions_dir
    async with reconciler:
        reconciler.sessions.subscribe(
            lambda session: changed.put_nowait(screens.session_row(session, folder))
        )
        while True:
            try:
                async with asyncio.timeout(_SECOND):
                    row = await changed.get()
            except TimeoutError:
                check()
            else:
                write(json.dumps(row))


async def draw_table(reconciler: Reconciler, *, colors: bool) -> None:
    """Show all sessions on the terminal's other screen, until cancelled.

    SIGTERM and SIGHUP cancel it, with their number as the reason.
    """
    from rich.console import Console  # noqa: PLC0415 - only what draws needs it
    from rich.live import Live  # noqa: PLC0415 - the same

    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    console = Console(no_color=not colors, highlight=False, markup=False)
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    if (task := asyncio.current_task()) is not None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel, number)
    async with reconciler:
        reconciler.sessions.subscribe(lambda _: changed.set())
        with Live(console=console, screen=True, auto_refresh=False) as live:
            loop.add_signal_handler(signal.SIGTSTP, _suspend, live, changed)
            while True:
                live.update(_picture(reconciler, console), refresh=True)
                try:
                    async with asyncio.timeout(_SECOND):
                        await changed.wait()
                except TimeoutError:
                    continue
                await asyncio.sleep(_GATHER)
                changed.clear()


def _suspend(live: Live, changed: asyncio.Event) -> None:
    """Give the terminal back as it was, stop as Ctrl-Z asks for, and take it again after that."""
    loop = asyncio.get_running_loop()
    live.stop()
    loop.remove_signal_handler(signal.SIGTSTP)
    signal.raise_signal(signal.SIGTSTP)  # here this process stands still until SIGCONT
    loop.add_signal_handler(signal.SIGTSTP, _suspend, live, changed)
    live.start()
    changed.set()


def _picture(reconciler: Reconciler, console: Console) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415 - only what draws needs it
    from rich.table import Table  # noqa: PLC0415 - the same
    from rich.text import Text  # noqa: PLC0415 - the same

    folder = reconciler.manager.sessions_dir
    sids = sorted(reconciler.sessions)
    shown = sids[: max(1, console.height - _FRAME)]
    rows = [
        screens.session_row(reconciler.sessions[sid], folder, time.monotonic()) for sid in shown
    ]
    heading, *lines = screens.columns(rows)
    table = Table(
        *heading, "REASON", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold"
    )
    for column in table.columns[1:-1]:
        column.no_wrap = True  # on a narrow screen the id and the reason give way, the wider first
    for row, (sid, phase, *others) in zip(rows, lines, strict=True):
        style = _STYLES.get(row["phase"], "yellow")
        reason = Text(row["reason"], "dim", no_wrap=True, overflow="ellipsis")
        name = Text(sid, no_wrap=True, overflow="ellipsis")
        table.add_row(name, Text(phase, style), *others, reason)
    count = f"{len(sids)} session{'s' if len(sids) != 1 else ''}"
    title = f"{count} in {folder}" if folder.is_dir() else f"there is no folder {folder}"
    hidden = len(sids) - len(shown)
    return Group(
        Text(title, no_wrap=True, overflow="ellipsis"),
        table,
        Text(f"… and {hidden} more" if hidden else "", "dim"),
    )
