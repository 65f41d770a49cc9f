"""The desired and the actual state of every known session, in memory.

All of it but the wishes comes back by one look at the world, so it is written nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from reconciler.observations import AgentState, KeeperState, Observation
from reconciler.plans import NOTHING_THERE, Plan, Verdict
from reconciler.state import Desired


@dataclass(frozen=True, slots=True)
class Session:
    """A session as it stands in the table: desired state, actual state, judgement."""

    sid: str
    desired: Desired = Desired.AS_FOUND
    seen: Observation | None = None
    plan: Plan | None = None

    @property
    def phase(self) -> Verdict:
        """The newest verdict; STARTING before the first look."""
        return self.plan.verdict if self.plan else Verdict.STARTING

    @property
    def reason(self) -> str:
        """Why, in a constant phrase."""
        return self.plan.reason if self.plan else "not looked at yet"

    @property
    def keeper_pid(self) -> int | None:
        """The proven keeper's pid, or None."""
        if self.seen is None or self.seen.keeper.state is not KeeperState.PROVEN:
            return None
        return self.seen.keeper.process.pid if self.seen.keeper.process else None

    @property
    def agent_pid(self) -> int | None:
        """The living agent's pid, or None."""
        if self.seen is None or self.seen.agent.state is not AgentState.ALIVE:
            return None
        return self.seen.agent.process.pid if self.seen.agent.process else None


Listener = Callable[[Session], None]


class SessionTable(Mapping[str, Session]):
    """The desired and the actual state of every known session, in memory.

    A mapping from session id to `Session`. It holds nothing that a fresh look at the
    world would not bring back, but for what was asked of it through the API.

    Args:
        complain: called with what a subscriber has raised; the others are told all the same.
    """

    def __init__(self, complain: Callable[[Exception], None] = lambda _: None) -> None:
        self._complain = complain
        self._rows: dict[str, Session] = {}
        self._listeners: dict[object, Listener] = {}

    def __getitem__(self, sid: str) -> Session:
        return self._rows[sid]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, sid: str) -> Session:
        """The row of ``sid``; for one that is not in the table a row that says so."""
        return self._rows.get(sid) or Session(sid, plan=NOTHING_THERE)

    def want(self, sid: str, desired: Desired) -> None:
        """Say what is wanted of a session."""
        self._rows[sid] = replace(self._rows.get(sid) or Session(sid), desired=desired)

    def reset(self, sid: str) -> None:
        """Forget what was seen of a session; what is wanted of it stays."""
        row = self.row(sid)
        if row.desired is Desired.AS_FOUND:
            self._rows.pop(sid, None)
        else:
            self._rows[sid] = Session(sid, row.desired)
        self._tell(row, self.row(sid))

    def record(self, seen: Observation, plan: Plan) -> bool:
        """Take in a look and its judgement; tell subscribers if the judgement is new.

        A session of which nothing is left, and nothing is wanted, leaves the table. A wish
        that it were absent ends when it is over: the next one of its name is not meant.

        Returns:
            Whether the verdict or its reason differs from the one before, or there are
            leftovers that were not known.
        """
        before = self.row(seen.sid)
        after = Session(seen.sid, before.desired, seen, plan)
        if plan.verdict is Verdict.ABSENT:
            after = replace(after, desired=Desired.AS_FOUND)
            self._rows.pop(seen.sid, None)
        else:
            if plan.verdict is Verdict.LEFTOVERS and after.desired is Desired.ABSENT:
                after = replace(after, desired=Desired.AS_FOUND)
            self._rows[seen.sid] = after
        self._tell(before, after)
        known = before.seen.leftovers if before.seen else ()
        return _judgement(before) != _judgement(after) or (
            plan.verdict is Verdict.LEFTOVERS and not set(seen.leftovers) <= set(known)
        )

    def _tell(self, before: Session, after: Session) -> None:
        if _face(before) != _face(after):
            for listener in tuple(self._listeners.values()):
                try:
                    listener(after)
                except Exception as error:  # noqa: BLE001 - a subscriber's trouble is its own
                    self._complain(error)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with each changed row; the returned callable ends that."""
        key = object()
        self._listeners[key] = listener
        return lambda: (self._listeners.pop(key, None), None)[1]


def _judgement(session: Session) -> tuple[object, ...]:
    return session.phase, session.reason


def _face(session: Session) -> tuple[object, ...]:
    """What a reader of the table can tell two rows apart by."""
    record = session.seen.record if session.seen else None
    kept = (record.policy, record.restarts) if record else ()
    return (*_judgement(session), session.keeper_pid, session.agent_pid, kept)
