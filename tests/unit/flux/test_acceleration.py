"""Which tier paints, what it shares with the others, and that no request waits for a compiler."""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
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
from models.loading import memory_plans
from models.schema import PRESETS
from tests.support import tiny_flux
from tests.support.tiny_flux import CallsAllSafe, SharesAlways, asked, latents_of

#: Sizes whose tokens are few, and as many as the text's.
ODD_SIZES = [(64, 64), (256, 512)]


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return tiny_flux.pipeline(torch.bfloat16)


@dataclass(frozen=True)
class Warm:
    """An engine whose tiers are compiled, and how much was, before the first of them and after each."""

    engine: FluxEngine
    num_compiled: list[int]


@pytest.fixture(scope="module")
def warm(pipeline: FluxPipeline) -> Iterator[Warm]:
    """Blocks are captured as they are for a GPU, and then run as they are written: that takes no minutes."""
    real = FluxTransformer2DModel.compile_repeated_blocks
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", partialmethod(real, backend="eager"))
        engine = FluxEngine(pipeline, CallsAllSafe(), compiled(pipeline), "cpu", sharing=SharesAlways())
        counts = [num_compiled()]

        def go_on() -> None:
            while engine.warm_up():
                counts.append(num_compiled())

        # On another thread, as the worker does.
        thread = threading.Thread(target=go_on)
        thread.start()
        thread.join()
        engine.freeze_compilation()
        yield Warm(engine, counts)
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def num_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])


def placement(**changes: Any) -> EngineConfig:
    return EngineConfig(None, safety_checker="", **changes)


def names(built: list[Tier]) -> list[str]:
    return [tier.name for tier in built]


def compiled(pipeline: FluxPipeline) -> list[Tier]:
    """What a GPU with fp8 has, cold; the matrices stay in bf16."""
    exact = compilation.compile_blocks(compilation.clone_sharing_weights(pipeline.transformer))
    quantized = compilation.compile_blocks(compilation.clone_sharing_weights(exact))
    return [
        Tier("none", exact, is_ready=False),
        Tier("regular", quantized, shares_forwards=True, is_ready=False),
        Tier("high", quantized, skips_blocks=True, is_ready=False),
    ]


def paint_every_way(engine: FluxEngine, width: int, height: int, num_steps: int) -> None:
    """Every tier, and one to four in a forward, each with a guidance of its own."""
    for name in ("none", "high"):
        request = asked(width=width, height=height, acceleration=name, num_inference_steps=num_steps)
        painting = engine.start(request, 1)
        assert painting.acceleration == name
        for _ in range(num_steps):
            engine.advance(painting)
    for num_together in (1, 2, 3, 4):
        paintings = [
            engine.start(asked(f"{n}", width, height, acceleration="regular", guidance_scale=1.5 + n), num_together)
            for n in range(num_together)
        ]
        assert len(engine.advance(paintings[0], paintings[1:])) == num_together


# -- which there are


@pytest.mark.parametrize(
    ("max_acceleration", "offered"),
    [("none", ["none"]), ("regular", ["none", "regular"]), ("high", ["none", "regular"])],
)
@pytest.mark.parametrize("is_eager", [False, True])
def test_a_cpu_paints_the_same_weights_alone_or_together(
    pipeline: FluxPipeline, max_acceleration: str, offered: list[str], is_eager: bool
) -> None:
    asked_for = placement(max_acceleration=max_acceleration, is_eager=is_eager)
    built = acceleration.build(pipeline, asked_for, "cpu", is_resident=True)
    assert names(built) == offered
    assert all(tier.transformer is pipeline.transformer and tier.is_ready and not tier.skips_blocks for tier in built)
    assert [tier.shares_forwards for tier in built] == [False, True][: len(built)]


