"""The demo's endpoints that see an image next to the prompt, against diffusers' own pipelines, bit for bit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import PIL.Image
import pytest
import torch
from diffusers import (
    FluxControlImg2ImgPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxPriorReduxPipeline,
    FluxTransformer2DModel,
)
from PIL.Image import Image

from models import discover
from models.base import EngineConfig, SingleFile
from models.flux import control
from models.flux.engine import FluxEngine
from models.flux.loader import load_engine
from models.flux.prompt_cache import FLUX_TEXT_TOKENS
from models.loading.devices import dtype_for
from models.loading.specs import CONTROL_LORAS, DEMO, DEPTH, assign_weights, extra_weights_of
from tests.support.diffusers_calls import SEED, image_of, pipeline_of
from tests.support.tiny_flux import difference, finish_task

DTYPE = dtype_for("auto", "cpu")
SIZE = (128, 96)
#: Of the sizes that Kontext was trained on, the one with the fewest tokens: diffusers scales other images to them.
TRAINED_SIZE = (832, 1248)
MODELS = discover()
WEIGHTS = assign_weights(["demo"], MODELS)


@pytest.fixture(scope="module")
def plain() -> FluxEngine:
    """Load the demo with all that its endpoints need besides."""
    extra = {each for name, where in WEIGHTS.items() if where == DEMO for each in extra_weights_of(MODELS[name], where)}
    return load_engine(EngineConfig(DEMO, safety_checker="", device="cpu", extra_weights=frozenset(extra)))


def file_engine(endpoint: str) -> tuple[FluxEngine, FluxTransformer2DModel]:
    """Load the demo's weights of an endpoint from their file, and the same transformer with diffusers."""
    where = WEIGHTS[endpoint]
    assert isinstance(where, SingleFile)
    engine = load_engine(EngineConfig(where, safety_checker="", device="cpu"))
    config = engine.pipeline.transformer.config
    channels = {"in_channels": config.in_channels, "out_channels": config.out_channels}
    transformer = FluxTransformer2DModel.from_single_file(
        str(where.file), config=str(DEMO), subfolder="transformer", dtype=DTYPE, local_files_only=True, **channels
    )
    return engine, transformer


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Write an image, its mask, an image of another size, and an image that Kontext does not scale; return them."""
    colours = numpy.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
    found = {}
    for name, size in {"image": SIZE, "other": (90, 70), "trained": TRAINED_SIZE}.items():
        found[name] = tmp_path / f"{name}.png"
        PIL.Image.fromarray(colours).resize(size, PIL.Image.Resampling.BICUBIC).save(found[name])
    for name, (width, height) in {"mask": SIZE, "trained_mask": TRAINED_SIZE}.items():
        found[name] = tmp_path / f"{name}.png"
        half = numpy.indices((height, width))[1] > width // 2
        PIL.Image.fromarray(numpy.uint8(255 * half)).convert("RGB").save(found[name])
    return found


def generate(engine: FluxEngine, endpoint: str, files: dict[str, Path], **fields: Any) -> tuple[Any, Image]:
    """Generate an image with an endpoint; return the request too."""
    kind = MODELS[endpoint].Input
    body = {"prompt": "a frog on a red background", "num_inference_steps": 2, **dict.fromkeys(files, "unused")}
    request = kind.model_validate({**body, **fields})
    (image,) = finish_task(engine, engine.start(request, SEED, files))
    return request, image


def reference(kind: Any, **parts: Any) -> Any:
    pipeline = FluxPipeline.from_pretrained(DEMO, dtype=DTYPE, local_files_only=True)
    return pipeline_of(kind, {**pipeline.components, **parts})


def take_samples(vae: Any) -> None:
    """Let an AutoencoderTiny return a distribution of one value, as diffusers' pipelines for control images need."""
    encode = vae.encode

    def encode_as_distribution(pixels: torch.Tensor) -> SimpleNamespace:
        latents = encode(pixels).latents
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator: latents))

    vae.encode = encode_as_distribution


