"""Control nets of fal-ai/flux-general against diffusers' own pipelines, bit for bit, and files that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
)
from PIL.Image import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from models.base import IncompatibleInput
from models.flux.control_nets import MODES, ControlNetManager, build
from models.flux_general import FluxGeneralImageToImageInput, FluxGeneralInpaintingInput, FluxGeneralInput
from models.loading.memory_plans import PLANS
from tests.support.general_bench import GeneralBench
from tests.support.tiny_flux import difference, finish_task, write_lora
from tests.support.tiny_kinds import control_net

KINDS = [
    (FluxGeneralInput, FluxControlNetPipeline),
    (FluxGeneralImageToImageInput, FluxControlNetImg2ImgPipeline),
    (FluxGeneralInpaintingInput, FluxControlNetInpaintPipeline),
]
DTYPES = [torch.bfloat16, torch.float32]
CANNY = {"control_image_url": "x", "control_mode": "canny"}


class Bench(GeneralBench):
    """An engine on a transformer of three double and four single blocks, to which control nets can be added."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(directory, dtype, num_layers=3, num_single_layers=4)

    def add(self, name: str, seed: int, **changes: Any) -> FluxControlNetModel:
        """Write a control net to the directory, and return it."""
        net = control_net(seed, self.pipeline.transformer, **changes)
        save_file(net.state_dict(), self.directory / f"{name}.safetensors")
        return net

    def expected(self, kind: Any, net: Any, request: Any, **more: Any) -> Image:
        """Generate the request's image with a pipeline of diffusers."""
        return self.call_diffusers(self.build_pipeline(kind, controlnet=net), request, **more)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def net_of(path: str = "net", image: str = "first", **more: Any) -> dict[str, Any]:
    return {"path": path, "image_url": image, **more}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "pipeline"), KINDS)
def test_a_control_net_equals_the_pipeline(tmp_path: Path, dtype: torch.dtype, kind: Any, pipeline: Any) -> None:
    bench = Bench(tmp_path, dtype)
    net = bench.add("net", 1, num_layers=2, guidance_embeds=True)
    request = bench.request(kind, controlnets=[net_of(conditioning_scale=0.7)])
    found = bench.generate(request)
    expected = bench.expected(
        pipeline, net, request, control_image=bench.image("first"), controlnet_conditioning_scale=0.7
    )
    assert difference(found, expected) == 0
    assert difference(found, bench.generate(bench.request(kind))) > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_share_of_the_steps_equals_the_pipeline(tmp_path: Path, dtype: torch.dtype) -> None:
    bench = Bench(tmp_path, dtype)
    net = bench.add("net", 1)
    images = []
    for start, end in ((0.0, 0.5), (0.3, 1.0), (0.2, 0.8), (0.0, 0.1)):
        request = bench.request(FluxGeneralInput, controlnets=[net_of(start_percentage=start, end_percentage=end)])
        images.append(bench.generate(request))
        shares = {"control_guidance_start": start, "control_guidance_end": end}
        expected = bench.expected(FluxControlNetPipeline, net, request, control_image=bench.image("first"), **shares)
        assert difference(images[-1], expected) == 0
    assert len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "pipeline"), KINDS)
def test_several_control_nets_equal_the_pipeline(tmp_path: Path, dtype: torch.dtype, kind: Any, pipeline: Any) -> None:
    bench = Bench(tmp_path, dtype)
    nets = [bench.add("net", 1), bench.add("other", 2)]
    request = bench.request(
        kind, controlnets=[net_of(), net_of("other", "second", conditioning_scale=0.4, end_percentage=0.6)]
    )
    expected = bench.expected(
        pipeline,
        FluxMultiControlNetModel(nets),
        request,
        control_image=[bench.image("first"), bench.image("second")],
        # Only unions have modes, but without these, diffusers' pipelines for input images run none of the nets.
        control_mode=[0, 0],
        controlnet_conditioning_scale=[1.0, 0.4],
        control_guidance_start=[0.0, 0.0],
        control_guidance_end=[1.0, 0.6],
    )
    assert difference(bench.generate(request), expected) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "pipeline"), KINDS)
