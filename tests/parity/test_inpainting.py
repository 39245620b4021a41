"""Inpainting against diffusers' FluxInpaintPipeline, bit for bit."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FluxInpaintPipeline, FluxPipeline
from PIL import Image

from models.base import EngineConfig
from models.flux.engine import FluxEngine
from models.flux.loader import load_engine
from models.flux_lora import FluxKreaLoraInpaintingInput
from models.loading.devices import dtype_for
from models.loading.specs import DEMO
from tests.support import tiny_flux
from tests.support.diffusers_calls import image_of, pipeline_of
from tests.support.tiny_flux import difference, finish_task, write_lora

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


def request_with(**fields: Any) -> FluxKreaLoraInpaintingInput:
    body = {"prompt": "a fish", "image_url": "unused", "mask_url": "unused", "num_inference_steps": 10, **fields}
    return FluxKreaLoraInpaintingInput.model_validate(body)


def call_diffusers(
    pipeline: FluxPipeline, request: FluxKreaLoraInpaintingInput, files: dict[str, Path], seed: int
) -> Image.Image:
    """Generate the request's image with FluxInpaintPipeline, at the size that the engine rounds to."""
    image, mask = Image.open(files["image_url"]), Image.open(files["mask_url"])
    size = request.image_size
    wanted = (size.width, size.height) if size else image.size
    inpaint = pipeline_of(FluxInpaintPipeline, pipeline.components)
    return image_of(inpaint, request, wanted, seed=seed, image=image, mask_image=mask)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Write an image and a mask of other proportions, with grey areas and curves; return their paths."""
    random = numpy.random.default_rng(3)
    colours = random.integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
    Image.fromarray(colours).resize((203, 149), Image.Resampling.BICUBIC).save(tmp_path / "image.png")
    greys = random.integers(0, 256, (4, 4), dtype=numpy.uint8)
    mask = Image.fromarray(greys).resize((90, 120), Image.Resampling.BICUBIC).convert("RGB")
    mask.save(tmp_path / "mask.png")
    return {"image_url": tmp_path / "image.png", "mask_url": tmp_path / "mask.png"}


def generate(engine: FluxEngine, request: FluxKreaLoraInpaintingInput, files: dict[str, Path], seed: int) -> Any:
    (image,) = finish_task(engine, engine.start(request, seed, files))
    return image


@pytest.mark.parametrize("strength", [0.01, 0.85, 1])
def test_equals_the_pipeline_on_the_demo_weights(files: dict[str, Path], strength: float) -> None:
    engine = load_engine(EngineConfig(DEMO, safety_checker="", device="cpu"))
    pipeline = FluxPipeline.from_pretrained(DEMO, dtype=dtype_for("auto", "cpu"), local_files_only=True)
    request = request_with(strength=strength)
    image = generate(engine, request, files, 5)
    assert image.size == (192, 128)
    assert difference(image, call_diffusers(pipeline, request, files, 5)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_dev", [True, False], ids=["dev", "schnell"])
def test_equals_the_pipeline_on_random_weights(files: dict[str, Path], dtype: torch.dtype, is_dev: bool) -> None:
    settings = {"guidance": is_dev, "dynamic_shift": is_dev}
    request = request_with(strength=0.6, num_inference_steps=5, image_size={"width": 110, "height": 64})
    image = generate(tiny_flux.engine(dtype, **settings), request, files, 7)
    assert image.size == (96, 64)
    assert difference(image, call_diffusers(tiny_flux.pipeline(dtype, **settings), request, files, 7)) == 0


def test_equals_the_pipeline_with_a_lora(files: dict[str, Path], tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.safetensors", 1, text=True)
    request = request_with(num_inference_steps=3, loras=[{"path": "unused", "scale": 0.7}])
    image = generate(tiny_flux.engine(), request, {**files, "loras.0.path": lora}, 7)
    pipeline = tiny_flux.pipeline()
    pipeline.load_lora_weights(str(tmp_path), weight_name=lora.name, adapter_name="a")
    pipeline.set_adapters(["a"], [0.7])
    assert difference(image, call_diffusers(pipeline, request, files, 7)) == 0


def test_each_image_of_a_request_equals_the_pipeline(files: dict[str, Path]) -> None:
    request = request_with(num_inference_steps=3, num_images=2)
    engine = tiny_flux.engine()
    images = finish_task(engine, engine.start(request, 7, files))
    for place, image in enumerate(images):
        assert difference(image, call_diffusers(tiny_flux.pipeline(), request, files, 7 + place)) == 0


def test_a_black_mask_keeps_the_image_and_a_white_one_none_of_it(files: dict[str, Path], tmp_path: Path) -> None:
    engine = load_engine(EngineConfig(DEMO, safety_checker="", device="cpu"))
    with Image.open(files["image_url"]) as image:
        before = numpy.asarray(image.resize((192, 128), Image.Resampling.LANCZOS), float)
    errors = []
    for colour in ("black", "white"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "plain.png")
        after = generate(engine, request_with(strength=1), {**files, "mask_url": tmp_path / "plain.png"}, 1)
        errors.append(float(numpy.abs(numpy.asarray(after, float) - before).mean()))
    assert errors[0] < errors[1] / 2


def test_shares_forwards_with_text_to_image(files: dict[str, Path]) -> None:
    """Check that the mask of one task changes no other: in tier `regular`, images differ by one level at most."""
    engine = tiny_flux.engine()
    request = request_with(strength=0.5, acceleration="regular")
    alone = generate(engine, request, files, 3)
    task = engine.start(request, 3, files)
    plain = tiny_flux.make_request(width=task.width, height=task.height, num_inference_steps=5, acceleration="regular")
    (plain_alone,) = tiny_flux.generate(engine, plain, 4)
    other = engine.start(plain, 4)
    with tiny_flux.record_batch_sizes(engine.pipeline.transformer) as sizes:
        while task.step < task.num_steps:
            engine.advance(task, [other])
    assert set(sizes) == {2}
    assert difference(alone, finish_task(engine, task)[0]) <= 1
    assert difference(plain_alone, finish_task(engine, other)[0]) <= 1


def test_a_decoded_image_releases_its_mask(files: dict[str, Path]) -> None:
    engine = tiny_flux.engine()
    task = engine.start(request_with(num_inference_steps=1), 3, files)
    finish_task(engine, task)
    assert task.samples[0].inpainting is None
