"""The control socket: who opens it, what it says, and that nobody holds up the loop through it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    SINK,
    WAIT,
    Daemon,
    Told,
    as_nobody,
    asynchronous,
    bare_socket,
    happens,
    root,
    sessions_folder,
    soon,
    stale_pair,
    until,
)

from reconciler import control
from reconciler.control import BACKLOG, MOST_LISTENERS
from reconciler.control_client import Found, State, Stream, find
from reconciler.controller import Reconciler
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager
from reconciler.layout import CONTROL_SOCKET, claims, parse_name
from reconciler.plans import Verdict
from reconciler.removal import is_taken


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    told: Told | None = None,
    **options: Any,  # noqa: ANN401 - Reconciler's own
) -> AsyncIterator[Reconciler]:
    """A reconciler with a control socket, past its first full look."""
    log = (told or Told()).logger
    made = Reconciler(KeeperManager(folder), logger=log, **{"control": True, **options})
    async with made as reconciler:
        await asyncio.wait_for(reconciler.settled(), WAIT)
        yield reconciler


async def found(folder: Path) -> Found:
    return await asyncio.to_thread(answered, folder)


def answered(folder: Path) -> Found:
    """The daemon's answer, which must come; its stream is hung up on."""
    answer = find(folder, WAIT)
    assert answer.state is State.RUNNING, answer
    if answer.stream is not None:
        answer.stream.close()
    return answer


async def stream(folder: Path) -> Stream:
    """A listener that has got its status."""
    answer = await asyncio.to_thread(find, folder, WAIT)
    assert answer.stream is not None, answer
    assert answer.status["streams"]
    return answer.stream


async def lines_of(stream: Stream, count: int) -> list[dict[str, Any]]:
    """So many lines, which must come."""
    lines: list[bytes] = []
    async with asyncio.timeout(WAIT):
        while len(lines) < count:
            more = stream.read()
            assert more is not None, f"it hung up after {lines}"
            lines += more
            await asyncio.sleep(0.001)
    return [json.loads(line) for line in lines]


async def lines_until(stream: Stream, event: str, count: int = 1, **fields: object) -> list[Any]:
    """The lines up to so many of an event with some fields, which must come."""
    lines: list[Any] = []
    wanted = {"event": event, **fields}.items()
    while sum(wanted <= line.items() for line in lines) < count:
        lines += await lines_of(stream, 1)
    return lines


async def ended(stream: Stream) -> list[bytes]:
    """What comes until it hangs up, which must come."""
    lines: list[bytes] = []
    async with asyncio.timeout(WAIT):
        while (more := stream.read()) is not None:
            lines += more
            await asyncio.sleep(0.001)
    return lines


# -- What it says ----------------------------------------------------------------------------


@asynchronous
async def test_it_says_how_it_stands_and_what_it_did_last(folder: Path) -> None:
    async with running(folder) as reconciler:
        spawned = await reconciler.spawn("demo", agent_command=SINK)
        await soon(reconciler.wait_for("demo", lambda row: row.phase is Verdict.READY))
        before = await found(folder)
        assert before.status["sessions"] == {"ready": 1}
        assert before.status["last_action"] is None
        os.kill(spawned.keeper_pid, signal.SIGKILL)
        await soon(reconciler.wait_for("demo", lambda row: row.phase is Verdict.MISSING))
        after = await found(folder)
    assert (after.state, after.pid, after.reason) == (State.RUNNING, os.getpid(), "")
    said = after.status
    assert (said["pid"], said["folder"], said["dry_run"]) == (os.getpid(), str(folder), False)
    assert said["only_looks_on"] is None
    assert said["sessions"] == {"missing": 1}
    assert said["started_at"] < said["last_action"].pop("at") < said["timestamp"]
    assert said["last_action"] == {
        "event": "session.cleaned",
        "sid": "demo",
        "reason": "keeper dead",
    }
    assert said["counts"] == {
        "reconciler.started": 1,
        "session.cleaned": 1,
        "session.missing": 1,
    }
    assert 0 < before.status["uptime_s"] < said["uptime_s"] < WAIT


