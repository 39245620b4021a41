"""FLUX.1 Fill against diffusers' own pipeline, bit for bit, and what is done to its result."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FluxFillPipeline, FluxPipeline, FluxPriorReduxPipeline
from PIL import Image
from pydantic import ValidationError

from models.base import GenerationFailed
from models.flux.engine import FluxEngine
from models.flux.redux import Redux
from models.flux_dev import FluxDevInput
from models.flux_fill import FluxLoraFillInput
from tests.support import tiny_flux
from tests.support.diffusers_calls import image_of, pipeline_of
from tests.support.tiny_flux import AllSafeChecker, difference, finish_task, tiers_of, write_lora
from tests.support.tiny_redux import prior

SIZE = (90, 70)


def fill_pipeline(dtype: torch.dtype) -> FluxPipeline:
    """Build a pipeline whose transformer takes latents, those of the masked image, and the mask, as FLUX.1 Fill's."""
    pipeline = tiny_flux.pipeline(dtype)
    latents = 4 * pipeline.vae.config.latent_channels
    in_channels = 2 * latents + 4 * pipeline.vae_scale_factor**2
    pipeline.register_modules(transformer=tiny_flux.transformer(dtype, in_channels=in_channels, out_channels=latents))
    return pipeline


def diffusers_pipeline(dtype: torch.dtype) -> FluxFillPipeline:
    return pipeline_of(FluxFillPipeline, fill_pipeline(dtype).components)


