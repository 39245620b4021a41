"""Tests of the prompt cache: it encodes each prompt once, as FluxPipeline does, and is bounded in bytes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from models.flux.engine import FluxEngine
from models.flux.prompt_cache import PromptCache, PromptEmbeds, count_text_tokens
from tests.support import tiny_flux
from tests.support.tiny_flux import AllSafeChecker, generate, make_request, tiers_of


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return tiny_flux.pipeline()


@pytest.fixture
def encoded(pipeline: FluxPipeline) -> Iterator[list[int]]:
    """Yield a list with the number of prompts in each run of the large text encoder."""
    num_prompts: list[int] = []

    def record(_: Any, inputs: Any) -> None:
        num_prompts.append(len(inputs[0]))

    hook = pipeline.text_encoder_2.register_forward_pre_hook(record)
    yield num_prompts
    hook.remove()


def size_of_one(pipeline: FluxPipeline) -> int:
    embeds: PromptEmbeds = PromptCache("cpu").encode("", pipeline)
    return embeds.num_bytes


@pytest.mark.parametrize(("model_max_length", "num_tokens"), [(512, 512), (64, 64), (10**30, 512)])
def test_embeddings_equal_those_of_the_pipeline(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, model_max_length: int, num_tokens: int
) -> None:
    monkeypatch.setattr(pipeline.tokenizer_2, "model_max_length", model_max_length)
    prompt = "a red apple on a blue table"
    embeds = PromptCache("cpu").encode(prompt, pipeline)
    with torch.no_grad():
        expected = pipeline.encode_prompt(prompt, None, max_sequence_length=num_tokens)
    assert embeds.prompt_embeds.shape[1] == count_text_tokens(pipeline) == num_tokens
    for one, other in zip((embeds.prompt_embeds, embeds.pooled_prompt_embeds, embeds.ids), expected, strict=True):
        assert torch.equal(one, other)


def test_a_prompt_is_encoded_once(pipeline: FluxPipeline, encoded: list[int]) -> None:
    cache = PromptCache("cpu")
    first = cache.encode("a fish", pipeline)
    assert cache.encode("a fish", pipeline) is first
    assert len(encoded) == 1
    cache.encode("a car", pipeline)
    cache.encode("a fish", pipeline)
    assert len(encoded) == 2


def test_tasks_without_loras_find_a_prompt_that_was_encoded_before(pipeline: FluxPipeline, encoded: list[int]) -> None:
    engine = FluxEngine(pipeline, AllSafeChecker(), tiers_of(pipeline.transformer), "cpu")
    engine.prompts.encode("a fish", pipeline)
    assert generate(engine, make_request("a fish", width=64, height=64, num_inference_steps=1), 1)
    assert len(encoded) == 1


@pytest.mark.parametrize("acceleration", ["none", "regular", "high"])
def test_images_and_requests_share_an_encoded_prompt(
    pipeline: FluxPipeline, encoded: list[int], acceleration: str
) -> None:
    engine = FluxEngine(pipeline, AllSafeChecker(), tiers_of(pipeline.transformer), "cpu")
    generate(engine, make_request("a fish", num_images=3, acceleration=acceleration), 1)
    generate(engine, make_request("a fish", 96, 64, guidance_scale=9, acceleration="none"), 2)
    assert encoded == [1]


def test_nothing_is_encoded_before_the_first_step(pipeline: FluxPipeline, encoded: list[int]) -> None:
    engine = FluxEngine(pipeline, AllSafeChecker(), tiers_of(pipeline.transformer), "cpu")
    engine.start(make_request("a fish"), 1)
    assert encoded == []


def test_the_least_recently_used_prompts_are_evicted_first(pipeline: FluxPipeline, encoded: list[int]) -> None:
    cache = PromptCache("cpu", max_bytes=3 * size_of_one(pipeline))
    for prompt in ("one", "two", "three"):
        cache.encode(prompt, pipeline)
    cache.encode("one", pipeline)
    cache.encode("four", pipeline)
    encoded.clear()
    for prompt in ("one", "three", "four"):
        cache.encode(prompt, pipeline)
    assert encoded == []
    cache.encode("two", pipeline)
    assert encoded == [1]


def test_the_cache_is_bounded_in_bytes(pipeline: FluxPipeline) -> None:
    one = size_of_one(pipeline)
    # The limit is no multiple of one entry. An entry that fits only in part is not kept.
    cache = PromptCache("cpu", max_bytes=3 * one + one // 2)
    for number in range(8):
        cache.encode(f"picture {number}", pipeline)
        assert cache.num_bytes == min(number + 1, 3) * one <= cache.max_bytes


def test_the_last_prompt_is_kept_even_if_it_exceeds_the_limit(pipeline: FluxPipeline, encoded: list[int]) -> None:
    one = size_of_one(pipeline)
    encoded.clear()
    cache = PromptCache("cpu", max_bytes=one - 1)
    cache.encode("a fish", pipeline)
    kept = cache.encode("a car", pipeline)
    assert cache.num_bytes == one
    assert cache.encode("a car", pipeline) is kept
    assert encoded == [1, 1]


def test_a_task_can_use_a_prompt_after_its_eviction(pipeline: FluxPipeline) -> None:
    engine = FluxEngine(pipeline, AllSafeChecker(), tiers_of(pipeline.transformer), "cpu")
    expected = generate(engine, make_request("a fish"), 1)
    engine.prompts.max_bytes = 1
    task = engine.start(make_request("a fish"), 1)
    engine.advance(task)
    generate(engine, make_request("a car"), 1)
    assert [image.tobytes() for image in tiny_flux.finish_task(engine, task)] == [image.tobytes() for image in expected]
