"""fal-ai/flux/dev/image-to-image against diffusers' own pipeline, bit for bit."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

from models.base import EngineConfig
from models.flux.loader import load_engine
from models.flux_dev import FluxDevImageToImageInput
from models.flux_lora import FluxLoraImageToImageInput
from models.loading.devices import dtype_for
from models.loading.specs import DEMO
from tests.support import tiny_flux
from tests.support.diffusers_calls import image_of, pipeline_of
from tests.support.tiny_flux import difference, finish_task


def request_with(**fields: Any) -> FluxDevImageToImageInput:
    return FluxDevImageToImageInput.model_validate(
        {"prompt": "a fish", "image_url": "unused", "num_inference_steps": 10, **fields}
    )


def call_diffusers(pipeline: FluxPipeline, request: Any, image: Image.Image, seed: int) -> Any:
    """Generate the request's image with FluxImg2ImgPipeline, at the size that the engine rounds to."""
    size = getattr(request, "image_size", None)
    wanted = (size.width, size.height) if size else image.size
    return image_of(pipeline_of(FluxImg2ImgPipeline, pipeline.components), request, wanted, seed=seed, image=image)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write an image whose sides the engine must round down; return its path."""
    colours = numpy.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
    path = tmp_path / "source.png"
    Image.fromarray(colours).resize((203, 149), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.mark.parametrize("strength", [0.01, 0.35, 0.95, 1])
def test_equals_the_pipeline_on_the_demo_weights(source: Path, strength: float) -> None:
    engine = load_engine(EngineConfig(DEMO, safety_checker="", device="cpu"))
    diffusers_pipeline = FluxPipeline.from_pretrained(DEMO, dtype=dtype_for("auto", "cpu"), local_files_only=True)
    request = request_with(strength=strength)
    task = engine.start(request, 5, {"image_url": source})
    (image,) = finish_task(engine, task)
    assert image.size == (192, 128)
    assert difference(image, call_diffusers(diffusers_pipeline, request, Image.open(source), 5)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_dev", [True, False], ids=["dev", "schnell"])
def test_equals_the_pipeline_on_random_weights(source: Path, dtype: torch.dtype, is_dev: bool) -> None:
    settings = {"guidance": is_dev, "dynamic_shift": is_dev}
    engine, pipeline = tiny_flux.engine(dtype, **settings), tiny_flux.pipeline(dtype, **settings)
    request = request_with(strength=0.6)
    (image,) = finish_task(engine, engine.start(request, 7, {"image_url": source}))
    assert difference(image, call_diffusers(pipeline, request, Image.open(source), 7)) == 0


@pytest.mark.parametrize("size", [(300, 100), (64, 90)])
def test_the_image_is_scaled_to_the_requested_size(source: Path, size: tuple[int, int]) -> None:
    width, height = size
    body = {"prompt": "a fish", "image_url": "unused", "num_inference_steps": 4}
    request = FluxLoraImageToImageInput.model_validate({**body, "image_size": {"width": width, "height": height}})
    engine = tiny_flux.engine()
    (image,) = finish_task(engine, engine.start(request, 7, {"image_url": source}))
    assert image.size == (width // 16 * 16, height // 16 * 16)
    assert difference(image, call_diffusers(tiny_flux.pipeline(), request, Image.open(source), 7)) == 0


def test_num_steps_counts_only_the_steps_that_strength_leaves(source: Path) -> None:
    engine = tiny_flux.engine()
    task = engine.start(request_with(strength=0.25, num_images=2), 1, {"image_url": source})
    assert task.num_steps == 2 * 3
    finish_task(engine, task)
    assert task.step == task.num_steps


def test_shares_forwards_with_text_to_image(source: Path) -> None:
    """Check that tasks of one size share a forward in tier `regular`, which changes the image by one level at most."""
    engine = tiny_flux.engine()
    request = request_with(strength=0.5, acceleration="regular")
    (alone,) = finish_task(engine, engine.start(request, 3, {"image_url": source}))
    task = engine.start(request, 3, {"image_url": source})
    other = engine.start(tiny_flux.make_request(width=task.width, height=task.height, acceleration="regular"), 4)
    with tiny_flux.record_batch_sizes(engine.pipeline.transformer) as sizes:
        engine.advance(task, [other])
    assert sizes == [2]
    (shared,) = finish_task(engine, task)
    assert difference(alone, shared) <= 1


def test_low_strength_stays_close_to_the_source_image(source: Path) -> None:
    engine = load_engine(EngineConfig(DEMO, safety_checker="", device="cpu"))
    with Image.open(source) as image:
        before = numpy.asarray(image.resize((192, 128), Image.Resampling.LANCZOS), float)
    errors = []
    for strength in (0.01, 1):
        (after,) = finish_task(engine, engine.start(request_with(strength=strength), 1, {"image_url": source}))
        errors.append(float(numpy.abs(numpy.asarray(after, float) - before).mean()))
    assert errors[0] < errors[1] / 2