@asynchronous
async def test_what_is_told_is_streamed_line_by_line(folder: Path) -> None:
    told = Told()
    async with running(folder, told) as reconciler:
        listening = await stream(folder)
        for sid in ("one", "two"):
            stale_pair(folder, sid)
            await happens(functools.partial(told.of, "session.cleaned", sid))
        heard = await lines_until(listening, "session.cleaned", 2)
        heard = [line for line in heard if line["event"] == "session.cleaned"]
        assert [line["sid"] for line in heard] == ["one", "two"]
        logged = told.of("session.cleaned")
        for line in heard + logged:
            assert line.pop("timestamp")
        assert heard == logged
        listening.close()
        await happens(lambda: reconciler._log.listener is None, "nobody listens any more")


@asynchronous
async def test_what_a_thread_tells_is_streamed_by_the_loop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(folder) as reconciler:
        listening = await stream(folder)
        tell, threads = control._Listener.tell, []

        def noted(listener: control._Listener, line: bytes) -> None:
            threads.append(threading.current_thread())
            tell(listener, line)

        monkeypatch.setattr(control._Listener, "tell", noted)
        await asyncio.to_thread(reconciler._log.warning, "some.event", number=1)
        assert (await lines_of(listening, 1))[0]["number"] == 1
        assert threads == [threading.current_thread()]
        listening.close()


@asynchronous
async def test_each_change_of_a_phase_is_streamed_whatever_the_log_takes(folder: Path) -> None:
    """As `ls --watch` shows it, which subscribes to the table."""
    told, shown = Told("warning"), list[tuple[str, str]]()
    async with running(folder, told) as reconciler:
        listening = await stream(folder)
        reconciler.sessions.subscribe(lambda row: shown.append((row.phase.value, row.reason)))
        spawned = await reconciler.manager.spawn("demo", agent_command=SINK)
        await reconciler.wait_for("demo", lambda row: row.phase is Verdict.READY)
        os.kill(spawned.keeper_pid, signal.SIGKILL)
        await reconciler.wait_for("demo", lambda row: row.phase is Verdict.ABSENT)
        lines = await lines_until(listening, "session.seen", verdict="absent")
        phases = ((line["verdict"], line["reason"]) for line in lines)
        assert [each for each, _ in itertools.groupby(phases)] == [
            each for each, _ in itertools.groupby(shown)
        ]
        listening.close()
    assert told.lines == []


@asynchronous
async def test_a_folder_that_is_not_trusted_any_more_is_told_of(folder: Path) -> None:
    async with running(folder):
        folder.chmod(0o777)
        assert "everybody may write" in (await found(folder)).status["only_looks_on"]


@asynchronous
async def test_whoever_listens_hears_the_end(folder: Path) -> None:
    async with running(folder) as reconciler:
        listening = await stream(folder)
        reconciler._log.info("last.words")
    assert [json.loads(line)["event"] for line in await ended(listening)] == ["last.words"]
    assert not (folder / CONTROL_SOCKET).exists()
    listening.close()


# -- Its name --------------------------------------------------------------------------------


def test_its_name_is_nobodys_session() -> None:
    assert CONTROL_SOCKET.startswith(".")
    assert parse_name(CONTROL_SOCKET) is None
    assert claims(CONTROL_SOCKET) is None
    assert not is_taken(CONTROL_SOCKET)


@asynchronous
async def test_it_is_closed_to_others_from_its_birth_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        async with running(folder):
            assert stat.S_IMODE((folder / CONTROL_SOCKET).stat().st_mode) == 0o600
    finally:
        os.umask(before)