@pytest.mark.parametrize(("is_eager", "is_whole"), [(True, True), (False, False)])
def test_a_gpu_that_must_not_compile_has_one(pipeline: FluxPipeline, is_eager: bool, is_whole: bool) -> None:
    (tier,) = acceleration.build(pipeline, placement(is_eager=is_eager), "cuda", is_resident=is_whole)
    assert (tier.name, tier.is_ready) == ("none", True)
    assert tier.transformer is pipeline.transformer


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A card with fp8 and room, as far as is asked; returns the transformers that were quantized."""
    quantized: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**12, 10**12))
    monkeypatch.setattr(compilation, "find_spec", lambda name: name == "torchao")
    monkeypatch.setattr(acceleration, "quantize", quantized.append)
    return quantized


def test_a_gpu_with_fp8_has_all_three_and_they_start_cold(pipeline: FluxPipeline, card: list[Any]) -> None:
    built = acceleration.build(pipeline, placement(), "cuda", is_resident=True)
    assert names(built) == ["none", "regular", "high"]
    assert [tier.is_ready for tier in built] == [False] * 3
    assert [tier.shares_forwards for tier in built] == [False, True, False]
    assert [tier.skips_blocks for tier in built] == [False, False, True]
    none, regular, high = (tier.transformer for tier in built)
    assert card == [regular]
    assert regular is high
    assert regular is not none
    assert pipeline.transformer not in (none, regular)


def test_nothing_is_quantized_that_is_not_offered(pipeline: FluxPipeline, card: list[Any]) -> None:
    assert names(acceleration.build(pipeline, placement(max_acceleration="none"), "cuda", is_resident=True)) == ["none"]
    assert card == []


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("get_device_capability", (8, 0), "a card does not support fp8"),
        ("mem_get_info", (1000, 10**12), "a copy in fp8 needs"),
        ("find_spec", None, "torchao is not installed"),
    ],
)
def test_without_fp8_there_is_one_and_the_log_says_why(
    pipeline: FluxPipeline,
    card: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    value: Any,
    reason: str,
) -> None:
    monkeypatch.setattr(compilation if name == "find_spec" else torch.cuda, name, lambda *_: value)
    with caplog.at_level("INFO", "models.flux.acceleration"):
        assert names(acceleration.build(pipeline, placement(), "cuda", is_resident=True)) == ["none"]
    assert reason in caplog.text
    assert card == []


@pytest.mark.parametrize(
    ("ready", "wanted", "given"),
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
def test_the_nearest_lower_tier_that_is_ready(ready: str, wanted: str, given: str) -> None:
    offered = [Tier(name, None, is_ready=name in ready.split()) for name in acceleration.NAMES]
    assert acceleration.best_ready(offered, wanted).name == given
    some = [tier for tier in offered if tier.is_ready or tier.name == "none"]
    assert acceleration.best_ready(some, wanted).name == given


def test_requests_get_the_lower_tier_until_theirs_is_ready(pipeline: FluxPipeline) -> None:
    offered = [Tier("none", pipeline.transformer), Tier("regular", pipeline.transformer, True, is_ready=False)]
    engine = FluxEngine(pipeline, CallsAllSafe(), offered, "cpu")
    early = engine.start(asked(acceleration="high"), 1)
    assert early.acceleration == "none"
    with tiny_flux.batches(pipeline.transformer) as warmed:
        assert engine.warm_up()
    assert set(warmed) == {1, 2}
    assert not engine.warm_up()
    assert engine.start(asked(acceleration="high"), 1).acceleration == "regular"
    assert early.acceleration == "none"


def cannot(**_: Any) -> None:
    """Stands in for a transformer that does not compile."""
    raise OSError("no compiler here")


def broken(name: str) -> Tier:
    cannot_run: Any = cannot
    cannot_run.config = tiny_flux.transformer().config
    return Tier(name, cannot_run, is_ready=False)


def test_a_tier_that_cannot_be_made_ready_is_given_up(pipeline: FluxPipeline) -> None:
    offered = [
        Tier("none", pipeline.transformer),
        broken("regular"),
        Tier("high", pipeline.transformer, is_ready=False),
    ]
    engine = FluxEngine(pipeline, CallsAllSafe(), offered, "cpu")
    with pytest.raises(OSError, match="no compiler here"):
        engine.warm_up()
    assert names(engine.tiers) == ["none", "high"]
    assert engine.start(asked(acceleration="regular"), 1).acceleration == "none"
    assert engine.warm_up()
    assert not engine.warm_up()


def test_without_a_compiler_all_is_painted_uncompiled(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("models.flux.engine.load_pipeline", lambda _: (pipeline, memory_plans.PLANS[0]))
    monkeypatch.setattr("models.flux.engine.safety_checker.load", lambda _: CallsAllSafe())
    monkeypatch.setattr("models.flux.engine.acceleration.build", lambda *_, **__: [broken("none"), broken("regular")])
    engine = FluxEngine.load(placement(device="cpu"))
    assert "every tier runs uncompiled" in caplog.text
    assert names(engine.tiers) == ["none"]
    assert engine.tiers[0].transformer is pipeline.transformer
    assert not engine.warm_up()
    assert tiny_flux.painted(engine, asked(acceleration="high"), 1)


# -- what they share


def test_a_twin_has_the_same_weights_and_none_of_its_own(pipeline: FluxPipeline) -> None:
    original, copy = pipeline.transformer, compilation.clone_sharing_weights(pipeline.transformer)
    for mine, its in ((original.named_parameters(), copy.named_parameters()), (original.buffers(), copy.buffers())):
        of_mine, of_its = list(mine), list(its)
        assert len(of_mine) == len(of_its)
        for one, other in zip(of_mine, of_its, strict=True):
            assert one is other or (one[0] == other[0] and one[1] is other[1])
    assert not {id(module) for module in original.modules()} & {id(module) for module in copy.modules()}


def test_what_is_done_to_a_twin_leaves_the_original_be(pipeline: FluxPipeline) -> None:
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
    # A twin of what is compiled starts uncompiled, and can be compiled by itself.
    assert all(run is None for run, _ in states(compilation.clone_sharing_weights(copy)))


@pytest.mark.parametrize(
    ("major", "has_flash", "chosen"),
    [(8, True, None), (9, False, "_native_cudnn"), (10, True, "_native_cudnn"), (9, True, None)],
)
def test_attention_is_chosen_for_the_twin_alone(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, major: int, has_flash: bool, chosen: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    # FlashAttention 3 is said to be there and is not, so diffusers refuses it: then nothing is chosen.
    monkeypatch.setattr(compilation, "find_spec", lambda name: has_flash)
    default = _AttentionBackendRegistry.get_active_backend()
    copy = compilation.clone_sharing_weights(pipeline.transformer)
    compilation.choose_attention(copy)
    assert copy.transformer_blocks[0].attn.processor._attention_backend == chosen
    assert pipeline.transformer.transformer_blocks[0].attn.processor._attention_backend is None
    assert _AttentionBackendRegistry.get_active_backend() == default


def test_the_large_matrices_are_those_of_the_blocks_without_their_norms(pipeline: FluxPipeline) -> None:
    of_joint = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
    of_joint += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
    of_joint += ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
    of_single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"]
    expected = {f"transformer_blocks.0.{name}" for name in of_joint}
    expected |= {f"single_transformer_blocks.{n}.{name}" for n in (0, 1) for name in of_single}
    modules = pipeline.transformer.named_modules()
    assert {name for name, module in modules if compilation.is_large_matrix(module, name)} == expected


# -- compiled


def test_serving_never_compiles(pipeline: FluxPipeline, warm: Warm) -> None:
    assert all(tier.is_ready for tier in warm.engine.tiers)
    with torch.compiler.set_stance("fail_on_recompile"):
        for width, height in PRESETS.values():
            warm.engine.advance(warm.engine.start(asked(width=width, height=height), 1))
            # Smaller, so that four go through one forward.
            paint_every_way(warm.engine, width // 4, height // 4, 1)
        for width, height in ODD_SIZES:
            # The later steps of "high" skip blocks.
            paint_every_way(warm.engine, width, height, 3)
        request = asked(width=96, height=64)
        latents = latents_of(warm.engine, request, 1)
    plain = FluxEngine(pipeline, CallsAllSafe(), [Tier("none", pipeline.transformer)], "cpu")
    assert torch.equal(latents, latents_of(plain, request, 1))


def other_transformer() -> Any:
    """Compiled too, of other shapes, so that nothing of what is warm serves it."""
    return compilation.compile_blocks(
        tiny_flux.transformer(torch.bfloat16, attention_head_dim=32, axes_dims_rope=(8, 12, 12))
    )


def test_a_forward_that_was_not_warmed_up_would_be_noticed(pipeline: FluxPipeline, warm: Warm) -> None:
    transformer = other_transformer()
    with torch.compiler.set_stance("default"):
        Tier("none", transformer).warm_up("cpu", torch.bfloat16)
    offered = [Tier("regular", transformer, shares_forwards=True)]
    engine = FluxEngine(pipeline, CallsAllSafe(), offered, "cpu", sharing=SharesAlways())
    paintings = [engine.start(asked(acceleration="regular"), seed) for seed in range(2)]
    with torch.compiler.set_stance("fail_on_recompile"):
        engine.advance(paintings[0])
        with pytest.raises(RuntimeError, match="recompil"):
            engine.advance(paintings[0], paintings[1:])


def test_once_settled_nothing_is_compiled_any_more(pipeline: FluxPipeline, warm: Warm) -> None:
    cold, none, regular, high = warm.num_compiled
    assert cold < none < regular
    # The same forwards as those of "regular".
    assert high == regular

    def num_new() -> int:
        """Nobody asks for these forwards: they stand for any that the warm-up did not think of."""
        before = num_compiled()
        Tier("none", other_transformer(), shares_forwards=True).warm_up("cpu", torch.bfloat16)
        return num_compiled() - before

    try:
        warm.engine.freeze_compilation()
        assert num_new() == 0
    finally:
        torch.compiler.set_stance("default")
    # One that compiles nothing forbids nobody else to.
    FluxEngine(pipeline, CallsAllSafe(), [Tier("none", pipeline.transformer)], "cpu").freeze_compilation()
    assert num_new() > 0


def test_what_is_compiled_is_kept_apart_by_version_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100/80GB HBM3")
    compilation.set_compile_cache_dirs(placement(compile_cache=tmp_path))
    (folder,) = tmp_path.iterdir()
    assert f"torch-{torch.__version__}" in folder.name
    assert "NVIDIA_H100-80GB_HBM3" in folder.name
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(folder / "triton")
    assert (folder / "inductor").is_dir()
    # A second start finds it, another card does not; what the operator has set is left as it is.
    compilation.set_compile_cache_dirs(placement(compile_cache=tmp_path))
    assert list(tmp_path.iterdir()) == [folder]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    compilation.set_compile_cache_dirs(placement(compile_cache=tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
