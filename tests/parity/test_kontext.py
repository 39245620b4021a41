"""FLUX.1 Kontext against diffusers' own pipelines, bit for bit."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FluxKontextInpaintPipeline, FluxKontextPipeline, FluxPipeline
from PIL import Image

from models.flux import batch
from models.flux.flops import step_flops
from models.flux_dev import FluxDevInput
from models.flux_kontext import FluxKontextDevInput, FluxKontextLoraInpaintInput, FluxKontextLoraInput
from tests.support import tiny_flux
from tests.support.diffusers_calls import image_of, pipeline_of
from tests.support.tiny_flux import difference, finish_task, run_steps

NUM_STEPS = 2


def write_image(path: Path, size: tuple[int, int], seed: int) -> Path:
    """Write an image with soft random colours; return its path."""
    colours = numpy.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
    Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """Write an image of a size that Kontext was not trained on, so that it is scaled; return its path."""
    return write_image(tmp_path / "reference.png", (90, 40), 3)


def call_diffusers(kind: Any, pipeline: FluxPipeline, request: Any, size: tuple[int, int], **images: Any) -> Any:
    """Generate the request's image with a pipeline of diffusers, at the size that the engine rounds to."""
    width, height = (side // 16 * 16 for side in size)
    kontext = pipeline_of(kind, pipeline.components)
    return image_of(kontext, request, size, max_area=width * height, **images)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return tiny_flux.write_lora(tmp_path / "lora.safetensors", 1)


def add_lora(pipeline: FluxPipeline, lora: Path, scale: float) -> None:
    """Load a LoRA into a pipeline of diffusers."""
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="only")
    pipeline.set_adapters(["only"], [scale])


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_edit_equals_the_pipeline(reference: Path, lora: Path, dtype: torch.dtype, has_lora: bool) -> None:
    engine, pipeline = tiny_flux.engine(dtype), tiny_flux.pipeline(dtype)
    body: dict[str, Any] = {"prompt": "a fish", "image_url": "unused", "num_inference_steps": NUM_STEPS}
    request: Any = FluxKontextDevInput.model_validate(body)
    files = {"image_url": reference}
    if has_lora:
        # Its steps start at ten.
        more = {"loras": [{"path": "unused", "scale": 0.7}], "num_inference_steps": 10}
        request = FluxKontextLoraInput.model_validate({**body, **more})
        files["loras.0.path"] = lora
        add_lora(pipeline, lora, 0.7)
    (image,) = finish_task(engine, engine.start(request, 5, files))
    assert image.size == (80, 32)
    source = Image.open(reference)
    assert difference(image, call_diffusers(FluxKontextPipeline, pipeline, request, source.size, image=source)) == 0


def test_inpainting_equals_the_pipeline(reference: Path, tmp_path: Path) -> None:
    """diffusers scales the image to a trained size unless it has one, so it has one here."""
    size = (1568, 672)
    start, mask = write_image(tmp_path / "start.png", size, 4), tmp_path / "mask.png"
    Image.fromarray(numpy.uint8(255 * (numpy.indices(size[::-1])[1] > 700))).save(mask)
    engine, pipeline = tiny_flux.engine(torch.bfloat16), tiny_flux.pipeline(torch.bfloat16)
    body = {"prompt": "a fish", "image_url": "unused", "reference_image_url": "unused", "mask_url": "unused"}
    request = FluxKontextLoraInpaintInput.model_validate({**body, "num_inference_steps": 10, "strength": 0.25})
    files = {"image_url": start, "reference_image_url": reference, "mask_url": mask}
    (image,) = finish_task(engine, engine.start(request, 5, files))
    images = {"image": start, "image_reference": reference, "mask_image": mask}
    opened = {name: Image.open(path) for name, path in images.items()}
    expected = call_diffusers(FluxKontextInpaintPipeline, pipeline, request, size, **opened)
    assert image.size == size
    assert difference(image, expected) == 0


def test_the_tokens_of_the_reference_are_counted_as_work(reference: Path) -> None:
    engine = tiny_flux.engine()
    edit = FluxKontextDevInput.model_validate({"prompt": "a fish", "image_url": "unused"})
    task = engine.start(edit, 5, {"image_url": reference})
    plain = engine.start(FluxDevInput(prompt="a fish", image_size={"width": 80, "height": 64}), 5)
    config = engine.pipeline.transformer.config
    # The reference is scaled to 1568x672, of which 16x16 pixels are a token.
    tokens = 5 * 2 + 98 * 42
    assert task.step_work == step_flops(config, tokens, engine.num_text_tokens) > 50 * plain.step_work


@pytest.mark.parametrize("acceleration", ["regular", "high"])
def test_every_tier_runs_an_edit(reference: Path, acceleration: str) -> None:
    engine = tiny_flux.engine(torch.float32)
    body = {"prompt": "a fish", "image_url": "unused", "num_inference_steps": NUM_STEPS, "num_images": 2}
    images = {}
    for tier in ("none", acceleration):
        request = FluxKontextDevInput.model_validate({**body, "acceleration": tier})
        task = run_steps(engine, engine.start(request, 5, {"image_url": reference}))
        images[tier] = [sample.latents for sample in task.samples]
    for one, other in zip(*images.values(), strict=True):
        assert torch.allclose(one, other, atol=1e-3)


def test_edits_share_a_forward_if_their_references_have_one_size(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two references of a megapixel are more than a forward may have.
    monkeypatch.setattr(batch, "TOKEN_BUDGET", 20_000)
    engine = tiny_flux.engine(torch.float32)
    request = FluxKontextDevInput.model_validate(
        {
            "prompt": "a fish",
            "image_url": "unused",
            "num_inference_steps": NUM_STEPS,
            "acceleration": "regular",
        }
    )
    alike, tall = write_image(tmp_path / "alike.png", (90, 40), 8), write_image(tmp_path / "tall.png", (40, 90), 9)
    first, second, third = (engine.start(request, 5, {"image_url": path}) for path in (reference, alike, tall))
    with tiny_flux.record_batch_sizes(engine.pipeline.transformer) as sizes:
        assert engine.advance(first, [second, third]) == [first, second]
    assert sizes == [2]
