"""What commands show of sessions: rows and words for a person, plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from reconciler.columns import aligned
from reconciler.findings import Finding
from reconciler.layout import socket_address
from reconciler.observations import (
    AgentState,
    Entry,
    EntryKind,
    KeeperState,
    Listening,
    Observation,
)
from reconciler.plans import (
    Adopt,
    Forget,
    GiveUp,
    Plan,
    Rebind,
    Remove,
    Restart,
    StopAgent,
    StopKeeper,
    StopLeftovers,
    Verdict,
)
from reconciler.restarts import Ending, RestartRecord
from reconciler.sessions import Session

LEFTOVERS = Verdict.LEFTOVERS.value


def row(finding: Finding, folder: Path) -> dict[str, Any]:
    """A session as `ls --json` gives it."""
    return session_row(Session(finding.seen.sid, seen=finding.seen, plan=finding.plan), folder)


def session_row(session: Session, folder: Path, now: float | None = None) -> dict[str, Any]:
    """The same for a row of the table; ``now``: show ages as of then, and not of the last look."""
    seen = session.seen
    record = seen.record if seen else None
    since = (now or seen.now) - seen.now if seen else 0.0
    return {
        "sid": session.sid,
        "phase": session.phase.value,
        "keeper_pid": session.keeper_pid,
        "agent_pid": session.agent_pid,
        "age_s": round(seen.keeper.age + since, 1) if seen and session.keeper_pid else None,
        "socket": socket_address(folder, session.sid),
        "reason": session.reason,
        "leftovers": [each.process.pid for each in seen.leftovers] if seen else [],
        "restart": record.policy if record else "never",
        "restarts": len(record.restarts) if record else 0,
    }


def table(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Rows as `ls` shows them, under a heading."""
    return aligned(columns(list(rows)))


def columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The heading, and what stands below it; restarts where a session has a policy."""
    lines: list[tuple[str, ...]] = [("SID", "PHASE", "KEEPER", "AGENT", "AGE"), *map(_cells, rows)]
    kept = ["RESTART", *map(_kept, rows)]
    if any(kept[1:]):
        return [(*line, each) for line, each in zip(lines, kept, strict=True)]
    return lines


def _kept(row: Mapping[str, Any]) -> str:
    if row["restart"] == "never":
        return ""
    return f"{row['restart']} ({row['restarts']})" if row["restarts"] else str(row["restart"])


def _cells(row: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """What stands in the columns for one row."""
    left = f" ({len(row['leftovers'])})" if row["phase"] == LEFTOVERS else ""
    return (
        row["sid"],
        row["phase"] + left,
        str(row["keeper_pid"] or "-"),
        str(row["agent_pid"] or "-"),
        age(row["age_s"]),
    )


def age(seconds: float | None) -> str:
    """A span as `docker ps` users know it: the two largest units."""
    if seconds is None:
        return "-"
    units = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
    left = int(seconds)
    parts: list[str] = []
    for name, size in units:
        if parts or left >= size or name == "s":
            parts.append(f"{left // size}{name}")
        left %= size
    return "".join(parts[:2])


def everything(finding: Finding, folder: Path) -> dict[str, Any]:
    """A session as `inspect --json` gives it: the row, the plan and every fact."""
    facts = msgspec.to_builtins(finding.seen, enc_hook=repr)
    return {
        **row(finding, folder),
        "actions": [action_words(action) for action in finding.plan.actions],
        "look_again_after_s": finding.plan.again_after,
        "observation": _telling(facts),
    }


_NOTHING_TO_READ = frozenset({"now", "since", "sid", "text", "changed_ns"})


def _telling(facts: Any) -> Any:  # noqa: ANN401 - plain JSON values
    """Leave out what says nothing: empty texts, unknown numbers, monotonic stamps."""
    if isinstance(facts, dict):
        return {
            key: _telling(value)
            for key, value in facts.items()
            if value not in ("", None, [], 0) and key not in _NOTHING_TO_READ
        }
    if isinstance(facts, list | tuple):
        return [_telling(value) for value in facts]
    return facts


def told(finding: Finding, folder: Path) -> Iterator[str]:
    """A session as `inspect` shows it: what is seen, what that means, what would be done."""
    seen, plan = finding.seen, finding.plan
    yield f"session {seen.sid} in {folder}"
    yield ""
    yield from aligned(
        [
            ("keeper", _keeper(seen)),
            *(("rival keeper", rival.evidence) for rival in seen.rivals),
            ("agent", _agent(seen)),
            ("socket", _socket(seen)),
            ("pid file", _pid_file(seen.pid_file)),
            ("agent pid file", _pid_file(seen.agent_file)),
            *([_started(seen)] if seen.leftovers else []),
            *([("restart", _restarts(seen.record))] if seen.record else []),
            *([("filesystem", "a network's, where a dead pid proves little")] * seen.remote),
            ("", ""),
            ("phase", f"{plan.verdict.value}, because: {plan.reason}"),
            ("would do", "; then ".join(_steps(plan)) or "nothing"),
        ]
    )


def _keeper(seen: Observation) -> str:
    keeper = seen.keeper
    match keeper.state:
        case KeeperState.PROVEN:
            return f"alive for {age(keeper.age)}: {keeper.evidence}"
        case KeeperState.NONE:
            return keeper.evidence or "none lives"
        case _:
            return f"{keeper.state.value}: {keeper.evidence}"


def _agent(seen: Observation) -> str:
    agent = seen.agent
    words = agent.state.value.replace("_", " ")
    if agent.evidence:
        words += f": {agent.evidence}"
    if agent.state is AgentState.ALIVE and not agent.proven:
        words += " (not proven to be its agent, so never signalled)"
    return words


def _socket(seen: Observation) -> str:
    if seen.socket.kind is not EntryKind.SOCKET:
        return _entry(seen.socket)
    match seen.listening:
        case Listening.ANSWERED if seen.listener is not None:
            return f"process {seen.listener.pid} listens"
        case Listening.ANSWERED:
            return "answers, by whom cannot be told"
        case Listening.REFUSED:
            return "there, and nobody listens on it"
        case Listening.NOT_ASKED:
            return "there, not asked"


def _started(seen: Observation) -> tuple[str, str]:
    named = ", ".join(f"{each.process.pid} {each.name}" for each in seen.leftovers)
    heading = "leftovers" if seen.over else "started"
    return heading, f"{named} (to be left alone)" if seen.leave else named


def _restarts(record: RestartRecord) -> str:
    times = len(record.restarts)
    lately = f", restarted {times} time{'s' if times != 1 else ''} lately" if times else ""
    ended = f", ended: {record.ending.value}" if record.ending is not Ending.NOT_YET else ""
    return f"{record.policy}{lately}{ended}{', given up' if record.given_up else ''}"


def _pid_file(entry: Entry) -> str:
    return f"names process {entry.pid}" if entry.kind is EntryKind.PID else _entry(entry)


def _entry(entry: Entry) -> str:
    return f"{entry.kind.value}: {entry.detail}" if entry.detail else entry.kind.value


def _steps(plan: Plan) -> Iterator[str]:
    yield from map(action_words, plan.actions)
    if plan.again_after is not None:
        yield f"look again in {plan.again_after:.1f} s"


def action_words(action: object) -> str:
    """An action in words."""
    match action:
        case Remove(entries):
            return f"remove {', '.join(role.value for role, _ in entries)}"
        case StopKeeper(process, at_once):
            return f"stop keeper {process.pid}{' by SIGKILL' if at_once else ''}"
        case StopAgent(process):
            return f"stop agent {process.pid}"
        case StopLeftovers(processes):
            return f"stop {', '.join(str(process.pid) for process in processes)}"
        case Rebind(process):
            return f"tell keeper {process.pid} to bind its socket again"
        case Adopt(process):
            return f"write the pid file of keeper {process.pid} again"
        case Restart():
            return "start it again, as its launch note says"
        case GiveUp():
            return "give it up"
        case Forget():
            return "remove its launch note"
        case _:
            return repr(action)
