"""The tiers of `acceleration`: which this device can run, and with what."""

import copy
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from models.base import Placement
from models.memory import WORKSPACE
from models.texts import NUM_TOKENS

log = logging.getLogger(__name__)

NAMES = ("none", "regular", "high")
#: Picture tokens to warm up with: other than the text tokens and each other, lest a size be taken for a constant.
_WARM_TOKENS = (384, 640)


@dataclass
class Tier:
    """One way to run the transformer.

    Attributes:
        name: the wire's word for it.
        transformer: called as FluxTransformer2DModel is.
        shares_forwards: whether several generations may go through one forward.
        skips_blocks: whether a first-block cache is used.
        is_ready: whether a request may use it: what is compiled is warm.
    """

    name: str
    transformer: Any
    shares_forwards: bool = False
    skips_blocks: bool = False
    is_ready: bool = True

    def warm_up(self, device: str, dtype: torch.dtype) -> None:
        """Run it once for every kind of forward that a request may need, so that none of them compiles."""
        for batch in (1, 2) if self.shares_forwards else (1,):
            for num_tokens in _WARM_TOKENS:
                with torch.no_grad():
                    self.transformer(**_inputs(self.transformer.config, batch, num_tokens, device, dtype))
        self.is_ready = True


_UNCOMPILED = (Tier("none", None), Tier("regular", None, shares_forwards=True))


def uncompiled(offered: Sequence[Tier]) -> list[Tier]:
    """With LoRAs, whose forwards are not compiled: those of the same names, on the transformer that has the LoRAs."""
    names = {tier.name for tier in offered}
    return [tier for tier in _UNCOMPILED if tier.name in names]


def build(pipeline: Any, placement: Placement, device: str, *, is_whole: bool) -> list[Tier]:
    """The tiers that this device can run and the operator offers, from the most exact; "none" is always there."""
    offered = NAMES[: NAMES.index(placement.max_acceleration) + 1]
    if device == "cpu":
        tiers = [Tier("none", pipeline.transformer), Tier("regular", pipeline.transformer, shares_forwards=True)]
    elif placement.is_eager or not is_whole:
        tiers = [Tier("none", pipeline.transformer)]
    else:
        tiers = _compiled(pipeline.transformer, placement)
    return [tier for tier in tiers if tier.name in offered]


def _compiled(transformer: Any, placement: Placement) -> list[Tier]:
    keep_compiled(placement)
    exact = twin(transformer)
    choose_attention(exact)
    tiers = [Tier("none", compile_blocks(exact), is_ready=False)]
    if reason := _why_no_fp8(transformer, placement):
        log.info("the tiers regular and high are painted as none: %s", reason)
        return tiers
    quantized = twin(exact)
    quantize(quantized)
    compile_blocks(quantized)
    return [
        *tiers,
        Tier("regular", quantized, shares_forwards=True, is_ready=False),
        Tier("high", quantized, skips_blocks=True, is_ready=False),
    ]


def twin(module: Any) -> Any:
    """A copy of a module that has the same weights, not copies of them: changing how it runs leaves the other be."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def compile_blocks(transformer: Any) -> Any:
    """Compile each kind of block once, for all sizes."""
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
    return transformer


def quantize(transformer: Any) -> None:
    """The blocks' large matrices in fp8, a scale a row; inputs are quantized as they come."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(transformer, config, filter_fn=is_large_matrix)


def is_large_matrix(module: torch.nn.Module, name: str) -> bool:
    """Whether a module is one of the matrices that the tokens go through."""
    return isinstance(module, torch.nn.Linear) and "transformer_blocks." in name and ".norm" not in name


def choose_attention(transformer: Any) -> None:
    """The fastest exact attention there is: FlashAttention 3 if it is installed, else cuDNN's on Hopper and later."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    major, _ = torch.cuda.get_device_capability()
    if major < 9:
        return
    # Choosing for one transformer also changes what all others take by default, which is put back.
    before, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        transformer.set_attention_backend(
            "_flash_3" if major == 9 and find_spec("flash_attn_interface") else "_native_cudnn"
        )
    except (RuntimeError, ValueError) as error:
        log.warning("PyTorch's own choice of attention is taken: %s", error)
    finally:
        _AttentionBackendRegistry.set_active_backend(before)


def keep_compiled(placement: Placement) -> None:
    """Keep what is compiled on disk, apart for each version of PyTorch, Triton, diffusers and each kind of card."""
    if placement.compile_cache is None:
        return
    from importlib.metadata import version

    import diffusers

    triton, torchao = (version(name) if find_spec(name) else "none" for name in ("triton", "torchao"))
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    key = (
        f"torch-{torch.__version__} triton-{triton} torchao-{torchao} diffusers-{diffusers.__version__} {card}".replace(
            " ", "_"
        )
    )
    folder = placement.compile_cache / key.replace("/", "-")
    for name, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(name, str(folder / part))


def _why_no_fp8(transformer: Any, placement: Placement) -> str | None:
    if placement.max_acceleration == "none":
        return "the operator offers nothing faster"
    if torch.cuda.get_device_capability() < (8, 9):
        return f"{torch.cuda.get_device_name()} has no fp8 matrix products"
    if not find_spec("torchao"):
        return "torchao is not installed; pip install 'flux-server[fp8]'"
    free, _ = torch.cuda.mem_get_info()
    needed = sum(weight.nbytes for weight in transformer.parameters()) * (0.5 + WORKSPACE)
    if needed > free:
        return f"a copy in fp8 needs {needed / 1e9:.0f} GB more, {free / 1e9:.0f} GB are free"
    return None


def _inputs(config: Any, batch: int, num_tokens: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a forward of so many generations and tokens takes."""
    make: Callable[..., torch.Tensor] = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
    return {
        "hidden_states": make(batch, num_tokens, config.in_channels),
        "encoder_hidden_states": make(batch, NUM_TOKENS, config.joint_attention_dim),
        "pooled_projections": make(batch, config.pooled_projection_dim),
        "timestep": torch.full([batch], 0.5, device=device, dtype=dtype),
        "guidance": torch.full([batch], 3.5, device=device) if config.guidance_embeds else None,
        "img_ids": torch.zeros(num_tokens, 3, device=device, dtype=dtype),
        "txt_ids": torch.zeros(NUM_TOKENS, 3, device=device, dtype=dtype),
        "return_dict": False,
    }


def nearest(tiers: Sequence[Tier], name: str) -> Tier:
    """The tier of this name, or the next lower one that is ready."""
    wanted = NAMES[: NAMES.index(name) + 1]
    return [tier for tier in tiers if tier.name in wanted and (tier.is_ready or tier.name == "none")][-1]
