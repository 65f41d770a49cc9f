from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import alive, as_nobody, dead_pid, identity, open_descriptors, root, until
from stand_ins import ending

from reconciler import facts as facts_room
from reconciler import processes
from reconciler.facts import Facts, Life, Processes
from reconciler.observations import ProcessId
from reconciler.portable import PORTABLE
from reconciler.processes import LINUX, SYSTEM, Target, has_exited, open_pidfd

PYTHON = (sys.executable, "-I", "-S", "-c")
REPO = Path(__file__).parent.parent
BOTH = pytest.mark.parametrize("system", [LINUX, PORTABLE], ids=["linux", "portable"])
WAITS = "import signal; print(flush=True); signal.pause()"


@contextlib.contextmanager
def running(
    code: str = WAITS, *arguments: str, env: dict[str, str] | None = None, group: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A process whose first line can be read, killed at the end."""
    process = subprocess.Popen(
        [*PYTHON, code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=group,
    )
    with ending(process):
        yield process


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def is_zombie(pid: int) -> bool:
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2] == "Z"


def pidfds() -> int:
    """How many pidfds this process holds."""
    count = 0
    for name in open_descriptors():
        with contextlib.suppress(OSError):
            count += "pidfd" in os.readlink(f"/proc/self/fd/{name}")
    return count


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Let this process open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Facts.


@BOTH
def test_facts_of_this_process(system: Processes) -> None:
    facts = system.facts(os.getpid())
    assert facts.life is Life.ALIVE
    assert facts.process == system.facts(os.getpid()).process
    assert facts.process is not None
    assert facts.process.pid == os.getpid()
    assert (facts.parent, facts.group) == (os.getppid(), os.getpgrp())
    assert (facts.session, facts.uid) == (os.getsid(0), os.geteuid())
    assert 0 < facts.age < 24 * 3600
    assert not facts.dying
    assert not facts.kernel


@BOTH
def test_an_age_is_seconds(system: Processes) -> None:
    with running() as process:
        line(process)
        assert 0 <= system.facts(process.pid).age < 20


@BOTH
@pytest.mark.parametrize("pid", [2**22 + 1, 2**31 - 1, 2**31, 2**63, 10**30])
def test_no_such_process(system: Processes, pid: int) -> None:
    assert system.facts(pid).life is Life.DEAD


@BOTH
def test_a_process_that_is_gone(system: Processes) -> None:
    pid = dead_pid()
    assert system.facts(pid).life is Life.DEAD
    assert system.arguments(pid) is None
    assert system.variable(pid, "PATH") is None
    assert not system.children(pid)
    assert system.holds(pid, {(1, 1)}) is None
    assert not system.foreign(pid)


@BOTH
def test_a_zombie_is_dead(system: Processes) -> None:
    with running("") as process:
        until(lambda: is_zombie(process.pid))
        assert system.facts(process.pid).life is Life.DEAD
        assert system.facts(process.pid).process is None
        assert system.arguments(process.pid) is None
        assert system.variable(process.pid, "PATH") is None


FIRST_THREAD_ENDS = """
import ctypes, platform, threading, time
def work():
    while open("/proc/self/stat").read().rsplit(")")[1].split()[0] != "Z": time.sleep(0.001)
    print("first thread has ended", flush=True)
    time.sleep(600)
threading.Thread(target=work).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
"""


@pytest.mark.skipif(platform.machine() not in {"x86_64", "aarch64"}, reason="number of exit()")
def test_a_process_whose_first_thread_has_ended_is_alive() -> None:
    with running(FIRST_THREAD_ENDS) as process:
        line(process)
        assert is_zombie(process.pid)
        facts = LINUX.facts(process.pid)
        assert facts.life is Life.ALIVE
        assert facts.process is not None
        assert not facts.dying


def test_a_thread_is_no_process() -> None:
    """Its number has an entry in /proc, and kill() takes it for its process's."""
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        tid = thread.native_id
        assert tid is not None
        assert os.path.exists(f"/proc/{tid}/stat")
        os.kill(tid, 0)
        assert LINUX.facts(tid).life is Life.DEAD
        assert open_pidfd(tid) is None
        process = replace(identity(os.getpid()), pid=tid)
        with Target(process, lambda: True) as target:
            assert not target.proven
            assert not target.send(signal.SIGKILL)
    finally:
        ended.set()
        thread.join()


def test_a_kernel_thread() -> None:
    threads = [pid for pid in SYSTEM.pids() if LINUX.facts(pid).kernel]
    if not threads:
        pytest.skip("this pid namespace has no threads of the kernel")
    facts = LINUX.facts(threads[0])
    assert facts.life is Life.ALIVE
    assert LINUX.arguments(threads[0]) is None


PARENT_OF_A_MORTAL = """
import ctypes, os, signal
parent = os.getpid()
if child := os.fork():
    print(child, flush=True)
else:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.write(1, b"ready\\n")
signal.pause()
"""


def is_ending(facts: Facts) -> bool:
    return facts.dying or facts.life is Life.DEAD


def test_who_dies_with_its_parent_is_dying_or_dead_when_that_is_dead() -> None:
    for _ in range(25):
        with running(PARENT_OF_A_MORTAL) as process:
            said = {line(process), line(process)}
            (child,) = (int(text) for text in said - {"ready"})
            pidfd = os.pidfd_open(process.pid)
            process.kill()
            select.select([pidfd], [], [])
            os.close(pidfd)
            # More than one look: from when it takes its SIGKILL until it is marked as exiting,
            # some microseconds, the kernel tells of neither.
            assert any(is_ending(LINUX.facts(child)) for _ in range(50))
            until(lambda child=child: not alive(child))  # type: ignore[misc]


@BOTH
def test_a_name_may_hold_anything(system: Processes, tmp_path: Path) -> None:
    program = tmp_path / "x) Z 1 (\n"
    program.symlink_to("/bin/sleep")
    with ending(subprocess.Popen([program, "600"])) as process:
        until(lambda: SYSTEM.arguments(process.pid))
        facts = system.facts(process.pid)
        assert facts.life is Life.ALIVE
        assert facts.parent == os.getpid()


@BOTH
def test_arguments(system: Processes) -> None:
    odd = ["a b", "", "é", os.fsdecode(b"\xff"), "x" * 50_000]
    with ending(subprocess.Popen(["sleep", "600", "0", "0"])) as process:
        until(lambda: SYSTEM.arguments(process.pid) == ("sleep", "600", "0", "0"))
        assert system.arguments(process.pid) == ("sleep", "600", "0", "0")
    with running(WAITS, *odd) as process:
        line(process)
        assert system.arguments(process.pid) == (*PYTHON, WAITS, *odd)


@BOTH
def test_a_variable_of_the_environment(system: Processes) -> None:
    env = {"LONG": "x" * 50_000, "LONGER_NAME": "no", "NAME": "a=b é", "EMPTY": ""}
    with running(env=env) as process:
        line(process)
        assert system.variable(process.pid, "NAME") == "a=b é"
        assert system.variable(process.pid, "LONGER") == ""
        assert system.variable(process.pid, "LONG") == "x" * 50_000
        assert system.variable(process.pid, "EMPTY") == ""


@BOTH
def test_children_are_all_that_any_thread_has(system: Processes) -> None:
    code = (
        "import subprocess, threading, signal\n"
        "first = subprocess.Popen(['sleep', '600'])\n"
        "def work():\n"
        "    second = subprocess.Popen(['sleep', '600'])\n"
        "    print(first.pid, second.pid, flush=True)\n"
        "    signal.sigwait([signal.SIGUSR1])\n"
        "threading.Thread(target=work).start()\n"
    )
    with running(code) as process:
        children = {int(pid) for pid in line(process).split()}
        assert set(system.children(process.pid) or ()) == children
        for pid in children:
            assert system.facts(pid).parent == process.pid
            os.kill(pid, signal.SIGKILL)
        until(lambda: all(map(is_zombie, children)))
        assert set(LINUX.children(process.pid) or ()) == children


@BOTH
def test_what_a_process_holds_open(system: Processes, tmp_path: Path) -> None:
    held, other = tmp_path / "held", tmp_path / "other"
    for path in (held, other):
        path.touch()
    os.link(held, tmp_path / "another name")
    code = f"file = open({str(held)!r}); {WAITS}"
    with running(code) as process:
        line(process)
        keys = {path: (path.stat().st_dev, path.stat().st_ino) for path in tmp_path.iterdir()}
        assert system.holds(process.pid, {keys[held]}) is True
        assert system.holds(process.pid, {keys[tmp_path / "another name"]}) is True
        assert system.holds(process.pid, {keys[other]}) is False
        assert system.holds(process.pid, set()) is False


def test_a_folder_that_is_held_open(tmp_path: Path) -> None:
    key = (tmp_path.stat().st_dev, tmp_path.stat().st_ino)
    with running(f"import os; os.open({str(tmp_path)!r}, 0); {WAITS}") as process:
        line(process)
        assert LINUX.holds(process.pid, {key}) is True


@BOTH
def test_all_pids(system: Processes) -> None:
    assert {os.getpid(), os.getppid()} <= set(system.pids())


def test_who_lives_in_another_pid_namespace() -> None:
    assert not LINUX.foreign(os.getpid())
    assert not PORTABLE.foreign(os.getpid())


def test_which_signals_a_process_catches(victim: subprocess.Popen[str]) -> None:
    code = "import signal; signal.signal(signal.SIGHUP, print); print(flush=True); signal.pause()"
    with running(code) as process:
        line(process)
        assert LINUX.catches(process.pid, signal.SIGHUP)
        assert not LINUX.catches(process.pid, signal.SIGTERM)
    assert not LINUX.catches(victim.pid, signal.SIGHUP)
    assert LINUX.catches(dead_pid(), signal.SIGHUP), "it cannot be told"
    assert PORTABLE.catches(victim.pid, signal.SIGHUP), "it cannot be told"


def test_both_systems_agree() -> None:
    with running() as process, running("") as zombie:
        line(process)
        until(lambda: is_zombie(zombie.pid))
        for pid in (os.getpid(), os.getppid(), process.pid, zombie.pid, dead_pid(), 1):
            one, other = LINUX.facts(pid), PORTABLE.facts(pid)
            assert one.life is other.life, pid
            for name in ("parent", "group", "session", "uid"):
                if one.life is Life.ALIVE:
                    assert getattr(one, name) == getattr(other, name), (pid, name)
            assert one.age == pytest.approx(other.age, abs=2)
            assert LINUX.arguments(pid) == PORTABLE.arguments(pid)
            assert LINUX.variable(pid, "PATH") == PORTABLE.variable(pid, "PATH")


@BOTH
def test_no_descriptors_left_is_not_death(system: Processes) -> None:
    pid = os.getppid()
    with no_descriptors_left():
        life = system.facts(pid).life
        arguments, variable = system.arguments(pid), system.variable(pid, "PATH")
        children, holds = system.children(pid), system.holds(pid, {(1, 1)})
    assert life is Life.HIDDEN
    assert (arguments, variable, children, holds) == (None, None, None, None)


HIDE_AND_LOOK = """
import ctypes, os, sys
sys.path[:0] = sys.argv[2:]
from reconciler.portable import PORTABLE
from reconciler.processes import LINUX
pid = int(sys.argv[1])
assert ctypes.CDLL(None).mount(b"proc", b"/proc", b"proc", 0, b"hidepid=2") == 0
os.setgid(65534); os.setuid(65534)
for system in (LINUX, PORTABLE):
    print(system.facts(pid).life.value, system.arguments(pid), system.variable(pid, "PATH"),
          system.children(pid), system.holds(pid, [(1, 1)]), system.foreign(pid))
"""


@root
@pytest.mark.root
def test_a_process_that_the_system_hides_is_not_dead() -> None:
    command = ["unshare", "--mount", sys.executable, "-I", "-c", HIDE_AND_LOOK]
    done = subprocess.run(
        [*command, str(os.getpid()), str(REPO), *(path for path in sys.path if path)],
        capture_output=True,
        text=True,
        check=True,
    )
    linux, portable = done.stdout.splitlines()
    assert linux == "hidden None None None None False"
    assert portable.startswith("hidden None None")


@root
@pytest.mark.root
def test_another_users_process_exists() -> None:
    with as_nobody():
        assert facts_room.exists(1)


def test_a_process_that_ends_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise ProcessLookupError

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", gone)
        assert LINUX.facts(os.getpid()).life is Life.DEAD
    with monkeypatch.context() as patch:
        patch.setattr(processes, "_read", lambda *_: None)
        assert LINUX.children(os.getpid()) is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "getsid", gone)
        assert PORTABLE.facts(os.getpid()).session == 0


