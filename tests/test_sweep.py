from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import (
    bare_socket,
    dead_pid,
    root,
    until,
)
from stand_ins import ending
from test_chaos_disk import Disk
from test_chaos_disk import disk as disk  # noqa: PLC0414 - a fixture
from test_removal import a_fifo, new_keeper, until_it_is_up

from reconciler import sweep
from reconciler.budget import FIRST_DAY, LogBudget, Step, Why, steps
from reconciler.folder import Folder
from reconciler.removal import Fate, hidden_name
from reconciler.sweep import BELIEVED, LogSweeper, Report, carry_out, survey

SID = "5f0e7c1e-0c50-4f0e-9b39-4e4a3a2f3d11"
KEEPER_LOG, LAUNCH_LOG = f"keeper-{SID}.log", f"keeper-launch-{SID}.log"
NOTHING = LogBudget(total=0, each=1000, age=1e12)
"""A budget in which no log of an ended session has room."""
SHORT = LogBudget(total=10**9, each=1000, age=1e12)


@pytest.fixture
def opened(folder: Path) -> Iterator[Folder]:
    with Folder(folder) as opened:
        yield opened


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let so much time pass that a sweeper goes by the clock."""

    def pass_time() -> None:
        now = sweep._elapsed() + BELIEVED
        monkeypatch.setattr(sweep, "_elapsed", lambda: now)

    return pass_time


def swept(
    opened: Folder, budget: LogBudget = NOTHING, living: frozenset[str] = frozenset()
) -> Report:
    return LogSweeper(budget).sweep(opened, living)


def old_logs(folder: Path, sid: str = SID) -> None:
    for name in (f"keeper-{sid}.log", f"keeper-launch-{sid}.log"):
        (folder / name).write_text("old\n" * 10)


# What goes.


def test_the_logs_of_an_ended_session_go_both(opened: Folder) -> None:
    old_logs(opened.path)
    report = swept(opened)
    assert os.listdir(opened.path) == []
    assert [(each.why, sorted(each.logs), each.freed) for each in report.swept] == [
        (Why.TOTAL, [LAUNCH_LOG, KEEPER_LOG][::-1], 80)
    ]
    assert (report.kept, report.failures) == (0, ())


def test_logs_that_are_too_old_go_and_others_stay(
    opened: Folder, believed: Callable[[], None]
) -> None:
    for sid, age in (("old", 100), ("young", 10)):
        old_logs(opened.path, sid)
        for name in (f"keeper-{sid}.log", f"keeper-launch-{sid}.log"):
            os.utime(opened.path / name, (time.time() - age,) * 2)
    sweeper = LogSweeper(LogBudget(age=60))
    assert sweeper.sweep(opened, ()).swept == (), "the clock may be a wrong one yet"
    believed()
    sweeper.sweep(opened, ())
    assert sorted(os.listdir(opened.path)) == ["keeper-launch-young.log", "keeper-young.log"]


def test_a_clock_that_is_set_forward_makes_no_log_old(
    opened: Folder, monkeypatch: pytest.MonkeyPatch, believed: Callable[[], None]
) -> None:
    old_logs(opened.path)
    sweeper = LogSweeper(LogBudget(age=2 * BELIEVED))
    believed()
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert sweeper.sweep(opened, ()).swept == ()
    assert len(os.listdir(opened.path)) == 2


def test_a_clock_that_was_ahead_when_the_daemon_started_makes_no_log_old(
    opened: Folder, monkeypatch: pytest.MonkeyPatch, believed: Callable[[], None]
) -> None:
    old_logs(opened.path)
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time", lambda: 4e9)
        sweeper = LogSweeper(LogBudget(age=60))
        assert sweeper.sweep(opened, ()).swept == ()
    believed()  # by then it was set right
    assert sweeper.sweep(opened, ()).swept == ()
    assert len(os.listdir(opened.path)) == 2


def test_a_long_log_is_cut_to_whole_lines_of_its_newest_half(opened: Folder) -> None:
    path = opened.path / KEEPER_LOG
    lines = [f"line {number:04d}\n" for number in range(1000)]
    path.write_text("".join(lines))
    os.utime(path, ns=(5, 5 * 10**9))
    path.chmod(0o600)
    report = swept(opened, SHORT)
    assert path.read_text() == "".join(lines[-50:])
    assert (path.stat().st_mtime_ns, path.stat().st_mode & 0o777) == (5 * 10**9, 0o600)
    assert [(each.why, each.logs) for each in report.swept] == [(Why.EACH, (KEEPER_LOG,))]
    assert os.listdir(opened.path) == [KEEPER_LOG]
    assert swept(opened, SHORT).swept == ()


@pytest.mark.parametrize("text", [b"x" * 5000, b"x" * 4999 + b"\n"])
def test_a_long_log_of_a_single_line_keeps_its_end(opened: Folder, text: bytes) -> None:
    path = opened.path / KEEPER_LOG
    path.write_bytes(text)
    swept(opened, SHORT)
    assert path.read_bytes() == text[-500:]


def test_a_log_longer_than_a_block_is_cut_right(opened: Folder) -> None:
    path = opened.path / KEEPER_LOG
    line = b"%07d\n"
    path.write_bytes(b"".join(line % number for number in range(1_000_000)))
    swept(opened, LogBudget(each=5 * 10**6))
    kept = path.read_bytes()
    assert kept == b"".join(
        line % number for number in range(1_000_000 - len(kept) // 8, 1_000_000)
    )
    assert 2.4e6 < len(kept) <= 2.5e6


@root
def test_on_a_full_disk_logs_are_cut_and_removed_all_the_same(
    disk: Disk, believed: Callable[[], None]
) -> None:
    lines = [b"%07d\n" % number for number in range(100_000)]
    (disk.folder / "keeper-long.log").write_bytes(b"".join(lines))
    (disk.folder / "keeper-old.log").write_bytes(b"".join(lines))
    os.utime(disk.folder / "keeper-old.log", (FIRST_DAY, FIRST_DAY))
    disk.fill()
    sweeper = LogSweeper(LogBudget(each=400_000))
    believed()
    with Folder(disk.folder) as opened:
        report = sweeper.sweep(opened, ())
    assert [each.why for each in report.swept] == [Why.AGE, Why.EACH]
    assert report.failures == ()
    assert os.listdir(disk.folder) == ["keeper-long.log"]
    assert (disk.folder / "keeper-long.log").read_bytes() == b"".join(lines[-25_000:])


# What stays.


def a_claim(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_text(str(dead_pid()))

    return make


@pytest.mark.parametrize(
    "claim",
    [
        lambda folder: bare_socket(folder / f"{SID}.rpc.sock"),
        a_claim(f"{SID}.rpc.sock.pid"),
        a_claim(f"{SID}.rpc.sock.pi-pid"),
        lambda folder: (folder / f"{SID}.rpc.sock").symlink_to("/nowhere"),
    ],
)
def test_what_is_not_known_to_be_over_keeps_its_logs(
    opened: Folder, claim: Callable[[Path], None]
) -> None:
    old_logs(opened.path)
    claim(opened.path)
    assert swept(opened).swept == ()
    assert (opened.path / KEEPER_LOG).exists()


def test_a_session_that_is_said_to_live_keeps_its_logs(opened: Folder) -> None:
    old_logs(opened.path)
    assert swept(opened, living=frozenset({SID})).swept == ()


def test_on_a_network_filesystem_no_session_is_known_to_be_over(
    opened: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_logs(opened.path)
    monkeypatch.setattr(opened, "remote", True)
    assert swept(opened).swept == ()


def test_other_names_and_notes_and_what_is_no_file_are_not_touched(
    opened: Folder, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_text("x" * 5000)
    (opened.path / KEEPER_LOG).symlink_to(target)
    os.mkfifo(opened.path / LAUNCH_LOG)
    (opened.path / "keeper-folder.log").mkdir()
    for name in ("keeper-x.leave", "notes.log", "keeper-.log", "keeper-bad name.log", "server.log"):
        (opened.path / name).write_text("x" * 5000)
    before = sorted(os.listdir(opened.path))
    for budget in (NOTHING, SHORT, LogBudget(age=0)):
        assert swept(opened, budget) == Report((), (), 0)
    assert sorted(os.listdir(opened.path)) == before
    assert target.stat().st_size == 5000


@root
def test_anothers_log_is_not_touched(opened: Folder) -> None:
    old_logs(opened.path)
    os.chown(opened.path / KEEPER_LOG, 65534, 65534)
    swept(opened)
    assert os.listdir(opened.path) == [KEEPER_LOG]


@pytest.mark.parametrize("budget", [NOTHING, LogBudget(total=10**9, each=10)])
@pytest.mark.parametrize("name", [KEEPER_LOG, LAUNCH_LOG])
def test_a_log_that_somebody_writes_to_stays_and_its_writer_goes_on(
    opened: Folder, name: str, budget: LogBudget
) -> None:
    """A keeper that has no file, say, or what a session has started."""
    old_logs(opened.path)
    with (opened.path / name).open("ab", buffering=0) as writer:
        swept(opened, budget)
        writer.write(b"new\n")
    assert (opened.path / name).read_text() == "old\n" * 10 + "new\n"
    assert not [each for each in os.listdir(opened.path) if each.startswith(".")]


@pytest.mark.skipif(sys.platform != "linux", reason="leases of Linux")
def test_a_keeper_that_starts_while_the_kernel_is_asked_about_its_log_waits_for_the_answer(
    opened: Folder,
) -> None:
    (opened.path / KEEPER_LOG).touch()
    broken: list[int] = []
    before = signal.signal(signal.SIGURG, lambda number, _: broken.append(number))
    lease = os.open(opened.path / KEEPER_LOG, os.O_RDONLY)
    fcntl.fcntl(lease, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    try:
        with new_keeper(opened.path) as keeper:
            until(lambda: broken, "the keeper has come to its log")
            assert keeper.poll() is None
            fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            until_it_is_up(opened, keeper.pid)
            keeper.terminate()
            assert keeper.wait() == 0
    finally:
        os.close(lease)
        signal.signal(signal.SIGURG, before)
    assert "keeper.listening" in (opened.path / KEEPER_LOG).read_text()


def test_a_log_that_is_only_read_goes(opened: Folder) -> None:
    old_logs(opened.path)
    with (opened.path / KEEPER_LOG).open("rb"):
        swept(opened)
    assert os.listdir(opened.path) == []


def test_a_locked_log_stays(opened: Folder) -> None:
    old_logs(opened.path)
    with (opened.path / KEEPER_LOG).open("rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert swept(opened).swept == ()
    assert len(os.listdir(opened.path)) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("another"),
        lambda path: os.utime(path, (1, 1)),
        lambda path: (path.rename(path.with_name("kept")), path.write_text("old\n" * 10)),
        lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
        a_fifo,
        lambda path: bare_socket(path.with_name(f"{SID}.rpc.sock")),
    ],
)
def test_what_has_changed_since_the_look_stays(
    opened: Folder, change: Callable[[Path], object]
) -> None:
    path = opened.path / KEEPER_LOG
    path.write_text("old\n" * 10)
    (step,) = steps_of(opened)
    change(path)
    inode = path.lstat().st_ino
    assert carry_out(opened, step) is Fate.CHANGED
    assert path.lstat().st_ino == inode
    assert not [each for each in os.listdir(opened.path) if each.startswith(".")]


def steps_of(opened: Folder, budget: LogBudget = NOTHING) -> tuple[Step, ...]:
    logs = survey(opened, list(opened.names()), ())
    return steps(logs, budget, time.time())


def test_what_is_gone_is_gone(opened: Folder) -> None:
    (opened.path / KEEPER_LOG).touch()
    (step,) = steps_of(opened, LogBudget(age=-1))
    (opened.path / KEEPER_LOG).unlink()
    assert carry_out(opened, step) is Fate.GONE


@pytest.mark.parametrize("keep", [0, 500])
def test_a_keeper_of_another_make_that_comes_at_the_last_moment_keeps_its_log(
    opened: Folder, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    path = opened.path / KEEPER_LOG
    path.write_text("old\n" * 1000)
    (step,) = steps_of(opened, SHORT if keep else NOTHING)
    assert step.keep == keep
    rename, born = os.rename, []

    def late(name: str, hidden: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        born.append(path.open("ab", buffering=0))
        rename(name, hidden, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", late)
    assert carry_out(opened, step) is Fate.CHANGED
    born[0].write(b"new\n")
    born[0].close()
    assert path.read_text() == "old\n" * 1000 + "new\n"


def test_a_log_that_is_another_file_as_well_is_not_cut(opened: Folder) -> None:
    """An agent can link whatever it likes to the name of a log."""
    precious = opened.path.parent / "precious"
    precious.write_text("kept\n" * 1000)
    (opened.path / KEEPER_LOG).hardlink_to(precious)
    assert swept(opened, SHORT).swept == ()
    assert precious.read_text() == "kept\n" * 1000
    assert os.listdir(opened.path) == [KEEPER_LOG]
    swept(opened, NOTHING)
    assert os.listdir(opened.path) == []
    assert precious.read_text() == "kept\n" * 1000


def test_what_is_put_under_the_hidden_name_is_not_cut(
    opened: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = opened.path.parent / "precious"
    precious.write_text("kept\n" * 1000)
    (opened.path / KEEPER_LOG).write_text("old\n" * 1000)
    (step,) = steps_of(opened, SHORT)
    hidden = opened.path / hidden_name(KEEPER_LOG)
    opening = os.open

    def late(path: str, flags: int, *args: int, dir_fd: int | None = None) -> int:
        if path == hidden.name and flags & os.O_RDWR:
            precious.rename(hidden)
        return opening(path, flags, *args, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", late)
    assert carry_out(opened, step) is Fate.CHANGED
    assert (opened.path / KEEPER_LOG).read_text() == "kept\n" * 1000


# It was killed in between.


@pytest.mark.parametrize("state", ["hidden", "both names", "a newer one"])
def test_a_log_that_a_killed_sweep_has_hidden_comes_back(opened: Folder, state: str) -> None:
    hidden = opened.path / f".{KEEPER_LOG}.taken-{dead_pid()}"
    hidden.write_text("old\n")
    path = opened.path / KEEPER_LOG
    if state == "both names":
        path.hardlink_to(hidden)
    elif state == "a newer one":
        path.write_text("new\n")
    swept(opened, LogBudget())
    assert os.listdir(opened.path) == [KEEPER_LOG]
    assert path.read_text() == ("new\n" if state == "a newer one" else "old\n")


def test_a_hidden_log_that_is_written_to_stays(opened: Folder) -> None:
    hidden = opened.path / f".{KEEPER_LOG}.taken-{dead_pid()}"
    (opened.path / KEEPER_LOG).write_text("new\n")
    with hidden.open("ab"):
        swept(opened, LogBudget())
    assert hidden.exists()
    swept(opened, LogBudget())
    assert os.listdir(opened.path) == [KEEPER_LOG]


def test_a_hidden_log_whose_sweeper_may_be_at_work_stays(opened: Folder) -> None:
    code = "import os, sys; os.open(sys.argv[1], os.O_RDONLY); print(flush=True); input()"
    command = [sys.executable, "-I", "-S", "-c", code, str(opened.path)]
    with ending(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)) as other:
        assert other.stdout is not None
        other.stdout.readline()
        hidden = opened.path / f".{KEEPER_LOG}.taken-{other.pid}"
        hidden.write_text("old\n")
        swept(opened, LogBudget())
        assert os.listdir(opened.path) == [hidden.name]
    swept(opened, LogBudget())
    assert os.listdir(opened.path) == [KEEPER_LOG]


SWEEP_AND_DIE = """
import os, signal, sys
from pathlib import Path
from reconciler.budget import LogBudget
from reconciler.folder import Folder
from reconciler.sweep import LogSweeper
deadly, folder = sys.argv[1], Folder(Path(sys.argv[2]))
act = getattr(os, deadly)
def last(*args, **more):
    if sys.argv[3] == "after":
        act(*args, **more)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, deadly, last)
