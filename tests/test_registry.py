from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import open_descriptors

from reconciler.registry import LIMIT, Registry

SID = "5f0e7c1e-0c50-4f0e-9b39-4e4a3a2f3d11"
KEEPER, AGENT = 100, 4321
ENTRY = {
    "pid": 99,
    "cwd": "/w",
    "spawnedAt": "2026-01-01T00:00:00.000Z",
    "piPid": AGENT,
    "keeperPid": KEEPER,
    "keeperSockPath": f"/home/someone/.pi/dashboard/sessions/{SID}.rpc.sock",
}


class Told:
    """A registry, and what it has complained about."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.complaints: list[str] = []
        self._registry = Registry(path, self.complaints.append)

    def agent(self, sid: str = SID, keeper: int = KEEPER) -> int | None:
        return self._registry.agent_pid(sid, keeper)

    def write(self, content: object) -> None:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        new = self.path.with_suffix(".new")
        new.write_bytes(text)
        os.replace(new, self.path)


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    told = Told(tmp_path / "headless-pids.json")
    before = open_descriptors()
    yield told
    assert open_descriptors() == before


def without(*keys: str) -> dict[str, object]:
    return {key: value for key, value in ENTRY.items() if key not in keys}


@pytest.mark.parametrize(
    ("entries", "agent"),
    [
        pytest.param([ENTRY], AGENT, id="by socket"),
        pytest.param([without("keeperSockPath")], AGENT, id="by the keeper's pid"),
        pytest.param([], None, id="no entry"),
        pytest.param([without("piPid")], None, id="no agent"),
        pytest.param([without("keeperSockPath", "keeperPid")], None, id="no keeper"),
        pytest.param(
            [{**ENTRY, "keeperSockPath": "/x/other.rpc.sock"}], None, id="another's socket"
        ),
        pytest.param(
            [{**without("keeperSockPath"), "keeperPid": 101}], None, id="another's keeper"
        ),
        pytest.param(
            [{**ENTRY, "keeperSockPath": "/x/pid 100"}], None, id="a socket named like a keeper"
        ),
        pytest.param([{**ENTRY, "piPid": 1}], None, id="init"),
        pytest.param([{**ENTRY, "piPid": 0}], None, id="zero"),
        pytest.param([{**ENTRY, "piPid": -5}], None, id="negative"),
        pytest.param([{**ENTRY, "piPid": True}], None, id="boolean"),
        pytest.param([{**ENTRY, "piPid": "4321"}], None, id="text"),
        pytest.param([{**ENTRY, "piPid": 4321.5}], None, id="fraction"),
        pytest.param([{**ENTRY, "piPid": 2**31}], None, id="beyond any pid"),
        pytest.param([{**ENTRY, "piPid": 2**80}], None, id="beyond any integer"),
        pytest.param([{**ENTRY, "keeperSockPath": 7}], AGENT, id="socket of a wrong type"),
        pytest.param([None, 1, "x", [ENTRY], ENTRY], AGENT, id="wrong types beside a good one"),
        pytest.param([{**ENTRY, "piPid": 7}, ENTRY], AGENT, id="the last one counts"),
    ],
)
def test_entries(told: Told, entries: list[object], agent: int | None) -> None:
    told.write({"entries": entries, "version": 9})
    assert told.agent() == agent
    assert told.complaints == []


def test_absent_is_no_reason_to_complain(told: Told) -> None:
    assert told.agent() is None
    assert told.complaints == []


def test_what_changes_is_read_again(told: Told) -> None:
    told.write({"entries": [ENTRY]})
    assert told.agent() == AGENT
    told.write({"entries": [{**ENTRY, "piPid": 5678}]})
    assert told.agent() == 5678
    told.path.unlink()
    assert told.agent() is None


def test_what_does_not_change_is_not_read_again(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    told.write({"entries": [ENTRY]})
    assert told.agent() == AGENT
    monkeypatch.setattr(Registry, "_text", lambda *_: pytest.fail("read again"))
    assert told.agent() == AGENT


HALF = json.dumps({"entries": [ENTRY]}).encode()[:-20]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(b"", "", id="empty"),
        pytest.param(HALF, "", id="half"),
        pytest.param(b"\0" * 100, "", id="NULs"),
        pytest.param(b'{"entries":[{"cwd":"\xff"}]}', "", id="not UTF-8"),
        pytest.param(b"[]", "no list of entries", id="a list"),
        pytest.param(b"null", "no list of entries", id="null"),
        pytest.param(b"{}", "no list of entries", id="no entries"),
        pytest.param(b'{"entries":{}}', "no list of entries", id="entries of a wrong type"),
        pytest.param(b"[" * 200_000, "", id="deep"),
        pytest.param(b'{"entries":' + b'{"a":' * 200_000, "", id="deep entries"),
    ],
)
def test_what_cannot_be_used_is_not_known_and_told_once(
    told: Told, text: bytes, reason: str
) -> None:
    told.write({"entries": [ENTRY]})
    assert told.agent() == AGENT
    told.write(text)
    assert told.agent() is None
    assert told.agent() is None
    assert len(told.complaints) == 1
    assert told.complaints[0].startswith(f"{told.path} is not usable: ")
    assert reason in told.complaints[0]
    assert len(told.complaints[0]) < len(str(told.path)) + 200
    told.write({"entries": [ENTRY]})
    assert told.agent() == AGENT
    told.write(text)
    assert told.agent() is None
    assert len(told.complaints) == 2


def test_a_huge_file_is_not_read(told: Told) -> None:
    with told.path.open("wb") as file:
        file.truncate(LIMIT + 1)
    assert told.agent() is None
    assert "at most" in told.complaints[0]


def test_a_file_that_grew_after_the_look_is_read_to_the_limit(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    told.write({"entries": [ENTRY]})
    small = os.stat(told.path)
    with told.path.open("r+b") as file:
        file.truncate(LIMIT * 4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_, **__: small)
        assert told.agent() is None
    assert len(told.complaints) == 1


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
def test_hostile(told: Told, tmp_path: Path, kind: str) -> None:
    aim = Told(tmp_path / "aim")
    aim.write({"entries": [ENTRY]})
    match kind:
        case "link":
            told.path.symlink_to(aim.path)
        case "FIFO":
            os.mkfifo(told.path)
        case _:
            told.path.mkdir()
    assert told.agent() is None
    assert told.agent() is None
    assert len(told.complaints) == 1


@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_hostile_only_after_the_look(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    aim = Told(tmp_path / "aim")
    aim.write({"entries": [ENTRY]})
    honest = os.stat(aim.path)
    if kind == "link":
        told.path.symlink_to(aim.path)
    else:
        os.mkfifo(told.path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_, **__: honest)
        assert told.agent() is None
    assert len(told.complaints) == 1
