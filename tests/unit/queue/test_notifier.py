"""Tests of notifications: sent from any thread, received on the event loop."""

import asyncio
import threading

from server.queue.notifier import QUEUE, WEBHOOKS, Notifier


def bound_notifier() -> Notifier:
    """Return a notifier bound to the running event loop."""
    notifier = Notifier()
    notifier.bind_loop(asyncio.get_running_loop())
    return notifier


def test_a_notification_from_another_thread_wakes_the_listener() -> None:
    async def listen() -> None:
        notifier = bound_notifier()
        with notifier.subscribe("job") as event:
            thread = threading.Thread(target=notifier.notify, args=("job",))
            thread.start()
            await event.wait()
            thread.join()

    asyncio.run(listen())


def test_only_the_listeners_of_a_topic_are_woken() -> None:
    async def listen() -> list[bool]:
        notifier = bound_notifier()
        with (
            notifier.subscribe("job") as first,
            notifier.subscribe("job", QUEUE) as second,
            notifier.subscribe("other") as third,
        ):
            notifier.notify("job")
            await first.wait()
            return [event.is_set() for event in (first, second, third)]

    assert asyncio.run(listen()) == [True, True, False]


def test_one_call_can_notify_several_topics() -> None:
    async def listen() -> None:
        notifier = bound_notifier()
        with notifier.subscribe(WEBHOOKS) as webhooks, notifier.subscribe(QUEUE) as queue:
            notifier.notify("job", QUEUE, WEBHOOKS)
            await asyncio.gather(webhooks.wait(), queue.wait())

    asyncio.run(listen())


def test_a_cleared_event_is_set_again() -> None:
    async def listen() -> None:
        notifier = bound_notifier()
        with notifier.subscribe("job") as event:
            for _ in range(3):
                event.clear()
                notifier.notify("job")
                await event.wait()

    asyncio.run(listen())


def test_after_one_listener_unsubscribes_only_the_others_are_woken() -> None:
    async def listen() -> list[bool]:
        notifier = bound_notifier()
        with notifier.subscribe("job") as subscribed:
            with notifier.subscribe("job") as unsubscribed:
                pass
            notifier.notify("job")
            await subscribed.wait()
            return [subscribed.is_set(), unsubscribed.is_set()]

    assert asyncio.run(listen()) == [True, False]


def test_an_unsubscribed_listener_leaves_nothing_in_memory() -> None:
    async def listen() -> Notifier:
        notifier = bound_notifier()
        for number in range(10):
            with notifier.subscribe(str(number)):
                pass
        return notifier

    assert asyncio.run(listen())._listeners == {}


def test_notifying_without_listeners_is_no_error() -> None:
    Notifier().notify("job")

    async def listen() -> Notifier:
        notifier = bound_notifier()
        notifier.notify("job")
        return notifier

    asyncio.run(listen()).notify("job")


def test_close_wakes_all_listeners_and_the_worker() -> None:
    async def close() -> Notifier:
        notifier = bound_notifier()
        with notifier.subscribe("job") as first, notifier.subscribe(QUEUE) as second:
            notifier.close()
            await asyncio.gather(first.wait(), second.wait())
        return notifier

    notifier = asyncio.run(close())
    assert notifier.is_closing
    assert notifier.work_available.is_set()
