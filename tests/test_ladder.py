"""Whom a step of the ladder reaches, and who is spared; the steps are in test_effects.py."""

from __future__ import annotations

import asyncio
import functools
import signal

import pytest
from conftest import alive, identity
from stand_ins import running

from reconciler.ladder import Ladder, end
from reconciler.processes import Target

LONG = Ladder(term_grace=20.0, kill_grace=20.0)
LEADS = (
    "os.setsid(); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); child = os.fork()\n"
    "if child: signal.pthread_sigmask(signal.SIG_SETMASK, [])\n"
    "if child: print(os.getpid(), child, flush=True)\n"
    "signal.pause()"
)
"""Leads a group in which it has a child, at which SIGTERM stays to be seen."""


def pending(pid: int) -> set[signal.Signals]:
    """The signals that have reached a process and wait there."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        (mask,) = (int(line.split()[1], 16) for line in file if line.startswith("ShdPnd:"))
    return {number for number in signal.Signals if mask >> (number - 1) & 1}


@pytest.mark.parametrize("group", [True, False, None])
def test_the_group_is_reached_only_if_it_is_meant(*, group: bool | None) -> None:
    default = functools.partial(end, ladder=LONG)
    meant = default if group is None else functools.partial(default, group=group)
    with running(LEADS) as (pid, member), Target(identity(pid), lambda: True) as target:
        assert asyncio.run(meant(target)) == (True, "ended by SIGTERM")
        assert pending(member) == ({signal.SIGTERM} if group else set())


@pytest.mark.parametrize("at_once", [True, False])
def test_who_is_not_proven_is_spared(*, at_once: bool) -> None:
    with running() as (pid,), Target(identity(pid), lambda: False) as target:
        told = asyncio.run(end(target, LONG, at_once=at_once))
        assert told == (False, "not proven any more, not signalled")
        assert alive(pid)


def test_the_dashboards_times() -> None:
    assert (Ladder().term_grace, Ladder().kill_grace) == (2.0, 2.0)


def test_who_is_not_what_it_was_gets_no_second_signal() -> None:
    """It has caught SIGTERM, and has become something else before SIGKILL is due."""
    answers = iter([True, False])
    code = "signal.signal(signal.SIGTERM, lambda *_: None); print(os.getpid(), flush=True)"
    with (
        running(f"{code}\nwhile True: signal.pause()") as (pid,),
        Target(identity(pid), lambda: True) as target,
    ):
        told = asyncio.run(end(target, Ladder(term_grace=0.1), still=lambda: next(answers)))
        assert told == (False, "not proven any more, not signalled")
        assert alive(pid)
