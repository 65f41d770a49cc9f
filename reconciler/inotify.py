"""Watching a folder straight from the kernel: a watchdog emitter of our own, on its `InotifyFD`.

The stock one holds up events behind an unpaired move for 500 ms, keeps silent when the kernel's
queue overflows, and stops for good when the folder is removed. Here a folder that is absent,
removed, moved or made again is ordinary life: the chain of folders above it is watched too, for
their own moving and removal, and for what is missing to appear.

Events are read by the owner's event loop, and not by a thread: whoever removes files makes
events, and a thread that reads them at once would take the interpreter from the very work that
made them.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from watchdog.events import DirCreatedEvent, FileSystemEvent
from watchdog.observers.api import BaseObserver, EventEmitter, EventQueue, ObservedWatch
from watchdog.observers.inotify_c import (
    CallbackId,
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchDescriptor,
)

from reconciler.layout import concerns

_SELF = Mask(InotifyConstants.IN_DELETE_SELF | InotifyConstants.IN_MOVE_SELF)
_ENTRIES = Mask(
    _SELF
    | InotifyConstants.IN_CREATE
    | InotifyConstants.IN_DELETE
    | InotifyConstants.IN_MOVE
    | InotifyConstants.IN_ATTRIB
    | InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_EXCL_UNLINK
    | InotifyConstants.IN_ONLYDIR
)
_APPEARING = Mask(
    _SELF
    | InotifyConstants.IN_CREATE
    | InotifyConstants.IN_MOVED_TO
    | InotifyConstants.IN_ATTRIB
    | InotifyConstants.IN_ONLYDIR
)
_ABOVE = Mask(_SELF | InotifyConstants.IN_ATTRIB | InotifyConstants.IN_ONLYDIR)
_PARENT = Mask(_ABOVE | InotifyConstants.IN_DELETE | InotifyConstants.IN_MOVED_TO)
# A folder that somebody holds open, as we do, gives no notice of its own removal; and a
# link never gives one when it is turned elsewhere.
_OURS = CallbackId(1)
_BUFFER = 64 * 1024  # bytes of events read at once, so some 1,000: 5 ms of the loop

Chain = tuple[tuple[str, int, int, tuple[int, int, bool]], ...]
"""The existing folders from the root down: device, inode, and whose they are: mode, owner,
and whether we may read it. What others may do there decides whether it is acted upon."""


class Events:
    """The descriptors of a watcher, opened before it starts: who has none cannot watch.

    The events of all inotify instances are read in one place, by the owner. Changed mounts
    bring no event, and lead a path elsewhere: the emitter waits for them, as it does for
    the bell that asks it to look at the chain.
    """

    def __init__(self) -> None:
        self.named: set[str] = set()
        self.overflows = 0
        self._inotifies: dict[int, _Inotify] = {}
        self._epoll = select.epoll()
        self.descriptor: int | None = self._epoll.fileno()
        try:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._epoll.close()
            raise
        self._mounts = -1
        self._waiting = select.poll()
        self._waiting.register(self._bell, select.POLLIN)
        with contextlib.suppress(OSError):  # without it the resync has to do
            self._mounts = os.open("/proc/self/mounts", os.O_RDONLY | os.O_CLOEXEC)
            self._waiting.register(self._mounts, select.POLLPRI)

    def close(self) -> None:
        """Give the descriptors back. May be called twice."""
        if self.descriptor is None:
            return
        self.descriptor = None
        self._epoll.close()
        os.close(self._bell)
        if self._mounts >= 0:
            os.close(self._mounts)

    def ring(self) -> None:
        """End the wait that is under way, or the next one."""
        os.eventfd_write(self._bell, 1)

    def wait(self) -> bool:
        """Wait for the bell or for changed mounts; whether the bell was rung."""
        ready = {descriptor for descriptor, _ in self._waiting.poll()}
        if self._bell in ready:
            os.eventfd_read(self._bell)
        return self._bell in ready

    def add(self, descriptor: int, inotify: _Inotify) -> None:
        """Read this instance's events, too."""
        self._epoll.register(descriptor, select.EPOLLIN)
        self._inotifies[descriptor] = inotify

    def drop(self, descriptor: int) -> None:
        """Before it is closed: its number may be another's at once."""
        if self._inotifies.pop(descriptor, None):
            self._epoll.unregister(descriptor)

    def entry(self, name: bytes) -> None:
        """Something has happened to an entry of the sessions folder."""
        if name.startswith(b"."):
            return  # no session's; as removals hide what they take, most are of that kind
        if sid := concerns(os.fsdecode(name)):
            self.named.add(sid)

    def read(self) -> frozenset[str]:
        """The sessions that events have named; never waits."""
        for descriptor, _ in self._epoll.poll(0):
            if inotify := self._inotifies.get(descriptor):
                inotify.tell()
        named = frozenset(self.named)
        self.named.clear()
        return named


