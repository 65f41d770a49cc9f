"""A short round of every fuzz target, by seeded chance; `make fuzz` guides it by coverage."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest

from fuzzing import names
from fuzzing.every import TARGETS
from fuzzing.mutator import inputs
from fuzzing.target import Target, ViolationError
from reconciler import keeper_process, registry
from reconciler.facts import Facts, Life, boot_id
from reconciler.folder import Folder
from reconciler.layout import ParsedName, Role
from reconciler.observations import Entry, EntryKind, ProcessId
from reconciler.processes import LINUX


def fuzz(name: str) -> None:
    """One short round; the input that breaks a rule is a part of the report."""
    target = TARGETS[name]
    with target.opened() as check:
        for text in inputs(target, target.short):
            try:
                check(text)
            except Exception as error:
                error.add_note(f"the input: {text!r}")
                raise


@pytest.mark.parametrize("name", TARGETS)
def test_a_short_round(name: str) -> None:
    fuzz(name)


def test_chance_is_the_same_everywhere() -> None:
    for target in TARGETS.values():
        first = list(inputs(target, 50))
        assert first == list(inputs(target, 50))
        assert first != list(inputs(target, 50, seed=1))
        assert all(len(text) <= target.longest for text in first)


def nothing(*_: object) -> None:
    """In place of what is broken."""


def by_spaces(_: object, pid: int) -> Facts:
    """The facts of a process whose name has no space, and is no bytes."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().split()
    process = ProcessId(pid, int(fields[21]), boot_id())
    parent, group, session = (int(field) for field in fields[3:6])
    return Facts(Life.ALIVE, process, parent, group, session, uid=os.geteuid())


def short_round(check: Callable[[bytes], None], target: Target) -> None:
    for text in inputs(target, target.short):
        check(text)


BROKEN: dict[str, tuple[str, object, str, object]] = {
    "a name that is not read": ("name", names, "parse_name", nothing),
    "two names, one session": (
        *("name", names, "parse_name"),
        lambda *_: ParsedName(Role.SOCKET, "a"),
    ),
    "an id that the keeper alone takes": (
        *("session-id", keeper_process, "SESSION_ID"),
        re.compile(".*"),
    ),
    "a wrapper taken for a keeper": ("arguments", names, "keeper_arguments", nothing),
    "any name is hidden": ("hidden", names, "is_taken", bool),
    "a pid of any digits": (
        *("pid-file", Folder, "pid_entry"),
        lambda _, __, now: Entry(EntryKind.PID, now, pid=1),
    ),
    "half a pid": ("pid-file", keeper_process, "PID_FILE", 8),
    "any number is a pid": ("registry", registry, "_is_pid", lambda value: isinstance(value, int)),
    "a name that is taken for fields": ("process-name", type(LINUX), "facts", by_spaces),
    "a key that is forgotten": ("wire", keeper_process.Wire, "_remember", nothing),
    "a receipt too early": ("wire", keeper_process.Wire, "_push_store", lambda *_: True),
    "lines that are not sent": ("wire", keeper_process.Wire, "_write", lambda _, data: len(data)),
    "any piece is whole": ("wire", keeper_process, "_is_complete", lambda _: True),
}
"""What must be noticed: the target, and what is put in a place of the code."""


@pytest.mark.parametrize("broken", BROKEN)
def test_the_oracles_notice(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, owner, attribute, instead = BROKEN[broken]
    target = TARGETS[name]
    with target.opened() as check:
        monkeypatch.setattr(owner, attribute, instead)
        with pytest.raises((ViolationError, ValueError)):
            short_round(check, target)
        monkeypatch.undo()  # before what the target has open is closed
