"""A sample, which becomes one image: its start and steps, as in FluxPipeline, and the estimate of its end."""

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from models.flux.input_images import InputImages
from models.flux.prompt_cache import PromptCache
from models.flux.sample import Sample, begin
from tests.support import tiny_flux
from tests.support.tiny_flux import make_request


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def pipeline(request: pytest.FixtureRequest) -> FluxPipeline:
    return tiny_flux.pipeline(guidance=request.param, dynamic_shift=request.param)


def start_sample(pipeline: FluxPipeline, seed: int = 1, size: tuple[int, int] = (96, 64), **fields: Any) -> Sample:
    text = PromptCache("cpu").encode("a fish", pipeline)
    return begin(pipeline, "cpu", text, make_request(num_inference_steps=4, **fields), size, seed, InputImages())


def test_starts_with_the_noise_of_the_seed(pipeline: FluxPipeline) -> None:
    one, same, other = start_sample(pipeline, 1), start_sample(pipeline, 1), start_sample(pipeline, 2)
    assert torch.equal(one.latents, same.latents)
    assert not torch.equal(one.latents, other.latents)
    assert one.latents.shape == (1, one.num_tokens - 512, pipeline.transformer.config.in_channels)
    assert one.num_tokens == 96 * 64 // tiny_flux.PIXELS_A_TOKEN + 512


def test_guidance_is_set_only_if_the_transformer_takes_it(pipeline: FluxPipeline) -> None:
    sample = start_sample(pipeline, guidance_scale=7.5)
    if pipeline.transformer.config.guidance_embeds:
        assert sample.guidance.tolist() == [7.5]
    else:
        assert sample.guidance is None


def test_each_sample_has_its_own_scheduler(pipeline: FluxPipeline) -> None:
    before = dict(vars(pipeline.scheduler))
    one, other = start_sample(pipeline), start_sample(pipeline, size=(256, 256))
    expected = torch.zeros_like(one.latents)
    for step in range(4):
        assert (one.step, other.step, one.steps_done) == (step, 0, False)
        one.step_with(expected)
    assert one.steps_done
    assert not other.steps_done
    assert {id(one.scheduler), id(other.scheduler)}.isdisjoint({id(pipeline.scheduler)})
    assert one.scheduler is not other.scheduler
    assert all(vars(pipeline.scheduler)[name] is value for name, value in before.items())


def test_samples_of_one_size_and_text_length_share_a_key(pipeline: FluxPipeline) -> None:
    wide, tall = start_sample(pipeline, size=(96, 64)), start_sample(pipeline, size=(64, 96))
    assert wide.num_tokens == tall.num_tokens
    assert wide.key != tall.key
    assert wide.key == start_sample(pipeline, 9, size=(96, 64), guidance_scale=5).key


def test_the_estimate_follows_the_velocity_to_its_end(pipeline: FluxPipeline) -> None:
    sample = start_sample(pipeline)
    assert sample.estimate is None
    noise = sample.latents
    target = torch.linspace(-1, 1, noise.numel()).reshape(noise.shape)
    # On the straight line from noise to target the velocity is constant.
    while not sample.steps_done:
        sample.step_with(noise - target)
        torch.testing.assert_close(sample.estimate, target, atol=1e-5, rtol=0)
    torch.testing.assert_close(sample.latents, target, atol=1e-5, rtol=0)


def test_free_drops_the_tensors(pipeline: FluxPipeline) -> None:
    sample = start_sample(pipeline)
    sample.step_with(torch.zeros_like(sample.latents))
    sample.free()
    assert (sample.latents, sample.velocity, sample.cache, sample.estimate) == (None,) * 4
