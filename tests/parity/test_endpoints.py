"""Every endpoint against the matching diffusers pipeline, bit for bit: on the demo weights and on random ones."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL import Image

from models import discover
from models.base import EngineConfig
from models.demo.recipe.export import LORA
from models.flux.engine import FluxEngine
from models.flux.loader import load_engine
from models.loading.devices import dtype_for, type_name
from models.loading.specs import DEMO, assign_weights, extra_weights_of
from tests.support import tiny_flux
from tests.support.diffusers_calls import image_of, pipeline_of
from tests.support.tiny_flux import difference, finish_task, write_lora

SIZE = (128, 96)
OTHER_SIZE = (64, 160)
#: The endpoints that see no image next to the prompt; for the others, see test_demo_with_images.py.
ENDPOINTS = sorted(
    endpoint
    for endpoint, where in assign_weights(["demo"], discover()).items()
    if where == DEMO and "kontext" not in endpoint and not extra_weights_of(discover()[endpoint], where)
)
#: One endpoint for each pipeline takes all its steps. The others differ from these in defaults and weights only.
WITH_ALL_STEPS = (
    "fal-ai/flux/dev",
    "fal-ai/flux/dev/image-to-image",
    "fal-ai/flux/schnell",
    "fal-ai/flux-lora/inpainting",
)
#: Fields that only some endpoints have.
ENDPOINT_FIELDS = {
    "strength": 0.7,
    "loras": [{"path": "unused", "scale": 0.8}],
    "image_url": "unused",
    "mask_url": "unused",
    "acceleration": "none",
}


#: The type in which this CPU computes, and the other one, which may be far slower.
OWN_TYPE = type_name(dtype_for("auto", "cpu"))
(OTHER_TYPE,) = {"bfloat16", "float32"} - {OWN_TYPE}


@pytest.fixture(scope="module", params=[OWN_TYPE, pytest.param(OTHER_TYPE, marks=pytest.mark.thorough)])
def engine(request: pytest.FixtureRequest) -> FluxEngine:
    return load_engine(EngineConfig(DEMO, safety_checker="", device="cpu", dtype=request.param))


def write_inputs(directory: Path, size: tuple[int, int], lora: Path) -> dict[str, Path]:
    """Write an image and a mask of this size; return the paths of all input files by field."""
    random = numpy.random.default_rng(3)
    for name in ("image_url", "mask_url"):
        colours = random.integers(0, 256, (3, 4, 3), dtype=numpy.uint8)
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(directory / f"{name}.png")
    images = {name: directory / f"{name}.png" for name in ("image_url", "mask_url")}
    return {**images, "loras.0.path": lora}


def diffusers_image(pipeline: Any, request: Any, size: tuple[int, int], inputs: dict[str, Path]) -> Image.Image:
    """Return the image of diffusers' own pipeline. Fields that the request lacks get diffusers' defaults."""
    fields = type(request).model_fields
    images = {"image": "image_url", "mask_image": "mask_url"}
    more = {argument: Image.open(inputs[name]) for argument, name in images.items() if name in fields}
    if "strength" in fields:
        kind = FluxInpaintPipeline if "mask_url" in fields else FluxImg2ImgPipeline
        pipeline = pipeline_of(kind, pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    if "loras" in fields:
        lora = inputs["loras.0.path"]
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="client")
        pipeline.set_adapters(["client"], [request.loras[0].scale])
    return image_of(pipeline, request, size, seed=request.seed, **more)


def body_of(endpoint: str, size: tuple[int, int], *, takes_all_steps: bool) -> dict[str, Any]:
    """Return a request body with the fields that the endpoint has."""
    fields = discover()[endpoint].Input.model_fields
    steps: dict[str, float] = {} if takes_all_steps else {"num_inference_steps": 2}
    if steps and "strength" in fields:
        steps = {"num_inference_steps": 10, "strength": 0.2}
    size_field = {"image_size": dict(zip(("width", "height"), size, strict=True))}
    body = {"prompt": "a frog on a red background", "seed": 9, **size_field, **ENDPOINT_FIELDS, **steps}
    return {name: value for name, value in body.items() if name in fields}


def check_parity(
    engine: FluxEngine, pipeline: Any, endpoint: str, body: dict[str, Any], inputs: dict[str, Path]
) -> None:
    """Generate the request's image with the engine and with diffusers, and compare the two."""
    request: Any = discover()[endpoint].Input.model_validate(body)
    own_inputs = {location: path for location, path in inputs.items() if location.partition(".")[0] in body}
    task = engine.start(request, 9, own_inputs)
    assert task.acceleration == body.get("acceleration", "none")
    (image,) = finish_task(engine, task)
    with Image.open(inputs["image_url"]) as source:
        assert image.size == source.size
    assert difference(image, diffusers_image(pipeline, request, image.size, inputs)) == 0


@pytest.mark.parametrize("size", [SIZE, pytest.param(OTHER_SIZE, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_equals_its_diffusers_pipeline(
    engine: FluxEngine, tmp_path: Path, endpoint: str, size: tuple[int, int]
) -> None:
    dtype = engine.pipeline.transformer.dtype
    # A step may take a minute in a dtype that the machine does not run natively.
    takes_all_steps = endpoint in WITH_ALL_STEPS and type_name(dtype) == OWN_TYPE and size == SIZE
    pipeline = FluxPipeline.from_pretrained(DEMO, dtype=dtype, local_files_only=True)
    body = body_of(endpoint, size, takes_all_steps=takes_all_steps)
    check_parity(engine, pipeline, endpoint, body, write_inputs(tmp_path, size, DEMO / LORA))


def test_regular_equals_the_diffusers_pipeline_too(engine: FluxEngine, tmp_path: Path) -> None:
    """Check the default of the fal-ai/flux-1 endpoints. On a CPU, this tier is ready at once, and runs as "none"."""
    pipeline = FluxPipeline.from_pretrained(DEMO, dtype=engine.pipeline.transformer.dtype, local_files_only=True)
    endpoint = "fal-ai/flux-1/dev"
    body = {**body_of(endpoint, SIZE, takes_all_steps=False), "acceleration": "regular"}
    check_parity(engine, pipeline, endpoint, body, write_inputs(tmp_path, SIZE, DEMO / LORA))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [SIZE, OTHER_SIZE])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_equals_its_diffusers_pipeline_on_random_weights(
    tmp_path: Path, endpoint: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    lora = write_lora(tmp_path / "lora.safetensors", 1)
    body = body_of(endpoint, size, takes_all_steps=False)
    engine, pipeline = tiny_flux.engine(dtype), tiny_flux.pipeline(dtype)
    check_parity(engine, pipeline, endpoint, body, write_inputs(tmp_path, size, lora))
