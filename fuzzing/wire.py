"""The wire inside the keeper: what its clients send in pieces, and what the agent must get.

An input is a script of what clients, the agent and the clock do, one short step after the
other. The wire is the keeper's own, over a real socket, a real pipe and a real epoll; only the
clock is moved by hand, the log is listened to, and the limits are small enough to be reached.

The oracle knows nothing of chunks and stores. It reads each client's bytes as the documents
say, and asks: is what the agent got these clients' whole lines, each client's in order, the
line of a remembered key once, nothing in halves? Has a client that saw end-of-stream all its
lines in the pipe, at whatever step the keeper was killed? Is everybody answered in the end?
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from fcntl import F_SETPIPE_SZ, fcntl
from typing import Any, cast
from unittest import mock

from fuzzing.target import Target, ViolationError, expect, pure
from reconciler import keeper_process

KEY_MARK, LF = b"\x01", b"\n"
SLOTS = 3  # clients at a time
CLIENTS = 6  # in a script
PIPE = 4096  # bytes, the least that the kernel gives
ROUNDS = 3000  # of the loop, in which everybody must have been answered

TINY = {"CHUNK": 16, "SHORT_LINE": 8, "LONG_LINE": 48, "LAST_PIECE": 24, "KEY_LENGTH": 8, "KEYS": 3}
PAGED = TINY | {"CHUNK": 6000, "SHORT_LINE": 2000, "LONG_LINE": 20_000, "LAST_PIECE": 9000}
LIMITS = (
    TINY | {"LEASE_BYTES": 16, "SAFE_TO_HOLD": 4, "MAX_CONNECTIONS": 16},
    PAGED | {"LEASE_BYTES": 3000, "SAFE_TO_HOLD": 64, "MAX_CONNECTIONS": 2},
)
"""Small enough for short scripts; the second has pieces over the pipe's 4096 bytes."""


