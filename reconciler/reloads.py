"""Changed settings are taken while a daemon runs: whole, or not at all.

The file is read in a thread of its own, since a disk or a server may hang; the event loop only
compares, and puts the new settings in force in one step.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from reconciler.settings import Settings, SettingsError, Sources

if TYPE_CHECKING:
    from reconciler.reports import Log

PATIENCE = 5.0
"""Seconds that the file may take to be read; a local one takes less than a millisecond."""

_LONGEST = 2_000
# Characters of a reason: a log line stays whole on its way through a shipper.


class _News(NamedTuple):
    """Good settings, and what is new about them.

    Attributes:
        settings: as the rooms take them.
        values: every key's value.
        changed: the keys whose new value is taken now.
        waiting: the keys whose new value waits for the next start.
    """

    settings: Settings
    values: Mapping[str, Any]
    changed: tuple[str, ...]
    waiting: tuple[str, ...]


class Reloads:
    """Takes changed settings when asked to. Made and asked in the event loop.

    Args:
        sources: what the daemon was started with; its file is read again.
        take: puts settings in force, without waiting. What it raises refuses them; it must have
            changed nothing then.
        log: where it is told.
        begun: called when settings are about to be read.
        over: called when they were taken, or refused.
        patience: seconds that the file may take to be read.
    """

    def __init__(
        self,
        sources: Sources,
        take: Callable[[Settings], None],
        log: Log,
        *,
        begun: Callable[[], None] = lambda: None,
        over: Callable[[], None] = lambda: None,
        patience: float = PATIENCE,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sources = sources
        self._take = take
        self._log = log
        self._begun = begun
        self._over = over
        self._patience = patience
        self._running: Mapping[str, Any] | None = None  # known once somebody asks
        self._reader: threading.Thread | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._again = False

    def ask(self) -> None:
        """Take the settings as they are now; asked again meanwhile, once more after that."""
        self._again = self._reader is not None
        if self._again:
            if self._timer is None:  # it was given up, and hangs on
                self._reject("the file is still being read since it was asked for before")
            return
        self._begun()
        self._timer = self._loop.call_later(self._patience, self._give_up)
        self._reader = threading.Thread(target=self._read, name="settings", daemon=True)
        try:
            self._reader.start()
        except RuntimeError as error:
            self._on_read(SettingsError(f"no thread to read them: {error}"))

    def _read(self) -> None:
        """Read and check, in the thread."""
        read: _News | SettingsError
        try:
            read = self._news()
        except SettingsError as error:
            read = error
        except Exception as error:  # noqa: BLE001 - a defect; the old settings stay
            read = SettingsError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(self._on_read, read)

    def _news(self) -> _News:
        from reconciler.schema import KEYS  # noqa: PLC0415 - a daemon is rarely asked

        running = self._running
        if running is None:
            running = _values(self._sources)
        loaded = self._sources.again().loaded()
        new = [name for name, said in loaded.said.items() if said.value != running[name]]
        changed = tuple(name for name in new if KEYS[name].at_once)
        values = {**running, **{name: loaded.said[name].value for name in changed}}
        waiting = tuple(name for name in new if name not in changed)
        return _News(loaded.settings, values, changed, waiting)

    def _on_read(self, read: _News | SettingsError) -> None:
        self._reader = None
        if self._timer is not None:  # else it was given up
            self._timer.cancel()
            self._timer = None
            self._judge(read)
            self._over()
        if self._again:
            self.ask()

    def _judge(self, read: _News | SettingsError) -> None:
        if isinstance(read, SettingsError):
            self._reject(str(read))
            return
        try:
            self._take(read.settings)
        except Exception as error:  # noqa: BLE001 - whatever it is, the old settings stay
            self._reject(f"{type(error).__name__}: {error}")
            return
        self._running = read.values
        self._log.info(
            "settings.reloaded",
            file=str(self._sources.path),
            changed=list(read.changed),
            needs_restart=list(read.waiting),
        )

    def _give_up(self) -> None:
        self._timer = None
        self._reject(f"the file could not be read within {self._patience:g} s")
        self._over()

    def _reject(self, reason: str) -> None:
        self._log.error("settings.refused", file=str(self._sources.path), reason=reason[:_LONGEST])


def _values(sources: Sources) -> Mapping[str, Any]:
    return {name: said.value for name, said in sources.loaded().said.items()}