@asynchronous
async def test_a_long_path_is_no_matter(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir(mode=0o700)
    async with running(folder):
        assert (await found(folder)).pid == os.getpid()


@asynchronous
async def test_only_who_holds_the_lock_has_one(folder: Path) -> None:
    async with running(folder, dry_run=True):
        assert not (folder / CONTROL_SOCKET).exists()
    async with running(folder, control=False):
        assert not (folder / CONTROL_SOCKET).exists(), "the library has one if asked"
    folder.chmod(0o777)
    told = Told()
    async with Reconciler(KeeperManager(folder), logger=told.logger, control=True):
        await happens(lambda: told.of("folder.observed_only"))
        assert not (folder / CONTROL_SOCKET).exists(), "what is not trusted is not locked"


def test_what_a_dead_daemon_left_is_replaced(daemon: Daemon) -> None:
    until((daemon.folder / CONTROL_SOCKET).exists)
    left = (daemon.folder / CONTROL_SOCKET).stat().st_ino
    daemon.process.kill()
    daemon.process.wait()
    assert find(daemon.folder).state is State.NOT_RUNNING
    assert (daemon.folder / CONTROL_SOCKET).stat().st_ino == left
    daemon.process = daemon._start()
    assert answered(daemon.folder).pid == daemon.process.pid
    assert daemon.end() == 0
    assert not (daemon.folder / CONTROL_SOCKET).exists()


@asynchronous
async def test_anything_else_under_its_name_is_left_alone_and_told_once(folder: Path) -> None:
    told = Told()
    other = folder / CONTROL_SOCKET
    other.write_text("mine")
    async with running(folder, told) as reconciler:
        stale_pair(folder, "demo")
        await happens(lambda: told.of("session.cleaned"), "the work goes on")
        await reconciler.settled()
        assert [line["reason"] for line in told.of("control.unavailable")] == [
            ".reconciler.sock: something else than a socket of ours has that name"
        ]
        other.unlink()
        await reconciler.settled()
        assert (await found(folder)).pid == os.getpid()
        other.unlink()
        other.write_text("mine")
    assert other.read_text() == "mine"


@asynchronous
async def test_a_socket_that_somebody_answers_on_is_left_alone(folder: Path) -> None:
    told = Told()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / CONTROL_SOCKET))
        listener.listen()
        inode = (folder / CONTROL_SOCKET).stat().st_ino
        async with running(folder, told):
            assert "in use" in told.of("control.unavailable")[0]["reason"]
        assert (folder / CONTROL_SOCKET).stat().st_ino == inode


@asynchronous
async def test_one_that_was_removed_comes_back_and_keeps_its_listeners(folder: Path) -> None:
    told = Told()
    async with running(folder, told) as reconciler:
        listening = await stream(folder)
        (folder / CONTROL_SOCKET).unlink()
        await reconciler.settled()
        assert (await found(folder)).pid == os.getpid()
        stale_pair(folder, "demo")
        assert await lines_until(listening, "session.cleaned", sid="demo")
        listening.close()


@asynchronous
async def test_it_moves_with_the_path_to_another_folder(folder: Path) -> None:
    told = Told()
    async with running(folder, told) as reconciler:
        listening = await stream(folder)
        folder.rename(folder.with_name("moved"))
        folder.mkdir(mode=0o700)
        await happens(lambda: told.of("folder.gone"))
        assert await ended(listening)
        await reconciler.settled()
        assert (await found(folder)).pid == os.getpid()
        listening.close()
    assert not (folder.with_name("moved") / CONTROL_SOCKET).exists()


# -- Who listens -----------------------------------------------------------------------------