def test_a_union_equals_the_pipeline(tmp_path: Path, dtype: torch.dtype, kind: Any, pipeline: Any) -> None:
    bench = Bench(tmp_path, dtype)
    net = bench.add("net", 1, num_mode=10)
    controls: list[dict[str, Any]] = [
        {"control_image_url": "first", "control_mode": "canny", "conditioning_scale": 0.8},
        {"control_image_url": "second", "control_mode": "depth"},
    ]
    request = bench.request(kind, controlnet_unions=[{"path": "net", "controls": controls}])
    found = bench.generate(request)
    expected = bench.expected(
        pipeline,
        FluxMultiControlNetModel([net]),
        request,
        control_image=[bench.image("first"), bench.image("second")],
        control_mode=[MODES.index("canny"), MODES.index("depth")],
        controlnet_conditioning_scale=[0.8, 1.0],
        control_guidance_start=[0.0, 0.0],
        control_guidance_end=[1.0, 1.0],
    )
    assert difference(found, expected) == 0
    controls[0]["control_mode"] = "blur"
    other = bench.request(kind, controlnet_unions=[{"path": "net", "controls": controls}])
    assert difference(bench.generate(other), found) > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_control_net_for_pixels_equals_the_pipeline(tmp_path: Path, dtype: torch.dtype) -> None:
    bench = Bench(tmp_path, dtype)
    # A token has the channels of 2 x 2 hints, as many as the transformer takes.
    net = bench.add("net", 1, num_layers=2, num_single_layers=0, conditioning_embedding_channels=4, patch_size=2)
    request = bench.request(FluxGeneralInput, controlnets=[net_of()])
    expected = bench.expected(FluxControlNetPipeline, net, request, control_image=bench.image("first"))
    assert difference(bench.generate(request), expected) == 0


def test_real_guidance_with_a_control_net_equals_the_pipeline(bench: Bench) -> None:
    net = bench.add("net", 1)
    request = bench.request(
        FluxGeneralInput, controlnets=[net_of()], use_real_cfg=True, real_cfg_scale=2.5, negative_prompt="a tree"
    )
    expected = bench.expected(FluxControlNetPipeline, net, request, control_image=bench.image("first"))
    assert difference(bench.generate(request), expected) == 0


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_lora_and_a_control_net_together(bench: Bench) -> None:
    write_lora(bench.directory / "style.safetensors", 7)
    bench.add("net", 1)
    wanted = [{"controlnets": [net_of()]}, {"loras": [{"path": "style"}]}]
    images = [
        bench.generate(bench.request(FluxGeneralInput, **fields)) for fields in (*wanted, {**wanted[0], **wanted[1]})
    ]
    assert len({image.tobytes() for image in images}) == 3
    assert difference(bench.generate(bench.request(FluxGeneralInput, **wanted[0])), images[0]) == 0


def test_the_work_of_a_control_net_is_counted(bench: Bench) -> None:
    bench.add("net", 1)
    request = bench.request(FluxGeneralInput, controlnets=[net_of(), net_of()])
    task, plain = (bench.start(each) for each in (request, bench.request(FluxGeneralInput)))
    bench.engine.advance(task)
    assert plain.step_work < task.step_work < 3 * plain.step_work


def test_control_nets_are_evicted_and_come_back(bench: Bench) -> None:
    for seed in range(3):
        bench.add(f"net{seed}", seed)
    num_bytes = (bench.directory / "net0.safetensors").stat().st_size
    bench.engine.image_adapters.control_nets = ControlNetManager(bench.pipeline, kept_bytes=2 * num_bytes)
    requests = [bench.request(FluxGeneralInput, controlnets=[net_of(f"net{seed}")]) for seed in range(3)]
    images = [bench.generate(request) for request in requests]
    assert bench.engine.image_adapters.control_nets.num_loaded == 2
    assert difference(bench.generate(requests[0]), images[0]) == 0


def test_control_nets_need_a_plan_that_keeps_everything_on_the_gpu(bench: Bench) -> None:
    bench.add("net", 1)
    bench.engine.plan = next(plan for plan in PLANS if not plan.is_resident)
    request = bench.request(FluxGeneralInput, controlnets=[net_of()])
    with pytest.raises(IncompatibleInput, match="adapters do not work with this server's memory plan") as error:
        bench.generate(request)
    assert error.value.loc == ("controlnets", 0, "path")


def test_a_hostile_control_net_is_named_and_changes_nothing(bench: Bench) -> None:
    bench.add("net", 1)
    bench.add("wide", 1, joint_attention_dim=24)
    bench.add("pixels", 1, conditioning_embedding_channels=3, patch_size=2)
    good, plain = load_file(bench.directory / "net.safetensors"), bench.generate(bench.request(FluxGeneralInput))
    block = "transformer_blocks.0.attn.to_q"
    missing = {name: weight for name, weight in good.items() if name != f"{block}.weight"}
    bad = {
        "its tensor proj_out.weight is not one": good | {"proj_out.weight": torch.ones(2)},
        "it has no tensor transformer_blocks.0.attn.to_q.weight": missing,
        "the numbers of its transformer_blocks": good | {"transformer_blocks.99999999.attn.to_q.weight": torch.ones(2)},
        "has 3 modes": good | {"controlnet_mode_embedder.weight": torch.ones(3, 32)},
        r"to_q.weight has the shape \[2\], and the model needs \[32, 32\]": good | {f"{block}.weight": torch.ones(2)},
        "context_embedder.weight has the shape": load_file(bench.directory / "wide.safetensors"),
        r"controlnet_x_embedder.weight has the shape|input_hint_block": load_file(
            bench.directory / "pixels.safetensors"
        )
        | {"controlnet_x_embedder.weight": torch.ones(32, 12)},
    }
    for place, (message, tensors) in enumerate(bad.items()):
        save_file(tensors, bench.directory / f"bad{place}.safetensors")
        request = bench.request(FluxGeneralInput, controlnets=[net_of(f"bad{place}")])
        with pytest.raises(IncompatibleInput, match=message) as error:
            bench.generate(request)
        assert error.value.loc == ("controlnets", 0, "path")
        assert difference(bench.generate(bench.request(FluxGeneralInput)), plain) == 0
    assert bench.engine.image_adapters.control_nets.num_loaded == 0


