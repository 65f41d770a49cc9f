from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import (
    HUNG,
    NODE_KEEPER,
    SINK,
    WAIT,
    alive,
    as_nobody,
    asynchronous,
    bare_socket,
    dead_pid,
    end_all,
    happens,
    identity,
    root,
    stale_pair,
    until,
)
from stand_ins import kill

from reconciler import spawning
from reconciler.errors import (
    AgentExitedError,
    AgentNotFoundError,
    AlreadyRunningError,
    FolderError,
    InvalidRequestError,
    KeeperStartError,
    NoSuchSessionError,
    ReconcilerError,
    StillAliveError,
    UnverifiableError,
)
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager, SpawnedKeeper
from reconciler.ladder import Ladder
from reconciler.layout import KEEPER_PROGRAM, InvalidSessionIdError
from reconciler.plans import Verdict
from reconciler.processes import SYSTEM, Target
from reconciler.requests import OUR_KEEPER, KeeperRequest, default_environment
from reconciler.state import Policy

TELL = Path(__file__).with_name("agents") / "tell.py"
TOKEN = "PI_DASHBOARD_SPAWN_TOKEN"  # noqa: S105 - the name of a variable
DEAF_TO_TERM = ("sh", "-c", "trap '' TERM; exec cat > /dev/null")
QUICK = Ladder(term_grace=0.2, kill_grace=10.0)


@pytest.fixture
def sid() -> str:
    return str(uuid.uuid4())


@pytest.fixture
def stranger(sid: str) -> Iterator[int]:
    """A process of a program that is not known, with the session id among its arguments."""
    code = "import time; time.sleep(600)"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code, sid]) as process:
        until(lambda: SYSTEM.arguments(process.pid))
        yield process.pid
        process.kill()


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    """Whatever a test does, the caller of the manager has no zombie to wait for."""
    before = set(SYSTEM.children(os.getpid()) or ())
    yield
    assert set(SYSTEM.children(os.getpid()) or ()) <= before


def processes_of(sid: str) -> list[int]:
    """All processes that have the session id among their arguments."""
    return [pid for pid in SYSTEM.pids() if sid in (SYSTEM.arguments(pid) or ())]


def nothing_is_left(folder: Path, sid: str) -> None:
    assert processes_of(sid) == []
    assert [name for name in os.listdir(folder) if sid in name] == []


def pid_in(path: Path) -> int:
    return int(path.read_text())


def knock(spawned: SpawnedKeeper) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(spawned.socket)


# Starting.


@asynchronous
async def test_spawn_returns_when_the_keeper_listens_and_the_agent_lives(
    manager: KeeperManager, folder: Path, sid: str
) -> None:
    spawned = await manager.spawn(sid, agent_command=SINK)
    assert spawned.sid == sid
    assert spawned.socket == str(folder / f"{sid}.rpc.sock")
    knock(spawned)
    assert pid_in(folder / f"{sid}.rpc.sock.pid") == spawned.keeper_pid
    assert spawned.agent_pid == pid_in(folder / f"{sid}.rpc.sock.pi-pid")
    assert SYSTEM.facts(spawned.agent_pid).parent == spawned.keeper_pid
    assert "keeper ready" in (folder / f"keeper-{sid}.log").read_text()


@asynchronous
async def test_a_session_without_an_id_gets_a_new_uuid(manager: KeeperManager) -> None:
    spawned = await manager.spawn(agent_command=SINK, ready=False)
    assert str(uuid.UUID(spawned.sid)) == spawned.sid
    assert spawned.agent_pid is None, "it was not waited for"


@asynchronous
async def test_a_missing_folder_is_made_for_its_owner_alone(tmp_path: Path, sid: str) -> None:
    folder = tmp_path / "new" / ".pi" / "dashboard" / "sessions"
    manager = KeeperManager(folder)
    await manager.spawn(sid, agent_command=SINK, ready=False)
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        end_all(folder)


def mark_of(folder: Path) -> str:
    status = folder.stat()
    return f"{status.st_dev}:{status.st_ino}"


