"""Random histories of a real folder with real keepers, against a model of what must be true.

The model knows what each step means for the one session it is about: who must live on, who
must be dead in the end, which files must be there. Hypothesis makes the histories. A
failure prints the steps that led to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    HUNG,
    NODE_KEEPER,
    WAIT,
    alive,
    bare_socket,
    dead_pid,
    identity,
    sessions_folder,
    stale_pair,
    until,
)
from hasty_daemon import HastyDaemon
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from reconciler.keeper import KeeperManager
from reconciler.layout import claims
from reconciler.observations import ProcessId
from reconciler.processes import SYSTEM
from reconciler.requests import OUR_KEEPER

CAMPAIGN = bool(os.environ.get("PI_RECONCILER_CAMPAIGN"))
HISTORIES = int(os.environ.get("PI_RECONCILER_HISTORIES", "300" if CAMPAIGN else "5"))
STEPS = int(os.environ.get("PI_RECONCILER_STEPS", "30" if CAMPAIGN else "15"))

SIDS = tuple(str(uuid.UUID(int=number, version=4)) for number in range(1, 7))
PROGRAMS = {"ours": OUR_KEEPER, "other": ("node", str(NODE_KEEPER))}
MAKES = ("ours", "other") if shutil.which("node") else ("ours",)
SOCKET, PID_FILE, AGENT_FILE = ".rpc.sock", ".rpc.sock.pid", ".rpc.sock.pi-pid"

counts: Counter[str] = Counter()
"""How often each step was taken; a campaign prints it."""


@dataclass(slots=True)
class Life:
    """One session from its start to its end, as it should be."""

    sid: str
    make: str
    keeper: ProcessId
    agent: ProcessId
    out: Path | None
    """Where the agent writes what it reads; None for one that hangs."""
    lines: list[str] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    """Of its files, those that were removed from under it and nobody makes again."""
    misnamed: bool = False
    """Its pid file is missing or wrong, and the world has not come to rest since."""
    known: bool = False
    """The reconciler that runs now has seen keeper and agent alive."""
    asleep: bool = False
    """The keeper is stopped."""
    agent_asleep: bool = False

    @property
    def cut_off(self) -> bool:
        """Nobody can reach it any more, and it cannot help itself."""
        return self.make == "other" and SOCKET in self.gone

    @property
    def whole(self) -> bool:
        return not (self.gone or self.misnamed or self.asleep or self.agent_asleep)


class Histories(RuleBasedStateMachine):
    """Steps, and after each history the world must be what the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.held = contextlib.ExitStack()
        self.folder = self.held.enter_context(sessions_folder())
        self.scratch = Path(self.held.enter_context(tempfile.TemporaryDirectory()))
        self.daemon = HastyDaemon(self.folder, self.scratch / "log")
        self.lives: dict[str, Life] = {}
        self.rubble: set[str] = set()
        """Sessions of which something dead may be left: to be cleaned."""
        self.ending: set[str] = set()
        """Sessions whose keeper ends by itself: till then its end takes all files of its names."""
        self.wanted: set[str] = set()
        self.hostile: dict[Path, tuple[int, ...]] = {}
        self.must_die: list[ProcessId] = []
        self.steps: list[str] = []
        """What was done; Hypothesis cannot tell it where a second run goes another way."""
        self.started: list[ProcessId] = []
        self.usurpers: list[subprocess.Popen[bytes]] = []
        self.number = 0
        self.at_rest = False

    @initialize(makes=st.lists(st.sampled_from(MAKES), min_size=2, max_size=3))
    def begin(self, makes: list[str]) -> None:
        self.innocent = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
        )
        self.innocent_id = identity(self.innocent.pid)
        self.daemon.start()
        for place, make in enumerate(makes):
            self.spawn(0, make, hung=place == 0, wanted=False)
        self.leave(0, "innocent", "dead")
        self.put_hostile(0, SOCKET, "fifo")

    def teardown(self) -> None:
        try:
            if hasattr(self, "innocent_id"):
                self.rest()
                counts["histories"] += 1
        finally:
            self._end()

    def _end(self) -> None:
        """End all that was started, each known by more than its pid."""
        self.daemon.end(crash=False)
        for process in self.started:
            if SYSTEM.facts(process.pid).process == process:
                os.kill(process.pid, signal.SIGKILL)
        for usurper in self.usurpers:
            usurper.wait(WAIT)
        if hasattr(self, "innocent"):
            self.innocent.kill()
            self.innocent.wait()
        self.held.close()

    # What there is to choose from.

    def path(self, sid: str, ending: str) -> Path:
        return self.folder / f"{sid}{ending}"

    @property
    def dead(self) -> list[str]:
        taken = {claims(path.name) for path in self.hostile}
        return [sid for sid in SIDS if sid not in self.lives and sid not in taken]

    @property
    def free(self) -> list[str]:
        return [sid for sid in self.dead if sid not in self.ending]

    @property
    def clean(self) -> list[str]:
        return [sid for sid in self.free if sid not in self.rubble]

    def pick(self, number: int, make: str = "", **facts: bool) -> Life | None:
        found = [
            life
            for life in self.lives.values()
            if make in {"", life.make}
            and all(getattr(life, name) is value for name, value in facts.items())
        ]
        return found[number % len(found)] if found else None

    # Starting.

    @precondition(lambda self: self.free)
    @rule(
        number=st.integers(0, 5),
        make=st.sampled_from(MAKES),
        hung=st.booleans(),
        wanted=st.booleans(),
    )
    def spawn(self, number: int, make: str, *, hung: bool, wanted: bool) -> None:
        """In place of what a dead one has left, too, cleaned or not."""
        sid = self.free[number % len(self.free)]
        self.number += 1
        out = None if hung or wanted else self.scratch / f"out-{self.number}"
        if out is not None:
            out.touch()
        agent = HUNG if out is None else ("sh", "-c", f"exec cat >> {out}")
        if wanted and self.daemon.up:
            make = "ours"
            answer = self.daemon.ask("want", sid)
            assert "error" not in answer, answer
            keeper = answer["keeper"]
            self.wanted.add(sid)
        else:
            manager = KeeperManager(self.folder, keeper_command=PROGRAMS[make])
            spawned = asyncio.run(manager.spawn(sid, agent_command=agent, ready=False, timeout=60))
            keeper = spawned.keeper_pid
        self.rubble.discard(sid)
        self._lives(sid, make, keeper, out)
        self._count(f"spawn {make}", sid)

    def _lives(self, sid: str, make: str, keeper: int, out: Path | None) -> None:
        agents: list[int] = []

        def up() -> bool:
            with contextlib.suppress(OSError, ValueError):
                agents.append(int(self.path(sid, AGENT_FILE).read_text()))
            return bool(agents) and agents[-1] in (SYSTEM.children(keeper) or ())

        try:
            until(up, f"the agent of {sid} is up")
        except pytest.fail.Exception:
            raise AssertionError(f"{sid} has no agent; {self.log()}") from None
        life = Life(sid, make, identity(keeper), identity(agents[-1]), out)
        self.lives[sid] = life
        self.started += [life.keeper, life.agent]

    @precondition(lambda self: len(MAKES) > 1 and self.pick(0, asleep=False))
    @rule(number=st.integers(0, 5))
    def usurp(self, number: int) -> None:
        """A second keeper takes the names of the first."""
        self.rest()
        life = self.pick(number, asleep=False)
        if life is None or life.cut_off:
            return
        env = {
            **os.environ,
            "PI_DASHBOARD_HOME": str(self.folder.parents[2]),
            "PI_KEEPER_PI_CMD": '["sleep"]',
            "PI_KEEPER_PI_ARGS": '["600"]',
        }
        second = subprocess.Popen(
            ["node", NODE_KEEPER, life.sid],
            env=env,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.usurpers.append(second)
        self._lives(life.sid, "other", second.pid, None)
        self.must_die += [life.keeper, life.agent]
        self._count("usurp", life.sid)
        self.rest()  # else the first one may outlive the second, and take its names again

    # Ending.

    @precondition(lambda self: self.lives)
    @rule(number=st.integers(0, 5))
    def kill_keeper(self, number: int) -> None:
        life = self.pick(number)
        assert life is not None
        os.kill(life.keeper.pid, signal.SIGKILL)
        until(lambda: not alive(life.keeper.pid), "the keeper is dead")
        traced = AGENT_FILE not in life.gone and not life.misnamed
        if life.make == "ours" or traced or (life.known and self.daemon.up):
            self.must_die.append(life.agent)
        self._ended(life)
        self._count("kill keeper", life.sid)

    def _ended(self, life: Life) -> None:
        del self.lives[life.sid]
        self.must_die.append(life.keeper)
        self.rubble.add(life.sid)

    @precondition(lambda self: self.lives)
    @rule(number=st.integers(0, 5))
    def kill_agent(self, number: int) -> None:
        """A keeper ends with its agent, or is ended if it sleeps."""
        life = self.pick(number)
        assert life is not None
        os.kill(life.agent.pid, signal.SIGKILL)
        self._ended(life)
        self.ending.add(life.sid)
        self._count("kill agent", life.sid)

    @precondition(lambda self: self.lives and self.daemon.up)
    @rule(number=st.integers(0, 5))
    def stop(self, number: int) -> None:
        life = self.pick(number)
        assert life is not None
        answer = self.daemon.ask("stop", life.sid)
        assert answer == {"keeper": life.keeper.pid}, answer
        self.wanted.discard(life.sid)
        self._ended(life)
        self.must_die.append(life.agent)
        self.rubble.discard(life.sid)
        assert not alive(life.keeper.pid)
        assert not alive(life.agent.pid)
        assert not self.files(life.sid)
        self._count("stop", life.sid)

    # Sleeping.

    @precondition(lambda self: self.pick(0, asleep=False))
    @rule(number=st.integers(0, 5))
    def keeper_falls_asleep(self, number: int) -> None:
        life = self.pick(number, asleep=False)
        assert life is not None
        os.kill(life.keeper.pid, signal.SIGSTOP)
        life.asleep = True
        self._count("keeper asleep", life.sid)

    @precondition(lambda self: self.pick(0, asleep=True))
    @rule(number=st.integers(0, 5))
    def keeper_wakes_up(self, number: int) -> None:
        life = self.pick(number, asleep=True)
        assert life is not None
        os.kill(life.keeper.pid, signal.SIGCONT)
        life.asleep = False
        self._count("keeper awake", life.sid)

    @precondition(lambda self: self.pick(0, agent_asleep=False))
    @rule(number=st.integers(0, 5))
    def agent_falls_asleep(self, number: int) -> None:
        life = self.pick(number, agent_asleep=False)
        assert life is not None
        os.kill(life.agent.pid, signal.SIGSTOP)
        life.agent_asleep = True
        self._count("agent asleep", life.sid)

    @precondition(lambda self: self.pick(0, agent_asleep=True))
    @rule(number=st.integers(0, 5))
    def agent_wakes_up(self, number: int) -> None:
        life = self.pick(number, agent_asleep=True)
        assert life is not None
        os.kill(life.agent.pid, signal.SIGCONT)
        life.agent_asleep = False
        self._count("agent awake", life.sid)

    # Files are taken from under a living keeper.

    @precondition(lambda self: self.lives)
    @rule(number=st.integers(0, 5), ending=st.sampled_from([SOCKET, PID_FILE, AGENT_FILE]))
    def remove(self, number: int, ending: str) -> None:
        life = self.pick(number)
        assert life is not None
        self.path(life.sid, ending).unlink(missing_ok=True)
        self._taken(life, ending)
        self._count(f"remove {ending}", life.sid)

    def _taken(self, life: Life, ending: str) -> None:
        if ending == AGENT_FILE or (ending == SOCKET and life.make == "other"):
            life.gone.add(ending)
        elif ending == PID_FILE:
            life.misnamed = True

    @precondition(lambda self: self.lives)
    @rule(number=st.integers(0, 5), text=st.sampled_from(["", "x", "dead", "innocent", "other"]))
    def scribble(self, number: int, text: str) -> None:
        """Another hand writes into the pid file of a living keeper."""
        life = self.pick(number)
        assert life is not None
        self.path(life.sid, PID_FILE).write_text(self._text(text, life.sid))
        self._taken(life, PID_FILE)
        self._count(f"scribble {text!r}", life.sid)

    def _text(self, text: str, sid: str) -> str:
        match text:
            case "dead":
                return str(dead_pid())
            case "innocent":
                return str(self.innocent.pid)
            case "other":
                others = [life for life in self.lives.values() if life.sid != sid]
                return str(others[0].keeper.pid if others else self.innocent.pid)
            case _:
                return text

    # What nobody alive has left.

    @precondition(lambda self: self.clean)
    @rule(
        number=st.integers(0, 5),
        what=st.sampled_from(["pair", "socket", "", "x", "dead", "innocent", "other"]),
        agent=st.sampled_from([None, "", "x", "dead", "innocent"]),
    )
    def leave(self, number: int, what: str, agent: str | None) -> None:
        sid = self.clean[number % len(self.clean)]
        match what:
            case "pair":
                stale_pair(self.folder, sid)
            case "socket":
                bare_socket(self.path(sid, SOCKET))
            case _:
                self.path(sid, PID_FILE).write_text(self._text(what, sid))
        if agent is not None:
            self.path(sid, AGENT_FILE).write_text(self._text(agent, sid))
        self.rubble.add(sid)
        self._count(f"leave {what!r}", sid)

    @precondition(lambda self: self.clean)
    @rule(
        number=st.integers(0, 5),
        ending=st.sampled_from([SOCKET, PID_FILE, AGENT_FILE]),
        what=st.sampled_from(["link", "fifo", "folder"]),
    )
    def put_hostile(self, number: int, ending: str, what: str) -> None:
        path = self.path(self.clean[number % len(self.clean)], ending)
        match what:
            case "link":
                path.symlink_to(self.scratch)
            case "fifo":
                os.mkfifo(path)
            case _:
                path.mkdir()
        self.hostile[path] = fingerprint(path)
        self._count(f"hostile {what}")

    @precondition(lambda self: self.hostile)
    @rule()
    def take_hostile_away(self) -> None:
        path, _ = self.hostile.popitem()
        (path.rmdir if path.is_dir() and not path.is_symlink() else path.unlink)()
        self._count("hostile away")

    # The reconciler itself.

    @precondition(lambda self: self.daemon.up)
    @rule(crash=st.booleans())
    def daemon_ends(self, *, crash: bool) -> None:
        self.daemon.end(crash=crash)
        self.wanted.clear()
        for life in self.lives.values():
            life.known = False
        self._count("daemon killed" if crash else "daemon ended")

    @precondition(lambda self: not self.daemon.up)
    @rule()
    def daemon_starts(self) -> None:
        self.daemon.start()
        self._count("daemon started")

    # The wire.

    @precondition(lambda self: any(life.whole and life.out for life in self.lives.values()))
    @rule(number=st.integers(0, 5))
    def write(self, number: int) -> None:
        living = [life for life in self.lives.values() if life.whole and life.out]
        life = living[number % len(living)]
        if not self.path(life.sid, SOCKET).exists():
            return  # it is about to bind again
        line = f'{{"number":{len(life.lines)}}}\n'
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(WAIT)
            client.connect(str(self.path(life.sid, SOCKET)))
            client.sendall(line.encode())
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        life.lines.append(line)
        self._count("write", life.sid)

    # What must be true.

    @precondition(lambda self: not self.at_rest)
    @rule()
    def comes_to_rest(self) -> None:
        self.rest()
        self._count("rest")
        self.at_rest = True

    def rest(self) -> None:
        """The world comes to rest, and stays as it is through one full look more."""
        if self.at_rest:
            return
        if not self.daemon.up:
            self.daemon.start()
        deadline = time.monotonic() + WAIT
        while wrong := self.wrong():
            assert time.monotonic() < deadline, f"not at rest: {wrong}; {self.lives}; {self.log()}"
            time.sleep(0.01)
        self.daemon.ask("settled")
        wrong = self.wrong()
        assert not wrong, f"not at rest any more: {wrong}; {self.lives}; {self.log()}"
        assert not self.daemon.complaints()
        for life in self.lives.values():
            life.known = True
            life.misnamed = life.misnamed and life.asleep
        self.rubble.clear()
        self.ending.clear()
        self.at_rest = True

    def wrong(self) -> list[str]:
        """In what the world is not yet, or not any more, what the model says."""
        rows: dict[str, str] = self.daemon.ask("rows")
        found = [f"{path} was touched" for path in self.hostile if self._touched(path)]
        if SYSTEM.facts(self.innocent.pid).process != self.innocent_id:
            found.append("the innocent process is dead")
        found += [f"{p} lives on" for p in self.must_die if SYSTEM.facts(p.pid).process == p]
        for life in tuple(self.lives.values()):
            found += self._wrong_life(life, rows)
        for sid in self.dead:
            found += [f"{name} is left" for name in self.files(sid)]
            wish = "missing" if sid in self.wanted else None
            if rows.get(sid) != wish:
                found.append(f"{sid} is {rows.get(sid)}, not {wish}")
        found += [
            f"{path.name} is not refused"
            for path in self.hostile
            if rows.get(claims(path.name) or "") != "refused"
        ]
        return found + [f"{name} is left" for name in os.listdir(self.folder) if ".taken-" in name]

    def _wrong_life(self, life: Life, rows: dict[str, str]) -> list[str]:
        dead = [p for p in (life.keeper, life.agent) if SYSTEM.facts(p.pid).process != p]
        if life.cut_off and life.misnamed:
            # It may be ended, for what says that it lives is gone; but then it is all gone.
            if len(dead) < 2 and (dead or not self.path(life.sid, PID_FILE).exists()):
                return [f"{life.sid} is neither alive nor ended"]
            if dead:
                del self.lives[life.sid]
                return ["look again"]
            return []
        if dead:
            return [f"{dead} of {life.sid} is dead"]
        if life.asleep:
            return []
        found = []
        phase = "unreachable" if life.cut_off else "ready"
        if rows.get(life.sid) != phase:
            found.append(f"{life.sid} is {rows.get(life.sid)}, not {phase}")
        endings = {SOCKET, PID_FILE, AGENT_FILE} - life.gone
        if self.files(life.sid) != {f"{life.sid}{ending}" for ending in endings}:
            found.append(f"the files of {life.sid} are {self.files(life.sid)}")
        elif self.path(life.sid, PID_FILE).read_text() != str(life.keeper.pid):
            found.append(f"the pid file of {life.sid} is wrong")
        if life.out and not life.agent_asleep and life.out.read_text() != "".join(life.lines):
            found.append(f"the agent of {life.sid} has read {life.out.read_text()!r}")
        return found

    def files(self, sid: str) -> set[str]:
        return {name for name in os.listdir(self.folder) if claims(name) == sid}

    def _touched(self, path: Path) -> bool:
        return not os.path.lexists(path) or fingerprint(path) != self.hostile[path]

    def log(self) -> str:
        """What was done, and what all of them have said of it."""
        keepers = {path.name: path.read_text()[-1000:] for path in self.folder.glob("keeper-*.log")}
        return f"{self.steps}\n{keepers}\n{self.daemon.log.read_text()[-6000:]}"

    def _count(self, step: str, sid: str = "") -> None:
        self.at_rest = False
        self.steps.append(f"{step} {sid[-1:]}")
        counts[step] += 1


def fingerprint(path: Path) -> tuple[int, ...]:
    status = path.lstat()
    return status.st_ino, stat.S_IFMT(status.st_mode), status.st_mtime_ns, status.st_ctime_ns


@pytest.mark.campaign
@pytest.mark.timeout(36000 if CAMPAIGN else 240)
def test_histories(capsys: pytest.CaptureFixture[str]) -> None:
    choices: Any = settings(
        max_examples=HISTORIES,
        stateful_step_count=STEPS,
        derandomize=not CAMPAIGN,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.generate],  # a history takes seconds: it is not tried again and again
        suppress_health_check=list(HealthCheck),
    )
    counts.clear()
    try:
        run_state_machine_as_test(Histories, settings=choices)
    finally:
        if CAMPAIGN:
            with capsys.disabled():
                sys.stdout.write(f"\n{counts.total()} steps: {dict(counts.most_common())}\n")
    assert counts["histories"]
