from __future__ import annotations

import contextlib
import os
import resource
import select
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import as_nobody, bare_socket, open_descriptors, root, until

from reconciler import inotify
from reconciler.hints import LOOK_AT_ALL
from reconciler.watcher import SessionsWatcher

SID = "8c2c7f0e-2a4b-4c57-9d63-3f6f3f1f2a10"
NAMES = (f"{SID}.rpc.sock", f"{SID}.rpc.sock.pid", f"{SID}.rpc.sock.pi-pid")
QUEUE = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


class Watched:
    """A watcher at work, and the hints it gave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hints: list[str] = []
        self.complaints: list[str] = []
        self.reading = threading.Lock()
        self.done = threading.Event()
        self.reader = threading.Thread(target=self.read)
        self.watcher = SessionsWatcher(folder, self.hints.append, self.complaints.append)

    def read(self) -> None:
        """Read what comes until the watcher is stopped, as its owner's loop would."""
        poll = select.poll()
        poll.register(self.watcher.descriptor or -1, select.POLLIN)
        while not self.done.is_set():
            if poll.poll(20):
                with self.reading:
                    self.hints.extend(self.watcher.read())

    def start(self) -> None:
        self.watcher.start()
        self.reader.start()

    def stop(self) -> None:
        self.done.set()
        self.reader.join()
        self.watcher.stop()

    def caught_up(self) -> None:
        """Wait until all that happened in the folder until now has come through."""
        mark = f"mark-{time.monotonic_ns()}"
        (self.folder / f"{mark}.rpc.sock.pid").touch()
        until(lambda: mark in self.hints, "the mark comes through")
        (self.folder / f"{mark}.rpc.sock.pid").unlink()

    def hints_of(self, act: Callable[[], object]) -> set[str]:
        """The hints that an act brings, and no others."""
        self.caught_up()
        self.hints.clear()
        act()
        self.caught_up()
        return {hint for hint in self.hints if not hint.startswith("mark-")}

    def sees_entries(self) -> None:
        """Wait until what happens in the folder brings hints: it is watched, as it is now."""
        path = self.folder / NAMES[1]
        self.hints.clear()

        def told() -> bool:
            path.touch()
            path.unlink()
            return SID in self.hints

        until(told, "entries are watched")

    def asks_for_all(self, act: Callable[[], object]) -> None:
        self.hints.clear()
        act()
        until(lambda: LOOK_AT_ALL in self.hints, "a full look is asked for")


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    threads = set(threading.enumerate())
    it = Watched(folder)
    it.start()
    try:
        until(lambda: LOOK_AT_ALL in it.hints, "a full look at the start")
        yield it
    finally:
        it.stop()
        it.stop()
    assert set(threading.enumerate()) == threads, "threads live on"


# What brings a hint, and what does not.


@pytest.mark.parametrize("name", NAMES)
def test_each_change_of_an_entry_names_its_session(folder: Path, tmp_path: Path, name: str) -> None:
    path, aside = folder / name, tmp_path / "aside"
    with watched(folder) as it:
        assert it.hints_of(path.touch) == {SID}
        assert it.hints_of(lambda: path.chmod(0o600)) == {SID}
        assert it.hints_of(lambda: path.write_text("12")) == {SID}
        assert it.hints_of(lambda: path.rename(aside)) == {SID}
        assert it.hints_of(lambda: aside.rename(path)) == {SID}
        assert it.hints_of(path.unlink) == {SID}


def test_a_socket_that_is_bound_names_its_session(folder: Path) -> None:
    with watched(folder) as it:
        assert it.hints_of(lambda: bare_socket(folder / NAMES[0])) == {SID}


def test_a_move_from_one_session_to_another_names_both(folder: Path) -> None:
    (folder / NAMES[1]).touch()
    with watched(folder) as it:
        moved = it.hints_of(lambda: (folder / NAMES[1]).rename(folder / "other.rpc.sock.pid"))
        assert moved == {SID, "other"}


