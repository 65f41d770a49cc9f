"""`service`, with stand-ins for systemctl and launchctl that note what they are asked.

tests/test_service_systemd.py runs the same with systemd itself.
"""

from __future__ import annotations

import json
import os
import plistlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest
from conftest import PROGRAM, WAIT

from reconciler.cli import cli as group
from reconciler.errors import InvalidRequestError
from reconciler.managers import (
    LABEL,
    UNIT,
    Launchd,
    Systemd,
    lingers,
    manager,
    systemd_word,
    unit_text,
)
from reconciler.service import (
    Remove,
    Run,
    Running,
    ServiceError,
    Wanted,
    Write,
    is_ours,
    signed,
    this_program,
)

STAND_IN = """#!/bin/sh
echo "$0 $*" >> {log}
[ -e {answer} ] && cat {answer}
[ -e {fails} ] && {{ cat {fails} >&2; exit 1; }}
exit 0
"""


class Place:
    """A user's home, with a stand-in for a service manager's command."""

    def __init__(self, home: Path, command: str = "systemctl") -> None:
        self.home = home
        self.unit = home / ".config" / "systemd" / "user" / UNIT
        self.hardened = self.unit.with_name(f"{UNIT}.d") / "hardened.conf"
        self.answer, self.fails, self._log = home / "answer", home / "fails", home / "log"
        program = home / "bin" / command
        program.parent.mkdir()
        program.write_text(STAND_IN.format(log=self._log, answer=self.answer, fails=self.fails))
        program.chmod(0o755)
        self.path = f"{program.parent}:{os.environ['PATH']}"

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROGRAM, "service", *arguments],
            env={
                "HOME": str(self.home),
                "PATH": self.path,
                "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
                **environ,
            },
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )

    def asked(self) -> list[str]:
        """What the stand-in was asked since the last time."""
        if not self._log.exists():
            return []
        lines = self._log.read_text().splitlines()
        self._log.unlink()
        return [line.partition(" ")[2] for line in lines]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


ASKED = "--user show --property Version"
UP = [ASKED, "--user daemon-reload", f"--user enable {UNIT}", f"--user restart {UNIT}"]


def test_install_writes_the_unit_starts_it_and_does_no_more_the_second_time(place: Place) -> None:
    done = place.run("install")
    assert done.returncode == 0, done.stderr
    text = place.unit.read_text()
    assert is_ours(text)
    assert (
        f"ExecStart={Path(sys.executable).absolute()} -m reconciler run --log-form json\n" in text
    )
    assert place.unit.stat().st_mode & 0o777 == 0o644
    assert place.asked() == UP
    assert "loginctl enable-linger" in done.stderr
    before = place.unit.stat()
    assert place.run("install").returncode == 0
    assert place.unit.stat() == before
    assert place.asked() == UP, "the program may be a new one"
    assert [each.name for each in place.unit.parent.iterdir()] == [UNIT]


def test_a_dry_run_shows_all_of_it_and_does_nothing(place: Place) -> None:
    done = place.run("install", "--dry-run", "--hardened")
    assert done.returncode == 0
    assert f"would write {place.unit}\n" in done.stdout
    assert "    Type=notify\n" in done.stdout
    assert f"would write {place.hardened}\n" in done.stdout
    assert f"would run systemctl --user restart {UNIT}\n" in done.stdout
    assert not place.unit.parent.exists()
    assert place.asked() == []


def test_what_it_is_told_goes_into_the_unit(place: Place) -> None:
    config = place.home / "my settings.toml"
    config.touch()
    done = place.run(
        *("install", "--sessions-dir", "100% mine", "--config", str(config)),
        PI_RECONCILER_RESYNC="30",
    )
    assert done.returncode == 0, done.stderr
    line = next(
        each for each in place.unit.read_text().splitlines() if each.startswith("ExecStart")
    )
    assert f'--sessions-dir "{Path.cwd()}/100%% mine" --config "{config}"' in line
    assert "a service does not get PI_RECONCILER_RESYNC" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "folder"),
    [
        ("PI_DASHBOARD_HOME", "/srv/pi", "/srv/pi/.pi/dashboard/sessions"),
        ("PI_RECONCILER_SESSIONS_DIR", "/srv/sessions", "/srv/sessions"),
    ],
)
@pytest.mark.parametrize("file", ["", 'sessions_dir = "/srv/by-file"'], ids=["no file", "file"])
def test_a_folder_that_a_variable_names_is_one_that_a_service_has_to_be_told(
    place: Place, variable: str, value: str, folder: str, file: str
) -> None:
    config = place.home / ".config" / "pi-reconciler" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(file)
    assert place.run("install", **{variable: value}).returncode == 0
    beats = not file or variable != "PI_DASHBOARD_HOME"
    told = re.findall(r"^ExecStart=.*--sessions-dir (\S+)", place.unit.read_text(), re.MULTILINE)
    assert told == ([folder] if beats else []), "what the file says a service knows by itself"


