from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reconciler.layout import (
    CLAIM,
    MAX_SID_LENGTH,
    InvalidSessionIdError,
    KeeperArguments,
    ParsedName,
    Role,
    base_dir,
    check_sid,
    claims,
    concerns,
    file_name,
    keeper_arguments,
    parse_name,
    registry_file,
    sessions_dir,
    socket_address,
)

UUID = "5f0e7c1e-0c50-4f0e-9b39-4e4a3a2f3d11"
HOME = Path("/home/someone")
FOLDER = HOME / ".pi" / "dashboard" / "sessions"
PROGRAMS = frozenset({"keeper.cjs", "keeper_process.py"})

sids = st.from_regex(
    rf"(?!launch-)[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_SID_LENGTH - 1}}}", fullmatch=True
)
platforms = st.sampled_from(["linux", "darwin", "win32"])
# Names that are nearly ours are the ones worth reading.
pieces = st.sampled_from(
    [".rpc.sock", ".pid", ".pi-pid", ".log", "keeper-", "launch-", "pi-rpc-", "/", "\n", "a", "."]
)
names = st.lists(pieces | st.text(max_size=6), max_size=6).map("".join)


@pytest.mark.parametrize(
    ("role", "posix", "windows"),
    [
        (Role.SOCKET, f"{UUID}.rpc.sock", None),
        (Role.PID_FILE, f"{UUID}.rpc.sock.pid", f"pi-rpc-{UUID}.pid"),
        (Role.AGENT_PID_FILE, f"{UUID}.rpc.sock.pi-pid", f"pi-rpc-{UUID}.pi-pid"),
        (Role.KEEPER_LOG, f"keeper-{UUID}.log", f"keeper-{UUID}.log"),
        (Role.LAUNCH_LOG, f"keeper-launch-{UUID}.log", f"keeper-launch-{UUID}.log"),
        (Role.LAUNCH, f"keeper-{UUID}.launch", f"keeper-{UUID}.launch"),
    ],
)
def test_names_of_the_contract(role: Role, posix: str, windows: str | None) -> None:
    assert file_name(role, UUID, "linux") == posix
    assert file_name(role, UUID, "darwin") == posix
    if windows is not None:
        assert file_name(role, UUID, "win32") == windows


def test_a_session_is_looked_at_for_what_claims_a_keeper_and_for_what_asks_for_one() -> None:
    for role in Role:
        assert concerns(file_name(role, UUID)) == (UUID if role in {*CLAIM, Role.LAUNCH} else None)
    assert concerns("keeper-.launch") is None
    assert concerns(f"keeper-launch-{UUID}.launch") is None, "no session has such an id"


def test_a_pipe_is_no_file() -> None:
    with pytest.raises(ValueError, match="named pipe"):
        file_name(Role.SOCKET, UUID, "win32")


@pytest.mark.parametrize(
    ("platform", "address"),
    [
        ("linux", f"/home/someone/.pi/dashboard/sessions/{UUID}.rpc.sock"),
        ("darwin", f"/home/someone/.pi/dashboard/sessions/{UUID}.rpc.sock"),
        ("win32", rf"\\.\pipe\pi-rpc-{UUID}"),
    ],
)
def test_socket_address(platform: str, address: str) -> None:
    assert socket_address(FOLDER, UUID, platform) == address


@pytest.mark.parametrize(
    ("environ", "base"),
    [
        ({}, HOME),
        ({"PI_DASHBOARD_HOME": ""}, HOME),
        ({"PI_DASHBOARD_HOME": " \t"}, HOME),
        ({"PI_DASHBOARD_HOME": "/srv/pi"}, Path("/srv/pi")),
    ],
)
def test_folders(environ: dict[str, str], base: Path) -> None:
    assert base_dir(environ, HOME) == base
    assert sessions_dir(environ, HOME) == base / ".pi" / "dashboard" / "sessions"
    registry = base / ".pi" / "dashboard" / "headless-pids.json"
    assert registry_file(sessions_dir(environ, HOME)) == registry


@pytest.mark.parametrize(
    "sid", [UUID, "a", "0", "A.b_c-9", "a..b", "launch", "Launch-1", "a" * MAX_SID_LENGTH]
)
def test_good_session_ids(sid: str) -> None:
    assert check_sid(sid) == sid


