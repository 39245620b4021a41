"""Weights that bitsandbytes quantized, on a fake GPU with FLUX.1's shapes: devices and types fit, and the plan holds.

The layers and the operators are the library's own. Only its class of weights is replaced, because PyTorch cannot make
a subclass of a fake tensor.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import Linear, Module, Parameter

from models.benchmark import random_weights
from models.flux.acceleration import Tier
from models.flux.engine import FluxEngine
from models.flux.safety_checker import Unavailable
from tests.cuda.engines import RESIDENT, SIDE, Files, generate, lora_weights, request
from tests.cuda.engines import files as files
from tests.cuda.fake_gpu import H100, fake_gpu
from tests.cuda.recorder import recorded

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(900)]


def nf4(weight: torch.Tensor, shape: tuple[int, int, bool]) -> Linear4bit:
    with unset_fake_temporarily():
        layer = Linear4bit(*shape, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    packed, layer.quant_state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    layer.weight = Parameter(packed, requires_grad=False)
    layer.weight.quant_state = layer.quant_state
    return layer


def int8(weight: torch.Tensor, shape: tuple[int, int, bool]) -> Linear8bitLt:
    with unset_fake_temporarily():
        layer = Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
    packed, scales, _ = int8_vectorwise_quant(weight.half())
    layer.weight = Parameter(packed, requires_grad=False)
    layer.weight.CB, layer.weight.SCB = packed, scales
    layer.state.CB, layer.state.SCB = packed, scales
    return layer


def quantize_blocks(transformer: Module, quantize: Callable[..., Module]) -> None:
    """Replace the matrices of all blocks, as diffusers does."""
    for name, module in list(transformer.named_modules()):
        for child, linear in list(module.named_children()):
            if isinstance(linear, Linear) and "transformer_blocks" in name:
                shape = (linear.in_features, linear.out_features, linear.bias is not None)
                layer = quantize(linear.weight.data, shape)
                layer.bias = linear.bias
                setattr(module, child, layer)


@pytest.mark.parametrize("quantize", [nf4, int8])
def test_the_plan_holds_with_and_without_a_lora(
    quantize: Callable[..., Any], files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = random_weights.sizes("full", torch.bfloat16)
    with fake_gpu(H100), recorded() as recorder:
        pipeline = random_weights.build("full", "cuda", torch.bfloat16)
        before = recorder.live
        quantize_blocks(pipeline.transformer, quantize)
        sizes["transformer"] -= before - recorder.live
        monkeypatch.setattr("models.flux.loras.load_file", lambda _: lora_weights(pipeline.transformer))
        engine = FluxEngine(pipeline, Unavailable("not used"), [Tier("none", pipeline.transformer)], "cuda")
        lora = request("none", SIDE, loras=[SimpleNamespace(scale=1.0)])
        peaks = [
            generate(engine, recorder, engine.start(*arguments)).peak
            for arguments in ((request("none", SIDE), 1), (lora, 1, {"loras.0.path": files.lora}))
        ]
        promised = RESIDENT.required_bytes(sizes)
        figures = f"{recorder.live / 1e9:.1f} placed, {peaks[0] / 1e9:.1f}, {peaks[1] / 1e9:.1f} with a LoRA"
        print(
            f"bitsandbytes {bitsandbytes.__version__}, {quantize.__name__}, in GB: {figures},"
            f" {promised / 1e9:.1f} promised"
        )
        assert max(peaks) + 1e9 < promised
