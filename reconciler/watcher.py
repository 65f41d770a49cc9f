"""File events become hints: "look at this session", or "look at all".

A watchdog observer drives it. On Linux its emitter is our own, see `reconciler.inotify`.

Nobody acts on what an event says: it only names where to look.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers.api import BaseObserver

from reconciler.hints import LOOK_AT_ALL
from reconciler.layout import concerns

if sys.platform == "linux":
    from reconciler.inotify import Events, observer
else:

    class Events:
        """Nothing is read here: all hints come from the observer's thread."""

        overflows = 0
        descriptor: int | None = None

        def close(self) -> None:
            """There is nothing to give back."""

        def read(self) -> frozenset[str]:
            """No session: nothing is read here."""
            return frozenset()

    def observer(events: Events, complain: Callable[[str], None]) -> BaseObserver:
        """The stock observer of this system."""
        from watchdog.observers import Observer  # noqa: PLC0415 - Linux does without it

        del events, complain
        return Observer()


Hint = Callable[[str], None]
"""Takes a session id or `LOOK_AT_ALL`. Called from a thread of the watcher."""


class SessionsWatcher:
    """Watches one sessions folder, whether it exists or not.

    Args:
        folder: the path to watch.
        hint: called with hints, from a thread of the watcher.
        complain: called with the reason when the folder cannot be watched; the resync
            then has to do.

    Where `descriptor` is one, its owner calls `read` in one thread whenever it is readable.

    Raises:
        OSError: no descriptor is left.
    """

    def __init__(
        self, folder: Path, hint: Hint, complain: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder = folder.absolute()
        self._handler = _Handler(hint)
        self._complain = complain
        self._observer: BaseObserver | None = None
        self._events = Events()

    @property
    def descriptor(self) -> int | None:
        """Readable when `read` has something to tell, until `stop` is called.

        None elsewhere than on Linux: all hints come from threads there.
        """
        return self._events.descriptor

    @property
    def overflows(self) -> int:
        """How often the system's queue of events ran over, and events were lost."""
        return self._events.overflows

    def read(self) -> frozenset[str]:
        """The sessions that events have named; never waits."""
        return self._events.read()

    def start(self) -> None:
        """Begin to watch. All that happens from now on brings a hint."""
        watch = observer(self._events, self._complain)
        watch.schedule(self._handler, str(self._folder), recursive=False)
        watch.start()
        self._observer = watch  # one that has not begun cannot be ended

    def stop(self) -> None:
        """End the watch and its threads. May be called twice."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None
        self._events.close()

    def recheck(self) -> None:
        """Make sure that what is watched is what the path leads to now (for the resync)."""
        for emitter in self._observer.emitters if self._observer else ():
            recheck: Callable[[], None] = getattr(emitter, "recheck", _nothing)
            recheck()


def _nothing() -> None:
    """Stock emitters have nothing to check."""


class _Handler(FileSystemEventHandler):
    def __init__(self, hint: Hint) -> None:
        self._hint = hint

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.is_directory:
            self._hint(LOOK_AT_ALL)
            return
        for path in (event.src_path, event.dest_path):
            if path and (sid := concerns(os.path.basename(os.fsdecode(path)))):
                self._hint(sid)
