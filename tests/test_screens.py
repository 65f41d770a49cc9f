from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reconciler.findings import Finding
from reconciler.layout import Role
from reconciler.observations import (
    Agent,
    AgentState,
    Entry,
    EntryKind,
    FileId,
    Keeper,
    KeeperState,
    Listening,
    Observation,
    ProcessId,
)
from reconciler.plans import Action, Adopt, Plan, Rebind, Remove, StopAgent, StopKeeper, Verdict
from reconciler.screens import action_words, age, everything, row, table, told

FOLDER = Path("/f")
KEEPER = ProcessId(4711, 1, "boot")
AGENT = ProcessId(4712, 2, "boot")
FILE = FileId(1, 2, 3, 4)
SEEN = Observation(
    sid="demo",
    now=10.0,
    pid_file=Entry(EntryKind.PID, 1.0, FILE, pid=4711),
    socket=Entry(EntryKind.SOCKET, 1.0, FILE),
    agent_file=Entry(EntryKind.ABSENT, 1.0),
    keeper=Keeper(KeeperState.PROVEN, KEEPER, ours=True, age=75.4, evidence="it listens"),
    listening=Listening.ANSWERED,
    listener=KEEPER,
    agent=Agent(AgentState.ALIVE, 1.0, AGENT, proven=True, evidence="its child"),
)
READY = Plan(Verdict.READY, "keeper proven")


def shown(seen: Observation, plan: Plan = READY) -> dict[str, str]:
    """What `inspect` shows, by its labels, which stand in one column."""
    head, blank, *lines = told(Finding(seen, plan), FOLDER)
    assert (head, blank) == ("session demo in /f", "")
    column = lines[0].index(lines[0].split(maxsplit=1)[1])
    return {line[:column].rstrip(): line[column:] for line in lines}


def test_evidence_comes_first_then_the_judgement_and_what_would_be_done() -> None:
    assert list(shown(SEEN).items()) == [
        ("keeper", "alive for 1m15s: it listens"),
        ("agent", "alive: its child"),
        ("socket", "process 4711 listens"),
        ("pid file", "names process 4711"),
        ("agent pid file", "absent"),
        ("", ""),
        ("phase", "ready, because: keeper proven"),
        ("would do", "nothing"),
    ]


@pytest.mark.parametrize(
    ("change", "label", "words"),
    [
        ({"keeper": Keeper(KeeperState.NONE)}, "keeper", "none lives"),
        ({"keeper": Keeper(KeeperState.NONE, evidence="gone")}, "keeper", "gone"),
        (
            {"keeper": Keeper(KeeperState.RECYCLED, evidence="7 is 'vi'")},
            "keeper",
            "recycled: 7 is 'vi'",
        ),
        ({"rivals": (replace(SEEN.keeper, evidence="it too"),)}, "rival keeper", "it too"),
        ({"agent": Agent(AgentState.NEVER_SEEN, 1.0)}, "agent", "never seen"),
        (
            {"agent": Agent(AgentState.ALIVE, 1.0, AGENT)},
            "agent",
            "alive (not proven to be its agent, so never signalled)",
        ),
        ({"listener": None}, "socket", "answers, by whom cannot be told"),
        ({"listening": Listening.REFUSED}, "socket", "there, and nobody listens on it"),
        ({"listening": Listening.NOT_ASKED}, "socket", "there, not asked"),
        ({"socket": Entry(EntryKind.ABSENT, 1.0)}, "socket", "absent"),
        (
            {"socket": Entry(EntryKind.HOSTILE, 1.0, detail="a FIFO")},
            "socket",
            "hostile: a FIFO",
        ),
        ({"pid_file": Entry(EntryKind.EMPTY, 1.0)}, "pid file", "empty"),
        ({"remote": True}, "filesystem", "a network's, where a dead pid proves little"),
    ],
)
def test_each_fact_in_words(change: dict[str, object], label: str, words: str) -> None:
    assert shown(replace(SEEN, **change))[label] == words  # type: ignore[arg-type]


ACTIONS: list[tuple[Action, str]] = [
    (Remove(((Role.SOCKET, FILE), (Role.PID_FILE, FILE))), "remove socket, pid_file"),
    (StopKeeper(KEEPER), "stop keeper 4711"),
    (StopKeeper(KEEPER, at_once=True), "stop keeper 4711 by SIGKILL"),
    (StopAgent(AGENT), "stop agent 4712"),
    (Rebind(KEEPER), "tell keeper 4711 to bind its socket again"),
    (Adopt(KEEPER, None), "write the pid file of keeper 4711 again"),
]


@pytest.mark.parametrize(("action", "words"), ACTIONS)
def test_each_action_in_words(action: Action, words: str) -> None:
    assert action_words(action) == words
    plan = Plan(Verdict.STALE, "keeper dead", (action,), again_after=1.04)
    assert shown(SEEN, plan)["would do"] == f"{words}; then look again in 1.0 s"
    assert everything(Finding(SEEN, plan), FOLDER)["actions"] == [words]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"),
        (0.0, "0s"),
        (59.9, "59s"),
        (60.0, "1m0s"),
        (3_599.0, "59m59s"),
        (3_600.0, "1h0m"),
        (90_000.0, "1d1h"),
        (864_000.0, "10d0h"),
    ],
)
def test_an_age_is_its_two_largest_units(seconds: float | None, words: str) -> None:
    assert age(seconds) == words


def test_a_table_without_rows_is_its_heading() -> None:
    assert list(table([])) == ["SID  PHASE  KEEPER  AGENT  AGE"]


def test_a_row_names_processes_only_where_they_are_known_to_live() -> None:
    dead = replace(
        SEEN, keeper=Keeper(KeeperState.RECYCLED, KEEPER), agent=Agent(AgentState.GONE, 1.0)
    )
    told_of = row(Finding(dead, Plan(Verdict.STALE, "keeper dead")), FOLDER)
    assert (told_of["keeper_pid"], told_of["agent_pid"], told_of["age_s"]) == (None, None, None)
    assert told_of["socket"] == "/f/demo.rpc.sock"


def test_everything_holds_no_stamps_that_mean_nothing_elsewhere() -> None:
    seen = everything(Finding(SEEN, READY), FOLDER)["observation"]
    assert seen["keeper"]["process"] == {"pid": 4711, "started": 1, "boot_id": "boot"}
    assert seen["socket"]["file"] == {"device": 1, "inode": 2, "mtime_ns": 3, "size": 4}
    assert "now" not in seen
    assert "since" not in seen["socket"]
