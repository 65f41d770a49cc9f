"""The log file: renamed by others, rotated by itself, shared, taken away, full."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import WAIT, program_environment, until

from reconciler.log_files import LogFile, to_file
from reconciler.logs import LogSettings, flush, make_logger, open_log
from reconciler.sinks import SinkError


def told(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert not text or text.endswith("\n"), "whole lines"
    return [json.loads(line) for line in text.splitlines()]


def numbers(path: Path) -> list[int]:
    return [line["number"] for line in told(path)]


def write(log: Any, *chosen: int, text: str = "") -> None:  # noqa: ANN401 - a logger
    for number in chosen:
        log.info("event.name", number=number, text=text)
    assert flush(WAIT) == 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pi-reconciler.log"


# -- Renamed by others ----------------------------------------------------------------------


def test_what_is_written_after_a_rename_goes_to_a_new_file(path: Path) -> None:
    log = make_logger(to_file(path))
    write(log, 0, 1)
    path.rename(path.with_suffix(".1"))
    write(log, 2)
    path.unlink()
    write(log, 3)
    assert numbers(path.with_suffix(".1")) == [0, 1]
    assert numbers(path) == [3]


def test_no_line_is_lost_or_split_by_many_renames_under_load(path: Path) -> None:
    log = make_logger(to_file(path))
    renamed: list[Path] = []
    for number in range(3000):
        if number % 100 == 50:
            renamed.append(path.with_suffix(f".{len(renamed)}"))
            path.rename(renamed[-1])  # many lines wait to be written
        log.info("event.name", number=number, text="x" * (number * 37 % 500))
        if number % 100 == 50:
            until(path.exists, "the line after it has come")
    assert flush(WAIT) == 0
    assert [each for file in (*renamed, path) for each in numbers(file)] == list(range(3000))


def test_a_file_of_before_is_appended_to_and_a_torn_line_in_it_ended(path: Path) -> None:
    path.write_text('{"number":0}\n{"torn')
    write(make_logger(to_file(path)), 1)
    first, torn, last = path.read_text().splitlines()
    assert (first, torn, json.loads(last)["number"]) == ('{"number":0}', '{"torn', 1)


def test_the_file_is_for_its_owner_and_its_group_alone(path: Path) -> None:
    before = os.umask(0o022)
    try:
        to_file(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


# -- Rotation ---------------------------------------------------------------------------------


def test_it_rotates_by_itself_and_keeps_the_newest_in_whole_lines(path: Path) -> None:
    log = make_logger(to_file(path, rotate_bytes=1000, rotate_keep=3))
    write(log, *range(100))
    files = [path.with_name(f"{path.name}.{number}") for number in (3, 2, 1)] + [path]
    assert sorted(path.parent.iterdir()) == sorted(files)
    kept = [number for file in files for number in numbers(file)]
    assert kept == list(range(100 - len(kept), 100))
    for file in files:
        assert file.stat().st_size <= 1000
    for file in files[:-1]:
        assert file.stat().st_size > 800, "another line had no room"


def test_a_line_longer_than_the_limit_has_a_file_of_its_own(path: Path) -> None:
    log = make_logger(to_file(path, rotate_bytes=100, rotate_keep=9))
    write(log, 0, 1, 2, text="x" * 200)
    assert [numbers(path.with_name(path.name + end)) for end in (".2", ".1", "")] == [[0], [1], [2]]


def test_a_gap_among_the_kept_ones_is_filled_first(path: Path) -> None:
    for number in (1, 3):
        path.with_name(f"{path.name}.{number}").write_text(f'{{"number":{-number}}}\n')
    log = make_logger(to_file(path, rotate_bytes=100, rotate_keep=3))
    write(log, 0, 1, text="x" * 100)
    kept = [numbers(path.with_name(f"{path.name}.{number}")) for number in (3, 2, 1)]
    assert [*kept, numbers(path)] == [[-3], [-1], [0], [1]]


def test_two_that_share_a_file_rotate_it_without_losing_a_line(path: Path) -> None:
    logs = [make_logger(to_file(path, rotate_bytes=2000, rotate_keep=1000)) for _ in range(2)]
    for number in range(600):
        logs[number % 2].info("event.name", number=number)
    assert flush(WAIT) == 0
    files = list(path.parent.iterdir())
    assert len(files) > 10
    assert sorted(number for file in files for number in numbers(file)) == list(range(600))


def test_what_cannot_be_rotated_grows_on_and_says_so(path: Path) -> None:
    path.with_name(f"{path.name}.1").mkdir()
    log = make_logger(to_file(path, rotate_bytes=100, rotate_keep=1))
    write(log, 0, 1, text="x" * 100)
    write(log, 2)
    assert numbers(path) == [0, 1, 2]
    assert told(path)[-1]["log_trouble"] == f"{path} cannot be rotated: Is a directory"
    path.with_name(f"{path.name}.1").rmdir()
    other = make_logger(to_file(path, rotate_bytes=100, rotate_keep=1))
    write(other, 3, text="x" * 100)
    assert numbers(path) == [3], "no lock was left"
    write(log, 4)
    assert numbers(path) == [4]
    write(log, 5)
    assert "log_trouble" not in told(path)[-1]


def test_a_file_that_another_has_begun_meanwhile_is_not_rotated(path: Path) -> None:
    """Between the look at the name and the lock another process may have been through."""
    mine = LogFile(path, rotate_bytes=100, rotate_keep=5)
    path.rename(path.with_name(f"{path.name}.1"))
    path.write_text("another's")
    assert mine._rotate(), "it is to be followed"
    assert path.read_text() == "another's"


# -- Trouble ------------------------------------------------------------------------------------


def test_a_name_that_is_taken_leaves_the_lines_in_the_renamed_file(path: Path) -> None:
    log = make_logger(to_file(path))
    write(log, 0)
    older = path.with_suffix(".1")
    path.rename(older)
    path.mkdir()
    write(log, 1)
    write(log, 2)
    assert numbers(older) == [0, 1, 2]
    assert told(older)[-1]["log_trouble"] == f"{path}: Is a directory"
    path.rmdir()
    write(log, 3)
    assert numbers(path) == [3]
    assert "lines_dropped" not in told(path)[0]


def test_a_folder_that_is_gone_drops_and_counts_until_it_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "log"
    log = make_logger(to_file(path))
    write(log, 0)
    path.unlink()
    folder.rmdir()
    write(log, 1, 2)
    folder.mkdir()
    write(log, 3)
    (line,) = told(path)
    assert (line["number"], line["lines_dropped"]) == (3, 2)
    assert line["log_trouble"] == f"{path}: No such file or directory"


def in_a_process(code: str, *arguments: object) -> None:
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    subprocess.run(command, check=True, timeout=WAIT, env={"PYTHONPATH": paths})


FULL = """
import os, resource, sys
from pathlib import Path
from reconciler.log_files import to_file
from reconciler.logs import flush, make_logger
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
path = Path(sys.argv[1])
log = make_logger(to_file(path))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as a full disk, it takes a part
log.info("event.name", number=0, text="x" * 200)
log.info("event.name", number=1)
assert flush(20) == 0
assert path.stat().st_size == 100
os.rename(path, f"{path}.1")
if sys.argv[2] == "room":
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.info("event.name", number=2)
assert flush(20) == 0
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.info("event.name", number=3)
assert flush(20) == 0
"""


def test_the_rest_of_a_line_goes_where_it_began(path: Path) -> None:
    in_a_process(FULL, path, "room")
    (first,) = told(path.with_name(f"{path.name}.1"))
    assert first["text"] == "x" * 200
    assert numbers(path) == [2, 3]
    assert told(path)[-1]["lines_dropped"] == 1


def test_a_line_that_cannot_be_ended_is_counted_and_none_begins_within_it(path: Path) -> None:
    in_a_process(FULL, path, "none")
    assert path.with_name(f"{path.name}.1").stat().st_size == 100
    torn, whole = path.read_bytes()[:100], path.read_bytes()[100:]
    lines = (torn + whole).splitlines()
    assert json.loads(lines[-1])["number"] == 3
    assert json.loads(lines[-1])["lines_dropped"] == 2
    assert json.loads(lines[0])["number"] == 2, "its rest came when there was room"


FORKED = """
import os, resource, sys
from pathlib import Path
from reconciler.log_files import to_file
from reconciler.logs import flush, make_logger
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
log = make_logger(to_file(Path(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
log.info("event.name", number=0, text="x" * 200 + "END")
assert flush(20) == 0
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
if child := os.fork():
    os.waitpid(child, 0)
log.info("event.name", number=1 + bool(child))
assert flush(20) == 0
"""


def test_the_rest_of_a_line_is_not_written_again_by_a_fork(path: Path) -> None:
    in_a_process(FORKED, path)
    text = path.read_text()
    assert (text.count("END"), text.count("\n")) == (1, 3)


# -- The start ----------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to(os.devnull)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (fifo, "Is not a regular file: name another"),
        (link, "Too many levels of symbolic links: it is a symbolic link: name the file itself"),
        (Path.mkdir, "Is a directory: name another"),
        (lambda _: None, "No such file or directory: make the folder '{parent}'"),
    ],
)
def test_what_is_no_file_of_a_folder_is_refused_at_the_start(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / "log"
    make(path)
    if not os.path.lexists(path):
        path = tmp_path / "none" / "log"
    with pytest.raises(SinkError) as caught:
        to_file(path)
    expected = reason.format(parent=path.parent)
    assert str(caught.value) == f"log file {str(path)!r} cannot be opened: {expected}"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room, or name one on another disk"),
        (errno.EACCES, "put the rights of it and of '{parent}' right, or name another"),
    ],
)
def test_what_the_system_refuses_is_told_with_what_to_do(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuses(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("reconciler.log_files.os.open", refuses)
        with pytest.raises(SinkError) as caught:
            to_file(path)
    assert str(caught.value).endswith(
        f" cannot be opened: {os.strerror(number)}: {remedy.format(parent=path.parent)}"
    )


def test_the_settings_choose_the_file_and_its_rotation(path: Path) -> None:
    said = LogSettings(sink="file", file=str(path), rotate_bytes=100, rotate_keep=1, form="ecs")
    log = open_log(said, None)
    write(log, 0, 1, 2, text="x" * 100)
    (line,) = told(path)
    assert line["labels.number"] == 2
    assert len(list(path.parent.iterdir())) == 2


def test_a_file_sink_without_a_file_is_refused() -> None:
    with pytest.raises(SinkError, match=r"log.sink is 'file', and log.file names none"):
        open_log(LogSettings(sink="file"), None)


def test_a_file_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(open_log(LogSettings(sink="file", file="~/log"), None), 0)
    assert numbers(tmp_path / "log") == [0]


# -- As an operator asks for it -----------------------------------------------------------------


def run(folder: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reconciler", "run", "--once", "--sessions-dir", folder]
    environment = program_environment(folder) | variables
    return subprocess.run(
        [*map(str, command), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        env=environment,
    )


def test_the_flags_choose_a_file_that_rotates(folder: Path, path: Path) -> None:
    path.write_text("x" * 500 + "\n")
    ended = run(folder, "--log-file", path, "--log-rotate-bytes", 500, "--log-rotate-keep", 1)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert [line["event"] for line in told(path)] == ["reconciler.started", "reconciler.stopped"]
    assert path.with_name(f"{path.name}.1").read_text() == "x" * 500 + "\n"


def test_flags_beat_settings_and_a_file_in_them_is_no_sink_yet(folder: Path, path: Path) -> None:
    ended = run(folder, PI_RECONCILER_LOG_FILE=str(path))
    assert len(ended.stdout.splitlines()) == 2
    ended = run(folder, PI_RECONCILER_LOG_FILE=str(path), PI_RECONCILER_LOG_SINK="file")
    assert (ended.stdout, len(told(path))) == ("", 2)
    ended = run(folder, "--log-sink", "stdout", PI_RECONCILER_LOG_SINK="journald")
    assert len(ended.stdout.splitlines()) == 2


def test_a_sink_that_cannot_be_had_ends_the_program_with_one_line(folder: Path) -> None:
    ended = run(folder, "--log-file", folder / "none" / "log")
    assert (ended.returncode, ended.stdout) == (78, "")
    (line,) = ended.stderr.splitlines()
    assert line.endswith(f"No such file or directory: make the folder '{folder / 'none'}'")
    assert not list(folder.iterdir()), "nothing was done"
