from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SINK, WAIT, alive, stale_pair, until

import reconciler
from reconciler import sync


def test_spawn_write_discover_and_stop_without_an_event_loop(folder: Path, tmp_path: Path) -> None:
    manager = sync.KeeperManager(folder)
    got = tmp_path / "got"
    spawned = manager.spawn("demo", agent_command=("sh", "-c", 'exec cat > "$0"', str(got)))
    assert alive(spawned.keeper_pid)
    delivery = sync.RpcWriter(folder).write("demo", {"type": "get_state", "id": "1"})
    assert delivery.outcome is reconciler.Outcome.DELIVERED
    until(lambda: json.loads(got.read_bytes() or b"{}") == {"type": "get_state", "id": "1"})
    assert manager.discover() == [
        reconciler.KeeperEntry("demo", spawned.keeper_pid, str(folder / "demo.rpc.sock"))
    ]
    stopped = manager.stop("demo")
    assert (stopped.sid, stopped.keeper_pid) == ("demo", spawned.keeper_pid)
    assert not alive(spawned.keeper_pid)
    assert manager.discover() == []


def test_looking_is_the_same_in_both_faces(folder: Path) -> None:
    stale_pair(folder, "old")
    manager = sync.KeeperManager(folder)
    assert [finding.plan.verdict for finding in manager.find()] == [reconciler.Verdict.STALE]
    assert manager.inspect("old").plan.verdict is reconciler.Verdict.STALE


def test_errors_are_the_packages_own(folder: Path) -> None:
    manager = sync.KeeperManager(folder)
    with pytest.raises(reconciler.NoSuchSessionError):
        manager.stop("demo")
    with pytest.raises(reconciler.InvalidSessionIdError):
        manager.spawn("../demo")
    manager.spawn("demo", agent_command=SINK)
    with pytest.raises(reconciler.AlreadyRunningError):
        manager.spawn("demo", agent_command=SINK)


@pytest.mark.parametrize("name", ["spawn", "stop", "discover"])
def test_each_call_has_the_arguments_and_the_words_of_the_async_one(name: str) -> None:
    ours, theirs = getattr(sync.KeeperManager, name), getattr(reconciler.KeeperManager, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours.__doc__ == theirs.__doc__
    assert inspect.iscoroutinefunction(theirs)
    assert not inspect.iscoroutinefunction(ours)


@pytest.mark.parametrize("name", ["write", "write_many", "stream"])
def test_the_writer_has_the_arguments_of_the_async_one(name: str) -> None:
    ours = inspect.signature(getattr(sync.RpcWriter, name)).parameters
    theirs = inspect.signature(getattr(reconciler.RpcWriter, name)).parameters
    assert ours == theirs


def test_no_async_method_is_left_in_the_sync_face() -> None:
    for kind in (sync.KeeperManager, sync.RpcWriter):
        public = [n for n, _ in inspect.getmembers(kind, callable) if not n.startswith("_")]
        left = [n for n in public if inspect.iscoroutinefunction(getattr(kind, n))]
        assert left == ([] if kind is sync.RpcWriter else ["start_again"])


def test_within_a_running_loop_it_is_refused_with_what_to_do_instead(folder: Path) -> None:
    manager = sync.KeeperManager(folder)

    async def within() -> None:
        with pytest.raises(RuntimeError, match=r"await reconciler.KeeperManager.discover"):
            manager.discover()
        with pytest.raises(RuntimeError, match=r"await reconciler.KeeperManager.spawn"):
            manager.spawn("demo", agent_command=SINK)
        assert await asyncio.to_thread(manager.discover) == []

    asyncio.run(within())


def test_a_script_of_a_few_lines_needs_no_loop_and_its_session_outlives_it(folder: Path) -> None:
    script = """if True:
        import sys
        from reconciler.sync import KeeperManager, RpcWriter

        manager = KeeperManager(sys.argv[1])
        print(manager.spawn("demo", agent_command=["cat"]).keeper_pid)
        assert RpcWriter(manager.sessions_dir).write("demo", '{"type":"get_state"}').delivered
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, folder],
        capture_output=True,
        timeout=WAIT,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.stderr == b""
    pid = int(done.stdout)
    assert alive(pid)
    os.kill(pid, signal.SIGTERM)
    until(lambda: not alive(pid), "the keeper ends")
