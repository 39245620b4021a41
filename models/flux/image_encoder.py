"""The encoding of input images into latents, as diffusers' FLUX pipelines do it."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux_img2img import retrieve_latents
from diffusers.utils.torch_utils import randn_tensor
from PIL.Image import Image


@dataclass(frozen=True)
class ImageEncoder:
    """The autoencoder, and how the input images of one sample are encoded.

    Attributes:
        pipeline: a FluxPipeline.
        size: the width and height in pixels to which images are scaled.
        dtype: the number type of the latents.
        device: the device of the latents.
        generator: what random numbers come from, in the order of the calls.
    """

    pipeline: Any
    size: tuple[int, int]
    dtype: torch.dtype
    device: str
    generator: torch.Generator

    def pixels(self, image: Image) -> torch.Tensor:
        """Return an image's values from -1 to 1 in float32 on the CPU, of shape (1, 3, height, width)."""
        width, height = self.size
        values: torch.Tensor = self.pipeline.image_processor.preprocess(image, height=height, width=width)
        return values.to(torch.float32)

    def mask(self, mask: Image) -> torch.Tensor:
        """Return a mask as 0 and 1, for areas darker and lighter than middle grey, of shape (1, 1, height, width)."""
        width, height = self.size
        processor = VaeImageProcessor(
            vae_scale_factor=2 * self.pipeline.vae_scale_factor,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )
        values: torch.Tensor = processor.preprocess(mask, height=height, width=width)
        return values

    def latents(self, pixels: torch.Tensor, mode: str = "sample") -> torch.Tensor:
        """Return scaled latents of shape (1, channels, height, width).

        `mode` says which value of the encoder's distribution: "sample" for a random one, "argmax" for the middle.
        """
        config = self.pipeline.vae.config
        distribution = self.pipeline.vae.encode(pixels.to(device=self.device, dtype=self.dtype))
        encoded: torch.Tensor = retrieve_latents(distribution, self.generator, mode)
        return (encoded - config.shift_factor) * config.scaling_factor

    def noise(self, shape: torch.Size) -> torch.Tensor:
        """Return normally distributed numbers."""
        drawn: torch.Tensor = randn_tensor(
            shape, generator=self.generator, device=torch.device(self.device), dtype=self.dtype
        )
        return drawn

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents in the shape that the transformer takes, (1, image tokens, 4 * channels)."""
        packed: torch.Tensor = self.pipeline._pack_latents(latents, *latents.shape)
        return packed
