from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import WAIT, alive, bare_socket, end_all, stale_pair, until

from reconciler.cli import _ALIASES, _ARGUMENTS_ELSEWHERE, _ELSEWHERE, _OPTIONS_ELSEWHERE
from reconciler.cli import cli as group
from reconciler.commands.write import _hint
from reconciler.deliveries import Delivery, Outcome, Reason
from reconciler.state import Policy
from reconciler.testing import Behaviour, FakeKeeper

PROGRAM = (sys.executable, "-m", "reconciler")
COMMANDS = (
    *(
        "run",
        "status",
        "events",
        "spawn",
        "write",
        "ls",
        "inspect",
        "stop",
        "restart",
        "completion",
    ),
)
LINE = '{"type":"get_state","id":"1"}'


@dataclass(frozen=True)
class Ended:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401 - whatever the command says
        return json.loads(self.out)


class Cli:
    """Runs the command line as a user does: a process of its own."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "PI_RECONCILER_SESSIONS_DIR": str(folder),
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "PYTHONWARNINGS": "error",
            **{key: value for key, value in os.environ.items() if key.startswith("COVERAGE_")},
        }

    def __call__(
        self,
        *arguments: str | Path,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Ended:
        done = subprocess.run(
            [*PROGRAM, *arguments],
            env={**self.env, **(env or {})},
            input=b"" if stdin is None else stdin,
            capture_output=True,
            timeout=WAIT,
            check=False,
        )
        ended = Ended(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in ended.err + ended.out, ended.err
        return ended

    def fails(self, code: int, *arguments: str | Path, stdin: bytes = b"") -> str:
        """A command that must fail as told: a code, and one line that says why."""
        ended = self(*arguments, stdin=stdin)
        assert (ended.code, ended.out) == (code, ""), ended
        assert re.fullmatch(r"pi-reconciler: [^\n]+\n", ended.err), ended.err
        return ended.err

    def spawn(self, sid: str, *agent: str) -> int:
        """Start a session; gives its keeper's pid."""
        ended = self("spawn", sid, "--json", "--", *(agent or ("cat",)))
        assert ended.code == 0, ended
        pid = ended.json["keeper_pid"]
        assert isinstance(pid, int)
        return pid

    @contextlib.contextmanager
    def started(self, *arguments: str | Path, **how: Any) -> Iterator[subprocess.Popen[bytes]]:  # noqa: ANN401 - Popen's own
        # Unbuffered: a line that is read ahead would be hidden from select.
        process = subprocess.Popen([*PROGRAM, *arguments], env=self.env, bufsize=0, **how)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def cli(folder: Path) -> Cli:
    return Cli(folder, folder.parent.parent.parent)


def lines_of(process: subprocess.Popen[bytes], event: str) -> list[dict[str, Any]]:
    """The log lines of a process up to an event that must come."""
    told: list[dict[str, Any]] = []
    assert process.stdout is not None
    while not told or told[-1]["event"] != event:
        assert select.select([process.stdout], [], [], WAIT)[0], f"waited in vain for {event}"
        line = process.stdout.readline()
        assert line, f"the log ended before {event}"
        told.append(json.loads(line))
    return told


def events(ended: Ended) -> list[str]:
    return [json.loads(line)["event"] for line in ended.out.splitlines()]


def recorder(path: Path) -> tuple[str, ...]:
    """An agent that keeps what it was sent."""
    return ("sh", "-c", 'exec cat > "$0"', str(path))


# -- Help -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(cli: Cli, command: str) -> None:
    ended = cli(command, "--help")
    assert ended.code == 0
    assert ended.out.startswith(f"Usage: pi-reconciler {command}")
    assert ended.out.count(f"pi-reconciler {command}") >= 2, "an example beside the usage line"
    for option in ("--sessions-dir DIR", "--config FILE", "-h, --help"):
        assert option in ended.out
    assert cli(command, "-h").out == ended.out


def test_the_program_explains_itself_and_names_every_exit_code(cli: Cli) -> None:
    ended = cli("--help")
    assert ended.code == 0
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\w", ended.out, re.MULTILINE)
    codes = ended.out.partition("Exit codes:")[2].partition("Options:")[0]
    assert re.findall(r"\b\d+\b", codes) == ["0", "1", "2", "3", "75", "76", "78"]


def test_without_a_command_the_help_is_shown_and_it_is_wrong_usage(cli: Cli) -> None:
    ended = cli()
    assert (ended.code, ended.out) == (2, cli("--help").out)


def test_the_version_is_that_of_the_package(cli: Cli) -> None:
    import reconciler  # noqa: PLC0415 - only its version

    assert cli("--version").out == f"pi-reconciler, version {reconciler.__version__}\n"


# -- The options of all commands -------------------------------------------------------------


def test_the_folder_is_named_before_or_after_the_command_and_a_flag_beats_the_variable(
    cli: Cli, tmp_path: Path
) -> None:
    cli.spawn("here")
    elsewhere = tmp_path / "elsewhere"
    cli.env["PI_RECONCILER_SESSIONS_DIR"] = str(elsewhere)
    for arguments in (
        ("--sessions-dir", cli.folder, "ls", "--json"),
        ("ls", "--sessions-dir", cli.folder, "--json"),
        ("--sessions-dir", elsewhere, "ls", "--sessions-dir", cli.folder, "--json"),
    ):
        assert [row["sid"] for row in cli(*arguments).json] == ["here"]
    assert cli("ls", "--json").json == []


def test_without_a_flag_the_folder_is_the_dashboards(cli: Cli, tmp_path: Path) -> None:
    cli.spawn("here")
    del cli.env["PI_RECONCILER_SESSIONS_DIR"]
    assert [row["sid"] for row in cli("ls", "--json").json] == ["here"]
    moved = {"PI_DASHBOARD_HOME": str(tmp_path / "moved")}
    assert cli("ls", "--json", env=moved).json == []


def test_a_settings_file_names_the_folder_and_the_agent(cli: Cli, tmp_path: Path) -> None:
    del cli.env["PI_RECONCILER_SESSIONS_DIR"]
    cli.env["HOME"] = str(tmp_path)
    folder = tmp_path / "of the settings" / ".pi" / "dashboard" / "sessions"
    settings = tmp_path / ".config" / "pi-reconciler" / "config.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text(f"sessions_dir = {json.dumps(str(folder))}\nagent_command = ['cat']\n")
    assert cli("spawn", "mine").code == 0
    try:
        (row,) = cli("ls", "--json").json
        assert Path(f"/proc/{row['agent_pid']}/comm").read_text() == "cat\n"
        assert Path(row["socket"]) == folder / "mine.rpc.sock"
    finally:
        assert cli("stop", "--all").code == 0