@asynchronous
async def test_the_agent_gets_its_folder_and_environment_and_nothing_of_an_outer_session(
    manager: KeeperManager, tmp_path: Path, sid: str
) -> None:
    told = tmp_path / "told"
    outer = {
        "PI_KEEPER_PI_ARGS": '["--outer"]',
        "PI_KEEPER_PI_CMD": '["outer"]',
        "PI_KEEPER_CAPTURE_PI_OUTPUT": "1",
        "PI_KEEPER_SESSIONS_DIR": "/nowhere",
        "PI_KEEPER_ANYTHING": "1",
        "PI_RECONCILER_SESSION": "outer",
        "PI_RECONCILER_FOLDER": "outer",
        "PI_DASHBOARD_SPAWNED": "outer",
    }
    env = {"PATH": os.environ["PATH"], "OWN": "a value", TOKEN: "single use", **outer}
    cwd = tmp_path / "work here"
    cwd.mkdir()
    command = (sys.executable, str(TELL), str(told), "--flag", "a b")
    await manager.spawn(sid, cwd=cwd, env=env, agent_command=command)
    report = json.loads(told.read_text())
    assert report["cwd"] == str(cwd)
    assert report["argv"] == [str(told), "--flag", "a b"]
    got = {k: v for k, v in report["env"].items() if k not in {"PWD", "SHLVL", "_", "LC_CTYPE"}}
    assert got == {
        "PATH": os.environ["PATH"],
        "OWN": "a value",
        TOKEN: "single use",
        "PI_RECONCILER_SESSION": sid,
        "PI_RECONCILER_FOLDER": mark_of(manager.sessions_dir),
        "PI_DASHBOARD_SPAWNED": "1",
    }


@asynchronous
async def test_arguments_that_are_no_text_reach_the_agent_byte_for_byte(
    manager: KeeperManager, tmp_path: Path, sid: str
) -> None:
    odd = b"caf\xe9 \xff\n\xed\xb3\xbf"
    code = 'printf %s "$1" > "$0"; exec cat > /dev/null'
    out = tmp_path / "out"
    await manager.spawn(sid, agent_command=("sh", "-c", code, str(out), os.fsdecode(odd)))
    assert out.read_bytes() == odd


INSIDE = ("PI_RECONCILER_SESSION", "PI_RECONCILER_FOLDER", "PI_DASHBOARD_SPAWNED")


@pytest.mark.parametrize("inside", INSIDE)
def test_a_token_is_passed_on_but_not_from_inside_of_a_session(
    monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    for name in INSIDE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(TOKEN, "single use")
    assert default_environment()[TOKEN] == "single use"
    monkeypatch.setenv(inside, "1")
    assert TOKEN not in default_environment()


@pytest.mark.parametrize("capture", [True, False])
@asynchronous
async def test_the_agents_output_is_captured_when_asked_for(
    manager: KeeperManager, folder: Path, sid: str, *, capture: bool
) -> None:
    command = ("sh", "-c", "echo said by the agent; exec cat > /dev/null")
    await manager.spawn(sid, agent_command=command, capture=capture)
    assert ("said by the agent" in (folder / f"keeper-{sid}.log").read_text()) is capture


@asynchronous
async def test_the_cap_of_the_log_reaches_the_keeper(
    manager: KeeperManager, folder: Path, sid: str
) -> None:
    env = {
        **os.environ,
        "PI_KEEPER_LOG_MAX_BYTES": "4096",
        "PI_KEEPER_LOG_CHECK_INTERVAL_MS": "10",
    }
    command = ("sh", "-c", "while :; do echo 0123456789; sleep 0.001; done")
    await manager.spawn(sid, env=env, agent_command=command, capture=True)
    log = folder / f"keeper-{sid}.log"
    sizes = [log.stat().st_size]

    def was_cut() -> bool:
        sizes.append(log.stat().st_size)
        return sizes[-1] < sizes[-2]

    await happens(was_cut, "the log is cut")
    assert max(sizes) < 100_000


# Refusing to start. Nothing is left, and the error's class says why.


@pytest.mark.parametrize("bad", ["", "../x", ".hidden", "a b", "x" * 91, "a/b", "launch-x"])
@asynchronous
async def test_a_bad_session_id_is_refused_before_anything_is_touched(
    tmp_path: Path, bad: str
) -> None:
    with pytest.raises(InvalidSessionIdError):
        await KeeperManager(tmp_path / "sessions").spawn(bad, agent_command=SINK)
    assert list(tmp_path.iterdir()) == []


@asynchronous
async def test_arguments_that_make_no_sense_are_refused_before_anything_is_touched(
    tmp_path: Path, sid: str
) -> None:
    manager = KeeperManager(tmp_path / "sessions")
    for env in ({"A=B": "x"}, {"": "x"}, {"A": "x\0y"}, {"A\0": "x"}):
        with pytest.raises(InvalidRequestError, match="environment"):
            await manager.spawn(sid, agent_command=SINK, env={**os.environ, **env})
    with pytest.raises(InvalidRequestError, match="NUL"):
        await manager.spawn(sid, agent_command=(*SINK, "\0"))
    with pytest.raises(InvalidRequestError, match="no such place"):
        await manager.spawn(sid, agent_command=SINK, cwd=tmp_path / "no such place")
    with pytest.raises(ValueError, match="keeper_command is empty"):
        KeeperManager(tmp_path, keeper_command=())
    assert list(tmp_path.iterdir()) == []


@asynchronous
async def test_a_missing_agent_program_is_refused_before_anything_is_touched(
    tmp_path: Path, sid: str
) -> None:
    manager = KeeperManager(tmp_path / "sessions")
    (tmp_path / "data").write_text("not to be run")
    for program in ("no-such-agent", "/no/such/agent", str(tmp_path / "data")):
        with pytest.raises(AgentNotFoundError, match=program):
            await manager.spawn(sid, agent_command=(program,))
    with pytest.raises(AgentNotFoundError, match="'pi' was not found in PATH"):
        await manager.spawn(sid, env={"PATH": str(tmp_path)})
    assert not manager.sessions_dir.exists()


@asynchronous
async def test_an_agent_program_that_cannot_be_run_after_all_is_told_as_missing(
    manager: KeeperManager, folder: Path, tmp_path: Path, sid: str
) -> None:
    program = tmp_path / "agent"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o700)
    with pytest.raises(AgentNotFoundError):
        await manager.spawn(sid, agent_command=(str(program),))
    nothing_is_left(folder, sid)


