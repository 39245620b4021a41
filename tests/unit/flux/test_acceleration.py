"""Tests of acceleration tiers: which tier runs a request, what tiers share, and that no request compiles."""

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch._dynamo.utils import counters

from models.base import EngineConfig
from models.flux import acceleration, compilation
from models.flux.acceleration import Tier
from models.flux.engine import FluxEngine
from models.image_size import PRESETS
from models.loading import fp8, memory_plans
from models.loading.memory_plans import PLANS
from tests.support import tiny_flux
from tests.support.tiny_flux import AllSafeChecker, AlwaysShare, generate_latents, make_request

#: A size with few tokens, and one with as many tokens as the text.
ODD_SIZES = [(64, 64), (256, 512)]
RESIDENT, INT8, FP8, FP8_STORAGE, INT4, GROUP_OFFLOAD = PLANS


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return tiny_flux.pipeline(torch.bfloat16)


@dataclass(frozen=True)
class Warm:
    """Engine with compiled tiers, and the number of compiled graphs before the first tier and after each."""

    engine: FluxEngine
    num_compiled: list[int]


@pytest.fixture(scope="module")
def warm(pipeline: FluxPipeline) -> Iterator[Warm]:
    """Yield a warm engine. Blocks are captured as for a GPU, but run eagerly, because compiling them takes minutes."""
    compile_blocks = FluxTransformer2DModel.compile_repeated_blocks
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", partialmethod(compile_blocks, backend="eager"))
        engine = FluxEngine(pipeline, AllSafeChecker(), compiled_tiers(pipeline), "cpu", sharing=AlwaysShare())
        counts = [num_compiled()]

        def warm_up_all() -> None:
            while engine.warm_up():
                counts.append(num_compiled())

        # Warm up on another thread, as the worker does.
        thread = threading.Thread(target=warm_up_all)
        thread.start()
        thread.join()
        engine.freeze_compilation()
        yield Warm(engine, counts)
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def num_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])


def engine_config(**changes: Any) -> EngineConfig:
    return EngineConfig(None, safety_checker="", **changes)


def names(built: list[Tier]) -> list[str]:
    return [tier.name for tier in built]


def compiled_tiers(pipeline: FluxPipeline) -> list[Tier]:
    """Return the tiers of a GPU with fp8, not warmed up. The matrices stay in bf16."""
    exact = compilation.compile_blocks(compilation.clone_sharing_weights(pipeline.transformer))
    quantized = compilation.compile_blocks(compilation.clone_sharing_weights(exact))
    return [
        Tier("none", exact, is_ready=False),
        Tier("regular", quantized, shares_forwards=True, is_ready=False),
        Tier("high", quantized, skips_blocks=True, is_ready=False),
    ]


def run_every_tier(engine: FluxEngine, width: int, height: int, num_steps: int) -> None:
    """Run a task in "none" and in "high", and forwards of one to four samples with different scales in "regular"."""
    for name in ("none", "high"):
        request = make_request(width=width, height=height, acceleration=name, num_inference_steps=num_steps)
        task = engine.start(request, 1)
        assert task.acceleration == name
        for _ in range(num_steps):
            engine.advance(task)
    for num_together in (1, 2, 3, 4):
        tasks = [
            engine.start(
                make_request(f"{n}", width, height, acceleration="regular", guidance_scale=1.5 + n), num_together
            )
            for n in range(num_together)
        ]
        assert len(engine.advance(tasks[0], tasks[1:])) == num_together


# -- which tiers are offered


@pytest.mark.parametrize(
    ("max_acceleration", "offered"),
    [("none", ["none"]), ("regular", ["none", "regular"]), ("high", ["none", "regular"])],
)
@pytest.mark.parametrize("is_eager", [False, True])
def test_tiers_of_a_cpu_differ_only_in_sharing_forwards(
    pipeline: FluxPipeline, max_acceleration: str, offered: list[str], is_eager: bool
) -> None:
    config = engine_config(max_acceleration=max_acceleration, is_eager=is_eager)
    (way,) = acceleration.ways(config, "cpu", RESIDENT)
    built, unavailable = acceleration.build(pipeline, config, RESIDENT, way)
    assert unavailable == []
    assert names(built) == offered
    assert all(tier.transformer is pipeline.transformer and tier.is_ready and not tier.skips_blocks for tier in built)
    assert [tier.shares_forwards for tier in built] == [False, True][: len(built)]