@pytest.mark.parametrize("place", ["variable", "flag before", "flag after"])
def test_bad_settings_are_78(cli: Cli, tmp_path: Path, place: str) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[policy]\nsettle = -1\n")
    arguments: dict[str, tuple[str | Path, ...]] = {
        "variable": ("ls",),
        "flag before": ("--config", bad, "ls"),
        "flag after": ("ls", "--config", bad),
    }
    if place == "variable":
        cli.env["PI_RECONCILER_CONFIG"] = str(bad)
    told = cli.fails(78, *arguments[place])
    assert told == (
        f"pi-reconciler: {bad}: policy.settle is -1, allowed: seconds above 0, 86400 at most\n"
    )
    assert cli("ls", "--help").code == 0, "help needs no settings"


def test_a_settings_file_that_is_named_must_be_there(cli: Cli, tmp_path: Path) -> None:
    told = cli.fails(78, "ls", "--config", tmp_path / "none.toml")
    assert told == f"pi-reconciler: settings file '{tmp_path}/none.toml' is not there\n"
    told = cli.fails(78, "write", "a", LINE, "--config", tmp_path)
    assert "cannot be read: it is no regular file" in told


# -- spawn ------------------------------------------------------------------------------


def test_spawn_prints_the_id_and_the_keepers_pid(cli: Cli) -> None:
    ended = cli("spawn", "demo", "--", "cat")
    sid, pid = ended.out.split()
    assert (ended.code, ended.err, sid) == (0, "", "demo")
    assert (cli.folder / "demo.rpc.sock.pid").read_text() == pid
    assert alive(int(pid))


def test_spawn_without_an_id_takes_a_new_uuid(cli: Cli) -> None:
    ended = cli("spawn", "--json", "--", "cat")
    spawned = ended.json
    assert str(uuid.UUID(spawned["sid"])) == spawned["sid"]
    assert set(spawned) == {"sid", "keeper_pid", "agent_pid", "socket"}
    assert spawned["socket"] == str(cli.folder / f"{spawned['sid']}.rpc.sock")
    assert Path(f"/proc/{spawned['agent_pid']}/comm").read_text() == "cat\n"


def test_spawn_hands_arguments_variables_and_the_folder_to_the_agent(
    cli: Cli, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    script = 'printf "%s\\n" "$PWD" "$COLOR" "$WITH" "$@" > "$0.part"; mv "$0.part" "$0"; exec cat'
    there = tmp_path / "a place"
    there.mkdir()
    ended = cli(
        *("spawn", "demo", "--cwd", there, "--env", "COLOR=red", "--env", "WITH=a=b"),
        *("--", "sh", "-c", script, told, "--json", "-- two words"),
    )
    assert ended.code == 0, ended
    until(told.exists)
    assert told.read_text().splitlines() == [str(there), "red", "a=b", "--json", "-- two words"]


@pytest.mark.parametrize("capture", [True, False])
def test_spawn_keeps_the_agents_output_only_if_asked(cli: Cli, *, capture: bool) -> None:
    flags = ["--capture"] * capture
    assert cli("spawn", "demo", *flags, "--", "sh", "-c", "echo it says so; exec cat").code == 0
    assert cli("stop", "demo").code == 0
    log = (cli.folder / "keeper-demo.log").read_text()
    assert ("it says so" in log) is capture


def test_spawn_refuses_in_one_line_and_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    before = sorted(cli.folder.iterdir())
    table: Sequence[tuple[int, tuple[str, ...], str]] = (
        (2, ("../x", "--", "cat"), "session id '../x' is not usable"),
        (2, ("x", "--env", "NOVALUE", "--", "cat"), "--env wants K=V"),
        (2, ("x", "--env", "=v", "--", "cat"), "--env wants K=V"),
        (2, ("x", "--cwd", f"{tmp_path}/none", "--", "cat"), "is not a folder"),
        (2, ("x", "y", "--", "cat"), "unexpected extra argument"),
        (
            2,
            ("x", "--bogus"),
            "'--bogus', what is meant for the agent goes after -- (see pi-reconciler spawn --help)",
        ),
        (1, ("x", "--", "there-is-no-such-agent"), "'there-is-no-such-agent' was not found"),
        (1, ("x", "--", f"{tmp_path}/agent"), "agent' was not found, or may not be run"),
        (1, ("x", "--", "false"), "session x: "),
    )
    for code, arguments, words in table:
        assert words in cli.fails(code, "spawn", *arguments)
        assert sorted(cli.folder.iterdir()) == before, arguments


def test_spawn_says_how_to_learn_what_an_agent_said_that_ends_at_once(cli: Cli) -> None:
    failing = ("spawn", "a", "--", "sh", "-c", "echo no key; exit 3")
    ended = "pi-reconciler: session a: the agent ended with code 3 within 300 ms; "
    assert cli.fails(1, *failing) == f"{ended}with --capture it is told what it said\n"
    assert cli.fails(1, "spawn", "--capture", *failing[1:]) == f"{ended}it said: no key\n"


def test_spawn_refuses_a_session_that_runs(cli: Cli) -> None:
    pid = cli.spawn("demo")
    assert f"session demo is running already, its keeper is {pid}" in cli.fails(
        1, "spawn", "demo", "--", "cat"
    )
    assert alive(pid)


def test_spawn_refuses_a_folder_that_cannot_be_made(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "sessions"
    told = cli.fails(1, "spawn", "--sessions-dir", place, "--", "cat")
    assert told.endswith(f"sessions folder '{place}' cannot be used: Not a directory\n")
    assert "is a file" in cli.fails(2, "ls", "--sessions-dir", tmp_path / "file")
    assert "cannot be read: Not a directory" in cli.fails(1, "ls", "--sessions-dir", place)


# -- write ------------------------------------------------------------------------------


def test_write_returns_when_the_agent_has_the_line(cli: Cli, tmp_path: Path) -> None:
    cli.spawn("demo", *recorder(tmp_path / "got"))
    assert cli("write", "demo", LINE) == Ended(0, "", "")
    until(lambda: (tmp_path / "got").read_text() == f"{LINE}\n")


def test_write_tells_of_the_delivery_as_json(cli: Cli) -> None:
    cli.spawn("demo")
    told = cli("write", "demo", LINE, "--json").json
    assert (told["sid"], told["outcome"], told["reason"]) == ("demo", "delivered", "receipt")
    assert (told["total"], told["confirmed"], told["unsent"]) == (1, 1, 0)
    assert told["size"] == len(LINE) + 1
    (attempt,) = told["attempts"]
    assert set(attempt) == {"started_ms", "elapsed_ms", "reason", "handed_over"}
    assert "get_state" not in json.dumps(told)


def test_write_dash_delivers_the_lines_of_stdin_in_order_and_skips_blank_ones(
    cli: Cli, tmp_path: Path
) -> None:
    cli.spawn("demo", *recorder(tmp_path / "got"))
    lines = [json.dumps({"n": n, "text": "ü" * (n % 50)}, ensure_ascii=False) for n in range(2000)]
    sent = "\n\n".join(lines[:1000]) + "\n  \r\n" + "\n".join(lines[1000:])  # no LF at the end
    assert cli("write", "demo", "-", stdin=sent.encode()) == Ended(0, "", "")
    until(lambda: (tmp_path / "got").read_text().splitlines() == lines)


def test_write_dash_stops_at_a_line_that_is_none_and_says_what_was_delivered(
    cli: Cli, tmp_path: Path
) -> None:
    cli.spawn("demo", *recorder(tmp_path / "got"))
    told = cli.fails(2, "write", "demo", "-", stdin=b'{"n":1}\n\n{"n":2}\n\xff\xfe\n{"n":3}\n')
    assert "line 4 of standard input: the message is not UTF-8" in told
    assert "the 2 before it were delivered, none after it was sent" in told
    until(lambda: (tmp_path / "got").read_text() == '{"n":1}\n{"n":2}\n')


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "a\nb"), "a line feed inside"),
        (("demo", ""), "blank"),
        (("demo", os.fsdecode(b"\xff")), "not UTF-8"),
        (("../demo", LINE), "session id '../demo' is not usable"),
        (
            ("demo", LINE, "--timeout", "-1"),
            "'--timeout': '-1' is not a number of seconds above 0, 86400 at most",
        ),
        (("demo", LINE, "--timeout", "nan"), "'--timeout': 'nan' is not a number of seconds"),
        (("demo",), "Missing argument 'LINE'"),
        (("demo", LINE, "--key", "k" * 129), "the key is not 1 to 128 printable ASCII"),
        (("demo", LINE, "--key", " "), "the key is not 1 to 128 printable ASCII"),
        (("demo", "-", "--key", "k"), "--key is for one LINE, not for standard input"),
    ],
)
def test_write_refuses_what_is_no_line(cli: Cli, arguments: tuple[str, ...], words: str) -> None:
    assert words in cli.fails(2, "write", *arguments)