@asynchronous
async def test_an_agent_that_ends_within_300_ms_is_told_with_its_exit_code(
    manager: KeeperManager, folder: Path, sid: str
) -> None:
    with pytest.raises(AgentExitedError, match="code 7"):
        await manager.spawn(sid, agent_command=("sh", "-c", "exit 7"))
    nothing_is_left(folder, sid)


@asynchronous
async def test_what_a_session_had_logged_before_survives_a_refusal(
    manager: KeeperManager, folder: Path, sid: str
) -> None:
    log = folder / f"keeper-{sid}.log"
    log.write_text("an older line\n")
    with pytest.raises(AgentExitedError):
        await manager.spawn(sid, agent_command=("sh", "-c", "exit 7"))
    assert log.read_text().startswith("an older line\n")
    assert [name for name in os.listdir(folder) if sid in name] == [log.name]


@root
@asynchronous
async def test_a_folder_that_cannot_be_written_or_made_is_refused(sid: str) -> None:
    base = Path(tempfile.mkdtemp(prefix="reconciler-", dir="/tmp"))
    try:
        base.chmod(0o755)
        (base / "sessions").mkdir(mode=0o500)
        os.chown(base / "sessions", 65534, 65534)
        with as_nobody():
            with pytest.raises(FolderError, match="Permission denied"):
                await KeeperManager(base / "sessions").spawn(sid, cwd="/", agent_command=SINK)
            with pytest.raises(FolderError, match="Permission denied"):
                await KeeperManager(base / "new").spawn(sid, cwd="/", agent_command=SINK)
            (base / "sessions").exists()
        assert [path.name for path in base.rglob("*")] == ["sessions"]
    finally:
        shutil.rmtree(base)


@pytest.mark.parametrize("above", [False, True])
@asynchronous
async def test_a_folder_that_others_may_write_to_is_refused(
    manager: KeeperManager, folder: Path, sid: str, *, above: bool
) -> None:
    await manager.spawn(sid, agent_command=SINK)
    before = sorted(os.listdir(folder))
    wrong = folder.parent if above else folder
    mode = wrong.stat().st_mode & 0o777
    wrong.chmod(0o775)
    for refused in (manager.spawn(agent_command=SINK), manager.stop(sid)):
        with pytest.raises(FolderError, match=r"cannot be trusted: .* \(mode 0775\): chmod g-w it"):
            await refused
    assert sorted(os.listdir(folder)) == before
    assert [entry.sid for entry in await manager.discover()] == [sid], "looking is allowed"
    wrong.chmod(mode)
    await manager.stop(sid)


@asynchronous
async def test_what_is_made_is_trusted_whatever_the_umask(tmp_path: Path, sid: str) -> None:
    made = tmp_path / ".pi" / "dashboard" / "sessions"
    before = os.umask(0)
    try:
        manager = KeeperManager(made)
        await manager.spawn(sid, agent_command=SINK)
        await manager.stop(sid)
    finally:
        os.umask(before)
        end_all(made)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (made, *made.parents[:2])}
    assert modes == {"sessions": 0o700, "dashboard": 0o700, ".pi": 0o700}


@asynchronous
async def test_a_file_where_the_folder_belongs_is_refused(tmp_path: Path, sid: str) -> None:
    (tmp_path / "sessions").touch()
    manager = KeeperManager(tmp_path / "sessions")
    with pytest.raises(FolderError):
        await manager.spawn(sid, agent_command=SINK)
    with pytest.raises(FolderError):
        await manager.stop(sid)
    with pytest.raises(FolderError):
        await manager.discover()


