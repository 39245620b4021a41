"""Inpainting as in diffusers' FluxInpaintPipeline: after each step, the unmasked part of the image is restored."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from models.flux.image_encoder import ImageEncoder


@dataclass(frozen=True)
class Inpainting:
    """The input image, the noise and the mask of a sample, packed as its latents: (1, image tokens, channels).

    The mask is 1 where the image changes, and 0 where it stays.
    """

    image: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor

    def restore(self, latents: torch.Tensor, scheduler: Any, timestep: torch.Tensor | None) -> torch.Tensor:
        """Return the latents with the unmasked part of the image, as noisy as at the next `timestep`.

        `timestep` has the shape (1,); it is None after the last step, when the image has no noise.
        """
        noisy_image = self.image if timestep is None else scheduler.scale_noise(self.image, timestep, self.noise)
        return (1 - self.mask) * noisy_image + self.mask * latents


def packed_mask(encoder: ImageEncoder, mask: Image, like: torch.Tensor) -> torch.Tensor:
    """Return a mask packed as the latents `like`, of shape (1, channels, rows, columns), in their type and device."""
    _, num_channels, rows, columns = like.shape
    cells = torch.nn.functional.interpolate(encoder.mask(mask), size=(rows, columns)).to(like)
    return encoder.pack(cells.repeat(1, num_channels, 1, 1))
