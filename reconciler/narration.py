"""What a person sees of a demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from reconciler.demo import Audience, Scene
from reconciler.sessions import Session


class Narrator(Audience):
    """Tells a person."""

    def __init__(self, *, colors: bool) -> None:
        self._colors = colors

    def opened(self, folder: Path, agent: str) -> None:
        """Where, and with which agent."""
        which = "the real pi" if agent == "pi" else "a stand-in"
        click.echo(f"In a folder of its own, {folder}\nwith {which} as agent.")

    def refused(self, reason: str) -> None:
        """Why not with the real one."""
        click.echo(f"That pi does not start: {reason}\n")

    def started(self, sessions: Sequence[Session]) -> None:
        """The sessions, with their pids."""
        click.echo("\nThree sessions are up:")
        for each in sessions:
            self._line(each.sid, f"keeper {each.keeper_pid}, agent {each.agent_pid}")

    def breaking(self, sid: str, what: str) -> None:
        """What is about to happen."""
        click.echo()
        self._line(sid, f"{self._mark('broken', fg='red')}: {what}")

    def put_right(self, scene: Scene) -> None:
        """The measured time, and why."""
        name, done = "", f"{scene.seconds * 1000:.1f} ms"
        if not scene.broken:
            click.echo()
            name, done = scene.sid, self._mark("unharmed", fg="green")
        else:
            done = f"{self._mark('put right', fg='green')} in {self._mark(done, bold=True)}"
        if not scene.put_right:
            done = self._mark("NOT AS IT SHOULD BE", fg="red", bold=True)
        self._line(name, f"{done} ({scene.reason})")

    def closed(self, left: Sequence[str]) -> None:
        """Whether all is gone."""
        if left:
            click.echo(f"\n{self._mark('Left behind', fg='red')}: {'; '.join(left)}")
        else:
            click.echo("\nCleaned away: no process and no file is left.")

    def _line(self, name: str, text: str) -> None:
        click.echo(f"  {self._mark(f'{name:8}', bold=True)}  {text}")

    def _mark(self, text: str, **style: Any) -> str:  # noqa: ANN401 - click's
        return click.style(text, **style) if self._colors else text