def test_the_id_of_the_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts_room.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(facts_room, "open", refuse, raising=False)
    assert int(facts_room.boot_id.__wrapped__()) > 0


# Targets.


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[str]]:
    """A process that leads its group, in which it has a child; both wait for signals."""
    code = (
        "import os, signal, sys\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "signal.pause()\n"
    )
    with running(code, group=True) as process:
        yield process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_the_proof_is_asked_for_once_the_process_is_held(victim: subprocess.Popen[str]) -> None:
    line(victim)
    held: list[int] = []

    def prove() -> bool:
        held.append(pidfds())
        return True

    assert pidfds() == 0
    with Target(identity(victim.pid), prove) as target:
        assert target.proven
        assert held == [1]
        assert target.send(signal.SIGTERM)
    assert pidfds() == 0


def test_a_signal_to_one_process(victim: subprocess.Popen[str]) -> None:
    child = int(line(victim))
    with Target(identity(victim.pid), lambda: True) as target:
        assert not target.exited
        assert target.send(signal.SIGTERM)
        until(lambda: target.exited)
        assert not target.send(signal.SIGTERM) or is_zombie(victim.pid)
    assert victim.wait() == -signal.SIGTERM
    assert alive(child)


@pytest.mark.parametrize("old_kernel", [False, True])
def test_a_signal_to_the_group_that_it_leads(
    victim: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, *, old_kernel: bool
) -> None:
    if old_kernel:
        monkeypatch.setattr(processes, "_SIGNAL_GROUP", 1 << 20)  # EINVAL, as before 6.9
    child = int(line(victim))
    with Target(identity(victim.pid), lambda: True) as target:
        assert target.send(signal.SIGTERM, group=True)
    assert victim.wait() == -signal.SIGTERM
    until(lambda: not alive(child))


