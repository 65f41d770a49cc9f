"""For the tests of those who write to keepers: a keeper that behaves as told, no waiting.

Everything here is real: a socket in a folder, a pid file, a process that dies. Needs Linux.

    with FakeKeeper(folder, "s1", Behaviour.RESET, after=10), no_waiting():
        assert BlockingRpcWriter(folder).write("s1", {"type": "prompt"}).outcome is UNCONFIRMED
"""

from __future__ import annotations

import contextlib
import enum
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from reconciler import exchanges, layout
from reconciler.fake_socket import BACKLOG, fill_backlog, listening

_READ = 65536
_KEY_MARK: Final = b"\x01"
_PATIENCE = 10.0  # seconds for things that take some milliseconds


class Behaviour(enum.Enum):
    """What a fake keeper does. ``after`` is a count of bytes, for each connection anew."""

    RECEIPT = "receipt"
    """Reads everything, and closes when the client has closed its sending side."""
    REFUSE = "refuse"
    """Its files are there and nobody listens: what a killed keeper leaves."""
    NO_ACCEPT = "no_accept"
    """Listens and never accepts, and its backlog is full."""
    STALL = "stall"
    """Accepts, reads ``after`` bytes, and then no more."""
    CLOSE = "close"
    """Reads ``after`` bytes and closes: an end of stream where there is no more to read."""
    RESET = "reset"
    """Reads ``after`` bytes, waits until there is more, and closes with that unread."""
    DIE = "die"
    """A process of its own that reads ``after`` bytes (0: waits for one) and is SIGKILLed."""


