"""fal-ai/flux-general against diffusers' own pipelines, bit for bit, and the fields that it refuses."""

from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
)
from PIL.Image import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from models.base import IncompatibleInput
from models.flux import control
from models.flux.control import DepthEstimator
from models.flux.engine import FluxEngine
from models.flux.loras import LoraManager
from models.flux_general import FluxGeneralImageToImageInput, FluxGeneralInpaintingInput, FluxGeneralInput
from tests.support import tiny_flux
from tests.support.diffusers_calls import image_of, pipeline_of
from tests.support.tiny_flux import AllSafeChecker, AlwaysShare, difference, finish_task, tiers_of, write_lora
from tests.support.tiny_kinds import write_control_lora, write_depth

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

SIZE = (80, 64)
HEADS = (2, 16)
#: Each kind of request, and the pipeline that it must equal.
KINDS = [
    (FluxGeneralInput, FluxPipeline),
    (FluxGeneralImageToImageInput, FluxImg2ImgPipeline),
    (FluxGeneralInpaintingInput, FluxInpaintPipeline),
]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Write an image, a mask of its left half, a control LoRA and another LoRA; return their paths."""
    pixels = numpy.random.default_rng(3).integers(0, 255, (*SIZE[::-1], 3), dtype=numpy.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "image.png")
    mask = PIL.Image.new("L", SIZE)
    mask.paste(255, (0, 0, SIZE[0] // 2, SIZE[1]))
    mask.convert("RGB").save(tmp_path / "mask.png")
    write_control_lora(tmp_path / "control.safetensors", 1, 16, HEADS)
    write_lora(tmp_path / "style.safetensors", 7)
    return {path.stem: path for path in tmp_path.iterdir()}


def engine_of(dtype: torch.dtype = torch.float32) -> FluxEngine:
    pipeline = tiny_flux.pipeline(dtype)
    return FluxEngine(pipeline, AllSafeChecker(), tiers_of(pipeline.transformer), "cpu", sharing=AlwaysShare())


def request_of(kind: Any, **fields: Any) -> Any:
    body = {"prompt": "a fish", "num_inference_steps": 4, "image_size": {"width": SIZE[0], "height": SIZE[1]}}
    urls = {name: "unused" for name in ("image_url", "mask_url") if name in kind.model_fields}
    return kind.model_validate({**body, **urls, **fields})


def inputs_of(request: Any, files: dict[str, Path]) -> dict[str, Path]:
    inputs = {f"{name}_url": files[name] for name in ("image", "mask") if hasattr(request, f"{name}_url")}
    inputs |= {f"loras.{place}.path": files["style"] for place in range(len(request.loras))}
    if request.control_loras:
        inputs |= {"control_loras.0.path": files["control"], "control_loras.0.control_image_url": files["image"]}
    return inputs


def generate(engine: FluxEngine, request: Any, files: dict[str, Path]) -> Image:
    (image,) = finish_task(engine, engine.start(request, 5, inputs_of(request, files)))
    return image


def call_diffusers(kind: Any, dtype: torch.dtype, request: Any, files: dict[str, Path], **more: Any) -> Image:
    """Generate the request's image with a pipeline of diffusers."""
    parts = dict(tiny_flux.pipeline(dtype).components)
    shifts = {"base_shift": request.base_shift, "max_shift": request.max_shift}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_config(parts["scheduler"].config, **shifts)
    pipeline = pipeline_of(kind, parts)
    if request.control_loras:
        pipeline.load_lora_weights(str(files["control"].parent), weight_name="control.safetensors", adapter_name="c")
        pipeline.set_adapters(["c"], [request.control_loras[0].scale])
        more["control_image"] = PIL.Image.open(files["image"])
    if hasattr(request, "image_url"):
        more["image"] = PIL.Image.open(files["image"])
    if hasattr(request, "mask_url"):
        more["mask_image"] = PIL.Image.open(files["mask"])
    return image_of(pipeline, request, SIZE, **more)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "pipeline"), KINDS)
