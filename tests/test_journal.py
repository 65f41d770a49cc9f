"""The journal's protocol, to a socket of the test's and to a real systemd-journald."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import WAIT, root, until

from reconciler.journal import entry, to_journal
from reconciler.log_lines import LONGEST
from reconciler.logs import LogSettings, flush, make_logger, open_log
from reconciler.sinks import SinkError

ROOT = Path(__file__).parent.parent
JOURNALD = Path("/usr/lib/systemd/systemd-journald")


def fields(data: bytes) -> list[tuple[str, str]]:
    """An entry, read as the protocol's page says."""
    found = []
    while data:
        name, _, rest = data.partition(b"\n")
        if b"=" in name:
            name, _, value = name.partition(b"=")
            data = rest
        else:
            size = int.from_bytes(rest[:8], "little")
            value, data = rest[8 : 8 + size], rest[8 + size :]
            assert data[:1] == b"\n"
            data = data[1:]
        found.append((name.decode(), value.decode()))
    return found


# -- What an entry says -----------------------------------------------------------------------


def test_an_entry_is_for_a_persons_eyes_and_for_queries() -> None:
    line = {
        "timestamp": "2026-03-01T09:12:01.000000Z",
        "level": "warning",
        "severity_number": 13,
        "event": "session.leftovers",
        "sid": "demo",
        "keeper_pid": None,
        "reason": "what it started lives on",
        "leftovers": ["4801 sleep", "4802 cat"],
        "duration_ms": 1.5,
        "dry_run": False,
        "exception": "one\ntwo=2\n",
    }
    assert fields(entry(line)) == [
        ("MESSAGE", "session.leftovers demo what it started lives on"),
        ("PRIORITY", "4"),
        ("SYSLOG_IDENTIFIER", "pi-reconciler"),
        ("PI_RECONCILER_TIMESTAMP", "2026-03-01T09:12:01.000000Z"),
        ("PI_RECONCILER_LEVEL", "warning"),
        ("PI_RECONCILER_SEVERITY_NUMBER", "13"),
        ("PI_RECONCILER_EVENT", "session.leftovers"),
        ("PI_RECONCILER_SID", "demo"),
        ("PI_RECONCILER_REASON", "what it started lives on"),
        ("PI_RECONCILER_LEFTOVERS", "4801 sleep"),
        ("PI_RECONCILER_LEFTOVERS", "4802 cat"),
        ("PI_RECONCILER_DURATION_MS", "1.5"),
        ("PI_RECONCILER_DRY_RUN", "false"),
        ("PI_RECONCILER_EXCEPTION", "one\ntwo=2\n"),
    ]


def test_names_of_fields_are_those_that_the_journal_takes() -> None:
    (*_, odd, long) = fields(entry({"level": "debug", "ü b=c\n": 1, "k" * 100: 2}))
    assert odd == ("PI_RECONCILER___B_C_", "1")
    assert long == (f"PI_RECONCILER_{'K' * 50}", "2")


# -- To a socket ------------------------------------------------------------------------------


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket that stands for the journal's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "socket"))
        made.settimeout(WAIT)
        yield made


def test_each_line_is_one_datagram(listener: socket.socket) -> None:
    log = make_logger(to_journal(listener.getsockname()))
    log.info("event.name", number=1)
    log.error("event.name", number=2, text="x" * 2 * LONGEST)
    first, second = (dict(fields(listener.recv(1 << 20))) for _ in range(2))
    assert (first["PRIORITY"], first["PI_RECONCILER_NUMBER"]) == ("6", "1")
    assert (second["PRIORITY"], second["PI_RECONCILER_NUMBER"]) == ("3", "2")
    assert len(second["PI_RECONCILER_TEXT"]) < LONGEST


def test_what_is_too_large_for_a_datagram_goes_as_a_sealed_file(listener: socket.socket) -> None:
    sink = to_journal(listener.getsockname())
    assert sink._writer is not None
    target = sink._writer.target
    target._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # type: ignore[attr-defined]
    log = make_logger(sink)
    log.info("event.name", text="x" * 7000)
    data, descriptors, _, _ = socket.recv_fds(listener, 1 << 20, 1)
    assert data == b""
    (descriptor,) = descriptors
    with open(descriptor, "r+b") as file:
        assert dict(fields(os.pread(descriptor, 1 << 20, 0)))["PI_RECONCILER_TEXT"] == "x" * 7000
        with pytest.raises(PermissionError):
            file.truncate(0)


