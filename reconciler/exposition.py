"""What the running reconciler answers over HTTP: ``/metrics`` and ``/healthz``.

It is off unless an address is given, and open to this machine alone unless more is asked
for: nothing is encrypted, and nobody is asked who they are. Each request has a thread, so
that a loop that is stuck can still be told of.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from reconciler import __version__
from reconciler.errors import InvalidRequestError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

AT_ONCE: Final = 16
"""Requests that are answered at once; one more is hung up on. Each takes a thread and a
descriptor, and those are for the sessions."""

PATIENCE: Final = 5.0
"""Seconds that a client may be silent within its request; and those that it may take in all, where
there is no room for another."""


_LOOK_UP: Final = 3600.0 if sys.platform == "linux" else 0.5
# Seconds after which the server wakes by itself to see whether it is to end. On Linux what
# closes it wakes it.


@dataclass(frozen=True, slots=True)
class Health:
    """What ``/healthz`` tells, as JSON.

    Attributes:
        healthy: the loop turns, and the folder can be acted upon.
        reason: why not; empty when healthy.
        sessions: how many are known.
        loop_silence_s: seconds since the event loop's last beat.
        version: the program's.
    """

    healthy: bool
    reason: str
    sessions: int
    loop_silence_s: float
    version: str = __version__


class Exposition:
    """An HTTP server on one address. It is bound when made, and answers from `start` on.

    Args:
        host: a name or an address.
        port: 0 for any that is free.
        public: other machines may be let in.

    Attributes:
        port: the one that is bound.

    Raises:
        InvalidRequestError: other machines would be let in, and ``public`` does not allow it;
            or there is no such host.
        OSError: the address cannot be bound.
    """

    def __init__(self, host: str, port: int, *, public: bool = False) -> None:
        family, address = _resolved(host, port)
        if not public and not ipaddress.ip_address(address).is_loopback:
            raise InvalidRequestError(
                f"{host!r} lets other machines in, and nothing there is encrypted or asks for a "
                "password: use 127.0.0.1, or allow it (--metrics-public, metrics.public = true)"
            )
        self._server = _Server.at(family, address, port)
        self.port: int = self._server.server_port
        self._thread: threading.Thread | None = None

    def start(self, registry: CollectorRegistry, health: Callable[[], Health]) -> None:
        """Answer from now on, in threads."""
        self._server.set_app(_app(registry, health))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_LOOK_UP,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Answer no more. May be called twice."""
        if self._thread is not None:
            with contextlib.suppress(OSError):  # its wait for a request ends with this
                self._server.socket.shutdown(socket.SHUT_RDWR)
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()


def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """The address that is bound is the one that was looked at: a name is asked for once."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InvalidRequestError(f"{host!r} is no host that is known here: {error}") from None
    family, _, _, _, address = found[0]
    return family, str(address[0])


def _app(registry: CollectorRegistry, health: Callable[[], Health]) -> WSGIApplication:
    metrics = make_wsgi_app(registry)

    def answer(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                return metrics(environ, respond)  # type: ignore[no-any-return] # it is untyped
            case "/healthz":
                told = health()
                status = HTTPStatus.OK if told.healthy else HTTPStatus.SERVICE_UNAVAILABLE
                body, kind = json.dumps(asdict(told)) + "\n", "application/json"
            case _:
                status, kind = HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8"
                body = "there are /metrics and /healthz\n"
        headers = [("Content-Type", kind), ("Cache-Control", "no-store")]
        respond(f"{status.value} {status.phrase}", headers)
        return [body.encode()]

    return answer


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401 - its own names
        """Say nothing: the log is for what happens to sessions."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128  # who finds the queue full comes again after a second, and more

    @classmethod
    def at(cls, family: socket.AddressFamily, address: str, port: int) -> _Server:
        cls = type(cls.__name__, (cls,), {"address_family": family})  # noqa: PLW0642 - as they want it
        return cls((address, port), _Handler)

    def __init__(self, *arguments: Any) -> None:  # noqa: ANN401 - its own
        self._free = threading.BoundedSemaphore(AT_ONCE)
        self._begun: dict[socket.socket, float] = {}  # requests that are open, since when
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def server_bind(self) -> None:
        """Bind, without asking the network for our own name as the base class does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - its own
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            self._make_room()
            return
        with self._lock:
            self._begun[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self._free.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - its own
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401 - its own
        """Close it."""
        with self._lock:
            self._begun.pop(request, None)
        super().shutdown_request(request)

    def _make_room(self) -> None:
        """Hang up on those who take too long: who sends a byte now and then is never silent."""
        with self._lock:  # none of them is closed meanwhile
            for request, begun in self._begun.items():
                if begun + PATIENCE < time.monotonic():
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - its own
        """A client that broke off is no news."""