@asynchronous
async def test_who_is_slow_loses_whole_lines_and_is_told_where_and_how_many(folder: Path) -> None:
    lines = 400
    filler = "x" * (BACKLOG // 50)
    async with running(folder) as reconciler:
        listening = await stream(folder)
        for number in range(lines):
            short = number % 2  # where a long one has no room a short one has some
            reconciler._log.info("some.event", number=number, filler="" if short else filler)
        told: list[dict[str, Any]] = []
        while not told or told[-1]["event"] != "control.lines_dropped":
            told += await lines_of(listening, 1)
        reconciler._log.info("some.event", number=lines)
        told += await lines_of(listening, 1)
        *kept, notice, last = told
        assert [line["number"] for line in kept] == list(range(len(kept)))
        assert len(kept) + notice["lines_dropped"] == lines
        assert len(kept) * len(filler) // 2 > BACKLOG * 0.9
        assert last["number"] == lines
        listening.close()


@asynchronous
async def test_one_listener_too_many_is_told_the_status_alone(folder: Path) -> None:
    async with running(folder):
        listening = [await stream(folder) for _ in range(MOST_LISTENERS)]
        more = await asyncio.to_thread(find, folder, WAIT)
        assert more.status["streams"] is False
        assert more.stream is not None
        assert await ended(more.stream) == []
        more.stream.close()
        listening.pop().close()
        async with asyncio.timeout(WAIT):
            while not (await found(folder)).status["streams"]:
                pass
        for one in listening:
            one.close()


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit of Linux")
def test_listeners_leave_the_daemon_the_descriptors_that_looking_takes(daemon: Daemon) -> None:
    until((daemon.folder / CONTROL_SOCKET).exists)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (24, 24))
    with contextlib.ExitStack() as connected:
        answers = [find(daemon.folder, WAIT) for _ in range(MOST_LISTENERS)]
        for answer in answers:
            assert answer.stream is not None, "each is told how it stands"
            connected.callback(answer.stream.close)
        assert not answers[-1].status["streams"], "no events follow"
        stale_pair(daemon.folder, "demo")
        until(lambda: daemon.of("session.cleaned", "demo"), "it goes on with its work")
    assert not daemon.of("session.failed")


@asynchronous
async def test_who_talks_is_hung_up_on(folder: Path) -> None:
    async with running(folder) as reconciler:
        listening = await stream(folder)
        listening._client.send(b"{}\n")
        await ended(listening)
        assert reconciler._log.listener is None
        listening.close()


@asynchronous
async def test_who_is_gone_costs_nothing(folder: Path) -> None:
    async with running(folder) as reconciler:
        listening = await stream(folder)
        reconciler._log.info("some.event")
        reset = (0).to_bytes(4, sys.byteorder)
        listening._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" + reset)
        listening.close()
        reconciler._log.info("some.event")
        await happens(lambda: reconciler._log.listener is None)


@asynchronous
async def test_without_descriptors_it_waits_and_the_loop_does_not_spin(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_PAUSE", 0.05)
    async with running(folder) as reconciler:
        tries: list[object] = []
        serving = reconciler._holder._control
        assert serving is not None
        accept = serving._accept

        def counted(door: socket.socket) -> None:
            tries.append(door)
            accept(door)

        monkeypatch.setattr(serving, "_accept", counted)
        (folder / CONTROL_SOCKET).unlink()
        await reconciler.settled()  # the door with the counting handle
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket(socket.AF_UNIX) as client:
            highest = max(map(int, os.listdir("/proc/self/fd")))
            taken = [os.dup(0) for _ in range(highest)]
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, hard))
            try:
                client.connect(str(folder / CONTROL_SOCKET))
                await happens(lambda: tries)
                await asyncio.sleep(0.02)
                assert len(tries) == 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for descriptor in taken:
                    os.close(descriptor)
            answering = Stream(client)
            client.setblocking(False)
            assert (await lines_of(answering, 1))[0]["event"] == "reconciler.status"


# -- Who asks --------------------------------------------------------------------------------


def test_no_folder_and_no_daemon_is_not_running(folder: Path) -> None:
    here, gone = find(folder), find(folder / "gone")
    assert (here.state, here.pid) == (State.NOT_RUNNING, None)
    assert here.reason == f"no daemon works on {folder}"
    assert (gone.state, gone.reason) == (
        State.NOT_RUNNING,
        f"there is no folder {folder / 'gone'}",
    )
    bare_socket(folder / CONTROL_SOCKET)
    assert find(folder).state is State.NOT_RUNNING


def test_a_file_where_the_folder_should_be_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = find(tmp_path / "file", 0)
    assert (answer.state, answer.pid) == (State.NOT_KNOWN, None)
    assert answer.reason == f"{tmp_path / 'file'} cannot be opened: Not a directory"


def test_a_daemon_that_hangs_is_not_known_within_a_second(daemon: Daemon) -> None:
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        answer = find(daemon.folder, 0.1)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert (answer.state, answer.pid) == (State.NOT_KNOWN, daemon.process.pid)
    assert "does not answer" in answer.reason
    assert answer.silent


