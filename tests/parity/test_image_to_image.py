"""fal-ai/flux/dev/image-to-image against diffusers' own pipeline, bit for bit."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

from models.base import EngineConfig
from models.flux.engine import FluxEngine
from models.flux_dev_image_to_image import FluxDevImageToImageInput
from models.loading.devices import dtype_for
from models.loading.specs import DEMO
from tests.support import tiny_flux
from tests.support.tiny_flux import difference, finished


def asked(**more: Any) -> FluxDevImageToImageInput:
    return FluxDevImageToImageInput.model_validate(
        {"prompt": "a fish", "image_url": "unused", "num_inference_steps": 10, **more}
    )


def call(pipeline: FluxPipeline, request: FluxDevImageToImageInput, picture: Image.Image, seed: int) -> Any:
    """What FluxImg2ImgPipeline itself gives for this request, at the size that the engine rounds to."""
    over = FluxImg2ImgPipeline(**pipeline.components)
    over.set_progress_bar_config(disable=True)
    multiple = over.vae_scale_factor * 2
    return over(
        request.prompt,
        image=picture,
        strength=request.strength,
        width=picture.width // multiple * multiple,
        height=picture.height // multiple * multiple,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        max_sequence_length=512,
    ).images[0]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A picture whose sides are no multiples of anything."""
    colours = numpy.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
    path = tmp_path / "source.png"
    Image.fromarray(colours).resize((203, 149), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.mark.parametrize("strength", [0.01, 0.35, 0.95, 1])
def test_equals_the_pipeline_on_the_demo_weights(source: Path, strength: float) -> None:
    engine = FluxEngine.load(EngineConfig(DEMO, safety_checker="", device="cpu"))
    plain = FluxPipeline.from_pretrained(DEMO, dtype=dtype_for("auto", "cpu"), local_files_only=True)
    request = asked(strength=strength)
    painting = engine.start(request, 5, {"image_url": source})
    (picture,) = finished(engine, painting)
    assert picture.size == (192, 128)
    assert difference(picture, call(plain, request, Image.open(source), 5)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_dev", [True, False], ids=["dev", "schnell"])
def test_equals_the_pipeline_on_random_weights(source: Path, dtype: torch.dtype, is_dev: bool) -> None:
    settings = {"guidance": is_dev, "dynamic_shift": is_dev}
    engine, pipeline = tiny_flux.engine(dtype, **settings), tiny_flux.pipeline(dtype, **settings)
    request = asked(strength=0.6)
    (picture,) = finished(engine, engine.start(request, 7, {"image_url": source}))
    assert difference(picture, call(pipeline, request, Image.open(source), 7)) == 0


def test_steps_are_those_that_are_left(source: Path) -> None:
    engine = tiny_flux.engine()
    painting = engine.start(asked(strength=0.25, num_images=2), 1, {"image_url": source})
    assert painting.num_steps == 2 * 3
    finished(engine, painting)
    assert painting.step == painting.num_steps


def test_shares_forwards_with_text_to_image(source: Path) -> None:
    """In the tier that shares them, with requests of its own size, and gets what it gets alone."""
    engine = tiny_flux.engine()
    request = asked(strength=0.5, acceleration="regular")
    (alone,) = finished(engine, engine.start(request, 3, {"image_url": source}))
    painting = engine.start(request, 3, {"image_url": source})
    other = engine.start(tiny_flux.asked(width=painting.width, height=painting.height, acceleration="regular"), 4)
    with tiny_flux.batches(engine.pipeline.transformer) as sizes:
        engine.advance(painting, [other])
    assert sizes == [2]
    (together,) = finished(engine, painting)
    assert difference(alone, together) <= 1


def test_little_strength_leaves_the_picture_as_it_was(source: Path) -> None:
    engine = FluxEngine.load(EngineConfig(DEMO, safety_checker="", device="cpu"))
    with Image.open(source) as picture:
        before = numpy.asarray(picture.resize((192, 128), Image.Resampling.LANCZOS), float)
    errors = []
    for strength in (0.01, 1):
        (after,) = finished(engine, engine.start(asked(strength=strength), 1, {"image_url": source}))
        errors.append(float(numpy.abs(numpy.asarray(after, float) - before).mean()))
    assert errors[0] < errors[1] / 2