def test_write_with_a_key_again_is_delivered_and_arrives_once(cli: Cli, tmp_path: Path) -> None:
    pid = cli.spawn("demo", *recorder(tmp_path / "got"))
    os.kill(pid, signal.SIGSTOP)
    assert "delivery not known" in cli.fails(76, "write", "demo", LINE, "--key", "job 7")
    os.kill(pid, signal.SIGCONT)
    for _ in range(2):
        assert cli("write", "demo", LINE, "--key", "job 7") == Ended(0, "", "")
    assert cli("write", "demo", "{}") == Ended(0, "", "")
    until(lambda: (tmp_path / "got").read_text() == f"{LINE}\n{{}}\n")


def test_write_with_a_key_to_a_keeper_without_keys_is_75(cli: Cli) -> None:
    with FakeKeeper(cli.folder, "demo") as keeper:
        ended = cli("write", "demo", LINE, "--key", "k", "--json")
        told = cli.fails(75, "write", "demo", LINE, "--key", "k")
    assert (ended.code, ended.json["outcome"], ended.json["reason"]) == (
        75,
        "not_delivered",
        "no_keys",
    )
    assert (ended.json["total"], ended.json["confirmed"], ended.json["unsent"]) == (1, 0, 1)
    assert "not delivered, no_keys (1 attempt)" in told
    assert keeper.received == ()


def test_write_to_no_session_is_3(cli: Cli) -> None:
    words = f"pi-reconciler: no session demo in {cli.folder}\n"
    assert cli.fails(3, "write", "demo", LINE) == words
    assert cli.fails(3, "write", "demo", "-", stdin=LINE.encode()) == words
    cli.folder.rmdir()
    assert cli.fails(3, "write", "demo", LINE) == words


def test_write_to_a_socket_that_nobody_listens_on_is_75(cli: Cli) -> None:
    stale_pair(cli.folder, "demo")
    told = cli.fails(75, "write", "demo", LINE)
    words = "session demo: not delivered, refused (3 attempts); safe to try again"
    words += " (nobody listens: see pi-reconciler inspect demo)"
    assert told == f"pi-reconciler: {words}\n"
    assert cli.fails(75, "write", "demo", "-", stdin=LINE.encode()) == told
    ended = cli("write", "demo", LINE, "--json")
    assert (ended.code, ended.json["outcome"], ended.json["unsent"]) == (75, "not_delivered", 1)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (Reason.NO_SOCKET, "it has no socket: see pi-reconciler inspect demo"),
        (Reason.NO_KEYS, "its keeper knows no keys: leave --key out"),
        (Reason.BACKLOG_FULL, "stopped (kill -CONT) or hangs (pi-reconciler stop demo)"),
        (Reason.TIMED_OUT_BEFORE, "stopped (kill -CONT) or hangs (pi-reconciler stop demo)"),
        (Reason.BAD_PID_FILE, "see pi-reconciler inspect demo"),
    ],
)
def test_write_says_what_is_the_matter_and_what_to_do(reason: Reason, words: str) -> None:
    met = Delivery(
        sid="demo", outcome=Outcome.NOT_DELIVERED, reason=reason, attempts=(), elapsed=0, size=3
    )
    assert _hint(met, Path("/nowhere")).endswith(words)


