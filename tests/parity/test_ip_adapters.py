"""IP adapters of fal-ai/flux-general against diffusers' own pipelines, bit for bit, and files that are refused."""

from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import pytest
import torch
from diffusers import FluxControlNetPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL.Image import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from models.base import IncompatibleInput
from models.flux.engine import FluxEngine
from models.flux.image_adapters import AdapterImages
from models.flux.ip_adapters import IPAdapterManager
from models.flux.prompt_cache import count_text_tokens
from models.flux_general import FluxGeneralImageToImageInput, FluxGeneralInpaintingInput, FluxGeneralInput
from tests.support import tiny_flux
from tests.support.tiny_flux import AllSafeChecker, difference, finish_task, tiers_of, write_lora
from tests.support.tiny_kinds import control_net, ip_adapter, write_clip_vision

SIZE = (80, 64)
KINDS = [
    (FluxGeneralInput, FluxPipeline),
    (FluxGeneralImageToImageInput, FluxImg2ImgPipeline),
    (FluxGeneralInpaintingInput, FluxInpaintPipeline),
]
DTYPES = [torch.bfloat16, torch.float32]


class Bench:
    """An engine on a transformer of two double blocks, with images, IP adapters and CLIP's vision model on disk."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.directory, self.dtype = directory, dtype
        write_clip_vision(directory / "clip")
        self.pipeline = tiny_flux.pipeline(dtype)
        self.pipeline.transformer = tiny_flux.transformer(dtype, num_layers=2)
        self.engine = FluxEngine(
            self.pipeline,
            AllSafeChecker(),
            tiers_of(self.pipeline.transformer),
            "cpu",
            clip_vision=directory / "clip",
        )
        rng = numpy.random.default_rng(3)
        for name in ("image", "first", "second"):
            pixels = rng.integers(0, 255, (*SIZE[::-1], 3), dtype=numpy.uint8)
            PIL.Image.fromarray(pixels).save(directory / f"{name}.png")
        mask = PIL.Image.new("L", SIZE)
        mask.paste(255, (0, 0, SIZE[0] // 2, SIZE[1]))
        mask.convert("RGB").save(directory / "mask.png")
        for seed, name in enumerate(("adapter", "other")):
            save_file(ip_adapter(seed, self.pipeline.transformer), directory / f"{name}.safetensors")

    def request(self, kind: Any, **fields: Any) -> Any:
        body = {"prompt": "a fish", "num_inference_steps": 4, "image_size": {"width": SIZE[0], "height": SIZE[1]}}
        urls = {f"{name}_url": name for name in ("image", "mask") if f"{name}_url" in kind.model_fields}
        return kind.model_validate({**body, **urls, **fields})

    def inputs(self, request: Any) -> dict[str, Path]:
        """Return the request's files: here, its URLs are their names."""
        names = (name for name in ("image", "mask") if hasattr(request, f"{name}_url"))
        found = {f"{name}_url": self.directory / f"{name}.png" for name in names}
        for place, adapter in enumerate(request.ip_adapters):
            found[f"ip_adapters.{place}.path"] = self.directory / f"{adapter.path}.safetensors"
            found[f"ip_adapters.{place}.ip_adapter_image_url"] = self.directory / f"{adapter.ip_adapter_image_url}.png"
        for place, net in enumerate(request.controlnets):
            found[f"controlnets.{place}.path"] = self.directory / f"{net.path}.safetensors"
            found[f"controlnets.{place}.image_url"] = self.directory / f"{net.image_url}.png"
        return found | {
            f"loras.{n}.path": self.directory / f"{lora.path}.safetensors" for n, lora in enumerate(request.loras)
        }

    def generate(self, request: Any) -> Image:
        (image,) = finish_task(self.engine, self.engine.start(request, 5, self.inputs(request)))
        return image

    def image(self, name: str) -> Image:
        return PIL.Image.open(self.directory / f"{name}.png")

    def call_diffusers(self, kind: Any, request: Any, parts: dict[str, Any], **more: Any) -> Image:
        """Generate the request's image with a pipeline of diffusers, on weights that only this call changes."""
        transformer = tiny_flux.transformer(self.dtype, num_layers=2)
        pipeline = kind(**{**self.pipeline.components, "transformer": transformer, **parts})
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_ip_adapter(
            [str(self.directory)] * len(request.ip_adapters),
            weight_name=[f"{adapter.path}.safetensors" for adapter in request.ip_adapters],
            image_encoder_pretrained_model_name_or_path=str(self.directory / "clip"),
            image_encoder_dtype=self.dtype,
        )
        scales = [adapter.scale for adapter in request.ip_adapters]
        pipeline.set_ip_adapter_scale(scales if len(scales) > 1 else scales[0])
        if hasattr(request, "image_url"):
            more |= {"image": self.image("image"), "strength": request.strength}
        if hasattr(request, "mask_url"):
            more["mask_image"] = self.image("mask")
        if request.use_real_cfg:
            more |= {"true_cfg_scale": request.real_cfg_scale, "negative_prompt": request.negative_prompt}
        found: Image = pipeline(
            prompt=request.prompt,
            ip_adapter_image=[self.image(adapter.ip_adapter_image_url) for adapter in request.ip_adapters],
            width=SIZE[0],
            height=SIZE[1],
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(5),
            max_sequence_length=count_text_tokens(pipeline),
            **more,
        ).images[0]
        return found


