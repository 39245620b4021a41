"""Weights in 8 or 4 bits, for products in bf16: the quantization of linear layers at load by torchao.

A product first restores its matrix to the type of its inputs, so any device can multiply, compiled or not.
docs/weights-and-memory.md says why torchao was chosen.
"""

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: In 4 bits, so many neighbouring numbers of a matrix share a scale, and at most so many scales share another.
_BLOCK, _SCALES = 64, 256
#: Bytes of a number in each form. In 8 bits, each row has a scale in bf16, 0.002 bytes a number in the narrowest matrix
#: of FLUX.1. In 4 bits, a block has a scale of a byte, and 256 scales share one in bf16.
BYTES = {"int8": 1.002, "int4": 0.5 + 1 / _BLOCK + 2 / _BLOCK / _SCALES}
#: The containers of the blocks of a FluxTransformer2DModel and of T5's encoder.
_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.", "encoder.block.")


def quantize(model: Any, kind: str, device: str) -> None:
    """Quantize the linear layers of a model's blocks in place, and move the model to the device.

    `kind` is "int8", with a scale for each row, or "int4", the 16 values of NF4 with a scale for each 64 numbers. Each
    matrix moves to the device before it is quantized, so the device never holds two of them in full.
    """
    import torch

    for layer in linear_layers_of_blocks(model):
        quantized = _QUANTIZERS[kind](layer.weight.detach().to(device))
        layer.weight = torch.nn.Parameter(quantized, requires_grad=False)
    model.to(device)


def linear_layers_of_blocks(model: Any) -> "Iterator[torch.nn.Linear]":
    """Yield the linear layers that are quantized: those of the blocks. The first and last layers of a model are not."""
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(_BLOCKS):
            yield module


def _int8(weight: "torch.Tensor") -> "torch.Tensor":
    from torchao.quantization import Int8Tensor, PerRow

    quantized: torch.Tensor = Int8Tensor.from_hp(weight, granularity=PerRow())
    return quantized


def _int4(weight: "torch.Tensor") -> "torch.Tensor":
    from torchao.quantization import to_nf4

    # torchao asks that blocks fill the matrix, and scales their groups. Those of FLUX.1 always do.
    if weight.numel() % _BLOCK:
        return weight
    quantized: torch.Tensor = to_nf4(weight, _BLOCK, math.gcd(weight.numel() // _BLOCK, _SCALES))
    return quantized


_QUANTIZERS = {"int8": _int8, "int4": _int4}


def unavailable_reason() -> str | None:
    """Return the reason why weights cannot be quantized to 8 or 4 bits; None if they can."""
    return None if find_spec("torchao") else "torchao is not installed; run pip install 'flux-server[quantize]'"