def test_settings_that_are_no_good_hinder_nobody_who_asks_or_uninstalls(place: Place) -> None:
    assert place.run("install").returncode == 0
    place.answer.write_text("LoadState=loaded\nActiveState=active\n")
    assert place.run("install", PI_RECONCILER_RESYNC="never").returncode == 78
    assert place.run("status", PI_RECONCILER_RESYNC="never").returncode == 0
    done = place.run("uninstall", PI_RECONCILER_RESYNC="never")
    assert done.returncode == 0, done.stderr
    assert not place.unit.exists()


def test_settings_that_only_this_shell_finds_are_named(place: Place) -> None:
    config = place.home / "mine" / "pi-reconciler" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("resync = 30")
    done = place.run("install", "--dry-run", XDG_CONFIG_HOME=str(place.home / "mine"))
    assert f"run --log-form json --config {config}\n" in done.stdout, done.stderr


def test_hardening_comes_and_goes(place: Place) -> None:
    assert place.run("install", "--hardened").returncode == 0
    assert "NoNewPrivileges=yes" in place.hardened.read_text()
    place.asked()
    assert place.run("install").returncode == 0
    assert not place.hardened.exists()
    assert place.asked() == UP


@pytest.mark.parametrize("command", ["install", "uninstall"])
@pytest.mark.parametrize("how", ["another's", "changed", "masked"])
def test_a_unit_that_it_did_not_write_is_left_alone_unless_forced(
    place: Place, command: str, how: str
) -> None:
    place.unit.parent.mkdir(parents=True)
    if how == "masked":
        place.unit.symlink_to("/dev/null")
    elif how == "changed":
        place.unit.write_text(signed("[Service]\nExecStart=x\n").replace("=x", "=y"))
    else:
        place.unit.write_text("[Service]\nExecStart=/usr/bin/other\n")
    done = place.run(command)
    assert done.returncode == 1
    assert "was not written by pi-reconciler service install" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert place.unit.is_symlink() == (how == "masked")
    assert place.asked() == []
    assert place.run(command, "--force").returncode == 0
    if command == "install":
        assert not place.unit.is_symlink()
        assert is_ours(place.unit.read_text())
    else:
        assert not os.path.lexists(place.unit)


def test_uninstall_stops_it_removes_it_and_is_content_when_it_is_gone(place: Place) -> None:
    place.run("install", "--hardened")
    place.asked()
    assert "would remove" in place.run("uninstall", "--dry-run").stdout
    assert place.unit.exists()
    done = place.run("uninstall")
    assert done.returncode == 0, done.stderr
    assert not place.unit.exists()
    assert not place.hardened.exists()
    assert place.asked() == [f"--user disable --now {UNIT}", "--user daemon-reload"]
    again = place.run("uninstall")
    assert (again.returncode, again.stderr) == (0, "pi-reconciler: it is not installed\n")
    assert place.asked() == []


def test_where_no_manager_answers_its_files_go_only_by_force(place: Place) -> None:
    place.run("install")
    place.fails.write_text("Failed to connect to bus: No medium found\n")
    done = place.run("uninstall")
    assert done.returncode == 1
    assert "disable --now" in done.stderr
    assert "Failed to connect to bus: No medium found" in done.stderr
    assert place.unit.exists(), "it may be running"
    assert place.run("uninstall", "--force").returncode == 0
    assert not place.unit.exists()


def test_where_no_manager_answers_nothing_is_written(place: Place) -> None:
    place.fails.write_text("Failed to connect to bus: No medium found\n")
    done = place.run("install")
    assert done.returncode == 1
    assert done.stderr == (
        "pi-reconciler: systemctl --user show --property Version: "
        "Failed to connect to bus: No medium found "
        "(no systemd of your user runs here: log in, not by su; or use pi-reconciler run)\n"
    )
    assert place.asked() == [ASKED]
    assert not place.unit.parent.exists()


