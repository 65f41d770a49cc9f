from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from conftest import root
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler import tail
from reconciler.budget import LogBudget
from reconciler.folder import Folder
from reconciler.sweep import LogSweeper
from reconciler.tail import LogFile, UnreadableLogError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keeper-demo.log"


def read(path: Path, count: int | None = None, since: float | None = None) -> list[bytes]:
    with LogFile(path.parent, path.name) as log:
        log.go_to(count=count, since=since)
        return list(log.lines())


@settings(max_examples=200)
@given(
    lines=st.lists(st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b".")), max_size=12),
    ended=st.booleans(),
    count=st.integers(0, 14),
    block=st.integers(1, 9),
)
def test_the_last_lines_are_those_of_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    lines: list[bytes],
    ended: bool,
    count: int,
    block: int,
) -> None:
    path = tmp_path_factory.mktemp("tail") / "log"
    path.write_bytes(text := b"\n".join(lines) + b"\n" * ended)
    expected = text.split(b"\n")
    if not expected[-1]:
        expected.pop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "_BLOCK", block)
        assert read(path) == expected
        assert read(path, count) == expected[max(0, len(expected) - count) :]


def test_a_long_log_is_read_from_its_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with path.open("wb") as log:
        log.truncate(20 * 10**9)  # a hole: it takes no room, and would take long to read
        log.seek(0, os.SEEK_END)
        log.write(b"\nthe last\nof all\n")
    pread, asked = os.pread, []

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        asked.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    assert read(path, 2) == [b"the last", b"of all"]
    assert sum(asked) < 400_000


def stamped(second: int, text: str = "x") -> str:
    return f"2026-03-01T09:00:{second:02d}.000Z {text}\n"


NINE = 1772355600.0


def test_since_a_moment_lines_without_a_time_belong_to_the_one_before(path: Path) -> None:
    path.write_text(f"head\n{stamped(1)}one\n{stamped(2)}two\ntwo\n{stamped(3)}three\n")
    assert read(path, since=NINE + 1.5) == [
        *stamped(2).encode().split(b"\n")[:1],
        b"two",
        b"two",
        *stamped(3).encode().split(b"\n")[:1],
        b"three",
    ]
    assert read(path, since=NINE + 3)[1:] == [b"three"]
    assert read(path, since=NINE + 4) == []
    assert read(path, count=1, since=NINE + 1.5) == [b"three"]
    assert len(read(path, count=100, since=NINE + 1.5)) == 5
    assert len(read(path, since=0)) == 7  # what stands before the first time is of no known one


def test_in_a_log_without_times_its_last_change_counts(path: Path) -> None:
    path.write_text("Traceback\n")
    os.utime(path, (100, 100))
    assert read(path, since=100) == [b"Traceback"]
    assert read(path, since=101) == []


# Following.


def test_only_finished_lines_are_news(path: Path) -> None:
    path.write_bytes(b"old\nhal")
    with LogFile(path.parent, path.name) as log, path.open("ab", buffering=0) as writer:
        log.go_to(count=0)
        assert list(log.news()) == []
        writer.write(b"f")
        assert list(log.news()) == []
        writer.write(b"\nnext\n")
        assert list(log.news()) == [b"f", b"next"]


def test_a_log_that_is_emptied_goes_on_from_its_beginning(path: Path) -> None:
    path.write_bytes(b"old\nbegun")
    with LogFile(path.parent, path.name) as log:
        assert list(log.news()) == [b"old"]
        path.write_bytes(b"")
        assert list(log.news()) == []
        path.write_bytes(b"new\n")
        assert list(log.news()) == [b"new"]


def test_a_log_that_is_cut_in_place_goes_on_where_it_was(path: Path) -> None:
    """As a keeper of ours does it, with what came right before."""
    lines = [b"%06d" % number for number in range(10_000)]
    path.write_bytes(b"\n".join(lines) + b"\nbeg")
    with LogFile(path.parent, path.name) as log:
        assert list(log.news()) == lines
        newer = path.read_bytes()[40_000:] + b"un\nafter\n"
        with path.open("r+b") as cut:
            cut.write(newer)
            cut.truncate()
        assert list(log.news()) == [b"begun", b"after"]
        with path.open("ab") as writer:
            writer.write(b"more\n")
        assert list(log.news()) == [b"more"]


def test_a_log_that_a_newer_one_replaces_is_read_to_its_end_first(path: Path) -> None:
    path.write_bytes(b"a\n")
    with LogFile(path.parent, path.name) as log, path.open("ab", buffering=0) as writer:
        assert list(log.news()) == [b"a"]
        path.rename(path.with_name("away"))
        writer.write(b"b\nlast")
        assert list(log.news()) == [b"b"]
        path.write_bytes(b"new\n")
        writer.write(b" words")
        assert list(log.news()) == [b"last words", b"new"]


def test_a_replacement_that_is_none_is_not_read(path: Path) -> None:
    path.write_bytes(b"a\n")
    with LogFile(path.parent, path.name) as log:
        path.unlink()
        path.symlink_to("/etc/passwd")
        assert list(log.news()) == [b"a"]
        assert list(log.news()) == []
        path.unlink()
        os.mkfifo(path)
        assert list(log.news()) == []
        path.unlink()
        path.write_bytes(b"new\n")
        assert list(log.news()) == [b"new"]


def test_a_sweep_that_cuts_a_log_is_followed(folder: Path) -> None:
    path = folder / "keeper-demo.log"
    lines = [b"%06d" % number for number in range(10_000)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    with LogFile(folder, path.name) as log, Folder(folder) as opened:
        assert list(log.news()) == lines
        assert LogSweeper(LogBudget(each=20_000)).sweep(opened, ()).swept
        assert list(log.news()) == []
        with path.open("ab") as writer:
            writer.write(b"more\n")
        assert list(log.news()) == [b"more"]


# What is not read.


def test_what_is_not_there(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LogFile(path.parent, path.name)


def test_a_link_a_fifo_and_a_folder_are_not_read(path: Path) -> None:
    path.symlink_to("/etc/passwd")
    with pytest.raises(UnreadableLogError, match="symbolic link"):
        LogFile(path.parent, path.name)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnreadableLogError, match="no regular file"):
        LogFile(path.parent, path.name)
    path.unlink()
    path.mkdir()
    with pytest.raises(UnreadableLogError, match="no regular file"):
        LogFile(path.parent, path.name)


@root
def test_anothers_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "keeper-demo.log"
    path.touch()
    path.chmod(0o644)
    for above in (tmp_path, *tmp_path.parents[:2]):
        above.chmod(0o755)
    os.chown(path, 1, 1)
    with pytest.raises(UnreadableLogError, match="belongs to uid 1"):
        LogFile(path.parent, path.name)


def test_a_line_as_long_as_a_log_can_be_is_read_in_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "_BLOCK", 64)
    path.write_bytes(line := b"." * (2 << 20))
    begun = time.process_time()
    assert read(path) == [line]
    assert time.process_time() - begun < 3  # 0.2 s; copied anew with each block it would be 20