class _Inotify(InotifyFD):
    """One inotify instance, without the thread that would read it.

    Gives its descriptors back even if it failed half made.
    """

    entries = WatchDescriptor(-1)
    """The watch on the sessions folder itself."""
    _inotify_fd = -1

    def __init__(self, events: Events) -> None:
        try:
            super().__init__()
        except OSError:  # its own descriptor may have been the last one
            if self._inotify_fd >= 0:
                os.close(self._inotify_fd)
            raise
        self._is_reading = False
        os.set_blocking(self._inotify_fd, False)
        self._events = events
        try:
            events.add(self._inotify_fd, self)
        except OSError:
            self.stop()
            raise

    def tell(self) -> None:
        """Read what there is, once, and tell whom it concerns."""
        for wd, mask, cookie, name in self._parse_event_buffer(self._read()):
            if name and wd == self.entries:  # by far the most, so by the shortest way
                self._events.entry(name)
            else:
                self.handle_event(InotifyEvent(wd, mask, cookie, name))

    def _read(self) -> bytes:
        with self._lock, contextlib.suppress(BlockingIOError):  # who closes takes it, too
            return b"" if self._closed else os.read(self._inotify_fd, _BUFFER)
        return b""

    def _close_resources(self) -> None:
        self._events.drop(self._inotify_fd)
        super()._close_resources()


class _Laid:
    """One laying of the chain: an inotify instance and what its watches mean."""

    def __init__(self, emitter: _FolderEmitter, chain: Chain) -> None:
        self.emitter = emitter
        self.chain = chain
        self._inotify = _Inotify(emitter.events)
        self._current = True
        try:
            self._add_watches(emitter.path)
        except OSError:
            self._inotify.stop()
            raise

    def _add_watches(self, target: str) -> None:
        watched: set[tuple[int, int]] = set()
        for depth in range(len(self.chain), 0, -1):
            path, device, inode, (_, _, readable) = self.chain[depth - 1]
            # An ancestor may only be passed through, or come twice ("..", a link).
            if not readable or (device, inode) in watched:
                continue
            watched.add((device, inode))
            link: _FolderAbove
            if path == target:
                mask, link = _ENTRIES, _SessionsFolder(self)
            else:
                child = os.fsencode(Path(target).parts[depth])
                mask, link = self._mask(depth), _FolderAbove(self, child)
            wd = self._inotify.add_callback(os.fsencode(path), mask, link, _OURS)
            if path == target:
                self._inotify.entries = wd

    def _mask(self, depth: int) -> Mask:
        """What to ask of a folder above: the more, the less its child tells itself."""
        if depth == len(self.chain):
            return _APPEARING
        is_parent = depth == len(self.chain) - 1
        return _PARENT if is_parent or os.path.islink(self.chain[depth][0]) else _ABOVE

    def changed(self) -> None:
        """Something of the chain moved, went or appeared."""
        if self._current:
            self.emitter.rearm()

    def stop(self) -> None:
        self._current = False
        self._inotify.stop()