def adapter_of(path: str = "adapter", image: Any = "first", **more: Any) -> dict[str, Any]:
    return {"path": path, "ip_adapter_image_url": image, **more}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "pipeline"), KINDS)
def test_an_ip_adapter_equals_the_pipeline(tmp_path: Path, dtype: torch.dtype, kind: Any, pipeline: Any) -> None:
    bench = Bench(tmp_path, dtype)
    request = bench.request(kind, ip_adapters=[adapter_of(scale=0.7)])
    plain = bench.generate(bench.request(kind))
    found = bench.generate(request)
    assert difference(found, bench.call_diffusers(pipeline, request, {})) == 0
    assert difference(found, plain) > 0
    assert difference(bench.generate(bench.request(kind)), plain) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_ip_adapters_equal_the_pipeline(tmp_path: Path, dtype: torch.dtype) -> None:
    bench = Bench(tmp_path, dtype)
    request = bench.request(FluxGeneralInput, ip_adapters=[adapter_of(scale=0.4), adapter_of("other", "second")])
    assert difference(bench.generate(request), bench.call_diffusers(FluxPipeline, request, {})) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_guidance_with_an_ip_adapter_equals_the_pipeline(tmp_path: Path, dtype: torch.dtype) -> None:
    bench = Bench(tmp_path, dtype)
    guidance = {"use_real_cfg": True, "real_cfg_scale": 2.5, "negative_prompt": "a tree"}
    request = bench.request(FluxGeneralInput, ip_adapters=[adapter_of()], **guidance)
    assert difference(bench.generate(request), bench.call_diffusers(FluxPipeline, request, {})) == 0


def test_a_control_net_and_an_ip_adapter_equal_the_pipeline(bench: Bench) -> None:
    net = control_net(1, bench.pipeline.transformer)
    save_file(net.state_dict(), bench.directory / "net.safetensors")
    request = bench.request(
        FluxGeneralInput, ip_adapters=[adapter_of()], controlnets=[{"path": "net", "image_url": "second"}]
    )
    expected = bench.call_diffusers(
        FluxControlNetPipeline, request, {"controlnet": net}, control_image=bench.image("second")
    )
    assert difference(bench.generate(request), expected) == 0


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_lora_and_an_ip_adapter_together(bench: Bench) -> None:
    write_lora(bench.directory / "style.safetensors", 7)
    wanted: list[dict[str, Any]] = [{"ip_adapters": [adapter_of()]}, {"loras": [{"path": "style"}]}]
    images = [
        bench.generate(bench.request(FluxGeneralInput, **fields)) for fields in (*wanted, {**wanted[0], **wanted[1]})
    ]
    assert len({image.tobytes() for image in images}) == 3
    assert difference(bench.generate(bench.request(FluxGeneralInput, **wanted[1])), images[1]) == 0


def test_several_images_each_see_the_prompt(bench: Bench) -> None:
    request = bench.request(FluxGeneralInput, ip_adapters=[adapter_of()], num_images=2)
    images = finish_task(bench.engine, bench.engine.start(request, 5, bench.inputs(request)))
    single = bench.request(FluxGeneralInput, ip_adapters=[adapter_of()])
    (second,) = finish_task(bench.engine, bench.engine.start(single, 6, bench.inputs(single)))
    assert difference(images[1], second) == 0 and difference(*images) > 0


def test_ip_adapters_are_evicted_and_come_back(bench: Bench) -> None:
    num_bytes = (bench.directory / "adapter.safetensors").stat().st_size
    manager = IPAdapterManager(bench.pipeline, bench.directory / "clip", kept_bytes=num_bytes)
    bench.engine.image_adapters.ip_adapters = manager
    requests = [bench.request(FluxGeneralInput, ip_adapters=[adapter_of(path)]) for path in ("adapter", "other")]
    images = [bench.generate(request) for request in requests]
    assert manager.num_loaded == 1
    assert difference(bench.generate(requests[0]), images[0]) == 0


