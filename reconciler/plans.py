"""What a look at a session comes to: a verdict, and what is to be done.

Only said here: `reconciler.state.decide` makes plans, `reconciler.effects` carries them out.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from reconciler.layout import Role
from reconciler.observations import FileId, ProcessId


class Verdict(enum.Enum):
    """The rows of the decision table. Their values are what users see as ``phase``."""

    ABSENT = "absent"
    STARTING = "starting"
    READY = "ready"
    STALE = "stale"
    ADOPT = "adopt"
    ORPHAN = "orphan"
    ORPHAN_AGENT = "orphan_agent"
    UNREACHABLE = "unreachable"
    USURPED = "usurped"
    LOST = "lost"
    STOPPING = "stopping"
    MISSING = "missing"
    REFUSED = "refused"
    UNVERIFIABLE = "unverifiable"
    LEFTOVERS = "leftovers"
    RESTARTING = "restarting"
    GIVEN_UP = "given_up"


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove these entries, if they are still what was judged."""

    entries: tuple[tuple[Role, FileId], ...]


@dataclass(frozen=True, slots=True)
class StopKeeper:
    """End a keeper by the ladder; ``at_once``: by SIGKILL alone.

    A usurped keeper of another make is killed at once, since its own end would delete
    the files of the keeper that took its place.
    """

    process: ProcessId
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class StopAgent:
    """End an agent that outlived its keeper."""

    process: ProcessId


@dataclass(frozen=True, slots=True)
class StopLeftovers:
    """End what a session has started and left behind."""

    processes: tuple[ProcessId, ...]


@dataclass(frozen=True, slots=True)
class Rebind:
    """Tell a keeper of ours to make its socket and pid file again."""

    process: ProcessId


@dataclass(frozen=True, slots=True)
class Adopt:
    """Write the pid file of a keeper that listens but is not named by it."""

    process: ProcessId
    replaced: FileId | None


@dataclass(frozen=True, slots=True)
class Restart:
    """Start a session again, if its launch note still is what was judged."""

    note: FileId


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Note down that a session is started no more."""

    note: FileId


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove the launch note of a session that is over for good."""

    note: FileId


Stop = StopKeeper | StopAgent | StopLeftovers
"""What takes time: a process is given a chance to end by itself."""

Instant = Remove | Rebind | Adopt | GiveUp | Forget

Action = Instant | Stop | Restart


@dataclass(frozen=True, slots=True)
class Plan:
    """What `decide` answers.

    One step only: after its actions the session is looked at again, and the next step
    follows from what is then to be seen.
    """

    verdict: Verdict
    reason: str
    """A constant phrase; figures and names stand in the observation."""
    actions: tuple[Action, ...] = ()
    again_after: float | None = None
    """Seconds until the next look if nothing happens; None: the resync is enough."""


NOTHING_THERE = Plan(Verdict.ABSENT, "nothing is there")