@asynchronous
async def test_a_session_that_runs_is_not_started_again(
    manager: KeeperManager, folder: Path, sid: str
) -> None:
    first = await manager.spawn(sid, agent_command=SINK)
    names = sorted(os.listdir(folder))
    with pytest.raises(AlreadyRunningError, match=str(first.keeper_pid)):
        await manager.spawn(sid, agent_command=SINK)
    assert sorted(os.listdir(folder)) == names
    knock(first)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "link": lambda path: path.symlink_to("/etc/hostname"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "folder": lambda path: path.mkdir(),
    "FIFO": os.mkfifo,
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
@asynchronous
async def test_a_hostile_entry_in_the_way_is_refused_and_left_as_it_is(
    manager: KeeperManager, folder: Path, make: Callable[[Path], object]
) -> None:
    refusals = {
        "{}.rpc.sock": UnverifiableError,
        "{}.rpc.sock.pid": UnverifiableError,
        "{}.rpc.sock.pi-pid": UnverifiableError,
        "keeper-{}.log": KeeperStartError,
        "keeper-launch-{}.log": FolderError,
    }
    for number, (name, error) in enumerate(refusals.items()):
        path = folder / name.format(f"session-{number}")
        make(path)
        before = path.lstat()
        with pytest.raises(error):
            await manager.spawn(f"session-{number}", agent_command=SINK)
        after = path.lstat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
        assert processes_of(f"session-{number}") == []
    assert len(os.listdir(folder)) == len(refusals)


@asynchronous
async def test_an_unverifiable_session_is_not_replaced(
    manager: KeeperManager, folder: Path, sid: str, stranger: int
) -> None:
    (folder / f"{sid}.rpc.sock.pid").write_text(str(stranger))
    with pytest.raises(UnverifiableError, match="program is not known"):
        await manager.spawn(sid, agent_command=SINK)


@asynchronous
async def test_what_a_dead_keeper_left_is_replaced(
    manager: KeeperManager, folder: Path, sid: str
) -> None:
    stale_pair(folder, sid)
    knock(await manager.spawn(sid, agent_command=SINK, ready=False))


@asynchronous
async def test_a_path_too_long_for_a_socket_works_for_ours_and_is_refused_for_others(
    tmp_path: Path, sid: str
) -> None:
    folder = tmp_path / ("x" * 100) / ".pi" / "dashboard" / "sessions"
    other = KeeperManager(folder, keeper_command=("node", str(NODE_KEEPER)))
    with pytest.raises(FolderError, match="over the system's limit"):
        await other.spawn(sid, agent_command=SINK)
    assert not folder.exists()
    manager = KeeperManager(folder, ladder=QUICK)
    try:
        spawned = await manager.spawn(sid, agent_command=SINK)
        assert [entry.sid for entry in await manager.discover()] == [sid]
        await manager.stop(sid)
        assert not alive(spawned.keeper_pid)
        assert processes_of(sid) == []
    finally:
        end_all(folder)


@asynchronous
async def test_a_folder_that_another_keeper_cannot_serve_is_refused(folder: Path) -> None:
    elsewhere = folder / "sessions"
    manager = KeeperManager(elsewhere, keeper_command=("node", str(NODE_KEEPER)))
    with pytest.raises(FolderError, match="ends in"):
        await manager.spawn("s", agent_command=SINK)
    assert not elsewhere.exists()


# Keepers that do not come up.

HANG = "import time\ntime.sleep(600)\n"
HANG_DETACHED = "import os\nif os.fork(): os._exit(0)\nos.setsid()\n" + HANG
HANG_WITH_FILES = (
    "import os, signal, socket, sys\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "path = os.environ['PI_DASHBOARD_HOME'] + '/.pi/dashboard/sessions/' + sys.argv[1] + "
    "'.rpc.sock'\n"
    "listener = socket.socket(1)\n"
    "listener.bind(path)\n"
    "listener.listen()\n"
    "open(path + '.pid', 'w').write(str(os.getpid()))\n" + HANG
)


def stand_in(tmp_path: Path, name: str, code: str) -> tuple[str, ...]:
    path = tmp_path / "programs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
    return (sys.executable, "-I", "-S", str(path))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("other_keeper.py", HANG),
        ("other_keeper.py", HANG_WITH_FILES),
        (KEEPER_PROGRAM.name, HANG),
        (KEEPER_PROGRAM.name, HANG_DETACHED),
    ],
    ids=["other", "other with files, deaf to SIGTERM", "ours, not detached", "ours, detached"],
)
@asynchronous
async def test_a_keeper_that_hangs_is_ended_after_the_time_it_was_given(
    folder: Path, tmp_path: Path, sid: str, name: str, code: str
) -> None:
    manager = KeeperManager(folder, keeper_command=stand_in(tmp_path, name, code))
    with pytest.raises(KeeperStartError, match=r"within 0\.5 s"):
        await manager.spawn(sid, agent_command=SINK, timeout=0.5)
    nothing_is_left(folder, sid)


