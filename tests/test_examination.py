"""What doctor reads: of real folders, programs and processes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import WAIT, as_nobody, asynchronous, bare_socket
from terminal import a_terminal
from test_cli import Cli, cli, lines_of

from reconciler import KeeperManager, Reconciler, examination
from reconciler.diagnoses import Diagnosis, State, ok
from reconciler.examination import CHECKS, Patient, examine
from reconciler.requests import OUR_KEEPER

__all__ = ["cli"]


@pytest.fixture
def patient(folder: Path) -> Patient:
    return Patient(folder, agent=sys.executable, keeper=OUR_KEEPER)


def of(check: str, patient: Patient) -> Diagnosis:
    return CHECKS[check](patient)


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


# -- The folder --------------------------------------------------------------------------------


def test_a_folder_of_ours_is_well(patient: Patient) -> None:
    bare_socket(patient.sessions_dir / "a.rpc.sock")
    (patient.sessions_dir / "keeper-b.log").touch()
    told = of("folder", patient)
    assert (told.state, told.found) == (
        State.OK,
        f"{patient.sessions_dir}, nobody else's, sessions: 1",
    )


def test_a_folder_that_is_not_there_is_not_made(patient: Patient) -> None:
    missing = patient.sessions_dir / "none"
    assert "is not there yet" in of("folder", replace(patient, sessions_dir=missing)).found
    for diagnosis in examine(replace(patient, sessions_dir=missing)):
        assert diagnosis.state is not State.PROBLEM, diagnosis
    assert not missing.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="another user is needed")
def test_a_folder_that_the_user_may_not_make_is_a_problem(patient: Patient) -> None:
    with as_nobody():
        told = of("folder", replace(patient, sessions_dir=Path("/none/sessions")))
    assert (told.state, told.found) == (
        State.PROBLEM,
        "/none/sessions is not there, and you may make none in /",
    )


def test_a_folder_that_others_may_write_to_is_a_problem(patient: Patient) -> None:
    patient.sessions_dir.chmod(0o777)
    told = of("folder", patient)
    assert told.state is State.PROBLEM
    assert "chmod go-w" in told.found


def test_what_is_no_folder_is_a_problem(patient: Patient, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = of("folder", replace(patient, sessions_dir=tmp_path / "file"))
    assert (told.state, told.found) == (
        State.PROBLEM,
        f"{tmp_path / 'file'} cannot be opened: Not a directory",
    )


def test_a_long_path_is_told(patient: Patient, tmp_path: Path) -> None:
    told = of("socket path", replace(patient, sessions_dir=tmp_path / ("x" * 100)))
    assert told.state is State.WARNING


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the kind")
def test_the_filesystem_is_that_of_the_folder_or_the_nearest_above(patient: Patient) -> None:
    told = of("filesystem", replace(patient, sessions_dir=Path("/proc/none/deeper")))
    assert told.found.startswith("proc, ")


# -- The system --------------------------------------------------------------------------------


def test_a_watch_can_be_had(patient: Patient) -> None:
    assert re.fullmatch(r"inotify, \d+ instances, \d+ watches", of("file events", patient).found)


def test_a_process_without_descriptors_is_told(patient: Patient) -> None:
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from reconciler.examination import CHECKS, Patient\n"
        "import reconciler.folder\n"
        "patient = Patient(Path(sys.argv[1]), 'pi', ('x',))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 80))\n"
        "print(CHECKS['file events'](patient).found)\n"
        "print(CHECKS['descriptors'](patient).found)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, patient.sessions_dir],
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT,
    )
    assert "none to be had (Too many open files; " in done.stdout
    assert "80 at most, enough to hold 8 sessions" in done.stdout


def test_the_clock_is_read_and_not_set(patient: Patient) -> None:
    before = time.time()
    told = of("clock", patient)
    assert "synchronized" in told.found
    assert abs(time.time() - before) < WAIT


# -- Programs ----------------------------------------------------------------------------------


def test_an_agent_that_is_not_there_is_a_problem(patient: Patient) -> None:
    told = of("agent", replace(patient, agent="no-such-agent"))
    assert told.state is State.PROBLEM
    assert told.found == "no-such-agent is not there, or not to be run"


def test_a_script_needs_its_interpreter(patient: Patient, tmp_path: Path) -> None:
    for line in ("#!/usr/bin/env no-such-node", "#!/usr/bin/env -S no-such-node --flag"):
        agent = script(tmp_path / "pi", f"{line}\n")
        told = of("agent", replace(patient, agent=str(agent)))
        assert told.found == f"{agent} needs no-such-node, which is not on PATH"
    agent = script(tmp_path / "pi", "#!/bin/sh\n")
    assert of("agent", replace(patient, agent=str(agent))).state is State.OK


def test_the_version_is_read_from_its_package(patient: Patient, tmp_path: Path) -> None:
    package = tmp_path / "node_modules" / "pi"
    (package / "dist").mkdir(parents=True)
    (package / "package.json").write_text('{"version": "0.74.2"}')
    script(package / "dist" / "cli.js", "#!/bin/sh\nexit 1\n")
    (tmp_path / "pi").symlink_to(package / "dist" / "cli.js")
    told = of("agent", replace(patient, agent=str(tmp_path / "pi")))
    assert told.found == f"{tmp_path / 'pi'} 0.74.2"
    (package / "package.json").write_text("[")
    assert of("agent", replace(patient, agent=str(tmp_path / "pi"))).found.endswith("/pi")


def test_a_keeper_whose_file_is_gone_is_a_problem(patient: Patient) -> None:
    assert of("keeper", patient).state is State.OK
    told = of("keeper", replace(patient, keeper=(sys.executable, "/none/keeper.cjs")))
    assert told.found == "/none/keeper.cjs cannot be read"


# -- The log -----------------------------------------------------------------------------------


def test_where_the_log_goes_is_looked_at_and_not_written_to(
    patient: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert of("log", patient).found == "standard output"
    file = tmp_path / "log"
    to_file = replace(patient, log_sink="file", log_file=str(file))
    assert of("log", to_file).found == f"file ({file})"
    assert not file.exists()
    file.mkdir()
    assert of("log", to_file).found == f"{file}: it is no regular file"
    told = of("log", replace(to_file, log_file=str(tmp_path / "none" / "log")))
    assert told.found == f"{tmp_path}/none/log: there is no folder {tmp_path}/none"
    assert of("log", replace(to_file, log_file="")).found == "log.file: it names no file"
    to_journal = replace(patient, log_sink="journald")
    monkeypatch.setattr(examination, "JOURNAL", str(tmp_path / "socket"))
    assert of("log", to_journal).found == f"{tmp_path}/socket: No such file or directory"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "socket"))
        assert of("log", to_journal).state is State.OK


# -- The service and the daemon ----------------------------------------------------------------


def test_the_service_manager_is_asked(
    patient: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    state = "LoadState=loaded\nActiveState=active\nUnitFileState=enabled\nMainPID=7\n"
    script(tmp_path / "systemctl", f"#!/bin/sh\nprintf '{state}'\n")
    monkeypatch.setattr(examination, "lingers", lambda _: False)
    assert of("service", patient).found == "running, but it ends when you log out"
    monkeypatch.setattr(examination, "lingers", lambda _: True)
    assert of("service", patient).found == "running, process 7"
    script(tmp_path / "systemctl", "#!/bin/sh\necho no bus >&2; exit 1\n")
    assert of("service", patient).found == "no service manager to ask (no bus)"
    script(tmp_path / "systemctl", "#!/bin/sh\nexec sleep 100\n")
    monkeypatch.setattr(examination, "PATIENCE", 0.1)
    assert "timed out after 0.08" in of("service", patient).found


def test_without_a_service_manager_there_is_nothing_to_ask(
    patient: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert of("service", patient).found == (
        "no service manager to ask "
        "(systemctl is not there, so no service can be had: use pi-reconciler run)"
    )


@asynchronous
async def test_who_keeps_the_folder_is_told(patient: Patient) -> None:
    assert of("daemon", patient).found == "nobody holds the folder's lock"
    async with Reconciler(KeeperManager(patient.sessions_dir)):
        assert of("daemon", patient).found.startswith(f"process {os.getpid()} (")
    assert of("daemon", patient).state is State.WARNING


# -- All of them -------------------------------------------------------------------------------


def test_a_check_that_hangs_or_fails_holds_up_no_other(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()

    def hangs(_: Patient) -> Diagnosis:
        free.wait(WAIT)
        return ok("slow", "")

    def fails(_: Patient) -> Diagnosis:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(
        examination, "CHECKS", {"slow": hangs, "broken": fails, "well": lambda _: ok("well", "")}
    )
    slow, broken, well = examine(patient, patience=0.1)
    free.set()
    assert (slow.check, slow.state, slow.found) == ("slow", State.PROBLEM, "no answer within 0.1 s")
    assert (broken.check, broken.found) == ("broken", "ZeroDivisionError: oh")
    assert well.state is State.OK


def test_every_check_answers_under_its_own_name(patient: Patient) -> None:
    assert [each.check for each in examine(patient, WAIT)] == list(CHECKS)


def test_nothing_is_changed(cli: Cli) -> None:
    bare_socket(cli.folder / "a.rpc.sock")
    before = everything(cli.folder.parent)
    cli("doctor")
    assert everything(cli.folder.parent) == before


def everything(folder: Path) -> dict[Path, tuple[int, int, int]]:
    found = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {path: (s.st_mode, s.st_mtime_ns, s.st_ctime_ns) for path, s in found.items()}


def test_the_page_explains_every_check_in_its_order() -> None:
    page = (Path(__file__).parent.parent / "docs" / "finding-out.md").read_text()
    rows = re.findall(r"^\| ([a-z ]+) \| ", page, re.MULTILINE)
    assert rows[1:] == ["settings", *CHECKS]
    shown = re.findall(r"^(?:ok|warning|problem) +(\w+(?: \w+)?)  ", page, re.MULTILINE)
    assert shown == ["settings", *CHECKS]


# -- The command -------------------------------------------------------------------------------


@pytest.fixture
def well(cli: Cli) -> Cli:
    """Where nothing is wrong: there is an agent."""
    cli.env["PI_RECONCILER_AGENT_COMMAND"] = '["sh"]'
    return cli


def test_doctor_is_0_where_there_is_no_problem(well: Cli) -> None:
    ended = well("doctor")
    assert ended.code == 0, ended
    told = r"^ok +settings +no .*: the defaults, 2 by variables$"
    assert re.search(told, ended.out, re.MULTILINE)
    assert re.search(r"^warning +daemon .*\n +-> pi-reconciler run", ended.out, re.MULTILINE)
    assert re.fullmatch(r"pi-reconciler: no problems, \d warnings?\n", ended.err)
    assert well("doctor", "--quiet").err == ""


def test_doctor_is_1_where_there_is_a_problem_and_says_what_to_do(cli: Cli) -> None:
    cli.env["PI_RECONCILER_AGENT_COMMAND"] = '["no-such-agent", "s3cret"]'
    ended = cli("doctor")
    assert ended.code == 1
    told_agent = r"^problem +agent +no-such-agent is not there.*\n +-> npm"
    assert re.search(told_agent, ended.out, re.MULTILINE)
    assert "s3cret" not in ended.out
    told = cli("doctor", "--json")
    assert told.code == 1
    assert [each["check"] for each in told.json] == ["settings", *CHECKS]
    (agent,) = [each for each in told.json if each["state"] == "problem"]
    assert agent["check"] == "agent"
    assert agent["advice"]
    assert told.err == ""


def test_doctor_goes_on_where_the_settings_are_bad(well: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("resink = 1")
    ended = well("doctor", "--config", tmp_path / "bad.toml")
    assert ended.code == 1
    assert "problem  settings" in ended.out
    assert "did you mean resync?" in ended.out
    assert "file events" in ended.out


@pytest.mark.parametrize(
    ("mode", "writers"), [(0o644, ""), (0o664, "its group"), (0o666, "everybody")]
)
def test_settings_that_others_may_change_are_a_problem(
    well: Cli, tmp_path: Path, mode: int, writers: str
) -> None:
    settings = tmp_path / "config.toml"
    settings.touch()
    settings.chmod(mode)
    (told,) = [
        e for e in well("doctor", "--config", settings, "--json").json if e["check"] == "settings"
    ]
    assert told["state"] == ("problem" if writers else "ok")
    assert f"may be written to by {writers}," in told["found"] or not writers


def test_doctor_on_a_terminal_is_coloured_unless_told_not_to(well: Cli, tmp_path: Path) -> None:
    program = script(
        tmp_path / "pi-reconciler", f'#!/bin/sh\nexec {sys.executable} -m reconciler "$@"\n'
    )
    with a_terminal(tmp_path, well.env) as terminal:
        terminal.type(f"{program} doctor")
        assert "ok       settings" in terminal.shows("no problems,")
        assert "\x1b[32mok" in terminal.painted
        terminal.clear()
        terminal.type(f"{program} doctor --no-color")
        terminal.shows("no problems,")
        assert "\x1b[32m" not in terminal.painted
    assert "\x1b" not in well("doctor").out


def test_doctor_looks_where_the_settings_send_the_log(well: Cli, tmp_path: Path) -> None:
    well.env["PI_RECONCILER_LOG_SINK"] = "file"
    well.env["PI_RECONCILER_LOG_FILE"] = str(tmp_path / "none" / "log")
    (told,) = [e for e in well("doctor", "--json").json if e["check"] == "log"]
    assert told["state"] == "problem"
    assert f"there is no folder {tmp_path}/none" in told["found"]


def test_doctor_finds_the_daemon(well: Cli) -> None:
    with well.started("run", stdout=subprocess.PIPE) as process:
        lines_of(process, "reconciler.started")
        (daemon,) = [e for e in well("doctor", "--json").json if e["check"] == "daemon"]
        assert daemon["state"] == "ok"
        assert f"process {process.pid} " in daemon["found"]


def test_doctor_tells_of_a_daemon_that_could_not_start_the_agent_again(
    well: Cli, tmp_path: Path
) -> None:
    (there := tmp_path / "bin").mkdir()
    script(there / "an-agent", "#!/usr/bin/env its-runtime\n")
    script(there / "its-runtime", "#!/bin/sh\n")
    well.env["PI_RECONCILER_AGENT_COMMAND"] = '["an-agent"]'

    def daemon() -> str:
        (told,) = [e for e in well("doctor", "--json").json if e["check"] == "daemon"]
        return f"{told['state']}: {told['found']}"

    with well.started("run", stdout=subprocess.PIPE) as process:
        lines_of(process, "reconciler.started")
        well.env["PATH"] = f"{there}:{well.env['PATH']}"
        assert re.fullmatch("warning: .* and has no an-agent on its PATH", daemon())
        well.env["PI_RECONCILER_AGENT_COMMAND"] = f'["{there}/an-agent"]'
        assert re.fullmatch("warning: .* and has no its-runtime on its PATH", daemon())
    with well.started("run", stdout=subprocess.PIPE) as process:
        lines_of(process, "reconciler.started")
        assert daemon().startswith("ok: ")
