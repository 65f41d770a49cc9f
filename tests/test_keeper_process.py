from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from raw_keeper import (
    AGENTS,
    MIB,
    PROGRAM,
    PYTHON,
    SID,
    SOURCE,
    Session,
    alive,
    into,
    linux,
    memory,
    receipt,
    root,
    until,
)


def picture(path: Path) -> tuple[int, int, int, int]:
    """What tells whether anybody touched this file."""
    seen = path.lstat()
    return seen.st_ino, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_mode


# --- the start -----------------------------------------------------------------------------


def test_order_files_and_modes(session: Session, out: Path) -> None:
    process = session.start(into(out), wait="")
    assert session.told() == {"event": "listening", "pid": process.pid}
    assert session.pid_file.read_bytes() == b"%d" % process.pid
    ready = session.told()
    assert ready == {"event": "ready", "pid": process.pid, "agent_pid": session.agent_pid()}
    assert stat.S_IMODE(session.folder.stat().st_mode) == 0o700
    assert stat.S_ISSOCK(session.socket.stat().st_mode)
    for path in (session.socket, session.pid_file, session.agent_file, session.log):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    steps = ["start", "listening", "agent_started", "ready"]
    assert session.events() == [f"keeper.{step}" for step in steps]
    line = session.log_lines()[-1]
    assert line["message"] == f"keeper ready: {SID}"
    assert line["sid"] == SID
    assert line["keeper_pid"] == process.pid
    assert line["timestamp"].endswith("Z")
    assert len(line["timestamp"]) == len("2000-01-01T00:00:00.000Z")


def test_what_the_agent_is_given(session: Session, out: Path, tmp_path: Path) -> None:
    home = tmp_path / "home of the agent"
    home.mkdir()
    leak = os.open(os.devnull, os.O_RDONLY)
    program = [*PYTHON, str(AGENTS / "tell.py"), str(out)]
    try:
        process = session.start(
            program,
            cwd=home,
            pass_fds=(leak,),
            prepare="os.umask(0o027); signal.signal(signal.SIGHUP, signal.SIG_IGN);"
            "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})",
            PI_KEEPER_PI_ARGS='["--flag", "an argument", "\\u00e9"]',
            PI_KEEPER_ANYTHING="secret",
            PI_DASHBOARD_SPAWN_TOKEN="once",  # noqa: S106 - not a real one
        )
    finally:
        os.close(leak)
    until(out.exists)
    told = json.loads(out.read_text())
    assert told["argv"] == [str(out), "--flag", "an argument", "é"]
    assert told["env"]["PI_DASHBOARD_SPAWNED"] == "1"
    assert told["env"]["PI_RECONCILER_SESSION"] == SID
    assert told["env"]["PI_DASHBOARD_SPAWN_TOKEN"] == "once"  # noqa: S105 - the same
    assert not [name for name in told["env"] if name.startswith("PI_KEEPER_")]
    assert told["cwd"] == str(home)
    assert told["umask"] == 0o027
    assert told["fds"] == [0, 1, 2]
    assert told["blocked"] == []
    ignored = int(told["status"].partition("SigIgn:")[2].split()[0], 16)
    hang_up = 1 << (signal.SIGHUP - 1)
    assert not ignored & hang_up
    assert told["pgid"] == os.getpgid(process.pid)


def test_its_working_folder_is_not_held_open(session: Session, out: Path, tmp_path: Path) -> None:
    """A descriptor of a folder says that the keeper serves it."""
    work = tmp_path / "work"
    work.mkdir()
    process = session.start(into(out), cwd=work)
    os.kill(process.pid, signal.SIGHUP)
    session.socket.unlink()
    os.kill(process.pid, signal.SIGHUP)
    until(lambda: "keeper.rebound" in session.events())  # it holds it while it binds
    held = Path(f"/proc/{process.pid}/fd")
    assert work not in {fd.resolve() for fd in held.iterdir() if fd.exists()}
    assert Path(f"/proc/{process.pid}/cwd").resolve() == work


def test_defaults_stand_in_for_broken_settings(session: Session, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    told = tmp_path / "told"
    (programs / "pi").write_text(f'#!/bin/sh\necho "$@" > {told}\nexec cat > /dev/null\n')
    (programs / "pi").chmod(0o755)
    session.start(
        [],
        PATH=f"{programs}:{os.environ['PATH']}",
        PI_KEEPER_PI_ARGS='["secret", 1]',
        PI_KEEPER_PI_CMD="{secret",
        PI_KEEPER_LOG_MAX_BYTES="-7",
    )
    assert told.read_text() == "--mode rpc\n"
    broken = [line for line in session.log_lines() if line["event"] == "keeper.broken_setting"]
    assert [line["level"] for line in broken] == ["warning", "warning"]
    assert "secret" not in session.log.read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [""],
        ["a/b"],
        [".hidden"],
        ["a b"],
        ["launch-x"],
        ["x" * 91],
        ["é"],
        ["a\n"],
        ["a", "b"],
        ["../x"],
    ],
)
def test_bad_session_id(session: Session, out: Path, arguments: list[str]) -> None:
    session.start(into(out), wait="", arguments=arguments)
    assert session.wait() == 2
    assert session.told()["reason"] == "bad_sid"
    assert json.loads(session.stderr())["reason"] == "bad_sid"
    assert not session.folder.exists()