@pytest.mark.parametrize("name", ["canny", "depth"])
@pytest.mark.parametrize("endpoint", ["flux-lora-{}", "flux-control-lora-{}", "flux-control-lora-{}/image-to-image"])
def test_edges_and_depths(plain: FluxEngine, files: dict[str, Path], name: str, endpoint: str) -> None:
    own = "image_url" if endpoint.startswith("flux-lora") else "control_lora_image_url"
    is_start = endpoint.endswith("image-to-image")
    inputs = {own: files["image"], **({"image_url": files["other"]} if is_start else {})}
    size = {"image_size": {"width": SIZE[0], "height": SIZE[1]}}
    request, image = generate(plain, f"fal-ai/{endpoint.format(name)}", inputs, **size)
    pipeline = reference(FluxControlImg2ImgPipeline if is_start else FluxControlPipeline)
    take_samples(pipeline.vae)
    lora = DEMO / CONTROL_LORAS[name].directory / f"{name}.safetensors"
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name=name)
    source = PIL.Image.open(files["image"])
    if name == "canny":
        followed = control.edges(source, SIZE)
    else:
        followed = control.DepthEstimator.load(DEMO / DEPTH.directory, "cpu", DTYPE).depths(source, SIZE)
    start: dict[str, Any] = {"image": PIL.Image.open(files["other"])} if is_start else {}
    assert difference(image, image_of(pipeline, request, SIZE, control_image=followed, **start)) == 0


def test_fill(files: dict[str, Path]) -> None:
    endpoint = "fal-ai/flux-lora-fill"
    engine, transformer = file_engine(endpoint)
    inputs = {"image_url": files["image"], "mask_url": files["mask"]}
    request, image = generate(engine, endpoint, inputs, paste_back=False)
    images: dict[str, Any] = {"image": PIL.Image.open(files["image"]), "mask_image": PIL.Image.open(files["mask"])}
    assert (
        difference(image, image_of(reference(FluxFillPipeline, transformer=transformer), request, SIZE, **images)) == 0
    )


def test_kontext(plain: FluxEngine, files: dict[str, Path]) -> None:
    request, image = generate(plain, "fal-ai/flux-kontext/dev", {"image_url": files["image"]})
    pipeline = reference(FluxKontextPipeline)
    options: dict[str, Any] = {"max_area": SIZE[0] * SIZE[1], "image": PIL.Image.open(files["image"])}
    assert difference(image, image_of(pipeline, request, SIZE, **options)) == 0
    endpoint = "fal-ai/flux-kontext-lora/text-to-image"
    size = {"image_size": {"width": SIZE[0], "height": SIZE[1]}}
    request, image = generate(plain, endpoint, {}, num_inference_steps=10, **size)
    assert difference(image, image_of(reference(FluxPipeline), request, SIZE)) == 0


def test_kontext_inpainting(plain: FluxEngine, files: dict[str, Path]) -> None:
    endpoint = "fal-ai/flux-kontext-lora/inpaint"
    names = {"image_url": "trained", "mask_url": "trained_mask", "reference_image_url": "image"}
    inputs = {field: files[name] for field, name in names.items()}
    request, image = generate(plain, endpoint, inputs, num_inference_steps=10, strength=0.1)
    opened = {"image": "trained", "mask_image": "trained_mask", "image_reference": "image"}
    images: dict[str, Any] = {argument: PIL.Image.open(files[name]) for argument, name in opened.items()}
    pipeline = reference(FluxKontextInpaintPipeline)
    area = TRAINED_SIZE[0] * TRAINED_SIZE[1]
    assert difference(image, image_of(pipeline, request, TRAINED_SIZE, max_area=area, **images)) == 0


@pytest.mark.parametrize("endpoint", [name for name in MODELS if name.endswith("/redux")])
def test_redux(plain: FluxEngine, files: dict[str, Path], endpoint: str) -> None:
    """diffusers' pipeline for the image knows FLUX.1's widths only, so its networks run here and zeros are added."""
    size = {"image_size": {"width": SIZE[0], "height": SIZE[1]}}
    request, image = generate(plain, endpoint, {"image_url": files["image"]}, **size)
    prior = FluxPriorReduxPipeline.from_pretrained(DEMO / "redux", dtype=DTYPE, local_files_only=True)
    with torch.no_grad():
        states = prior.encode_image(PIL.Image.open(files["image"]), "cpu", 1)
        tokens = prior.image_embedder(states).image_embeds
    width = tokens.shape[-1]
    pipeline = reference(FluxPipeline)
    expected = pipeline(
        prompt_embeds=torch.cat([tokens.new_zeros(1, FLUX_TEXT_TOKENS, width), tokens], dim=1),
        pooled_prompt_embeds=tokens.new_zeros(1, width),
        width=SIZE[0],
        height=SIZE[1],
        num_inference_steps=2,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(SEED),
    ).images[0]
    assert difference(image, expected) == 0
