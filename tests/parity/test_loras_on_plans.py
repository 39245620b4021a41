"""LoRA weights with every memory plan that a CPU can run, and compiled: the same images, and base weights unchanged."""

import gc
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from models.base import IncompatibleInput
from models.flux import warm_up
from models.flux.acceleration import Tier
from models.flux.compilation import MAX_GRAPHS, clone_sharing_weights
from models.flux.engine import FluxEngine
from models.flux.lora_layers import RANK_STEP
from models.flux.loras import LoraManager
from models.flux_control_lora import FluxControlLoraCannyInput
from models.flux_lora import FluxLoraInput
from models.loading import memory_plans
from models.loading.specs import DEMO
from tests.parity.test_engine import call_diffusers
from tests.parity.test_single_file import engine_of, gguf_reference
from tests.support import tiny_flux
from tests.support.single_files import tensors_of, write_gguf
from tests.support.tiny_flux import AllSafeChecker, difference, finish_task, write_lora
from tests.support.tiny_kinds import write_control_lora

PLANS = {plan.name: plan for plan in memory_plans.PLANS}
#: Layers of which joined matrices consist, and others.
LAYERS = ("attn.to_q", "attn.to_v", "attn.add_k_proj", "ff.net.2", "norm1.linear")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Write three LoRAs of different ranks for different layers."""
    paths = [
        write_lora(tmp_path / f"{seed}.safetensors", seed, rank=4 + 17 * seed, text=seed == 1) for seed in range(3)
    ]
    generator = torch.Generator().manual_seed(9)
    more = {}
    for name, module in tiny_flux.transformer().transformer_blocks[0].named_modules():
        if name in LAYERS:
            key = f"transformer.transformer_blocks.0.{name}"
            more[f"{key}.lora_A.weight"] = torch.randn(3, module.in_features, generator=generator)
            more[f"{key}.lora_B.weight"] = torch.randn(module.out_features, 3, generator=generator)
    save_file({**load_file(paths[2]), **more}, paths[2])
    return paths


def request_of(*scales: float, **fields: Any) -> Any:
    loras = [{"path": "http://unused", "scale": scale} for scale in scales]
    size = {"width": 96, "height": 64}
    body = {"prompt": "a fish", "image_size": size, "num_inference_steps": 2, "loras": loras, **fields}
    return FluxLoraInput.model_validate(body)


def generate(engine: FluxEngine, request: FluxLoraInput, *paths: Path) -> Any:
    inputs = {f"loras.{place}.path": path for place, path in enumerate(paths)}
    (image,) = finish_task(engine, engine.start(request, 5, inputs))
    return image


def engine_with(plan: str) -> FluxEngine:
    pipeline = PLANS[plan].apply(tiny_flux.pipeline(torch.bfloat16), "cpu")
    tiers = [Tier("none", pipeline.transformer)]
    return FluxEngine(pipeline, AllSafeChecker(), tiers, "cpu", plan=PLANS[plan])


def fingerprint(module: Any) -> str:
    """Return a hash of the names and every bit of a module's weights."""
    digest = hashlib.sha256()
    for key, weight in sorted(module.state_dict().items()):
        digest.update(key.encode() + bits(weight.detach()))
    return digest.hexdigest()


def bits(weight: Any) -> bytes:
    """Return the bytes of a tensor, or of the tensors that a quantized one consists of."""
    if hasattr(weight, "__tensor_flatten__"):
        return b"".join(bits(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])
    # A copy, because a tensor of one number may have any stride, and then has no view of its bytes.
    copied = weight.new_empty(weight.numel()).copy_(weight.flatten())
    content: bytes = copied.view(torch.uint8).numpy().tobytes()
    return content


def test_offloaded_weights_give_the_same_images(files: list[Path]) -> None:
    """`test_loras` holds the plan "resident" against diffusers' own pipeline."""
    resident, offloaded = engine_with("resident"), engine_with("group-offload")
    before = fingerprint(offloaded.pipeline.transformer)
    for request, paths in ((request_of(0.7), files[:1]), (request_of(0.5, 1.2), files[1:]), (request_of(), [])):
        assert difference(generate(offloaded, request, *paths), generate(resident, request, *paths)) == 0
    assert fingerprint(offloaded.pipeline.transformer) == before


