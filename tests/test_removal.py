from __future__ import annotations

import contextlib
import fcntl
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos import CAMPAIGN, Fault
from conftest import alive, bare_socket, dead_pid, stale_pair, until
from stand_ins import agent_of, ending, kill, listening, running, spawn

from reconciler.folder import Answer, Folder
from reconciler.keeper import KeeperManager
from reconciler.layout import KEEPER_PROGRAM, Role, claims, file_name
from reconciler.observations import FileId
from reconciler.plans import Remove
from reconciler.probe import Probe
from reconciler.processes import SYSTEM
from reconciler.removal import Fate, Removal, is_taken, recover, remove, remove_logs
from reconciler.state import Desired, Policy, decide

SID = "5f0e7c1e-0c50-4f0e-9b39-4e4a3a2f3d11"
SOCKET, PID_FILE, AGENT_FILE, LOG = (
    file_name(role, SID)
    for role in (Role.SOCKET, Role.PID_FILE, Role.AGENT_PID_FILE, Role.KEEPER_LOG)
)
ROLES = (Role.SOCKET, Role.AGENT_PID_FILE, Role.PID_FILE)
REPO = Path(__file__).parent.parent
Entries = tuple[tuple[Role, FileId], ...]


@pytest.fixture
def opened(folder: Path) -> Iterator[Folder]:
    with Folder(folder) as opened:
        yield opened


@pytest.fixture
def stale(opened: Folder) -> Entries:
    """What a dead keeper has left, judged."""
    (opened.path / AGENT_FILE).write_text(str(dead_pid()))
    stale_pair(opened.path, SID)
    return judged(opened)


def judged(opened: Folder) -> Entries:
    looks = (
        opened.socket_entry(SOCKET, 0.0),
        opened.pid_entry(AGENT_FILE, 0.0),
        opened.pid_entry(PID_FILE, 0.0),
    )
    return tuple((role, look.file) for role, look in zip(ROLES, looks, strict=True) if look.file)


def claimed(folder: Path) -> dict[str, int]:
    """The files that claim keepers by inode, hidden ones too."""
    return {p.name: p.lstat().st_ino for p in folder.iterdir() if not p.name.endswith(".log")}


def hidden(name: str, remover: int) -> str:
    return f".{name}.taken-{remover}"