@pytest.mark.parametrize(("is_eager", "plan"), [(True, RESIDENT), (False, FP8_STORAGE), (False, GROUP_OFFLOAD)])
def test_tiers_that_are_not_compiled_differ_only_in_sharing_forwards(
    pipeline: FluxPipeline, is_eager: bool, plan: memory_plans.Plan
) -> None:
    config = engine_config(is_eager=is_eager)
    (way,) = acceleration.ways(config, "cuda", plan)
    built, unavailable = acceleration.build(pipeline, config, plan, way)
    assert unavailable == []
    assert [(tier.name, tier.shares_forwards) for tier in built] == [("none", False), ("regular", True)]
    assert all(tier.transformer is pipeline.transformer and tier.is_ready for tier in built)


@pytest.mark.parametrize("has_faster_attention", [False, True])
def test_the_ways_of_each_plan(monkeypatch: pytest.MonkeyPatch, has_faster_attention: bool) -> None:
    monkeypatch.setattr(acceleration, "has_faster_attention", lambda: has_faster_attention)
    compiled = [acceleration.FASTEST] * has_faster_attention + [acceleration.COMPILED]
    assert acceleration.ways(engine_config(), "cuda", RESIDENT) == [*compiled, acceleration.UNCOMPILED]
    assert acceleration.ways(engine_config(), "cuda", FP8) == compiled


@pytest.mark.parametrize(
    ("device", "is_eager", "plan", "reason"),
    [
        ("cpu", False, RESIDENT, "the device is a CPU"),
        ("cuda", True, RESIDENT, "the server runs with --eager"),
        ("cuda", False, GROUP_OFFLOAD, "weights in the memory plan group-offload cannot be compiled"),
        ("cuda", False, RESIDENT, ""),
    ],
)
def test_the_reason_why_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, device: str, is_eager: bool, plan: memory_plans.Plan, reason: str
) -> None:
    monkeypatch.setattr(acceleration, "has_faster_attention", lambda: False)
    assert acceleration.uncompiled_reason(engine_config(is_eager=is_eager), device, plan) == reason
    ways = acceleration.ways(engine_config(is_eager=is_eager), device, plan)
    assert (ways == [acceleration.UNCOMPILED]) == bool(reason)


@pytest.fixture
def fp8_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Fake a GPU with fp8 and enough memory. Return a list that receives the quantized transformers."""
    quantized: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**12, 10**12))
    monkeypatch.setattr(fp8, "find_spec", lambda name: name == "torchao")
    monkeypatch.setattr(fp8, "quantize", quantized.append)
    return quantized


def test_a_gpu_with_fp8_has_all_three_tiers_and_none_is_ready(pipeline: FluxPipeline, fp8_gpu: list[Any]) -> None:
    built, unavailable = acceleration.build(pipeline, engine_config(), RESIDENT, acceleration.FASTEST)
    assert unavailable == []
    assert names(built) == ["none", "regular", "high"]
    assert [tier.is_ready for tier in built] == [False] * 3
    assert [tier.shares_forwards for tier in built] == [False, True, False]
    assert [tier.skips_blocks for tier in built] == [False, False, True]
    none, regular, high = (tier.transformer for tier in built)
    assert fp8_gpu == [regular]
    assert regular is high
    assert regular is not none
    assert pipeline.transformer not in (none, regular)


@pytest.mark.parametrize(
    ("plan", "is_quantized"),
    [(INT8, False), (FP8, False), (INT4, False), (RESIDENT, True)],
    ids=["int8", "fp8", "int4", "weights that are quantized in their files"],
)
def test_with_quantized_weights_all_tiers_run_the_quantized_transformer(
    pipeline: FluxPipeline,
    fp8_gpu: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    plan: memory_plans.Plan,
    is_quantized: bool,
) -> None:
    """diffusers marks a transformer whose weights are quantized in their files."""
    monkeypatch.setattr(pipeline.transformer, "is_quantized", is_quantized, raising=False)
    built, unavailable = acceleration.build(pipeline, engine_config(), plan, acceleration.FASTEST)
    assert (unavailable, fp8_gpu) == ([], [])
    assert names(built) == ["none", "regular", "high"]
    assert len({id(tier.transformer) for tier in built}) == 1
    assert [tier.shares_forwards for tier in built] == [False, True, False]
    assert [tier.skips_blocks for tier in built] == [False, False, True]


def test_matrices_that_cannot_be_quantized_cost_only_the_tiers_in_fp8(
    pipeline: FluxPipeline, fp8_gpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise ImportError("torchao does not load")

    monkeypatch.setattr(fp8, "quantize", fail)
    built, unavailable = acceleration.build(pipeline, engine_config(), RESIDENT, acceleration.FASTEST)
    assert names(built) == ["none"]
    assert unavailable[0].endswith("converted to fp8, ImportError: torchao does not load")


def test_only_offered_tiers_are_quantized(pipeline: FluxPipeline, fp8_gpu: list[Any]) -> None:
    config = engine_config(max_acceleration="none")
    built, unavailable = acceleration.build(pipeline, config, RESIDENT, acceleration.FASTEST)
    assert unavailable == []
    assert names(built) == ["none"]
    assert fp8_gpu == []


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("get_device_capability", (8, 0), "a card does not support fp8"),
        ("mem_get_info", (1000, 10**12), "a copy of the transformer in fp8 needs"),
        ("find_spec", None, "torchao is not installed"),
    ],
)
def test_without_fp8_one_tier_is_offered_and_the_log_says_why(
    pipeline: FluxPipeline,
    fp8_gpu: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    value: Any,
    reason: str,
) -> None:
    monkeypatch.setattr(fp8 if name == "find_spec" else torch.cuda, name, lambda *_: value)
    with caplog.at_level("INFO", "models.flux.acceleration"):
        built, unavailable = acceleration.build(pipeline, engine_config(), RESIDENT, acceleration.FASTEST)
    assert names(built) == ["none"]
    assert reason in caplog.text and reason in unavailable[0]
    assert fp8_gpu == []


def test_only_the_large_matrices_count_for_fp8(
    pipeline: FluxPipeline, fp8_gpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = pipeline.transformer
    matrices = [module for name, module in transformer.named_modules() if fp8.is_large_matrix(module, name)]
    needed = sum(matrix.weight.numel() for matrix in matrices)
    needed += int(memory_plans.reserve({"transformer": sum(weight.nbytes for weight in transformer.parameters())}))
    for free, reason in ((needed, None), (needed - 1, "needs")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 10**12))
        assert (reason or "None") in str(compilation.fp8_copy_unavailable_reason(transformer))


def test_quantizing_leaves_inductors_settings_alone(pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao, here a double, would change the settings for one thread only, and for tiers that are not quantized."""
    torchao: Any = ModuleType("torchao.quantization")
    torchao.Float8DynamicActivationFloat8WeightConfig = lambda **settings: settings
    torchao.PerRow = object
    configs: list[dict[str, Any]] = []
    torchao.quantize_ = lambda _, config, **__: configs.append(config)
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", torchao)
    fp8.quantize(compilation.clone_sharing_weights(pipeline.transformer))
    assert configs and not any(config["set_inductor_config"] for config in configs)


