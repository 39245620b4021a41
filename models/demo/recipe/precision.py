"""What training computes in."""

import torch

from models.loading import cpu


def mixed(device: str) -> torch.autocast:
    """Matrix products in bfloat16, where the device has them; a CPU that would emulate them computes in float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or cpu.has_bfloat16())
