"""Tests of the disk space that unfinished requests need, counted as requests are submitted and finished."""

import asyncio
from pathlib import Path

import pytest
from pydantic_core import to_json

from models.flux_dev import FluxDevInput
from models.flux_lora import FluxLoraInpaintingInput
from models.schema import EXAMPLE_IMAGE, EXAMPLE_MASK
from server.errors import InvalidInput, QueueFull
from server.queue.jobs import Job
from server.queue.pending_storage import PendingStorage
from server.queue.queue import Queue
from tests.support.components import Components, open_components, submission, success

SIZES = {"a.png": 1000, "b.png": 50}


def queue_with_sizes(components: Components) -> tuple[Queue, PendingStorage]:
    """Return a second queue on the same database, and its PendingStorage with the file sizes of SIZES."""
    pending = PendingStorage(SIZES.__getitem__)
    return Queue(components.database, components.notifier, clock=components.clock, pending_storage=pending), pending


def submit_with_files(queue: Queue, owner: str, *names: str) -> Job:
    return queue.submit(
        submission(owner=owner, input="{}", input_files={f"loras.{n}": name for n, name in enumerate(names)})
    )


def test_a_file_counts_once_for_each_owner(components: Components) -> None:
    queue, pending = queue_with_sizes(components)
    first, second = submit_with_files(queue, "me", "a.png", "b.png"), submit_with_files(queue, "me", "a.png")
    other = submit_with_files(queue, "you", "a.png")
    assert (pending.num_bytes("me"), pending.num_bytes("you")) == (1054, 1002)
    assert pending.num_bytes("you", {"a.png", "b.png"}) == 1052
    queue.cancel(first)
    assert pending.num_bytes("me") == 1002
    assert pending.file_names() == {"a.png"}
    for job in (second, other):
        queue.cancel(job)
    assert (pending.num_bytes("me"), pending.num_bytes("you"), pending.file_names()) == (0, 0, set())


def test_a_file_counts_until_its_request_is_finished(components: Components) -> None:
    queue, pending = queue_with_sizes(components)
    submit_with_files(queue, "me", "a.png")
    for _ in range(2):
        claim = queue.claim()
        assert claim
        assert pending.num_bytes("me") == 1002
        queue.release(claim[0])
    claim = queue.claim()
    assert claim
    queue.finish(claim[0], success())
    assert pending.num_bytes("me") == 0


def test_recover_counts_the_unfinished_requests(components: Components) -> None:
    submit_with_files(queue_with_sizes(components)[0], "me", "a.png", "b.png")
    queue, pending = queue_with_sizes(components)
    queue.recover()
    assert pending.num_bytes("me") == 1052


async def resolve_inputs(components: Components, owner: str) -> None:
    """Resolve the inputs of a request that refers to no files, as the server does before accepting it."""
    await components.inputs.resolve(FluxDevInput(prompt="x", seed=7), owner)


def test_prompts_without_files_also_count_towards_the_limit_of_their_owner(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        components.inputs._max_bytes_per_owner = 50_000
        text = to_json({"prompt": "x" * 20_000}).decode()
        for _ in range(3):
            asyncio.run(resolve_inputs(components, "me"))
            components.queue.submit(submission(input=text, owner="me"))
        with pytest.raises(QueueFull, match="--max-uploads-gb"):
            asyncio.run(resolve_inputs(components, "me"))
        asyncio.run(resolve_inputs(components, "you"))


WITH_TWO_FILES = FluxLoraInpaintingInput(prompt="x", image_url=EXAMPLE_IMAGE, mask_url=EXAMPLE_MASK)


def test_no_more_files_are_fetched_when_the_limit_of_their_owner_is_reached(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        components.queue.submit(submission(input=to_json({"prompt": "x" * 20_000}).decode(), owner="me"))
        components.inputs._max_bytes_per_owner = 20_020
        with pytest.raises(QueueFull, match="--max-uploads-gb"):
            asyncio.run(components.inputs.resolve(WITH_TWO_FILES, "me"))
        assert len(list((components.data_dir / "inputs").iterdir())) == 1


def test_files_that_exceed_the_limit_alone_are_invalid_however_often_they_are_sent(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        components.inputs._max_bytes_per_owner = 10
        with pytest.raises(InvalidInput, match="more than 1e-08 GB together") as refused:
            asyncio.run(components.inputs.resolve(WITH_TWO_FILES, "me"))
        (entry,) = refused.value.detail
        assert (entry["type"], entry["loc"]) == ("file_too_large", ["body", "image_url"])
        assert (entry["input"], entry["ctx"]) == (EXAMPLE_IMAGE[:1000], {"max_size": 10})
        assert len(list((components.data_dir / "inputs").iterdir())) == 1