@pytest.mark.parametrize(
    ("ready_names", "requested", "used"),
    [
        ("none regular high", "high", "high"),
        ("none regular high", "regular", "regular"),
        ("none regular high", "none", "none"),
        ("none regular", "high", "regular"),
        ("none high", "regular", "none"),
        ("none high", "high", "high"),
        ("none", "high", "none"),
        ("", "high", "none"),
    ],
)
def test_the_nearest_lower_ready_tier_is_used(ready_names: str, requested: str, used: str) -> None:
    offered = [Tier(name, None, is_ready=name in ready_names.split()) for name in acceleration.NAMES]
    assert acceleration.best_ready(offered, requested).name == used
    fewer = [tier for tier in offered if tier.is_ready or tier.name == "none"]
    assert acceleration.best_ready(fewer, requested).name == used


def test_requests_use_a_lower_tier_until_theirs_is_ready(pipeline: FluxPipeline) -> None:
    offered = [Tier("none", pipeline.transformer), Tier("regular", pipeline.transformer, True, is_ready=False)]
    engine = FluxEngine(pipeline, AllSafeChecker(), offered, "cpu")
    early = engine.start(make_request(acceleration="high"), 1)
    assert early.acceleration == "none"
    with tiny_flux.record_batch_sizes(pipeline.transformer) as warmed:
        assert engine.warm_up()
    assert set(warmed) == {1, 2}
    assert not engine.warm_up()
    assert engine.start(make_request(acceleration="high"), 1).acceleration == "regular"
    assert early.acceleration == "none"


def fail_to_compile(**_: Any) -> None:
    """Fail like a transformer that does not compile."""
    raise OSError("no compiler here")


def broken_tier(name: str) -> Tier:
    cannot_run: Any = fail_to_compile
    cannot_run.config = tiny_flux.transformer().config
    return Tier(name, cannot_run, is_ready=False)


def test_loras_run_uncompiled_until_the_tier_none_is_compiled_for_them() -> None:
    tiers = [Tier("none", None), Tier("regular", None), Tier("high", None)]
    tiers[1].lora_transformer = tiers[2].lora_transformer = object()
    assert [tier.lora_transformer for tier in acceleration.tiers_for_loras(tiers)] == [None, None]
    tiers[0].lora_transformer = object()
    assert acceleration.tiers_for_loras(tiers) == tiers
    assert acceleration.best_ready(acceleration.tiers_for_loras(tiers), "none") is tiers[0]