class FakeKeeper:
    """A keeper without an agent: a context manager that is ready once entered.

    To a writer it is another program's keeper: its receipt is ``Reason.HANDED_ON``.

    Args:
        folder: the sessions folder, made if it is not there.
        sid: the session.
        behaviour: what it does with connections.
        after: bytes it reads of each, where the behaviour says so.
        keys: show and understand keys: of the lines with a key the first one counts, and
            the others are taken and forgotten.

    Attributes:
        pid: of the process that listens; this process, except for `Behaviour.DIE`.
    """

    def __init__(
        self,
        folder: Path,
        sid: str,
        behaviour: Behaviour = Behaviour.RECEIPT,
        *,
        after: int = 0,
        keys: bool = False,
    ) -> None:
        self.folder = folder
        self.sid = layout.check_sid(sid)
        self.behaviour = behaviour
        self.after = after
        self.keys = keys
        self.pid = 0
        self._lines = _Lines(keys=keys)
        self._stack = contextlib.ExitStack()

    @property
    def socket_path(self) -> Path:
        """Where its socket is."""
        return self.folder / layout.file_name(layout.Role.SOCKET, self.sid)

    @property
    def pid_path(self) -> Path:
        """Where its pid file is."""
        return self.folder / layout.file_name(layout.Role.PID_FILE, self.sid)

    @property
    def received(self) -> tuple[bytes, ...]:
        """The lines it got, without LF and key, in the order in which they were complete."""
        return self._lines.complete()

    def wait_received(self, count: int, timeout: float = _PATIENCE) -> tuple[bytes, ...]:
        """Wait until it got so many lines, and give all.

        Raises:
            TimeoutError: it got fewer within ``timeout`` seconds.
        """
        return self._lines.wait(count, timeout)

    def say_pid(self, text: str | None) -> None:
        """Make the pid file say this; None removes it."""
        self.pid_path.unlink(missing_ok=True)
        if text is not None:
            self.pid_path.write_text(text, encoding="ascii")

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if self.behaviour is Behaviour.DIE:
                self.pid = stack.enter_context(_process(self, self._lines))
            else:
                self.pid = os.getpid()
                self._listen(stack)
            stack.callback(self._remove_files)
            self.say_pid(str(self.pid))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _listen(self, stack: contextlib.ExitStack) -> None:
        backlog = 0 if self.behaviour is Behaviour.NO_ACCEPT else BACKLOG
        listener = stack.enter_context(
            listening(self.folder, self.sid, keys=self.keys, backlog=backlog)
        )
        match self.behaviour:
            case Behaviour.REFUSE:
                listener.close()
            case Behaviour.NO_ACCEPT:
                fill_backlog(stack, self.folder, self.sid)
            case _:
                stack.enter_context(_Loop(listener, self.behaviour, self.after, self._lines))

    def _remove_files(self) -> None:
        self.socket_path.unlink(missing_ok=True)
        self.pid_path.unlink(missing_ok=True)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Remove the waiting between the attempts of every writer; their number stays."""
    before = exchanges.Switches.backoff
    exchanges.Switches.backoff = False
    try:
        yield
    finally:
        exchanges.Switches.backoff = before


class _Lines:
    """The complete lines that came in."""

    def __init__(self, *, keys: bool) -> None:
        self._changed = threading.Condition()
        self._complete: list[bytes] = []
        self._keys: set[bytes] | None = set() if keys else None

    def add(self, lines: list[bytes]) -> None:
        with self._changed:
            for line in lines:
                self._add(line)
            self._changed.notify_all()

    def _add(self, line: bytes) -> None:
        if self._keys is not None and line.startswith(_KEY_MARK):
            key, _, line = line[1:].partition(_KEY_MARK)
            if key in self._keys:
                return
            self._keys.add(key)
        self._complete.append(line)

    def complete(self) -> tuple[bytes, ...]:
        with self._changed:
            return tuple(self._complete)

    def wait(self, count: int, timeout: float) -> tuple[bytes, ...]:
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._complete) >= count, timeout):
                raise TimeoutError(f"{len(self._complete)} of {count} lines after {timeout} s")
            return tuple(self._complete)


class _Connection:
    """One client of the loop: how many bytes are still to be read, and an unfinished line."""

    def __init__(self, sock: socket.socket, left: int) -> None:
        self.sock = sock
        self.left = left
        self.rest = b""


class _Loop:
    """Serves connections in a thread of its own, until it is left."""

    def __init__(
        self, listener: socket.socket, behaviour: Behaviour, after: int, lines: _Lines
    ) -> None:
        self._listener = listener
        self._behaviour = behaviour
        self._after = after
        self._lines = lines
        self._selector = selectors.DefaultSelector()
        self._connections: set[socket.socket] = set()
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="fake keeper", daemon=True)

    def __enter__(self) -> Self:
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._stopped, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.join()
        for sock in (*self._connections, self._stopped):
            sock.close()
        self._selector.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._stopped:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._serve(key.data)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:  # it has gone already
            return
        sock.setblocking(False)
        if self._behaviour is Behaviour.CLOSE and not self._after:
            sock.close()
            return
        self._connections.add(sock)
        if self._behaviour is not Behaviour.STALL or self._after:
            self._selector.register(sock, selectors.EVENT_READ, _Connection(sock, self._after))

    def _serve(self, connection: _Connection) -> None:
        bounded = self._behaviour is not Behaviour.RECEIPT
        if bounded and not connection.left:  # RESET, and there is more to read, or the end
            self._close(connection)
            return
        try:
            data = connection.sock.recv(min(connection.left, _READ) if bounded else _READ)
        except ConnectionError:
            data = b""
        *lines, connection.rest = (connection.rest + data).split(b"\n")
        if not data and connection.rest and not connection.rest.startswith(_KEY_MARK):
            lines.append(connection.rest)
        self._lines.add(lines)
        connection.left -= len(data)
        if not data or (self._behaviour is Behaviour.CLOSE and not connection.left):
            self._close(connection)
        elif self._behaviour is Behaviour.STALL and not connection.left:
            self._selector.unregister(connection.sock)

    def _close(self, connection: _Connection) -> None:
        self._selector.unregister(connection.sock)
        self._connections.discard(connection.sock)
        connection.sock.close()


_READY: Final = b"ready\n"
_CHILD: Final = "import sys; from reconciler.testing import _serve_and_die as go; go(sys.argv[1:])"


@contextlib.contextmanager
def _process(keeper: FakeKeeper, lines: _Lines) -> Iterator[int]:
    """A process that listens, tells what it reads, and dies as told. Yields its pid."""
    arguments = [os.fspath(keeper.folder), keeper.sid, str(keeper.after), str(int(keeper.keys))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, *arguments],
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        told = process.stdout
        if told is None or told.readline() != _READY:
            raise RuntimeError("the fake keeper did not start")
        reader = threading.Thread(target=_relay, args=(told.fileno(), lines), daemon=True)
        reader.start()
        try:
            yield process.pid
        finally:
            process.kill()
            process.wait()
            reader.join()


def _relay(descriptor: int, lines: _Lines) -> None:
    rest = b""
    while data := os.read(descriptor, _READ):
        *complete, rest = (rest + data).split(b"\n")
        lines.add(complete)


def _serve_and_die(arguments: list[str]) -> None:
    """Run as the fake keeper's own process."""
    folder, sid, after, keys = arguments
    listener = listening(Path(folder), sid, keys=bool(int(keys)))
    os.write(1, _READY)
    while True:
        client, _ = listener.accept()
        with client:
            _read_and_die(client, int(after))


def _read_and_die(client: socket.socket, after: int) -> None:
    """Die in the middle of a connection, or return at its end."""
    if not after and not client.recv(1, socket.MSG_PEEK):
        return
    while after:
        data = client.recv(min(after, _READ))
        if not data:
            return
        os.write(1, data)
        after -= len(data)
    os.kill(os.getpid(), signal.SIGKILL)