def test_reading_growing_and_foreign_names_bring_nothing(folder: Path) -> None:
    pid_file, log = folder / NAMES[1], folder / f"keeper-{SID}.log"
    pid_file.write_text("12")
    log.touch()

    def look() -> None:
        pid_file.read_text()
        os.listdir(folder)
        os.stat(pid_file)

    def grow() -> None:
        with log.open("a") as file:
            for _ in range(100):
                print("a line", file=file, flush=True)

    def foreign() -> None:
        for name in ("keeper-launch-x.log", "a.txt", ".x.rpc.sock", "../x", b"\xff.rpc.sock.pid"):
            with contextlib.suppress(FileNotFoundError):
                path = os.path.join(os.fsencode(folder), os.fsencode(name))
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
                os.unlink(path)
        (folder / "folder").mkdir()
        (folder / "folder" / NAMES[1]).touch()

    with watched(folder) as it:
        for act in (look, grow, foreign):
            assert it.hints_of(act) == set(), act


# A folder that comes and goes.


def test_a_folder_that_is_absent_with_its_parents_is_watched_once_made(tmp_path: Path) -> None:
    folder = tmp_path / "home" / ".pi" / "dashboard" / "sessions"
    with watched(folder) as it:
        it.asks_for_all(lambda: folder.mkdir(parents=True))
        it.sees_entries()


def test_each_parent_may_come_by_itself(tmp_path: Path) -> None:
    folder = tmp_path / "home" / ".pi" / "dashboard" / "sessions"
    with watched(folder) as it:
        for part in (*reversed([p for p in folder.parents if not p.exists()]), folder):
            it.asks_for_all(part.mkdir)
        it.sees_entries()


def test_a_folder_that_is_moved_into_place_is_watched(tmp_path: Path) -> None:
    folder, made = tmp_path / "a" / "sessions", tmp_path / "made"
    (made / "sessions").mkdir(parents=True)
    with watched(folder) as it:
        it.asks_for_all(lambda: made.rename(tmp_path / "a"))
        it.sees_entries()


def test_other_folders_that_come_beside_a_missing_one_bring_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "sessions"
    with watched(folder) as it:
        it.hints.clear()
        (tmp_path / "b").mkdir()
        it.asks_for_all(lambda: folder.mkdir(parents=True))
        it.sees_entries()


HELD = pytest.mark.parametrize("held", [False, True], ids=["free", "held open"])
"""A folder that a process holds open gives no notice of its own removal."""


@contextlib.contextmanager
def holding(*folders: Path, held: bool) -> Iterator[None]:
    descriptors = [os.open(folder, os.O_RDONLY) for folder in folders if held]
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@HELD
def test_a_folder_that_is_removed_and_made_again_is_watched_again(
    folder: Path, *, held: bool
) -> None:
    with watched(folder) as it:
        for _ in range(3):
            with holding(folder, held=held):
                it.asks_for_all(folder.rmdir)
                it.asks_for_all(folder.mkdir)
                it.sees_entries()


@HELD
def test_a_folder_that_is_removed_with_all_above_it_is_watched_again(
    folder: Path, *, held: bool
) -> None:
    above = [folder, *folder.parents[:2]]
    with watched(folder) as it, holding(*above, held=held):
        it.asks_for_all(lambda: shutil.rmtree(folder.parents[1]))
        it.asks_for_all(lambda: folder.mkdir(parents=True))
        it.sees_entries()


@HELD
def test_parents_that_go_one_by_one_are_watched_again(folder: Path, *, held: bool) -> None:
    above = [folder, *folder.parents[:2]]
    with watched(folder) as it, holding(*above, held=held):
        for path in above:
            it.asks_for_all(path.rmdir)
        it.asks_for_all(lambda: folder.mkdir(parents=True))
        it.sees_entries()


@HELD
def test_a_folder_that_another_one_replaces_is_left_for_that(folder: Path, *, held: bool) -> None:
    other = folder.with_name("other")
    other.mkdir()
    with watched(folder) as it, holding(folder, held=held):
        it.asks_for_all(lambda: other.rename(folder))
        it.sees_entries()