def test_the_warm_up_begins_with_the_usual_size_of_images(pipeline: FluxPipeline) -> None:
    """Triton chooses its configurations in the first forward, for good: it must see the 4096 tokens of 1024x1024."""
    numbers: list[int] = []

    def run(**inputs: Any) -> None:
        numbers.append(inputs["hidden_states"].shape[1])

    run.config = pipeline.transformer.config  # type: ignore[attr-defined]
    Tier("none", run).warm_up("cpu", torch.bfloat16, 8)
    assert numbers[0] == 4096 and len(numbers) > 1


def test_a_tier_is_compiled_even_if_another_engine_has_stopped_compiling(pipeline: FluxPipeline) -> None:
    stances: list[str] = []

    def run(**_: Any) -> None:
        stances.append(torch._dynamo.eval_frame._stance.stance)

    run.config = pipeline.transformer.config  # type: ignore[attr-defined]
    engine = FluxEngine(pipeline, AllSafeChecker(), [Tier("none", run, is_ready=False)], "cpu")
    with torch.compiler.set_stance("eager_on_recompile"):
        assert engine.warm_up()
        assert torch._dynamo.eval_frame._stance.stance == "eager_on_recompile"
    assert set(stances) == {"default"}


def test_a_tier_that_fails_to_warm_up_is_removed(pipeline: FluxPipeline) -> None:
    offered = [
        Tier("none", pipeline.transformer),
        broken_tier("regular"),
        Tier("high", pipeline.transformer, is_ready=False),
    ]
    engine = FluxEngine(pipeline, AllSafeChecker(), offered, "cpu")
    with pytest.raises(OSError, match="no compiler here"):
        engine.warm_up()
    assert names(engine.tiers) == ["none", "high"]
    assert engine.start(make_request(acceleration="regular"), 1).acceleration == "none"
    assert engine.warm_up()
    assert not engine.warm_up()


