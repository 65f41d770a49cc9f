from __future__ import annotations

import contextlib
import json
import os
import resource
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import as_nobody, note_down, root

from reconciler import launches
from reconciler.errors import InvalidRequestError
from reconciler.facts import boot_id
from reconciler.folder import Folder
from reconciler.launches import LIMIT, Launch, NoNoteError, opened
from reconciler.observations import EntryKind
from reconciler.restarts import Ending, RestartRecord

LAUNCH = Launch(
    policy="on-failure",
    cwd="/tmp/some where",
    agent_command=("pi", "--name", 'a "b"\n', "\udcff"),
    keeper_command=("node", "keeper.cjs"),
    capture=True,
)
NAME = "keeper-s.launch"


@pytest.fixture
def here(folder: Path) -> Iterator[Folder]:
    with Folder(folder) as here:
        yield here


def look(here: Folder) -> tuple[EntryKind, RestartRecord | None]:
    entry, record = launches.look(here, "s", 0.0, over=True)
    return entry.kind, record


def test_what_is_noted_down_can_be_read(here: Folder) -> None:
    note_down(here, "s", LAUNCH)
    status = (here.path / NAME).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    with opened(here, "s") as note:
        assert note.launch == LAUNCH
        assert note.record == RestartRecord("on-failure")
        assert not note.failed
    assert os.listdir(here.path) == [NAME]


def test_what_has_come_of_it_is_kept_in_place(here: Folder) -> None:
    note_down(here, "s", LAUNCH)
    longer = RestartRecord("on-failure", restarts=(1.25, 2.5, 3.75))
    for record, failed in ((longer, True), (replace(longer, restarts=(), given_up=True), False)):
        with opened(here, "s", to_write=True) as note:
            note.write(record, failed=failed)
        with opened(here, "s") as note:
            assert (note.launch, note.record, note.failed) == (LAUNCH, record, failed)
    assert os.listdir(here.path) == [NAME]


def test_a_note_that_was_removed_stays_removed(here: Folder) -> None:
    note_down(here, "s", LAUNCH)
    with opened(here, "s", to_write=True) as note:
        assert note.stands()
        assert launches.forget(here, "s")
        assert not note.stands()
        note.write(RestartRecord("on-failure", restarts=(1.0,)))
        assert os.listdir(here.path) == []
        note_down(here, "s", LAUNCH)
        assert not note.stands(), "it is another one"
    assert not launches.forget_judged(here, "s", note.file)
    assert look(here) == (EntryKind.NOTE, RestartRecord("on-failure", ending=Ending.KILLED))


def test_the_restarts_of_an_earlier_boot_do_not_count(here: Folder) -> None:
    note_down(here, "s", LAUNCH)
    with opened(here, "s", to_write=True) as note:
        note.write(RestartRecord("on-failure", restarts=(1.0,), given_up=True))
    path = here.path / NAME
    path.write_text(path.read_text().replace(boot_id(), "another"))
    _, record = look(here)
    assert record == RestartRecord("on-failure", this_boot=False, ending=Ending.KILLED)


@pytest.mark.parametrize(
    "tail",
    [
        "",
        "{",
        "[]",
        '{"boot": "BOOT", "restarts": ["1"], "given_up": false, "failed": false}',
        '{"boot": "BOOT", "restarts": [1' + "0" * 5000 + '], "given_up": false, "failed": false}',
        '{"boot": "BOOT", "restarts": [], "given_up": 1, "failed": false}',
    ],
)
def test_a_torn_second_line_is_as_one_of_an_earlier_boot(here: Folder, tail: str) -> None:
    note_down(here, "s", LAUNCH)
    path = here.path / NAME
    head = path.read_text().splitlines()[0]
    path.write_text(f"{head}\n{tail.replace('BOOT', boot_id())}")
    _, record = look(here)
    assert record == RestartRecord("on-failure", this_boot=False, ending=Ending.KILLED)


def test_who_counts_as_failed_is_not_asked_how_it_ended(here: Folder) -> None:
    note_down(here, "s", LAUNCH)
    with opened(here, "s", to_write=True) as note:
        note.write(note.record, failed=True)
    assert look(here)[1] == RestartRecord("on-failure", ending=Ending.FAILED)


def good() -> str:
    return json.dumps(
        {
            "launch": 1,
            "policy": "always",
            "cwd": "/",
            "agent_command": [],
            "keeper_command": [],
            "capture": False,
        }
    )


def edited(**changes: object) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(json.loads(good()) | changes))


HOSTILE: dict[str, Callable[[Path], object]] = {
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "fifo": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.touch(),
    "no json": lambda path: path.write_text("{"),
    "not text": lambda path: path.write_bytes(b"\xff\xfe" * 50),
    "deep": lambda path: path.write_text("[" * 99_999),
    "too big": lambda path: path.write_text(good() + " " * LIMIT),
    "another version": edited(launch=2),
    "never": edited(policy="never"),
    "no such policy": edited(policy="sometimes"),
    "policy is no text": edited(policy=["always"]),
    "command of numbers": edited(agent_command=[1]),
    "command is a text": edited(agent_command="pi"),
    "no folder": edited(cwd=None),
    "capture is no truth": edited(capture="yes"),
}
each_hostile = pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())


