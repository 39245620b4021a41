"""The number type of training."""

import torch

from models.loading import cpu


def is_fast(device: str) -> bool:
    """Return whether the device multiplies in bfloat16 faster than in float32. Some CPUs only emulate bfloat16."""
    return device != "cpu" or cpu.has_bfloat16()


def mixed(device: str) -> torch.autocast:
    """Return a context with matrix products in bfloat16, or in float32 on a CPU that would emulate bfloat16."""
    return torch.autocast(device, torch.bfloat16, enabled=is_fast(device))