@pytest.mark.parametrize(
    ("answer", "code", "word"),
    [
        ("LoadState=loaded\nActiveState=active\nMainPID=7\nStatusText=2 ready", 0, "running"),
        ("LoadState=loaded\nActiveState=reloading", 0, "running"),
        ("LoadState=loaded\nActiveState=inactive", 3, "not running"),
        ("LoadState=loaded\nActiveState=failed", 3, "not running"),
        ("LoadState=loaded\nActiveState=activating", 3, "not running"),
        ("LoadState=not-found\nActiveState=inactive", 4, "not known"),
        ("LoadState=masked\nActiveState=inactive", 4, "not known"),
        ("", 4, "not known"),
    ],
)
def test_the_status_ends_as_systemctls_does(
    place: Place, answer: str, code: int, word: str
) -> None:
    place.answer.write_text(answer)
    done = place.run("status", "--json")
    assert done.returncode == code
    told = json.loads(done.stdout)
    assert list(told) == ["state", "reason", "pid", "started_at", "uptime_s", "manager"]
    assert told["state"] == word.replace(" ", "_")
    assert told["pid"] == (7 if "MainPID=7" in answer else None)
    assert told["manager"] == dict(line.split("=", 1) for line in answer.splitlines())
    table = place.run("status")
    assert table.returncode == code
    head = f"{word}: {told['reason']}" if code else word
    assert table.stdout.splitlines()[0] == head


def test_since_when_it_runs_is_told_as_status_tells_it(place: Place) -> None:
    began = time.monotonic() - 100
    place.answer.write_text(
        f"LoadState=loaded\nActiveState=active\nActiveEnterTimestampMonotonic={int(began * 1e6)}\n"
    )
    told = json.loads(place.run("status", "--json").stdout)
    assert 100 <= told["uptime_s"] <= time.monotonic() - began
    since = datetime.now(UTC) - datetime.fromisoformat(told["started_at"])
    assert since.total_seconds() >= 99
    assert told["started_at"].endswith("Z")


def test_a_manager_that_cannot_be_asked_is_not_known(place: Place) -> None:
    place.fails.write_text("Failed to connect to bus\n")
    done = place.run("status")
    assert done.returncode == 4
    assert done.stdout == "not known: Failed to connect to bus\n"
    place.path = str(place.home)
    assert place.run("status").returncode == 4
    done = place.run("install")
    assert done.returncode == 1
    assert "systemctl is not there, so no service can be had" in done.stderr
    assert not place.unit.parent.exists()


def test_every_command_of_the_pages_is_understood() -> None:
    docs = Path(__file__).parent.parent / "docs"
    text = (docs / "service.md").read_text() + (docs / "metrics.md").read_text()
    blocks = "".join(re.findall(r"^```(?:sh|console)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    commands = {
        *re.findall(r"`(pi-reconciler [^`\n]*)`", text),
        *re.findall(r"^\$? ?(pi-reconciler .*)$", blocks, re.MULTILINE),
    }
    assert len(commands) > 5
    for command in commands:
        _, *words = shlex.split(command.partition(" #")[0])
        with group.make_context("pi-reconciler", words) as context:
            name, found, rest = group.resolve_command(context, words)
            assert found is not None, name
            if isinstance(found, click.Group) and rest:
                _, found, rest = found.resolve_command(context, rest)
            assert found is not None, command
            if rest:  # else it is only spoken of
                found.make_context(command, rest, parent=context)


# -- Words of a unit ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("/usr/bin/pi-reconciler", "/usr/bin/pi-reconciler"),
        ("a b", '"a b"'),
        ("100%", "100%%"),
        ("$HOME", '"$$HOME"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("back\\slash", '"back\\\\slash"'),
        ("", '""'),
        ("; rm", '"; rm"'),
        ("größe", "größe"),
    ],
)
def test_a_word_means_itself(word: str, written: str) -> None:
    assert systemd_word(word) == written


@pytest.mark.parametrize("word", ["two\nlines", "bell\a", "\0"])
def test_a_word_that_no_unit_can_say_is_refused(word: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot stand in a unit"):
        systemd_word(word)


@pytest.mark.parametrize("path", ['/a"b/c', "/a'b/c", "/a\\b/c", "/a\nb"])
def test_a_program_that_systemd_cannot_run_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequestError, match="systemd cannot run"):
        unit_text([path, "run"])


