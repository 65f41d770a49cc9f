from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import bare_socket, open_descriptors, root, until
from stand_ins import NOBODY, listening

from reconciler import folder as folder_module
from reconciler.folder import Answer, Folder, Peer
from reconciler.observations import EntryKind

NAME = "s1.rpc.sock"
NOW = 7.0


@pytest.fixture
def opened(folder: Path) -> Iterator[Folder]:
    with Folder(folder) as opened:
        yield opened


# What stands under a name.

HOSTILE = {
    "link to a file": "a symbolic link",
    "link to a socket": "a symbolic link",
    "link to a folder": "a symbolic link",
    "dangling link": "a symbolic link",
    "folder": "a folder",
    "FIFO": "a FIFO",
    "device": "a character device",
    "block device": "a block device",
    "other user's": "owned by uid 65534",
}
NEEDS_ROOT = {"device", "block device", "other user's"}


def plant(path: Path, kind: str, good: str) -> None:
    """Put something under a name where a socket or a file belongs."""
    aim = path.parent / "aim"
    match kind:
        case "link to a file":
            aim.write_text("1")
            path.symlink_to(aim)
        case "link to a socket":
            bare_socket(aim)
            path.symlink_to(aim)
        case "link to a folder":
            aim.mkdir()
            path.symlink_to(aim)
        case "dangling link":
            path.symlink_to("nowhere")
        case "folder":
            path.mkdir()
        case "FIFO":
            os.mkfifo(path)
        case "device":
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        case "block device":
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, 99))
        case _:
            if good == "socket":
                bare_socket(path)
            else:
                path.write_text("1")
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


@pytest.mark.parametrize("good", ["socket", "file"])
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[root, pytest.mark.root] if k in NEEDS_ROOT else ()) for k in HOSTILE],
)
def test_hostile(opened: Folder, kind: str, good: str) -> None:
    plant(opened.path / NAME, kind, good)
    look = opened.socket_entry if good == "socket" else opened.pid_entry
    before = open_descriptors()
    entry = look(NAME, NOW)
    assert open_descriptors() == before
    assert entry.kind is EntryKind.HOSTILE
    assert HOSTILE[kind] in entry.detail
    assert entry.file is None
    assert entry.pid == 0


def test_a_file_where_a_socket_belongs_and_the_reverse(opened: Folder) -> None:
    (opened.path / "file").write_text("1")
    bare_socket(opened.path / "socket")
    assert opened.socket_entry("file", NOW).detail == "a file where a socket belongs"
    assert opened.pid_entry("socket", NOW).detail == "a socket where a file belongs"