def test_on_an_old_kernel_a_dead_leaders_group_is_left_alone(
    victim: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the leader is dead, the number of its group may become another's."""
    monkeypatch.setattr(processes, "_SIGNAL_GROUP", 1 << 20)
    child = int(line(victim))
    with Target(identity(victim.pid), lambda: True) as target:
        monkeypatch.setattr(target, "_leads", lambda: True)
        victim.kill()
        until(lambda: target.exited)
        assert not target.send(signal.SIGTERM, group=True)
    assert alive(child)


def test_a_group_that_another_leads_is_left_alone() -> None:
    with running() as process, running() as neighbour:
        line(process)
        line(neighbour)
        assert os.getpgid(process.pid) == os.getpgrp()
        with Target(identity(process.pid), lambda: True) as target:
            assert target.send(signal.SIGTERM, group=True)
        assert process.wait() == -signal.SIGTERM
        assert alive(neighbour.pid)


@pytest.mark.parametrize("pidfd", [True, False])
@pytest.mark.parametrize("group", [True, False])
def test_what_is_not_proven_is_not_signalled(
    victim: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    pidfd: bool,
    group: bool,
) -> None:
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    child = int(line(victim))
    with Target(identity(victim.pid), lambda: False) as target:
        assert not target.proven
        assert not target.send(signal.SIGKILL, group=group)
        assert not target.exited
    assert alive(victim.pid)
    assert alive(child)


@pytest.mark.parametrize("pidfd", [True, False])
def test_a_later_owner_of_the_pid_is_not_even_asked_about(
    victim: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, *, pidfd: bool
) -> None:
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    line(victim)
    before = replace(identity(victim.pid), started=1)
    with Target(before, lambda: pytest.fail("asked")) as target:
        assert not target.proven
        assert not target.send(signal.SIGKILL)
    assert alive(victim.pid)


@pytest.mark.parametrize("pidfd", [True, False])
def test_a_process_that_is_dead(monkeypatch: pytest.MonkeyPatch, *, pidfd: bool) -> None:
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    process = ProcessId(dead_pid(), 1, facts_room.boot_id())
    with Target(process, lambda: True) as target:
        assert not target.proven
        assert target.exited
        assert not target.send(signal.SIGKILL)
        assert asyncio.run(target.wait(10))


def test_a_group_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(group=True) as process:
        line(process)
        with Target(identity(process.pid), lambda: True) as target:
            monkeypatch.setattr(target, "_leads", lambda: True)
            process.kill()
            process.wait()
            assert not target.send(signal.SIGTERM, group=True)


def test_a_process_that_is_reaped_while_it_is_held(victim: subprocess.Popen[str]) -> None:
    line(victim)
    with Target(identity(victim.pid), lambda: True) as target:
        victim.kill()
        victim.wait()
        assert target.exited
        assert not target.send(signal.SIGTERM)
        assert not target.send(signal.SIGTERM, group=True)


def test_waiting(victim: subprocess.Popen[str]) -> None:
    line(victim)

    async def wait() -> tuple[bool, bool, bool]:
        with Target(identity(victim.pid), lambda: True) as target:
            too_short = await target.wait(0.01)
            long = asyncio.create_task(target.wait(20))
            await asyncio.sleep(0)
            assert target.send(signal.SIGTERM)
            async with asyncio.timeout(10):  # the end wakes it, not its own time
                return too_short, await long, await target.wait(0)

    assert asyncio.run(wait()) == (False, True, True)


def test_without_pidfds_the_proof_is_asked_for_before_each_signal(
    victim: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    child = int(line(victim))
    answers = [True, True, False, True]
    with Target(identity(victim.pid), lambda: answers.pop(0)) as target:
        assert target.proven
        assert target.send(signal.SIGCONT)
        assert not target.send(signal.SIGKILL, group=True)
        assert alive(victim.pid)
        assert target.send(signal.SIGTERM, group=True)
        assert answers == []
        assert asyncio.run(target.wait(20))
    until(lambda: not alive(child))


def test_without_pidfds_a_signal_to_one_process(
    victim: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    child = int(line(victim))
    with Target(identity(victim.pid), lambda: True) as target:
        assert target.send(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert alive(child)
    assert not LINUX.facts(child).dying  # which SIGKILL makes it at once


def test_without_pidfds_waiting_sees_the_end(
    victim: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    line(victim)

    async def wait() -> bool:
        with Target(identity(victim.pid), lambda: True) as target:
            waiting = asyncio.create_task(target.wait(20))
            await asyncio.sleep(0)  # it has looked once, and waits
            assert target.send(signal.SIGTERM)
            return await waiting

    assert asyncio.run(wait())


def test_without_pidfds_waiting_ends_in_time(
    victim: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    line(victim)
    with Target(identity(victim.pid), lambda: True) as target:
        assert not asyncio.run(target.wait(0.01))
        assert not target.exited


def test_without_a_descriptor_nobody_is_signalled(victim: subprocess.Popen[str]) -> None:
    line(victim)
    process = identity(victim.pid)
    with no_descriptors_left(), pytest.raises(OSError, match="Too many open files"):
        Target(process, lambda: True)
    assert alive(victim.pid)


def test_a_target_leaks_no_descriptor(victim: subprocess.Popen[str]) -> None:
    line(victim)
    process = identity(victim.pid)
    before = open_descriptors()

    def fail() -> bool:
        raise OSError("cannot ask")

    with pytest.raises(OSError, match="cannot ask"):
        Target(process, fail)
    assert open_descriptors() == before
    target = Target(process, lambda: False)
    target.close()
    target.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("number", ["ENOSYS", "EPERM", "EINVAL"])
def test_a_system_that_gives_no_pidfds(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    import errno  # noqa: PLC0415 - by name, for the ids of this test

    def refuse(_: int) -> int:
        raise OSError(getattr(errno, number), number)

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert open_pidfd(os.getpid()) is None


def test_a_pidfd_tells_of_the_end() -> None:
    with running() as process:
        line(process)
        pidfd = open_pidfd(process.pid)
        assert pidfd is not None
        assert not has_exited(pidfd)
        process.kill()
        until(lambda: has_exited(pidfd))
        assert is_zombie(process.pid)
        os.close(pidfd)
    assert open_pidfd(process.pid) is None


TAKES_ALL = """
import os, resource, sys
sys.path[:0] = sys.argv[1:]
from reconciler.processes import open_pidfd
resource.setrlimit(resource.RLIMIT_NOFILE, (HOW_MANY, 4096))
taken = 0
try:
    while True:
        open_pidfd(os.getpid(), spare=SPARE)
        taken += 1
except OSError as error:
    reason = error.strerror
left = 0
try:
    while True:
        os.open("/", os.O_PATH)
        left += 1
except OSError:
    print(taken > 0, left, reason)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there are no pidfds elsewhere")
@pytest.mark.parametrize(("limit", "spare", "left"), [(64, 16, 16), (64, 32, 32), (16, 32, 8)])
def test_pidfds_leave_some_descriptors_free(limit: int, spare: int, left: int) -> None:
    code = TAKES_ALL.replace("HOW_MANY", str(limit)).replace("SPARE", str(spare))
    paths = [str(Path(__file__).parent.parent), *(path for path in sys.path if path)]
    said = subprocess.check_output([sys.executable, "-I", "-c", code, *paths], text=True)
    assert said == f"True {left} Too many open files\n"
