from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import HUNG, NODE_KEEPER, alive, asynchronous, happens

from reconciler.endings import TAIL, ending_in, ending_of
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager
from reconciler.requests import OUR_KEEPER
from reconciler.restarts import Ending

START = {"event": "keeper.start"}
READY = {"event": "keeper.ready"}
STOP = {"event": "keeper.stop"}
FAILED = {"event": "keeper.failed", "reason": "agent_exited"}


def log(*said: Mapping[str, object]) -> bytes:
    """A log of a keeper of ours."""
    known = {"timestamp": "2026-03-01T09:00:00.000Z", "sid": "s", "keeper_pid": 4711}
    return b"".join(json.dumps({**known, **each}).encode() + b"\n" for each in said)


def exited(**how: int) -> dict[str, object]:
    return {"event": "keeper.agent_exited", **how}


@pytest.fixture
def opened(folder: Path) -> Iterator[Folder]:
    with Folder(folder) as opened:
        yield opened


AT = datetime(2026, 3, 1, 9, tzinfo=UTC).timestamp()
"""When the keepers of these logs have said all that they say."""


@pytest.mark.parametrize(
    ("text", "failed_at", "ending"),
    [
        (log(START, READY, exited(signal=15), STOP), AT + 1, Ending.FAILED),
        (log(START, READY, exited(signal=15), STOP), AT - 1, Ending.ASKED),
        (log(START, READY, exited(exit_code=0), STOP), AT - 1, Ending.FINISHED),
        (log(READY, exited(signal=15), STOP), AT - 1, Ending.FAILED),  # when it began was cut off
        (log({**START, "timestamp": "yesterday"}, STOP), AT - 1, Ending.FAILED),
        (log({**START, "timestamp": "0001-01-01T00:00:00"}, STOP), AT - 1, Ending.FAILED),
        (b"shutdown: code=0 reason=SIGTERM\n", AT - 1, Ending.FAILED),
        (b"", AT - 1, Ending.FAILED),
    ],
)
def test_a_failure_that_was_noted_down_holds_until_a_keeper_has_started_since(
    text: bytes, failed_at: float, ending: Ending
) -> None:
    assert ending_in(text, failed_at=failed_at) is ending


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        (log(START, READY, exited(exit_code=0), STOP), Ending.FINISHED),
        (log(START, READY, exited(exit_code=3), STOP), Ending.FAILED),
        (log(START, READY, exited(signal=9), STOP), Ending.FAILED),
        (log(START, READY, exited(signal=15), STOP), Ending.ASKED),
        (log(START, READY, exited(signal=2), STOP), Ending.ASKED),
        (log(START, READY, exited(exit_code=143), STOP), Ending.ASKED),
        (log(START, READY, exited(exit_code=130), STOP), Ending.ASKED),
        (log(START, exited(exit_code=0), FAILED, STOP), Ending.FAILED),
        (log(START, FAILED, STOP), Ending.FAILED),
        (log(START, READY, {"event": "keeper.crashed"}), Ending.FAILED),
        (log(START, READY, STOP), Ending.ASKED),
        (log(START, READY), Ending.KILLED),
        (log(START), Ending.KILLED),
        (log(STOP), Ending.ASKED),  # the rest was cut off
        (b"", Ending.KILLED),
        (b"what an agent has printed\n", Ending.KILLED),
    ],
)
def test_the_words_of_a_keeper_of_ours(text: bytes, ending: Ending) -> None:
    assert ending_in(text) is ending


def test_the_last_life_counts() -> None:
    earlier = log(START, READY, exited(exit_code=3), STOP)
    assert ending_in(earlier + log(START, READY)) is Ending.KILLED
    assert ending_in(earlier + log(START, READY, STOP)) is Ending.ASKED
    assert ending_in(log(START, READY, STOP) + earlier) is Ending.FAILED


def test_what_stands_between_the_words_does_not_matter() -> None:
    first, last = log(START, READY, exited(exit_code=0)), log(STOP)
    printed = b'printed\n{"timestamp": broken, "keeper_pid"\n\xff\xfe[1]\n'
    printed += b'{"timestamp": "", "event": "keeper.failed"}\n'
    printed += b'{"event": "keeper.failed", "keeper_pid": 1}\n'
    deep = b'{"timestamp":' + b"[" * 9999 + b'"keeper_pid"\n'
    assert ending_in(first + printed + last + printed + deep) is Ending.FINISHED


