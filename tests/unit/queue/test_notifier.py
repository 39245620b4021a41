"""The bell: rung from any thread, heard on the event loop."""

import asyncio
import threading

from server.queue.notifier import QUEUE, WEBHOOKS, Notifier


def attached() -> Notifier:
    """A notifier of the loop that runs."""
    notifier = Notifier()
    notifier.bind_loop(asyncio.get_running_loop())
    return notifier


def test_a_bell_is_heard_from_another_thread() -> None:
    async def listen() -> None:
        notifier = attached()
        with notifier.subscribe("job") as bell:
            thread = threading.Thread(target=notifier.notify, args=("job",))
            thread.start()
            await bell.wait()
            thread.join()

    asyncio.run(listen())


def test_everybody_who_listens_hears_it_and_nobody_else() -> None:
    async def listen() -> list[bool]:
        notifier = attached()
        with (
            notifier.subscribe("job") as first,
            notifier.subscribe("job", QUEUE) as second,
            notifier.subscribe("other") as third,
        ):
            notifier.notify("job")
            await first.wait()
            return [bell.is_set() for bell in (first, second, third)]

    assert asyncio.run(listen()) == [True, True, False]


def test_one_ring_may_name_several_topics() -> None:
    async def listen() -> None:
        notifier = attached()
        with notifier.subscribe(WEBHOOKS) as webhooks, notifier.subscribe(QUEUE) as queue:
            notifier.notify("job", QUEUE, WEBHOOKS)
            await asyncio.gather(webhooks.wait(), queue.wait())

    asyncio.run(listen())


def test_a_bell_that_is_cleared_rings_again() -> None:
    async def listen() -> None:
        notifier = attached()
        with notifier.subscribe("job") as bell:
            for _ in range(3):
                bell.clear()
                notifier.notify("job")
                await bell.wait()

    asyncio.run(listen())


def test_who_left_hears_nothing_and_takes_nobody_along() -> None:
    async def listen() -> list[bool]:
        notifier = attached()
        with notifier.subscribe("job") as stays:
            with notifier.subscribe("job") as left:
                pass
            notifier.notify("job")
            await stays.wait()
            return [stays.is_set(), left.is_set()]

    assert asyncio.run(listen()) == [True, False]


def test_nothing_is_kept_of_who_left() -> None:
    async def listen() -> Notifier:
        notifier = attached()
        for number in range(10):
            with notifier.subscribe(str(number)):
                pass
        return notifier

    assert asyncio.run(listen())._listeners == {}


def test_a_ring_that_nobody_hears_is_no_error() -> None:
    Notifier().notify("job")

    async def listen() -> Notifier:
        notifier = attached()
        notifier.notify("job")
        return notifier

    asyncio.run(listen()).notify("job")


def test_closing_wakes_everybody_and_the_worker() -> None:
    async def close() -> Notifier:
        notifier = attached()
        with notifier.subscribe("job") as first, notifier.subscribe(QUEUE) as second:
            notifier.close()
            await asyncio.gather(first.wait(), second.wait())
        return notifier

    notifier = asyncio.run(close())
    assert notifier.is_closing
    assert notifier.work_available.is_set()
