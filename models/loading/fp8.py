"""Matrix products in fp8: the quantization of a transformer's large matrices by torchao, and whether a GPU can use it.

Each matrix has a scale per row, and each forward quantizes the inputs of these matrices too, with a scale per token.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


#: The layers that `fuse_projections` joins, by their names in FluxAttention.
_JOINED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def quantize(transformer: Any, device: str | None = None) -> None:
    """Quantize the blocks' large matrices to fp8 in place, with query, key and value joined to one matrix.

    Joined, they are one product instead of three, with the same result, because each row has its own scale. With a
    device, each matrix moves there before it is quantized, and all other weights move there too. This goes block by
    block, so the device never holds all matrices in bf16.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    # With True, torchao would change Inductor's options for unquantized tiers too, and in the calling thread only.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    for name, blocks in transformer.named_children():
        if name.endswith("transformer_blocks"):
            for block in blocks:
                _join_projections(block.attn)
                quantize_(block, config, filter_fn=_is_large_matrix_of_a_block, device=device)
    if device:
        transformer.to(device)


def _join_projections(attention: Any) -> None:
    attention.fuse_projections()
    for name in _JOINED:
        if hasattr(attention, name):
            delattr(attention, name)


def is_large_matrix(module: "torch.nn.Module", name: str) -> bool:
    """Return whether a module is a linear layer that a block applies to every token; the layers of norms are not."""
    _, is_in_block, name_in_block = name.partition("transformer_blocks.")
    return bool(is_in_block) and _is_large_matrix_of_a_block(module, name_in_block)


def _is_large_matrix_of_a_block(module: "torch.nn.Module", name: str) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) and "norm" not in name


def unavailable_reason() -> str | None:
    """Return the reason why the GPU cannot multiply in fp8; None if it can."""
    import torch

    if torch.cuda.get_device_capability() < (8, 9):
        return f"{torch.cuda.get_device_name()} does not support fp8 matrix products"
    if not find_spec("torchao"):
        return "torchao is not installed; run pip install 'flux-server[quantize]'"
    return None