def engine_of(pipeline: FluxPipeline) -> FluxEngine:
    return FluxEngine(pipeline, AllSafeChecker(), tiers_of(pipeline.transformer), "cpu")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Write an image and a mask, white in its right half."""
    colours = numpy.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.fromarray(colours).resize(SIZE, Image.Resampling.BICUBIC).save(image)
    Image.fromarray(numpy.uint8(255 * (numpy.indices(SIZE[::-1])[1] >= SIZE[0] // 2))).convert("RGB").save(mask)
    return {"image_url": image, "mask_url": mask}


def request_with(**fields: Any) -> FluxLoraFillInput:
    body = {"prompt": "a fish", "image_url": "unused", "mask_url": "unused", "num_inference_steps": 3}
    return FluxLoraFillInput.model_validate({**body, **fields})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_lora", [False, True])
def test_equals_the_pipeline(files: dict[str, Path], tmp_path: Path, dtype: torch.dtype, has_lora: bool) -> None:
    engine, pipeline = engine_of(fill_pipeline(dtype)), diffusers_pipeline(dtype)
    loras = [{"path": "unused", "scale": 0.8}] if has_lora else []
    request = request_with(paste_back=False, loras=loras)
    if has_lora:
        files["loras.0.path"] = write_lora(tmp_path / "lora.safetensors", 1, width=32)
        pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="client")
        pipeline.set_adapters(["client"], [0.8])
    (image,) = finish_task(engine, engine.start(request, 5, files))
    images: dict[str, Any] = {"image": Image.open(files["image_url"]), "mask_image": Image.open(files["mask_url"])}
    expected = image_of(pipeline, request, SIZE, **images)
    assert image.size == (80, 64)
    assert difference(image, expected) == 0


@pytest.mark.parametrize("is_resized", [False, True])
def test_what_the_mask_keeps_is_pasted_back(files: dict[str, Path], is_resized: bool) -> None:
    engine = engine_of(fill_pipeline(torch.float32))
    (image,) = finish_task(engine, engine.start(request_with(resize_to_original=is_resized), 5, files))
    (bare,) = finish_task(engine, engine.start(request_with(paste_back=False), 5, files))
    original: Image.Image = Image.open(files["image_url"])
    assert image.size == (original.size if is_resized else bare.size)
    original, bare = (each.resize(image.size, Image.Resampling.LANCZOS) for each in (original, bare))
    # A few columns around the edge of the mask are blended when it is scaled.
    middle = image.width // 2
    kept, filled = (0, 0, middle - 4, image.height), (middle + 4, 0, *image.size)
    assert difference(image.crop(kept), original.crop(kept)) == 0
    assert difference(image.crop(filled), bare.crop(filled)) == 0
    assert difference(image.crop(filled), original.crop(filled)) > 0


def test_grey_in_a_mask_is_white_or_black(files: dict[str, Path]) -> None:
    """What is darker than middle grey is the input image, pixel for pixel."""
    Image.new("L", SIZE, 102).save(files["mask_url"])
    engine = engine_of(fill_pipeline(torch.float32))
    (image,) = finish_task(engine, engine.start(request_with(resize_to_original=True), 5, files))
    assert difference(image, Image.open(files["image_url"])) == 0


@pytest.mark.parametrize("urls", [[], None, ["https://example.com/a.png"]])
def test_an_image_for_the_prompt_is_optional_and_may_be_in_a_list(urls: Any) -> None:
    fill_image = request_with(fill_image={"fill_image_url": urls}).fill_image
    assert fill_image and fill_image.fill_image_url == (urls[0] if urls else None)
    assert request_with(fill_image={}).fill_image is not None
    with pytest.raises(ValidationError, match="only one image is supported"):
        request_with(fill_image={"fill_image_url": ["https://example.com/a.png"] * 2})


def test_requests_and_weights_that_do_not_belong_together_fail(files: dict[str, Path]) -> None:
    with pytest.raises(
        GenerationFailed, match="needs the kind of weights 'fill', but the server's are of the kind 'plain'"
    ):
        tiny_flux.engine().start(request_with(), 5, files)
    with pytest.raises(
        GenerationFailed, match="needs the kind of weights 'plain', but the server's are of the kind 'fill'"
    ):
        engine_of(fill_pipeline(torch.float32)).start(FluxDevInput.model_validate({"prompt": ""}), 5)


def test_an_image_for_the_prompt_needs_redux(files: dict[str, Path]) -> None:
    request = request_with(fill_image={"fill_image_url": ["https://example.com/a.png"]})
    assert request.fill_image and request.fill_image.fill_image_url == "https://example.com/a.png"
    engine = engine_of(fill_pipeline(torch.float32))
    with pytest.raises(GenerationFailed, match=r"FLUX\.1-Redux-dev is missing here"):
        engine.start(request, 5, {**files, "fill_image.fill_image_url": files["image_url"]})


def test_an_image_for_the_prompt_follows_it_as_in_the_prior_pipeline(files: dict[str, Path]) -> None:
    pipeline = fill_pipeline(torch.float32)
    redux = Redux(prior(torch.float32, tiny_flux.TEXT_WIDTH), pipeline.transformer)
    engine = FluxEngine(pipeline, AllSafeChecker(), tiers_of(pipeline.transformer), "cpu", redux=redux)
    request = request_with(fill_image={"fill_image_url": "unused"})
    task = engine.start(request, 5, {**files, "fill_image.fill_image_url": files["image_url"]})
    engine.advance(task)
    text = task.samples[0].text
    parts = {name: pipeline.components[name] for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
    both = FluxPriorReduxPipeline(**{**redux.prior.components, **parts})
    plain = engine.prompts.encode(request.prompt, pipeline)
    found = both(
        Image.open(files["image_url"]),
        prompt_embeds=plain.prompt_embeds,
        pooled_prompt_embeds=plain.pooled_prompt_embeds,
    )
    assert torch.equal(text.prompt_embeds, found.prompt_embeds)
    assert torch.equal(text.pooled_prompt_embeds, found.pooled_prompt_embeds)
    assert text.prompt_embeds.shape[1] == engine.num_text_tokens + redux.num_image_tokens
    without = engine.start(request_with(), 5, files)
    assert task.step_work > without.step_work


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_image_for_the_prompt_equals_the_pipelines(files: dict[str, Path], dtype: torch.dtype) -> None:
    pipeline = fill_pipeline(dtype)
    redux = Redux(prior(dtype, tiny_flux.TEXT_WIDTH), pipeline.transformer)
    engine = FluxEngine(pipeline, AllSafeChecker(), tiers_of(pipeline.transformer), "cpu", redux=redux)
    request = request_with(fill_image={"fill_image_url": "unused"}, paste_back=False)
    task = engine.start(request, 5, {**files, "fill_image.fill_image_url": files["image_url"]})
    (image,) = finish_task(engine, task)
    plain = engine.prompts.encode(request.prompt, pipeline)
    given = {"prompt_embeds": plain.prompt_embeds, "pooled_prompt_embeds": plain.pooled_prompt_embeds}
    # Given a prompt's states, this pipeline needs its text encoders only to know that there is a prompt.
    parts = {name: pipeline.components[name] for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
    both = FluxPriorReduxPipeline(**{**redux.prior.components, **parts})
    found = both(Image.open(files["image_url"]), **given)
    width, height = image.size
    expected = diffusers_pipeline(dtype)(
        image=Image.open(files["image_url"]),
        mask_image=Image.open(files["mask_url"]),
        width=width,
        height=height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(5),
        **found,
    ).images[0]
    assert difference(image, expected) == 0
