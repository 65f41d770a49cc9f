"""Whether a session that has ended is started again, and when.

Pure: no clock, no file, no process is touched here. The numbers are those of supervisors
that people know, see `RestartLimits`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, NamedTuple

RestartPolicy = Literal["never", "on-failure", "always"]
"""What a session is started with: as docker's and systemd's policies of these names."""


class Ending(enum.Enum):
    """How a session has ended, as far as its keeper's log tells."""

    NOT_YET = "not_yet"
    """It has not, or nobody has looked."""
    FINISHED = "finished"
    """The agent ended by itself, with status 0."""
    FAILED = "failed"
    """The agent ended with another status or by a signal, or did not come up."""
    ASKED = "asked"
    """SIGTERM or SIGINT, to keeper or agent: the way in which dashboards and people stop."""
    KILLED = "killed"
    """The keeper has said no farewell, or nothing tells of one."""
    UNKNOWN = "unknown"
    """It has said one that does not tell how the agent ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartLimits:
    """How fast, and how often, sessions are started again.

    The first pause lies between systemd's (100 ms) and Kubernetes' (10 s), it doubles as
    docker's does, up to docker's minute; and 10 minutes are those for which a container of
    Kubernetes must live to start anew.
    """

    first: float = 1.0
    """Seconds until the first restart. Each further one within the window waits twice as long."""
    cap: float = 60.0
    """Seconds that a restart waits at most."""
    window: float = 600.0
    """Seconds for which a restart counts."""
    most: int = 10
    """Restarts within the window, after which a session that ends once more is given up."""
    farewell: float = 10.0
    """Seconds for which a session that was asked to end keeps its policy. When the machine goes
    down everything is asked to end, and then nobody is left to forget it."""


@dataclass(frozen=True, slots=True)
class RestartRecord:
    """What is known of an ended session that has a policy, and of its restarts so far."""

    policy: RestartPolicy
    this_boot: bool = True
    """It was started since the machine was."""
    restarts: tuple[float, ...] = ()
    """When it was started again: monotonic seconds of this boot, the newest last."""
    given_up: bool = False
    ending: Ending = Ending.NOT_YET


class Step(enum.Enum):
    """What is to be done about a session that has ended."""

    RESTART = "restart"
    WAIT = "wait"
    GIVE_UP = "give_up"
    REST = "rest"
    """It was given up: until somebody starts or stops it."""
    LINGER = "linger"
    """It is over for good, unless the machine is going down."""
    FORGET = "forget"


class NextStep(NamedTuple):
    """A step, why, and the seconds until it is to be judged again."""

    step: Step
    reason: str
    wait: float | None = None


def next_step(record: RestartRecord, over: float, now: float, limits: RestartLimits) -> NextStep:
    """Judge a session of which nothing is left but its policy.

    Args:
        record: what is known of it.
        over: seconds for which it has been seen so.
        now: monotonic seconds.
        limits: how fast and how often.
    """
    if record.given_up:
        return NextStep(Step.REST, "restarted too often")
    if done := _done(record, over, limits):
        return done
    tries = len(recent(record.restarts, now - over, limits))
    if tries >= limits.most:
        return NextStep(Step.GIVE_UP, "restarted too often")
    wait = min(limits.cap, limits.first * 2.0 ** min(tries, 60)) - over
    if wait > 0:
        return NextStep(Step.WAIT, f"{_why(record)}, started again after a pause", wait)
    return NextStep(Step.RESTART, _why(record))


def recent(restarts: tuple[float, ...], at: float, limits: RestartLimits) -> tuple[float, ...]:
    """The restarts that count at a moment: those of the window, the newest ``most`` of them."""
    return tuple(each for each in restarts if at - limits.window < each <= at)[-limits.most :]


def _done(record: RestartRecord, over: float, limits: RestartLimits) -> NextStep | None:
    """Why a session is not to be started again, if so."""
    if record.policy == "on-failure" and record.ending is Ending.FINISHED:
        return NextStep(Step.FORGET, "ended well")
    if not record.this_boot:  # whoever was asked to end then, was so because it went down
        return None
    if record.policy == "on-failure" and record.ending is Ending.UNKNOWN:
        return NextStep(Step.FORGET, "ended by itself, how is not known")
    if record.ending is not Ending.ASKED:
        return None
    if over < limits.farewell:
        return NextStep(Step.LINGER, "asked to end just now", limits.farewell - over)
    return NextStep(Step.FORGET, "asked to end")


def _why(record: RestartRecord) -> str:
    if not record.this_boot:
        return "the machine was started anew"
    match record.ending:
        case Ending.KILLED:
            return "keeper killed"
        case Ending.FAILED:
            return "agent failed"
        case _:
            return "agent ended"
