"""A look at a session for people, and what it comes to. Nobody acts on it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from reconciler import launches
from reconciler.folder import Folder
from reconciler.observations import Entry, Observation
from reconciler.plans import Plan
from reconciler.restarts import RestartLimits
from reconciler.state import Desired, Policy, decide


@dataclass(frozen=True, slots=True)
class Finding:
    """One look at one session, and what it comes to."""

    seen: Observation
    plan: Plan


def judged(seen: Observation, folder: Folder, policy: Policy, limits: RestartLimits) -> Finding:
    """What a look comes to. A single one takes ages from the files' own times.

    Who acts counts from what it has seen itself.
    """
    if not seen.note.present:  # a look that is in a hurry leaves it out
        note, record = launches.look(folder, seen.sid, seen.now, over=seen.over)
        seen = replace(seen, note=note, record=record)
    dated = replace(
        seen,
        pid_file=_dated(seen.pid_file, seen.now),
        socket=_dated(seen.socket, seen.now),
        agent_file=_dated(seen.agent_file, seen.now),
    )
    return Finding(dated, decide(dated, Desired.AS_FOUND, policy, limits))


def _dated(entry: Entry, now: float) -> Entry:
    if entry.file is None:
        return entry
    return replace(entry, since=now - max(0.0, time.time() - entry.file.mtime_ns / 1e9))
