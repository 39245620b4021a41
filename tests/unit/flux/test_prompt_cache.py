"""Prompts are encoded once, as FluxPipeline does it, and what is kept of them is bounded."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from models.flux.engine import FluxEngine
from models.flux.prompt_cache import NUM_TOKENS, PromptCache, PromptEmbeds
from tests.support import tiny_flux
from tests.support.tiny_flux import CallsAllSafe, asked, painted, tiers_of


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return tiny_flux.pipeline()


@pytest.fixture
def encoded(pipeline: FluxPipeline) -> Iterator[list[int]]:
    """A number for each time the large text encoder ran: how many prompts it was given."""
    seen: list[int] = []

    def look(_: Any, inputs: Any) -> None:
        seen.append(len(inputs[0]))

    hook = pipeline.text_encoder_2.register_forward_pre_hook(look)
    yield seen
    hook.remove()


def size_of_one(pipeline: FluxPipeline) -> int:
    text: PromptEmbeds = PromptCache("cpu").encode("", pipeline)
    return text.num_bytes


def test_equals_the_pipeline(pipeline: FluxPipeline) -> None:
    prompt = "a red apple on a blue table"
    text = PromptCache("cpu").encode(prompt, pipeline)
    with torch.no_grad():
        expected = pipeline.encode_prompt(prompt, None, max_sequence_length=512)
    assert text.prompt_embeds.shape[1] == NUM_TOKENS == 512
    for one, other in zip((text.prompt_embeds, text.pooled_prompt_embeds, text.ids), expected, strict=True):
        assert torch.equal(one, other)


def test_a_prompt_is_encoded_once(pipeline: FluxPipeline, encoded: list[int]) -> None:
    texts = PromptCache("cpu")
    first = texts.encode("a fish", pipeline)
    assert texts.encode("a fish", pipeline) is first
    assert len(encoded) == 1
    texts.encode("a car", pipeline)
    texts.encode("a fish", pipeline)
    assert len(encoded) == 2


@pytest.mark.parametrize("acceleration", ["none", "regular", "high"])
def test_pictures_and_requests_share_their_prompt(
    pipeline: FluxPipeline, encoded: list[int], acceleration: str
) -> None:
    engine = FluxEngine(pipeline, CallsAllSafe(), tiers_of(pipeline.transformer), "cpu")
    painted(engine, asked("a fish", num_images=3, acceleration=acceleration), 1)
    painted(engine, asked("a fish", 96, 64, guidance_scale=9, acceleration="none"), 2)
    assert encoded == [1]


def test_nothing_is_encoded_before_the_first_step(pipeline: FluxPipeline, encoded: list[int]) -> None:
    engine = FluxEngine(pipeline, CallsAllSafe(), tiers_of(pipeline.transformer), "cpu")
    engine.start(asked("a fish"), 1)
    assert encoded == []


def test_the_least_recently_used_go_first(pipeline: FluxPipeline, encoded: list[int]) -> None:
    texts = PromptCache("cpu", max_bytes=3 * size_of_one(pipeline))
    for prompt in ("one", "two", "three"):
        texts.encode(prompt, pipeline)
    texts.encode("one", pipeline)
    texts.encode("four", pipeline)
    encoded.clear()
    for prompt in ("one", "three", "four"):
        texts.encode(prompt, pipeline)
    assert encoded == []
    texts.encode("two", pipeline)
    assert encoded == [1]


def test_what_is_kept_is_bounded_in_bytes(pipeline: FluxPipeline) -> None:
    one = size_of_one(pipeline)
    # Not a multiple: what does not fit wholly is not kept.
    texts = PromptCache("cpu", max_bytes=3 * one + one // 2)
    for number in range(8):
        texts.encode(f"picture {number}", pipeline)
        assert texts.num_bytes == min(number + 1, 3) * one <= texts.max_bytes


def test_the_last_one_is_kept_though_it_is_too_large(pipeline: FluxPipeline, encoded: list[int]) -> None:
    one = size_of_one(pipeline)
    encoded.clear()
    texts = PromptCache("cpu", max_bytes=one - 1)
    texts.encode("a fish", pipeline)
    kept = texts.encode("a car", pipeline)
    assert texts.num_bytes == one
    assert texts.encode("a car", pipeline) is kept
    assert encoded == [1, 1]


def test_what_was_forgotten_can_still_be_painted_with(pipeline: FluxPipeline) -> None:
    engine = FluxEngine(pipeline, CallsAllSafe(), tiers_of(pipeline.transformer), "cpu")
    expected = painted(engine, asked("a fish"), 1)
    engine.prompts.max_bytes = 1
    painting = engine.start(asked("a fish"), 1)
    engine.advance(painting)
    painted(engine, asked("a car"), 1)
    assert [picture.tobytes() for picture in tiny_flux.finished(engine, painting)] == [
        picture.tobytes() for picture in expected
    ]
