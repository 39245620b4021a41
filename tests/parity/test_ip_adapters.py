"""IP adapters of fal-ai/flux-general against diffusers' own pipelines, bit for bit, and files that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlNetPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL.Image import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from models.base import IncompatibleInput
from models.flux.image_adapters import AdapterImages, ImageAdapters
from models.flux.ip_adapters import IPAdapterManager
from models.flux_general import FluxGeneralImageToImageInput, FluxGeneralInpaintingInput, FluxGeneralInput
from tests.support.general_bench import GeneralBench
from tests.support.tiny_flux import difference, finish_task, write_lora
from tests.support.tiny_kinds import control_net, ip_adapter, write_clip_vision

KINDS = [
    (FluxGeneralInput, FluxPipeline),
    (FluxGeneralImageToImageInput, FluxImg2ImgPipeline),
    (FluxGeneralInpaintingInput, FluxInpaintPipeline),
]
DTYPES = [torch.bfloat16, torch.float32]


class Bench(GeneralBench):
    """An engine on a transformer of two double blocks, with two IP adapters and CLIP's vision model on disk."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        write_clip_vision(directory / "clip")
        super().__init__(directory, dtype, directory / "clip", num_layers=2)
        for seed, name in enumerate(("adapter", "other")):
            save_file(ip_adapter(seed, self.pipeline.transformer), directory / f"{name}.safetensors")

    def expected(self, kind: Any, request: Any, parts: dict[str, Any], **more: Any) -> Image:
        """Generate the request's image with a pipeline of diffusers, on weights that only this call changes."""
        pipeline = self.build_pipeline(kind, transformer=self.new_transformer(), **parts)
        pipeline.load_ip_adapter(
            [str(self.directory)] * len(request.ip_adapters),
            weight_name=[f"{adapter.path}.safetensors" for adapter in request.ip_adapters],
            image_encoder_pretrained_model_name_or_path=str(self.directory / "clip"),
            image_encoder_dtype=self.dtype,
        )
        scales = [adapter.scale for adapter in request.ip_adapters]
        pipeline.set_ip_adapter_scale(scales if len(scales) > 1 else scales[0])
        prompts = [self.image(adapter.ip_adapter_image_url) for adapter in request.ip_adapters]
        return self.call_diffusers(pipeline, request, ip_adapter_image=prompts, **more)


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
    assert difference(found, bench.expected(pipeline, request, {})) == 0
    assert difference(found, plain) > 0
    assert difference(bench.generate(bench.request(kind)), plain) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_ip_adapters_equal_the_pipeline(tmp_path: Path, dtype: torch.dtype) -> None:
    bench = Bench(tmp_path, dtype)
    request = bench.request(FluxGeneralInput, ip_adapters=[adapter_of(scale=0.4), adapter_of("other", "second")])
    assert difference(bench.generate(request), bench.expected(FluxPipeline, request, {})) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_guidance_with_an_ip_adapter_equals_the_pipeline(tmp_path: Path, dtype: torch.dtype) -> None:
    bench = Bench(tmp_path, dtype)
    guidance = {"use_real_cfg": True, "real_cfg_scale": 2.5, "negative_prompt": "a tree"}
    request = bench.request(FluxGeneralInput, ip_adapters=[adapter_of()], **guidance)
    assert difference(bench.generate(request), bench.expected(FluxPipeline, request, {})) == 0


def test_a_control_net_and_an_ip_adapter_equal_the_pipeline(bench: Bench) -> None:
    net = control_net(1, bench.pipeline.transformer)
    save_file(net.state_dict(), bench.directory / "net.safetensors")
    request = bench.request(
        FluxGeneralInput, ip_adapters=[adapter_of()], controlnets=[{"path": "net", "image_url": "second"}]
    )
    expected = bench.expected(FluxControlNetPipeline, request, {"controlnet": net}, control_image=bench.image("second"))
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
    images = finish_task(bench.engine, bench.start(request))
    single = bench.request(FluxGeneralInput, ip_adapters=[adapter_of()])
    (second,) = finish_task(bench.engine, bench.start(single, 6))
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
    bench.engine.image_adapters = ImageAdapters(bench.pipeline, None)
    request = bench.request(FluxGeneralInput, ip_adapters=[adapter_of()])
    with pytest.raises(IncompatibleInput, match="openai/clip-vit-large-patch14 is missing here") as error:
        bench.start(request)
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
        ({"model_subfolder": "x"}, "model_subfolder"),
        ({"insight_face_model_path": "x"}, "insight_face_model_path"),
        ({"unconditional_noising_factor": 0.1}, "unconditional_noising_factor"),
        ({"image_projection_shortcut": False}, "image_projection_shortcut"),
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
    tasks = [bench.start(request) for request in requests]
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