def test_a_full_backlog_is_not_known(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(folder / CONTROL_SOCKET))
        listener.listen(0)
        client.connect(str(folder / CONTROL_SOCKET))
        answer = find(folder, 0.05)
    assert answer.state is State.NOT_KNOWN
    assert "a process that cannot be named holds" in answer.reason


def test_a_lock_without_a_word_is_not_known(folder: Path) -> None:
    with Folder(folder) as held:
        assert held.lock()
        answer = find(folder, 0.05)
    assert (answer.state, answer.pid) == (State.NOT_KNOWN, os.getpid())
    assert answer.reason == (
        f"process {os.getpid()} holds the folder's lock, and does not say how it stands"
    )


@contextlib.contextmanager
def impostor(folder: Path, says: bytes) -> Iterator[None]:
    """Somebody else who answers on the control socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / CONTROL_SOCKET))
        listener.listen()

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client:
                        client.sendall(says)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    "says",
    [
        *(b"", b"hello\n", b"[1]\n", b'"no line', b"x" * (2 << 20), b"[" * 100_000 + b"\n"),
        *(b'{"pid":1}\n', b'{"event":"reconciler.status","streams":true}\n'),
    ],
    ids=lambda says: says[:9],
)
def test_what_is_no_status_is_not_believed(folder: Path, says: bytes) -> None:
    with impostor(folder, says):
        answer = find(folder, 0.2)
    assert (answer.state, answer.stream) == (State.NOT_KNOWN, None)
    assert answer.status == {}


def test_lines_that_come_with_the_status_are_told_at_once_even_if_they_are_the_last() -> None:
    status = {"version": "1", "pid": 1, "started_at": "", "uptime_s": 0.5, "folder": "/"}
    status |= {"sessions": {}, "streams": True, "only_looks_on": None, "last_action": None}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(json.dumps(status).encode() + b'\n{"n":1}\n{"n":2}\n{"n')
        ours.setblocking(False)
        stream = Stream(ours)
        assert stream.first(time.monotonic() + WAIT) == status
        assert stream.read() == [b'{"n":1}', b'{"n":2}']
        assert stream.read() == []
        theirs.sendall(b'":3}\n')
        assert stream.read() == [b'{"n":3}']


def test_a_line_without_an_end_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for end in (ours, theirs):
            end.setblocking(False)
        stream, sent = Stream(ours), 0
        while stream.read() is not None:
            sent += theirs.send(b"x" * 4096)
            assert sent < 2 << 20
    assert sent > 1 << 20


def test_who_does_not_hold_the_lock_is_not_believed(folder: Path) -> None:
    code = (
        "import fcntl, os, sys\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print(flush=True)\n"
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder, impostor(folder, b'{"event":"reconciler.status","streams":true}\n'):
        assert holder.stdout is not None
        holder.stdout.readline()
        answer = find(folder, 0.1)
        holder.kill()
    assert answer.state is State.NOT_KNOWN
    assert answer.reason == (
        f".reconciler.sock is answered by process {os.getpid()}, the lock is held by {holder.pid}"
    )


@root
def test_another_users_answer_is_not_believed() -> None:
    with sessions_folder() as folder:
        for path in (folder, *folder.parents[:3]):
            path.chmod(0o755)
        with impostor(folder, b'{"event":"reconciler.status"}\n'), as_nobody():
            answer = find(folder, 0.1)
    assert answer.state is State.NOT_KNOWN
    assert "Permission denied" in answer.reason


@root
def test_who_answers_for_another_user_is_named(folder: Path) -> None:
    code = (
        "import os, socket, sys\n"
        "listener = socket.socket(socket.AF_UNIX)\n"
        "os.chdir(sys.argv[1])\n"
        "listener.bind(sys.argv[2])\n"
        "os.setuid(65534)\n"
        "listener.listen()\n"
        "print(flush=True)\n"
        "sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code, folder, CONTROL_SOCKET],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout is not None
        other.stdout.readline()
        answer = find(folder, 0.1)
        other.kill()
    assert answer.state is State.NOT_KNOWN
    assert answer.reason == (
        f".reconciler.sock is answered by process {other.pid} of uid 65534, not by one of ours"
    )