def test_memory_that_runs_out_during_the_conversion_to_fp8_costs_only_fp8(
    pipeline: FluxPipeline, fp8_gpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(fp8, "quantize", fail)
    built, unavailable = acceleration.build(pipeline, engine_config(), RESIDENT, acceleration.FASTEST)
    assert names(built) == ["none"]
    assert "memory ran out" in unavailable[0]


# -- what tiers share


def test_a_clone_shares_all_weights(pipeline: FluxPipeline) -> None:
    original, copy = pipeline.transformer, compilation.clone_sharing_weights(pipeline.transformer)
    for original_items, copied_items in (
        (original.named_parameters(), copy.named_parameters()),
        (original.buffers(), copy.buffers()),
    ):
        originals, copies = list(original_items), list(copied_items)
        assert len(originals) == len(copies)
        for one, other in zip(originals, copies, strict=True):
            assert one is other or (one[0] == other[0] and one[1] is other[1])
    assert not {id(module) for module in original.modules()} & {id(module) for module in copy.modules()}


def test_changes_to_a_clone_leave_the_original_unchanged(pipeline: FluxPipeline) -> None:
    original, copy = pipeline.transformer, compilation.clone_sharing_weights(pipeline.transformer)
    before = original.proj_out.weight
    compilation.compile_blocks(copy)
    copy.set_attention_backend("native")
    copy.proj_out.weight = torch.nn.Parameter(torch.zeros_like(before))

    def states(transformer: Any) -> list[tuple[Any, Any]]:
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        return [(block._compiled_call_impl, block.attn.processor._attention_backend) for block in blocks]

    assert all(run is None and backend is None for run, backend in states(original))
    assert all(run is not None and backend is not None for run, backend in states(copy))
    assert original.proj_out.weight is before
    # A clone of a compiled transformer is uncompiled, and can be compiled separately.
    assert all(run is None for run, _ in states(compilation.clone_sharing_weights(copy)))


@pytest.mark.parametrize(
    ("major", "has_flash", "chosen"),
    [(8, True, None), (9, False, "_native_cudnn"), (10, True, "_native_cudnn"), (9, True, None)],
)
def test_attention_is_chosen_for_the_clone_only(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, major: int, has_flash: bool, chosen: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    # With `has_flash`, FlashAttention 3 is reported but missing. On Hopper, diffusers rejects it: none is chosen.
    monkeypatch.setattr(compilation, "find_spec", lambda name: has_flash)
    default = _AttentionBackendRegistry.get_active_backend()
    copy = compilation.clone_sharing_weights(pipeline.transformer)
    compilation.choose_attention(copy)
    assert copy.transformer_blocks[0].attn.processor._attention_backend == chosen
    assert pipeline.transformer.transformer_blocks[0].attn.processor._attention_backend is None
    assert _AttentionBackendRegistry.get_active_backend() == default


def test_large_matrices_are_those_of_the_blocks_except_norms(pipeline: FluxPipeline) -> None:
    of_joint = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
    of_joint += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
    of_joint += ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
    of_single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"]
    expected = {f"transformer_blocks.0.{name}" for name in of_joint}
    expected |= {f"single_transformer_blocks.{n}.{name}" for n in (0, 1) for name in of_single}
    modules = pipeline.transformer.named_modules()
    assert {name for name, module in modules if fp8.is_large_matrix(module, name)} == expected


# -- compilation


def test_serving_never_compiles(pipeline: FluxPipeline, warm: Warm) -> None:
    assert all(tier.is_ready for tier in warm.engine.tiers)
    with torch.compiler.set_stance("fail_on_recompile"):
        for width, height in PRESETS.values():
            warm.engine.advance(warm.engine.start(make_request(width=width, height=height), 1))
            # Smaller sizes, so that four samples fit in one forward.
            run_every_tier(warm.engine, width // 4, height // 4, 1)
        for width, height in ODD_SIZES:
            # Later steps of "high" skip blocks, so three steps run.
            run_every_tier(warm.engine, width, height, 3)
        request = make_request(width=96, height=64)
        latents = generate_latents(warm.engine, request, 1)
    plain = FluxEngine(pipeline, AllSafeChecker(), [Tier("none", pipeline.transformer)], "cpu")
    assert torch.equal(latents, generate_latents(plain, request, 1))


def other_transformer() -> Any:
    """Return a compiled transformer with other shapes, so that no compiled graph fits it."""
    return compilation.compile_blocks(
        tiny_flux.transformer(torch.bfloat16, attention_head_dim=32, axes_dims_rope=(8, 12, 12))
    )


def test_a_forward_that_was_not_warmed_up_raises_an_error(pipeline: FluxPipeline, warm: Warm) -> None:
    transformer = other_transformer()
    with torch.compiler.set_stance("default"):
        Tier("none", transformer).warm_up("cpu", torch.bfloat16, 512)
    offered = [Tier("regular", transformer, shares_forwards=True)]
    engine = FluxEngine(pipeline, AllSafeChecker(), offered, "cpu", sharing=AlwaysShare())
    tasks = [engine.start(make_request(acceleration="regular"), seed) for seed in range(2)]
    with torch.compiler.set_stance("fail_on_recompile"):
        engine.advance(tasks[0])
        with pytest.raises(RuntimeError, match="recompil"):
            engine.advance(tasks[0], tasks[1:])


def test_nothing_is_compiled_after_compilation_is_frozen(pipeline: FluxPipeline, warm: Warm) -> None:
    cold, none, regular, high = warm.num_compiled
    assert cold < none < regular
    # "high" runs the same forwards as "regular".
    assert high == regular

    def num_newly_compiled() -> int:
        """Count the graphs compiled for another transformer, which stands for any forward that the warm-up missed."""
        before = num_compiled()
        Tier("none", other_transformer(), shares_forwards=True).warm_up("cpu", torch.bfloat16, 512)
        return num_compiled() - before

    try:
        warm.engine.freeze_compilation()
        assert num_newly_compiled() == 0
    finally:
        torch.compiler.set_stance("default")
    # An engine without compiled tiers does not forbid compilation.
    FluxEngine(pipeline, AllSafeChecker(), [Tier("none", pipeline.transformer)], "cpu").freeze_compilation()
    assert num_newly_compiled() > 0


def test_compile_caches_are_separate_for_each_version_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100/80GB HBM3")
    compilation.set_compile_cache_dirs(engine_config(compile_cache=tmp_path))
    (directory,) = tmp_path.iterdir()
    assert f"torch-{torch.__version__}" in directory.name
    assert "NVIDIA_H100-80GB_HBM3" in directory.name
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(directory / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(directory / "triton")
    assert (directory / "inductor").is_dir()
    # A second start finds the cache, and another GPU does not. Variables that are already set are kept.
    compilation.set_compile_cache_dirs(engine_config(compile_cache=tmp_path))
    assert list(tmp_path.iterdir()) == [directory]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    compilation.set_compile_cache_dirs(engine_config(compile_cache=tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(directory / "inductor")
