"""Nothing secret comes out: canaries are put in wherever one could be, and looked for everywhere.

What is looked through: all that any command prints, the daemon's log at its lowest level, the
metrics, both logs of each keeper, the names in the folder, the arguments of every process that
we start, and the texts, arguments and reprs of errors and values.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import PROGRAM, SINK, WAIT, alive, bare_socket, dead_pid, until
from raw_keeper import SOURCE

import reconciler
from reconciler.errors import InvalidRequestError
from reconciler.keeper import KeeperManager
from reconciler.layout import KEEPER_PROGRAM, registry_file
from reconciler.processes import SYSTEM
from reconciler.requests import KeeperRequest
from reconciler.rpc_writer import (
    MAX_LINE,
    BlockingRpcWriter,
    InvalidMessageError,
    StreamBrokenError,
    WritePolicy,
)
from reconciler.testing import Behaviour, FakeKeeper

ENV = "canary-of-the-environment"
OPTION = "canary-of-an-option"
TOKEN = "canary-of-the-token"  # noqa: S105 - it is no secret
PROMPT = "canary-of-a-prompt"
ARGUMENT = "canary-of-an-argument"
CANARIES = (ENV, OPTION, TOKEN, PROMPT, ARGUMENT)
LINE = json.dumps({"type": "prompt", "message": PROMPT})


class Outlets:
    """All that has come out, by where."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.said: list[tuple[str, bytes]] = []
        paths = os.pathsep.join(path for path in sys.path if path)
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PI_")},
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home),
            "PI_RECONCILER_SESSIONS_DIR": str(folder),
            "PYTHONPATH": paths,
            "API_KEY": ENV,
            "PI_DASHBOARD_SPAWN_TOKEN": TOKEN,
        }

    def run(
        self,
        *arguments: str | bytes,
        stdin: bytes = b"",
        code: int | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> bytes:
        """Run a command; one that fails is run again as for a report. Gives what it printed."""
        printed = []
        for debug in ({}, {"PI_RECONCILER_DEBUG": "1", "PYTHONASYNCIODEBUG": "1"}):
            if debug and code == 0:
                break
            ended = subprocess.run(
                [*program, *arguments],
                env={**self.env, **debug},
                input=stdin,
                capture_output=True,
                timeout=60,
                check=False,
            )
            printed.append(ended.stdout + ended.stderr)
            self.said.append((f"{arguments} {'as for a report' if debug else ''}", printed[-1]))
            if code is not None and not debug:
                assert ended.returncode == code, printed
        return b"".join(printed)

    def look(self, *pids: int) -> None:
        """Look through the folder, and the arguments of these processes, which must live."""
        for path in self.folder.rglob("*"):
            self.said.append(("a name in the folder", os.fsencode(path.name)))
            if path.is_file():
                self.said.append((path.name, path.read_bytes()))
        for pid in pids:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert arguments, f"process {pid} must live"
            self.said.append((f"arguments of process {pid}", arguments))

    @property
    def leaks(self) -> list[tuple[str, str]]:
        return [
            (canary, where)
            for canary in CANARIES
            for where, text in self.said
            if canary.encode() in text
        ]


@pytest.fixture
def outlets(folder: Path, tmp_path: Path) -> Outlets:
    return Outlets(folder, tmp_path)


def recorder(path: Path) -> tuple[str, ...]:
    """An agent that keeps what it reads, and was given a secret among its arguments."""
    return ("sh", "-c", 'cat >> "$0"; :', str(path), ARGUMENT)


def test_a_leak_would_be_noticed(outlets: Outlets) -> None:
    (outlets.folder / f"{TOKEN}.log").write_text(PROMPT)
    outlets.run(program=("sh", "-c", f"echo {OPTION} $API_KEY >&2"))
    with subprocess.Popen(["sh", "-c", "sleep 600; :", ARGUMENT]) as process:
        until(lambda: SYSTEM.arguments(process.pid))
        outlets.look(process.pid)
        child = SYSTEM.children(process.pid) or ()
        process.kill()
        for pid in child:
            os.kill(pid, signal.SIGKILL)
    assert {canary for canary, _ in outlets.leaks} == set(CANARIES)


# A life of a session, from outside.


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number: int = server.getsockname()[1]
        return number


@pytest.fixture
def daemon(outlets: Outlets, port: int, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The background process at its lowest log level; its pid and its log."""
    log = tmp_path / "daemon.log"
    options = ("--log-level", "debug", "--log-form", "json", "--metrics", f"127.0.0.1:{port}")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*PROGRAM, "run", *options], stdout=out, stderr=out, env=outlets.env
        )
    until(lambda: "reconciler.started" in log.read_text(), "the daemon runs")
    yield process.pid, log
    process.terminate()
    assert process.wait(WAIT) == 0


def test_a_session_from_its_start_to_its_end(
    outlets: Outlets, daemon: tuple[int, Path], port: int, tmp_path: Path
) -> None:
    record = tmp_path / "read"
    pid, log = daemon
    registry_file(outlets.folder).write_text(
        json.dumps({"entries": [{"pid": 1, "spawnToken": TOKEN}]})[:-2]
    )
    spawned = outlets.run(
        "spawn", "demo", "--env", f"SECRET={OPTION}", "--json", "--", *recorder(record), code=0
    )
    told = json.loads(spawned)
    keeper, agent = told["keeper_pid"], told["agent_pid"]
    outlets.look(keeper, pid)
    given = Path(f"/proc/{agent}/environ").read_text()
    assert all(canary in given for canary in (ENV, OPTION, TOKEN)), "the agent got them"
    assert ARGUMENT in Path(f"/proc/{agent}/cmdline").read_text(), "as the page says"

    outlets.run("write", "demo", LINE, code=0)
    outlets.run("write", "demo", LINE, "--json", "--key", "k1", code=0)
    outlets.run("write", "demo", "-", stdin=LINE.encode(), code=0)
    until(lambda: record.read_text().count(PROMPT) == 3, "and the prompts")
    for shown in (("ls",), ("ls", "--json"), ("inspect", "demo"), ("inspect", "demo", "--json")):
        outlets.run(*shown, code=0)
    os.kill(keeper, signal.SIGSTOP)
    outlets.run("write", "demo", LINE, code=76)
    outlets.run("write", "demo", LINE, "--key", "k2", "--json", code=76)
    os.kill(keeper, signal.SIGKILL)
    until(lambda: '"session.cleaned"' in log.read_text())

    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read()
    assert b"reconciler" in page
    outlets.said += [("metrics", page), ("log", log.read_bytes())]
    assert b"registry.unusable" in log.read_bytes()
    outlets.look(pid)
    outlets.run("stop", "demo", code=3)
    assert outlets.leaks == []


def test_sessions_that_do_not_start(outlets: Outlets, tmp_path: Path) -> None:
    secret = ("--env", f"SECRET={OPTION}")
    ends = ("--", "sh", "-c", "exit 7", ARGUMENT)
    outlets.run("spawn", "one", *secret, *ends, code=1)
    outlets.run("spawn", "two", *secret, "--", "no-such-program", ARGUMENT, code=1)
    outlets.run("spawn", "three", *secret, "--cwd", str(tmp_path / "none"), *ends, code=2)
    outlets.run("spawn", "four", *secret, "--", "sh", b"\xed\xa0\x80", ARGUMENT)
    outlets.run("spawn", "five", "--env", OPTION, *ends, code=2)
    outlets.run("spawn", "six", "--env", f"={OPTION}", *ends, code=2)
    config = tmp_path / "config.toml"
    for text in (
        f'keeper_command = ["no-runtime", "k.cjs"]\nagent_command = ["sh", "{ARGUMENT}"]',
        f'agent_command = "sh {ARGUMENT}"\n',
        f'agent_command = ["sh", "{ARGUMENT}"\n',
        f'agent_command = ["sh", {{key = "{ARGUMENT}"}}]\n',
    ):
        config.write_text(text)
        outlets.run("--config", str(config), "spawn", "seven", *secret)
    outlets.look()
    assert outlets.leaks == []


BROKEN = {
    "a NUL inside": (b"\x00" + LINE.encode(), 2),
    "not UTF-8": (b"\xff" + LINE.encode(), 2),
    "begins with 0x01": (b"\x01" + LINE.encode(), 2),
    "a carriage return inside": (b"\r" + LINE.encode(), 2),
    "too long": (LINE.encode().ljust(MAX_LINE + 1, b"x"), 2),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_prompts_that_are_refused(outlets: Outlets, kind: str) -> None:
    line, code = BROKEN[kind]
    outlets.run("spawn", "demo", "--", "cat", code=0)
    outlets.run("write", "demo", "-", stdin=line + b"\n", code=code)
    if b"\0" not in line and len(line) < 1 << 16:
        outlets.run("write", "demo", line, code=code)
    outlets.look()
    assert outlets.leaks == []


def test_prompts_that_do_not_arrive(outlets: Outlets) -> None:
    outlets.run("write", "none", LINE, code=3)
    outlets.run("write", "none", "-", stdin=LINE.encode(), code=3)
    bare_socket(outlets.folder / "dead.rpc.sock")
    (outlets.folder / "dead.rpc.sock.pid").write_text(str(dead_pid()))
    outlets.run("write", "dead", LINE, "--json", code=75)
    with FakeKeeper(outlets.folder, "dies", Behaviour.DIE, after=20):
        outlets.run("write", "dies", LINE, "--json", code=76)
    outlets.run("write", "demo", *LINE.split(":"), code=2)
    outlets.run("write", "demo", "tell", "me", PROMPT, code=2)
    outlets.run("write", "demo", LINE, "--key", "", code=2)
    outlets.look()
    assert outlets.leaks == []


# Failures of our own.

FAILING = """
import sys
from reconciler import {room}
def fails(*arguments, **options):
    secret = {secret!r}, arguments, options
    raise RuntimeError("injected")
assert {room}.{what}, "else nothing would fail"
{room}.{what} = fails
from reconciler.cli import main
main()
"""


@pytest.mark.parametrize(
    ("room", "what", "command"),
    [
        ("link", "Link.deliver", ("write", "demo", LINE)),
        ("link", "Link.deliver", ("write", "demo", LINE, "--key", "k")),
        ("exchanges", "keyed", ("write", "demo", LINE, "--key", "k")),
        ("link", "Link.close", ("write", "demo", LINE)),
        ("spawning", "_told", ("spawn", "second", "--env", f"S={OPTION}", "--", "cat", ARGUMENT)),
        ("spawning", "_run", ("spawn", "second", "--env", f"S={OPTION}", "--", "cat", ARGUMENT)),
        ("probe", "Probe.look", ("run", "--once", "--log-level", "debug", "--log-form", "json")),
        ("probe", "Probe.look", ("run", "--once", "--log-level", "debug", "--log-form", "console")),
        ("controller", "Reconciler._look_at_all", ("run", "--once")),
        ("probe", "Probe.look", ("stop", "demo")),
        ("probe", "Probe.look", ("inspect", "demo", "--json")),
    ],
)
def test_a_failure_of_ours_tells_no_values(
    outlets: Outlets, room: str, what: str, command: tuple[str, ...]
) -> None:
    outlets.run("spawn", "demo", "--", "cat", code=0)
    script = FAILING.format(room=room, what=what, secret=PROMPT)
    program = ("timeout", "50", sys.executable, "-c", script)
    assert b"injected" in outlets.run(*command, program=program)
    outlets.look()
    assert outlets.leaks == []


TASK = """
import asyncio, sys
from pathlib import Path
from reconciler import RpcWriter, link

def fails(*arguments):
    raise RuntimeError("injected")

async def main():
    assert link.Link.close
    link.Link.close = fails
    task = asyncio.create_task(RpcWriter(Path(sys.argv[1])).write("demo", sys.argv[2]))
    await asyncio.wait([task])  # and its error is never asked for

asyncio.run(main(), debug=True)
"""


def test_a_failure_within_an_event_loop_tells_no_values(outlets: Outlets) -> None:
    outlets.run("spawn", "demo", "--", "cat", code=0)
    program = (sys.executable, "-X", "dev", "-W", "error", "-c", TASK)
    assert b"injected" in outlets.run(str(outlets.folder), LINE, program=program)
    assert outlets.leaks == []


def test_a_failure_of_the_keeper_tells_no_values(outlets: Outlets, tmp_path: Path) -> None:
    text = SOURCE.read_text()
    place = "    def _remember(self, connection: Connection) -> None:\n"
    assert place in text
    failing = tmp_path / KEEPER_PROGRAM.name
    injected = '        secret = bytes(self._buffer)\n        raise RuntimeError("injected")\n'
    failing.write_text(text.replace(place, place + injected))
    manager = KeeperManager(
        outlets.folder, keeper_command=(sys.executable, "-I", "-S", str(failing))
    )
    env = {**outlets.env, "SECRET": OPTION}
    spawned = asyncio.run(manager.spawn("demo", env=env, agent_command=("cat", "-", ARGUMENT)[:2]))
    outlets.look(spawned.keeper_pid)
    BlockingRpcWriter(outlets.folder).write("demo", LINE)
    until(lambda: not alive(spawned.keeper_pid), "the keeper fails")
    outlets.look()
    assert "RuntimeError: injected" in (outlets.folder / "keeper-launch-demo.log").read_text()
    assert '"keeper.crashed"' in (outlets.folder / "keeper-demo.log").read_text()
    assert outlets.leaks == []


# Values and errors.


def texts(value: object) -> Iterator[tuple[str, bytes]]:
    """All that a value or error says of itself, and the errors behind it."""
    while value is not None:
        for said in (str(value), repr(value)):
            yield type(value).__name__, said.encode(errors="backslashreplace")
        if not isinstance(value, BaseException):
            return
        yield "its arguments", repr((value.args, vars(value))).encode(errors="backslashreplace")
        value = value.__cause__ or value.__context__


def test_no_value_and_no_error_repeats_a_message(outlets: Outlets) -> None:
    hasty = WritePolicy(attempts=1, progress_timeout=0.05, backoff=())
    writer = BlockingRpcWriter(outlets.folder, policy=hasty)
    outlets.said += texts(writer.write("none", LINE, key="k"))
    outlets.said += texts(writer.write_many("none", [LINE, {"message": PROMPT}]))
    with FakeKeeper(outlets.folder, "demo", Behaviour.STALL):
        outlets.said += texts(writer.write("demo", LINE))
        with pytest.raises(StreamBrokenError) as broken, writer.stream("demo") as stream:
            stream.send(LINE)
        outlets.said += [*texts(broken.value), *texts(stream), *texts(writer)]
    nests: dict[str, object] = {"message": PROMPT}
    nests["nests"] = nests
    for message in (
        f"{PROMPT}\n{PROMPT}",
        f"{PROMPT}\ud800",
        f"{PROMPT}\xff".encode("latin-1"),
        {"message": f"{PROMPT}\ud800"},
        {PROMPT: float("nan")},
        {"message": PROMPT.encode()},
        {(PROMPT,): 1},
        nests,
        [PROMPT],
    ):
        with pytest.raises(InvalidMessageError) as refused:
            writer.write("demo", message)  # type: ignore[arg-type] # some are no message at all
        outlets.said += texts(refused.value)
    assert outlets.leaks == []


@pytest.mark.parametrize(
    ("env", "command"),
    [
        ({"SECRET": f"{OPTION}\ud800"}, SINK),
        ({"SECRET": f"{OPTION}\0"}, SINK),
        ({}, (*SINK, f"{ARGUMENT}\ud800")),
        ({}, (*SINK, f"{ARGUMENT}\0")),
    ],
)
def test_no_refused_request_repeats_a_value(
    outlets: Outlets, env: dict[str, str], command: tuple[str, ...]
) -> None:
    manager = KeeperManager(outlets.folder)
    with pytest.raises(InvalidRequestError) as refused:
        asyncio.run(manager.spawn("demo", env={**outlets.env, **env}, agent_command=command))
    outlets.said += texts(refused.value)
    assert list(outlets.folder.iterdir()) == []
    assert outlets.leaks == []


def test_no_request_shows_the_environment_or_the_agents_arguments(outlets: Outlets) -> None:
    request = KeeperRequest(
        sid="demo", cwd=outlets.folder, env=outlets.env, agent_command=("pi", ARGUMENT)
    )
    outlets.said += texts(request)
    assert "demo" in repr(request)
    assert outlets.leaks == []


def test_every_public_class_that_holds_a_message_was_looked_at() -> None:
    """A new public class must be thought of here."""
    holders = {
        name
        for name in reconciler.__all__
        for kept in [getattr(getattr(reconciler, name), "__dataclass_fields__", {})]
        if {"env", "environment", "message", "line", "data", "text", "agent_command"} & set(kept)
    }
    assert holders == set()