@asynchronous
async def test_a_keeper_that_waits_for_a_lock_is_ended_after_the_time_it_was_given(
    manager: KeeperManager, folder: Path, sid: str
) -> None:
    log = folder / f"keeper-{sid}.log"
    with log.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(KeeperStartError, match=r"within 0\.5 s"):
            await manager.spawn(sid, agent_command=SINK, timeout=0.5)
    assert processes_of(sid) == []
    assert all(name.endswith(".log") for name in os.listdir(folder))


@asynchronous
async def test_a_keeper_that_dies_at_its_start_is_told_with_its_last_words(
    folder: Path, tmp_path: Path, sid: str
) -> None:
    code = "import sys; sys.exit('the last words')"
    manager = KeeperManager(folder, keeper_command=stand_in(tmp_path, "other_keeper.py", code))
    with pytest.raises(KeeperStartError, match="the last words"):
        await manager.spawn(sid, agent_command=SINK)
    nothing_is_left(folder, sid)
    ours = KeeperManager(folder, keeper_command=stand_in(tmp_path, KEEPER_PROGRAM.name, code))
    with pytest.raises(KeeperStartError, match=r"died while it started.*the last words"):
        await ours.spawn(sid, agent_command=SINK)
    nothing_is_left(folder, sid)


@asynchronous
async def test_a_runtime_that_is_missing_is_told(folder: Path, sid: str) -> None:
    ours = KeeperManager(folder, keeper_command=("/no/such/runtime", str(KEEPER_PROGRAM)))
    with pytest.raises(KeeperStartError, match="could not be started"):
        await ours.spawn(sid, agent_command=SINK)
    other = KeeperManager(folder, keeper_command=("no-such-runtime", str(NODE_KEEPER)))
    with pytest.raises(KeeperStartError, match="FileNotFoundError"):
        await other.spawn(sid, agent_command=SINK)
    nothing_is_left(folder, sid)


@pytest.mark.parametrize("make", ["manager", "node_manager"])
@pytest.mark.parametrize("moment", ["at once", "keeper-launch-{}.log", "{}.rpc.sock.pi-pid"])
@asynchronous
async def test_a_spawn_that_is_cancelled_leaves_nothing(
    request: pytest.FixtureRequest, folder: Path, sid: str, make: str, moment: str
) -> None:
    manager: KeeperManager = request.getfixturevalue(make)
    task = asyncio.create_task(manager.spawn(sid, agent_command=SINK))
    await asyncio.sleep(0)
    if moment != "at once":
        await happens((folder / moment.format(sid)).exists, moment)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    nothing_is_left(folder, sid)


@asynchronous
async def test_of_ten_spawns_at_once_one_wins_and_keeps_all_its_files(
    manager: KeeperManager, folder: Path, sid: str
) -> None:
    spawns = (manager.spawn(sid, agent_command=SINK) for _ in range(10))
    results = await asyncio.gather(*spawns, return_exceptions=True)
    (winner,) = (each for each in results if isinstance(each, SpawnedKeeper))
    lost = [each for each in results if each is not winner]
    assert [type(each) for each in lost] == [AlreadyRunningError] * 9
    assert processes_of(sid) == [winner.keeper_pid]
    assert pid_in(folder / f"{sid}.rpc.sock.pid") == winner.keeper_pid
    assert pid_in(folder / f"{sid}.rpc.sock.pi-pid") == winner.agent_pid
    knock(winner)
    text = (folder / f"keeper-{sid}.log").read_text()
    assert text.count("keeper ready") == 1
    assert (folder / f"keeper-launch-{sid}.log").exists()
    assert [entry.keeper_pid for entry in await manager.discover()] == [winner.keeper_pid]


# A keeper of another make.


