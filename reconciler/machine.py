"""What this machine has to offer, as `doctor` asks for it. Nothing is changed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

from reconciler.doctor import WatchFacts
from reconciler.folder import SO_PEERPIDFD


def watches(place: Path) -> WatchFacts:
    """Try to watch a folder, for a moment, as the daemon would."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "inotify_init1"):
        return WatchFacts(available=False)
    facts = WatchFacts(
        instances=_number_in("/proc/sys/fs/inotify/max_user_instances"),
        watches=_number_in("/proc/sys/fs/inotify/max_user_watches"),
    )
    descriptor = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        return replace(facts, no_instance=os.strerror(ctypes.get_errno()))
    try:
        delete_self = 0x400  # the rarest event: it is not waited for
        if libc.inotify_add_watch(descriptor, os.fsencode(place), delete_self) < 0:
            return replace(facts, no_watch=os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)
    return facts


def _number_in(path: str) -> int | None:
    with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
        return int(file.read(32))
    return None


def most_descriptors() -> int | None:
    """How many descriptors a process of ours may have, at most; None: no limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if hard == resource.RLIM_INFINITY else hard


def has_pidfds() -> bool:
    """Whether a process can be held."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def has_peer_pidfds() -> bool:
    """Whether the kernel names who listens on a socket, safe from recycled pids."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            os.close(ours.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError:
            return False
    return True


def is_synchronized() -> bool | None:
    """Whether the clock goes by others; None where that cannot be told."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "adjtimex"):
        return None
    timex = ctypes.create_string_buffer(512)  # struct timex: 208 bytes, `modes` 0: it only reads
    state: int = libc.adjtimex(timex)
    unsynchronized = 5  # TIME_ERROR
    return None if state < 0 else state != unsynchronized


def suspended() -> float:
    """Seconds since boot for which the machine slept; 0.0 where that cannot be told."""
    asleep = 0.0
    if sys.platform == "linux":
        asleep = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return asleep
