"""`doctor`: whether all that sessions need is there, and what to do where it is not."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.console import FAILURE, chosen, common, json_option, print_json, print_lines, say

if TYPE_CHECKING:
    from reconciler.diagnoses import Diagnosis
    from reconciler.examination import Patient
    from reconciler.settings import Settings

_COLORS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command(short_help="Check all that sessions need, and say what to do.")
@json_option
@common
def doctor(*, as_json: bool) -> None:
    """Check all that sessions need, and say what to do where something is wrong.

    The settings, the folder, its rights and its filesystem, the limits for watches and
    descriptors, the kernel, the clock, the agent's and the keeper's programs, the log, the
    service, and whether a daemon keeps the folder right. Changes nothing, and waits for
    nothing longer than some seconds.

    Ends with 0 when there is no problem (a warning is none), else with 1.

    \b
    Something is wrong here:          pi-reconciler doctor
    On a hundred machines:            pi-reconciler doctor --json | jq '.[] | select(.advice)'
    """  # noqa: D301 - click wants the real character
    from reconciler.diagnoses import State
    from reconciler.examination import examine

    settings, diagnosis = _settings()
    found = [diagnosis, *examine(_patient(settings))]
    if as_json:
        print_json(
            [
                {
                    "check": each.check,
                    "state": each.state.value,
                    "found": each.found,
                    "advice": each.advice or None,
                }
                for each in found
            ]
        )
    else:
        print_lines(_told(found))
    problems = sum(each.state is State.PROBLEM for each in found)
    warnings = sum(each.state is State.WARNING for each in found)
    if not as_json:
        say(f"{_counted(problems, 'problem')}, {_counted(warnings, 'warning')}")
    sys.exit(FAILURE if problems else 0)


def _counted(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _settings() -> tuple[Settings, Diagnosis]:
    """The settings, or the defaults where they cannot be used; and which of the two."""
    from reconciler.doctor import SettingsFacts, judge_settings
    from reconciler.settings import Settings, SettingsError, Sources, default_path

    path: Path = chosen().get("config") or default_path()
    try:
        sources = Sources.read(chosen().get("config"))
        settings = sources.settings()
    except SettingsError as error:
        named = chosen().get("config") is not None
        return Settings(), judge_settings(SettingsFacts(path=path, named=named, error=str(error)))
    facts = SettingsFacts(
        path=path,
        there=os.path.exists(path),
        variables=len(sources.variables),
        writers=_writers(path),
    )
    return settings, judge_settings(facts)


def _writers(path: Path) -> str:
    """Who may write to a file besides us and root, or nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    if not stat.S_ISREG(status.st_mode):
        return ""
    if status.st_uid not in {0, os.geteuid()}:
        return f"uid {status.st_uid}"
    if status.st_mode & stat.S_IWOTH:
        return "everybody"
    return "its group" if status.st_mode & stat.S_IWGRP else ""


def _patient(settings: Settings) -> Patient:
    from reconciler.examination import Patient
    from reconciler.keeper import default_sessions_dir
    from reconciler.requests import OUR_KEEPER

    folder: Path | None = chosen().get("sessions_dir") or settings.sessions_dir
    return Patient(
        sessions_dir=(folder or default_sessions_dir()).absolute(),
        agent=(settings.agent_command or ("pi",))[0],
        keeper=settings.keeper_command or OUR_KEEPER,
        log_sink=settings.log.sink if settings.log else "stdout",
        log_file=settings.log.file if settings.log else "",
    )


def _told(found: Sequence[Diagnosis]) -> Iterator[str]:
    """One line for each check, and one below it where something is to be done."""
    widest = max(len(each.check) for each in found)
    colors = not (chosen().get("no_color") or os.environ.get("NO_COLOR"))
    for each in found:
        state = f"{each.state.value:<7}"
        shown = click.style(state, fg=_COLORS[each.state.value]) if colors else state
        yield f"{shown}  {each.check:<{widest}}  {each.found}"
        if each.advice:
            yield f"{'':7}  {'':{widest}}  -> {each.advice}"
