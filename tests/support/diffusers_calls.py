"""The calls of diffusers' own pipelines that requests must equal."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from PIL.Image import Image

from models.flux.prompt_cache import count_text_tokens

SEED = 5


def pipeline_of(kind: Any, parts: Mapping[str, Any]) -> Any:
    """Build a pipeline of a class of diffusers from those parts that the class has."""
    taken = inspect.signature(kind.__init__).parameters
    pipeline = kind(**{name: part for name, part in parts.items() if name in taken})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_of(pipeline: Any, request: Any, size: tuple[int, int], *, seed: int = SEED, **arguments: Any) -> Image:
    """Generate a request's image with a pipeline, given the arguments that are not numbers and texts of the request.

    The sides are rounded down as the engine rounds them. The strength counts if there is an image to start from, and
    the negative prompt if there is real guidance.
    """
    multiple = 2 * pipeline.vae_scale_factor
    width, height = (side // multiple * multiple for side in size)
    if "image" in arguments and hasattr(request, "strength"):
        arguments["strength"] = request.strength
    if getattr(request, "use_real_cfg", False):
        arguments |= {"true_cfg_scale": request.real_cfg_scale, "negative_prompt": request.negative_prompt}
    found: Image = pipeline(
        prompt=request.prompt,
        width=width,
        height=height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        max_sequence_length=count_text_tokens(pipeline),
        **arguments,
    ).images[0]
    return found
