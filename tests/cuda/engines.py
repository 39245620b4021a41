"""The engine with FLUX.1's shapes on a fake GPU, and how much memory its images take there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import PIL.Image
import pytest
import torch
from diffusers import FluxPriorReduxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import (
    BatchFeature,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from models.base import NO_INPUTS
from models.benchmark import random_weights
from models.flux.acceleration import Tier
from models.flux.compilation import clone_sharing_weights, fp8_copy_bytes
from models.flux.control import DepthEstimator
from models.flux.engine import FluxEngine
from models.flux.image_adapters import ImageAdapters
from models.flux.redux import Redux
from models.flux.safety_checker import Unavailable
from models.flux.task import FluxTask
from models.loading import fp8
from models.loading.memory_plans import PLANS, Plan
from tests.cuda.fake_gpu import H100, fake_gpu
from tests.cuda.recorder import Recorder, recorded
from tests.support.tiny_kinds import control_net, ip_adapter

RESIDENT, GROUP_OFFLOAD = (plan for plan in PLANS if plan.quantize == "none")
NUM_STEPS = 2
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
#: How often a step of each tier may wait for the GPU: "high" compares residuals once a step.
WAITS = {"none": 0, "regular": 0, "high": 1}


def request(acceleration: str = "none", side: int = 64, **more: Any) -> Any:
    size = SimpleNamespace(width=side, height=side)
    fields = {"prompt": "a red apple", "image_size": size, "num_inference_steps": NUM_STEPS, "num_images": 1}
    return SimpleNamespace(**{**fields, "guidance_scale": 3.5, "acceleration": acceleration, **more})


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
    """Double of the depth estimator: runs the model, and returns an empty image because fake tensors have no values."""

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


def shape_of(kind: str) -> dict[str, Any]:
    """Return the settings of a transformer of this kind."""
    full = random_weights.SHAPES["full"]["transformer"]
    return {**full, "in_channels": IN_CHANNELS[kind], "out_channels": 64}


def engine_with(
    plan: Plan, kind: str = "plain", control_loras: Mapping[str, Path] = NO_INPUTS, **shape: Any
) -> FluxEngine:
    """Build an engine with FLUX.1's shapes, placed by `plan`, and the tiers that such an engine has, uncompiled.

    `kind` is that of its transformer, and `shape` has its settings that differ from those of FLUX.1 [dev].
    """
    with mock.patch.dict(random_weights.SHAPES["full"], transformer={**shape_of(kind), **shape}):
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


def add_fp8_copy(engine: FluxEngine) -> None:
    """Let the tiers above "none" run a copy in fp8, as they do if everything is resident."""
    copy = clone_sharing_weights(engine.pipeline.transformer)
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        fp8.quantize(copy)
    engine.tiers[1:] = [replace(tier, transformer=copy) for tier in engine.tiers[1:]]


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
    """Yield a task for each kind of endpoint that this tier serves, and for fields that change the work."""
    image, lora = {"image_url": files.image}, {"loras.0.path": files.lora}
    masked, reference = {**image, "mask_url": files.image}, {"reference_image_url": files.image}
    scaled = {"loras": [SimpleNamespace(scale=1.0)]}

    def start(inputs: Mapping[str, Path], **fields: Any) -> FluxTask:
        return engine.start(request(acceleration, SIDE, **fields), 1, inputs)

    # With "high", images with LoRAs or a negative prompt run as with "regular".
    has_more = acceleration != "high"
    match engine.kind:
        case "control":
            yield "canny", start(image, image_role="canny")
            yield "depth", start(image, image_role="depth")
            if has_more:
                yield "depth with a lora", start({**image, **lora}, image_role="depth", **scaled)
        case "fill":
            shown = {**masked, "fill_image.fill_image_url": files.image}
            fields = {"image_role": "fill", "paste_back": True, "resize_to_original": False}
            yield "fill", start(shown, **fields)
            if has_more:
                yield "fill with a lora", start({**shown, **lora}, **fields, **scaled)
        case _:
            yield "prompt", start({})
            yield "image-to-image", start(image, strength=0.8)
            yield "inpainting", start(masked, strength=0.8)
            yield "redux", start(image, image_role="prompt")
            yield "kontext", start(image, image_role="reference")
            yield "kontext inpainting", start({**masked, **reference}, strength=0.8)
            if has_more:
                yield "negative prompt", start({}, use_real_cfg=True, real_cfg_scale=2.0, negative_prompt="blurred")
                yield "lora", start(lora, **scaled)
                yield "kontext with a lora", start({**image, **lora}, image_role="reference", **scaled)
                fields = {"control_lora": "depth", "control_lora_strength": 1.0, "strength": 0.8}
                yield "control lora", start({**image, "control_lora_image_url": files.image}, **fields)


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


class FakeEmbeddings:
    """Double of CLIP's vision model and its image processor."""

    num_features = 12

    def embedding(self, _: PIL.Image.Image) -> torch.Tensor:
        return torch.zeros(1, self.num_features, device="cuda", dtype=torch.bfloat16)


