"""Every endpoint on the demo weights against the diffusers pipeline that it stands for: not one bit apart."""

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
from models.loading.devices import dtype_for
from models.loading.specs import DEMO, assign_weights
from tests.support.tiny_flux import difference, finished

SIZE = (128, 96)
LIMITS = {"strength": 0.7, "loras": [{"path": "unused", "scale": 0.8}], "image_url": "unused"}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def engine(request: pytest.FixtureRequest) -> FluxEngine:
    return FluxEngine.load(EngineConfig(DEMO, safety_checker="", device="cpu", dtype=request.param))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    colours = numpy.random.default_rng(3).integers(0, 256, (3, 4, 3), dtype=numpy.uint8)
    Image.fromarray(colours).resize(SIZE, Image.Resampling.BICUBIC).save(tmp_path / "source.png")
    return tmp_path / "source.png"


def expected(request: Any, source: Path, dtype: torch.dtype) -> Image.Image:
    """What diffusers itself gives, with its own defaults for everything that the request does not say."""
    told = type(request).model_fields
    text_to_image = FluxPipeline.from_pretrained(DEMO, dtype=dtype, local_files_only=True)
    pipeline: Any = FluxImg2ImgPipeline(**text_to_image.components) if "image_url" in told else text_to_image
    pipeline.set_progress_bar_config(disable=True)
    if "loras" in told:
        pipeline.load_lora_weights(str((DEMO / LORA).parent), weight_name=Path(LORA).name, adapter_name="grey")
        pipeline.set_adapters(["grey"], [request.loras[0].scale])
    more = {"image": Image.open(source), "strength": request.strength} if "image_url" in told else {}
    picture: Image.Image = pipeline(
        prompt=request.prompt,
        width=SIZE[0],
        height=SIZE[1],
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        max_sequence_length=512,
        **more,
    ).images[0]
    return picture


@pytest.mark.parametrize("endpoint", sorted(assign_weights(["demo"], discover())))
def test_every_endpoint_equals_its_pipeline(engine: FluxEngine, source: Path, endpoint: str) -> None:
    model = discover()[endpoint]
    fields = model.Input.model_fields
    size = {"image_size": dict(zip(("width", "height"), SIZE, strict=True))}
    dtype = engine.pipeline.transformer.dtype
    # In a type that is not the machine's own, a step may take a minute.
    steps: dict[str, float] = {} if dtype == dtype_for("auto", "cpu") else {"num_inference_steps": 2}
    if steps and "strength" in fields:
        steps = {"num_inference_steps": 10, "strength": 0.2}
    body = {"prompt": "a frog on a red background", "seed": 9, **size, **LIMITS, **steps}
    request = model.Input.model_validate({name: value for name, value in body.items() if name in fields})
    inputs = {"image_url": source, "loras.0.path": DEMO / LORA}
    given = {place: path for place, path in inputs.items() if place.partition(".")[0] in fields}
    (picture,) = finished(engine, engine.start(request, 9, given))
    assert difference(picture, expected(request, source, dtype)) == 0
