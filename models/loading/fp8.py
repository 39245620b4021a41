"""Matrix products in fp8: the quantization of a transformer's large matrices by torchao, and whether a GPU can use it.

Each matrix has a scale per row, and each forward quantizes the inputs of these matrices too, with a scale per token.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def quantize(transformer: Any, device: str | None = None) -> None:
    """Quantize the blocks' large matrices to fp8 in place.

    With a device, each matrix moves there before it is quantized, so the device never holds all of them in bf16. All
    other weights move there too.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    # With True, torchao would change Inductor's options for unquantized tiers too, and in the calling thread only.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(transformer, config, filter_fn=is_large_matrix, device=device)


def is_large_matrix(module: "torch.nn.Module", name: str) -> bool:
    """Return whether a module is a linear layer that a block applies to every token; the layers of norms are not."""
    import torch

    return isinstance(module, torch.nn.Linear) and "transformer_blocks." in name and ".norm" not in name


def unavailable_reason() -> str | None:
    """Return the reason why the GPU cannot multiply in fp8; None if it can."""
    import torch

    if torch.cuda.get_device_capability() < (8, 9):
        return f"{torch.cuda.get_device_name()} does not support fp8 matrix products"
    if not find_spec("torchao"):
        return "torchao is not installed; run pip install 'flux-server[fp8]'"
    return None