class End(enum.Enum):
    """How a client's connection has ended for it."""

    UNSEEN = enum.auto()
    """It hung up itself, or never asked for a receipt."""
    RECEIPT = enum.auto()
    RESET = enum.auto()


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a client, as the documents read its bytes."""

    text: bytes
    key: bytes = b""
    refused: bool = False
    """Over the limit: only skipped, if its key is known, or the end of the connection."""
    optional: bool = False
    """A last piece that may be taken or refused."""


@dataclass(slots=True)
class Client:
    """One client: what it sent, and how it ended."""

    sock: socket.socket
    tag: bytes
    sent: bytearray = field(default_factory=bytearray)
    shut: bool = False
    gone: bool = False
    waited: bool = False
    """The clock went on while it was connected: its last byte may have been taken."""
    end: End = End.UNSEEN


class Clock:
    """Stands for the module ``time`` in the keeper; it goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Heard:
    """Stands for the keeper's log."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()

    def say_rarely(self, kind: str, message: str, **more: object) -> None:
        del message, more
        self.kinds.add(kind)

    def say(self, level: str, event: str, message: str, **more: object) -> None:
        del level, message, more
        self.kinds.add(event)


class Scene:
    """A wire, its clients and its agent, driven by the steps of a script."""

    def __init__(self, limits: dict[str, int], clock: Clock, held: contextlib.ExitStack) -> None:
        self.limits = limits
        self.clock = clock
        self.heard = Heard()
        self.clients: list[Client] = []
        self.got = bytearray()
        self._held = held
        self._slots: list[Client | None] = [None] * SLOTS
        self._agent, self._pipe = os.pipe()
        held.callback(os.close, self._agent)
        held.callback(os.close, self._pipe)
        for descriptor in (self._agent, self._pipe):
            os.set_blocking(descriptor, False)
        fcntl(self._pipe, F_SETPIPE_SZ, PIPE)
        self._listener = held.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind("")  # the kernel gives an abstract name
        self._listener.listen()
        self._listener.setblocking(False)
        self._poller = keeper_process.Poller()
        log = cast("keeper_process.Log", self.heard)
        self.wire = keeper_process.Wire(self._poller, log, self._pipe)
        self.wire.open(self._listener)

    def client(self, slot: int) -> Client | None:
        """The client of a slot, connected if it has to be; None when there were enough."""
        known = self._slots[slot]
        if known is None and len(self.clients) < CLIENTS:
            sock = self._held.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(self._listener.getsockname())
            sock.setblocking(False)
            known = Client(sock, b"" if slot == 0 else b"%d" % slot)
            self._slots[slot] = known
            self.clients.append(known)
        return known

    def send(self, slot: int, data: bytes) -> None:
        """Send on a slot's connection, as far as it takes it."""
        client = self.client(slot)
        if client is not None and not client.shut and data:
            # All but the first slot sign their lines: it is clear whose they are.
            data = data.replace(LF, client.tag + LF)
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                client.sent += data[: client.sock.send(data)]

    def shut(self, slot: int) -> None:
        """Half-close, and so ask for the receipt."""
        client = self.client(slot)
        if client is not None and not client.shut:
            client.shut = True
            with contextlib.suppress(OSError):  # it was refused before
                client.sock.shutdown(socket.SHUT_WR)

    def hang_up(self, slot: int) -> None:
        """Close without waiting for anything."""
        client = self._slots[slot]
        if client is not None:
            self._slots[slot] = None
            client.gone = client.shut = True
            client.sock.close()

    def read(self, size: int) -> int:
        """Let the agent read; how much it got."""
        with contextlib.suppress(BlockingIOError):
            got = os.read(self._agent, size)
            self.got += got
            return len(got)
        return 0

    def pass_time(self, seconds: float) -> None:
        """Move the clock."""
        self.clock.now += seconds
        for client in self.clients:
            client.waited = True

    def turn(self) -> None:
        """One round of the keeper's loop."""
        for fd, eof in self._poller.poll(0):
            if fd == self._listener.fileno():
                self.wire.accept()
            elif fd == self._pipe:
                self.wire.room()
            else:
                self.wire.news(fd, eof=eof)
        self.wire.tick()
        self.wire.serve()

    def kill(self) -> None:
        """What SIGKILL leaves: all sockets closed as they are, and the pipe's content."""
        for connection in self.wire._connections.values():
            connection.sock.close()
        self._listener.close()
        while self.read(65536):
            pass
        for client in self.clients:
            if client.shut and not client.gone:
                _ended(client)

    def finish(self) -> None:
        """Everybody half-closes, the agent reads: all must be answered."""
        for slot in range(SLOTS):
            if self._slots[slot] is not None:
                self.shut(slot)
        for _ in range(ROUNDS):
            self.turn()
            if not self.read(65536) and not self.wire.work_waits():
                if not self.wire._connections and self._all_have_ended():
                    return
                if (due := self.wire.deadline()) < float("inf"):
                    self.pass_time(max(0.0, due - self.clock.now))
        ends = [client.end for client in self.clients]
        raise ViolationError(
            f"somebody has no answer: {ends}, {len(self.wire._connections)} are kept"
        )

    def _all_have_ended(self) -> bool:
        ended = [client.gone or _ended(client) for client in self.clients]
        return all(ended)

    def close(self) -> None:
        """Let go of what the wire holds."""
        for connection in self.wire._connections.values():
            connection.sock.close()


def _ended(client: Client) -> bool:
    """Whether the client has seen how it ended."""
    if client.end is End.UNSEEN:
        try:
            expect(client.sock.recv(1) == b"", "the keeper sent something")
            client.end = End.RECEIPT
        except BlockingIOError:
            pass
        except ConnectionResetError:
            client.end = End.RESET
    return client.end is not End.UNSEEN


# --- the oracle ---------------------------------------------------------------------------


def said(client: Client, limits: dict[str, int]) -> tuple[list[Line], bool]:
    """A client's lines as the documents read them, and whether its last one is broken off."""
    stream = bytes(client.sent)
    if stream[:1] == KEY_MARK:
        return _said_with_keys(stream, limits)
    *whole, last = stream.split(LF)
    lines = [Line(text + LF, refused=len(text) > limits["LONG_LINE"]) for text in whole]
    if not client.shut or not last:
        return lines, bool(last)
    if len(last) > limits["LONG_LINE"] or not _is_json(last):
        return lines, True
    spare = len(last) - limits["LAST_PIECE"]
    if spare > 1:
        return lines, True
    return [*lines, Line(last + LF, optional=spare > 0 or client.waited)], False


def _is_json(piece: bytes) -> bool:
    try:
        return isinstance(json.loads(piece), dict | list)
    except (ValueError, RecursionError):
        return False


def _said_with_keys(stream: bytes, limits: dict[str, int]) -> tuple[list[Line], bool]:
    lines: list[Line] = []
    while stream:
        key, mark, rest = stream[1:].partition(KEY_MARK)
        if stream[:1] != KEY_MARK or not mark or not 1 <= len(key) <= limits["KEY_LENGTH"]:
            return lines, True
        text, end, stream = rest.partition(LF)
        if not end:
            return lines, True
        lines.append(Line(text + LF, key, refused=len(text) > limits["LONG_LINE"]))
    return lines, False


