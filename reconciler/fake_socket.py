"""The socket of a fake keeper: bound in its folder, however long the path of that is."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from reconciler.layout import Role, file_name

BACKLOG: Final = 128
"""How many connections may wait to be accepted."""

_BIND: Final = """
import socket, sys
try:
    socket.socket(fileno=int(sys.argv[1])).bind(sys.argv[2])
except OSError as error:
    sys.exit(error.errno)
"""


@contextlib.contextmanager
def _address(folder: Path, sid: str) -> Iterator[str]:
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{file_name(Role.SOCKET, sid)}"
    finally:
        os.close(descriptor)


def listening(folder: Path, sid: str, *, keys: bool, backlog: int = BACKLOG) -> socket.socket:
    """A listener on a session's socket.

    Args:
        folder: the sessions folder.
        sid: the session.
        keys: it is bound by the name that shows that keys are understood.
        backlog: how many may wait to be accepted.

    Raises:
        OSError: it cannot be bound.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if keys:
            _bind_and_show_keys(listener, folder, sid)
        else:
            with _address(folder, sid) as address:
                listener.bind(address)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def _bind_and_show_keys(listener: socket.socket, folder: Path, sid: str) -> None:
    """From within the folder, which only a process of its own can be in."""
    shown = ".//" + file_name(Role.SOCKET, sid)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _BIND, str(listener.fileno()), shown],
        cwd=folder,
        pass_fds=[listener.fileno()],
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise OSError(done.returncode, os.strerror(done.returncode))


def fill_backlog(stack: contextlib.ExitStack, folder: Path, sid: str) -> None:
    """Connect to a session's socket until no more fit in its queue.

    Args:
        stack: closes the connections.
        folder: the sessions folder.
        sid: the session.
    """
    with _address(folder, sid) as address, contextlib.suppress(BlockingIOError):
        while True:
            client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            client.setblocking(False)
            client.connect(address)