@pytest.mark.parametrize(
    "sid",
    [
        pytest.param("", id="empty"),
        pytest.param(".", id="dot"),
        pytest.param("..", id="two dots"),
        pytest.param(".hidden", id="leading dot"),
        pytest.param("-rf", id="leading dash"),
        pytest.param("_a", id="leading underscore"),
        pytest.param("../a", id="upwards"),
        pytest.param("a/b", id="slash"),
        pytest.param("a\\b", id="backslash"),
        pytest.param("a b", id="space"),
        pytest.param("a\n", id="newline at the end"),
        pytest.param("\na", id="newline at the start"),
        pytest.param("a\0b", id="NUL"),
        pytest.param("a" * (MAX_SID_LENGTH + 1), id="91 bytes"),
        pytest.param("launch-a", id="launch-"),
        pytest.param("١٢٣", id="unicode digits"),
        pytest.param("aé", id="unicode letter"),
        pytest.param("a\udcff", id="not UTF-8"),
    ],
)
def test_bad_session_ids(sid: str) -> None:
    with pytest.raises(InvalidSessionIdError, match="is not usable"):
        check_sid(sid)
    for platform in ("linux", "win32"):
        for role in Role:
            if (role, platform) != (Role.SOCKET, "win32"):
                read = parse_name(file_name(role, sid, platform), platform)
                assert read is None or (read.sid != sid and check_sid(read.sid))


def test_an_error_does_not_repeat_an_endless_id() -> None:
    with pytest.raises(InvalidSessionIdError) as error:
        check_sid("x" * 1_000_000)
    assert len(str(error.value)) < 400


@settings(derandomize=True, deadline=None)
@given(role=st.sampled_from(Role), sid=sids, platform=platforms)
def test_a_name_that_was_made_is_read_back(role: Role, sid: str, platform: str) -> None:
    assume((role, platform) != (Role.SOCKET, "win32"))
    name = file_name(role, sid, platform)
    assert parse_name(name, platform) == ParsedName(role, sid)
    assert claims(name, platform) == (sid if role in CLAIM else None)


@settings(derandomize=True, deadline=None)
@given(name=names, platform=platforms)
def test_a_name_that_was_read_is_made_again(name: str, platform: str) -> None:
    read = parse_name(name, platform)
    if read is None:
        assert claims(name, platform) is None
    else:
        assert file_name(read.role, check_sid(read.sid), platform) == name


@settings(derandomize=True, deadline=None)
@given(sid=sids)
def test_every_name_of_a_session_id_fits_the_system(sid: str) -> None:
    assert len(file_name(Role.SOCKET, sid, "linux")) < 104
    assert max(len(file_name(role, sid, "linux")) for role in Role) < 255 - len(".taken-") - 11


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (["python", "-I", "-S", "/x/keeper_process.py", UUID], "keeper_process.py"),
        (["node", "/x/keeper.cjs", UUID], "keeper.cjs"),
        (["node", "--inspect", "keeper.cjs", UUID, "more"], "keeper.cjs"),
        (["keeper.cjs", UUID], "keeper.cjs"),
        (["timeout", "1d", "node", "/x/keeper.cjs", UUID], None),
        (["node", "/x/other.cjs", UUID], None),
        (["tini", "--", "node", "/x/keeper.cjs", UUID], None),
        (["docker", "run", "x", "node", "/x/keeper.cjs", UUID], None),
        (["node", "/x/keeper.cjs"], None),
        (["node", "/x/keeper.cjs", "../a"], None),
        (["node", "/x/keeper.cjs", "--", UUID], None),
        (["node", "keeper.cjs.bak", UUID], None),
        (["node", r"C:\x\keeper.cjs", UUID], None),
        ([UUID], None),
        ([], None),
    ],
)
def test_keeper_arguments(arguments: list[str], program: str | None) -> None:
    expected = KeeperArguments(program, UUID) if program else None
    assert keeper_arguments(arguments, PROGRAMS, "linux") == expected


def test_keeper_arguments_on_windows() -> None:
    arguments = ["node.exe", r"C:\x\keeper.cjs", UUID]
    assert keeper_arguments(arguments, PROGRAMS, "win32") == KeeperArguments("keeper.cjs", UUID)
