"""FLUX.1 Kontext: the transformer sees a reference image next to the one that it generates, as FluxKontextPipeline."""

from dataclasses import dataclass

import torch
from PIL.Image import Image

from models import kontext_sizes
from models.flux.image_encoder import ImageEncoder


@dataclass(frozen=True)
class Reference:
    """An encoded reference image: size in pixels, packed latents (1, tokens, channels), position ids (tokens, 3)."""

    size: tuple[int, int]
    latents: torch.Tensor
    ids: torch.Tensor


def size_for(resolution_mode: str, image: Image, multiple: int) -> tuple[int, int]:
    """Return the width and height in pixels of the image to generate.

    "match_input" takes the size of `image`. "auto" and an aspect ratio such as "16:9" take the size that Kontext was
    trained on whose aspect ratio is nearest to that of `image`, or to that one.
    """
    if resolution_mode == "match_input":
        return image.size
    return kontext_sizes.named(resolution_mode) or trained_size(image, multiple)


def trained_size(image: Image, multiple: int) -> tuple[int, int]:
    """Return the width and height in pixels to which a reference image is scaled.

    They are those of the sizes that Kontext was trained on with the nearest aspect ratio, rounded down to multiples of
    `multiple`, the pixels of a token in both directions. As in diffusers, the sides of the image are rounded too.
    """
    width, height = (max(multiple, side // multiple * multiple) for side in image.size)
    width, height = kontext_sizes.nearest(width / height)
    return width // multiple * multiple, height // multiple * multiple


def encode(encoder: ImageEncoder, image: Image) -> Reference:
    """Scale a reference image to the nearest size that Kontext was trained on, and encode it."""
    pipeline, processor = encoder.pipeline, encoder.pipeline.image_processor
    width, height = trained_size(image, pipeline.vae_scale_factor * 2)
    pixels = processor.preprocess(processor.resize(image, height, width), height, width)
    latents = encoder.latents(pixels, "argmax")
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    ids = pipeline._prepare_latent_image_ids(1, rows, columns, encoder.device, encoder.dtype)
    # The first number tells the reference's tokens from those of the image at the same place.
    ids[..., 0] = 1
    return Reference((width, height), encoder.pack(latents), ids)
