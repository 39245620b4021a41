"""Real classifier-free guidance, which leads away from a negative prompt, as FluxPipeline's `true_cfg_scale`."""

from dataclasses import dataclass
from typing import Any

import torch

from models.flux.prompt_cache import PromptEmbeds


@dataclass(frozen=True)
class RealCfg:
    """The encoded negative prompt of a sample, and how far to go away from it."""

    text: PromptEmbeds
    scale: float

    def guide(self, velocity: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Return the velocity for the prompt, led away from the velocity for the negative prompt."""
        return negative + self.scale * (velocity - negative)


def is_used(request: Any) -> bool:
    """Return whether a request asks for real guidance. Each of its steps then takes two forwards."""
    return bool(getattr(request, "use_real_cfg", False) and request.real_cfg_scale > 1)