def test_a_folder_that_is_moved_away_is_left_and_watched_when_it_is_back(
    tmp_path: Path, folder: Path
) -> None:
    away = tmp_path / "away"
    with watched(folder) as it:
        it.asks_for_all(lambda: folder.rename(away))
        it.asks_for_all(folder.mkdir)
        it.sees_entries()
        assert it.hints_of((away / NAMES[0]).touch) == set()
        it.asks_for_all(folder.rmdir)
        it.asks_for_all(lambda: away.rename(folder))
        it.sees_entries()


def test_a_parent_that_is_moved_away_takes_the_folder_with_it(folder: Path) -> None:
    away = folder.parents[2] / "away"
    with watched(folder) as it:
        it.asks_for_all(lambda: folder.parents[1].rename(away))
        it.asks_for_all(lambda: folder.mkdir(parents=True))
        it.sees_entries()
        moved = away / "dashboard" / "sessions"
        assert it.hints_of((moved / NAMES[0]).touch) == set()


def test_a_folder_that_becomes_a_file_and_a_folder_again(folder: Path) -> None:
    def file_instead() -> None:
        folder.rmdir()
        folder.touch()

    with watched(folder) as it:
        it.asks_for_all(file_instead)
        folder.unlink()
        it.asks_for_all(folder.mkdir)
        it.sees_entries()