@pytest.mark.parametrize("above", [False, True])
def test_in_a_folder_that_others_may_write_to_nothing_is_done_and_the_mend_is_told(
    cli: Cli, *, above: bool
) -> None:
    cli.spawn("demo")
    wrong = cli.folder.parent if above else cli.folder
    wrong.chmod(0o777)
    mend = "(mode 0777): chmod go-w it"
    for arguments in (("spawn", "second", "--", "cat"), ("stop", "demo"), ("stop", "--all")):
        assert mend in cli.fails(1, *arguments)
    ended = cli("run", "--once")
    assert ended.code == 1
    assert mend in ended.err
    assert mend in ended.out, "and in its log"
    assert mend in cli.fails(75, "write", "demo", LINE)
    assert mend in cli.fails(75, "write", "demo", "-", stdin=LINE.encode())
    assert [row["phase"] for row in cli("ls", "--json").json] == ["ready"]
    wrong.chmod(0o700)
    assert cli("write", "demo", LINE).code == 0
    assert cli("stop", "demo").code == 0


def test_write_to_a_keeper_that_takes_a_line_and_gives_no_receipt_is_76(cli: Cli) -> None:
    pid = cli.spawn("demo")
    os.kill(pid, signal.SIGSTOP)
    told = cli.fails(76, "write", "demo", LINE)
    assert told.startswith("pi-reconciler: session demo: delivery not known, timed_out_after")
    assert told.endswith("; look at the session before you send it again\n")


def test_write_to_a_keeper_that_dies_in_the_middle_is_76(cli: Cli) -> None:
    with FakeKeeper(cli.folder, "demo", Behaviour.DIE, after=5):
        ended = cli("write", "demo", LINE, "--json")
    assert (ended.code, ended.json["outcome"]) == (76, "unconfirmed")
    assert ended.json["reason"] in {"keeper_died", "broken"}
    assert (ended.json["confirmed"], ended.json["unsent"]) == (0, 0)


def test_write_without_a_standard_input_says_so(cli: Cli) -> None:
    cli.spawn("demo")
    shell = f"exec {sys.executable} -m reconciler write demo - <&-"
    done = subprocess.run(
        ["sh", "-c", shell], env=cli.env, capture_output=True, timeout=WAIT, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"pi-reconciler: standard input is closed")


# -- ls and inspect --------------------------------------------------------------------------


def test_ls_gives_a_list_of_objects(cli: Cli) -> None:
    pid = cli.spawn("demo")
    stale_pair(cli.folder, "old")
    ready, stale = cli("ls", "--json").json
    keys = ["sid", "phase", "keeper_pid", "agent_pid", "age_s", "socket", "reason", "leftovers"]
    assert list(ready) == [*keys, "restart", "restarts"]
    assert (ready["sid"], ready["phase"], ready["keeper_pid"]) == ("demo", "ready", pid)
    assert alive(ready["agent_pid"])
    assert ready["socket"] == str(cli.folder / "demo.rpc.sock")
    assert stale | {"socket": ""} == {
        "sid": "old",
        "phase": "stale",
        "keeper_pid": None,
        "agent_pid": None,
        "age_s": None,
        "leftovers": [],
        "socket": "",
        "reason": "keeper dead",
        "restart": "never",
        "restarts": 0,
    }


def test_ls_shows_an_aligned_table_and_ps_the_same(cli: Cli) -> None:
    pid = cli.spawn("a-session-with-a-long-name")
    stale_pair(cli.folder, "b")
    ended = cli("ls")
    head, first, second = ended.out.splitlines()
    assert head.split() == ["SID", "PHASE", "KEEPER", "AGENT", "AGE"]
    assert first.split()[:3] == ["a-session-with-a-long-name", "ready", str(pid)]
    assert second.split() == ["b", "stale", "-", "-", "-"]
    starts = [match.start() for match in re.finditer(r"\S+", head)]
    for line in (first, second):
        assert [match.start() for match in re.finditer(r"\S+", line)] == starts
        assert line == line.rstrip()
    assert cli("ps").out.splitlines()[0].split() == head.split()


@pytest.mark.parametrize("there", [True, False])
def test_ls_of_an_empty_or_missing_folder_is_empty(cli: Cli, *, there: bool) -> None:
    if not there:
        cli.folder.rmdir()
    said = "" if there else f"pi-reconciler: there is no folder {cli.folder}\n"
    assert cli("ls", "--json") == Ended(0, "[]\n", said)
    assert cli("ls") == Ended(0, "SID  PHASE  KEEPER  AGENT  AGE\n", said)
    assert cli.folder.exists() is there


def test_inspect_shows_evidence_judgement_and_what_would_be_done(cli: Cli) -> None:
    pid = cli.spawn("demo")
    agent = cli("ls", "--json").json[0]["agent_pid"]
    said = [re.split(r"  +", line, maxsplit=1) for line in cli("inspect", "demo").out.splitlines()]
    assert said[0] == [f"session demo in {cli.folder}"]
    shown = dict(pair for pair in said if len(pair) == 2)
    assert re.fullmatch(
        rf"alive for \d+s: process {pid} runs keeper_process.py .*", shown["keeper"]
    )
    assert shown["agent"] == f"alive: process {agent} is the keeper's child"
    assert shown["socket"] == f"process {pid} listens"
    assert shown["pid file"] == f"names process {pid}"
    assert shown["agent pid file"] == f"names process {agent}"
    assert shown["phase"] == "ready, because: keeper proven"
    assert shown["would do"] == "nothing"


def test_inspect_of_a_stale_session_names_the_files_and_changes_nothing(cli: Cli) -> None:
    stale_pair(cli.folder, "old")
    before = sorted(cli.folder.iterdir())
    out = cli("inspect", "old").out
    assert "there, and nobody listens on it" in out
    assert "phase           stale, because: keeper dead" in out
    assert "would do        remove socket, pid_file" in out
    assert sorted(cli.folder.iterdir()) == before


def test_inspect_tells_of_waiting_and_of_what_it_refuses(cli: Cli, tmp_path: Path) -> None:
    bare_socket(cli.folder / "new.rpc.sock")
    patient = {"PI_RECONCILER_POLICY_SETTLE": "600"}
    told = cli("inspect", "new", env=patient).out
    assert re.search(r"would do +look again in [56]\d\d\.\d s\n", told)
    (cli.folder / "odd.rpc.sock.pid").symlink_to(tmp_path / "elsewhere")
    odd = cli("inspect", "odd").out
    assert re.search(r"phase +refused, because: pid_file: ", odd)
    assert re.search(r"would do +nothing\n", odd)


