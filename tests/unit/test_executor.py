"""Threads that owners share: who has how many of them, and for how long."""

import asyncio
import threading

import pytest

from server.executor import FairExecutor


def test_one_owner_leaves_threads_to_the_others() -> None:
    async def run() -> None:
        turns, gate, begun = FairExecutor("test", 4, 2), threading.Event(), list[str]()

        def work(name: str) -> None:
            begun.append(name)
            gate.wait(60)

        mine = [asyncio.ensure_future(turns.run("me", work, "me")) for _ in range(10)]
        await asyncio.sleep(0)
        assert await turns.run("you", lambda: "done") == "done"
        assert begun == ["me", "me"]
        gate.set()
        await asyncio.gather(*mine)

    asyncio.run(run())


def test_who_leaves_gives_its_thread_back_only_when_that_is_done() -> None:
    async def run() -> None:
        turns, gate = FairExecutor("test", 4, 1), threading.Event()
        first = asyncio.ensure_future(turns.run("me", gate.wait, 60))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.ensure_future(turns.run("me", lambda: "done"))
        assert await turns.run("you", lambda: "done") == "done"
        assert not second.done()
        gate.set()
        assert await second == "done"

    asyncio.run(run())


def test_who_gives_up_waiting_keeps_nobody_out() -> None:
    async def run() -> None:
        turns, gate = FairExecutor("test", 4, 1), threading.Event()
        first = asyncio.ensure_future(turns.run("me", gate.wait, 60))
        second = asyncio.ensure_future(turns.run("me", lambda: "done"))
        await asyncio.sleep(0)
        second.cancel()
        gate.set()
        await first
        assert await turns.run("me", lambda: "done") == "done"

    asyncio.run(run())


def test_errors_are_raised_and_the_next_has_its_turn() -> None:
    async def run() -> None:
        turns = FairExecutor("test", 1, 1)
        with pytest.raises(ZeroDivisionError):
            await turns.run("me", lambda: 1 // 0)
        assert await turns.run("me", lambda: "done") == "done"

    asyncio.run(run())
