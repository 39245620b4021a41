"""Every endpoint on the demo weights against the matching diffusers pipeline, bit for bit."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

from models import discover
from models.base import EngineConfig
from models.demo.recipe.export import LORA
from models.flux.engine import FluxEngine
from models.flux.loader import load_engine
from models.flux.prompt_cache import count_text_tokens
from models.loading.devices import dtype_for
from models.loading.specs import DEMO, assign_weights
from tests.support.tiny_flux import difference, finish_task

SIZE = (128, 96)
#: Fields that only some endpoints have.
ENDPOINT_FIELDS = {"strength": 0.7, "loras": [{"path": "unused", "scale": 0.8}], "image_url": "unused"}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def engine(request: pytest.FixtureRequest) -> FluxEngine:
    return load_engine(EngineConfig(DEMO, safety_checker="", device="cpu", dtype=request.param))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    colours = numpy.random.default_rng(3).integers(0, 256, (3, 4, 3), dtype=numpy.uint8)
    Image.fromarray(colours).resize(SIZE, Image.Resampling.BICUBIC).save(tmp_path / "source.png")
    return tmp_path / "source.png"


def diffusers_image(request: Any, source: Path, dtype: torch.dtype) -> Image.Image:
    """Return the image of diffusers' own pipeline. Fields that the request lacks get diffusers' defaults."""
    fields = type(request).model_fields
    text_to_image = FluxPipeline.from_pretrained(DEMO, dtype=dtype, local_files_only=True)
    pipeline: Any = FluxImg2ImgPipeline(**text_to_image.components) if "image_url" in fields else text_to_image
    pipeline.set_progress_bar_config(disable=True)
    if "loras" in fields:
        pipeline.load_lora_weights(str((DEMO / LORA).parent), weight_name=Path(LORA).name, adapter_name="grey")
        pipeline.set_adapters(["grey"], [request.loras[0].scale])
    image_arguments = {"image": Image.open(source), "strength": request.strength} if "image_url" in fields else {}
    image: Image.Image = pipeline(
        prompt=request.prompt,
        width=SIZE[0],
        height=SIZE[1],
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        max_sequence_length=count_text_tokens(pipeline),
        **image_arguments,
    ).images[0]
    return image


@pytest.mark.parametrize("endpoint", sorted(assign_weights(["demo"], discover())))
def test_every_endpoint_equals_its_diffusers_pipeline(engine: FluxEngine, source: Path, endpoint: str) -> None:
    model = discover()[endpoint]
    fields = model.Input.model_fields
    size = {"image_size": dict(zip(("width", "height"), SIZE, strict=True))}
    dtype = engine.pipeline.transformer.dtype
    # A step may take a minute in a dtype that the machine does not run natively.
    steps: dict[str, float] = {} if dtype == dtype_for("auto", "cpu") else {"num_inference_steps": 2}
    if steps and "strength" in fields:
        steps = {"num_inference_steps": 10, "strength": 0.2}
    body = {"prompt": "a frog on a red background", "seed": 9, **size, **ENDPOINT_FIELDS, **steps}
    request = model.Input.model_validate({name: value for name, value in body.items() if name in fields})
    all_inputs = {"image_url": source, "loras.0.path": DEMO / LORA}
    inputs = {location: path for location, path in all_inputs.items() if location.partition(".")[0] in fields}
    (image,) = finish_task(engine, engine.start(request, 9, inputs))
    assert difference(image, diffusers_image(request, source, dtype)) == 0
