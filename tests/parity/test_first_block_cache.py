"""The first-block cache against diffusers' own hooks: the same steps skipped, the same bytes."""

from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig

from models.flux import compilation
from models.flux.acceleration import Tier
from models.flux.engine import FluxEngine
from models.flux.first_block_cache import THRESHOLD, FirstBlockCache, velocity
from models.flux_dev import FluxDevInput
from tests.support import tiny_flux
from tests.support.tiny_flux import AllSafeChecker, generate_latents, make_request, run_steps

NUM_STEPS, NUM_TOKENS, NUM_TEXT_TOKENS = 8, 24, 12


def inputs_of(transformer: Any, step: int, latents: torch.Tensor, text: torch.Tensor) -> dict[str, Any]:
    guidance = torch.full([1], 3.5) if transformer.config.guidance_embeds else None
    return {
        "hidden_states": latents,
        "encoder_hidden_states": text,
        "pooled_projections": text[:, 0],
        "timestep": torch.full([1], 1 - step / NUM_STEPS).to(latents.dtype),
        "guidance": guidance,
        "img_ids": torch.arange(NUM_TOKENS)[:, None].expand(-1, 3).to(latents.dtype),
        "txt_ids": torch.zeros(NUM_TEXT_TOKENS, 3, dtype=latents.dtype),
    }


def follow_velocities(transformer: Any, forward: Any) -> list[torch.Tensor]:
    """Return the velocity of `forward` at each of NUM_STEPS steps. Each step starts where the previous velocity led."""
    generator = torch.Generator().manual_seed(5)
    dtype = transformer.dtype
    latents = torch.randn(1, NUM_TOKENS, transformer.config.in_channels, generator=generator).to(dtype)
    text = torch.randn(1, NUM_TEXT_TOKENS, tiny_flux.TEXT_WIDTH, generator=generator).to(dtype)
    velocities = []
    for step in range(NUM_STEPS):
        with torch.no_grad():
            velocities.append(forward(**inputs_of(transformer, step, latents, text)))
        latents = latents - velocities[-1] / NUM_STEPS
    return velocities


def with_diffusers_cache(transformer: Any, threshold: float) -> list[torch.Tensor]:
    copy = compilation.clone_sharing_weights(transformer)
    copy.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    with copy.cache_context("one"):
        return follow_velocities(copy, lambda **inputs: copy(**inputs, return_dict=False)[0])


def without_cache(transformer: Any) -> list[torch.Tensor]:
    return follow_velocities(transformer, lambda **inputs: transformer(**inputs, return_dict=False)[0])


def with_our_cache(transformer: Any, cache: FirstBlockCache) -> list[torch.Tensor]:
    return follow_velocities(transformer, lambda **inputs: velocity(transformer, cache, **inputs))


def residual_changes(transformer: Any) -> list[float]:
    """Return the relative change of the first block's residual at each step when no step is skipped, ascending."""
    seen: list[float] = []

    class RecordingCache(FirstBlockCache):
        def can_skip(self, head: torch.Tensor) -> bool:
            if self.head is not None:
                seen.append(float((head - self.head).abs().mean() / self.head.abs().mean()))
            return False

    with_our_cache(transformer, RecordingCache())
    return sorted(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"guidance_embeds": False, "num_layers": 2, "num_single_layers": 1}])
@pytest.mark.parametrize("share", [0.25, 0.75, 2.0])
def test_equals_diffusers(dtype: torch.dtype, settings: dict[str, Any], share: float) -> None:
    transformer = tiny_flux.transformer(dtype, **settings)
    changes = residual_changes(transformer)
    threshold = share * changes[-1] if share > 1 else changes[int(share * len(changes))]
    cache = FirstBlockCache(threshold)
    ours, theirs = with_our_cache(transformer, cache), with_diffusers_cache(transformer, threshold)
    assert 0 < cache.num_skipped < NUM_STEPS
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    uncached = without_cache(transformer)
    # The first step has nothing to compare with, so it is never skipped. Skipping later steps changes the result.
    assert torch.equal(ours[0], uncached[0])
    assert not all(torch.equal(one, other) for one, other in zip(ours, uncached, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"guidance_embeds": False}])
def test_a_cache_that_never_skips_is_the_plain_forward(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    transformer = tiny_flux.transformer(dtype, **settings)
    cache = FirstBlockCache(0.0)
    for one, other in zip(with_our_cache(transformer, cache), without_cache(transformer), strict=True):
        assert torch.equal(one, other)
    assert cache.num_skipped == 0


def test_nan_is_never_skipped() -> None:
    cache = FirstBlockCache(head=torch.full((1, 2, 2), float("nan")), tail=torch.zeros(1, 2, 2))
    assert not cache.can_skip(torch.zeros(1, 2, 2))


# -- in the engine


@pytest.fixture(scope="module")
def engine() -> FluxEngine:
    pipeline = tiny_flux.pipeline()
    tiers = [Tier("none", pipeline.transformer), Tier("high", pipeline.transformer, skips_blocks=True)]
    return FluxEngine(pipeline, AllSafeChecker(), tiers, "cpu")


def request_with_cache(prompt: str = "a fish", **fields: Any) -> FluxDevInput:
    return make_request(prompt, acceleration="high", num_inference_steps=6, **fields)


def test_tier_none_has_no_cache(engine: FluxEngine) -> None:
    task = engine.start(make_request(acceleration="none"), 1)
    engine.advance(task)
    assert [sample.cache for sample in task.samples] == [None]


def test_each_image_has_its_own_cache_until_it_is_decoded(engine: FluxEngine) -> None:
    tasks = [engine.start(request_with_cache(num_images=2), 1), engine.start(request_with_cache("a car"), 2)]
    for task in tasks:
        run_steps(engine, task)
    samples = [sample for task in tasks for sample in task.samples]
    caches = [sample.cache for sample in samples]
    assert len({id(cache) for cache in caches}) == len(caches) == 3
    assert all(cache and cache.threshold == THRESHOLD and cache.head is not None for cache in caches)
    for task in tasks:
        while not task.is_decoded:
            engine.decode(task)
    assert [sample.cache for sample in samples] == [None] * 3


def test_interleaved_tasks_do_not_skip_for_each_other(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # The residual changes more from step to step with random weights than with FLUX.1's.
    # This threshold skips about half of the steps.
    monkeypatch.setattr("models.flux.engine.FirstBlockCache", lambda: FirstBlockCache(0.3))
    requests = [request_with_cache("a fish"), request_with_cache("a car", guidance_scale=9)]
    alone = [generate_latents(engine, request, seed) for seed, request in enumerate(requests)]
    tasks = [engine.start(request, seed) for seed, request in enumerate(requests)]
    for _ in range(6):
        for task, other in (tasks, tasks[::-1]):
            assert engine.advance(task, [other]) == [task]
    for task, latents in zip(tasks, alone, strict=True):
        (sample,) = task.samples
        assert sample.cache
        assert 0 < sample.cache.num_skipped < 6
        assert torch.equal(sample.latents, latents)
        exact = task.request.model_copy(update={"acceleration": "none"})
        assert not torch.equal(latents, generate_latents(engine, exact, task.seed))


def test_with_nothing_to_skip_the_latents_are_exact(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.flux.engine.FirstBlockCache", lambda: FirstBlockCache(0.0))
    assert torch.equal(
        generate_latents(engine, request_with_cache(), 3),
        generate_latents(engine, make_request("a fish", num_inference_steps=6), 3),
    )