def test_what_was_left_long_ago_is_shown_as_stale_and_cleaned_when_it_has_settled(
    cli: Cli,
) -> None:
    bare_socket(path := cli.folder / "old.rpc.sock")
    long_ago = time.time() - 3 * 24 * 3600
    os.utime(path, (long_ago, long_ago), follow_symlinks=False)
    assert [row["phase"] for row in cli("ls", "--json").json] == ["stale"]
    told = cli("inspect", "old").out
    assert "phase           stale, because: no pid file, and nobody listens" in told
    assert "would do        remove socket" in told
    assert path.exists()
    begun = time.monotonic()
    assert events(cli("run", "--once"))[:2] == ["reconciler.started", "session.cleaned"]
    assert time.monotonic() - begun >= Policy().settle


def test_inspect_json_holds_everything(cli: Cli) -> None:
    pid = cli.spawn("demo")
    told = cli("inspect", "demo", "--json").json
    row = cli("ls", "--json").json[0]
    assert {key: told[key] for key in row if key != "age_s"} == {
        key: value for key, value in row.items() if key != "age_s"
    }
    assert (told["actions"], told["look_again_after_s"]) == ([], None)
    seen = told["observation"]
    assert seen["keeper"]["process"]["pid"] == seen["listener"]["pid"] == pid
    assert seen["socket"]["file"]["inode"] == (cli.folder / "demo.rpc.sock").stat().st_ino
    assert "runs keeper_process.py" in seen["keeper"]["evidence"]


def test_inspect_of_no_session_is_3(cli: Cli) -> None:
    assert cli.fails(3, "inspect", "demo") == f"pi-reconciler: no session demo in {cli.folder}\n"
    assert "is not usable" in cli.fails(2, "inspect", "a/b")


# -- stop -------------------------------------------------------------------------------


def test_stop_ends_several_at_once_and_returns_when_they_are_gone(cli: Cli) -> None:
    pids = {sid: cli.spawn(sid) for sid in ("a", "b", "c")}
    ended = cli("stop", "b", "a", "b", "--json")
    assert ended.code == 0
    assert [(one["sid"], one["stopped"], one["keeper_pid"]) for one in ended.json] == [
        ("b", True, pids["b"]),
        ("a", True, pids["a"]),
    ]
    assert [one["leftover_count"] for one in ended.json] == [0, 0]
    assert not alive(pids["a"])
    assert not alive(pids["b"])
    assert alive(pids["c"])
    assert [p.name for p in cli.folder.glob("*.rpc.sock*") if p.name[0] in "ab"] == []
    assert cli("stop", "c") == Ended(0, "c stopped\n", "")


def test_stop_all_ends_the_living_and_cleans_the_dead(cli: Cli) -> None:
    pid = cli.spawn("a")
    stale_pair(cli.folder, "old")
    assert cli("stop", "--all") == Ended(0, "a stopped\nold stopped\n", "")
    assert not alive(pid)
    assert list(cli.folder.glob("*.rpc.sock*")) == []
    assert cli("stop", "--all", "--json") == Ended(0, "[]\n", "")
    assert cli("stop", "--all") == Ended(0, "", f"pi-reconciler: no session is in {cli.folder}\n")


def test_stop_all_is_content_when_one_goes_by_itself_meanwhile(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from reconciler.keeper import KeeperManager\n"
        "find = KeeperManager.find\n"
        "def and_then(self):\n"
        "    found = find(self)\n"
        "    for path in self.sessions_dir.glob('b.rpc.sock*'): path.unlink()\n"
        "    return found\n"
        "KeeperManager.find = and_then\n"
    )
    cli.env["PYTHONPATH"] = f"{tmp_path}:{cli.env['PYTHONPATH']}"
    for sid in ("a", "b", "c"):
        stale_pair(cli.folder, sid)
    assert cli("stop", "--all") == Ended(0, "a stopped\nc stopped\n", "")
    assert list(cli.folder.glob("*.rpc.sock*")) == []


def test_stop_all_spares_another_folders_session_that_works_in_this_one(cli: Cli) -> None:
    elsewhere = cli.folder.parents[2] / "elsewhere"
    own = cli.spawn("a")
    how = ("--sessions-dir", elsewhere, "--cwd", cli.folder, "--json", "--", "cat")
    others = [cli("spawn", sid, *how).json["keeper_pid"] for sid in ("a", "b")]
    try:
        assert cli("stop", "--all") == Ended(0, "a stopped\n", "")
        assert [alive(pid) for pid in (own, *others)] == [False, True, True]
        assert len(list(elsewhere.glob("*.rpc.sock"))) == 2
    finally:
        end_all(elsewhere)


def test_stop_of_one_stale_session_cleans_it(cli: Cli) -> None:
    stale_pair(cli.folder, "old")
    assert cli("stop", "old") == Ended(0, "old stopped\n", "")
    assert list(cli.folder.glob("*.rpc.sock*")) == []


def test_stop_tells_which_of_them_was_not_there(cli: Cli) -> None:
    cli.spawn("a")
    ended = cli("stop", "a", "zz")
    assert (ended.code, ended.out) == (3, "a stopped\n")
    assert ended.err == f"pi-reconciler: no session zz in {cli.folder}\n"
    ended = cli("stop", "zz", "--json")
    assert (ended.code, ended.json[0]["stopped"]) == (3, False)
    cli.folder.joinpath("keeper-a.log").unlink()
    cli.folder.joinpath("keeper-launch-a.log").unlink()
    cli.folder.rmdir()
    assert "no session zz" in cli.fails(3, "stop", "zz")


def test_stop_leaves_alone_what_it_cannot_prove_and_says_1(cli: Cli, tmp_path: Path) -> None:
    (cli.folder / "odd.rpc.sock.pid").symlink_to(tmp_path / "elsewhere")
    assert "session odd was left alone: pid_file: " in cli.fails(1, "stop", "odd")
    assert (cli.folder / "odd.rpc.sock.pid").is_symlink()


