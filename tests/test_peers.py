from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from delivery_scene import PATIENT, SID, Scene
from delivery_scene import scene as scene  # noqa: PLC0414 - a fixture

from reconciler import layout, peers
from reconciler.rpc_writer import BlockingRpcWriter, Reason
from reconciler.waiting import TransientError

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a pid namespace")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read of /proc."""
    paths: list[str] = []
    read: Callable[[str], bytes] = peers._read

    def reading(path: str) -> bytes:
        paths.append(path)
        return read(path)

    monkeypatch.setattr(peers, "_read", reading)
    return paths


def test_what_a_keeper_was_started_as_is_read_once(scene: Scene, reads: list[str]) -> None:
    keeper = scene.keeper("ours")
    writer = BlockingRpcWriter(scene.folder, policy=PATIENT)
    for number in range(3):
        assert writer.write(SID, {"n": number}).reason is Reason.RECEIPT
    assert reads == [f"/proc/{keeper.process.pid}/{name}" for name in ("stat", "cmdline")]


def test_another_keeper_of_the_session_is_met_anew(scene: Scene) -> None:
    writer = BlockingRpcWriter(scene.folder, policy=PATIENT)
    told = []
    for kind in ("ours", "node", "ours"):
        keeper = scene.keeper(kind)
        told.append(writer.write(SID, {"kind": kind}).reason)
        keeper.process.kill()
        for role in (layout.Role.SOCKET, layout.Role.PID_FILE, layout.Role.AGENT_PID_FILE):
            scene.path(role).unlink(missing_ok=True)
    assert told == [Reason.RECEIPT, Reason.HANDED_ON, Reason.RECEIPT]


def test_another_process_of_the_same_number_is_met_anew(scene: Scene, reads: list[str]) -> None:
    keeper = scene.keeper("ours")
    writer = BlockingRpcWriter(scene.folder, policy=PATIENT)
    known = writer._desk.peers._known
    assert writer.write(SID, {"n": 1}).reason is Reason.RECEIPT
    (device, inode, made), peer = known[SID]
    known[SID] = (device, inode - 1, made), peer._replace(ours=False)
    assert writer.write(SID, {"n": 2}).reason is Reason.RECEIPT
    assert [path for path in reads if path.endswith("cmdline")] == [
        f"/proc/{keeper.process.pid}/cmdline"
    ] * 2


def test_no_more_keepers_are_remembered_than_its_bound(
    scene: Scene, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_IN_MIND", 1)
    other = "other"
    first, second = scene.keeper("ours"), scene.keeper("ours", sid=other)
    writer = BlockingRpcWriter(scene.folder, policy=PATIENT)
    for sid in (SID, other, other, SID):
        assert writer.write(sid, {"to": sid}).delivered
    read = [int(path.split("/")[2]) for path in reads if path.endswith("stat")]
    assert read == [first.process.pid, second.process.pid, first.process.pid]


def test_the_death_of_who_listened_is_seen(folder: Path) -> None:
    """The pid file names it, the connection was made, and it is gone."""
    path = folder / layout.file_name(layout.Role.SOCKET, SID)
    program = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-I", "-S", "-c", program, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None
        child.stdout.readline()
        (folder / layout.file_name(layout.Role.PID_FILE, SID)).write_text(str(child.pid))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            held = os.open(folder, os.O_PATH)
            try:
                assert peers.Peers().checked(sock, held, SID).pid == child.pid
                child.kill()
                child.wait()
                with pytest.raises(TransientError, match=Reason.KEEPER_DIED.value):
                    peers.Peers().checked(sock, held, SID)
            finally:
                os.close(held)


RECYCLE = """
import os, subprocess, sys
from pathlib import Path

def mark(pid):
    status = os.stat(f"/proc/{pid}")
    return status.st_dev, status.st_ino, status.st_ctime_ns

first = subprocess.Popen(["sleep", "600"])
pid, before = first.pid, mark(first.pid)
assert mark(pid) == before, "the kernel makes another inode every time"
first.kill()
first.wait()
for _ in range(100):
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    second = subprocess.Popen(["sleep", "600"])
    if second.pid == pid:
        break
    second.kill()
    second.wait()
assert second.pid == pid, "no pid was recycled"
print(mark(pid) != before)
second.kill()
second.wait()
"""


@root
@pytest.mark.root
def test_a_recycled_pid_has_another_inode(tmp_path: Path) -> None:
    """What the remembering stands on, in a pid namespace of its own."""
    unshare = shutil.which("unshare")
    assert unshare is not None
    script = tmp_path / "recycle.py"
    script.write_text(RECYCLE)
    command = [unshare, "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable]
    done = subprocess.run(
        [*command, str(script)],
        env={**os.environ, "PYTHONPATH": str(Path(peers.__file__).parents[1])},
        check=True,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.stdout == "True\n"