def test_longest_session_id_in_a_long_folder(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / ("d" * 120) / ("e" * 120)
    session = Session(folder, "s" * 90)
    try:
        session.start(into(out))
        assert session.send(b"far away\n")
        until(lambda: out.read_bytes() == b"far away\n")
        session.end(signal.SIGKILL)
        session.start(into(out))  # the dead one's socket gives way
        assert session.end() == 0
        assert sorted(folder.iterdir()) == [session.log]
    finally:
        session.close()


@pytest.mark.parametrize("value", ["relative/folder", "/dev/null/folder"])
def test_no_folder_no_keeper(session: Session, out: Path, value: str) -> None:
    session.start(into(out), wait="", PI_KEEPER_SESSIONS_DIR=value)
    assert session.wait() == 2
    assert session.told()["reason"] == "log"


@pytest.mark.parametrize("own", [True, False])
def test_folder_by_home(tmp_path: Path, out: Path, *, own: bool) -> None:
    session = Session(tmp_path / ".pi/dashboard/sessions")
    elsewhere = tmp_path / "nowhere"
    try:
        session.start(
            into(out),
            PI_KEEPER_SESSIONS_DIR="",
            PI_DASHBOARD_HOME=str(tmp_path) if own else "  ",
            HOME=str(elsewhere if own else tmp_path),
        )
        assert session.pid_file.exists()
        assert not elsewhere.exists()
    finally:
        session.close()


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_hostile_log(session: Session, out: Path, tmp_path: Path, kind: str) -> None:
    session.folder.mkdir()
    plant(session.log, kind, tmp_path / "aim")
    session.start(into(out), wait="")
    assert session.wait() == 2
    assert session.told()["reason"] == "log"
    assert list(session.folder.iterdir()) == [session.log]


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "file", "datagram"])
def test_hostile_socket_path(session: Session, out: Path, tmp_path: Path, kind: str) -> None:
    session.folder.mkdir()
    with plant(session.socket, kind, tmp_path / "aim"):
        before = picture(session.socket)
        session.start(into(out), wait="")
        assert session.wait() == 2
        assert session.told() | {"detail": ""} == {
            "event": "failed",
            "code": 2,
            "reason": "bind",
            "detail": "",
        }
        assert picture(session.socket) == before
        assert sorted(session.folder.iterdir()) == [session.socket, session.log]


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_hostile_pid_file(session: Session, out: Path, tmp_path: Path, kind: str) -> None:
    session.folder.mkdir()
    plant(session.pid_file, kind, tmp_path / "aim")
    before = picture(session.pid_file)
    session.start(into(out), wait="")
    assert session.wait() == 2
    assert session.told()["reason"] == "pid_file"
    assert picture(session.pid_file) == before
    assert sorted(session.folder.iterdir()) == [session.pid_file, session.log]
    assert not out.exists()


def plant(path: Path, kind: str, aim: Path) -> contextlib.AbstractContextManager[object]:
    if kind == "link":
        aim.write_text("do not touch")
        path.symlink_to(aim)
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "file":
        path.write_text("do not touch")
    else:
        return listen(path, socket.SOCK_DGRAM)
    return contextlib.nullcontext()


