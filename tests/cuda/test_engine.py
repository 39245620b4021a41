"""The parts of the engine on a fake GPU whose sizes do not matter, in tiny shapes: devices and types fit.

An operation whose tensors are on different devices raises an error, as on a GPU.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, ViTConfig, ViTForImageClassification

from models.benchmark import random_weights
from models.flux.acceleration import Tier
from models.flux.engine import FluxEngine
from models.flux.safety_checker import CompVis, ImageClassifier, Unavailable
from tests.cuda.engines import GROUP_OFFLOAD, NUM_STEPS, Files, Pixels, adapted_task, lora_weights, request
from tests.cuda.engines import files as files
from tests.cuda.fake_gpu import H100, fake_gpu
from tests.cuda.recorder import recorded

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.timeout(900),
    # A fake tensor has no values, so diffusers takes those of an image for values from -1 to 1.
    pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning"),
]


def test_tasks_that_share_a_forward_load_each_block_once() -> None:
    """With the plan "group-offload", loading the blocks takes longer than computing."""
    with fake_gpu(H100), recorded() as recorder:
        pipeline = GROUP_OFFLOAD.apply(random_weights.build("tiny", "cpu", torch.bfloat16), "cuda")
        tiers = [Tier("regular", pipeline.transformer, shares_forwards=True)]
        engine = FluxEngine(pipeline, Unavailable("not used"), tiers, "cuda", plan=GROUP_OFFLOAD)
        engine.sharing.number = lambda size, wanted: wanted  # type: ignore[method-assign]
        tasks = [engine.start(request("regular", num_inference_steps=3), seed) for seed in range(3)]
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_control_net_and_an_ip_adapter_are_loaded_in_the_type_of_the_weights(
    tiny: FluxEngine, monkeypatch: pytest.MonkeyPatch, files: Files, dtype: torch.dtype
) -> None:
    task = adapted_task(tiny, monkeypatch, files, dtype)
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