def test_a_journal_that_goes_away_drops_and_counts_until_it_is_back(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as first:
        first.bind(path)
        log = make_logger(to_journal(path))
        log.info("event.name", number=0)
        assert flush(WAIT) == 0
    log.info("event.name", number=1)
    assert flush(WAIT) == 0
    os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as second:
        second.bind(path)
        second.settimeout(WAIT)
        log.info("event.name", number=2)
        told = dict(fields(second.recv(1 << 20)))
    assert (told["PI_RECONCILER_NUMBER"], told["PI_RECONCILER_LINES_DROPPED"]) == ("2", "1")
    assert told["PI_RECONCILER_LOG_TROUBLE"] == "the journal: Connection refused"


def test_without_a_journal_it_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(
        SinkError, match=r"the journal cannot be reached at .*: No such file .*: set"
    ):
        to_journal(str(tmp_path / "none"))


@pytest.mark.parametrize("form", ["ecs", "console"])
def test_the_journal_has_fields_in_place_of_a_form(form: Any) -> None:  # noqa: ANN401 - a literal
    with pytest.raises(SinkError, match=f"log.form is '{form}', and log.sink is 'journald'"):
        open_log(LogSettings(sink="journald", form=form), None)


# -- The real one -----------------------------------------------------------------------------


class Journald:
    """A systemd-journald with a /run of its own, set up by the file that is published."""

    SETUP = """
    mount -t tmpfs none /run && mount -t tmpfs none /etc/systemd && mount -t tmpfs none /var/log
    mkdir -p /run/systemd/journal /run/log/journal /var/log/journal /etc/systemd/journald.conf.d
    printf '[Journal]\\nReadKMsg=no\\n' > /etc/systemd/journald.conf
    cp "$1" /etc/systemd/journald.conf.d/pi-reconciler.conf
    exec "$2"
    """

    def __init__(self) -> None:
        config = ROOT / "config" / "shipping" / "journald.conf"
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", self.SETUP, "sh"]
        self._process = subprocess.Popen([*command, config, JOURNALD], stderr=subprocess.PIPE)
        self._enter = ["nsenter", f"--mount=/proc/{self._process.pid}/ns/mnt", f"--wdns={ROOT}"]
        inside = Path(f"/proc/{self._process.pid}/root/run/systemd/journal/stdout")
        until(lambda: inside.exists() or self._process.poll() is not None, "journald listens")

    def run(self, *command: object) -> str:
        """Run a program where the system's journal is this one; what it says."""
        done = subprocess.run(
            [*self._enter, *map(str, command)],
            check=True,
            capture_output=True,
            text=True,
            timeout=WAIT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        return done.stdout

    def query(self, *arguments: str) -> list[dict[str, Any]]:
        """What journalctl finds."""
        self.run("journalctl", "--sync")
        folders = self.run("sh", "-c", "ls -d /run/log/journal/*/ /var/log/journal/*/ 2>&-; true")
        where = [f"--directory={folder}" for folder in folders.split()][-1:]
        out = self.run("journalctl", *where, "--no-pager", "-o", "json", *arguments)
        return [json.loads(line) for line in out.splitlines()]

    def end(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=WAIT)


@pytest.fixture
def journald() -> Iterator[Journald]:
    if not (JOURNALD.exists() and shutil.which("journalctl")):
        assert not os.environ.get("CI"), "CI must have systemd-journald: make tools"
        pytest.skip("needs systemd-journald: make tools")
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    made = Journald()
    yield made
    made.end()


@root
def test_a_real_journald_has_each_field_and_its_priorities(journald: Journald) -> None:
    code = (
        "from reconciler.logs import LogSettings, flush, open_log\n"
        "log = open_log(LogSettings(sink='journald', level='debug'), None)\n"
        "log.debug('event.name', number=0)\n"
        "log.warning('session.leftovers', sid='demo', leftovers=['1 a', '2 b'], nothing=None)\n"
        "log.error('session.failed', sid='demo', exception='one\\ntwo', text='ü' * 9000)\n"
        "assert flush(20) == 0\n"
    )
    journald.run(sys.executable, "-c", code)
    first, second, third = journald.query("SYSLOG_IDENTIFIER=pi-reconciler")
    assert [each["PRIORITY"] for each in (first, second, third)] == ["7", "4", "3"]
    assert second["MESSAGE"] == "session.leftovers demo"
    assert second["PI_RECONCILER_LEFTOVERS"] == ["1 a", "2 b"]
    assert "PI_RECONCILER_NOTHING" not in second
    assert third["PI_RECONCILER_EXCEPTION"] == "one\ntwo"
    assert int(third["PI_RECONCILER_TRUNCATED"]) > 10_000
    assert len(journald.query("PI_RECONCILER_SID=demo", "-p", "warning")) == 2
    assert len(journald.query("PI_RECONCILER_SID=demo", "PI_RECONCILER_EVENT=session.failed")) == 1


@root
def test_a_real_journald_gets_every_line_of_a_flood_in_its_order(journald: Journald) -> None:
    code = (
        "from reconciler.logs import LogSettings, flush, open_log\n"
        "log = open_log(LogSettings(sink='journald'), None)\n"
        "for number in range(3000): log.info('event.name', number=number)\n"
        "assert flush(20) == 0\n"
    )
    journald.run(sys.executable, "-c", code)
    entries = journald.query("PI_RECONCILER_EVENT=event.name")
    assert [int(each["PI_RECONCILER_NUMBER"]) for each in entries] == list(range(3000))


@root
def test_the_program_as_a_service_gives_its_lines_priorities_on_standard_output(
    journald: Journald, tmp_path: Path
) -> None:
    """The stream is made by systemd-cat, and told of as by the service manager."""
    (tmp_path / "bad.rpc.sock.pid").symlink_to("/dev/null")
    program = [sys.executable, "-m", "reconciler", "run", "--once", "--sessions-dir", tmp_path]
    told = 'JOURNAL_STREAM=$(stat -L -c %d:%i /proc/$$/fd/1) && export JOURNAL_STREAM && exec "$@"'
    stream = ["systemd-cat", "--identifier=service", "--level-prefix=true"]
    journald.run(*stream, "sh", "-ec", told, "sh", *program)
    lines = journald.query("SYSLOG_IDENTIFIER=service")
    levels = {json.loads(line["MESSAGE"])["event"]: line["PRIORITY"] for line in lines}
    assert levels["session.refused"] == "4"
    assert levels["reconciler.started"] == levels["reconciler.stopped"] == "6"


@root
def test_the_program_with_journald_as_its_sink(journald: Journald, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "reconciler", "run", "--once", "--sessions-dir", tmp_path]
    assert journald.run(*program, "--log-sink", "journald") == ""
    events = [
        line["PI_RECONCILER_EVENT"] for line in journald.query("SYSLOG_IDENTIFIER=pi-reconciler")
    ]
    assert events == ["reconciler.started", "reconciler.stopped"]