def test_real_guidance_equals_the_pipeline(
    files: dict[str, Path], dtype: torch.dtype, kind: Any, pipeline: Any
) -> None:
    engine = engine_of(dtype)
    images = []
    for negative_prompt, scale in (("", 3.5), ("a tree", 3.5), ("a tree", 1.5), ("a tree", 1.0)):
        request = request_of(kind, use_real_cfg=True, real_cfg_scale=scale, negative_prompt=negative_prompt)
        images.append(generate(engine, request, files))
        assert difference(images[-1], call_diffusers(pipeline, dtype, request, files)) == 0
    assert len({image.tobytes() for image in images}) == len(images)
    # At 1 there is no real guidance, whatever the negative prompt.
    assert difference(images[-1], generate(engine, request_of(kind), files)) == 0


@pytest.mark.parametrize(("kind", "pipeline"), KINDS)
def test_the_shifts_equal_the_pipelines(files: dict[str, Path], kind: Any, pipeline: Any) -> None:
    plain, shifted = request_of(kind), request_of(kind, base_shift=1.5, max_shift=2.5)
    images = [generate(engine_of(), request, files) for request in (plain, shifted)]
    assert difference(*images) > 0
    assert difference(images[1], call_diffusers(pipeline, torch.float32, shifted, files)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "pipeline"),
    [
        (FluxGeneralInput, FluxControlPipeline),
        (FluxGeneralImageToImageInput, FluxControlImg2ImgPipeline),
        (FluxGeneralInpaintingInput, FluxControlInpaintPipeline),
    ],
)
def test_a_control_lora_equals_the_pipeline(
    files: dict[str, Path], dtype: torch.dtype, kind: Any, pipeline: Any
) -> None:
    request = request_of(kind, control_loras=[{"path": "unused", "control_image_url": "unused", "scale": 0.7}])
    expected = call_diffusers(pipeline, dtype, request, files)
    assert difference(generate(engine_of(dtype), request, files), expected) == 0


def test_requests_with_and_without_real_guidance_do_not_share_forwards(files: dict[str, Path]) -> None:
    class Shared(FluxGeneralInput):
        acceleration: str = "regular"

    engine = engine_of()
    requests = [
        request_of(Shared, use_real_cfg=True, real_cfg_scale=scale, negative_prompt=text)
        for scale, text in ((3.5, "a tree"), (2.0, "a house"))
    ]
    alone = [generate(engine, request, files) for request in requests]
    guided = [engine.start(request, 5) for request in requests]
    plain = engine.start(request_of(Shared), 5)
    assert engine.advance(guided[0], [guided[1], plain]) == guided
    assert guided[0].work == 2 * plain.remaining_work // plain.num_steps
    while guided[0].step < guided[0].num_steps:
        engine.advance(guided[0], guided[1:])
    for task, expected in zip(guided, alone, strict=True):
        assert difference(finish_task(engine, task)[0], expected) <= 1


def test_a_control_lora_of_a_client_is_evicted_and_comes_back(files: dict[str, Path]) -> None:
    engine = engine_of()
    engine.loras = LoraManager(engine.pipeline, kept_bytes=files["control"].stat().st_size)
    request = request_of(FluxGeneralInput, control_loras=[{"path": "unused", "control_image_url": "unused"}])
    first = generate(engine, request, files)
    style = request_of(FluxGeneralInput, loras=[{"path": "unused"}])
    generate(engine, style, files)
    assert engine.loras.names == ["style"]
    assert difference(generate(engine, request, files), first) == 0


@pytest.mark.parametrize("preprocess", ["canny", "depth"])
def test_a_control_image_is_preprocessed(files: dict[str, Path], tmp_path: Path, preprocess: str) -> None:
    write_depth(tmp_path / "estimator")
    estimator = DepthEstimator.load(tmp_path / "estimator", "cpu", torch.float32)
    image = PIL.Image.open(files["image"])
    shown = control.edges(image, SIZE) if preprocess == "canny" else estimator.depths(image, SIZE)
    shown.save(tmp_path / "shown.png")
    images = []
    for name, how in (("image", preprocess), ("shown", "None")):
        lora = {"path": "unused", "control_image_url": "unused", "preprocess": how}
        request, engine = request_of(FluxGeneralInput, control_loras=[lora]), engine_of()
        engine.depth_estimator = estimator
        images.append(generate(engine, request, {**files, "image": tmp_path / f"{name}.png"}))
    assert difference(*images) == 0


def test_depths_need_their_weights(files: dict[str, Path]) -> None:
    lora = {"path": "unused", "control_image_url": "unused", "preprocess": "depth"}
    with pytest.raises(IncompatibleInput, match="Depths cannot be found here") as error:
        generate(engine_of(), request_of(FluxGeneralInput, control_loras=[lora]), files)
    assert error.value.loc == ("control_loras", 0, "preprocess")