def test_only_the_command_of_the_unit_differs() -> None:
    one, other = unit_text(["/a"]).splitlines(), unit_text(["/b"]).splitlines()
    assert [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]] == [
        ("ExecStart=/a", "ExecStart=/b")
    ]


def test_a_text_is_ours_until_somebody_changes_it() -> None:
    for text in ("[Unit]\n", '<?xml version="1.0"?>\n<plist/>\n'):
        ours = signed(text)
        assert is_ours(ours)
        assert not is_ours(ours + "x")
        assert not is_ours(text)
    assert signed("<?xml?>\n<plist/>\n").startswith("<?xml?>\n<!-- Written by")


def test_this_program_is_found_again(tmp_path: Path) -> None:
    program = tmp_path / "pi-reconciler"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    link = tmp_path / "bin" / "pi-reconciler"
    link.parent.mkdir()
    link.symlink_to(program)
    assert this_program([str(link)]) == (str(link),)
    module = this_program([str(tmp_path / "__main__.py")])
    assert module == (str(Path(sys.executable).absolute()), "-m", "reconciler")


def test_who_lingers(tmp_path: Path) -> None:
    assert not lingers(0, tmp_path)
    (tmp_path / "root").touch()
    assert lingers(0, tmp_path)
    assert not lingers(3_999_999_999, tmp_path)


# -- launchd, which is written for macOS and was not run there ---------------------------------


@pytest.fixture
def launchd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launchd:
    place = Place(tmp_path, "launchctl")
    monkeypatch.setenv("PATH", place.path)
    return Launchd(tmp_path, 501)


WANTED = Wanted(program=("/opt/bin/pi-reconciler",), options=("--sessions-dir", "/a & <b>"))


def commands(steps: Sequence[object]) -> list[str]:
    return [" ".join(each.command[1:]) for each in steps if isinstance(each, Run)]


def test_an_agent_is_written_and_loaded(launchd: Launchd) -> None:
    steps = launchd.install(WANTED, force=False)
    assert commands(steps) == [
        "print gui/501",
        f"bootout gui/501/{LABEL}",
        f"enable gui/501/{LABEL}",
        f"bootstrap gui/501 {launchd.plist}",
    ]
    for step in steps:
        step.do()
    text = launchd.plist.read_text()
    assert is_ours(text)
    agent = plistlib.loads(text.encode())
    assert agent["ProgramArguments"] == list(WANTED.command)
    assert agent["AbandonProcessGroup"] is True
    assert Path(agent["StandardOutPath"]).is_relative_to(launchd.plist.parents[1])
    again = launchd.install(WANTED, force=False)
    assert not [each for each in again if isinstance(each, Write)]
    gone = launchd.uninstall(force=False)
    assert [each for each in gone if isinstance(each, Remove)] == [Remove(launchd.plist)]
    for step in gone:
        step.do()
    assert launchd.uninstall(force=False) == []


def test_an_agent_of_others_is_left_alone(launchd: Launchd) -> None:
    launchd.plist.parent.mkdir(parents=True)
    launchd.plist.write_text("<plist/>")
    with pytest.raises(ServiceError, match="was not written by"):
        launchd.install(WANTED, force=False)
    assert launchd.install(WANTED, force=True)


def test_launchd_cannot_harden(launchd: Launchd) -> None:
    with pytest.raises(InvalidRequestError, match="--hardened is for systemd"):
        launchd.install(Wanted(program=("/x",), hardened=True), force=False)


def test_an_agents_status_is_what_launchctl_prints(launchd: Launchd, tmp_path: Path) -> None:
    (tmp_path / "answer").write_text(
        "gui/501/x = {\n\tpid = 42\n\tstate = running\n\t\tstate = no\n}\n"
    )
    found = launchd.status()
    assert (found.running, found.told) == (Running.YES, {"pid": "42", "state": "running"})
    (tmp_path / "answer").write_text("\tstate = waiting\n")
    assert launchd.status().running is Running.NO
    (tmp_path / "fails").write_text("Could not find service\n")
    assert launchd.status().running is Running.NOT_KNOWN
    launchd.plist.parent.mkdir(parents=True)
    launchd.plist.touch()
    assert launchd.status().running is Running.NO


def test_each_system_has_its_manager(tmp_path: Path) -> None:
    assert isinstance(manager({}, tmp_path, "linux"), Systemd)
    assert isinstance(manager({}, tmp_path, "darwin"), Launchd)
    with pytest.raises(ServiceError, match="no service manager is known on win32"):
        manager({}, tmp_path, "win32")
