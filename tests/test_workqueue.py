from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest
from conftest import asynchronous, happens

from reconciler.hints import AT_ONCE
from reconciler.workqueue import SLICE, LongWork, WorkQueue

FAR = 3600.0


@contextlib.asynccontextmanager
async def working(work: Callable[[str], LongWork | None]) -> AsyncIterator[WorkQueue]:
    queue = WorkQueue(work)
    queue.open()
    try:
        yield queue
    finally:
        await queue.close()


@asynchronous
async def test_what_was_asked_for_before_it_is_open_is_done_then() -> None:
    done: list[str] = []
    queue = WorkQueue(done.append)
    queue.add("a", AT_ONCE)
    await asyncio.sleep(0)
    assert done == []
    queue.open()
    await happens(lambda: done == ["a"])
    await queue.close()


@asynchronous
async def test_a_key_waits_until_it_is_due_and_an_earlier_wish_counts() -> None:
    done: list[str] = []
    async with working(done.append) as queue:
        begun = time.monotonic()
        queue.add("late", begun + FAR)
        queue.add("soon", begun + 0.05)
        queue.add("now", begun)
        await happens(lambda: done == ["now", "soon"])
        assert time.monotonic() - begun >= 0.05
        assert queue.depth == 0
        assert queue.busy_until(begun + FAR + 1)
        assert not queue.busy_until(begun + FAR - 1)
        queue.add("late", AT_ONCE)
        await happens(lambda: done[2:] == ["late"])
        assert not queue.busy_until(begun + FAR + 1)


@asynchronous
async def test_a_key_stays_in_work_until_what_takes_time_is_through_and_comes_again_then() -> None:
    begun: list[str] = []
    go_on = asyncio.Event()

    async def slow() -> None:
        await go_on.wait()

    def work(key: str) -> LongWork | None:
        begun.append(key)
        return slow() if key == "slow" else None

    async with working(work) as queue:
        queue.add("slow", AT_ONCE)
        await happens(lambda: begun == ["slow"])
        queue.add("slow", AT_ONCE)
        queue.add("other", AT_ONCE)
        await happens(lambda: begun == ["slow", "other"])
        assert queue.busy_until(AT_ONCE)
        assert queue.depth == 1
        go_on.set()
        await happens(lambda: begun == ["slow", "other", "slow"])
        await happens(lambda: not queue.busy_until(time.monotonic() + FAR))


@asynchronous
async def test_what_is_asked_for_by_the_work_itself_is_done_too() -> None:
    done: list[str] = []

    def work(key: str) -> None:
        done.append(key)
        if len(done) < 3:
            queue.add(key, AT_ONCE)

    async with working(work) as queue:
        queue.add("a", AT_ONCE)
        await happens(lambda: done == ["a", "a", "a"])


@asynchronous
async def test_hints_from_threads_are_joined_and_none_is_lost() -> None:
    done: list[str] = []
    async with working(done.append) as queue:

        def ask() -> None:
            for number in range(50):
                queue.add_from_thread(str(number))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done == []
        assert queue.busy_until(AT_ONCE)
        await happens(lambda: len(done) == 50)
        assert set(done) == {str(n) for n in range(50)}
        assert not queue.busy_until(time.monotonic() + FAR)


@asynchronous
async def test_the_loop_gets_its_turn_after_each_slice() -> None:
    done: list[str] = []
    turns: list[int] = []

    def work(key: str) -> None:
        done.append(key)
        end = time.monotonic() + SLICE
        while time.monotonic() <= end:
            pass
        asyncio.get_running_loop().call_soon(lambda: turns.append(len(done)))

    async with working(work) as queue:
        for key in "abc":
            queue.add(key, AT_ONCE)
        await happens(lambda: len(turns) == 3)
    assert turns[0] < 3, "not all was done in one go"


@asynchronous
async def test_an_error_of_the_work_costs_one_turn_and_no_key() -> None:
    done: list[str] = []
    told: list[dict[str, object]] = []

    def work(key: str) -> None:
        done.append(key)
        if done == ["bad"]:
            raise LookupError(key)

    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    async with working(work) as queue:
        queue.add("bad", AT_ONCE)
        queue.add("good", time.monotonic())
        await happens(lambda: done == ["bad", "good"])
        assert isinstance(told[0]["exception"], LookupError)
        queue.add("bad", AT_ONCE)
        await happens(lambda: done == ["bad", "good", "bad"])


@asynchronous
async def test_it_closes_once_what_takes_time_has_ended_and_does_nothing_after_that() -> None:
    told: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(FAR)
        finally:
            await asyncio.sleep(0)
            told.append("ended")

    def work(key: str) -> LongWork | None:
        told.append(key)
        return slow()

    queue = WorkQueue(work)
    queue.open()
    queue.add("a", AT_ONCE)
    await happens(lambda: told == ["a"])
    await asyncio.sleep(0)
    queue.add("later", time.monotonic() + 0.01)
    queue.add("a", AT_ONCE)
    queue.add("due", AT_ONCE)
    await queue.close()
    assert told == ["a", "ended"]
    queue.add("b", AT_ONCE)
    queue.add_from_thread("c")
    await asyncio.sleep(0.02)
    assert told == ["a", "ended"]


def test_a_hint_from_a_thread_after_the_loop_has_ended_is_no_trouble() -> None:
    queue = WorkQueue(lambda _: pytest.fail("nobody works any more"))

    async def life() -> None:
        queue.open()
        await queue.close()

    asyncio.run(life())
    queue.add_from_thread("a")
