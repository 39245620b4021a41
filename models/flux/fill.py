"""FLUX.1 Fill: the transformer sees what the mask leaves of an image, as in FluxFillPipeline."""

from typing import Any

import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux_img2img import retrieve_latents
from PIL.Image import Image

from models.flux.input_images import InputImages


def channels(
    pipeline: Any,
    inputs: InputImages,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the channels that the transformer sees next to the latents, of shape (1, image tokens, channels).

    First come the latents of the image without its masked part, then the mask, one channel for each pixel that a token
    covers. `size` is (width, height) in pixels.
    """
    (width, height), factor, config = size, pipeline.vae_scale_factor, pipeline.vae.config
    mask_processor = VaeImageProcessor(
        vae_scale_factor=2 * factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    pixels = pipeline.image_processor.preprocess(inputs.start, height=height, width=width).to(torch.float32)
    hole = mask_processor.preprocess(inputs.hole, height=height, width=width)
    kept = (pixels * (1 - hole)).to(device=device, dtype=dtype)
    encoded = retrieve_latents(pipeline.vae.encode(kept), generator)
    latents = ((encoded - config.shift_factor) * config.scaling_factor).to(dtype)
    rows, columns = latents.shape[2:]
    # Each latent covers factor x factor pixels.
    cells = hole[:, 0].view(1, rows, factor, columns, factor).permute(0, 2, 4, 1, 3)
    cells = cells.reshape(1, factor * factor, rows, columns)
    packed = (pipeline._pack_latents(part, *part.shape) for part in (latents, cells.to(device=device, dtype=dtype)))
    return torch.cat(list(packed), dim=-1)


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
        original, hole = (part.resize(image.size, PIL.Image.Resampling.LANCZOS) for part in (original, hole))
        image = PIL.Image.composite(image, original, hole.convert("L"))
    return image
