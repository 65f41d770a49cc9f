"""What users' type checkers see. Checked by mypy, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import assert_type

import reconciler
from reconciler import (
    Attempt,
    Delivery,
    Desired,
    Finding,
    KeeperEntry,
    KeeperManager,
    Ladder,
    ManyDelivery,
    Observation,
    Outcome,
    Plan,
    Policy,
    Reason,
    Reconciler,
    RestartLimits,
    RpcStream,
    RpcWriter,
    Session,
    SessionTable,
    SpawnedKeeper,
    StoppedSession,
    Verdict,
    WritePolicy,
    sync,
)


async def manager(folder: Path) -> None:
    keepers = KeeperManager(
        folder,
        keeper_command=("node", "keeper.cjs"),
        programs=frozenset({"keeper.cjs"}),
        agent_probe=lambda sid, pid: pid > 0 if sid else None,
        policy=Policy(settle=1.0),
        restart_limits=RestartLimits(first=0.5, most=5),
        ladder=Ladder(term_grace=1.0),
    )
    assert_type(keepers.sessions_dir, Path)
    spawned = await keepers.spawn("demo", cwd=folder, env={"A": "b"}, agent_command=["cat"])
    assert_type(spawned, SpawnedKeeper)
    assert_type((spawned.sid, spawned.keeper_pid, spawned.agent_pid), tuple[str, int, int | None])
    assert_type(await keepers.discover(), list[KeeperEntry])
    assert_type(await keepers.stop("demo"), StoppedSession)
    assert_type(await keepers.restart("demo", leave=True), SpawnedKeeper)
    finding = keepers.inspect("demo")
    assert_type(finding, Finding)
    assert_type((finding.seen, finding.plan), tuple[Observation, Plan])
    assert_type(keepers.find(), list[Finding])
    await keepers.spawn("demo", restart="on-failure")
    await keepers.spawn("demo", restart="sometimes")  # type: ignore[arg-type]
    await keepers.spawn(1)  # type: ignore[arg-type]
    await keepers.spawn("demo", nothing=1)  # type: ignore[call-arg]


async def writer(folder: Path) -> None:
    write = RpcWriter(folder, policy=WritePolicy(attempts=1, backoff=(0.1,)))
    message: Mapping[str, object] = {"type": "get_state"}
    delivery = await write.write("demo", message, timeout=1.0)
    assert_type(delivery, Delivery)
    assert_type((delivery.outcome, delivery.reason), tuple[Outcome, Reason])
    assert_type(delivery.attempts, tuple[Attempt, ...])
    assert_type(await write.write_many("demo", [message, "{}", b"{}"]), ManyDelivery)
    async with write.stream("demo") as stream:
        assert_type(stream, RpcStream)
        await stream.send("{}")
    assert_type(stream.delivery, ManyDelivery | None)
    await write.write("demo", 1)  # type: ignore[arg-type]


async def loop(folder: Path) -> None:
    async with Reconciler(
        KeeperManager(folder), resync=30.0, dry_run=True, control=True
    ) as running:
        assert_type(running, Reconciler)
        assert_type(running.sessions, SessionTable)
        assert_type(running.sessions["demo"], Session)
        assert_type(running.sessions["demo"].phase, Verdict)
        assert_type(running.sessions["demo"].desired, Desired)
        assert_type(await running.wait_for("demo", lambda row: row.agent_pid == 1), Session)
        assert_type(running.changes(), AsyncIterator[Session])
        assert_type(await running.spawn("demo"), SpawnedKeeper)
        assert_type(await running.stop("demo"), StoppedSession)


def blocking(folder: Path) -> None:
    keepers = sync.KeeperManager(folder)
    assert_type(keepers.spawn("demo", agent_command=["cat"], capture=True), SpawnedKeeper)
    assert_type(keepers.discover(), list[KeeperEntry])
    assert_type(keepers.stop("demo"), StoppedSession)
    assert_type(keepers.find(), list[Finding])
    write = sync.RpcWriter(folder)
    assert_type(write.write("demo", "{}", timeout=1.0), Delivery)
    with write.stream("demo") as stream:
        stream.send({"type": "get_state"})
    keepers.spawn(1)  # type: ignore[arg-type]
    keepers.stop()  # type: ignore[call-arg]


def errors() -> None:
    try:
        pass
    except reconciler.ReconcilerError as error:
        assert_type(error, reconciler.ReconcilerError)
    except reconciler.StreamBrokenError as broken:
        assert_type(broken.delivery, ManyDelivery)
    assert_type(reconciler.__version__, str)
    reconciler.Nothing  # type: ignore[attr-defined] # noqa: B018 - it must not be taken for a name
