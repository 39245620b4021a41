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
from tests.support.tiny_flux import CallsAllSafe, asked, latents_of, stepped

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


def walk(transformer: Any, forward: Any) -> list[torch.Tensor]:
    """What `forward` says at each of a few steps along its own velocities."""
    generator = torch.Generator().manual_seed(5)
    dtype = transformer.dtype
    latents = torch.randn(1, NUM_TOKENS, transformer.config.in_channels, generator=generator).to(dtype)
    text = torch.randn(1, NUM_TEXT_TOKENS, tiny_flux.TEXT_WIDTH, generator=generator).to(dtype)
    said = []
    for step in range(NUM_STEPS):
        with torch.no_grad():
            said.append(forward(**inputs_of(transformer, step, latents, text)))
        latents = latents - said[-1] / NUM_STEPS
    return said


def by_diffusers(transformer: Any, threshold: float) -> list[torch.Tensor]:
    copy = compilation.clone_sharing_weights(transformer)
    copy.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    with copy.cache_context("one"):
        return walk(copy, lambda **inputs: copy(**inputs, return_dict=False)[0])


def plainly(transformer: Any) -> list[torch.Tensor]:
    return walk(transformer, lambda **inputs: transformer(**inputs, return_dict=False)[0])


def by_ours(transformer: Any, cache: FirstBlockCache) -> list[torch.Tensor]:
    return walk(transformer, lambda **inputs: velocity(transformer, cache, **inputs))


def changes(transformer: Any) -> list[float]:
    """By how much the first block's residual changes at each step when nothing is skipped, ascending."""
    seen: list[float] = []

    class Looking(FirstBlockCache):
        def can_skip(self, head: torch.Tensor) -> bool:
            if self.head is not None:
                seen.append(float((head - self.head).abs().mean() / self.head.abs().mean()))
            return False

    by_ours(transformer, Looking())
    return sorted(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"guidance_embeds": False, "num_layers": 2, "num_single_layers": 1}])
@pytest.mark.parametrize("share", [0.25, 0.75, 2.0])
def test_equals_diffusers(dtype: torch.dtype, settings: dict[str, Any], share: float) -> None:
    transformer = tiny_flux.transformer(dtype, **settings)
    seen = changes(transformer)
    threshold = share * seen[-1] if share > 1 else seen[int(share * len(seen))]
    cache = FirstBlockCache(threshold)
    ours, theirs = by_ours(transformer, cache), by_diffusers(transformer, threshold)
    assert 0 < cache.num_skipped < NUM_STEPS
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    plain = plainly(transformer)
    # The first step has nothing to go by, and what is skipped later does make a difference.
    assert torch.equal(ours[0], plain[0])
    assert not all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"guidance_embeds": False}])
def test_a_cache_that_never_skips_is_the_plain_forward(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    transformer = tiny_flux.transformer(dtype, **settings)
    cache = FirstBlockCache(0.0)
    for one, other in zip(by_ours(transformer, cache), plainly(transformer), strict=True):
        assert torch.equal(one, other)
    assert cache.num_skipped == 0


def test_not_a_number_is_never_skipped() -> None:
    cache = FirstBlockCache(head=torch.full((1, 2, 2), float("nan")), tail=torch.zeros(1, 2, 2))
    assert not cache.can_skip(torch.zeros(1, 2, 2))


# -- in the engine


@pytest.fixture(scope="module")
def engine() -> FluxEngine:
    parts = tiny_flux.pipeline()
    offered = [Tier("none", parts.transformer), Tier("high", parts.transformer, skips_blocks=True)]
    return FluxEngine(parts, CallsAllSafe(), offered, "cpu")


def fast(prompt: str = "a fish", **more: Any) -> FluxDevInput:
    return asked(prompt, acceleration="high", num_inference_steps=6, **more)


def test_other_tiers_have_none(engine: FluxEngine) -> None:
    painting = engine.start(asked(acceleration="none"), 1)
    engine.advance(painting)
    assert [generation.cache for generation in painting.samples] == [None]


def test_each_picture_has_its_own_until_it_is_decoded(engine: FluxEngine) -> None:
    paintings = [engine.start(fast(num_images=2), 1), engine.start(fast("a car"), 2)]
    for painting in paintings:
        stepped(engine, painting)
    generations = [generation for painting in paintings for generation in painting.samples]
    caches = [generation.cache for generation in generations]
    assert len({id(cache) for cache in caches}) == len(caches) == 3
    assert all(cache and cache.threshold == THRESHOLD and cache.head is not None for cache in caches)
    for painting in paintings:
        while not painting.is_decoded:
            engine.decode(painting)
    assert [generation.cache for generation in generations] == [None] * 3


def test_those_that_take_turns_do_not_skip_for_each_other(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Random weights change by more from step to step than those of FLUX.1: a threshold that skips about half.
    monkeypatch.setattr("models.flux.engine.FirstBlockCache", lambda: FirstBlockCache(0.3))
    requests = [fast("a fish"), fast("a car", guidance_scale=9)]
    alone = [latents_of(engine, request, seed) for seed, request in enumerate(requests)]
    paintings = [engine.start(request, seed) for seed, request in enumerate(requests)]
    for _ in range(6):
        for painting, other in (paintings, paintings[::-1]):
            assert engine.advance(painting, [other]) == [painting]
    for painting, latents in zip(paintings, alone, strict=True):
        (generation,) = painting.samples
        assert generation.cache
        assert 0 < generation.cache.num_skipped < 6
        assert torch.equal(generation.latents, latents)
        exact = painting.request.model_copy(update={"acceleration": "none"})
        assert not torch.equal(latents, latents_of(engine, exact, painting.seed))


def test_with_nothing_to_skip_it_is_the_exact_picture(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.flux.engine.FirstBlockCache", lambda: FirstBlockCache(0.0))
    assert torch.equal(latents_of(engine, fast(), 3), latents_of(engine, asked("a fish", num_inference_steps=6), 3))
