from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from conftest import WAIT, dead_pid, identity, open_descriptors

from reconciler import exits as exits_module
from reconciler.exits import Exits
from reconciler.facts import HIDDEN, Facts, boot_id
from reconciler.observations import ProcessId
from reconciler.processes import SYSTEM


class Followed:
    """Exits under test, and what it has told."""

    def __init__(self) -> None:
        self.notices: list[tuple[str, ProcessId]] = []
        self.degraded: list[str] = []
        loop = asyncio.get_running_loop()
        self.exits = Exits(loop, lambda *told: self.notices.append(told), self.degraded.append)

    async def told(self, count: int) -> None:
        """Wait until so many notices have come, and see that no more follow at once."""
        await soon(lambda: len(self.notices) >= count)
        await turns()
        assert len(self.notices) == count


async def soon(condition: Callable[[], object]) -> None:
    """Wait in the loop until a condition holds, with a bound."""
    async with asyncio.timeout(WAIT):
        while not condition():  # noqa: ASYNC110 - what is waited for knows no events
            await asyncio.sleep(0.001)


async def turns() -> None:
    """Let the loop do whatever is ready."""
    for _ in range(10):
        await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def following() -> AsyncIterator[Followed]:
    followed = Followed()
    try:
        yield followed
    finally:
        followed.exits.close()


def run(test: Callable[[Followed], Awaitable[None]]) -> None:
    async def main() -> None:
        async with following() as followed:
            await test(followed)

    before = open_descriptors()
    asyncio.run(main())
    assert open_descriptors() == before


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def ids(sleepers: list[subprocess.Popen[bytes]]) -> list[ProcessId]:
    return [identity(each.pid) for each in sleepers]


def die(process: subprocess.Popen[bytes]) -> None:
    """Make it a zombie."""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture
def fast_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits_module, "POLL_PERIOD", 0.01)


@pytest.fixture(params=[True, False], ids=["pidfds", "polling"])
def both_ways(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fast_polls: None
) -> bool:
    """The same interface with and without pidfds."""
    del fast_polls
    if not request.param:
        monkeypatch.delattr(os, "pidfd_open")
    return bool(request.param)


@pytest.mark.usefixtures("both_ways")
def test_a_kill_is_told_once(sleepers: list[subprocess.Popen[bytes]]) -> None:
    first, second, _ = ids(sleepers)

    async def test(followed: Followed) -> None:
        followed.exits.follow("s1", frozenset({first, second}))
        await turns()
        assert followed.notices == []
        os.kill(first.pid, signal.SIGKILL)
        await followed.told(1)
        assert followed.notices == [("s1", first)]
        os.kill(second.pid, signal.SIGKILL)
        await followed.told(2)
        assert followed.notices[1:] == [("s1", second)]

    run(test)


@pytest.mark.usefixtures("both_ways")
def test_who_is_dead_already_is_told_too(sleepers: list[subprocess.Popen[bytes]]) -> None:
    first, second, _ = ids(sleepers)
    die(sleepers[0])
    gone = ProcessId(dead_pid(), 1, boot_id())
    another = ProcessId(second.pid, 1, boot_id())

    async def test(followed: Followed) -> None:
        followed.exits.follow("s1", frozenset({first, gone, another}))
        await followed.told(3)
        assert set(followed.notices) == {("s1", first), ("s1", gone), ("s1", another)}
        assert followed.degraded == []

    run(test)


@pytest.mark.usefixtures("both_ways")
def test_only_who_is_followed_is_told(sleepers: list[subprocess.Popen[bytes]]) -> None:
    first, second, third = ids(sleepers)

    async def test(followed: Followed) -> None:
        followed.exits.follow("s1", frozenset({first, second}))
        followed.exits.follow("s2", frozenset({third}))
        followed.exits.follow("s1", frozenset({second}))
        followed.exits.follow("s2", frozenset())
        followed.exits.follow("never there", frozenset())
        for each in sleepers:
            each.kill()
        await followed.told(1)
        assert followed.notices == [("s1", second)]

    run(test)


@pytest.mark.usefixtures("both_ways")
def test_one_process_of_two_sessions(sleepers: list[subprocess.Popen[bytes]]) -> None:
    first, *_ = ids(sleepers)

    async def test(followed: Followed) -> None:
        followed.exits.follow("s1", frozenset({first}))
        followed.exits.follow("s2", frozenset({first}))
        sleepers[0].kill()
        await followed.told(2)
        assert set(followed.notices) == {("s1", first), ("s2", first)}

    run(test)


@pytest.mark.usefixtures("both_ways")
def test_following_again_changes_nothing(sleepers: list[subprocess.Popen[bytes]]) -> None:
    first, *_ = ids(sleepers)

    async def test(followed: Followed) -> None:
        followed.exits.follow("s1", frozenset({first}))
        before = open_descriptors()
        for _ in range(50):
            followed.exits.follow("s1", frozenset({first}))
        assert open_descriptors() == before
        sleepers[0].kill()
        await followed.told(1)

    run(test)


@pytest.mark.usefixtures("both_ways")
def test_a_notice_may_change_who_is_followed(sleepers: list[subprocess.Popen[bytes]]) -> None:
    first, second, third = ids(sleepers)
    notices: list[ProcessId] = []

    async def main() -> None:
        def notice(_: str, process: ProcessId) -> None:
            notices.append(process)
            exits.follow("s1", frozenset())
            exits.follow("s2", frozenset({third} - {process}))

        exits = Exits(asyncio.get_running_loop(), notice)
        exits.follow("s1", frozenset({first, second}))
        for each in sleepers[:2]:
            die(each)
        await turns()
        assert len(notices) == 1
        sleepers[2].kill()
        await soon(lambda: len(notices) >= 2)
        exits.close()

    asyncio.run(main())
    assert notices[0] in {first, second}
    assert notices[1:] == [third]


