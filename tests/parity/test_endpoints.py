"""Every endpoint on the demo weights against the matching diffusers pipeline, bit for bit."""

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
from models.flux.prompt_cache import count_text_tokens
from models.loading.devices import dtype_for
from models.loading.specs import DEMO, assign_weights
from tests.support.tiny_flux import difference, finish_task

SIZE = (128, 96)
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
}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def engine(request: pytest.FixtureRequest) -> FluxEngine:
    return load_engine(EngineConfig(DEMO, safety_checker="", device="cpu", dtype=request.param))


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Write an image and a mask; return their paths, and that of a LoRA, by field."""
    random = numpy.random.default_rng(3)
    for name in ("image_url", "mask_url"):
        colours = random.integers(0, 256, (3, 4, 3), dtype=numpy.uint8)
        Image.fromarray(colours).resize(SIZE, Image.Resampling.BICUBIC).save(tmp_path / f"{name}.png")
    images = {name: tmp_path / f"{name}.png" for name in ("image_url", "mask_url")}
    return {**images, "loras.0.path": DEMO / LORA}


def diffusers_image(request: Any, inputs: dict[str, Path], dtype: torch.dtype) -> Image.Image:
    """Return the image of diffusers' own pipeline. Fields that the request lacks get diffusers' defaults."""
    fields = type(request).model_fields
    pipeline: Any = FluxPipeline.from_pretrained(DEMO, dtype=dtype, local_files_only=True)
    images = {"image": "image_url", "mask_image": "mask_url"}
    more = {argument: Image.open(inputs[name]) for argument, name in images.items() if name in fields}
    if "strength" in fields:
        kind = FluxInpaintPipeline if "mask_url" in fields else FluxImg2ImgPipeline
        pipeline, more = kind(**pipeline.components), {**more, "strength": request.strength}
    pipeline.set_progress_bar_config(disable=True)
    if "loras" in fields:
        pipeline.load_lora_weights(str((DEMO / LORA).parent), weight_name=Path(LORA).name, adapter_name="grey")
        pipeline.set_adapters(["grey"], [request.loras[0].scale])
    image: Image.Image = pipeline(
        prompt=request.prompt,
        width=SIZE[0],
        height=SIZE[1],
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        max_sequence_length=count_text_tokens(pipeline),
        **more,
    ).images[0]
    return image


@pytest.mark.parametrize("endpoint", sorted(assign_weights(["demo"], discover())))
def test_every_endpoint_equals_its_diffusers_pipeline(
    engine: FluxEngine, inputs: dict[str, Path], endpoint: str
) -> None:
    model = discover()[endpoint]
    fields = model.Input.model_fields
    size = {"image_size": dict(zip(("width", "height"), SIZE, strict=True))}
    dtype = engine.pipeline.transformer.dtype
    # A step may take a minute in a dtype that the machine does not run natively.
    takes_all_steps = endpoint in WITH_ALL_STEPS and dtype == dtype_for("auto", "cpu")
    steps: dict[str, float] = {} if takes_all_steps else {"num_inference_steps": 2}
    if steps and "strength" in fields:
        steps = {"num_inference_steps": 10, "strength": 0.2}
    body = {"prompt": "a frog on a red background", "seed": 9, **size, **ENDPOINT_FIELDS, **steps}
    request = model.Input.model_validate({name: value for name, value in body.items() if name in fields})
    own_inputs = {location: path for location, path in inputs.items() if location.partition(".")[0] in fields}
    (image,) = finish_task(engine, engine.start(request, 9, own_inputs))
    assert difference(image, diffusers_image(request, inputs, dtype)) == 0
