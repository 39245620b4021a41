"""One picture on its way: begun, stepped and seen as FluxPipeline and its scheduler do it."""

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from models.flux.prompt_cache import PromptCache
from models.flux.sample import Sample, begin
from tests.support import tiny_flux
from tests.support.tiny_flux import asked


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def pipeline(request: pytest.FixtureRequest) -> FluxPipeline:
    return tiny_flux.pipeline(guidance=request.param, dynamic_shift=request.param)


def begun(pipeline: FluxPipeline, seed: int = 1, size: tuple[int, int] = (96, 64), **more: Any) -> Sample:
    text = PromptCache("cpu").encode("a fish", pipeline)
    return begin(pipeline, "cpu", text, asked(num_inference_steps=4, **more), size, seed)


def test_begins_with_the_seeds_noise(pipeline: FluxPipeline) -> None:
    one, same, other = begun(pipeline, 1), begun(pipeline, 1), begun(pipeline, 2)
    assert torch.equal(one.latents, same.latents)
    assert not torch.equal(one.latents, other.latents)
    assert one.latents.shape == (1, one.num_tokens - 512, pipeline.transformer.config.in_channels)
    assert one.num_tokens == 96 * 64 // tiny_flux.PIXELS_A_TOKEN + 512


def test_guidance_is_for_those_who_take_it(pipeline: FluxPipeline) -> None:
    generation = begun(pipeline, guidance_scale=7.5)
    if pipeline.transformer.config.guidance_embeds:
        assert generation.guidance.tolist() == [7.5]
    else:
        assert generation.guidance is None


def test_each_has_a_scheduler_of_its_own(pipeline: FluxPipeline) -> None:
    before = dict(vars(pipeline.scheduler))
    one, other = begun(pipeline), begun(pipeline, size=(256, 256))
    expected = torch.zeros_like(one.latents)
    for step in range(4):
        assert (one.step, other.step, one.steps_done) == (step, 0, False)
        one.step_with(expected)
    assert one.steps_done
    assert not other.steps_done
    assert {id(one.scheduler), id(other.scheduler)}.isdisjoint({id(pipeline.scheduler)})
    assert one.scheduler is not other.scheduler
    assert all(vars(pipeline.scheduler)[name] is value for name, value in before.items())


def test_those_of_one_size_and_text_length_share_a_key(pipeline: FluxPipeline) -> None:
    wide, tall = begun(pipeline, size=(96, 64)), begun(pipeline, size=(64, 96))
    assert wide.num_tokens == tall.num_tokens
    assert wide.key != tall.key
    assert wide.key == begun(pipeline, 9, size=(96, 64), guidance_scale=5).key


def test_the_estimate_is_where_the_velocity_leads(pipeline: FluxPipeline) -> None:
    generation = begun(pipeline)
    assert generation.estimate is None
    noise = generation.latents
    target = torch.linspace(-1, 1, noise.numel()).reshape(noise.shape)
    # The straight way from noise to target has the same velocity everywhere.
    while not generation.steps_done:
        generation.step_with(noise - target)
        torch.testing.assert_close(generation.estimate, target, atol=1e-5, rtol=0)
    torch.testing.assert_close(generation.latents, target, atol=1e-5, rtol=0)


def test_what_is_let_go_is_gone(pipeline: FluxPipeline) -> None:
    generation = begun(pipeline)
    generation.step_with(torch.zeros_like(generation.latents))
    generation.free()
    assert (generation.latents, generation.velocity, generation.cache, generation.estimate) == (None,) * 4