def test_recheck_finds_a_folder_that_a_link_leads_to_now(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sessions").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to("one")
    with watched(link / "sessions") as it:
        it.sees_entries()
        it.hints.clear()
        it.watcher.recheck()
        it.sees_entries()
        assert LOOK_AT_ALL not in it.hints, "nothing had changed"
        link.unlink()
        link.symlink_to("two")
        it.asks_for_all(it.watcher.recheck)
        it.sees_entries()


@pytest.mark.parametrize("way", ["../sessions", ".", "again/sessions", "again/again/sessions"])
def test_a_way_that_passes_the_same_folder_twice(folder: Path, way: str) -> None:
    (folder.parent / "again").symlink_to(".")
    start = folder if way.startswith(".") else folder.parent
    with warnings.catch_warnings(record=True) as warned, watched(start / way) as it:
        it.sees_entries()
        it.asks_for_all(lambda: folder.rename(folder.with_name("away")))
        it.asks_for_all(lambda: folder.with_name("away").rename(folder))
        it.sees_entries()
        assert it.complaints == []
    assert [str(each.message) for each in warned] == []


@root
def test_a_folder_under_one_that_may_only_be_passed_through_is_watched() -> None:
    base = Path(tempfile.mkdtemp(prefix="reconciler-", dir="/tmp"))
    folder = base / "closed" / "open" / "sessions"
    folder.mkdir(parents=True)
    try:
        for path in (base / "closed" / "open", folder):
            os.chown(path, 65534, 65534)
        base.chmod(0o711)
        (base / "closed").chmod(0o711)
        with as_nobody(), watched(folder) as it:
            it.sees_entries()
            it.asks_for_all(folder.rmdir)
            it.asks_for_all(folder.mkdir)
            it.sees_entries()
    finally:
        shutil.rmtree(base)


# Losing and running out.


def test_an_overflow_of_the_kernels_queue_asks_for_a_full_look(folder: Path) -> None:
    for name in NAMES[:2]:
        (folder / name).touch()
    with watched(folder) as it:
        it.caught_up()
        assert it.watcher.overflows == 0
        with it.reading:  # the reader is held up
            it.hints.clear()
            for turn in range(QUEUE + 2):  # what is equal to the last one is joined to it
                (folder / NAMES[turn % 2]).chmod(0o600)
        until(lambda: LOOK_AT_ALL in it.hints, "a full look is asked for")
        assert it.watcher.overflows == 1
        it.sees_entries()


@contextlib.contextmanager
def no_descriptor_left(but: int = 0) -> Iterator[None]:
    """Let this process have no more descriptors than it has, but for a few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 16, hard))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(but):
            os.close(taken.pop())
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_a_descriptor_it_complains_and_comes_back_at_a_recheck(folder: Path) -> None:
    with watched(folder) as it:
        with no_descriptor_left():
            it.asks_for_all(folder.rmdir)
            until(lambda: it.complaints, "a complaint")
        assert it.complaints == [f"{folder} cannot be watched: inotify instance limit reached"]
        folder.mkdir()
        it.asks_for_all(it.watcher.recheck)
        it.sees_entries()


def until_laid(it: Watched) -> None:
    """Wait until the emitter's thread has done what it was asked for, and sleeps again."""
    assert it.watcher._observer is not None
    (emitter,) = it.watcher._observer.emitters
    bell = select.poll()
    bell.register(emitter.events._bell, select.POLLIN)  # type: ignore[attr-defined]
    until(lambda: not bell.poll(0), "it woke up")
    with emitter._lock:  # type: ignore[attr-defined]
        return


def test_it_starts_without_a_descriptor_and_complains_once(folder: Path) -> None:
    it = Watched(folder)
    try:
        with no_descriptor_left():
            it.start()
            for _ in range(3):  # each full look rechecks: that alone must not ask for another
                it.watcher.recheck()
                until_laid(it)
            assert it.hints == []
        assert len(it.complaints) == 1
        it.asks_for_all(it.watcher.recheck)
        it.sees_entries()
    finally:
        it.stop()


@pytest.mark.parametrize("but", [1, 2])
def test_a_watch_for_which_too_few_are_left_costs_no_descriptor(folder: Path, but: int) -> None:
    before = len(open_descriptors())
    it = Watched(folder)
    try:
        with no_descriptor_left(but):
            it.start()
            for _ in range(3):
                it.watcher.recheck()
                until_laid(it)
        assert len(it.complaints) == 1
    finally:
        it.stop()
    assert len(open_descriptors()) == before


def test_no_descriptor_or_thread_is_lost_over_many_layings(folder: Path) -> None:
    with watched(folder) as it:
        it.sees_entries()
        before, threads = len(open_descriptors()), threading.active_count()
        for _ in range(50):
            it.asks_for_all(folder.rmdir)
            it.asks_for_all(folder.mkdir)
            it.sees_entries()
        until(lambda: (len(open_descriptors()), threading.active_count()) == (before, threads))


def test_a_folder_that_goes_while_it_is_laid_costs_no_descriptor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = inotify._chain, len(open_descriptors())
    gone = threading.Event()

    def just_gone(target: str) -> inotify.Chain:
        chain = real(target)
        if not gone.is_set() and chain[-1][0] == target:
            folder.rmdir()
            gone.set()
        return chain

    monkeypatch.setattr(inotify, "_chain", just_gone)
    it = Watched(folder)
    it.start()
    try:
        assert gone.is_set()
        it.asks_for_all(folder.mkdir)  # what is above it is watched again by itself
        it.sees_entries()
        assert it.complaints == []
    finally:
        it.stop()
    assert len(open_descriptors()) == before


def test_at_rest_no_thread_wakes_up(folder: Path) -> None:
    before = {thread.native_id for thread in threading.enumerate()}
    with watched(folder) as it:
        it.caught_up()
        it.caught_up()
        own = [t.native_id for t in threading.enumerate() if t.native_id not in before]
        own.remove(it.reader.native_id)  # that one is not the watcher's
        assert len(own) == 2

        def switches() -> int:
            texts = [Path(f"/proc/self/task/{each}/status").read_text() for each in own]
            return sum(int(t.rsplit("\n", 3)[1].split()[1]) for t in texts)

        def rest() -> bool:
            before = switches()
            time.sleep(2)  # what is measured is that nothing happens
            return switches() - before <= 2

        until(rest, "two seconds in which they sleep: who wakes up by itself never has them")
