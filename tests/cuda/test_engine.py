"""The engine with FLUX.1's shapes on a fake GPU: devices and types fit, plans keep their promises, no step waits.

An operation whose tensors are on different devices raises an error, as on a GPU.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import PIL.Image
import pytest
import torch
from diffusers import FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    BatchFeature,
    CLIPConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from models.base import NO_INPUTS
from models.benchmark import random_weights
from models.flux.acceleration import Tier
from models.flux.control import DepthEstimator
from models.flux.engine import FluxEngine
from models.flux.image_adapters import ImageAdapters
from models.flux.redux import Redux
from models.flux.safety_checker import CompVis, ImageClassifier, Unavailable
from models.flux.sample import Sample
from models.flux.task import FluxTask
from models.loading.memory_plans import PLANS, Plan
from tests.cuda.fake_gpu import H100, fake_gpu
from tests.cuda.recorder import Recorder, recorded
from tests.support.tiny_kinds import control_net, ip_adapter

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.timeout(900),
    # A fake tensor has no values, so diffusers takes those of an image for values from -1 to 1.
    pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning"),
]

(GROUP_OFFLOAD,) = (plan for plan in PLANS if plan.name == "group-offload")
NUM_STEPS = 3
#: The side of the images in the tests with FLUX.1's shapes, in pixels.
SIDE = 1024
#: The shape of the image encoder of FLUX.1 Redux [dev].
SIGLIP = {
    "image_size": 384,
    "patch_size": 14,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
#: The shape of `LiheYoung/depth-anything-large-hf`, and an image as its processor makes it.
DEPTH_ANYTHING = {
    "reassemble_hidden_size": 1024,
    "neck_hidden_sizes": [256, 512, 1024, 1024],
    "fusion_hidden_size": 256,
}
DINO = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "out_indices": [5, 12, 18, 24]}
DEPTH_SIDE = 518
#: The numbers that a token of each kind of transformer has.
IN_CHANNELS = {"plain": 64, "control": 128, "fill": 384}
#: The rank of the published control LoRAs.
CONTROL_RANK = 128
#: The tiers by the number of values that a step may read back: "high" compares residuals once a step.
READS = {"none": 0, "regular": 0, "high": 1}


def request(acceleration: str = "none", side: int = 64, **more: Any) -> Any:
    size = SimpleNamespace(width=side, height=side)
    fields = {"prompt": "a red apple", "image_size": size, "num_inference_steps": NUM_STEPS, "num_images": 1}
    return SimpleNamespace(**fields, guidance_scale=3.5, acceleration=acceleration, **more)


class Pixels:
    """Double of an image processor: pixels of the given side, on the CPU in float32 as the real ones make them."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, images: list[Any], return_tensors: str = "pt") -> BatchFeature:
        return BatchFeature({"pixel_values": torch.zeros(len(images), 3, self.side, self.side)})