@asynchronous
async def test_a_keeper_of_another_make_is_started_found_and_ended(
    node_manager: KeeperManager, folder: Path, tmp_path: Path, sid: str
) -> None:
    told = tmp_path / "told"
    spawned = await node_manager.spawn(sid, agent_command=(sys.executable, str(TELL), str(told)))
    knock(spawned)
    assert spawned.agent_pid is not None
    assert "PI_DASHBOARD_HOME" in json.loads(told.read_text())["env"]
    (entry,) = await node_manager.discover()
    assert (entry.sid, entry.keeper_pid, entry.socket) == (sid, spawned.keeper_pid, spawned.socket)
    stopped = await node_manager.stop(sid)
    assert (stopped.sid, stopped.keeper_pid) == (sid, spawned.keeper_pid)
    assert not alive(spawned.keeper_pid)
    assert not alive(spawned.agent_pid)
    assert not list(folder.glob("*.rpc.sock*"))


@asynchronous
async def test_an_agent_that_ends_early_under_another_keeper_is_a_failed_start(
    node_manager: KeeperManager, folder: Path, sid: str
) -> None:
    with pytest.raises(KeeperStartError, match="agent exited"):
        await node_manager.spawn(sid, agent_command=("sh", "-c", "exit 7"))
    nothing_is_left(folder, sid)


@asynchronous
async def test_another_keeper_that_is_not_asked_to_be_ready_is_there_once_it_listens(
    node_manager: KeeperManager, sid: str
) -> None:
    knock(await node_manager.spawn(sid, agent_command=SINK, ready=False))


@asynchronous
async def test_a_start_that_fails_spares_the_logs_of_who_came_up_meanwhile(
    node_manager: KeeperManager, folder: Path, sid: str
) -> None:
    await node_manager.spawn(sid, agent_command=SINK)  # it takes no lock on its log
    names = [f"keeper-{sid}.log", f"keeper-launch-{sid}.log"]
    request = KeeperRequest(sid=sid, cwd=folder, env={})
    with Folder(folder) as opened:
        spawning._clean(request, node_manager.probe(opened), names)
    assert all((folder / name).exists() for name in names)


@asynchronous
async def test_another_keeper_that_finds_itself_second_goes_and_leaves_the_firsts_files(
    folder: Path, tmp_path: Path, sid: str
) -> None:
    first_is_there = tmp_path / "the first is there"
    waits = ("sh", "-c", 'until [ -e "$0" ]; do sleep 0.01; done; exec "$@"', str(first_is_there))
    manager = KeeperManager(folder, keeper_command=(*waits, "node", str(NODE_KEEPER)))
    second = asyncio.create_task(manager.spawn(sid, agent_command=SINK))
    await happens((folder / f"keeper-launch-{sid}.log").exists, "the second is on its way")
    with socket.socket(socket.AF_UNIX) as listener:  # the first: this very process
        listener.bind(str(folder / f"{sid}.rpc.sock"))
        listener.listen()
        (folder / f"{sid}.rpc.sock.pid").write_text(str(os.getpid()))
        first_is_there.touch()
        with pytest.raises(AlreadyRunningError):
            await second
        assert pid_in(folder / f"{sid}.rpc.sock.pid") == os.getpid()
        assert (folder / f"{sid}.rpc.sock").is_socket()
        assert processes_of(sid) == []


@asynchronous
async def test_keepers_of_another_make_are_started_one_at_a_time(
    node_manager: KeeperManager, tmp_path: Path, sid: str
) -> None:
    """They take no lock: each would take the other's place, and one's end the other's files."""
    second = tmp_path / "second"
    alone = 'exec 9>"$0"; flock -n 9 || { echo > "$1"; exit 66; }; exec sleep 600'
    agent = ("sh", "-c", alone, str(tmp_path / "lock"), str(second))
    starts = (node_manager.spawn(sid, agent_command=agent) for _ in range(3))
    done = await asyncio.gather(*starts, return_exceptions=True)
    (spawned,) = (each for each in done if isinstance(each, SpawnedKeeper))
    refused = [each for each in done if each is not spawned]
    assert all(isinstance(each, AlreadyRunningError) for each in refused), refused
    assert {str(each) for each in refused} == {f"session {sid} is just being started"}
    (entry,) = await node_manager.discover()
    assert entry.keeper_pid == spawned.keeper_pid
    assert not second.exists(), "two agents lived at once"


@asynchronous
async def test_a_keeper_of_another_make_that_has_not_come_to_its_files_is_not_joined(
    node_manager: KeeperManager, folder: Path, tmp_path: Path, sid: str
) -> None:
    """Whoever has started it was killed right then."""
    slow = tmp_path / NODE_KEEPER.name
    slow.write_text("setInterval(() => {}, 1e6)\n")
    with (folder / f"keeper-launch-{sid}.log").open("w") as log:
        first = await asyncio.create_subprocess_exec("node", slow, sid, stdout=log, stderr=log)
    try:
        await happens(lambda: processes_of(sid))
        with pytest.raises(AlreadyRunningError):
            await node_manager.spawn(sid, agent_command=SINK)
    finally:
        first.kill()
        await first.wait()