def listen(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A listener by another hand, at a path of any length."""
    made = socket.socket(socket.AF_UNIX, kind)
    fd = os.open(path.parent, os.O_RDONLY)
    made.bind(f"/proc/self/fd/{fd}/{path.name}")
    os.close(fd)
    if kind == socket.SOCK_STREAM:
        made.listen(1)
    return made


def test_agent_missing(session: Session, tmp_path: Path) -> None:
    session.start([str(tmp_path / "nothing here")], wait="listening")
    told = session.told()
    assert (told["event"], told["code"], told["reason"]) == ("failed", 1, "agent_missing")
    assert "No such file" in told["detail"]
    assert session.wait() == 1
    assert list(session.folder.iterdir()) == [session.log]


@pytest.mark.parametrize("agent", [["/bin/true"], ["/bin/sh", "-c", "kill -9 $$"]])
def test_agent_that_ends_at_once(session: Session, agent: list[str]) -> None:
    session.start(agent, wait="listening")
    assert session.told()["reason"] == "agent_exited"
    assert session.wait() == 1
    assert list(session.folder.iterdir()) == [session.log]
    assert "keeper.ready" not in session.events()


def test_agent_that_ends_at_once_while_its_keeper_stands_still(session: Session) -> None:
    """As on a machine that is very busy: that the agent has failed is said all the same."""
    process = session.start(["/bin/sh", "-c", "kill -STOP $PPID; exit 7"], wait="listening")
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    time.sleep(0.35)  # an agent that lived for so long would be ready
    process.send_signal(signal.SIGCONT)
    told = session.told()
    assert (told["event"], told["reason"]) == ("failed", "agent_exited")
    assert "code 7" in told["detail"]
    assert session.wait() == 1


@pytest.mark.parametrize("code", [0, 7])
def test_agent_that_ends_later(session: Session, code: int) -> None:
    session.start(["/bin/sh", "-c", f"read line; exit {code}"])
    assert session.send(b"go\n")
    assert session.wait() == 0
    assert list(session.folder.iterdir()) == [session.log]
    exited = [line for line in session.log_lines() if line["event"] == "keeper.agent_exited"]
    assert exited[0]["exit_code"] == code


# --- one keeper, ever ----------------------------------------------------------------------


def test_ten_at_once(session: Session, out: Path) -> None:
    for _ in range(10):
        session.start(into(out), wait="")
    until(lambda: sum(each.poll() is not None for each in session._everyone) == 9)
    codes = sorted(str(each.poll()) for each in session._everyone)
    assert codes == ["3"] * 9 + ["None"]
    [winner] = [each for each in session._everyone if each.poll() is None]
    assert session.pid_file.read_text() == str(winner.pid)
    assert session.send(b"one\n")
    until(lambda: out.exists() and out.read_bytes() == b"one\n")
    assert {line["keeper_pid"] for line in session.log_lines()} == {winner.pid}


def test_second_start_touches_nothing(session: Session, out: Path) -> None:
    first = session.start(into(out))
    paths = [session.socket, session.pid_file, session.agent_file, session.log]
    before = [picture(path) for path in paths]
    session.start(into(out), wait="")
    assert session.wait() == 3
    assert session.told()["reason"] == "already_running"
    [line] = session.stderr().splitlines()
    assert json.loads(line)["code"] == 3
    assert [picture(path) for path in paths] == before
    assert first.poll() is None


def test_second_start_beside_a_stopped_keeper(session: Session, out: Path) -> None:
    first = session.start(into(out))
    first.send_signal(signal.SIGSTOP)
    session.start(into(out), wait="")
    assert session.wait() == 3
    assert session.socket.exists()


def test_second_start_when_the_log_was_deleted(session: Session, out: Path) -> None:
    session.start(into(out))
    before = picture(session.socket)
    session.log.unlink()
    session.start(into(out), wait="")
    assert session.wait() == 3
    assert picture(session.socket) == before


@linux
def test_second_start_when_log_and_socket_were_deleted(session: Session, out: Path) -> None:
    session.start(into(out))
    session.log.unlink()
    session.socket.unlink()
    before = picture(session.pid_file)
    session.start(into(out), wait="")
    assert session.wait() == 3
    assert picture(session.pid_file) == before


def test_lock_held_for_a_moment_by_a_remover(session: Session, out: Path) -> None:
    session.folder.mkdir()
    with session.log.open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        process = session.start(into(out), wait="")
        until(lambda: waits_for(process.pid, session.log))
        session.log.unlink()  # and the log goes with the lock
    assert session.told()["event"] == "listening"
    assert session.log.exists()


def waits_for(pid: int, path: Path) -> bool:
    """Whether a process has a file open: then it has tried for its lock, or is about to."""
    with contextlib.suppress(OSError):
        fds = Path(f"/proc/{pid}/fd")
        return any(os.readlink(fds / name) == str(path) for name in os.listdir(fds))
    return False


def test_lock_held_for_long(session: Session, out: Path) -> None:
    session.folder.mkdir()
    with session.log.open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        session.start(into(out), wait="")
        assert session.wait() == 3
    assert session.log.read_text() == ""


def test_dead_keeper_gives_way(session: Session, out: Path) -> None:
    first = session.start(into(out))
    before = picture(session.socket)
    assert session.end(signal.SIGKILL) == -signal.SIGKILL
    assert session.socket.exists()
    second = session.start(into(out))
    assert second.pid != first.pid
    assert picture(session.socket) != before
    assert session.pid_file.read_text() == str(second.pid)
    assert session.send(b"again\n")
    assert not [path for path in session.folder.iterdir() if path.name.startswith(".")]


def test_stale_agent_pid_file_is_gone_before_the_socket_is_there(
    session: Session, tmp_path: Path
) -> None:
    session.folder.mkdir()
    session.agent_file.write_text("1")
    session.pid_file.write_text("")
    session.start([str(tmp_path / "nothing")], wait="")
    assert session.wait() == 1
    assert list(session.folder.iterdir()) == [session.log]


@pytest.mark.parametrize("full", [False, True])
def test_keeper_that_does_not_lock(session: Session, out: Path, *, full: bool) -> None:
    session.folder.mkdir()
    with listen(session.socket), contextlib.ExitStack() as clients:
        if full:
            fill_backlog(session, clients)
        before = picture(session.socket)
        session.start(into(out), wait="")
        assert session.wait() == 3
        assert picture(session.socket) == before
        assert session.log.read_text() == ""
    assert not out.exists()


def fill_backlog(session: Session, clients: contextlib.ExitStack) -> None:
    fd = os.open(session.socket, os.O_PATH)
    clients.callback(os.close, fd)
    while True:
        client = clients.enter_context(socket.socket(socket.AF_UNIX))
        client.setblocking(False)
        if client.connect_ex(f"/proc/self/fd/{fd}"):
            return


def test_keeper_between_bind_and_listen(session: Session, out: Path) -> None:
    session.folder.mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        fd = os.open(session.folder, os.O_RDONLY)
        other.bind(f"/proc/self/fd/{fd}/{session.socket.name}")
        os.close(fd)
        process = session.start(into(out), wait="")
        until(lambda: waits_for(process.pid, session.log))
        other.listen()
        assert session.wait() == 3
        assert session.socket.exists()


def keeper_module() -> Any:  # noqa: ANN401 - nobody imports it
    """The keeper's code, for what can only be seen from the inside."""
    spec = importlib.util.spec_from_file_location("keeper_process", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_client_that_the_kernel_cannot_watch_any_more_is_refused_and_no_other(
    tmp_path: Path,
) -> None:
    module = keeper_module()
    listener = socket.create_server(str(tmp_path / "s"), family=socket.AF_UNIX)

    class Poller:
        def add(self, fd: int) -> None:
            if fd != listener.fileno():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Log:
        def say_rarely(self, *_: object, **__: object) -> None:
            pass

    reading, writing = os.pipe()
    with listener, open(reading, "rb"), open(writing, "wb"):
        listener.setblocking(False)
        wire = module.Wire(Poller(), Log(), writing)
        wire.open(listener)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
            client.send(b"half a line" * 10)
            wire.accept()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            wire.tick()
            wire.serve()
            assert wire.deadline() == float("inf"), "nothing of it is kept"


@pytest.mark.parametrize("text", ["x", "\udcff", "\0", "\n", "ü", "😀", '"'])
@pytest.mark.parametrize("times", [1, 1198, 9000])
def test_a_log_line_is_short_flat_and_of_whole_characters(text: str, times: int) -> None:
    more = dict.fromkeys(("reason", "error", "setting"), text * times)
    line = keeper_module()._record("error", "keeper.failed", text * times, "s" * 100, more)
    assert len(line) <= 8000
    assert line.endswith(b"\n")
    told = json.loads(line)
    json.dumps(told, ensure_ascii=False).encode()  # no lone surrogate
    whole = (text * times).encode(errors="backslashreplace").decode()
    if "truncated" in told:
        head, tail = told["message"].split("…")
        assert whole.startswith(head)
        assert whole.endswith(tail)
        assert 0 <= len(head) - len(tail) < 2
        assert len(json.dumps(told["message"])) > 800, "no more is cut than has to be"
    else:
        assert told["message"] == told["reason"] == whole
        assert times < 9000
    assert (told["level"], told["severity_number"]) == ("error", 17)


@pytest.mark.parametrize(
    ("text", "pid"),
    [
        (b"1", 1),
        (b"2147483647", 2147483647),
        (b"12\n", 12),
        (b"", None),
        (b"0", None),
        (b"2147483648", None),
        (b"-1", None),
        (b"1_2", None),
        pytest.param(b"12" + b" " * 14 + b"34", None, id="more stands behind"),
        pytest.param(b"0" * 15 + b"12", 12, id="wide"),
        pytest.param(b"0" * 62 + b"12", None, id="may go on"),
    ],
)
def test_what_a_pid_file_says(tmp_path: Path, text: bytes, pid: int | None) -> None:
    (tmp_path / "x.rpc.sock.pid").write_bytes(text)
    assert keeper_module().Folder(bytes(tmp_path)).read_pid("x.rpc.sock.pid") == pid


def test_take_away_puts_back_what_was_not_meant(tmp_path: Path) -> None:
    """Between the look and the rename a live keeper has come."""
    folder = keeper_module().Folder(bytes(tmp_path))
    path = tmp_path / "x.rpc.sock"
    listen(path).close()
    dead = path.lstat()
    kept = tmp_path / "kept"
    path.rename(kept)  # so that its inode is not used again
    with listen(path):
        live = path.lstat()
        assert not folder.take_away(path.name, dead)
        assert not folder.take_away(path.name, live)  # the very one, but it answers
        assert path.lstat().st_ino == live.st_ino
        assert sorted(tmp_path.iterdir()) == [kept, path]
    assert folder.take_away(path.name, live)
    assert folder.take_away(path.name, live)  # gone already
    assert list(tmp_path.iterdir()) == [kept]
    os.close(folder.fd)


@root
def test_socket_of_another_user(session: Session, out: Path) -> None:
    session.folder.mkdir()
    listen(session.socket).close()
    os.chown(session.socket, 65534, 65534)
    before = picture(session.socket)
    session.start(into(out), wait="")
    assert session.wait() == 2
    assert picture(session.socket) == before


@root
def test_client_of_another_user(session: Session, out: Path) -> None:
    session.start(into(out))
    session.folder.chmod(0o755)
    for parent in session.folder.parents[:-2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    session.socket.chmod(0o666)
    script = f"""if True:
        import os, socket
        os.setuid(65534)
        os.chdir({str(session.folder)!r})
        client = socket.socket(socket.AF_UNIX)
        client.connect({session.socket.name!r})
        try:
            client.sendall(b"from another\\n")
            print(client.recv(1))
        except ConnectionError:
            print("refused")
    """
    other = subprocess.run([*PYTHON, "-c", script], capture_output=True, timeout=20, check=True)
    assert other.stdout == b"refused\n"
    assert session.send(b"ours\n")
    until(lambda: out.read_bytes() == b"ours\n")
    assert "keeper.connection_refused" in session.events()


def test_socket_is_never_open_to_others(session: Session, out: Path) -> None:
    modes: set[int] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            with contextlib.suppress(FileNotFoundError):
                modes.add(stat.S_IMODE(session.socket.stat().st_mode))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(10):
            session.start(into(out), wait="listening", prepare="os.umask(0)")
            session.end()
    finally:
        over.set()
        watcher.join()
    assert modes == {0o600}


# --- the wire ------------------------------------------------------------------------------


def test_lines_arrive_verbatim(session: Session, out: Path) -> None:
    session.start(into(out))
    data = b"\n\r\n\0\xff\xfe " + bytes(range(11, 256)) * 100 + b"\n{}\n"
    assert session.send(data)
    until(lambda: out.stat().st_size >= len(data))
    assert out.read_bytes() == data


def test_empty_connection_is_acknowledged(session: Session, out: Path) -> None:
    session.start(into(out))
    assert session.send(b"")


def test_writers_are_not_interleaved(session: Session, out: Path) -> None:
    session.start(into(out))
    dice = random.Random(1)
    wanted = {
        writer: [
            b"%d:" % writer + bytes([65 + writer]) * dice.choice([1, 100, 5000, 70_000, 300_000])
            for _ in range(25)
        ]
        for writer in range(20)
    }
    receipts: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda lines=lines: receipts.append(session.send(b"\n".join([*lines, b""])))
        )
        for lines in wanted.values()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert receipts == [True] * 20
    total = sum(len(line) + 1 for lines in wanted.values() for line in lines)
    until(lambda: out.stat().st_size >= total)
    came: dict[int, list[bytes]] = {writer: [] for writer in wanted}
    for line in out.read_bytes().splitlines():
        came[int(line.partition(b":")[0])].append(line)
    assert came == wanted


@pytest.mark.parametrize("size", [1, 100, 5000, 300_000])
@pytest.mark.parametrize("shut", [True, False])
def test_break_within_a_line_leaves_nothing(
    session: Session, out: Path, size: int, *, shut: bool
) -> None:
    session.start(into(out))
    with session.connect() as client:
        client.sendall(b"whole\n" + b"x" * size)
        if shut:
            client.shutdown(socket.SHUT_WR)
            assert not receipt(client)
    assert session.send(b"next\n")
    until(lambda: out.read_bytes().endswith(b"next\n"))
    assert out.read_bytes() == b"whole\nnext\n"


def test_break_within_a_line_that_came_in_pieces(session: Session, out: Path) -> None:
    session.start(into(out))
    with session.connect() as client:
        for _ in range(50):
            client.sendall(b"{")
            assert session.send(b"x\n")  # so the keeper has had its turn
        client.shutdown(socket.SHUT_WR)
        assert not receipt(client)
    assert session.send(b"x\n")
    until(lambda: out.read_bytes() == b"x\n" * 51)


@pytest.mark.parametrize(
    "piece",
    [
        b"{}",
        b'{"type":"prompt","message":"caf\xc3\xa9"}',
        b"[1]",
        b'{"x":"' + b"y" * 200_000 + b'"}',
    ],
)
@pytest.mark.parametrize("pause", [False, True])
def test_last_piece_of_json_counts(
    session: Session, out: Path, piece: bytes, *, pause: bool
) -> None:
    session.start(into(out))
    with session.connect() as client:
        client.sendall(b"first\n" + piece[:-1])
        if pause:
            assert session.send(b"between\n")
        client.sendall(piece[-1:])
        client.shutdown(socket.SHUT_WR)
        assert receipt(client)
    until(lambda: out.read_bytes().endswith(piece + b"\n"))


@pytest.mark.parametrize("piece", [b"12", b'"text"', b"{", b"[" * 100_000, b'{"a":1}}', b"\xff"])
def test_other_last_pieces_do_not(session: Session, out: Path, piece: bytes) -> None:
    session.start(into(out))
    assert not session.send(b"first\n" + piece)
    until(lambda: out.read_bytes() == b"first\n")


def test_longest_line_and_a_longer_one(session: Session, out: Path) -> None:
    process = session.start(into(out))
    line = b"x" * (64 * MIB)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        assert not session.send(b"y" + line + b"\n")
    assert session.send(line + b"\n")
    until(lambda: out.stat().st_size == len(line) + 1)
    assert out.read_bytes() == line + b"\n"
    assert "keeper.line_too_long" in session.events()
    assert memory(process.pid) < 40 * MIB  # the buffer went back


@pytest.mark.parametrize("size", [1, 4096, 16384, 65536])
@pytest.mark.parametrize("first", [b"y" * 60, b"y" * 220, b"y" * 2000 + b"\ny"])
def test_client_with_a_small_send_buffer(
    session: Session, out: Path, size: int, first: bytes
) -> None:
    session.start(into(out))
    second = b"z" * (2 * MIB) + b"\n"
    with session.connect(send_buffer=size) as client:
        client.sendall(first)  # with a short beginning of the next line
        assert session.send(b"between\n")
        client.sendall(second)
        client.shutdown(socket.SHUT_WR)
        assert receipt(client)
    until(lambda: out.stat().st_size == len(first) + len(second) + len(b"between\n"))


def test_receipt_waits_for_the_pipe(session: Session, out: Path) -> None:
    session.start(into(out))
    os.kill(session.agent_pid(), signal.SIGSTOP)
    data = b"y" * 99 + b"\n"
    count = 1500  # more than a pipe, less than a pipe and a socket's buffer
    with session.connect() as client:
        client.sendall(data * count)
        client.shutdown(socket.SHUT_WR)
        assert not select.select([client], [], [], 0.3)[0]
        os.kill(session.agent_pid(), signal.SIGCONT)
        assert receipt(client)
    until(lambda: out.stat().st_size == len(data) * count)


@linux
def test_a_newcomer_waits_for_the_end_of_a_line_in_the_pipe(session: Session, out: Path) -> None:
    keeper = session.start(into(out)).pid
    agent, line = session.agent_pid(), b"a" * 100_000 + b"\n"
    until(out.exists)
    stop(agent)
    with session.connect() as owner, Path(f"/proc/{agent}/fd/0").open("rb", buffering=0) as pipe:
        owner.sendall(line)
        owner.shutdown(socket.SHUT_WR)
        until(lambda: unread(pipe.fileno()) == 65536)
        stop(keeper)
        os.kill(agent, signal.SIGCONT)
        until(lambda: out.stat().st_size == 65536)
        with session.connect() as newcomer:  # the keeper is told of room first, then of a knock
            newcomer.sendall(b"b\n")
            newcomer.shutdown(socket.SHUT_WR)
            os.kill(keeper, signal.SIGCONT)
            assert receipt(newcomer)
        assert receipt(owner)
    until(lambda: out.stat().st_size == len(line) + 2)
    assert out.read_bytes() == line + b"b\n"


@linux
def test_more_clients_come_and_go_than_there_is_room_for(session: Session, out: Path) -> None:
    """All of them are there before the keeper looks, and have gone when it does."""
    keeper = session.start(into(out)).pid
    until(out.exists)
    stop(keeper)
    clients = [session.connect() for _ in range(400)]
    for number, client in enumerate(clients):
        client.sendall(b"%d\n" % number)
        client.shutdown(socket.SHUT_WR)
    os.kill(keeper, signal.SIGCONT)
    for client in clients:
        assert receipt(client)
        client.close()
    until(lambda: out.read_bytes() == b"".join(b"%d\n" % n for n in range(400)))


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def unread(pipe: int) -> int:
    """Bytes in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_client_that_goes_while_its_line_is_half_in_the_pipe(session: Session, out: Path) -> None:
    session.start(into(out))
    os.kill(session.agent_pid(), signal.SIGSTOP)
    line = b"w" * 150_000 + b"\n"
    with session.connect() as client:
        client.sendall(line)
    with session.connect() as client:
        client.sendall(b"after\n")
        os.kill(session.agent_pid(), signal.SIGCONT)
        client.shutdown(socket.SHUT_WR)
        assert receipt(client)
    until(lambda: out.stat().st_size >= len(line) + 6)
    assert out.read_bytes() == line + b"after\n"


def test_agent_that_closes_its_input(session: Session) -> None:
    session.start(["/bin/sh", "-c", "exec <&-; exec sleep 1000"])
    with session.connect() as waiting:
        waiting.sendall(b"half")
        assert not session.send(b"nobody reads\n")
        assert not receipt(waiting)
    for _ in range(3):
        with contextlib.suppress(BrokenPipeError):
            assert not session.send(b"nobody reads\n")
    assert session.events().count("keeper.agent_deaf") == 1
    assert session.end() == 0
    assert list(session.folder.iterdir()) == [session.log]
    assert "nobody" not in session.log.read_text()


def test_hostile_ancillary_data(session: Session, out: Path) -> None:
    session.start(into(out))
    with session.connect() as client, Path(os.devnull).open() as extra:
        client.sendall(b"a")
        socket.send_fds(client, [b"b"], [extra.fileno()])
        client.sendall(b"c\n")
        client.send(b"!", socket.MSG_OOB)
        client.sendall(b"d\n")
        client.shutdown(socket.SHUT_WR)
        receipt(client)
    assert session.send(b"fine\n")
    until(lambda: out.read_bytes().endswith(b"fine\n"))
    assert set(out.read_bytes().splitlines()) <= {b"abc", b"d", b"fine"}


@linux
@pytest.mark.parametrize("attempt", range(20))
def test_receipt_is_true_when_the_keeper_is_killed(
    session: Session, out: Path, attempt: int
) -> None:
    """Every client that saw the end of its stream finds all its lines with the agent."""
    dice = random.Random(attempt)
    agent = [*PYTHON, str(AGENTS / "outlive.py"), str(out)]
    agent += [str(dice.choice([4096, 65536])), str(dice.choice([0, 0.0002, 0.002]))]
    process = session.start(agent, wait="listening")
    until(out.with_suffix(".part").exists)
    sure: list[bytes] = []
    unsure: list[bytes] = []

    def deliver(writer: int) -> None:
        own = random.Random(attempt * 100 + writer)
        for number in range(10_000):
            size = own.choice([0, 10, 300, 3000, 40_000, 150_000])
            names = [b"<%d.%d.%d" % (writer, number, part) for part in range(own.choice([1, 1, 5]))]
            data = b"".join(name + b"x" * size + b">\n" for name in names)
            try:
                with session.connect() as client:
                    while data:  # in pieces, so that it is killed between them as well
                        cut = own.randrange(1, len(data) + 1)
                        client.sendall(data[:cut])
                        data = data[cut:]
                    client.shutdown(socket.SHUT_WR)
                    (sure if receipt(client) else unsure).extend(names)
            except (ConnectionError, FileNotFoundError):
                return

    writers = [threading.Thread(target=deliver, args=(writer,)) for writer in range(6)]
    for writer in writers:
        writer.start()
    enough = dice.randrange(1, 60)
    until(lambda: len(sure) >= enough)
    process.kill()
    for writer in writers:
        writer.join()
    until(out.exists, 60)
    lines = out.read_bytes().split(b"\n")
    came = [line for line in lines[:-1] if line.startswith(b"<") and line.endswith(b">")]
    assert came == lines[:-1], "a line is broken or mixed"
    names = [line.rstrip(b">").rstrip(b"x") for line in came]
    assert len(set(names)) == len(names)
    assert set(sure) <= set(names)


# --- the bounds ----------------------------------------------------------------------------


@linux
def test_memory_while_the_agent_is_stopped(session: Session, out: Path) -> None:
    process = session.start(into(out))
    idle = memory(process.pid)
    os.kill(session.agent_pid(), signal.SIGSTOP)
    clients = [session.connect() for _ in range(200)]
    lines = (b"p" * 999 + b"\n") * 1000
    halves = b"q" * (1200 * 1024)
    sent = 0
    for number, client in enumerate(clients):
        client.setblocking(False)
        data = memoryview(lines if number % 2 else halves)
        while data:
            try:
                wrote = client.send(data)
            except BlockingIOError:
                break
            sent += wrote
            data = data[wrote:]
    assert session.process is process
    pushed = sum(1 for client in clients if not select.select([], [client], [], 0)[1])
    assert pushed > 190, "most are held back"
    assert memory(process.pid, "VmHWM") < idle + 16 * MIB
    os.kill(session.agent_pid(), signal.SIGCONT)
    for client in clients:
        client.close()
    assert session.send(b"after\n")
    assert memory(process.pid, "VmHWM") < idle + (16 + 64) * MIB
    assert sent > 20 * MIB


@linux
def test_memory_of_many_halves_of_long_lines(session: Session, out: Path) -> None:
    process = session.start(into(out))
    idle = memory(process.pid)
    clients = [session.connect() for _ in range(40)]
    total = [0]

    def push(client: socket.socket) -> None:
        block = b"h" * MIB
        with contextlib.suppress(ConnectionError, TimeoutError):
            while True:
                client.sendall(block)
                total[0] += MIB

    pushers = [threading.Thread(target=push, args=(client,)) for client in clients]
    for pusher in pushers:
        pusher.start()
    until(lambda: total[0] > 200 * MIB, 60)
    assert memory(process.pid, "VmHWM") < idle + (16 + 64) * MIB
    assert session.send(b"small\n")
    until(lambda: out.read_bytes() == b"small\n")
    assert process.poll() is None
    session.end(signal.SIGKILL)
    for pusher in pushers:
        pusher.join()
    for client in clients:
        client.close()
    assert out.read_bytes() == b"small\n"


def test_silent_clients_hold_up_nobody(session: Session, out: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    over = threading.Event()
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        session.start(into(out))
        half = stack.enter_context(session.connect())
        half.sendall(b"H" * (30 * MIB))
        for _ in range(300):
            stack.enter_context(session.connect())
        dripping = stack.enter_context(session.connect())

        def drip() -> None:
            with contextlib.suppress(ConnectionError):
                while not over.wait(0.05):
                    dripping.send(b"d")

        dripper = threading.Thread(target=drip)
        dripper.start()
        stack.callback(dripper.join)
        stack.callback(over.set)
        began = time.monotonic()
        assert session.send(b"small\n")
        assert session.send(b"B" * (10 * MIB) + b"\n")
        assert time.monotonic() - began < 10
        for _ in range(20):
            assert session.send(b"small\n")
    until(lambda: out.stat().st_size == 21 * 6 + 10 * MIB + 1)


def test_holder_of_the_long_buffer_that_goes_silent(session: Session, out: Path) -> None:
    session.start(into(out))
    with session.connect() as first, session.connect() as second:
        first.sendall(b"1" * (5 * MIB))
        second.settimeout(20)
        began = time.monotonic()
        second.sendall(b"2" * (5 * MIB) + b"\n")
        second.shutdown(socket.SHUT_WR)
        assert receipt(second)
        assert time.monotonic() - began > 1.5, "it had its time"
        receipt(first)  # it is over for the first, which had not ended its line
    assert "keeper.slow_line" in session.events()
    until(lambda: out.stat().st_size == 5 * MIB + 1)


@linux
def test_an_idle_keeper_does_not_wake(session: Session, out: Path) -> None:
    process = session.start(into(out))
    with session.connect() as client:
        client.sendall(b"half a line")
        assert session.send(b"x\n")
        until(lambda: Path(f"/proc/{process.pid}/wchan").read_text() == "do_epoll_wait")
        before = switches(process.pid)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        assert switches(process.pid) == before


def switches(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("nonvoluntary_ctxt_switches")[0].rpartition(":")[2].split()[0])


DUMPS = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)"


@linux
def test_a_keeper_that_crashes_leaves_no_prompt_in_a_core_file(
    session: Session, out: Path, tmp_path: Path
) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    if most != resource.RLIM_INFINITY:
        pytest.skip("core files are forbidden here anyway")
    place = tmp_path / "crashes"
    place.mkdir()
    crash = f"{DUMPS}; import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    subprocess.run([*PYTHON, "-c", crash], cwd=place, check=False)
    dumps = bool(list(place.iterdir()))  # where they go elsewhere, the limits have to do
    for core in place.iterdir():
        core.unlink()
    process = session.start(into(out), cwd=place, prepare=DUMPS)
    limits = [limit_of(pid) for pid in (process.pid, session.agent_pid())]
    assert limits == [["1", "unlimited"], ["unlimited", "unlimited"]], "the agent keeps its own"
    with session.connect() as client:
        client.sendall(b"half a prompt")
        session.end(signal.SIGSEGV)
    assert not list(place.iterdir())
    assert dumps or Path("/proc/sys/kernel/core_pattern").read_text() != "core\n"


def limit_of(pid: int) -> list[str]:
    """The limits on core files, the one that counts and the highest."""
    text = Path(f"/proc/{pid}/limits").read_text().partition("Max core file size")[2]
    return text.split()[:2]


# --- the end -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_end(session: Session, out: Path, number: int) -> None:
    session.start(into(out))
    agent = session.agent_pid()
    with session.connect() as client:
        client.sendall(b"half")
        assert session.end(number) == 0
        assert not receipt(client)
    assert not alive(agent)
    assert list(session.folder.iterdir()) == [session.log]
    assert session.events()[-1] == "keeper.stop"


def test_signal_to_end_with_a_stopped_agent(session: Session, out: Path) -> None:
    session.start(into(out))
    agent = session.agent_pid()
    os.kill(agent, signal.SIGSTOP)
    assert session.end() == 0
    assert not alive(agent)


def test_signal_to_end_at_any_moment(session: Session, out: Path) -> None:
    """From the pid file on, SIGTERM ends in 0 and leaves nothing."""
    for step in range(20):
        process = session.start(into(out), wait="listening")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(step / 1000)
        assert session.end() == 0
        assert list(session.folder.iterdir()) == [session.log]


@linux
def test_killed_keeper_takes_a_hung_agent_along(session: Session, out: Path) -> None:
    session.start(into(out))
    agent = session.agent_pid()
    os.kill(agent, signal.SIGSTOP)
    session.end(signal.SIGKILL)
    until(lambda: not alive(agent))


def test_files_of_a_usurper_stay(session: Session, out: Path) -> None:
    session.start(into(out))
    session.socket.unlink()
    with listen(session.socket):
        for path in (session.pid_file, session.agent_file):
            path.write_text("1")
        paths = (session.socket, session.pid_file, session.agent_file)
        before = [picture(path) for path in paths]
        assert session.end() == 0
        assert [picture(path) for path in paths] == before


@pytest.mark.parametrize("names", [["socket"], ["pid_file"], ["socket", "pid_file"]])
def test_hang_up_makes_files_again(session: Session, out: Path, names: list[str]) -> None:
    process = session.start(into(out))
    for name in names:
        getattr(session, name).unlink()
    process.send_signal(signal.SIGHUP)
    if "socket" in names:
        until(lambda: "keeper.rebound" in session.events())  # from here on it listens
    until(lambda: session.pid_file.exists() and session.pid_file.read_text() == str(process.pid))
    assert stat.S_IMODE(session.socket.stat().st_mode) == 0o600
    until(lambda: session.send(b"again\n"))
    assert session.end() == 0
    assert list(session.folder.iterdir()) == [session.log]


def test_hang_up_lets_in_who_knocked_before(session: Session, out: Path) -> None:
    process = session.start(into(out))
    process.send_signal(signal.SIGSTOP)
    with session.connect() as client:
        client.sendall(b"before\n")
        client.shutdown(socket.SHUT_WR)
        session.socket.unlink()
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGCONT)
        assert receipt(client)
    until(session.socket.exists)


def test_hang_up_replaces_a_dead_socket_and_a_wrong_pid(session: Session, out: Path) -> None:
    process = session.start(into(out))
    session.socket.unlink()
    listen(session.socket).close()
    session.pid_file.write_text("1")
    process.send_signal(signal.SIGHUP)
    until(lambda: "keeper.pid_file_remade" in session.events())
    assert session.pid_file.read_text() == str(process.pid)
    assert session.send(b"here\n")


def test_hang_up_leaves_a_live_listener(session: Session, out: Path) -> None:
    process = session.start(into(out))
    session.socket.unlink()
    session.pid_file.unlink()
    with listen(session.socket):
        before = picture(session.socket)
        process.send_signal(signal.SIGHUP)
        until(lambda: "keeper.rebind_failed" in session.events())
        assert picture(session.socket) == before
        assert not session.pid_file.exists()
        assert process.poll() is None


def test_hang_up_with_all_in_place_changes_nothing(session: Session, out: Path) -> None:
    process = session.start(into(out))
    before = [picture(path) for path in (session.socket, session.pid_file, session.log)]
    process.send_signal(signal.SIGHUP)
    assert session.send(b"x\n")
    paths = (session.socket, session.pid_file, session.log)
    assert [picture(path) for path in paths] == before


# --- the log and the notices ---------------------------------------------------------------


def test_captured_output_is_cut_to_the_newest(session: Session) -> None:
    chatter = "while read line; do seq 1 20000; echo end of $line; done"
    session.start(
        ["/bin/sh", "-c", chatter],
        PI_KEEPER_CAPTURE_PI_OUTPUT="1",
        PI_KEEPER_LOG_MAX_BYTES="50000",
        PI_KEEPER_LOG_CHECK_INTERVAL_MS="20",
    )
    inode = session.log.stat().st_ino
    for turn in range(5):
        assert session.send(b"turn %d\n" % turn)
        until(lambda: f"end of turn {turn}\n" in session.log.read_text())  # noqa: B023
    until(lambda: session.log.stat().st_size <= 50_000)
    text = session.log.read_text()
    assert text.endswith("end of turn 4\n")
    assert text.startswith(str(20_001 - text.count("\n") + 1) + "\n") or "{" in text
    assert session.log.stat().st_ino == inode


def test_agent_output_is_discarded_unless_asked_for(session: Session) -> None:
    session.start(["/bin/sh", "-c", "echo noise; echo noise >&2; exec cat"])
    assert session.send(b"noise\n")
    assert session.end() == 0
    assert "noise" not in session.log.read_text()


def test_refusals_cannot_fill_the_log(session: Session, out: Path) -> None:
    session.start(into(out))
    for _ in range(300):
        assert not session.send(b"secret half")
    session.end()
    assert session.events().count("keeper.broken_line") == 1
    last = session.log_lines()[-1]
    assert (last["unsaid"], last["unsaid_broken_line"]) == (299, 299)
    assert "secret" not in session.log.read_text()


def test_notices_never_block_or_kill(session: Session, out: Path) -> None:
    full, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    process = session.start(into(out), wait="", pass_fds=(write,), PI_KEEPER_NOTIFY_FD=str(write))
    os.close(write)
    until(lambda: session.log.exists() and "keeper.ready" in session.events())
    assert process.poll() is None
    os.close(full)


@pytest.mark.parametrize("number", ["", "2", "900", "-1", "x", "9" * 30])
def test_other_notice_numbers_are_ignored(session: Session, out: Path, number: str) -> None:
    session.start(into(out), wait="", PI_KEEPER_NOTIFY_FD=number)
    until(lambda: session.log.exists() and "keeper.ready" in session.events())
    assert session.end() == 0
    assert session.stderr() == ""


def test_no_descriptors_left(session: Session, out: Path) -> None:
    """It lets nobody in for a while, does not spin, and recovers."""
    process = session.start(
        into(out),
        prepare="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))",
    )
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(session.connect()) for _ in range(30)]
        assert session.send(b"in spite of them\n")  # after the silent ones' second
        assert process.poll() is None
        for client in silent[:20]:
            client.close()
        assert session.send(b"again\n")
    until(lambda: out.read_bytes() == b"in spite of them\nagain\n")


# How it is run: from its bytecode, where that can be kept.

NO_SID = "exactly one session id is needed"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Another installation of the keeper: the folder of its source."""
    place = tmp_path / "installed"
    (place / "launcher").mkdir(parents=True)
    shutil.copy(SOURCE, place)
    shutil.copy(PROGRAM, place / "launcher")
    return place


def said_at_start(place: Path) -> str:
    program = place / "launcher" / PROGRAM.name
    run = subprocess.run([*PYTHON, str(program)], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    return run.stderr


def test_the_keeper_is_compiled_once(installed: Path) -> None:
    assert NO_SID in said_at_start(installed)
    (cached,) = (installed / "__pycache__").iterdir()
    before = cached.stat()
    assert NO_SID in said_at_start(installed)
    assert cached.stat().st_mtime_ns == before.st_mtime_ns
    assert not (installed / "launcher" / "__pycache__").exists()


def test_a_keeper_that_was_changed_is_compiled_anew(installed: Path) -> None:
    said_at_start(installed)
    source = installed / SOURCE.name
    source.write_text(source.read_text().replace(NO_SID, "another text"))
    assert "another text" in said_at_start(installed)


def test_a_cache_that_cannot_be_kept_is_done_without(installed: Path) -> None:
    (installed / "__pycache__").touch()  # root may write into any folder, but not into a file
    assert NO_SID in said_at_start(installed)


def test_nothing_beside_the_keeper_stands_in_for_the_standard_library(installed: Path) -> None:
    for name in ("json", "socket", "os", "contextlib", "site", "usercustomize"):
        (installed / f"{name}.py").write_text("raise SystemExit('not the real one')\n")
        (installed / "launcher" / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    assert NO_SID in said_at_start(installed)


# --- a session that is started again -------------------------------------------------------


def test_a_keeper_whose_launch_note_is_gone_starts_no_agent(session: Session, out: Path) -> None:
    """It was stopped meanwhile: by somebody who found no keeper yet."""
    note = f"keeper-{SID}.launch"
    process = session.start(into(out), wait="", PI_KEEPER_LAUNCH_NOTE=note)
    assert session.told()["reason"] == "stopped"
    assert process.wait(20) == 2
    assert not out.exists()
    assert not session.socket.exists()
    assert not session.pid_file.exists()


def test_a_keeper_whose_launch_note_stands_is_as_any_other(session: Session, out: Path) -> None:
    session.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (session.folder / f"keeper-{SID}.launch").touch()
    process = session.start(into(out), wait="", PI_KEEPER_LAUNCH_NOTE=f"keeper-{SID}.launch")
    assert session.told() == {"event": "listening", "pid": process.pid}
    assert session.told()["event"] == "ready"