class _FolderAbove:
    """A watch on a folder above: its own fate, and that of the next one in the chain."""

    def __init__(self, laid: _Laid, child: bytes = b"") -> None:
        self._laid = laid
        self._child = child

    def on_event(self, event: InotifyEvent) -> None:
        if event.name not in {b"", self._child}:
            return
        if event.mask & InotifyConstants.IN_ATTRIB:  # it may be readable now, or not any more
            self._laid.emitter.recheck()
        else:
            self._laid.changed()

    def on_watch_deleted(self, wd: WatchDescriptor) -> None:
        del wd
        self._laid.changed()

    def on_queue_overflow(self) -> None:  # the sessions folder's watch counts it
        self._laid.changed()


class _SessionsFolder(_FolderAbove):
    """The watch on the sessions folder itself; its entries are told of elsewhere."""

    def on_queue_overflow(self) -> None:
        self._laid.emitter.events.overflows += 1
        self._laid.emitter.ask_for_all()


class _FolderEmitter(EventEmitter):
    """Watches the folder's entries and the chain above it, straight from the kernel.

    Its own thread sleeps until the chain may have changed, and lays it anew.
    """

    def __init__(
        self,
        event_queue: EventQueue,
        watch: ObservedWatch,
        *,
        timeout: float = 1.0,
        event_filter: list[type[FileSystemEvent]] | None = None,
        events: Events,
        complain: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(event_queue, watch, timeout=timeout, event_filter=event_filter)
        self.path = str(watch.raw_path)  # its ``path`` is another one where a file stands
        self.events = events
        self._complain = complain
        self._lock = threading.Lock()
        self._laid: _Laid | None = None
        self._complaint = ""

    def on_thread_start(self) -> None:
        self._lay()

    def on_thread_stop(self) -> None:
        self.rearm()
        with self._lock:
            if self._laid is not None:
                self._laid.stop()

    def queue_events(self, timeout: float) -> None:
        del timeout
        if self.events.wait() or self._leads_elsewhere():
            self._lay()

    def rearm(self) -> None:
        """The chain may have changed: lay it anew, in the emitter's thread."""
        self.events.ring()

    def recheck(self) -> None:
        """Lay the chain anew if the path leads elsewhere than when it was laid."""
        if self._leads_elsewhere():
            self.rearm()

    def _leads_elsewhere(self) -> bool:
        return self._laid is None or self._laid.chain != _chain(self.path)

    def ask_for_all(self) -> None:
        """Events may have been lost."""
        self.queue_event(DirCreatedEvent(self.path))

    def _lay(self) -> None:
        """Watch the chain as it is now, then ask for a full look.

        The watches come first and the look after them, so that nothing falls in
        between; a chain that changed while it was laid is laid once more. Where nothing
        was watched and still is not, nothing is asked for: a full look lays again.
        """
        with self._lock:
            if not self.should_keep_running():
                return
            before, chain = self._laid, _chain(self.path)
            try:
                self._laid, complaint = _Laid(self, chain), ""
            except OSError as error:
                self._laid, complaint = None, f"cannot be watched: {error.strerror}"
            if before is not None:
                before.stop()
        if _chain(self.path) != chain:  # so a folder may have gone before it was watched
            self.rearm()
        else:
            self._tell(complaint)
        if self._laid is not None or before is not None:
            self.ask_for_all()

    def _tell(self, complaint: str) -> None:
        if complaint and complaint != self._complaint:
            self._complain(f"{self.path} {complaint}")
        self._complaint = complaint


def _chain(target: str) -> Chain:
    """The folders from the root to ``target`` that are there."""
    chain = []
    for path in (*reversed(Path(target).parents), Path(target)):
        try:
            status = os.stat(path)
        except OSError:
            break
        if not stat.S_ISDIR(status.st_mode):
            break
        rights = (status.st_mode, status.st_uid, os.access(path, os.R_OK))
        chain.append((str(path), status.st_dev, status.st_ino, rights))
    return tuple(chain)


def observer(events: Events, complain: Callable[[str], None]) -> BaseObserver:
    """What drives the emitter; ``complain`` hears why the folder cannot be watched."""
    return BaseObserver(_FolderEmitter, events=events, complain=complain)