def test_ip_adapters_need_clips_vision_model(bench: Bench) -> None:
    engine = FluxEngine(bench.pipeline, AllSafeChecker(), tiers_of(bench.pipeline.transformer), "cpu")
    request = bench.request(FluxGeneralInput, ip_adapters=[adapter_of()])
    with pytest.raises(IncompatibleInput, match="openai/clip-vit-large-patch14 is missing here") as error:
        engine.start(request, 5, bench.inputs(request))
    assert error.value.loc == ("ip_adapters", 0, "path")


def test_a_hostile_ip_adapter_is_named_and_changes_nothing(bench: Bench) -> None:
    good, plain = load_file(bench.directory / "adapter.safetensors"), bench.generate(bench.request(FluxGeneralInput))
    key = "double_blocks.1.processor.ip_adapter_double_stream_k_proj.weight"
    bad = {
        "its tensor proj_out.weight is not one": good | {"proj_out.weight": torch.ones(2)},
        r"it has no tensor for 1\.k\.weight": {name: weight for name, weight in good.items() if name != key},
        r"1\.k\.weight has the shape \[3, 3\]": good | {key: torch.ones(3, 3)},
        "more tensors than the model needs, such as 7.k.weight": good | {key.replace("1", "7"): torch.ones(3, 3)},
        "image_embeds.weight has the shape": ip_adapter(0, bench.pipeline.transformer, num_features=9),
    }
    for place, (message, tensors) in enumerate(bad.items()):
        save_file(tensors, bench.directory / f"bad{place}.safetensors")
        with pytest.raises(IncompatibleInput, match=message) as error:
            bench.generate(bench.request(FluxGeneralInput, ip_adapters=[adapter_of(f"bad{place}")]))
        assert error.value.loc == ("ip_adapters", 0, "path")
        assert difference(bench.generate(bench.request(FluxGeneralInput)), plain) == 0
    assert bench.engine.image_adapters.ip_adapters.num_loaded == 0


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"ip_adapter_mask_url": "x"}, "ip_adapter_mask_url"),
        ({"weight_name": "x"}, "weight_name"),
        ({"scale_json": {"a": 1}}, "scale_json"),
        ({"ip_adapter_image_url": ["a", "b"]}, "ip_adapter_image_url"),
    ],
)
def test_what_is_not_supported_is_named(bench: Bench, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValidationError) as error:
        bench.request(FluxGeneralInput, ip_adapters=[adapter_of() | fields])
    assert [entry["loc"] for entry in error.value.errors()] == [("ip_adapters", 0, name)]


def test_a_list_of_one_image_is_that_image(bench: Bench) -> None:
    (adapter,) = bench.request(FluxGeneralInput, ip_adapters=[adapter_of(image=["first"])]).ip_adapters
    assert adapter.ip_adapter_image_url == "first"


def test_an_ip_adapter_that_another_task_evicts_is_loaded_again(bench: Bench) -> None:
    num_bytes = (bench.directory / "adapter.safetensors").stat().st_size
    bench.engine.image_adapters.ip_adapters = IPAdapterManager(
        bench.pipeline, bench.directory / "clip", kept_bytes=num_bytes
    )
    requests = [bench.request(FluxGeneralInput, ip_adapters=[adapter_of(path)]) for path in ("adapter", "other")]
    expected = [bench.generate(request) for request in requests]
    tasks = [bench.engine.start(request, 5, bench.inputs(request)) for request in requests]
    while tasks[0].step < tasks[0].num_steps:
        for task in tasks:
            bench.engine.advance(task)
    bench.engine.image_adapters.unload_idle(AdapterImages())
    for task, image in zip(tasks, expected, strict=True):
        assert difference(finish_task(bench.engine, task)[0], image) == 0


def test_a_tensor_without_dimensions_is_named(bench: Bench) -> None:
    tensors = load_file(bench.directory / "adapter.safetensors") | {"ip_adapter_proj_model.proj.weight": torch.ones(())}
    save_file(tensors, bench.directory / "scalar.safetensors")
    with pytest.raises(IncompatibleInput, match=r"proj\.weight has no dimensions"):
        bench.generate(bench.request(FluxGeneralInput, ip_adapters=[adapter_of("scalar")]))