LogSweeper(LogBudget(total=4000, each=1000, age=1e12)).sweep(folder, ())
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["rename", "pwrite", "ftruncate", "utime", "link", "unlink"])
def test_killed_at_any_call_and_started_again_it_ends_in_the_same_place(
    opened: Folder, call: str, when: str
) -> None:
    lines = [f"line {number:04d}\n" for number in range(1000)]
    for number in range(3):
        path = opened.path / f"keeper-{number}.log"
        path.write_text("".join(lines))
        os.utime(path, (number, number))
    command = [sys.executable, "-c", SWEEP_AND_DIE, call, str(opened.path), when]
    ended = subprocess.run(
        command, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert ended.returncode == -signal.SIGKILL
    budget = LogBudget(total=4000, each=1000, age=1e12)
    swept(opened, budget)
    assert swept(opened, budget).swept == ()
    assert set(os.listdir(opened.path)) == {f"keeper-{number}.log" for number in range(3)}
    for path in opened.path.iterdir():
        assert path.read_text() == "".join(lines[-50:])


def test_a_sweep_that_is_asked_to_end_puts_back_what_it_has_begun(opened: Folder) -> None:
    (opened.path / KEEPER_LOG).write_text("old\n" * 1000)
    stop = threading.Event()
    stop.set()
    (step,) = steps_of(opened, SHORT)
    assert carry_out(opened, step, stop) is Fate.CHANGED
    assert (opened.path / KEEPER_LOG).read_text() == "old\n" * 1000
    assert LogSweeper(SHORT).sweep(opened, (), stop=stop).swept == ()


def test_a_log_that_cannot_be_removed_is_told_and_holds_no_other_up(
    opened: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_logs(opened.path, "a")
    old_logs(opened.path, "b")
    unlink = os.unlink

    def failing(name: str, *, dir_fd: int) -> None:
        if name == hidden_name("keeper-a.log"):
            raise PermissionError(1, "Operation not permitted")
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", failing)
    report = swept(opened)
    assert report.failures == ("keeper-a.log: Operation not permitted",)
    monkeypatch.undo()
    swept(opened)
    assert os.listdir(opened.path) == []