def adapted_task(
    engine: FluxEngine, monkeypatch: pytest.MonkeyPatch, files: Files, dtype: torch.dtype, side: int = 64, **net: int
) -> FluxTask:
    """Start a task with a control net, of these numbers of blocks, and an IP adapter, whose files are of this type."""
    transformer = engine.pipeline.transformer
    weights = control_net(1, transformer, **net).state_dict()
    adapter = {name: weight.to(dtype) for name, weight in ip_adapter(1, transformer).items()}
    monkeypatch.setattr(
        "models.flux.control_nets.load_file", lambda _: {name: each.to("cpu", dtype) for name, each in weights.items()}
    )
    monkeypatch.setattr("models.flux.ip_adapters.load_file", lambda _: adapter)
    engine.image_adapters = ImageAdapters(engine.pipeline, files.image.parent)
    engine.image_adapters.ip_adapters._encoder = FakeEmbeddings()
    scales = {"conditioning_scale": 0.7, "start_percentage": 0, "end_percentage": 1}
    asked = request(side=side, controlnets=[SimpleNamespace(**scales)], ip_adapters=[SimpleNamespace(scale=0.7)])
    inputs = {f"{kind}.0.path": files.lora for kind in ("controlnets", "ip_adapters")}
    inputs |= dict.fromkeys(("controlnets.0.image_url", "ip_adapters.0.ip_adapter_image_url"), files.image)
    return engine.start(asked, 1, inputs)


@dataclass(frozen=True)
class Run:
    """What an image took. The steps counted are those after the first, which also encodes prompt and input images.

    Attributes:
        peak: the highest memory in bytes.
        waits: where steps waited for the GPU.
        uploads: the shapes of the tensors that steps copied to the GPU.
        launches: the number of operations of the last step.
    """

    peak: int
    waits: list[str]
    uploads: list[tuple[int, ...]]
    launches: int


def generate(engine: FluxEngine, recorder: Recorder, task: FluxTask) -> Run:
    """Generate an image with a preview. Check that steps stay on the GPU and multiply in bf16 or fp8."""
    recorder.restart()
    engine.advance(task)
    recorder.waits.clear()
    recorder.uploads.clear()
    recorder.products.clear()
    while task.step < task.num_steps:
        before = recorder.launches
        engine.advance(task)
    launches, waits, uploads = recorder.launches - before, list(recorder.waits), list(recorder.uploads)
    assert recorder.products
    other_dtypes = recorder.products - {torch.bfloat16, torch.float8_e4m3fn}
    assert not other_dtypes, f"steps multiply in {other_dtypes}"
    for tensor in (task.samples[0].latents, task.samples[0].velocity):
        assert (tensor.device.type, tensor.dtype) == ("cuda", torch.bfloat16)
    engine.preview(task)
    engine.decode(task)
    assert task.images[0].size == (SIDE, SIDE)
    return Run(recorder.peak, waits, uploads, launches)


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
    with torch.device("meta"):
        # Some plans join layers, whose names then differ from those in files.
        exact = FluxTransformer2DModel(**shape_of(kind))
    read = {files.lora: partial(lora_weights, exact), files.control_lora: partial(control_lora_weights, exact)}
    with fake_gpu(H100), recorded() as recorder:
        engine = engine_with(plan, kind, {"depth": files.control_lora} if kind == "plain" else {})
        placing = recorder.peak
        monkeypatch.setattr("models.flux.loras.load_file", lambda path: read[path]())
        assert engine.redux
        parts = engine.redux.prior.image_encoder, engine.redux.prior.image_embedder
        sizes["redux"] = sum(weight.nbytes for part in parts for weight in part.parameters())
        if engine.depth_estimator:
            sizes["depth"] = sum(weight.nbytes for weight in engine.depth_estimator._model.parameters())
        if engine.control_loras:
            sizes["depth-lora"] = sum(tensor.nbytes for tensor in read[files.control_lora]().values())
        promised, placed = plan.required_bytes(sizes), recorder.live
        # The promise includes more than a gigabyte for CUDA and its libraries, which fake tensors do not take. With
        # "int4" it is half of one, because images can be decoded in tiles; with "fp8" half of one is left, because
        # uncompiled products in fp8 take more memory than compiled ones, and the server runs only these.
        limit = promised - (0.5e9 if plan.quantize == "int4" or plan.needs_fp8 else 1e9)
        assert placing < limit, "the plan promises too little"
        if plan.is_resident:
            add_fp8_copy(engine)
        copied, asked = recorder.live - placed, fp8_copy_bytes(engine.pipeline.transformer)
        for tier in engine.tiers:
            runs = {}
            for name, task in tasks_of(engine, tier.name, files):
                run = runs[name] = generate(engine, recorder, task)
                num_steps = task.num_steps - 1
                assert len(run.waits) == WAITS[tier.name] * num_steps, f"steps wait for the GPU in {run.waits}"
                assert plan.name == "group-offload" or not run.uploads, (
                    f"steps copy tensors of {run.uploads} to the GPU"
                )
            peaks = {name: run.peak for name, run in runs.items()}
            if tier.shares_forwards and kind == "plain":
                peaks["two prompts at once"] = generate_two(engine, recorder, tier.name)
            figures = ", ".join(f"{peak / 1e9:.1f} with {name}" for name, peak in peaks.items())
            what = f"{plan.name}, {kind}, {tier.name}"
            print(f"{what}, in GB: {placed / 1e9:.1f} placed, {figures}, {promised / 1e9:.1f} promised")
            if copied:
                print(f"{copied / 1e9:.1f} GB more for the copy in fp8, for which {asked / 1e9:.1f} GB must be free")
            print(f"{what}, uncompiled: {next(iter(runs.values())).launches} operations a step")
            if tier.transformer is not engine.pipeline.transformer:
                # The copy was made only because so much was free beyond the other weights, CUDA and its libraries.
                most, most_at_once = (float(placed + asked + sizes.get("depth-lora", 0)),) * 2
            else:
                most, most_at_once = limit + copied, promised + copied
            # Two images share a forward only as long as there is room.
            at_once = peaks.pop("two prompts at once", 0)
            assert max(peaks.values()) < most and at_once < most_at_once, "the plan promises too little"