def redux_prior() -> FluxPriorReduxPipeline:
    """Build Redux with the shapes of FLUX.1 Redux [dev] on the GPU, in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            encoder, embedder = SiglipVisionModel(SiglipVisionConfig(**SIGLIP)).eval(), ReduxImageEncoder().eval()
    finally:
        torch.set_default_dtype(torch.float32)
    prior = FluxPriorReduxPipeline(
        image_encoder=encoder, feature_extractor=SiglipImageProcessorPil(), image_embedder=embedder
    )
    prior.feature_extractor.preprocess = lambda images, **_: Pixels(SIGLIP["image_size"])([images])
    return prior


class FakeDepths(DepthEstimator):
    """Double of the way from an image to its depths: the model runs, but what it finds has no values to make one of."""

    def depths(self, image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
        pixels = torch.zeros(1, 3, DEPTH_SIDE, DEPTH_SIDE).to(self._model.device, self._model.dtype)
        assert self._model(pixel_values=pixels).predicted_depth.device.type == "cuda"
        return PIL.Image.new("RGB", size)


def depth_estimator() -> DepthEstimator:
    """Build Depth Anything with the shapes of its large model on the GPU, in bf16."""
    backbone = Dinov2Config(**DINO, image_size=DEPTH_SIDE, patch_size=14, reshape_hidden_states=False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=backbone, **DEPTH_ANYTHING))
    finally:
        torch.set_default_dtype(torch.float32)
    return FakeDepths(model.eval(), None)


def engine_with(plan: Plan, kind: str = "plain", control_loras: Mapping[str, Path] = NO_INPUTS) -> FluxEngine:
    """Build an engine with FLUX.1's shapes, placed by `plan`, and the tiers that such an engine has, uncompiled.

    `kind` is that of its transformer.
    """
    shape = {**random_weights.SHAPES["full"]["transformer"], "in_channels": IN_CHANNELS[kind], "out_channels": 64}
    with mock.patch.dict(random_weights.SHAPES["full"], transformer=shape):
        pipeline = random_weights.build("full", "cuda" if plan.is_resident else "cpu", torch.bfloat16)
    # torchao asks PyTorch for a GPU; everything else must not, because PyTorch would start it.
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        pipeline = plan.apply(pipeline, "cuda")
    tiers = [Tier("none", pipeline.transformer), Tier("regular", pipeline.transformer, shares_forwards=True)]
    if plan.can_compile:
        tiers.append(Tier("high", pipeline.transformer, skips_blocks=True))
    redux = Redux(redux_prior(), pipeline.transformer)
    return FluxEngine(
        pipeline,
        Unavailable("not used"),
        tiers,
        "cuda",
        plan=plan,
        redux=redux,
        depth_estimator=depth_estimator() if kind != "fill" else None,
        control_loras=control_loras,
    )


@dataclass(frozen=True)
class Files:
    """The input files of the requests: an image, and LoRA weights whose content the test gives."""

    image: Path
    lora: Path
    control_lora: Path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    image, *loras = (tmp_path / name for name in ("image.png", "lora.safetensors", "control.safetensors"))
    PIL.Image.new("RGB", (SIDE, SIDE)).save(image)
    for lora in loras:
        lora.write_bytes(b"read by a double")
    return Files(image, *loras)


def tasks_of(engine: FluxEngine, acceleration: str, files: Files) -> Iterator[tuple[str, FluxTask]]:
    """Yield a task for each kind of endpoint that the engine serves in this tier."""
    image = {"image_url": files.image}
    if engine.kind == "control":
        for role in ("canny", "depth"):
            yield role, engine.start(request(acceleration, SIDE, image_role=role), 1, image)
        return
    if engine.kind == "fill":
        filled = request(acceleration, SIDE, image_role="fill", paste_back=True, resize_to_original=False)
        shown = {"mask_url": files.image, "fill_image.fill_image_url": files.image}
        yield "fill", engine.start(filled, 1, {**image, **shown})
        return
    yield "prompt", engine.start(request(acceleration, SIDE), 1)
    yield "image-to-image", engine.start(request(acceleration, SIDE, strength=0.8), 1, image)
    yield "inpainting", engine.start(request(acceleration, SIDE, strength=0.8), 1, {**image, "mask_url": files.image})
    yield "redux", engine.start(request(acceleration, SIDE, image_role="prompt"), 1, image)
    yield "kontext", engine.start(request(acceleration, SIDE, image_role="reference"), 1, image)
    if acceleration != "high":
        loras = request(acceleration, SIDE, loras=[SimpleNamespace(scale=1.0)])
        yield "lora", engine.start(loras, 1, {"loras.0.path": files.lora})
        fields = {"control_lora": "depth", "control_lora_strength": 1.0, "strength": 0.8}
        yield (
            "control lora",
            engine.start(request(acceleration, SIDE, **fields), 1, {**image, "control_lora_image_url": files.image}),
        )


def lora_weights(transformer: Any) -> dict[str, Any]:
    """Return LoRA weights of rank 16 for every attention of the transformer, as a file has them: on the CPU."""
    pairs = {}
    for name, module in transformer.named_modules():
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            pairs[f"transformer.{name}.lora_A.weight"] = torch.zeros(16, module.in_features, dtype=torch.bfloat16)
            pairs[f"transformer.{name}.lora_B.weight"] = torch.zeros(module.out_features, 16, dtype=torch.bfloat16)
    return pairs


def control_lora_weights(transformer: Any) -> dict[str, Any]:
    """Return a control LoRA for every layer of the blocks and the layer that takes two sets of latents."""
    tensors = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and (name == "x_embedder" or "transformer_blocks" in name):
            taken = IN_CHANNELS["control"] if name == "x_embedder" else module.in_features
            tensors[f"transformer.{name}.lora_A.weight"] = torch.zeros(CONTROL_RANK, taken, dtype=torch.bfloat16)
            tensors[f"transformer.{name}.lora_B.weight"] = torch.zeros(
                module.out_features, CONTROL_RANK, dtype=torch.bfloat16
            )
            tensors[f"transformer.{name}.lora_B.bias"] = torch.zeros(module.out_features, dtype=torch.bfloat16)
        elif name.endswith(("norm_q", "norm_k")):
            tensors[f"transformer.{name}.weight"] = torch.zeros(module.weight.shape, dtype=torch.bfloat16)
    return tensors


def generate(engine: FluxEngine, recorder: Recorder, task: FluxTask) -> tuple[int, list[str], int]:
    """Generate an image with a preview; return the highest memory, the reads of all steps but the first, and the
    operations of the last step.
    """
    recorder.restart()
    engine.advance(task)
    recorder.reads.clear()
    while task.step < task.num_steps:
        before = recorder.launches
        engine.advance(task)
    launches = recorder.launches - before
    reads = list(recorder.reads)
    assert {tensor.device.type for tensor in (task.samples[0].latents, task.samples[0].velocity)} == {"cuda"}
    assert task.samples[0].latents.dtype == torch.bfloat16
    engine.preview(task)
    engine.decode(task)
    assert task.images[0].size == (SIDE, SIDE)
    return recorder.peak, reads, launches


def generate_two(engine: FluxEngine, recorder: Recorder, acceleration: str) -> int:
    """Generate two images that share their forwards; return the highest memory."""
    engine.sharing.number = lambda size, wanted: wanted  # type: ignore[method-assign]
    tasks = [engine.start(request(acceleration, SIDE), seed) for seed in range(2)]
    recorder.restart()
    while tasks[0].step < tasks[0].num_steps:
        assert engine.advance(tasks[0], tasks[1:]) == tasks
    for task in tasks:
        engine.decode(task)
    return recorder.peak


def check_plan(plan: Plan, files: Files, monkeypatch: pytest.MonkeyPatch, kind: str = "plain") -> None:
    """Check that each kind of endpoint keeps to the plan's promise in each tier, and that no step waits for the GPU."""
    sizes = random_weights.sizes("full", torch.bfloat16)
    with fake_gpu(H100), recorded() as recorder:
        engine = engine_with(plan, kind, {"depth": files.control_lora} if kind == "plain" else {})
        placing = recorder.peak
        read = {files.lora: lora_weights, files.control_lora: control_lora_weights}
        monkeypatch.setattr("models.flux.loras.load_file", lambda path: read[path](engine.pipeline.transformer))
        assert engine.redux
        parts = engine.redux.prior.image_encoder, engine.redux.prior.image_embedder
        sizes["redux"] = sum(weight.nbytes for part in parts for weight in part.parameters())
        if engine.depth_estimator:
            sizes["depth"] = sum(weight.nbytes for weight in engine.depth_estimator._model.parameters())
        if engine.control_loras:
            lora = control_lora_weights(engine.pipeline.transformer)
            sizes["depth-lora"] = sum(tensor.nbytes for tensor in lora.values())
        promised, placed = plan.required_bytes(sizes), recorder.live
        for tier in engine.tiers:
            peaks, launches = {}, {}
            for name, task in tasks_of(engine, tier.name, files):
                peaks[name], reads, launches[name] = generate(engine, recorder, task)
                assert len(reads) == READS[tier.name] * (task.num_steps - 1), f"steps wait for the GPU in {reads}"
            if tier.shares_forwards and kind == "plain":
                peaks["two prompts at once"] = generate_two(engine, recorder, tier.name)
            figures = ", ".join(f"{peak / 1e9:.1f} with {name}" for name, peak in peaks.items())
            what = f"{plan.name}, {kind}, {tier.name}"
            print(f"{what}, in GB: {placed / 1e9:.1f} placed, {figures}, {promised / 1e9:.1f} promised")
            print(f"{what}, uncompiled: {next(iter(launches.values()))} operations a step")
            # The promise includes more than a gigabyte for CUDA and its libraries, which fake tensors do not take; with
            # "int4" half of one, because images can be decoded in tiles. Two images share a forward only as long as
            # there is room.
            reserve = 0.5e9 if plan.quantize == "int4" else 1e9
            at_once = peaks.pop("two prompts at once", 0)
            assert max(*peaks.values(), placing) + reserve < promised and at_once < promised, (
                "the plan promises too little"
            )


