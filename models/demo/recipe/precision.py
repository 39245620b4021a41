"""The number type of training."""

import torch

from models.loading import cpu


def mixed(device: str) -> torch.autocast:
    """Return a context with matrix products in bfloat16, or in float32 on a CPU that would emulate bfloat16."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or cpu.has_bfloat16())