@pytest.mark.parametrize("kind", ["link to a file", "FIFO", "other user's"])
def test_hostile_only_after_the_first_look(
    opened: Folder, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is opened is looked at once more: it may have been exchanged in between."""
    if kind in NEEDS_ROOT and os.geteuid() != 0:
        pytest.skip("needs root")
    good = opened.path / "good"
    good.write_text("12")
    honest = os.stat(good)
    plant(opened.path / NAME, kind, "file")
    monkeypatch.setattr(opened, "status", lambda _: honest)
    entry = opened.pid_entry(NAME, NOW)
    assert entry.kind in {EntryKind.HOSTILE, EntryKind.UNKNOWN}
    assert entry.pid == 0


@pytest.mark.parametrize(
    ("text", "kind", "pid"),
    [
        (b"12", EntryKind.PID, 12),
        (b"12\n", EntryKind.PID, 12),
        (b"1", EntryKind.PID, 1),
        (b"2147483647", EntryKind.PID, 2147483647),
        (b"", EntryKind.EMPTY, 0),
        (b"\n", EntryKind.BROKEN, 0),
        (b"0", EntryKind.BROKEN, 0),
        (b"-12", EntryKind.BROKEN, 0),
        (b"+12", EntryKind.BROKEN, 0),
        (b"1e3", EntryKind.BROKEN, 0),
        (b"0x10", EntryKind.BROKEN, 0),
        (b"1_000", EntryKind.BROKEN, 0),
        (b"12.0", EntryKind.BROKEN, 0),
        ("١٢".encode(), EntryKind.BROKEN, 0),
        ("¹²".encode("latin-1"), EntryKind.BROKEN, 0),
        (b"12\0", EntryKind.BROKEN, 0),
        (b"\0\0", EntryKind.BROKEN, 0),
        (b" 12", EntryKind.BROKEN, 0),
        (b"12 ", EntryKind.BROKEN, 0),
        (b"12\r\n", EntryKind.BROKEN, 0),
        (b"12\n\n", EntryKind.BROKEN, 0),
        (b"12\n13\n", EntryKind.BROKEN, 0),
        (b"2147483648", EntryKind.BROKEN, 0),
        (b"9223372036854775808", EntryKind.BROKEN, 0),
        (b"9" * 5000, EntryKind.BROKEN, 0),
        (b"0" * 62 + b"12" + b"3", EntryKind.BROKEN, 0),
        (b"\xff\xfe", EntryKind.BROKEN, 0),
    ],
)
def test_what_a_pid_file_says(opened: Folder, text: bytes, kind: EntryKind, pid: int) -> None:
    path = opened.path / NAME
    path.write_bytes(text)
    entry = opened.pid_entry(NAME, NOW)
    assert (entry.kind, entry.pid, entry.since) == (kind, pid, NOW)
    assert entry.file is not None
    assert (entry.file.inode, entry.file.size) == (path.stat().st_ino, len(text))
    assert entry.file.text == text[: folder_module.PID_FILE_LIMIT]


def test_a_huge_pid_file_is_read_by_its_first_bytes(opened: Folder) -> None:
    with open(opened.path / NAME, "wb") as file:
        file.truncate(1 << 30)
    entry = opened.pid_entry(NAME, NOW)
    assert entry.kind is EntryKind.BROKEN
    assert entry.file is not None
    assert entry.file.text == bytes(folder_module.PID_FILE_LIMIT)


def test_absent(opened: Folder) -> None:
    for entry in (opened.pid_entry(NAME, NOW), opened.socket_entry(NAME, NOW)):
        assert (entry.kind, entry.file, entry.present) == (EntryKind.ABSENT, None, False)


def test_gone_between_look_and_open(opened: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    good = opened.path / "good"
    good.write_text("12")
    status = os.stat(good)
    monkeypatch.setattr(opened, "status", lambda _: status)
    assert opened.pid_entry(NAME, NOW).kind is EntryKind.ABSENT


def rewrite(path: Path, text: str) -> None:
    """Write a file anew in place, and give it its old time back."""
    before = path.stat()
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def never(_: str) -> tuple[bytes, os.stat_result]:
    raise AssertionError("it was read")


def test_a_pid_file_that_has_not_changed_is_not_read_again(
    opened: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_RACY_NS", -sys.maxsize)  # it counts as long at rest
    (opened.path / NAME).write_text("12")
    before = opened.pid_entry(NAME, NOW)
    monkeypatch.setattr(opened, "_read", never)
    assert opened.pid_entry(NAME, NOW + 60, before=before) is before


@pytest.mark.parametrize("at_rest", [True, False])
def test_a_pid_file_that_hides_its_change_is_read_again(
    opened: Folder, monkeypatch: pytest.MonkeyPatch, *, at_rest: bool
) -> None:
    """Same inode, size and time; where the look came too soon, even the tick may be the same."""
    monkeypatch.setattr(folder_module, "_RACY_NS", -sys.maxsize if at_rest else sys.maxsize)
    path = opened.path / NAME
    path.write_text("12")
    before, changed = opened.pid_entry(NAME, NOW), path.stat().st_ctime_ns
    assert before.changed_ns == (changed if at_rest else 0)
    rewrite(path, "13")
    while at_rest and path.stat().st_ctime_ns == changed:
        rewrite(path, "13")
    entry = opened.pid_entry(NAME, NOW + 60, before=before)
    assert (entry.pid, entry.since) == (13, NOW + 60)


def test_a_pid_file_on_another_host_is_read_each_time(
    opened: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a network filesystem says of a file may be older than the file."""
    monkeypatch.setattr(folder_module, "_RACY_NS", -sys.maxsize)
    (opened.path / NAME).write_text("12")
    before = opened.pid_entry(NAME, NOW)
    opened.remote = True
    monkeypatch.setattr(opened, "_read", never)
    with pytest.raises(AssertionError, match="it was read"):
        opened.pid_entry(NAME, NOW, before=before)


def test_what_cannot_be_looked_at_is_not_known(opened: Folder) -> None:
    name = "x" * 300
    assert opened.socket_entry(name, NOW).kind is EntryKind.UNKNOWN
    entry = opened.pid_entry(name, NOW)
    assert entry.kind is EntryKind.UNKNOWN
    assert entry.detail == "cannot read it (File name too long)"


def test_socket_entry_tells_one_socket_from_the_next(opened: Folder) -> None:
    bare_socket(opened.path / NAME)
    first = opened.socket_entry(NAME, NOW)
    assert first.kind is EntryKind.SOCKET
    assert opened.socket_entry(NAME, NOW) == first
    os.unlink(opened.path / NAME)
    bare_socket(opened.path / NAME)
    assert opened.socket_entry(NAME, NOW).file != first.file


def test_names_are_those_that_are_text(opened: Folder) -> None:
    base = os.fsencode(opened.path)
    for name in (b"good", b"\xff\xfe.rpc.sock", b"a\nb", b"\x1b[31m", "é".encode(), b"with space"):
        open(os.path.join(base, name), "wb").close()
    assert sorted(opened.names()) == ["good", "with space", "é"]
    assert sorted(opened.names()) == ["good", "with space", "é"]


# Asking a socket.


def test_ask_a_listener(opened: Folder) -> None:
    with listening(opened.path, NAME) as (pid,):
        before = open_descriptors()
        assert opened.ask(NAME) == Peer(Answer.ACCEPTED, pid, alive=True)
        assert open_descriptors() == before


def test_ask_where_nobody_listens(opened: Folder) -> None:
    bare_socket(opened.path / NAME)
    assert opened.ask(NAME) == Peer(Answer.REFUSED)


def test_ask_one_after_the_other(opened: Folder) -> None:
    """What a dead one has refused asks the next: that costs no answer and no descriptor."""
    bare_socket(opened.path / "dead.rpc.sock")
    assert opened.ask("dead.rpc.sock") == Peer(Answer.REFUSED)
    before = len(open_descriptors())
    with listening(opened.path, NAME) as (pid,):
        for _ in range(3):
            assert opened.ask("dead.rpc.sock") == Peer(Answer.REFUSED)
            assert opened.ask("none.rpc.sock") == Peer(Answer.GONE)
            assert opened.ask(NAME) == Peer(Answer.ACCEPTED, pid, alive=True)
            assert opened.ask(NAME) == Peer(Answer.ACCEPTED, pid, alive=True)
    assert opened.ask(NAME) == Peer(Answer.REFUSED)
    assert len(open_descriptors()) == before


def test_ask_where_nothing_is(opened: Folder) -> None:
    assert opened.ask(NAME) == Peer(Answer.GONE)


def test_ask_a_listener_whose_backlog_is_full(opened: Folder) -> None:
    with listening(opened.path, NAME, backlog=0) as (pid,), contextlib.ExitStack() as clients:
        os.kill(pid, signal.SIGSTOP)
        answers: list[Answer] = []
        while len(answers) < 5 and Answer.BUSY not in answers:
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(str(opened.path / NAME))
            answers.append(opened.ask(NAME).answer)
        assert answers[-1] is Answer.BUSY
        assert Answer.REFUSED not in answers


def test_a_link_to_a_listener_is_not_followed(opened: Folder) -> None:
    with listening(opened.path, "real"):
        (opened.path / NAME).symlink_to("real")
        assert opened.ask(NAME) == Peer(Answer.CANNOT_TELL)


@pytest.mark.parametrize("by", [os.link, os.rename])
def test_a_listener_that_has_bound_another_name_is_not_named(
    opened: Folder, by: Callable[[Path, Path], None]
) -> None:
    """Its socket was put there by somebody else: it is the keeper of nothing."""
    with listening(opened.path, "s2.rpc.sock"):
        by(opened.path / "s2.rpc.sock", opened.path / NAME)
        assert opened.ask(NAME) == Peer(Answer.ACCEPTED)


@pytest.mark.parametrize("kind", ["FIFO", "folder", "link to a file"])
def test_ask_what_is_no_socket(opened: Folder, kind: str) -> None:
    plant(opened.path / NAME, kind, "socket")
    before = open_descriptors()
    assert opened.ask(NAME) == Peer(Answer.CANNOT_TELL)
    assert open_descriptors() == before


def test_ask_a_socket_of_another_type(opened: Folder) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        datagram.bind(str(opened.path / NAME))
        assert opened.ask(NAME) == Peer(Answer.CANNOT_TELL)


def test_ask_beyond_the_length_of_an_address(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    name = "n" * 99
    with listening(deep, name) as (pid,), Folder(deep) as opened:
        assert opened.ask(name) == Peer(Answer.ACCEPTED, pid, alive=True)


def test_ask_after_the_folder_was_moved(opened: Folder, tmp_path: Path) -> None:
    with listening(opened.path, NAME) as (pid,):
        opened.path.rename(tmp_path / "moved")
        assert opened.ask(NAME) == Peer(Answer.ACCEPTED, pid, alive=True)


def test_a_listener_that_is_dead_though_its_descriptor_lives_on(opened: Folder) -> None:
    """Its heir answers, and the kernel names the one that has called listen."""
    with listening(opened.path, NAME, heir=True) as (pid, _):
        assert opened.ask(NAME) == Peer(Answer.ACCEPTED, pid, alive=True)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not opened.ask(NAME).alive, "the listener is dead")
        peer = opened.ask(NAME)
        assert peer.answer is Answer.ACCEPTED
        assert peer.pid == pid
        os.waitpid(pid, 0)
        assert opened.ask(NAME) == Peer(Answer.ACCEPTED, pid, alive=False)


def test_a_kernel_that_does_not_know_the_question_is_believed(
    opened: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "SO_PEERPIDFD", 9999)
    with listening(opened.path, NAME) as (pid,):
        assert opened.ask(NAME) == Peer(Answer.ACCEPTED, pid, alive=True)


def test_elsewhere_than_on_linux_the_listener_has_no_name(
    opened: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(opened.path, NAME):
        monkeypatch.setattr(sys, "platform", "darwin")
        assert opened.ask(NAME) == Peer(Answer.ACCEPTED)


# The folder itself.


def test_one_lock_for_one_folder(opened: Folder) -> None:
    with Folder(opened.path) as second:
        assert opened.lock()
        assert opened.lock()
        assert not second.lock()
        assert second.lock_holder() == os.getpid()
        opened.close()
        assert second.lock()


def test_who_holds_the_lock_need_not_ask_the_kernel_whose_it_is(
    opened: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked with every look at a session that has left something."""
    read: list[object] = []
    monkeypatch.setattr(folder_module, "open", read.append, raising=False)
    assert opened.lock()
    assert (opened.lock_holder(), read) == (os.getpid(), [])


def test_nobody_holds_the_lock(opened: Folder) -> None:
    assert opened.lock_holder() is None


def test_the_lock_ends_with_its_process(opened: Folder) -> None:
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-I", "-S", "-c", code, opened.path], check=False)
    assert opened.lock()


def test_in_place(folder: Path, tmp_path: Path) -> None:
    with Folder(folder) as opened:
        assert opened.in_place()
        folder.rename(tmp_path / "moved")
        assert not opened.in_place()
        folder.mkdir()
        assert not opened.in_place()
        folder.rmdir()
        (tmp_path / "moved").rename(folder)
        assert opened.in_place()
        shutil.rmtree(folder)
        assert not opened.in_place()


def test_accesses_stay_with_the_folder_that_was_opened(opened: Folder, tmp_path: Path) -> None:
    (opened.path / NAME).write_text("12")
    opened.path.rename(tmp_path / "moved")
    opened.path.mkdir()
    (opened.path / NAME).write_text("13")
    assert opened.pid_entry(NAME, NOW).pid == 12
    assert list(opened.names()) == [NAME]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        Folder(tmp_path / "file")


def test_close_twice(folder: Path) -> None:
    before = open_descriptors()
    opened = Folder(folder)
    opened.close()
    opened.close()
    assert open_descriptors() == before


def test_a_local_folder_is_not_remote(opened: Folder) -> None:
    assert not opened.remote


@pytest.mark.parametrize(("filesystem", "remote"), [("nfs4", True), ("ext4", False), ("", False)])
def test_a_network_filesystem_is_remote(
    folder: Path, monkeypatch: pytest.MonkeyPatch, filesystem: str, *, remote: bool
) -> None:
    monkeypatch.setattr(folder_module, "filesystem_of", lambda _: filesystem)
    with Folder(folder) as opened:
        assert opened.remote == remote


def test_thefilesystem_of_a_folder() -> None:
    assert folder_module.filesystem_of(os.stat("/proc").st_dev) == "proc"
    assert folder_module.filesystem_of(os.makedev(4000, 1)) == ""
