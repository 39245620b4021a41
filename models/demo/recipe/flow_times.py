"""The times of the flow: 0 is the picture, 1 is noise."""

import math

import torch

from models.demo.recipe.plan import TOKEN_PIXELS
from models.demo.recipe.pool import Size


def tokens_of(size: Size) -> int:
    """Picture tokens of a size in pixels."""
    return (size[0] // TOKEN_PIXELS) * (size[1] // TOKEN_PIXELS)


def shifted(times: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Times moved towards noise as FluxPipeline's scheduler moves its steps for a picture of that many tokens."""
    shift = math.exp(0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256))
    return shift * times / (1 + (shift - 1) * times)


def sample(number: int, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Half from the middle, where there is most to see; a third from near noise, where the text alone decides.

    The rest is from anywhere, the ends included.
    """
    middle = shifted(torch.randn(number, generator=generator).sigmoid(), num_tokens)
    early = 1 - 0.3 * torch.rand(number, generator=generator).square()
    anywhere = torch.rand(number, generator=generator)
    chance = torch.rand(number, generator=generator)
    return torch.where(chance < 0.5, middle, torch.where(chance < 0.85, early, anywhere))
