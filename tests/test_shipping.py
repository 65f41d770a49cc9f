"""Files for log shippers: rsyslog and logrotate are run, of the others the syntax is checked."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # its stubs are a package of their own
from conftest import WAIT, until

from reconciler.log_files import to_file
from reconciler.logs import flush, make_logger

CONFIG = Path(__file__).parent.parent / "config" / "shipping"
LOG = "/var/log/pi-reconciler/pi-reconciler.log"
"""The log's path in every configuration."""


def tool(name: str) -> str:
    """A program of the system; without it the test is skipped, in CI it fails."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        assert not os.environ.get("CI"), f"CI must have {name}: make tools"
        pytest.skip(f"needs {name}: make tools")
    return found


class Server:
    """Takes what rsyslog forwards: one JSON object a line."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._taken = bytearray()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        with client:
            while data := client.recv(1 << 16):
                self._taken += data

    def wait_for(self, count: int) -> list[dict[str, Any]]:
        until(lambda: self._taken.count(b"\n") >= count, f"{count} lines have arrived")
        *whole, _ = bytes(self._taken).split(b"\n")
        return [json.loads(line) for line in whole]

    def close(self) -> None:
        self._listener.close()


class Rsyslog:
    """A real rsyslogd, on the file that is published."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.server = Server()
        text = (CONFIG / "rsyslog.conf").read_text()
        here = {LOG: str(log), "logs.example.com": "127.0.0.1", "5140": str(self.server.port)}
        for there, ours in here.items():
            assert there in text
            text = text.replace(there, ours)
        config = folder / "rsyslog.conf"
        config.write_text(f'global(workDirectory="{folder}")\n{text}')
        command = [tool("rsyslogd"), "-f", str(config)]
        subprocess.run([*command, "-N1"], check=True, capture_output=True, timeout=WAIT)
        self._process = subprocess.Popen([*command, "-n", "-i", str(folder / "pid")])

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(WAIT)
        self.server.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    return folder / "pi-reconciler.log"


@pytest.fixture
def rsyslog(tmp_path: Path, path: Path) -> Iterator[Rsyslog]:
    tool("rsyslogd")
    made = Rsyslog(tmp_path, path)
    yield made
    made.end()


def test_rsyslog_forwards_every_line_parsed_and_once_through_renames_under_load(
    rsyslog: Rsyslog, path: Path
) -> None:
    log = make_logger(to_file(path))
    log.info("event.name", number=0)
    rsyslog.server.wait_for(1)  # it follows the file
    most, renamed = 6000, 0
    for number in range(1, most):
        log.info(
            "event.name", number=number, sid="ü", ratio=0.5, none=None, text="x" * (number % 900)
        )
        if number % 1000 == 500:
            path.rename(path.with_name(f"{path.name}.{renamed}"))
            renamed += 1
            log.info("event.renamed", number=-renamed)
            until(path.exists, "the line after it has come")
            rsyslog.server.wait_for(
                number - 400
            )  # it keeps up: a file that it never saw is not read
    assert flush(WAIT) == 0
    lines = rsyslog.server.wait_for(most + renamed)
    assert sorted(line["number"] for line in lines) == [*range(-renamed, 0), *range(most)]
    (line,) = (line for line in lines if line["number"] == 599)
    assert line | {"timestamp": ""} == {
        "timestamp": "",
        "level": "info",
        "severity_number": 9,
        "event": "event.name",
        "sid": "ü",
        "number": 599,
        "ratio": 0.5,
        "none": None,
        "text": "x" * 599,
    }


def test_rsyslog_takes_the_longest_line_whole(rsyslog: Rsyslog, path: Path) -> None:
    log = make_logger(to_file(path))
    log.info("event.name", text="x" * 20_000, number=1)
    (line,) = rsyslog.server.wait_for(1)
    assert line["number"] == 1
    assert len(path.read_bytes()) > 7990
    assert line == json.loads(path.read_text())


def test_logrotate_renames_the_file_and_every_line_is_in_one_of_them(
    tmp_path: Path, path: Path
) -> None:
    program = tool("logrotate")
    config = tmp_path / "logrotate.conf"
    text = (CONFIG / "logrotate.conf").read_text()
    assert LOG in text
    assert "50M" in text
    config.write_text(text.replace(LOG, str(path)).replace("50M", "1"))
    config.chmod(0o600)
    log = make_logger(to_file(path))
    for number in range(600):
        log.info("event.name", number=number)
        if number % 200 == 100:
            until(lambda: path.exists() and path.stat().st_size, "lines are in it")
            subprocess.run([program, "-s", tmp_path / "state", config], check=True, timeout=WAIT)
    assert flush(WAIT) == 0
    files = sorted(path.parent.iterdir(), reverse=True)
    assert [file.name.removeprefix(path.name) for file in files] == [".3.gz", ".2.gz", ".1", ""]
    text = "".join(
        subprocess.run(["gzip", "-dcf", file], check=True, capture_output=True, text=True).stdout
        for file in files
    )
    assert [json.loads(line)["number"] for line in text.splitlines()] == list(range(600))


# -- Those that cannot be run here ------------------------------------------------------------


def test_vectors_file_is_toml_whose_parts_are_joined() -> None:
    said = tomllib.loads((CONFIG / "vector.toml").read_text())
    names = said["sources"].keys() | said["transforms"].keys()
    assert said["sources"]["pi_reconciler"]["include"] == [LOG]
    for part in (*said["transforms"].values(), *said["sinks"].values()):
        assert set(part["inputs"]) <= names
    assert "timestamp" in said["transforms"]["pi_reconciler_parsed"]["source"]


def test_fluent_bits_file_is_yaml_whose_parts_are_joined() -> None:
    said = yaml.safe_load((CONFIG / "fluent-bit.yaml").read_text())
    (source,), (target,) = said["pipeline"]["inputs"], said["pipeline"]["outputs"]
    assert source["path"] == LOG
    assert source["tag"] == target["match"]
    assert source["parser"] in [parser["name"] for parser in said["parsers"]]


ALLOY = re.compile(
    r"""(?P<skip>\s+|//[^\n]*)|(?P<text>"(?:[^"\\\n]|\\.)*")|(?P<name>[A-Za-z_][\w.]*)"""
    r"""|(?P<mark>[][{}(),=])"""
)


def test_alloys_file_has_its_brackets_and_quotes_and_joined_parts() -> None:
    text = (CONFIG / "alloy.alloy").read_text()
    at, opened, parts, used = 0, [], set(), set()
    words: list[str] = []
    while at < len(text):
        found = ALLOY.match(text, at)
        assert found, text[at : at + 40]
        at = found.end()
        word = found[0]
        if found["mark"] and word in "[{(":
            if word == "{" and words[-1].startswith('"') and words[-2] != "=":
                parts.add(f"{words[-2]}.{json.loads(words[-1])}")
            opened.append(word)
        elif found["mark"] and word in "]})":
            assert opened.pop() + word in ("[]", "{}", "()")
        elif found["name"] and word.endswith((".receiver", ".targets")):
            used.add(word.rpartition(".")[0])
        if not found["skip"]:
            words.append(word)
    assert not opened
    assert LOG in text
    assert used <= parts
    assert len(parts) == 4


def test_each_file_says_whether_it_was_run() -> None:
    run = {"rsyslog.conf", "logrotate.conf", "journald.conf"}
    files = {path.name: path.read_text().replace("\n#", "") for path in CONFIG.iterdir()}
    assert run < files.keys()
    for name, text in files.items():
        told = "NOT RUN in this project's tests" not in text
        assert told == (name in run), name
        assert (" in this project's tests" in text) or name in run