@pytest.mark.parametrize("plan", ["fp8-storage", "int8", "int4"])
def test_quantized_weights_stay_as_they_are(files: list[Path], plan: str) -> None:
    if plan.startswith("int"):
        pytest.importorskip("torchao.quantization")
    engine = engine_with(plan)
    before, plain = fingerprint(engine.pipeline.transformer), generate(engine, request_of())
    for place in (0, 1, 2, 0):
        assert difference(generate(engine, request_of(1.0), files[place]), plain) > 0
    assert difference(generate(engine, request_of()), plain) == 0
    assert fingerprint(engine.pipeline.transformer) == before


@pytest.mark.parametrize("plan", ["group-offload", "fp8-storage"])
def test_a_control_lora_runs_with_every_plan(tmp_path: Path, plan: str) -> None:
    file, image = tmp_path / "canny.safetensors", tmp_path / "image.png"
    write_control_lora(file, 1, 16, (2, 16))
    tiny_flux.generate(tiny_flux.engine(), tiny_flux.make_request(), 1)[0].save(image)
    images = []
    for name in ("resident", plan):
        engine = engine_with(name)
        engine.control_loras = {"canny": file}
        before = fingerprint(engine.pipeline.transformer)
        fields = {"prompt": "a fish", "num_inference_steps": 2, "control_lora_image_url": "unused"}
        request = FluxControlLoraCannyInput.model_validate({**fields, "image_size": {"width": 96, "height": 64}})
        images += finish_task(engine, engine.start(request, 5, {"control_lora_image_url": image}))
        assert fingerprint(engine.pipeline.transformer) == before
    assert (difference(*images) == 0) == (plan == "group-offload")


@pytest.mark.parametrize("memory", ["resident", "group-offload"])
def test_a_gguf_file_with_a_lora_equals_the_pipeline(tmp_path: Path, memory: str) -> None:
    demo = tensors_of(FluxTransformer2DModel.from_pretrained(DEMO / "transformer", dtype=torch.bfloat16))
    file, lora = write_gguf(tmp_path / "demo.gguf", demo, "Q4_0"), DEMO / "lora" / "grey.safetensors"
    engine, reference = engine_of(file, DEMO, memory=memory), gguf_reference(file, DEMO)
    reference.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="grey")
    reference.set_adapters(["grey"], [0.8])
    request = request_of(0.8)
    assert difference(generate(engine, request, lora), call_diffusers(reference, request, 5)) == 0


