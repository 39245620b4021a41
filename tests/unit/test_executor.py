"""Tests of the fair executor: how many shared threads an owner has, and for how long."""

import asyncio
import threading

import pytest

from server.executor import FairExecutor


def test_one_owner_leaves_threads_to_other_owners() -> None:
    async def run() -> None:
        executor, gate, started = FairExecutor("test", 4, 2), threading.Event(), list[str]()

        def work(name: str) -> None:
            started.append(name)
            gate.wait(60)

        calls = [asyncio.ensure_future(executor.run("me", work, "me")) for _ in range(10)]
        await asyncio.sleep(0)
        assert await executor.run("you", lambda: "done") == "done"
        assert started == ["me", "me"]
        gate.set()
        await asyncio.gather(*calls)

    asyncio.run(run())


def test_a_cancelled_call_releases_its_thread_only_when_the_work_is_done() -> None:
    async def run() -> None:
        executor, gate = FairExecutor("test", 4, 1), threading.Event()
        first = asyncio.ensure_future(executor.run("me", gate.wait, 60))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.ensure_future(executor.run("me", lambda: "done"))
        assert await executor.run("you", lambda: "done") == "done"
        assert not second.done()
        gate.set()
        assert await second == "done"

    asyncio.run(run())


def test_a_call_that_is_cancelled_while_waiting_blocks_no_other() -> None:
    async def run() -> None:
        executor, gate = FairExecutor("test", 4, 1), threading.Event()
        first = asyncio.ensure_future(executor.run("me", gate.wait, 60))
        second = asyncio.ensure_future(executor.run("me", lambda: "done"))
        await asyncio.sleep(0)
        second.cancel()
        gate.set()
        await first
        assert await executor.run("me", lambda: "done") == "done"

    asyncio.run(run())


def test_errors_are_raised_and_the_next_call_runs() -> None:
    async def run() -> None:
        executor = FairExecutor("test", 1, 1)
        with pytest.raises(ZeroDivisionError):
            await executor.run("me", lambda: 1 // 0)
        assert await executor.run("me", lambda: "done") == "done"

    asyncio.run(run())
