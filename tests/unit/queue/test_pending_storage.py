"""What requests that are not done need on the disk, as they come and go."""

import asyncio
from pathlib import Path

import pytest
from pydantic_core import to_json

from models.flux_dev import FluxDevInput
from server.errors import QueueFull
from server.queue.jobs import Job
from server.queue.pending_storage import PendingStorage
from server.queue.queue import Queue
from tests.support.components import Parts, opened, painted, submission

SIZES = {"a.png": 1000, "b.png": 50}


def with_needs(parts: Parts) -> tuple[Queue, PendingStorage]:
    """A queue beside the parts' own, whose files have these sizes."""
    needs = PendingStorage(SIZES.__getitem__)
    return Queue(parts.database, parts.notifier, clock=parts.clock, pending_storage=needs), needs


def submitted(queue: Queue, owner: str, *names: str) -> Job:
    return queue.submit(
        submission(owner=owner, input="{}", input_files={f"loras.{n}": name for n, name in enumerate(names)})
    )


def test_a_file_counts_once_for_each_owner(parts: Parts) -> None:
    queue, needs = with_needs(parts)
    first, second = submitted(queue, "me", "a.png", "b.png"), submitted(queue, "me", "a.png")
    other = submitted(queue, "you", "a.png")
    assert (needs.num_bytes("me"), needs.num_bytes("you")) == (1054, 1002)
    assert needs.num_bytes("you", {"a.png", "b.png"}) == 1052
    queue.cancel(first)
    assert needs.num_bytes("me") == 1002
    assert needs.file_names() == {"a.png"}
    for job in (second, other):
        queue.cancel(job)
    assert (needs.num_bytes("me"), needs.num_bytes("you"), needs.file_names()) == (0, 0, set())


def test_it_counts_until_the_request_is_done(parts: Parts) -> None:
    queue, needs = with_needs(parts)
    submitted(queue, "me", "a.png")
    for _ in range(2):
        found = queue.claim()
        assert found
        assert needs.num_bytes("me") == 1002
        queue.release(found[0])
    found = queue.claim()
    assert found
    queue.finish(found[0], painted())
    assert needs.num_bytes("me") == 0


def test_a_start_counts_what_is_there(parts: Parts) -> None:
    submitted(with_needs(parts)[0], "me", "a.png", "b.png")
    queue, needs = with_needs(parts)
    queue.recover()
    assert needs.num_bytes("me") == 1052


async def bring(parts: Parts, owner: str) -> None:
    """What a request of this owner's meets that names nothing."""
    await parts.inputs.resolve(FluxDevInput(prompt="x", seed=7), owner)


def test_texts_alone_use_up_the_room_of_their_owner(tmp_path: Path) -> None:
    with opened(tmp_path) as parts:
        parts.inputs._max_bytes_per_owner = 50_000
        text = to_json({"prompt": "x" * 20_000}).decode()
        for _ in range(3):
            asyncio.run(bring(parts, "me"))
            parts.queue.submit(submission(input=text, owner="me"))
        with pytest.raises(QueueFull, match="--max-uploads-gb"):
            asyncio.run(bring(parts, "me"))
        asyncio.run(bring(parts, "you"))