# Ending.


@asynchronous
async def test_stop_returns_when_processes_and_files_are_gone(folder: Path, sid: str) -> None:
    manager = KeeperManager(folder, ladder=Ladder(term_grace=3 * WAIT))
    spawned = await manager.spawn(sid, agent_command=SINK)
    stopped = await manager.stop(sid)
    assert spawned.agent_pid is not None
    assert not alive(spawned.keeper_pid)
    assert not alive(spawned.agent_pid)
    assert (stopped.sid, stopped.keeper_pid) == (sid, spawned.keeper_pid)
    assert 0 < stopped.elapsed < WAIT, "no rung of the ladder was waited for"
    assert sorted(os.listdir(folder)) == [f"keeper-{sid}.log", f"keeper-launch-{sid}.log"]
    assert '"keeper.stop"' in (folder / f"keeper-{sid}.log").read_text()


@pytest.mark.parametrize("make", ["manager", "node_manager"])
@asynchronous
async def test_stop_ends_an_agent_that_is_deaf_to_sigterm(
    request: pytest.FixtureRequest, folder: Path, sid: str, make: str
) -> None:
    manager: KeeperManager = request.getfixturevalue(make)
    spawned = await manager.spawn(sid, agent_command=DEAF_TO_TERM)
    await manager.stop(sid)
    assert spawned.agent_pid is not None
    assert not alive(spawned.agent_pid)
    assert not list(folder.glob("*.rpc.sock*"))


@pytest.mark.parametrize("command", [OUR_KEEPER, ("node", str(NODE_KEEPER))], ids=["ours", "other"])
@asynchronous
async def test_stop_kills_a_keeper_that_is_stopped_and_its_deaf_agent(
    folder: Path, sid: str, command: tuple[str, ...]
) -> None:
    manager = KeeperManager(folder, ladder=QUICK, keeper_command=command)
    spawned = await manager.spawn(sid, agent_command=DEAF_TO_TERM)
    os.kill(spawned.keeper_pid, signal.SIGSTOP)
    stopped = await manager.stop(sid)
    assert spawned.agent_pid is not None
    assert not alive(spawned.keeper_pid)
    assert not alive(spawned.agent_pid)
    assert stopped.elapsed >= QUICK.term_grace
    assert not list(folder.glob("*.rpc.sock*"))


@asynchronous
async def test_stop_ends_the_agent_that_a_dead_keeper_left(
    node_manager: KeeperManager, folder: Path, sid: str
) -> None:
    spawned = await node_manager.spawn(sid, agent_command=HUNG)
    assert spawned.agent_pid is not None
    keeper = identity(spawned.keeper_pid)
    os.kill(spawned.keeper_pid, signal.SIGKILL)
    with Target(keeper, lambda: True) as target:
        assert await target.wait(10)
    assert alive(spawned.agent_pid)
    stopped = await node_manager.stop(sid)
    assert stopped.keeper_pid is None
    assert not alive(spawned.agent_pid)
    assert not list(folder.glob("*.rpc.sock*"))


@asynchronous
async def test_stop_removes_what_a_dead_keeper_left(folder: Path, sid: str) -> None:
    manager = KeeperManager(folder, policy=Policy(settle=0.1))
    leaves: tuple[Callable[[], None], ...] = (
        lambda: stale_pair(folder, sid),
        lambda: bare_socket(folder / f"{sid}.rpc.sock"),
        (folder / f"{sid}.rpc.sock.pid").touch,
    )
    for leave in leaves:
        leave()
        stopped = await manager.stop(sid)
        assert stopped.keeper_pid is None
        assert os.listdir(folder) == []


@asynchronous
async def test_stop_of_what_is_not_there_says_so(manager: KeeperManager, folder: Path) -> None:
    with pytest.raises(NoSuchSessionError):
        await manager.stop("nobody")
    with pytest.raises(InvalidSessionIdError):
        await manager.stop("../nobody")
    with pytest.raises(NoSuchSessionError):
        manager.inspect("nobody")
    folder.rmdir()
    with pytest.raises(NoSuchSessionError):
        await manager.stop("nobody")
    with pytest.raises(NoSuchSessionError):
        manager.inspect("nobody")
    assert await manager.discover() == []


@asynchronous
async def test_stop_leaves_alone_whom_it_cannot_verify(
    manager: KeeperManager, folder: Path, sid: str, stranger: int
) -> None:
    bare_socket(folder / f"{sid}.rpc.sock")
    (folder / f"{sid}.rpc.sock.pid").write_text(str(stranger))
    with pytest.raises(UnverifiableError, match="left alone"):
        await manager.stop(sid)
    assert alive(stranger)
    assert len(os.listdir(folder)) == 2


