"""Who asks to be told what became of each write is told, and cannot spoil one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from conftest import SINK, asynchronous

from reconciler import Delivery, KeeperManager, Reason, RpcWriter, StreamBrokenError, sync


@asynchronous
async def test_each_write_and_each_stream_is_told_once(folder: Path) -> None:
    told: list[Delivery] = []
    await KeeperManager(folder).spawn("demo", agent_command=SINK)
    writer = RpcWriter(folder, on_delivery=told.append)
    await writer.write("demo", '{"id":"1"}')
    await writer.write_many("demo", ['{"id":"2"}', '{"id":"3"}'])
    async with writer.stream("demo") as stream:
        await stream.send('{"id":"4"}')
        await stream.send('{"id":"5"}')
        assert len(told) == 2
    await writer.write("nobody", '{"id":"6"}')
    assert [each.reason for each in told] == [*3 * [Reason.RECEIPT], Reason.NO_SOCKET]
    assert [each.sid for each in told] == [*3 * ["demo"], "nobody"]
    with pytest.raises(StreamBrokenError):
        async with writer.stream("nobody"):
            pass
    assert len(told) == 5
    assert told[3].elapsed > 0.1, "the pauses between the attempts count"


def test_a_listener_that_fails_changes_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(delivery: Delivery) -> None:
        raise ValueError(delivery.sid)

    sync.KeeperManager(folder).spawn("demo", agent_command=SINK)
    with caplog.at_level(logging.ERROR, "reconciler"):
        assert sync.RpcWriter(folder, on_delivery=fail).write("demo", '{"id":"1"}').delivered
    assert "on_delivery has failed" in caplog.text