State = tuple[tuple[int, ...], tuple[bytes, ...]]
"""How many of each client's lines are dealt with, and the keys that are remembered."""


class Oracle:
    """Follows what the agent got, line by line, through all ways in which it could come about."""

    def __init__(self, scene: Scene) -> None:
        self._keys = scene.limits["KEYS"]
        self._said = [said(client, scene.limits) for client in scene.clients]
        self._clients = scene.clients
        self._safe = scene.limits["SAFE_TO_HOLD"]
        self._pushed_out = bool(scene.heard.kinds & {"slow_line", "no_room"})

    def judge(self, got: bytes, *, killed: bool) -> None:
        """Raise a `ViolationError` unless this is what may be in the pipe."""
        *whole, half = got.split(LF)
        states = self._skipped({((0,) * len(self._said), ())})
        for number, text in enumerate(whole):
            states = self._skipped(self._after(states, text + LF))
            expect(states, f"line {number} of {got!r} is nobody's next")
        if half:
            expect(killed, f"the agent was left with half a line: {half!r}")
            expect(self._begun(states, half), f"{half!r} begins nobody's next line")
        expect(
            any(self._fits(state, killed=killed) for state in states),
            f"lines are missing in {got!r}: {self._said}, {[c.end for c in self._clients]}",
        )

    def _next(self, state: State) -> Iterator[tuple[int, Line]]:
        for number, done in enumerate(state[0]):
            lines, _ = self._said[number]
            if done < len(lines):
                yield number, lines[done]

    def _after(self, states: set[State], text: bytes) -> set[State]:
        found = set()
        for state in states:
            for number, line in self._next(state):
                if line.text == text and not line.refused and line.key not in state[1]:
                    keys = (*state[1], line.key)[-self._keys :] if line.key else state[1]
                    found.add((_step(state[0], number), keys))
        return found

    def _skipped(self, states: set[State]) -> set[State]:
        """These, and those in which lines of known keys are taken and not forwarded."""
        found, new = set(states), list(states)
        while new:
            state = new.pop()
            for number, line in self._next(state):
                after = _step(state[0], number), state[1]
                if line.key and line.key in state[1] and after not in found:
                    found.add(after)
                    new.append(after)
        return found

    def _begun(self, states: set[State], half: bytes) -> bool:
        return any(
            line.text.startswith(half) and not line.refused and line.key not in state[1]
            for state in states
            for _, line in self._next(state)
        )

    def _fits(self, state: State, *, killed: bool) -> bool:
        return all(
            self._may_end(client, self._said[number], state[0][number], killed=killed)
            for number, client in enumerate(self._clients)
        )

    def _may_end(
        self, client: Client, stream: tuple[list[Line], bool], done: int, *, killed: bool
    ) -> bool:
        """Whether a client may end as it did with so many of its lines dealt with."""
        lines, broken = stream
        left = lines[done:]
        held_back = client.waited and len(client.sent) > self._safe
        if client.end is End.RECEIPT:
            if left and not (left[0].optional and held_back):
                return False
            return not broken or held_back
        if killed or self._pushed_out:
            return True
        if client.end is End.RESET:
            return bool(left and (left[0].refused or left[0].optional)) or (not left and broken)
        return not left or left[0].refused or left[0].optional


def _step(done: tuple[int, ...], number: int) -> tuple[int, ...]:
    return (*done[:number], done[number] + 1, *done[number + 1 :])


# --- the script ---------------------------------------------------------------------------


class Script:
    """An input, read as steps."""

    def __init__(self, text: bytes) -> None:
        self._rest = text

    def more(self) -> bool:
        return bool(self._rest)

    def number(self) -> int:
        return self.take(1)[0] if self._rest else 0

    def take(self, size: int) -> bytes:
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


def check_wire(text: bytes) -> None:
    """Play a script, and judge what the agent and the clients got."""
    script, clock = Script(text), Clock()
    limits = LIMITS[script.number() & 1]
    changed: dict[str, Any] = {**limits, "time": clock}
    with mock.patch.multiple(keeper_process, **changed), contextlib.ExitStack() as held:
        scene = Scene(limits, clock, held)
        held.callback(scene.close)
        killed = _play(script, scene)
        if killed:
            scene.kill()
        else:
            scene.finish()
        expect("keeper.agent_deaf" not in scene.heard.kinds, "the agent was given up")
        Oracle(scene).judge(bytes(scene.got), killed=killed)