def test_stop_wants_ids_or_all_and_not_both(cli: Cli) -> None:
    assert "give session ids, or --all, and not both" in cli.fails(2, "stop")
    assert "give session ids, or --all, and not both" in cli.fails(2, "stop", "a", "--all")


# -- run --------------------------------------------------------------------------------


def test_run_once_cleans_and_has_ended_when_it_returns(cli: Cli) -> None:
    pid = cli.spawn("a")
    stale_pair(cli.folder, "old")
    bare_socket(cli.folder / "bare.rpc.sock")
    ended = cli("run", "--once")
    assert (ended.code, ended.err) == (0, "")
    assert sorted(events(ended)) == [
        "reconciler.started",
        "reconciler.stopped",
        "session.cleaned",
        "session.cleaned",
    ]
    assert [p.name for p in cli.folder.glob("*.rpc.sock")] == ["a.rpc.sock"]
    assert alive(pid)
    assert events(cli("run", "--once")) == ["reconciler.started", "reconciler.stopped"]


def test_run_once_dry_run_tells_and_changes_nothing(cli: Cli) -> None:
    stale_pair(cli.folder, "old")
    before = sorted((p.name, p.lstat().st_ino) for p in cli.folder.iterdir())
    ended = cli("run", "--once", "--dry-run")
    assert ended.code == 0
    planned = [json.loads(line) for line in ended.out.splitlines()][1]
    assert (planned["event"], planned["sid"], planned["reason"], planned["actions"]) == (
        "session.planned",
        "old",
        "keeper dead",
        ["Remove"],
    )
    after = sorted((p.name, p.lstat().st_ino) for p in cli.folder.iterdir())
    assert after == before


def test_run_once_on_a_missing_folder_ends_well(cli: Cli) -> None:
    cli.folder.rmdir()
    ended = cli("run", "--once")
    assert (ended.code, ended.err) == (0, "")
    assert events(ended) == ["reconciler.started", "reconciler.stopped"]