def in_formats(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return a LoRA of one attention in the key formats that clients send."""
    down, up = tensors["down"], tensors["up"]
    block = "double_blocks.0"
    kohya = f"lora_unet_{block.replace('.', '_')}_img_attn_proj"
    return {
        "peft": {
            "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": down,
            "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight": up,
        },
        "kohya": {
            f"{kohya}.lora_down.weight": down,
            f"{kohya}.lora_up.weight": up,
            f"{kohya}.alpha": torch.tensor(2.0),
        },
        "xlabs": {
            f"{block}.processor.proj_lora1.down.weight": down,
            f"{block}.processor.proj_lora1.up.weight": up,
        },
        "with alphas": {
            "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": down,
            "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight": up,
            "transformer.transformer_blocks.0.attn.to_out.0.alpha": torch.tensor(2.0),
        },
    }


@pytest.mark.parametrize("name", ["peft", "kohya", "xlabs", "with alphas"])
def test_key_formats_equal_the_pipeline(tmp_path: Path, name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    matrices = {"down": torch.randn(4, 32, generator=generator), "up": torch.randn(32, 4, generator=generator)}
    file = tmp_path / "lora.safetensors"
    save_file(in_formats(matrices)[name], file)
    reference = tiny_flux.pipeline(torch.bfloat16)
    reference.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="only")
    reference.set_adapters(["only"], [0.8])
    request = request_of(0.8)
    engine = engine_with("resident")
    image = generate(engine, request, file)
    assert difference(image, call_diffusers(reference, request, 5)) == 0
    assert difference(image, generate(engine, request_of())) > 0


def test_a_dora_is_refused(tmp_path: Path, files: list[Path]) -> None:
    dora = {"lora_unet_double_blocks_0_img_attn_proj.dora_scale": torch.ones(32)}
    save_file({**load_file(files[0]), **dora}, tmp_path / "dora.safetensors")
    with pytest.raises(IncompatibleInput, match="it is a DoRA, which is not supported"):
        generate(engine_with("resident"), request_of(1.0), tmp_path / "dora.safetensors")


@pytest.mark.thorough
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("form", ["group-offload", "fp8-storage", "int8", "int4", "Q4_0"])
def test_a_hundred_swaps_leave_nothing(files: list[Path], tmp_path: Path, form: str) -> None:
    if form.startswith("int"):
        pytest.importorskip("torchao.quantization")
    if form == "Q4_0":
        tiny_flux.pipeline(torch.bfloat16).save_pretrained(tmp_path / "base")
        tensors = tensors_of(tiny_flux.transformer(torch.bfloat16))
        engine = engine_of(write_gguf(tmp_path / "tiny.gguf", tensors, form), tmp_path / "base")
    else:
        engine = engine_with(form)
    before, plain = fingerprint(engine.pipeline.transformer), generate(engine, request_of())
    firsts = [step(engine, path) for path in files]
    num_bytes = live_bytes()
    for swap in range(102):
        assert torch.equal(step(engine, files[swap % 3]), firsts[swap % 3])
    assert live_bytes() == num_bytes
    assert fingerprint(engine.pipeline.transformer) == before
    assert difference(generate(engine, request_of()), plain) == 0


# -- compiled


def compile_for_counting(transformer: Any) -> Any:
    """Compile each block as the server does, but to operations of PyTorch: this says how often, in less time."""
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="aot_eager")
    return transformer


@pytest.fixture(scope="module")
def compiled() -> Iterator[FluxEngine]:
    """Yield an engine whose tier "none" is compiled and warmed up, also for LoRAs."""
    torch.compiler.reset()
    pipeline = tiny_flux.pipeline(torch.bfloat16)
    transformer = compile_for_counting(clone_sharing_weights(pipeline.transformer))
    tier = Tier("none", transformer, is_ready=False, compiles_loras=True)
    engine = FluxEngine(pipeline, AllSafeChecker(), [tier], "cpu")
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(warm_up, "compile_blocks", compile_for_counting)
        patches.setattr("models.flux.acceleration._WARM_TOKENS", (40, 20))
        patches.setattr("torch._dynamo.config.recompile_limit", MAX_GRAPHS)
        while engine.warm_up():
            continue
        yield engine


def step(engine: FluxEngine, path: Path) -> Any:
    """Take a step with a LoRA; return the latents after it."""
    task = engine.start(request_of(1.0, num_inference_steps=1), 5, {"loras.0.path": path})
    engine.advance(task)
    return task.samples[0].latents


def live_bytes() -> int:
    """Return the bytes of all tensors. Those of the compiler have none."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.timeout(1500)
@pytest.mark.thorough
def test_swaps_compile_nothing_and_leave_nothing(compiled: FluxEngine, files: list[Path]) -> None:
    before, plain = fingerprint(compiled.pipeline.transformer), generate(compiled, request_of())
    firsts = [step(compiled, path) for path in files]
    num_graphs, num_bytes = counters["stats"]["unique_graphs"], live_bytes()
    for swap in range(102):
        assert torch.equal(step(compiled, files[swap % 3]), firsts[swap % 3])
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert not counters["graph_break"]
    assert live_bytes() == num_bytes
    assert fingerprint(compiled.pipeline.transformer) == before
    assert difference(generate(compiled, request_of()), plain) == 0


@pytest.mark.thorough
def test_a_lora_of_high_rank_does_not_run_compiled(
    compiled: FluxEngine, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In compiled code, every layer would have its rank, which may take far more memory than its file."""
    request, inputs = request_of(0.5), {"loras.0.path": files[0]}
    expected = generate(engine_with("resident"), request, files[0])
    for manager, is_compiled in ((compiled.loras, True), (LoraManager(compiled.pipeline, kept_bytes=1), False)):
        monkeypatch.setattr(compiled, "loras", manager)
        task = compiled.start(request, 5, inputs)
        assert compiled.loras.fit_compiled(task.loras) is is_compiled
    # Uncompiled, the image is exact.
    assert difference(finish_task(compiled, task)[0], expected) == 0


@pytest.mark.timeout(1500)
def test_compiled_loras_give_nearly_the_same_images(compiled: FluxEngine, files: list[Path]) -> None:
    assert RANK_STEP < 4 + 17 * 2
    uncompiled = engine_with("resident")
    for request, paths in (
        (request_of(0.5), files[:1]),
        (request_of(0.3), files[2:]),
        (request_of(0.2, 0.2), files[:2]),
    ):
        task = compiled.start(request, 5, {f"loras.{place}.path": path for place, path in enumerate(paths)})
        assert task.tier.lora_transformer is not None
        (image,) = finish_task(compiled, task)
        exact, plain = generate(uncompiled, request, *paths), generate(uncompiled, request_of())
        assert difference(image, exact) < 0.2 * difference(exact, plain)