def test_the_good_one_is_good(here: Folder) -> None:
    (here.path / NAME).write_text(good())
    assert look(here)[0] is EntryKind.NOTE


@each_hostile
def test_what_is_no_launch_note_is_told_and_not_obeyed(
    here: Folder, make: Callable[[Path], object]
) -> None:
    make(here.path / NAME)
    assert look(here) == (EntryKind.HOSTILE, None)
    with pytest.raises(NoNoteError), opened(here, "s", to_write=True):
        pass


@root
def test_another_users_note_is_neither_read_nor_removed(here: Folder) -> None:
    (here.path / NAME).write_text(good())
    os.chown(here.path / NAME, 65534, 65534)
    assert look(here) == (EntryKind.HOSTILE, None)
    assert not launches.forget(here, "s")
    assert (here.path / NAME).exists()


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_note_that_others_may_write_to_is_not_obeyed(here: Folder, mode: int) -> None:
    """They would choose what runs as us. The folder lets nobody in to make one, only to open it."""
    path = here.path / NAME
    path.write_text(good())
    path.chmod(mode)
    entry, record = launches.look(here, "s", 0.0, over=True)
    assert (entry.kind, record) == (EntryKind.HOSTILE, None)
    assert entry.detail == "others may write to it: chmod 600"
    assert launches.forget(here, "s"), "it is ours to remove"


@root
def test_a_note_that_cannot_be_read_is_not_known(here: Folder) -> None:
    os.chown(here.path, 65534, 65534)
    path = here.path / NAME
    path.write_text(good())
    path.chmod(0)
    os.chown(path, 65534, 65534)
    with as_nobody():
        entry, record = launches.look(here, "s", 0.0, over=True)
    assert (entry.kind, record) == (EntryKind.UNKNOWN, None)
    assert entry.detail == "cannot read it (Permission denied)"


def test_links_are_not_removed(here: Folder) -> None:
    (here.path / NAME).symlink_to("/etc/passwd")
    assert not launches.forget(here, "s")
    assert (here.path / NAME).is_symlink()


def test_there_is_one_note_for_a_session(here: Folder) -> None:
    note_down(here, "s", LAUNCH)
    with pytest.raises(FileExistsError):
        note_down(here, "s", replace(LAUNCH, policy="always"))
    with opened(here, "s") as note:
        assert note.launch == LAUNCH


def test_nothing_is_left_of_a_note_that_cannot_be_written(here: Folder) -> None:
    with no_file_over(100), pytest.raises(OSError, match="File too large"):
        note_down(here, "s", LAUNCH)
    assert os.listdir(here.path) == []


def test_an_attempt_that_cannot_be_noted_down_is_an_error(here: Folder) -> None:
    note_down(here, "s", LAUNCH)
    with opened(here, "s", to_write=True) as note:
        longer = RestartRecord("on-failure", restarts=(1.0,) * 10)
        with no_file_over(note.file.size), pytest.raises(OSError, match="No space left"):
            note.write(longer)


@contextlib.contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """No file of this process grows beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_giving_up_is_noted_in_the_judged_note_alone(here: Folder) -> None:
    note_down(here, "s", LAUNCH)
    judged, _ = launches.look(here, "s", 0.0, over=True)
    assert judged.file is not None
    assert launches.give_up(here, "s", judged.file)
    with opened(here, "s") as note:
        assert note.record.given_up
    assert not launches.give_up(here, "s", judged.file), "it has changed since"
    launches.forget(here, "s")
    assert not launches.give_up(here, "s", judged.file)


@pytest.mark.parametrize(
    ("launch", "told"),
    [
        (replace(LAUNCH, policy="sometimes"), "'sometimes' is none of never, on-failure, always"),  # type: ignore[arg-type]
        (replace(LAUNCH, agent_command=("secret" * 100_000,)), "too long to be noted down"),
    ],
)
def test_what_cannot_be_noted_down_is_refused(launch: Launch, told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told) as refused:
        launches.check(launch)
    assert "secret" not in str(refused.value)


def test_a_launch_shows_no_arguments() -> None:
    assert "pi" not in repr(LAUNCH).replace("/tmp", "")


def test_a_link_that_comes_between_the_look_and_the_opening_is_not_followed(
    here: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_down(here, "s", LAUNCH)
    real = os.stat

    def stat_and_swap(*args: Any, **options: Any) -> os.stat_result:  # noqa: ANN401 - os.stat's
        status = real(*args, **options)
        if args[0] == NAME:
            os.rename(here.path / NAME, tmp_path / "moved")
            (here.path / NAME).symlink_to(tmp_path / "moved")
        return status

    monkeypatch.setattr(os, "stat", stat_and_swap)
    with pytest.raises(OSError, match="symbolic links"), opened(here, "s"):
        pass