def test_null_counts_as_absent_in_a_control_lora() -> None:
    lora = {"path": "unused", "control_image_url": "unused", "preprocess": None, "scale": None}
    (found,) = request_of(FluxGeneralInput, control_loras=[lora]).control_loras
    assert (found.preprocess, found.scale) == ("None", 1)


def test_a_hostile_control_lora_is_named_and_changes_nothing(files: dict[str, Path]) -> None:
    engine = engine_of()
    request = request_of(FluxGeneralInput, control_loras=[{"path": "unused", "control_image_url": "unused"}])
    style = request_of(FluxGeneralInput, loras=[{"path": "unused"}])
    good, alone = load_file(files["control"]), generate(engine, style, files)
    followed = generate(engine, request, files)
    files["good"] = files["control"].rename(files["control"].with_name("good.safetensors"))
    block = "transformer.transformer_blocks.0.attn"
    bad = {
        "has the shape": {f"{block}.norm_q.weight": torch.ones(HEADS[1] + 1)},
        "to_q.lora_B.bias has the shape": {f"{block}.to_q.lora_B.bias": torch.ones(3)},
        "not one of a LoRA's matrices": {"transformer.proj_out.weight": torch.zeros(16, 32)},
        "which alone a control LoRA may change": {
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16),
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(16, 4),
        },
        "maps 16 to 32 features": {"transformer.x_embedder.lora_A.weight": torch.ones(4, 16)},
        "is empty": {
            f"{block}.to_q.lora_A.weight": torch.ones(0, 32),
            f"{block}.to_q.lora_B.weight": torch.ones(32, 0),
        },
    }
    for place, (message, changes) in enumerate(bad.items()):
        # The server names files by their content.
        files["control"] = files["control"].with_name(f"bad-{place}.safetensors")
        save_file({**good, **changes}, files["control"])
        with pytest.raises(IncompatibleInput, match=message) as error:
            generate(engine, request, files)
        assert error.value.loc == ("control_loras", 0, "path")
        assert difference(generate(engine, style, files), alone) == 0
        assert difference(generate(engine, request, {**files, "control": files["good"]}), followed) == 0
    files["control"] = files["style"]
    with pytest.raises(IncompatibleInput, match="maps 16 to 32 features"):
        generate(engine, request, files)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("easycontrols", [{"control_method_url": "canny"}]),
        ("fill_image", {"fill_image_url": "x"}),
        ("use_cfg_zero", True),
        ("reference_image_url", "http://127.0.0.1/a.png"),
        ("reference_strength", 0.5),
        ("use_beta_schedule", True),
        ("sigma_schedule", "sgm_uniform"),
        ("scheduler", "dpmpp_2m"),
        ("reference_start", 0.1),
        ("reference_end", 0.9),
        ("nag_scale", 4),
        ("nag_tau", 2),
        ("nag_alpha", 0.5),
        ("nag_end", 0.5),
        ("negative_prompt", "a tree"),
    ],
)
def test_a_field_that_is_not_supported_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        request_of(FluxGeneralInput, **{field: value})
    (entry,) = error.value.errors()
    assert (entry["loc"], entry["type"]) == ((field,), "feature_not_supported")
    assert field not in FluxGeneralInput.model_json_schema()["properties"] or field == "negative_prompt"


def test_fals_defaults_of_such_fields_are_accepted() -> None:
    defaults: dict[str, Any] = {
        "controlnets": [],
        "controlnet_unions": [],
        "ip_adapters": [],
        "easycontrols": [],
        "fill_image": None,
        "use_cfg_zero": False,
        "reference_strength": 0.65,
        "reference_start": 0,
        "reference_end": 1,
        "use_beta_schedule": False,
        "scheduler": "euler",
        "nag_scale": 3,
        "nag_tau": 2.5,
        "nag_alpha": 0.25,
        "nag_end": 0.25,
        "negative_prompt": "",
    }
    request_of(FluxGeneralInput, **defaults)


def test_only_one_control_lora_at_a_time() -> None:
    lora = {"path": "unused", "control_image_url": "unused"}
    with pytest.raises(ValidationError, match="control_loras"):
        request_of(FluxGeneralInput, control_loras=[lora, lora])
