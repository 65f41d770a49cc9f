"""What another process tries to make us do; `docs/security.md` tells of each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import (
    PROGRAM,
    SINK,
    Told,
    alive,
    asynchronous,
    dead_pid,
    happens,
    program_environment,
    soon,
    until,
)
from stand_ins import keeper_without_agent, listening, spawn

from reconciler.controller import Reconciler
from reconciler.errors import UnverifiableError
from reconciler.keeper import KeeperManager
from reconciler.ladder import Ladder
from reconciler.plans import Verdict
from reconciler.rpc_writer import BlockingRpcWriter, Reason, RpcWriter
from reconciler.state import Policy

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text()
SID = "8c2c7f0e-2a4b-4c57-9d63-3f6f3f1f2a10"
QUICK = Policy(settle=0.3, start_grace=0.6, orphan_grace=0.1, lost_grace=0.9, rebind_grace=0.3)
LADDER = Ladder(term_grace=0.3, kill_grace=10.0)
NEVER = 3600.0

SERVICE = """
import os, signal, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
child = os.fork()
if child == 0:
    signal.pause()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(child, flush=True)
while True:
    listener.accept()[0].close()
"""


@pytest.fixture
def service(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """An innocent that listens on a socket of its own, as a terminal multiplexer does.

    It leads a process group, and has a child that may end.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", SERVICE, str(folder.parent / "service.sock")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        yield process, child
        process.kill()
        if alive(child):
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("by", [os.link, os.rename])
@asynchronous
async def test_an_innocents_socket_under_a_sessions_name_makes_it_no_keeper(
    folder: Path,
    service: tuple[subprocess.Popen[str], int],
    by: Callable[[Path, Path], None],
) -> None:
    """Its child would be taken for the agent, and it for an orphan once that one ends."""
    process, child = service
    told = Told()
    manager = KeeperManager(folder, policy=QUICK, ladder=LADDER)
    async with Reconciler(manager, resync=NEVER, logger=told.logger) as reconciler:
        by(folder.parent / "service.sock", folder / f"{SID}.rpc.sock")
        (folder / f"{SID}.rpc.sock.pid").write_text(str(process.pid))
        session = await soon(
            reconciler.wait_for(SID, lambda s: s.phase not in {Verdict.ABSENT, Verdict.STARTING})
        )
        assert session.phase is Verdict.UNVERIFIABLE
        os.kill(child, signal.SIGKILL)
        await reconciler.settled()
        with pytest.raises(UnverifiableError):
            await reconciler.stop(SID)
    with pytest.raises(UnverifiableError):
        await manager.stop(SID)
    assert process.poll() is None
    assert not told.of("keeper.stopped")
    assert (folder / f"{SID}.rpc.sock").is_socket()


@asynchronous
async def test_a_process_that_calls_itself_the_keeper_of_anothers_session_ends_itself_alone(
    folder: Path,
) -> None:
    """A child of a hostile agent that has the folder open, with a program's name and the id."""
    manager = KeeperManager(folder, policy=QUICK, ladder=LADDER)
    victim = await manager.spawn(SID, agent_command=SINK)
    files = sorted(path.name for path in folder.iterdir())
    with keeper_without_agent(folder, SID) as (liar,):
        async with Reconciler(manager, resync=NEVER, logger=Told().logger) as reconciler:
            await happens(lambda: not alive(liar), "the liar was believed, and ended")
            await reconciler.settled()
            assert reconciler.sessions[SID].phase is Verdict.READY
    assert alive(victim.keeper_pid)
    assert alive(victim.agent_pid or 0)
    assert sorted(path.name for path in folder.iterdir()) == files
    await manager.stop(SID)


@asynchronous
async def test_who_takes_the_socket_of_a_keeper_of_ours_gets_neither_its_life_nor_its_prompts(
    folder: Path,
) -> None:
    manager = KeeperManager(folder, policy=QUICK, ladder=LADDER)
    victim = await manager.spawn(SID, agent_command=SINK)
    (folder / f"{SID}.rpc.sock").unlink()
    with listening(folder, f"{SID}.rpc.sock") as (thief,):
        async with Reconciler(manager, resync=NEVER, logger=Told().logger) as reconciler:
            await happens(lambda: reconciler.sessions.row(SID).phase is Verdict.UNVERIFIABLE)
            await reconciler.settled()
            delivery = await RpcWriter(folder).write(SID, "secret")
            assert delivery.reason is Reason.WRONG_PEER
        assert alive(thief)
        assert alive(victim.keeper_pid)
    await manager.stop(SID)


def test_a_flood_of_descriptors_leaves_none_with_the_keeper(folder: Path) -> None:
    manager = KeeperManager(folder)
    keeper = spawn(manager, SID)
    before = os.listdir(f"/proc/{keeper.keeper_pid}/fd")
    clients = []
    for _ in range(8):
        client = socket.socket(socket.AF_UNIX)
        client.connect(keeper.socket)
        clients.append(client)
        with open(os.devnull, "rb") as extra:
            for _ in range(8):
                socket.send_fds(client, [b"x"], [extra.fileno()] * 200)
    until(lambda: len(os.listdir(f"/proc/{keeper.keeper_pid}/fd")) >= len(before) + 8, "let in")
    assert BlockingRpcWriter(folder).write(SID, "fine").delivered
    assert len(os.listdir(f"/proc/{keeper.keeper_pid}/fd")) <= len(before) + 9
    for client in clients:
        client.close()
    until(lambda: os.listdir(f"/proc/{keeper.keeper_pid}/fd") == before, "nothing is left")


def test_a_hard_link_to_a_file_of_somebody_else_costs_no_more_than_the_link(folder: Path) -> None:
    """Under our names, hidden ones as well: the name goes, the file and its text stay."""
    precious = folder.parent / "precious"
    precious.write_text("precious")
    for name in (f"{SID}.rpc.sock.pid", f".{SID}.rpc.sock.pid.taken-{dead_pid()}"):
        os.link(precious, folder / name)
    ended = subprocess.run(
        [*PROGRAM, "run", "--once", "--sessions-dir", folder],
        env=program_environment(folder),
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0
    assert list(folder.iterdir()) == []
    assert precious.read_text() == "precious"
    assert precious.stat().st_nlink == 1


# The page.


HEADS = ("| They ", "| It tries ", "| It is ", "| It says ", "| Somebody ", "| ---")


def test_every_defence_that_the_page_claims_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    claims = [row for row in rows if not row.startswith(HEADS)]
    assert len(claims) > 20
    assert [row for row in claims if ".py::test_" not in row.rsplit("|", 2)[1]] == []
