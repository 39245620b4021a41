"""FLUX.1 Fill: the transformer sees what the mask leaves of an image, as in FluxFillPipeline."""

from typing import Any

import PIL.Image
import torch
from PIL.Image import Image

from models.flux.image_encoder import ImageEncoder
from models.flux.input_images import InputImages


def channels(encoder: ImageEncoder, inputs: InputImages) -> torch.Tensor:
    """Return the channels that the transformer sees next to the latents, of shape (1, image tokens, channels).

    First come the latents of the image without its masked part, then the mask, one channel for each pixel that a token
    covers.
    """
    assert inputs.start and inputs.hole
    factor, hole = encoder.pipeline.vae_scale_factor, encoder.mask(inputs.hole)
    latents = encoder.latents(encoder.pixels(inputs.start) * (1 - hole)).to(encoder.dtype)
    rows, columns = latents.shape[2:]
    # Each latent covers factor x factor pixels.
    cells = hole[:, 0].view(1, rows, factor, columns, factor).permute(0, 2, 4, 1, 3)
    cells = cells.reshape(1, factor * factor, rows, columns).to(device=encoder.device, dtype=encoder.dtype)
    return torch.cat([encoder.pack(latents), encoder.pack(cells)], dim=-1)


def finish(image: Image, request: Any, inputs: InputImages) -> Image:
    """Return a generated image as the request wants it: in the size of the original, with the original around the hole.

    The fields are `resize_to_original` and `paste_back`.
    """
    original, hole = inputs.start, inputs.hole
    if original is None or hole is None:
        return image
    if request.resize_to_original:
        image = image.resize(original.size, PIL.Image.Resampling.LANCZOS)
    if request.paste_back:
        original, hole = (
            part.resize(image.size, PIL.Image.Resampling.LANCZOS) for part in (original, hole.convert("L"))
        )
        # White or black, as the transformer sees the mask.
        image = PIL.Image.composite(image, original, hole.point(lambda value: 255 * (value >= 128)))
    return image