def test_run_makes_the_folder_that_it_holds_for_its_user_alone(cli: Cli) -> None:
    cli.folder.rmdir()
    with cli.started("run", stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        until(lambda: cli("status").code == 0, "it holds the folder")
        assert stat.S_IMODE(cli.folder.stat().st_mode) == 0o700


def test_run_tells_of_a_folder_that_cannot_be_made_and_waits_for_it(
    cli: Cli, tmp_path: Path
) -> None:
    base, disk = tmp_path / "base", tmp_path / "disk"
    base.symlink_to(disk)
    folder = base / "sessions"
    with cli.started(
        "run", "--resync", "0.1", "--sessions-dir", folder, stdout=subprocess.PIPE
    ) as daemon:
        (line, _) = lines_of(daemon, "reconciler.started")
        assert (line["event"], line["reason"]) == (
            "folder.unusable",
            f"cannot be made: {base}: File exists",
        )
        (disk / "sessions").mkdir(parents=True, mode=0o700)
        until(lambda: cli("status", "--sessions-dir", folder).code == 0, "it holds the folder")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_ends_with_0_at_a_signal_and_leaves_the_living(
    cli: Cli, number: signal.Signals
) -> None:
    pid = cli.spawn("a")
    stale_pair(cli.folder, "old")
    with cli.started("run", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as daemon:
        (started, cleaned) = lines_of(daemon, "session.cleaned")
        daemon.send_signal(number)
        out, err = daemon.communicate(timeout=WAIT)
        assert (daemon.returncode, err) == (0, b"")
    assert started["folder"] == str(cli.folder)
    assert cleaned["sid"] == "old"
    assert json.loads(out)["event"] == "reconciler.stopped"
    (row,) = cli("ls", "--json").json
    assert (row["keeper_pid"], row["phase"]) == (pid, "ready")
    assert cli("write", "a", LINE).code == 0


def test_a_second_run_on_the_folder_is_refused_in_one_line_that_names_the_first(cli: Cli) -> None:
    with cli.started("run", stdout=subprocess.PIPE) as daemon:
        lines_of(daemon, "reconciler.started")
        second = cli("run")
        assert second.code == 1
        assert re.fullmatch(
            rf"pi-reconciler: [^\n]*\(process {daemon.pid}\)[^\n]*{cli.folder}[^\n]*\n", second.err
        )
        assert cli("run", "--once", "--dry-run").code == 0, "one that only looks is welcome"


def test_run_cleans_after_a_keeper_that_was_killed_and_tells_how_fast(cli: Cli) -> None:
    pid = cli.spawn("a")
    with cli.started("run", stdout=subprocess.PIPE) as daemon:
        until(lambda: waits_for(daemon.pid, pid), "the daemon waits for the keeper's exit")
        os.kill(pid, signal.SIGKILL)
        cleaned = lines_of(daemon, "session.cleaned")[-1]
    assert (cleaned["sid"], cleaned["keeper_pid"], cleaned["reason"]) == ("a", pid, "keeper dead")
    assert cleaned["since_exit_ms"] >= 0
    assert cleaned["duration_ms"] >= 0


def waits_for(watcher: int, pid: int) -> bool:
    """Whether a process holds a pidfd of another one."""
    infos = Path(f"/proc/{watcher}/fdinfo")
    held = [text for name in os.listdir(infos) if (text := text_of(infos / name))]
    return any(line.split() == ["Pid:", str(pid)] for text in held for line in text.splitlines())


def text_of(path: Path) -> str:
    """What a file says; nothing, once it is gone."""
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def test_run_on_a_folder_that_is_named_in_a_roundabout_way(cli: Cli) -> None:
    """Warnings are errors in these programs."""
    way = cli.folder / ".." / cli.folder.name
    with cli.started(
        "run", "--sessions-dir", way, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as daemon:
        lines_of(daemon, "reconciler.started")
        stale_pair(cli.folder, "old")
        told = [line["event"] for line in lines_of(daemon, "session.cleaned")]
        assert told == ["session.cleaned"]
        daemon.terminate()
        _, err = daemon.communicate(timeout=WAIT)
        assert (daemon.returncode, err) == (0, b"")


def test_run_writes_json_lines_to_a_pipe(cli: Cli) -> None:
    for line in cli("run", "--once").out.splitlines():
        told = json.loads(line)
        assert list(told)[:4] == ["timestamp", "level", "severity_number", "event"]
        assert datetime.fromisoformat(told["timestamp"]).tzinfo == UTC
        assert told["timestamp"].endswith("Z")


def on_a_terminal(cli: Cli, *arguments: str) -> str:
    """What a command shows on a terminal."""
    pid, terminal = pty.fork()
    if not pid:
        os.execve(PROGRAM[0], [*PROGRAM, *arguments], cli.env)  # noqa: S606 - no shell is wanted
    shown = b""
    with contextlib.closing(os.fdopen(terminal, "rb", buffering=0)) as screen:
        try:
            while select.select([screen], [], [], WAIT)[0] and (piece := screen.read(65536)):
                shown += piece
        except OSError as error:  # the other end is closed
            assert error.errno == errno.EIO  # noqa: PT017 - the usual end of a terminal
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, shown
    return shown.decode()


def test_run_writes_the_console_form_on_a_terminal(cli: Cli) -> None:
    stale_pair(cli.folder, "old")
    shown = on_a_terminal(cli, "run", "--once")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert plain != shown, "with colours"
    assert re.search(r"\[info +\] session.cleaned .*sid=old .*reason='keeper dead'", plain)
    with pytest.raises(json.JSONDecodeError):
        json.loads(plain.splitlines()[0])
    cli.env["NO_COLOR"] = "1"
    assert "\x1b" not in on_a_terminal(cli, "run", "--once")
    assert on_a_terminal(cli, "run", "--once", "--log-form", "json").startswith('{"timestamp"')


def test_json_is_indented_on_a_terminal(cli: Cli) -> None:
    stale_pair(cli.folder, "old")
    assert on_a_terminal(cli, "ls", "--json").startswith('[\r\n  {\r\n    "sid": "old"')


def test_write_dash_counts_the_lines_on_a_terminal(cli: Cli, tmp_path: Path) -> None:
    cli.spawn("demo", *recorder(tmp_path / "got"))
    (tmp_path / "lines").write_text('{"n":1}\n{"n":2}\n')
    cli.env["LINES_OF"] = str(tmp_path / "lines")
    pid, terminal = pty.fork()
    if not pid:
        shell = f'exec {sys.executable} -m reconciler write demo - < "$LINES_OF"'
        os.execve("/bin/sh", ["sh", "-c", shell], cli.env)  # noqa: S606 - with a redirection
    with contextlib.closing(os.fdopen(terminal, "rb", buffering=0)) as screen:
        shown = b""
        with contextlib.suppress(OSError):
            while select.select([screen], [], [], WAIT)[0] and (piece := screen.read(65536)):
                shown += piece
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"lines written" in shown
    until(lambda: (tmp_path / "got").read_text() == '{"n":1}\n{"n":2}\n')


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--resync", "0"), "'--resync': '0' is not a number of seconds above 0, 86400 at most"),
        (("--resync", "nan"), "'--resync': 'nan' is not a number of seconds"),
        (("--resync", "1m"), "'--resync': '1m' is not a number of seconds"),
        (("--log-rotate-bytes", "10M"), "'10M' is not a valid whole number"),
        (("--log-level", "loud"), "'loud' is not one of 'debug', 'info', 'warning', 'error'"),
        (("--metrics", "9464"), "'9464' is not HOST:PORT"),
        (("--metrics", "127.0.0.1:99999"), "'127.0.0.1:99999' is not HOST:PORT"),
        (("--bogus",), "No such option '--bogus'"),
    ],
)
def test_run_refuses_bad_options(cli: Cli, arguments: tuple[str, ...], words: str) -> None:
    assert words in cli.fails(2, "run", *arguments)


def test_run_says_when_its_metrics_cannot_be_exposed(cli: Cli) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        told = cli.fails(1, "run", "--once", "--metrics", address)
    words = f"metrics cannot be exposed on {address}: Address already in use"
    assert told == f"pi-reconciler: {words}\n"


# -- Broken ends -----------------------------------------------------------------------------


def test_an_unknown_command_is_wrong_usage(cli: Cli) -> None:
    assert "No such command 'bogus'" in cli.fails(2, "bogus")
    assert "No such option '--bogus' before the command" in cli.fails(2, "--bogus")


def test_who_wants_the_log_as_json_is_told_how(cli: Cli) -> None:
    assert "No such option '--json', it is --log-form json here" in cli("run", "--json").err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("statu",), "No such command 'statu', did you mean status? (see pi-reconciler --help)"),
        (("st",), "No such command 'st' (see pi-reconciler --help)"),
        (("start", "x"), "No such command 'start', it is spawn here (see pi-reconciler --help)"),
        (("help",), "No such command 'help', it is --help here (see pi-reconciler --help)"),
        (
            ("service", "start"),
            "No such command 'start', systemd has it: systemctl --user start pi-reconciler (see pi",
        ),
        (("service", "logs"), "systemd has it: journalctl --user -u pi-reconciler (see pi-reconc"),
        (("service", "bogus"), "No such command 'bogus' (see pi-reconciler service --help)"),
        (("--jsn", "ls"), "No such option '--jsn' before the command (see pi-reconciler --help)"),
        (("ls", "--jsn"), "No such option '--jsn'. Did you mean '--json'? (see pi-reconciler ls"),
        (("logs", "x", "-n"), "Option '-n' requires an argument (see pi-reconciler logs --help)"),
        (("-V",), "'-V' before the command, the version is --version (see pi-reconciler --help)"),
        (("logs", "x", "--tail", "3"), "No such option '--tail', it is -n here (see pi-rec"),
        (("stop", "x", "-t", "3"), "'-t', how long SIGKILL waits is the setting ladder.term_grace"),
        (("restart", "-t", "3", "x"), "'-t', how long SIGKILL waits is the setting ladder.term_gr"),
        (("spawn", "x", "pi", "--mode", "rpc"), ", what is meant for the agent goes after -- (see"),
        (("spawn", "--jsn"), "'--json'?), what is meant for the agent goes after -- (see"),
        (("spawn", "x", "cat"), "argument (cat), the agent's command goes after -- (see pi-recon"),
        (("status", "demo"), "argument (demo), of one session pi-reconciler inspect tells (see"),
        (("events", "--since", "1h"), "No such option '--since'"),
        (("completion",), "Choose from: bash, zsh, fish (see pi-reconciler completion --help)"),
    ],
)
def test_who_mistypes_is_told_what_there_is(
    cli: Cli, arguments: tuple[str, ...], words: str
) -> None:
    told = cli.fails(2, *arguments)
    assert words in told
    assert told.count("\n") == 1


