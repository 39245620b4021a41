"""The acceleration tiers that a device can run; a request names one in its field `acceleration`."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.base import EngineConfig
from models.flux.compilation import (
    choose_attention,
    clone_sharing_weights,
    compile_blocks,
    fp8_copy_unavailable_reason,
    has_faster_attention,
    set_compile_cache_dirs,
)
from models.flux.device import summary
from models.loading import fp8
from models.loading.memory_plans import Plan

log = logging.getLogger(__name__)

NAMES = ("none", "regular", "high")
#: Ways to run the tiers on a GPU.
FASTEST, COMPILED = "compiled with the fastest attention", "compiled with PyTorch's attention"
UNCOMPILED = "uncompiled"
#: Numbers of image tokens in the warm-up. The first is that of 1024x1024, because Triton chooses its configurations in
#: the first forward. The numbers differ from each other and from the number of text tokens, 512 or 64,
#: so that the compiler treats no number of tokens as a constant.
_WARM_TOKENS = (4096, 640)


@dataclass
class Tier:
    """An acceleration tier: one way to run the transformer.

    Attributes:
        name: the value of `acceleration` in requests.
        transformer: a FluxTransformer2DModel, possibly compiled; None for the pipeline's, uncompiled.
        shares_forwards: whether several images may share one forward.
        skips_blocks: whether a first-block cache is used.
        is_ready: whether requests can use the tier without waiting for compilation.
        compiles_loras: whether the layers of LoRAs are still to be compiled.
        lora_transformer: the compiled transformer for tasks with LoRAs, which shares the weights; None if there is none
            yet, or nothing is compiled.
    """

    name: str
    transformer: Any
    shares_forwards: bool = False
    skips_blocks: bool = False
    is_ready: bool = True
    compiles_loras: bool = False
    lora_transformer: Any = None

    def warm_up(self, device: str, dtype: torch.dtype, num_text_tokens: int) -> None:
        """Run once each kind of forward that requests need, so that no request waits for compilation."""
        self.run_all_kinds(self.transformer, device, dtype, num_text_tokens)
        self.is_ready = True

    def run_all_kinds(self, transformer: Any, device: str, dtype: torch.dtype, num_text_tokens: int) -> None:
        """Run once each kind of forward that requests need, with this transformer."""
        for batch in (1, 2) if self.shares_forwards else (1,):
            for num_tokens in _WARM_TOKENS:
                sizes = (batch, num_tokens, num_text_tokens)
                with torch.no_grad():
                    transformer(**random_inputs(transformer.config, sizes, device, dtype))


_UNCOMPILED = (Tier("none", None), Tier("regular", None, shares_forwards=True))


def tiers_for_loras(offered: Sequence[Tier]) -> list[Tier]:
    """Return the tiers for tasks with LoRAs: those that are ready for them if "none" is, else the uncompiled ones."""
    ready = [tier for tier in offered if tier.lora_transformer is not None]
    return ready if any(tier.name == "none" for tier in ready) else uncompiled_tiers(offered)


def uncompiled_tiers(offered: Sequence[Tier]) -> list[Tier]:
    """Return the uncompiled tiers, for tasks with control nets too: "none" and "regular", if they are offered."""
    names = {tier.name for tier in offered}
    return [tier for tier in _UNCOMPILED if tier.name in names]


def ways(config: EngineConfig, device: str, plan: Plan) -> list[str]:
    """Return the ways to run the tiers, from the fastest to the last resort.

    Uncompiled, each product in fp8 is several kernels, which are slower than the next plan.
    """
    if uncompiled_reason(config, device, plan):
        return [UNCOMPILED]
    compiled = [FASTEST, COMPILED] if has_faster_attention() else [COMPILED]
    return compiled if plan.needs_fp8 else [*compiled, UNCOMPILED]


def uncompiled_reason(config: EngineConfig, device: str, plan: Plan) -> str:
    """Return why nothing is compiled, whatever works on the device; "" if compiling is tried."""
    if device == "cpu":
        return "the device is a CPU"
    if config.is_eager:
        return "the server runs with --eager"
    return "" if plan.can_compile else f"weights in the memory plan {plan.name} cannot be compiled"


def build(pipeline: Any, config: EngineConfig, plan: Plan, way: str) -> tuple[list[Tier], list[str]]:
    """Return the tiers that the operator offers and the device can run in this way, in the order of NAMES.

    A second returned list says which other tiers the operator offers, and why the device cannot run them.
    """
    offered = NAMES[: NAMES.index(config.max_acceleration) + 1]
    unavailable: list[str] = []
    if way == UNCOMPILED:
        tiers = [Tier("none", pipeline.transformer), Tier("regular", pipeline.transformer, shares_forwards=True)]
    else:
        tiers = _compiled(pipeline.transformer, config, plan, way, unavailable)
    return [tier for tier in tiers if tier.name in offered], unavailable


def _compiled(transformer: Any, config: EngineConfig, plan: Plan, way: str, unavailable: list[str]) -> list[Tier]:
    set_compile_cache_dirs(config)
    placed = clone_sharing_weights(transformer)
    if way == FASTEST:
        choose_attention(placed)
    tiers = [Tier("none", compile_blocks(placed), is_ready=False, compiles_loras=True)]
    if config.max_acceleration == "none":
        return tiers
    if not needs_fp8_copy(transformer, plan):
        return [*tiers, *_fast(placed)]
    if reason := fp8_copy_unavailable_reason(transformer):
        log.info("acceleration regular and high are unavailable, so requests for them run with none: %s", reason)
        unavailable.append(f"acceleration regular and high: {reason}")
        return tiers
    quantized = clone_sharing_weights(placed)
    try:
        fp8.quantize(quantized)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        log.exception("the matrices cannot be quantized to fp8")
        reason = "memory ran out" if isinstance(error, torch.OutOfMemoryError) else summary(error)
        unavailable.append(f"acceleration regular and high: while the matrices were converted to fp8, {reason}")
        return tiers
    return [*tiers, *_fast(compile_blocks(quantized))]


def needs_fp8_copy(transformer: Any, plan: Plan) -> bool:
    """Return whether the compiled tiers above "none" need a copy in fp8. Weights that are quantized need none."""
    return plan.quantize == "none" and not getattr(transformer, "is_quantized", False)


def _fast(quantized: Any) -> list[Tier]:
    """Return the tiers above "none", which run a quantized transformer."""
    return [
        Tier("regular", quantized, shares_forwards=True, is_ready=False, compiles_loras=True),
        Tier("high", quantized, skips_blocks=True, is_ready=False, compiles_loras=True),
    ]


def random_inputs(config: Any, sizes: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return random inputs for a forward. `sizes` are the numbers of images, of image tokens and of text tokens."""
    batch, num_tokens, num_text_tokens = sizes
    make: Callable[..., torch.Tensor] = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
    return {
        "hidden_states": make(batch, num_tokens, config.in_channels),
        "encoder_hidden_states": make(batch, num_text_tokens, config.joint_attention_dim),
        "pooled_projections": make(batch, config.pooled_projection_dim),
        "timestep": torch.full([batch], 0.5, device=device, dtype=dtype),
        "guidance": torch.full([batch], 3.5, device=device) if config.guidance_embeds else None,
        "img_ids": torch.zeros(num_tokens, 3, device=device, dtype=dtype),
        "txt_ids": torch.zeros(num_text_tokens, 3, device=device, dtype=dtype),
        "return_dict": False,
    }


def best_ready(tiers: Sequence[Tier], name: str) -> Tier:
    """Return the highest ready tier that is not above the tier `name`. "none" always counts as ready."""
    candidates = NAMES[: NAMES.index(name) + 1]
    return [tier for tier in tiers if tier.name in candidates and (tier.is_ready or tier.name == "none")][-1]