@pytest.mark.parametrize(
    ("lines", "ending"),
    [
        (["pi exited code=0 signal=null elapsed=9ms", "shutdown: code=0 reason=pi-exit"],
         Ending.FINISHED),
        (["pi exited code=3 signal=null elapsed=9ms", "shutdown: code=0 reason=pi-exit"],
         Ending.FAILED),
        (["pi exited code=null signal=SIGKILL elapsed=9ms", "shutdown: code=0 reason=pi-exit"],
         Ending.FAILED),
        (["pi exited code=null signal=SIGTERM elapsed=9ms", "shutdown: code=0 reason=pi-exit"],
         Ending.ASKED),
        (["pi exited code=143 signal=null elapsed=9ms", "shutdown: code=0 reason=pi-exit"],
         Ending.ASKED),
        (["shutdown: code=0 reason=SIGTERM"], Ending.ASKED),
        (["shutdown: code=1 reason=uncaughtException"], Ending.UNKNOWN),
        (["keeper ends: SIGINT"], Ending.ASKED),
        (["keeper ends: agent exited (0)"], Ending.FINISHED),
        (["keeper ends: agent exited (SIGKILL)"], Ending.FAILED),
        (["keeper ends: agent exited (SIGUSR1)"], Ending.FAILED),
        (["keeper ends: agent exited (" + "9" * 5000 + ")"], Ending.UNKNOWN),
        (["keeper ready: s", "connection accepted"], Ending.KILLED),
        (["shutdown: code=0 reason=SIGTERM", *["printed"] * 7], Ending.ASKED),
        (["shutdown: code=0 reason=SIGTERM", *["printed"] * 8], Ending.KILLED),
    ],
)  # fmt: skip
def test_the_words_of_another_keeper(lines: list[str], ending: Ending) -> None:
    text = "".join(f"[2026-03-01T09:00:00.000Z] {line}\n" for line in ["keeper starting", *lines])
    assert ending_in(text.encode()) is ending


@pytest.mark.parametrize("node", [False, True], ids=["ours", "other"])
@pytest.mark.parametrize(
    ("number", "ending"),
    [(signal.SIGTERM, Ending.ASKED), (signal.SIGINT, Ending.ASKED), (signal.SIGKILL, None)],
)
def test_real_keepers_that_get_a_signal(
    folder: Path, opened: Folder, number: signal.Signals, ending: Ending | None, *, node: bool
) -> None:
    command = ("node", str(NODE_KEEPER)) if node else OUR_KEEPER
    manager = KeeperManager(folder, keeper_command=command)

    @asynchronous
    async def spawn_and_signal() -> None:
        spawned = await manager.spawn("s", agent_command=HUNG)
        os.kill(spawned.keeper_pid, number)
        await happens(lambda: not alive(spawned.keeper_pid), "the keeper ends")

    spawn_and_signal()
    assert ending_of(opened, "s") is (ending or Ending.KILLED)


def test_only_the_end_of_a_log_is_read(opened: Folder) -> None:
    path = opened.path / "keeper-s.log"
    path.write_bytes(log(START, exited(exit_code=3), STOP) + b"x" * TAIL)
    assert ending_of(opened, "s") is Ending.KILLED
    path.write_bytes(b"x" * TAIL + b"\n" + log(START, exited(exit_code=3), STOP))
    assert ending_of(opened, "s") is Ending.FAILED
    path.write_bytes(log(STOP))
    assert ending_of(opened, "s") is Ending.ASKED, "a short one whole"


@pytest.mark.parametrize("kind", ["nothing", "link", "fifo", "folder"])
def test_what_is_no_log_of_ours_tells_nothing(opened: Folder, tmp_path: Path, kind: str) -> None:
    path, other = opened.path / "keeper-s.log", tmp_path / "log"
    other.write_bytes(log(START, exited(exit_code=0), STOP))
    match kind:
        case "link":
            path.symlink_to(other)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
    assert ending_of(opened, "s") is Ending.KILLED


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_takes_the_place_of_a_log_is_neither_followed_nor_waited_for(
    opened: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, other = opened.path / "keeper-s.log", tmp_path / "log"
    other.write_bytes(log(STOP))
    path.write_bytes(b"")
    look = Folder.status

    def and_then_it_changes(folder: Folder, name: str) -> os.stat_result | None:
        status = look(folder, name)
        path.unlink()
        path.symlink_to(other) if kind == "link" else os.mkfifo(path)
        return status

    monkeypatch.setattr(Folder, "status", and_then_it_changes)
    if kind == "link":
        with pytest.raises(OSError, match="symbolic links"):
            ending_of(opened, "s")
    else:
        assert ending_of(opened, "s") is Ending.KILLED