def _play(script: Script, scene: Scene) -> bool:
    """Carry out a script's steps; True if the last one is SIGKILL."""
    while script.more():
        step = script.number()
        if step & 7 == 7:
            if script.number() & 1:
                return True
        else:
            _carry_out(step & 7, (step >> 3) % SLOTS, script, scene)
        if not step & 0x80:
            scene.turn()
    return False


def _carry_out(kind: int, slot: int, script: Script, scene: Scene) -> None:
    match kind:
        case 0:
            scene.send(slot, script.take(script.number() & 63))
        case 1:
            fill, times = script.take(1), script.number()
            scene.send(slot, fill.replace(LF, b"-") * (times * 61))
        case 2:
            key, line = script.take(1), script.take(script.number() & 31)
            scene.send(slot, KEY_MARK + key + KEY_MARK + line + LF)
        case 3:
            scene.shut(slot)
        case 4:
            scene.hang_up(slot)
        case 5:
            scene.read(script.number() * 64)
        case _:
            scene.pass_time(script.number() / 50)


def _send(slot: int, data: bytes) -> bytes:
    return bytes([slot << 3, len(data)]) + data


def _run(slot: int, fill: bytes, times: int) -> bytes:
    return bytes([slot << 3 | 1]) + fill + bytes([times])


def _keyed(slot: int, key: bytes, line: bytes) -> bytes:
    return bytes([slot << 3 | 2]) + key + bytes([len(line)]) + line


def _shut(slot: int) -> bytes:
    return bytes([slot << 3 | 3])


_HANG_UP, _READ, _WAIT, _KILL = b"\x04", b"\x05\xff", b"\x06\x08", b"\x07\x01"
_WAIT_LONG = b"\x06\xff"

TARGETS = (
    Target(
        "wire",
        pure(check_wire),
        (
            b"\0" + _send(0, b'{"a":1}\n') + _shut(0),
            b"\0" + _send(0, b'{"a":') + _send(1, b"x\ny") + _send(0, b"1}") + _shut(0) + _shut(1),
            b"\0" + _send(0, b"half a line") + _WAIT + _HANG_UP + _send(0, b"next\n"),
            b"\0" + _send(1, b"0123456789abcdefghij") + _WAIT + _send(1, b"z\n") + _KILL,
            b"\0" + _keyed(0, b"k", b"a") + _keyed(1, b"k", b"b") + _keyed(0, b"j", b"") + _shut(0),
            b"\0" + b"".join(_keyed(0, b"%d" % n, b"l") for n in (1, 2, 3, 4, 1, 4)) + _shut(0),
            b"\0" + _send(0, b"\x01key") + _send(0, b"\x01") + _send(0, b"l\n") + _KILL,
            b"\0" + _send(0, b"\x01\x01l\n") + _send(1, b"\x01" + b"k" * 9 + b"\x01l\n"),
            b"\0" + _send(0, b"x" * 49) + _send(0, b"\n") + _send(1, b"y" * 48 + b"\nz\n"),
            b"\0" + _send(0, b"x" * 20) + _send(1, b"y" * 20) + _WAIT_LONG + _send(1, b"\n"),
            b"\1" + _run(0, b"x", 99) + _send(0, b"\n") + _READ + _shut(0),
            b"\1" + _run(0, b"x", 80) + _send(0, b"\nab\n") + _send(1, b"c\n") + _KILL,
            b"\1" + _send(0, b'["') + _run(0, b"x", 99) + _send(0, b'"]') + _shut(0) + _READ,
            b"\1" + _send(0, b'["') + _run(0, b"x", 99) + _WAIT + _send(0, b'"]') + _shut(0),
            b"\1" + _run(0, b"x", 200) + _run(1, b"y", 200) + _READ + _WAIT_LONG + _send(0, b"\n"),
            b"\1" + _send(0, b'["') + _run(0, b"x", 160) + _send(0, b'"]') + _shut(0) + _READ,
            b"\0" + _send(0, b'["0123456789012345678901234"]') + _shut(0) + _send(1, b"[1]"),
            b"\1\x81x\x50" + b"\x80\x01\n" + b"\x88\x02b\n" + b"\x90\x02c\n" + _READ,
            b"\1\x81x\x50" + b"\x80\x03\nab" + b"\x88\x02b\n" + _READ + _READ + _KILL,
            b"\1" + _send(0, b"a") + _send(1, b"b") + _WAIT_LONG + _send(2, b"c\n") + _shut(2),
        ),
        (b"\n", b"\x01", b"\x01k\x01", b"{}", b"[", b"]", _READ, _WAIT, _KILL, b"\x03", b"\x0b"),
        longest=200,
        short=5_000,
    ),
)