@contextlib.contextmanager
def when_renamed(
    monkeypatch: pytest.MonkeyPatch,
    *,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Let something happen right before, or right after, an entry is moved away."""
    rename = os.rename

    def slow(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        with pytest.MonkeyPatch.context() as others:
            others.setattr(os, "rename", rename)
            before()
            rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            after()

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", slow)
        yield


# What was judged goes, and nothing else.


def test_what_was_judged_is_removed(opened: Folder, stale: Entries) -> None:
    (opened.path / "other").touch()
    removal = remove(opened, SID, stale)
    assert removal == Removal(tuple((role, Fate.REMOVED) for role in ROLES))
    assert removal.complete
    assert claimed(opened.path).keys() == {"other"}


def test_what_is_gone_already_is_success(opened: Folder, stale: Entries) -> None:
    for name in (SOCKET, AGENT_FILE, PID_FILE):
        (opened.path / name).unlink()
    removal = remove(opened, SID, stale)
    assert removal == Removal(tuple((role, Fate.GONE) for role in ROLES))
    assert removal.complete


def rewritten(path: Path) -> None:
    path.write_text("7")


def same_text_anew(path: Path) -> None:
    text = path.read_text()
    path.rename(path.with_name("kept"))  # so that its inode is not used again
    path.write_text(text)


def touched(path: Path) -> None:
    os.utime(path, (1, 1))


def emptied(path: Path) -> None:
    path.write_text("")


def a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_socket(path: Path) -> None:
    path.unlink()
    bare_socket(path)


CHANGES = [rewritten, same_text_anew, touched, emptied, a_link, a_fifo, a_folder, a_socket]


@pytest.mark.parametrize("change", CHANGES)
def test_a_pid_file_that_has_changed_is_left_alone(
    opened: Folder, stale: Entries, change: Callable[[Path], None]
) -> None:
    change(opened.path / PID_FILE)
    inode = (opened.path / PID_FILE).lstat().st_ino
    removal = remove(opened, SID, stale)
    assert dict(removal.fates)[Role.PID_FILE] is Fate.CHANGED
    assert not removal.complete
    assert claimed(opened.path)[PID_FILE] == inode


@pytest.mark.parametrize("change", [touched, a_link, a_fifo, a_folder, a_socket])
def test_after_a_socket_that_has_changed_nothing_more_is_touched(
    opened: Folder, stale: Entries, change: Callable[[Path], None]
) -> None:
    change(opened.path / SOCKET)
    before = claimed(opened.path)
    removal = remove(opened, SID, stale)
    assert removal == Removal(((Role.SOCKET, Fate.CHANGED),))
    assert claimed(opened.path) == before


def test_a_pid_file_that_says_another_thing_and_looks_the_same_is_put_back(
    opened: Folder, stale: Entries
) -> None:
    path = opened.path / PID_FILE
    before = path.stat()
    path.write_text(path.read_text().translate(str.maketrans("0123456789", "9876543210")))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    removal = remove(opened, SID, stale)
    assert dict(removal.fates)[Role.PID_FILE] is Fate.CHANGED
    left = claimed(opened.path)
    assert not any(map(is_taken, left))
    assert left[PID_FILE] == before.st_ino


# In the middle of it somebody comes.


@pytest.mark.parametrize("change", [rewritten, same_text_anew, emptied, a_link, a_fifo])
def test_what_was_caught_and_is_another_is_put_back(
    opened: Folder,
    stale: Entries,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
) -> None:
    path = opened.path / PID_FILE
    came: list[int] = []

    def come() -> None:
        change(path)
        came.append(path.lstat().st_ino)

    with when_renamed(monkeypatch, before=come):
        removal = remove(opened, SID, stale[-1:])
    assert removal == Removal(((Role.PID_FILE, Fate.CHANGED),))
    left = claimed(opened.path)
    assert not any(map(is_taken, left))
    assert [left[PID_FILE]] == came  # of a link the link, not what it leads to
    assert opened.pid_entry(PID_FILE, 0.0).file != stale[-1][1]


def test_a_living_keepers_socket_that_was_caught_is_put_back(
    opened: Folder, stale: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = opened.path / SOCKET
    with socket.socket(socket.AF_UNIX) as listener:

        def come() -> None:
            path.unlink()
            listener.bind(str(path))
            listener.listen()

        with when_renamed(monkeypatch, before=come):
            removal = remove(opened, SID, stale)
        assert removal == Removal(((Role.SOCKET, Fate.CHANGED),))
        assert claimed(opened.path).keys() == {SOCKET, PID_FILE, AGENT_FILE}
        assert opened.ask(SOCKET).pid == os.getpid()


def test_a_socket_that_begins_to_listen_when_it_is_caught_is_put_back(
    opened: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was judged between its bind and its listen."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(opened.path / SOCKET))
        entries = judged(opened)
        assert opened.ask(SOCKET).answer is Answer.REFUSED
        with when_renamed(monkeypatch, after=listener.listen):
            removal = remove(opened, SID, entries)
        assert removal == Removal(((Role.SOCKET, Fate.CHANGED),))
        assert opened.ask(SOCKET).pid == os.getpid()


def test_a_pid_file_that_a_keeper_has_opened_and_not_yet_written_is_put_back(
    opened: Folder, stale: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It found the name before the file was moved, and writes after the file was looked at."""
    (opened.path / SOCKET).unlink()
    pid_file = (opened.path / PID_FILE).open("r+")
    with socket.socket(socket.AF_UNIX) as listener:
        calls: list[str] = []

        def come() -> None:
            calls.append("")
            if len(calls) == 2:  # the agent pid file was the first
                listener.bind(str(opened.path / SOCKET))
                listener.listen()

        with when_renamed(monkeypatch, before=come):
            removal = remove(opened, SID, stale)
        assert dict(removal.fates) == {
            Role.SOCKET: Fate.GONE,
            Role.AGENT_PID_FILE: Fate.REMOVED,
            Role.PID_FILE: Fate.CHANGED,
        }
        with pid_file:
            pid_file.truncate()
            pid_file.write(str(os.getpid()))
        assert opened.pid_entry(PID_FILE, 0.0).pid == os.getpid()


def test_a_pid_file_beside_a_listener_that_is_known_is_removed(
    opened: Folder, stale: Entries
) -> None:
    (opened.path / SOCKET).unlink()
    with listening(opened.path, SOCKET):
        assert not remove(opened, SID, stale[-1:]).complete
        assert remove(opened, SID, stale[-1:], listening=True).complete
        assert claimed(opened.path).keys() == {SOCKET, AGENT_FILE}


def test_when_the_name_was_taken_meanwhile_the_newest_counts(
    opened: Folder, stale: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = opened.path / PID_FILE
    with when_renamed(
        monkeypatch, before=lambda: rewritten(path), after=lambda: path.write_text("8")
    ):
        removal = remove(opened, SID, stale[-1:])
    assert removal == Removal(((Role.PID_FILE, Fate.CHANGED),))
    assert path.read_text() == "8"
    assert claimed(opened.path).keys() == {SOCKET, AGENT_FILE, PID_FILE}


def test_what_goes_away_before_it_is_caught_is_gone(
    opened: Folder, stale: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    with when_renamed(monkeypatch, before=(opened.path / PID_FILE).unlink):
        removal = remove(opened, SID, stale[-1:])
    assert removal == Removal(((Role.PID_FILE, Fate.GONE),))


def test_what_cannot_be_deleted_is_put_back(
    opened: Folder, stale: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = claimed(opened.path)
    unlink, failures = os.unlink, [OSError(5, "Input/output error")]

    def fail_once(name: str, *, dir_fd: int) -> None:
        if failures:
            raise failures.pop()
        unlink(name, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail_once)
        with pytest.raises(OSError, match="Input/output error"):
            remove(opened, SID, stale)
    assert claimed(opened.path) == before


# The lock that a keeper of ours holds for life.


def test_a_living_keepers_lock(manager: KeeperManager, opened: Folder) -> None:
    pid = spawn(manager, SID).keeper_pid
    agent_of(manager, SID)
    before = claimed(opened.path)
    entries = judged(opened)
    for each in (signal.SIGSTOP, signal.SIGCONT):
        assert remove(opened, SID, entries) == Removal((), locked=True)
        os.kill(pid, each)
    assert not remove(opened, SID, entries).complete
    assert claimed(opened.path) == before
    kill(pid)
    until(lambda: not alive(int((opened.path / AGENT_FILE).read_text())))
    assert remove(opened, SID, entries).complete


def test_a_keeper_that_is_being_born(opened: Folder, stale: Entries) -> None:
    """It has locked its log, and its files are still its forerunner's."""
    with (opened.path / LOG).open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        before = claimed(opened.path)
        assert remove(opened, SID, stale) == Removal((), locked=True)
        assert claimed(opened.path) == before
    assert remove(opened, SID, stale).complete


def test_while_it_removes_no_keeper_of_ours_can_be_born(
    opened: Folder, stale: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    (opened.path / LOG).touch()
    locked: list[bool] = []

    def try_lock() -> None:
        with (opened.path / LOG).open() as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(True)

    with when_renamed(monkeypatch, before=try_lock, after=try_lock):
        remove(opened, SID, stale)
    assert locked == [True] * 6
    try_lock()
    assert locked == [True] * 6


@pytest.mark.parametrize("plant", [a_link, a_fifo, a_folder])
def test_a_log_that_is_none_holds_nobody_up(
    opened: Folder, stale: Entries, plant: Callable[[Path], None]
) -> None:
    (opened.path / LOG).touch()
    plant(opened.path / LOG)
    assert remove(opened, SID, stale).complete


def test_without_a_descriptor_for_the_lock_nothing_is_removed(
    opened: Folder, stale: Entries
) -> None:
    (opened.path / LOG).touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            remove(opened, SID, stale[-1:])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert remove(opened, SID, stale).complete


def test_logs_go_unless_a_keeper_lives(opened: Folder) -> None:
    names = (LOG, file_name(Role.LAUNCH_LOG, SID), "never there")
    for name in names[:2]:
        (opened.path / name).touch()
    with (opened.path / LOG).open() as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        remove_logs(opened, SID, names)
        assert sorted(opened.names()) == sorted(names[:2])
    remove_logs(opened, SID, names)
    assert list(opened.names()) == []


# Left behind by a removal that was itself killed.


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        (hidden(SOCKET, 12), True),
        (hidden("anything", 12), True),
        (SOCKET, False),
        (f".{SOCKET}.taken-", False),
        (f".{SOCKET}.taken-x", False),
        (f".{SOCKET}.taken-12345678901", False),
        (f".{SOCKET}.taken-12.", False),
        (f"{SOCKET}.taken-12", False),
        (".taken-12", False),
    ],
)
def test_hidden_names(name: str, taken: bool) -> None:  # noqa: FBT001 - a column of the table
    assert is_taken(name) == taken
    assert not (taken and claims(name))


@pytest.fixture
def remover() -> int:
    return dead_pid()


def test_a_dead_keepers_socket_is_removed(opened: Folder, remover: int) -> None:
    bare_socket(opened.path / hidden(SOCKET, remover))
    assert recover(opened, hidden(SOCKET, remover)) is Fate.REMOVED
    assert claimed(opened.path) == {}


def test_a_living_keepers_socket_is_put_back(opened: Folder, remover: int) -> None:
    name = hidden(SOCKET, remover)
    with listening(opened.path, SOCKET) as (pid,):
        (opened.path / SOCKET).rename(opened.path / name)
        inode = claimed(opened.path)[name]
        assert recover(opened, name) is Fate.CHANGED
        assert claimed(opened.path) == {SOCKET: inode}
        assert opened.ask(SOCKET).pid == pid


@pytest.mark.parametrize(
    ("text", "fate"),
    [
        ("dead", Fate.REMOVED),
        ("alive", Fate.CHANGED),
        ("", Fate.CHANGED),
        ("x", Fate.CHANGED),
    ],
)
@pytest.mark.parametrize("name", [PID_FILE, AGENT_FILE])
def test_a_pid_file_is_put_back_unless_it_names_a_dead_process(
    opened: Folder, remover: int, name: str, text: str, fate: Fate
) -> None:
    """An empty one may be about to be filled; the name is where it is judged."""
    text = {"dead": str(dead_pid()), "alive": str(os.getpid())}.get(text, text)
    path = opened.path / hidden(name, remover)
    path.write_text(text)
    inode = path.stat().st_ino
    assert recover(opened, path.name) is fate
    assert claimed(opened.path) == ({name: inode} if fate is Fate.CHANGED else {})


def test_what_is_put_back_gives_way_to_what_is_there(opened: Folder, remover: int) -> None:
    (opened.path / hidden(PID_FILE, remover)).write_text(str(os.getpid()))
    (opened.path / PID_FILE).write_text("newer")
    assert recover(opened, hidden(PID_FILE, remover)) is Fate.CHANGED
    assert claimed(opened.path).keys() == {PID_FILE}
    assert (opened.path / PID_FILE).read_text() == "newer"


def test_what_was_put_back_but_for_its_second_name(opened: Folder, remover: int) -> None:
    name = hidden(PID_FILE, remover)
    (opened.path / PID_FILE).write_text(str(os.getpid()))
    os.link(opened.path / PID_FILE, opened.path / name)
    assert recover(opened, name) is Fate.CHANGED
    assert claimed(opened.path).keys() == {PID_FILE}


def test_on_a_network_filesystem_nothing_is_taken_for_dead(
    opened: Folder, remover: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "remote", True)
    bare_socket(opened.path / hidden(SOCKET, remover))
    (opened.path / hidden(PID_FILE, remover)).write_text(str(dead_pid()))
    assert recover(opened, hidden(SOCKET, remover)) is Fate.CHANGED
    assert recover(opened, hidden(PID_FILE, remover)) is Fate.CHANGED
    assert claimed(opened.path).keys() == {SOCKET, PID_FILE}


def test_what_a_living_remover_works_on_is_its_own(opened: Folder) -> None:
    with running(held=(opened.fd,)) as (pid,):
        name = hidden(PID_FILE, pid)
        (opened.path / name).write_text(str(dead_pid()))
        assert recover(opened, name) is None
        assert claimed(opened.path).keys() == {name}


def test_a_process_that_has_the_removers_pid_by_now_keeps_nobody_from_it(opened: Folder) -> None:
    """It does not hold the folder open, as who removes does."""
    with running() as (pid,):
        name = hidden(PID_FILE, pid)
        (opened.path / name).write_text(str(dead_pid()))
        assert recover(opened, name) is Fate.REMOVED


def test_a_forerunner_with_our_own_pid_does_not_block_us(opened: Folder, stale: Entries) -> None:
    """In a container each start may get the same one."""
    name = hidden(PID_FILE, os.getpid())
    (opened.path / name).write_text(str(dead_pid()))
    assert not remove(opened, SID, stale).complete
    assert recover(opened, name) is Fate.REMOVED
    assert remove(opened, SID, stale).complete
    assert claimed(opened.path) == {}


@pytest.mark.parametrize("plant", [a_link, a_fifo, a_folder])
@pytest.mark.parametrize("name", [SOCKET, PID_FILE])
def test_hostile_leftovers_are_left_alone(
    opened: Folder, remover: int, name: str, plant: Callable[[Path], None]
) -> None:
    path = opened.path / hidden(name, remover)
    path.touch()
    plant(path)
    assert recover(opened, path.name) is None
    assert claimed(opened.path).keys() == {path.name}


@pytest.mark.parametrize("original", ["foo", LOG, "a b.rpc.sock", "../x.rpc.sock"])
def test_what_was_never_ours_is_left_alone(opened: Folder, remover: int, original: str) -> None:
    assert recover(opened, hidden(original, remover)) is None
    assert recover(opened, SOCKET) is None


def test_a_leftover_that_is_gone(opened: Folder, remover: int) -> None:
    assert recover(opened, hidden(SOCKET, remover)) is Fate.GONE


# Killed at every step of it.

CRASHING = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[5:]
from reconciler.folder import Folder
from reconciler.layout import CLAIM, file_name
from reconciler.removal import _look, remove

path, sid, fatal, exchanged = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
steps = 0

def step():
    global steps
    steps += 1
    if steps == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

def counted(name, unlink=os.unlink):
    real = getattr(os, name)
    def call(*args, **more):
        step()
        if name == "rename" and args[0] == exchanged:
            text = (path / exchanged).read_text()
            unlink(path / exchanged)
            (path / exchanged).write_text(text)
        real(*args, **more)
        step()
    setattr(os, name, call)

folder = Folder(path)
entries = tuple((role, _look(folder, file_name(role, sid)).file) for role in CLAIM)
for name in ("rename", "link", "unlink"):
    counted(name)
remove(folder, sid, entries)
"""


def crash(folder: Path, step: int, exchanged: str = "nothing") -> bool:
    """Remove in another process, killed at that step; whether it came so far.

    What is exchanged is made anew right before it is taken.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-I", "-c", CRASHING),
            *(str(folder), SID, str(step), exchanged),
            *(str(REPO), *filter(None, sys.path)),
        ],
        stderr=subprocess.PIPE,
        check=False,
    )
    assert done.stderr == b""
    assert done.returncode in {0, -signal.SIGKILL}
    return done.returncode != 0


def converge(opened: Folder) -> None:
    """What the background process does when it comes up."""
    for name in list(opened.names()):
        if is_taken(name):
            recover(opened, name)
    probe = Probe(opened)
    seen = probe.look(SID)
    for action in decide(seen, Desired.AS_FOUND, Policy(settle=0)).actions:
        assert isinstance(action, Remove)
        assert remove(opened, SID, action.entries).complete


def test_a_removal_that_is_killed_at_any_step_is_finished_by_the_next(opened: Folder) -> None:
    steps = 0
    while True:
        (opened.path / AGENT_FILE).write_text(str(dead_pid()))
        stale_pair(opened.path, SID)
        if not crash(opened.path, steps + 1):
            break
        steps += 1
        converge(opened)
        assert claimed(opened.path) == {}
    assert steps == 12  # before and after each of three renames and three unlinks
    assert claimed(opened.path) == {}


def test_a_removal_that_is_killed_while_it_puts_back_loses_nothing(opened: Folder) -> None:
    """A keeper's new pid file is caught instead of the old one."""
    steps = 0
    while True:
        with listening(opened.path, "other.rpc.sock") as (pid,):
            path = opened.path / PID_FILE
            path.write_text(str(pid))
            (opened.path / AGENT_FILE).write_text(str(dead_pid()))
            bare_socket(opened.path / SOCKET)
            more = crash(opened.path, steps + 1, exchanged=PID_FILE)
            for name in list(opened.names()):
                if is_taken(name):
                    assert recover(opened, name) is not None
            assert path.read_text() == str(pid)
            assert not any(map(is_taken, claimed(opened.path)))
        for name in list(opened.names()):
            (opened.path / name).unlink()
        if not more:
            break
        steps += 1
    assert steps == 14


# The race.

BORN = """
import os, random, socket, sys, time
folder, sid, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.chdir(folder)
path = sid + ".rpc.sock"
dice = random.Random(seed)
listener = None
while os.read(0, 1):
    if listener is not None:
        listener.close()
        listener = None
        os.write(1, b"d")
        os.read(0, 1)
    until = time.perf_counter() + dice.random() * 0.0002
    while time.perf_counter() < until:
        pass
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    for ending, text in ((".pid", os.getpid()), (".pi-pid", os.getppid())):
        file = os.open(path + ending, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        if dice.random() < 0.5:
            os.sched_yield()
        os.write(file, str(text).encode())
        os.close(file)
    os.write(1, b"b")
"""


def race(opened: Folder, rounds: int, seed: int) -> dict[Fate, int]:
    """A keeper of another make comes up while its forerunner's files are removed.

    Gives how often the forerunner's socket had which fate.
    """
    dead, met = str(dead_pid()), dict.fromkeys(Fate, 0)
    dice = random.Random(seed)
    command = [sys.executable, "-I", "-S", "-c", BORN, str(opened.path), SID, str(seed)]
    with ending(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    ) as born:
        assert born.stdin is not None
        assert born.stdout is not None
        bare_socket(opened.path / SOCKET)
        for number in range(rounds):
            for name in (PID_FILE, AGENT_FILE):
                (opened.path / name).write_text(dead)
            for name in (SOCKET, PID_FILE, AGENT_FILE):
                os.utime(opened.path / name, (number + 1, number + 1))
            entries = judged(opened)
            assert len(entries) == 3
            born.stdin.write(b"g")
            until = time.perf_counter() + dice.random() * 0.0004
            while time.perf_counter() < until:
                pass
            removal = remove(opened, SID, entries)
            assert born.stdout.read(1) == b"b"
            met[removal.fates[0][1]] += 1
            peer = opened.ask(SOCKET)
            assert (peer.answer, peer.pid) == (Answer.ACCEPTED, born.pid), number
            assert opened.pid_entry(PID_FILE, 0.0).pid == born.pid, number
            assert opened.pid_entry(AGENT_FILE, 0.0).pid == os.getpid(), number
            assert not any(map(is_taken, opened.names())), number
            born.stdin.write(b"e")
            assert born.stdout.read(1) == b"d"
        born.stdin.close()
    return met


@pytest.fixture
def in_memory() -> Iterator[Folder]:
    """A folder where files cost no disk: a race of many rounds should not wait for one."""
    shared = "/dev/shm"
    path = Path(tempfile.mkdtemp(prefix="pi-", dir=shared if os.path.isdir(shared) else None))
    with Folder(path) as opened:
        yield opened
    shutil.rmtree(path)


RACE = pytest.mark.chaos(
    "a keeper born while its forerunner's files go", "it listens and keeps its files, each round"
)


@RACE
@pytest.mark.timeout(900)
def test_a_keeper_of_another_make_comes_while_its_forerunners_files_go(
    in_memory: Folder, fault: Fault
) -> None:
    rounds = 200_000 if CAMPAIGN else 5000
    met = race(in_memory, rounds, seed=1)
    fault.count(rounds, checks=4 * rounds)
    assert sum(met.values()) == rounds
    assert met[Fate.REMOVED], "the keeper always came first: this was no race"
    assert met[Fate.CHANGED], "the keeper always came last: this was no race"


@RACE
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("log", ["kept", "deleted"])
def test_a_keeper_of_ours_comes_while_its_forerunners_files_go(
    opened: Folder, fault: Fault, log: str
) -> None:
    """Without its log there is no lock to meet at, and it must go well all the same."""
    rounds = 3000 if CAMPAIGN else 50
    dice = random.Random(log)
    (opened.path / LOG).touch()
    stale_pair(opened.path, SID)
    (opened.path / AGENT_FILE).write_text(str(dead_pid()))
    for number in range(rounds):
        entries = judged(opened)
        assert len(entries) == 3
        if log == "deleted":
            (opened.path / LOG).unlink()
        with new_keeper(opened.path) as keeper:
            begin = time.perf_counter() + dice.random() * 0.05
            while time.perf_counter() < begin and opened.pid_entry(PID_FILE, 0).pid != keeper.pid:
                pass
            end = time.perf_counter() + 0.01
            while time.perf_counter() < end:
                remove(opened, SID, entries)
            until_it_is_up(opened, keeper.pid)
            remove(opened, SID, entries)
            peer = opened.ask(SOCKET)
            assert (peer.answer, peer.pid) == (Answer.ACCEPTED, keeper.pid), number
            assert opened.pid_entry(PID_FILE, 0).pid == keeper.pid, number
            assert not any(map(is_taken, opened.names())), number
            keeper.send_signal(signal.SIGTERM if number == rounds - 1 else signal.SIGKILL)
            keeper.wait()
    fault.count(rounds, checks=3 * rounds)
    assert claimed(opened.path) == {}


@contextlib.contextmanager
def new_keeper(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    env = {
        **os.environ,
        "PI_KEEPER_SESSIONS_DIR": str(folder),
        "PI_KEEPER_PI_CMD": '["sleep"]',
        "PI_KEEPER_PI_ARGS": '["600"]',
    }
    with ending(
        subprocess.Popen([sys.executable, "-I", "-S", KEEPER_PROGRAM, SID], env=env)
    ) as keeper:
        yield keeper


def until_it_is_up(opened: Folder, keeper: int) -> None:
    """The agent pid file is what a keeper writes last."""

    def up() -> bool:
        return opened.pid_entry(AGENT_FILE, 0).pid in (SYSTEM.children(keeper) or ())

    until(up, f"keeper {keeper} is up, and its agent pid file says so")