def test_a_union_outside_of_its_field_is_refused(bench: Bench) -> None:
    bench.add("net", 1, num_mode=10)
    with pytest.raises(IncompatibleInput, match="controlnet_unions"):
        bench.generate(bench.request(FluxGeneralInput, controlnets=[net_of()]))


def test_the_configuration_follows_from_the_weights(bench: Bench) -> None:
    net = bench.add("net", 1, num_layers=2, num_single_layers=3, guidance_embeds=True, num_mode=10)
    built = build(net.state_dict(), bench.pipeline.transformer)
    ignored = ("_use_default_values", "_class_name")
    own, expected = ({k: v for k, v in dict(each.config).items() if k not in ignored} for each in (built, net))
    assert {**own, "axes_dims_rope": tuple(own["axes_dims_rope"])} == expected
    assert all(weight.is_meta for weight in built.parameters())


@pytest.mark.parametrize(
    ("fields", "loc"),
    [
        ({"controlnets": [net_of(mask_url="x")]}, ("controlnets", 0, "mask_url")),
        ({"controlnets": [net_of(variant="fp16")]}, ("controlnets", 0, "variant")),
        ({"controlnets": [net_of(ip_adapter_index=1)]}, ("controlnets", 0, "ip_adapter_index")),
        ({"controlnets": [net_of()] * 5}, ("controlnets",)),
        (
            {"controlnets": [net_of(start_percentage=0.5, end_percentage=0.5)]},
            ("controlnets", 0, "end_percentage"),
        ),
        ({"controlnet_unions": [{"path": "net", "controls": []}]}, ("controlnet_unions", 0, "controls")),
        *(
            (
                {"controlnet_unions": [{"path": "net", "controls": [CANNY | {name: value}]}]},
                ("controlnet_unions", 0, "controls", 0, name),
            )
            for name, value in {"mask_image_url": "x", "mask_threshold": 0.4}.items()
        ),
    ],
)
def test_what_is_not_supported_is_named(bench: Bench, fields: dict[str, Any], loc: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError) as error:
        bench.request(FluxGeneralInput, **fields)
    assert [entry["loc"] for entry in error.value.errors()] == [loc]


def test_a_control_net_that_another_task_evicts_is_loaded_again(bench: Bench) -> None:
    for seed in range(2):
        bench.add(f"net{seed}", seed)
    num_bytes = (bench.directory / "net0.safetensors").stat().st_size
    manager = bench.engine.image_adapters.control_nets = ControlNetManager(bench.pipeline, kept_bytes=num_bytes)
    requests = [bench.request(FluxGeneralInput, controlnets=[net_of(f"net{seed}")]) for seed in range(2)]
    expected = [bench.generate(request) for request in requests]
    tasks = [bench.start(request) for request in requests]
    while tasks[0].step < tasks[0].num_steps:
        for task in tasks:
            bench.engine.advance(task)
            # The net of the other task is not kept by that task.
            assert manager.num_loaded == 1
    for task, image in zip(tasks, expected, strict=True):
        assert difference(finish_task(bench.engine, task)[0], image) == 0


def test_a_loaded_union_outside_of_its_field_is_refused(bench: Bench) -> None:
    bench.add("net", 1, num_mode=10)
    controls = [{"control_image_url": "first", "control_mode": "canny"}]
    bench.generate(bench.request(FluxGeneralInput, controlnet_unions=[{"path": "net", "controls": controls}]))
    with pytest.raises(IncompatibleInput, match="controlnet_unions") as error:
        bench.generate(bench.request(FluxGeneralInput, controlnets=[net_of()]))
    assert error.value.loc == ("controlnets", 0, "path")


def test_a_tensor_without_dimensions_is_named(bench: Bench) -> None:
    net = bench.add("net", 1, num_mode=10)
    tensors = net.state_dict() | {"controlnet_mode_embedder.weight": torch.ones(())}
    save_file(tensors, bench.directory / "scalar.safetensors")
    with pytest.raises(IncompatibleInput, match=r"mode_embedder\.weight has no dimensions"):
        bench.generate(bench.request(FluxGeneralInput, controlnets=[net_of("scalar")]))
