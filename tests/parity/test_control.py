"""FLUX.1 Canny and Depth against diffusers' own pipeline, bit for bit, and the edges and depths that they follow."""

from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import pytest
import torch
from diffusers import FluxControlPipeline, FluxPipeline
from PIL.Image import Image
from transformers import DepthAnythingForDepthEstimation, DepthEstimationPipeline, DPTImageProcessorPil

from models.base import GenerationFailed
from models.flux import control
from models.flux.control import DepthEstimator
from models.flux.engine import FluxEngine
from models.flux_control import FluxLoraCannyInput, FluxLoraDepthInput
from models.loading.hub import BadWeights
from tests.support import tiny_flux
from tests.support.diffusers_calls import image_of, pipeline_of
from tests.support.tiny_flux import AllSafeChecker, difference, finish_task, tiers_of, write_lora
from tests.support.tiny_kinds import write_depth

SIZE = (90, 70)


def control_pipeline(dtype: torch.dtype) -> FluxPipeline:
    """Build a pipeline whose transformer takes two sets of latents, as those of FLUX.1 Canny and Depth."""
    pipeline = tiny_flux.pipeline(dtype)
    latents = 4 * pipeline.vae.config.latent_channels
    pipeline.register_modules(transformer=tiny_flux.transformer(dtype, in_channels=2 * latents, out_channels=latents))
    return pipeline


def engine_of(pipeline: FluxPipeline, estimator: DepthEstimator | None = None) -> FluxEngine:
    return FluxEngine(pipeline, AllSafeChecker(), tiers_of(pipeline.transformer), "cpu", depth_estimator=estimator)


def call_diffusers(dtype: torch.dtype, request: Any, image: Image, seed: int = 5, lora: Path | None = None) -> Image:
    pipeline = pipeline_of(FluxControlPipeline, control_pipeline(dtype).components)
    if lora:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="client")
        pipeline.set_adapters(["client"], [request.loras[0].scale])
    return image_of(pipeline, request, image.size, seed=seed, control_image=image)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write an image of a bright square on a dark ground, with a little noise."""
    pixels = numpy.random.default_rng(3).integers(0, 3, (*SIZE[::-1], 3), dtype=numpy.uint8)
    pixels[20:50, 30:60] += 200
    path = tmp_path / "source.png"
    PIL.Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def depth_weights(tmp_path: Path) -> Path:
    directory = tmp_path / "depth"
    write_depth(directory)
    return directory


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a fish", "image_url": "unused", "num_inference_steps": 3, **fields}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_canny_equals_the_pipeline(source: Path, dtype: torch.dtype) -> None:
    request = FluxLoraCannyInput.model_validate(body())
    engine = engine_of(control_pipeline(dtype))
    (image,) = finish_task(engine, engine.start(request, 5, {"image_url": source}))
    assert image.size == (80, 64)
    edges = control.edges(PIL.Image.open(source), image.size)
    assert difference(image, call_diffusers(dtype, request, edges)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_depth_equals_the_pipeline(source: Path, depth_weights: Path, dtype: torch.dtype) -> None:
    request = FluxLoraDepthInput.model_validate(body(num_images=2, acceleration="regular"))
    estimator = DepthEstimator.load(depth_weights, "cpu", torch.float32)
    engine = engine_of(control_pipeline(dtype), estimator)
    images = finish_task(engine, engine.start(request, 5, {"image_url": source}))
    depths = estimator.depths(PIL.Image.open(source), images[0].size)
    for place, image in enumerate(images):
        assert difference(image, call_diffusers(dtype, request, depths, 5 + place)) == 0


@pytest.mark.parametrize("kind", [FluxLoraCannyInput, FluxLoraDepthInput])
def test_a_lora_equals_the_pipeline(source: Path, depth_weights: Path, tmp_path: Path, kind: Any) -> None:
    lora = write_lora(tmp_path / "lora.safetensors", 1)
    request = kind.model_validate(body(loras=[{"path": "unused", "scale": 0.8}]))
    estimator = DepthEstimator.load(depth_weights, "cpu", torch.float32)
    engine = engine_of(control_pipeline(torch.float32), estimator)
    (image,) = finish_task(engine, engine.start(request, 5, {"image_url": source, "loras.0.path": lora}))
    opened = PIL.Image.open(source)
    followed = (control.edges if kind is FluxLoraCannyInput else estimator.depths)(opened, image.size)
    assert difference(image, call_diffusers(torch.float32, request, followed, lora=lora)) == 0


def test_edges_are_lines_around_the_square(source: Path) -> None:
    edges = numpy.asarray(control.edges(PIL.Image.open(source), SIZE))
    assert edges.shape == (*SIZE[::-1], 3) and set(numpy.unique(edges)) == {0, 255}
    rows, columns = numpy.nonzero(edges[..., 0])
    assert (rows.min(), rows.max()) == pytest.approx((20, 50), abs=2)
    assert (columns.min(), columns.max()) == pytest.approx((30, 60), abs=2)


def test_depths_equal_those_of_the_depth_pipeline(source: Path, depth_weights: Path) -> None:
    image = PIL.Image.open(source)
    pipeline = DepthEstimationPipeline(
        model=DepthAnythingForDepthEstimation.from_pretrained(depth_weights).eval(),
        image_processor=DPTImageProcessorPil.from_pretrained(depth_weights),
    )
    found = DepthEstimator.load(depth_weights, "cpu", torch.float32).depths(image, image.size)
    assert difference(found, pipeline(image)["depth"].convert("RGB")) == 0
    assert len(numpy.unique(numpy.asarray(found))) > 10


def test_an_image_of_one_colour_has_depths(depth_weights: Path) -> None:
    estimator = DepthEstimator.load(depth_weights, "cpu", torch.float32)
    for parameter in estimator._model.parameters():
        parameter.data.zero_()
    assert estimator.depths(PIL.Image.new("RGB", SIZE), SIZE).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("size", [(64, 2048), (5000, 64)])
def test_a_narrow_image_has_depths(depth_weights: Path, size: tuple[int, int]) -> None:
    estimator = DepthEstimator.load(depth_weights, "cpu", torch.float32)
    assert estimator.depths(PIL.Image.new("RGB", size, "red"), size).size == size


def test_depth_needs_its_weights(source: Path) -> None:
    engine = engine_of(control_pipeline(torch.float32))
    with pytest.raises(GenerationFailed, match="LiheYoung/depth-anything-large-hf is missing here"):
        engine.start(FluxLoraDepthInput.model_validate(body()), 5, {"image_url": source})


def test_malformed_weights_for_depths_are_refused(depth_weights: Path) -> None:
    (depth_weights / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BadWeights):
        DepthEstimator.load(depth_weights, "cpu", torch.float32)
