"""Weights that are quantized in their files, on a fake GPU with FLUX.1's shapes: devices and types fit, the plan holds.

The layers and the operators are those of bitsandbytes, and of diffusers for GGUF. Only the classes of weights are
replaced, because PyTorch cannot make a subclass of a fake tensor.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import diffusers
import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from diffusers.quantizers.gguf.utils import GGUFLinear
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
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


def q4_0(weight: torch.Tensor, shape: tuple[int, int, bool]) -> GGUFLinear:
    with unset_fake_temporarily():
        layer = GGUFLinear(*shape, compute_dtype=torch.bfloat16, device="meta")
    values_each, bytes_each = GGML_QUANT_SIZES[GGMLQuantizationType.Q4_0]
    columns = weight.shape[1] // values_each * bytes_each
    packed = torch.empty(len(weight), columns, dtype=torch.uint8, device=weight.device)
    layer.weight = Parameter(packed, requires_grad=False)
    layer.weight.quant_type, layer.weight.as_tensor = GGMLQuantizationType.Q4_0, lambda: packed
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


@pytest.mark.parametrize("quantize", [nf4, int8, q4_0])
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
        versions = f"bitsandbytes {bitsandbytes.__version__}, diffusers {diffusers.__version__}"
        print(f"{versions}, {quantize.__name__}, in GB: {figures}, {promised / 1e9:.1f} promised")
        assert max(peaks) + 1e9 < promised