def test_what_it_is_called_elsewhere_leads_to_what_is_here() -> None:
    """And what is here is not called something else."""
    here = set(group.list_commands(click.Context(group))) | {"--{}"}
    assert {re.split("[ ,]", meant)[0] for meant in _ELSEWHERE.values()} <= here
    assert not _ELSEWHERE.keys() & (here | _ALIASES.keys())


def test_what_an_option_is_called_elsewhere_is_none_here() -> None:
    for name in _OPTIONS_ELSEWHERE.keys() | _ARGUMENTS_ELSEWHERE.keys():
        command, _, option = name.partition(" ")
        found = group.get_command(click.Context(group), command) if command != "cli" else group
        assert found is not None, command
        assert option not in {each for it in found.params for each in it.opts}, name


LOST = re.compile(rb"pi-reconciler: \d+ log lines could not be written before the end\n")
"""A log is not the work: who loses it says so at the end, and ends well."""


@pytest.mark.parametrize("command", [("ls",), ("ls", "--json"), ("--help",), ("run", "--once")])
def test_output_that_nobody_reads_is_no_traceback(cli: Cli, command: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with cli.started(*command, stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        _, err = process.communicate(timeout=WAIT)
    if command[0] == "run":
        assert (process.returncode, LOST.fullmatch(err) is not None) == (0, True), err
    else:
        assert (process.returncode, err) == (1, b"")


@pytest.mark.parametrize("command", [("ls",), ("run", "--once")])
def test_output_onto_a_full_disk_is_no_traceback(cli: Cli, command: tuple[str, ...]) -> None:
    with (
        open("/dev/full", "wb") as full,
        cli.started(*command, stdout=full, stderr=subprocess.PIPE) as process,
    ):
        _, err = process.communicate(timeout=WAIT)
    if command == ("ls",):
        assert (process.returncode, err) == (
            1,
            b"pi-reconciler: No space left on device\n",
        )
    else:
        assert (process.returncode, LOST.fullmatch(err) is not None) == (0, True), err


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_spawn_that_cannot_tell_its_session_names_it_all_the_same(
    cli: Cli, form: tuple[str, ...]
) -> None:
    command = ("spawn", "demo", *form, "--", "cat")
    with (
        open("/dev/full", "wb") as full,
        cli.started(*command, stdout=full, stderr=subprocess.PIPE) as process,
    ):
        _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    assert err == (
        b"pi-reconciler: session demo was started, but it could not be told on standard output: "
        b"No space left on device\n"
    )
    assert [row["sid"] for row in cli("ls", "--json").json] == ["demo"]


@pytest.mark.parametrize("command", ["ls", "ls --json", "run --once", "inspect none", "--help"])
def test_closed_standard_streams_are_no_traceback(cli: Cli, command: str) -> None:
    shell = f"{sys.executable} -m reconciler {command} >&-; echo $?"
    done = subprocess.run(
        ["sh", "-c", shell], env=cli.env, capture_output=True, timeout=WAIT, check=True
    )
    assert done.stdout == (b"3\n" if "none" in command else b"0\n")
    assert done.stderr.count(b"\n") == ("none" in command)


def test_run_goes_on_when_the_reader_of_its_log_dies(cli: Cli) -> None:
    with cli.started("run", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as daemon:
        lines_of(daemon, "reconciler.started")
        assert daemon.stdout is not None
        daemon.stdout.close()
        for sid in ("a", "b"):
            stale_pair(cli.folder, sid)
            until(lambda: not list(cli.folder.glob("*.rpc.sock*")), "the files are cleaned")
        daemon.terminate()
        assert daemon.stderr is not None
        assert LOST.fullmatch(daemon.stderr.read())
        assert daemon.wait(WAIT) == 0


def test_an_interrupted_command_ends_in_one_line(cli: Cli, tmp_path: Path) -> None:
    cli.spawn("demo", *recorder(tmp_path / "got"))
    reading, writing = os.pipe()
    with (
        open(writing, "wb", buffering=0) as typing,
        cli.started("write", "demo", "-", stdin=reading, stderr=subprocess.PIPE) as process,
    ):
        os.close(reading)
        typing.write(f"{LINE}\n".encode())
        until((tmp_path / "got").read_text, "the agent has the first line")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert err == b"pi-reconciler: interrupted\n"


def test_quiet_leaves_data_and_errors(cli: Cli) -> None:
    cli.spawn("demo")
    assert cli("ls", "--quiet").out.splitlines()[1].split()[:2] == ["demo", "ready"]
    done = cli("-q", "stop", "demo")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert cli.fails(3, "stop", "demo", "-q").startswith("pi-reconciler: no session demo")
    shutil.rmtree(cli.folder)
    assert cli("ls").err == f"pi-reconciler: there is no folder {cli.folder}\n"
    assert cli("ls", "-q").err == ""


def test_debug_shows_where_any_error_came_up(cli: Cli) -> None:
    told = subprocess.run(
        [*PROGRAM, "--debug", "inspect", "demo"],
        env=cli.env,
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    assert "Traceback" in told
    assert told.splitlines()[-1].startswith("pi-reconciler: no session demo")


def test_a_defect_is_one_line_too_and_a_variable_shows_where(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import reconciler.layout\n"
        "def broken(*_): raise KeyError('two\\nlines')\n"
        "reconciler.layout.check_sid = broken\n"
    )
    cli.env["PYTHONPATH"] = f"{tmp_path}:{cli.env['PYTHONPATH']}"
    told = cli.fails(1, "write", "a", LINE)
    assert told.startswith("pi-reconciler: a defect: KeyError: ")
    cli.env["PI_RECONCILER_DEBUG"] = "1"
    done = subprocess.run(
        [*PROGRAM, "write", "a", LINE], env=cli.env, capture_output=True, check=False
    )
    assert b"Traceback" in done.stderr


def test_a_recycled_pid_is_cleaned_and_its_process_lives(cli: Cli, innocent: int) -> None:
    stale_pair(cli.folder, "old")
    (cli.folder / "old.rpc.sock.pid").write_text(str(innocent))
    shown = cli("inspect", "old").out
    assert "recycled" in shown
    assert cli("stop", "old").code == 0
    assert alive(innocent)