@pytest.mark.parametrize("kind", IN_CHANNELS)
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_every_endpoint_keeps_to_the_plan_and_no_step_waits_for_the_gpu(
    plan: Plan, kind: str, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_plan(plan, files, monkeypatch, kind)


def test_a_plan_that_promises_too_little_is_found(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    too_little = replace(GROUP_OFFLOAD, required_bytes=lambda sizes: GROUP_OFFLOAD.required_bytes(sizes) - 2e9)
    with pytest.raises(AssertionError, match="the plan promises too little"):
        check_plan(too_little, files, monkeypatch)


def test_a_step_that_waits_for_the_gpu_is_found(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    step_with = Sample.step_with

    def check_and_step(sample: Sample, velocity: torch.Tensor) -> None:
        assert velocity.isfinite().all()
        step_with(sample, velocity)

    monkeypatch.setattr(Sample, "step_with", check_and_step)
    with pytest.raises(AssertionError, match="steps wait for the GPU"):
        check_plan(GROUP_OFFLOAD, files, monkeypatch)


def test_tasks_that_share_a_forward_load_each_block_once() -> None:
    """With the plan "group-offload", loading the blocks takes longer than computing."""
    with fake_gpu(H100), recorded() as recorder:
        pipeline = GROUP_OFFLOAD.apply(random_weights.build("tiny", "cpu", torch.bfloat16), "cuda")
        tiers = [Tier("regular", pipeline.transformer, shares_forwards=True)]
        engine = FluxEngine(pipeline, Unavailable("not used"), tiers, "cuda", plan=GROUP_OFFLOAD)
        engine.sharing.number = lambda size, wanted: wanted  # type: ignore[method-assign]
        tasks = [engine.start(request("regular"), seed) for seed in range(3)]
        for task in tasks:
            # The first step of a task also encodes its prompt.
            engine.advance(task)
        uploads = []
        for others in ([], tasks[1:]):
            recorder.restart()
            assert len(engine.advance(tasks[0], others)) == 1 + len(others)
            uploads.append(len(recorder.uploads))
    print(f"weights loaded for a step of one image, and of three: {uploads}")
    assert uploads[0] == uploads[1] > len(pipeline.transformer.single_transformer_blocks)


def test_blocks_that_are_offloaded_take_loras(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices of LoRAs stay on the GPU, while the blocks come and go on a stream."""
    with fake_gpu(H100), recorded():
        pipeline = GROUP_OFFLOAD.apply(random_weights.build("tiny", "cpu", torch.bfloat16), "cuda")
        monkeypatch.setattr("models.flux.loras.load_file", lambda _: lora_weights(pipeline.transformer))
        tiers = [Tier("none", pipeline.transformer)]
        engine = FluxEngine(pipeline, Unavailable("not used"), tiers, "cuda", plan=GROUP_OFFLOAD)
        plain = engine.start(request(), 1)
        task = engine.start(request(loras=[SimpleNamespace(scale=1.0)]), 1, {"loras.0.path": files.lora})
        for _ in range(NUM_STEPS):
            engine.advance(task)
            engine.advance(plain)
        (weights,) = (weights for weights, _ in engine.loras._loaded.values())
        devices = {
            matrix.device.type for pair in weights.pairs["transformer"].values() for matrix in (pair.down, pair.up)
        }
        assert devices == {"cuda"}


@pytest.mark.parametrize("has_room", [True, False], ids=["room", "no room"])
def test_offloaded_weights_are_pinned_once_where_the_host_has_room(
    has_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.loading.placement._can_pin", lambda _: has_room)
    with fake_gpu(H100), recorded() as recorder:
        pipeline = GROUP_OFFLOAD.apply(random_weights.build("tiny", "cpu", torch.bfloat16), "cuda")
        engine = FluxEngine(
            pipeline, Unavailable("not used"), [Tier("none", pipeline.transformer)], "cuda", plan=GROUP_OFFLOAD
        )
        task = engine.start(request(), 1)
        engine.advance(task)
        recorder.restart()
        engine.advance(task)
    print(f"tensors pinned in a step: {recorder.pins}")
    assert (recorder.pins == 0) == has_room


# -- the parts whose sizes do not matter, in tiny shapes


@pytest.fixture
def tiny() -> Iterator[FluxEngine]:
    """Yield an engine with tiny shapes on a fake GPU; everything in the test is fake."""
    with fake_gpu(H100), recorded():
        pipeline = random_weights.build("tiny", "cuda", torch.bfloat16)
        tiers = [Tier("none", pipeline.transformer), Tier("regular", pipeline.transformer, shares_forwards=True)]
        yield FluxEngine(pipeline, Unavailable("not used"), tiers, "cuda")


def test_a_tensor_on_the_cpu_is_found(tiny: FluxEngine) -> None:
    tiny.pipeline.transformer.proj_out.to("cpu")
    with pytest.raises(RuntimeError, match="device"):
        tiny.advance(tiny.start(request(), 1))


def test_tasks_share_a_forward(tiny: FluxEngine) -> None:
    tasks = [tiny.start(request("regular"), seed) for seed in range(3)]
    tiny.sharing.number = lambda size, wanted: wanted  # type: ignore[method-assign]
    assert tiny.advance(tasks[0], tasks[1:]) == tasks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_lora_is_loaded_in_the_type_of_the_weights(
    tiny: FluxEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype
) -> None:
    names = [f"transformer.single_transformer_blocks.{n}.attn.{part}" for n in range(2) for part in ("to_q", "to_k")]
    pairs = {f"{name}.lora_A.weight": torch.zeros(4, 32, dtype=dtype) for name in names}
    pairs |= {f"{name}.lora_B.weight": torch.zeros(32, 4, dtype=dtype) for name in names}
    monkeypatch.setattr("models.flux.loras.load_file", lambda _: pairs)
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"read by the function above")
    task = tiny.start(request(loras=[SimpleNamespace(scale=1.0)]), 1, {"loras.0.path": path})
    tiny.advance(task)
    (weights,) = (weights for weights, _ in tiny.loras._loaded.values())
    added = [matrix for pair in weights.pairs["transformer"].values() for matrix in (pair.down, pair.up)]
    assert len(added) == len(pairs)
    assert {(weight.device.type, weight.dtype) for weight in added} == {("cuda", torch.bfloat16)}


class FakeEmbeddings:
    """Double of CLIP's vision model and its image processor."""

    num_features = 12

    def embedding(self, _: PIL.Image.Image) -> torch.Tensor:
        return torch.zeros(1, self.num_features, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_control_net_and_an_ip_adapter_are_loaded_in_the_type_of_the_weights(
    tiny: FluxEngine, monkeypatch: pytest.MonkeyPatch, files: Files, dtype: torch.dtype
) -> None:
    transformer = tiny.pipeline.transformer
    net = {name: weight.to("cpu", dtype) for name, weight in control_net(1, transformer).state_dict().items()}
    adapter = {name: weight.to(dtype) for name, weight in ip_adapter(1, transformer).items()}
    monkeypatch.setattr("models.flux.control_nets.load_file", lambda _: net)
    monkeypatch.setattr("models.flux.ip_adapters.load_file", lambda _: adapter)
    tiny.image_adapters = ImageAdapters(tiny.pipeline, files.image.parent)
    tiny.image_adapters.ip_adapters._encoder = FakeEmbeddings()
    scales = {"conditioning_scale": 0.7, "start_percentage": 0, "end_percentage": 1}
    asked = request(controlnets=[SimpleNamespace(**scales)], ip_adapters=[SimpleNamespace(scale=0.7)])
    inputs = {f"{kind}.0.path": files.lora for kind in ("controlnets", "ip_adapters")}
    inputs |= dict.fromkeys(("controlnets.0.image_url", "ip_adapters.0.ip_adapter_image_url"), files.image)
    task = tiny.start(asked, 1, inputs)
    tiny.advance(task)
    assert task.samples[0].image_prompts
    (loaded,) = (control.net() for control in task.samples[0].controls)
    placed = [*loaded.parameters(), *task.samples[0].image_prompts.states]
    assert {(tensor.device.type, tensor.dtype) for tensor in placed} == {("cuda", torch.bfloat16)}


def test_the_classifier(tiny: FluxEngine) -> None:
    checker = object.__new__(ImageClassifier)
    checker.processor, checker.nsfw = Pixels(32), 1
    with torch.device("cuda"):
        checker.model = ViTForImageClassification(ViTConfig(image_size=32, num_labels=2, num_hidden_layers=1)).eval()
    tiny.checker = checker
    assert len(tiny.is_unsafe([PIL.Image.new("RGB", (64, 64))] * 2)) == 2


def test_the_checker_by_embeddings(tiny: FluxEngine) -> None:
    checker = object.__new__(CompVis)
    checker.processor = Pixels(224)
    layers = {"num_hidden_layers": 1}
    with torch.device("cuda"):
        checker.model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=layers, text_config=layers)).eval()
    tiny.checker = checker
    assert len(tiny.is_unsafe([PIL.Image.new("RGB", (64, 64))])) == 1