def test_nothing_is_told_after_the_end(sleepers: list[subprocess.Popen[bytes]]) -> None:
    first, second, _ = ids(sleepers)

    async def test(followed: Followed) -> None:
        followed.exits.follow("s1", frozenset({first}))
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(os, "pidfd_open")
            followed.exits.follow("s2", frozenset({second}))
        followed.exits.close()
        for each in sleepers:
            each.kill()
        await turns()
        assert followed.notices == []

    async def main() -> None:
        await test(Followed())

    asyncio.run(main())


def test_without_pidfds_that_is_told_once(
    sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, fast_polls: None
) -> None:
    del fast_polls
    monkeypatch.delattr(os, "pidfd_open")
    first, second, _ = ids(sleepers)

    async def test(followed: Followed) -> None:
        followed.exits.follow("s1", frozenset({first}))
        followed.exits.follow("s2", frozenset({second}))
        assert followed.degraded == ["this system has no pidfds"]
        sleepers[0].kill()
        await followed.told(1)

    run(test)


def test_a_system_without_epoll_polls(
    sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, fast_polls: None
) -> None:
    del fast_polls
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "pidfd_open")
    first, *_ = ids(sleepers)

    async def test(followed: Followed) -> None:
        followed.exits.follow("s1", frozenset({first}))
        sleepers[0].kill()
        await followed.told(1)

    run(test)


def test_who_is_hidden_for_a_while_is_not_dead(
    sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, fast_polls: None
) -> None:
    """No descriptor to look with, say. Silence is not death."""
    del fast_polls
    monkeypatch.delattr(os, "pidfd_open")
    first, *_ = ids(sleepers)
    looks: list[int] = []

    class Shy(type(SYSTEM)):  # type: ignore[misc]
        def facts(self, pid: int) -> Facts:
            looks.append(pid)
            return HIDDEN if len(looks) < 4 else SYSTEM.facts(pid)

    async def main() -> None:
        notices: list[ProcessId] = []
        exits = Exits(
            asyncio.get_running_loop(), lambda _, process: notices.append(process), processes=Shy()
        )
        exits.follow("s1", frozenset({first}))
        await soon(lambda: len(looks) >= 6)
        assert notices == []
        sleepers[0].kill()
        await soon(lambda: notices)
        exits.close()

    asyncio.run(main())


WITHOUT_DESCRIPTORS = """
import asyncio, os, resource, subprocess, sys
sys.path[:0] = sys.argv[1:]
from reconciler import exits
from reconciler.processes import SYSTEM
exits.POLL_PERIOD = 0.01

async def main():
    children = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    ids = [SYSTEM.facts(child.pid).process for child in children]
    notices, degraded = [], []
    loop = asyncio.get_running_loop()
    follower = exits.Exits(loop, lambda *told: notices.append(told), degraded.append)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + ROOM, 4096))
    for number, process in enumerate(ids):
        follower.follow(f"s{number}", frozenset({process}))
    for _ in range(20):
        await asyncio.sleep(0.005)
    assert notices == [], notices
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 10, 4096))
    for child in children:
        child.kill()
    async with asyncio.timeout(20):
        while len(notices) < 3:
            await asyncio.sleep(0.005)
    follower.close()
    for child in children:
        child.wait()
    print(len(notices), len(degraded))

asyncio.run(main())
"""


@pytest.mark.parametrize("room", [0, 1, 2])
def test_without_descriptors_it_polls_and_says_so_once(room: int) -> None:
    paths = [str(Path(__file__).parent.parent), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_DESCRIPTORS.replace("ROOM", str(room)), *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == "3 1\n"


def test_many(fast_polls: None) -> None:
    del fast_polls
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(200, soft // 4)
    children = [subprocess.Popen(["sleep", "600"]) for _ in range(count)]

    async def test(followed: Followed) -> None:
        for number, child in enumerate(children):
            followed.exits.follow(f"s{number}", frozenset({identity(child.pid)}))
        for child in children:
            child.kill()
        await followed.told(count)
        assert len(set(followed.notices)) == count
        assert followed.degraded == []

    try:
        run(test)
    finally:
        for child in children:
            child.kill()
            child.wait()


AGAIN = r"""
import asyncio, os, resource, subprocess, sys
sys.path[:0] = sys.argv[1:]
from reconciler import exits
from reconciler.processes import SYSTEM
exits.POLL_PERIOD = 0.01

def pidfds():
    names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return [os.readlink(name) for name in names if os.path.islink(name)].count("anon_inode:[pidfd]")

async def main():
    children = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    notices, degraded = [], []
    loop = asyncio.get_running_loop()
    follower = exits.Exits(loop, lambda *told: notices.append(told), degraded.append)
    resource.setrlimit(resource.RLIMIT_NOFILE, (12, 4096))
    for child in children:
        follower.follow(str(child.pid), frozenset({SYSTEM.facts(child.pid).process}))
    await asyncio.sleep(0.03)
    few = pidfds()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))
    async with asyncio.timeout(20):
        while pidfds() < 3:
            await asyncio.sleep(0.005)
    exits.POLL_PERIOD = 3600
    for child in children:
        child.kill()
    async with asyncio.timeout(20):
        while len(notices) < 3:
            await asyncio.sleep(0.005)
    follower.close()
    for child in children:
        child.wait()
    print(few, len(degraded), pidfds())

asyncio.run(main())
"""


def test_descriptors_that_can_be_had_again_end_the_polling() -> None:
    paths = [str(Path(__file__).parent.parent), *(path for path in sys.path if path)]
    said = subprocess.check_output([sys.executable, "-I", "-c", AGAIN, *paths], text=True)
    assert said == "0 1 0\n"
