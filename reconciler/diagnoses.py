"""What a check of `doctor` comes to: how something is, what was found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """How something is."""

    OK = "ok"
    WARNING = "warning"
    """It works, but for something that somebody may need or expect."""
    PROBLEM = "problem"
    """It does not work."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What one check has come to.

    Attributes:
        check: what was looked at.
        state: how it is.
        found: what was found.
        advice: what to do about it; empty where nothing is to be done.
    """

    check: str
    state: State
    found: str
    advice: str = ""


def ok(check: str, found: str) -> Diagnosis:
    """All is well."""
    return Diagnosis(check, State.OK, found)


def warning(check: str, found: str, advice: str) -> Diagnosis:
    """It works, but."""
    return Diagnosis(check, State.WARNING, found, advice)


def problem(check: str, found: str, advice: str) -> Diagnosis:
    """It does not work."""
    return Diagnosis(check, State.PROBLEM, found, advice)
