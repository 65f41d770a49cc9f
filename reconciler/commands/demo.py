"""`demo`: break three sessions before the user's eyes, and show how they are put right."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from reconciler.console import FAILURE, Common, json_option, pass_common, print_json

if TYPE_CHECKING:
    from reconciler.demo import Demo, Outcome

_PAUSE = 0.8
"""Seconds before each thing is broken, on a terminal: time to read what it will be."""


@click.command(short_help="Break three sessions, and see them put right.")
@json_option
@pass_common
def demo(given: Common, *, as_json: bool) -> None:
    """Break three sessions before your eyes, and show how each is put right.

    All of it happens in a home of its own, a temporary folder, and nothing is left at the end:
    no process, no file, whether it ends by itself or by Ctrl-C. The agent is `pi` if it can be
    found, without a model and offline; else a stand-in. It takes some seconds, and ends with 0
    only if everything was really put right and nothing is left.

    \b
    To look on:                       pi-reconciler demo
    As a check that all works here:   pi-reconciler demo --json | jq .success
    """  # noqa: D301 - click wants the real character
    import asyncio

    from reconciler.demo import Audience, Demo
    from reconciler.narration import Narrator

    terminal = sys.stdout is not None and sys.stdout.isatty()
    audience = Audience() if as_json else Narrator(colors=given.colors and terminal)
    outcome = asyncio.run(_played(Demo(audience, _PAUSE if terminal and not as_json else 0.0)))
    if isinstance(outcome, int):
        sys.exit(128 + outcome)
    if as_json:
        print_json(_plain(outcome))
    if not outcome.success:
        sys.exit(FAILURE)


async def _played(demo: Demo) -> Outcome | int:
    """Play it; a signal ends it early, but not what it does to clean up. The signal's number."""
    import asyncio
    import contextlib
    import signal

    came: list[int] = []
    loop = asyncio.get_running_loop()
    play: asyncio.Task[Outcome] = loop.create_task(demo.play())

    def end(number: int) -> None:
        if not came:
            play.cancel()
        came.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end, number)
    with contextlib.suppress(asyncio.CancelledError):
        return await play
    return came[0] if came else signal.SIGINT


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "success": outcome.success,
        "agent": outcome.agent,
        "scenes": [
            {
                "sid": scene.sid,
                "broken": scene.broken,
                "put_right": scene.put_right,
                "ms": round(scene.seconds * 1000, 1),
                "reason": scene.reason,
            }
            for scene in outcome.scenes
        ],
        "left": list(outcome.left),
    }