@asynchronous
async def test_stop_of_a_recycled_pid_removes_the_files_and_spares_the_process(
    manager: KeeperManager, folder: Path, sid: str, innocent: int
) -> None:
    bare_socket(folder / f"{sid}.rpc.sock")
    (folder / f"{sid}.rpc.sock.pid").write_text(str(innocent))
    await manager.stop(sid)
    assert os.listdir(folder) == []
    assert alive(innocent)


@root
@asynchronous
async def test_stop_says_when_the_system_refuses_a_removal(sid: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="reconciler-", dir="/tmp"))
    try:
        stale_pair(folder, sid)
        for path in (folder, *folder.iterdir()):
            os.chown(path, 65534, 65534)
        folder.chmod(0o555)
        with as_nobody(), pytest.raises(ReconcilerError, match="Permission denied"):
            await KeeperManager(folder).stop(sid)
        assert len(os.listdir(folder)) == 2
    finally:
        shutil.rmtree(folder)


@asynchronous
async def test_stop_says_when_a_process_outlives_sigkill(
    folder: Path, sid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = KeeperManager(folder, ladder=Ladder(term_grace=0.01, kill_grace=0.01))
    spawned = await manager.spawn(sid, agent_command=SINK)
    # A process that hangs in the kernel cannot be made here: signals that have no effect can.
    monkeypatch.setattr(Target, "send", lambda *_, **__: True)
    with pytest.raises(StillAliveError):
        await manager.stop(sid)
    knock(spawned)


# Finding.


@asynchronous
async def test_discover_returns_what_lives_and_inspect_says_why(folder: Path, sid: str) -> None:
    manager = KeeperManager(folder, policy=Policy(settle=600.0))
    live = await manager.spawn(sid, agent_command=SINK)
    stale_pair(folder, "stale")
    (folder / "broken.rpc.sock.pid").write_text("x")
    (folder / "dead.rpc.sock.pid").write_text(str(dead_pid()))
    (entry,) = await manager.discover()
    assert (entry.sid, entry.keeper_pid, entry.socket) == (sid, live.keeper_pid, live.socket)
    phases = {finding.seen.sid: finding.plan.verdict for finding in manager.find()}
    assert phases == {
        sid: Verdict.READY,
        "stale": Verdict.STALE,
        "broken": Verdict.STARTING,
        "dead": Verdict.STALE,
    }
    assert manager.inspect("stale").plan.reason == "keeper dead"
    assert manager.inspect(sid).seen.agent.process == identity(live.agent_pid or 0)
    assert len(list(folder.glob("*.rpc.sock*"))) == 7, "nothing was changed"
    until(lambda: len(list(folder.glob("*.log"))) == 2)


@asynchronous
async def test_a_keeper_without_files_is_found_and_can_be_ended(folder: Path, sid: str) -> None:
    manager = KeeperManager(folder)
    spawned = await manager.spawn(sid, agent_command=SINK)
    for path in folder.glob("*.rpc.sock*"):
        path.unlink()
    assert manager.inspect(sid).seen.keeper.process == identity(spawned.keeper_pid)
    await manager.stop(sid)
    assert not alive(spawned.keeper_pid)


@asynchronous
async def test_the_callers_own_word_on_an_agent_is_believed(
    folder: Path, manager: KeeperManager, sid: str
) -> None:
    await manager.spawn(sid, agent_command=SINK)
    believing = KeeperManager(folder, agent_probe=lambda _sid, _pid: False)
    assert believing.inspect(sid).plan.verdict is Verdict.ORPHAN
    assert await believing.discover() == []


def test_the_default_folder_is_the_dashboards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PI_DASHBOARD_HOME", str(tmp_path))
    assert KeeperManager().sessions_dir == tmp_path / ".pi" / "dashboard" / "sessions"


@pytest.mark.parametrize("second", ["ours", "other"])
def test_an_agent_left_behind_is_ended_before_its_session_starts_anew(
    manager: KeeperManager, node_manager: KeeperManager, second: str
) -> None:
    first = asyncio.run(node_manager.spawn("s", agent_command=HUNG))
    agent = identity(first.agent_pid or 0)
    kill(first.keeper_pid)
    assert alive(agent.pid)
    again = manager if second == "ours" else node_manager
    spawned = asyncio.run(again.spawn("s", agent_command=HUNG))
    assert not alive(agent.pid)
    assert alive(spawned.agent_pid or 0)
