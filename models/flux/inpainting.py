"""Inpainting as in diffusers' FluxInpaintPipeline: after each step, the unmasked part of the image is restored."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image


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


def packed_mask(
    pipeline: Any, mask: Image, size: tuple[int, int], num_channels: int, like: torch.Tensor
) -> torch.Tensor:
    """Scale a mask to `size`, (width, height) in pixels, and round it to 0 or 1; return it packed as the latents.

    Light areas become 1. The result has the number type and the device of `like`.
    """
    width, height = size
    multiple = pipeline.vae_scale_factor * 2
    processor = VaeImageProcessor(
        vae_scale_factor=multiple, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    pixels = processor.preprocess(mask, height=height, width=width)
    rows, columns = 2 * (height // multiple), 2 * (width // multiple)
    cells = torch.nn.functional.interpolate(pixels, size=(rows, columns)).to(like)
    packed: torch.Tensor = pipeline._pack_latents(cells.repeat(1, num_channels, 1, 1), 1, num_channels, rows, columns)
    return packed
