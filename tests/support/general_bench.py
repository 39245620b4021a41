"""An engine for fal-ai/flux-general with tiny shapes, and the files of its requests on disk."""

from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import torch
from PIL.Image import Image

from models.flux.engine import FluxEngine
from models.flux.task import FluxTask
from models.schema import input_urls
from tests.support import tiny_flux
from tests.support.diffusers_calls import SEED, image_of, pipeline_of
from tests.support.tiny_flux import AllSafeChecker, finish_task, tiers_of

SIZE = (80, 64)


class GeneralBench:
    """An engine on a tiny transformer, and a directory of images and adapters.

    The URLs of its requests are the names of files in the directory, without their extensions. There is an image to
    start from, a mask of its left half, and the images `first` and `second`.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, clip_vision: Path | None = None, **settings: Any) -> None:
        self.directory, self.dtype = directory, dtype
        self._settings = settings
        self.pipeline = tiny_flux.pipeline(dtype)
        self.pipeline.transformer = self.new_transformer()
        tiers = tiers_of(self.pipeline.transformer)
        self.engine = FluxEngine(self.pipeline, AllSafeChecker(), tiers, "cpu", clip_vision=clip_vision)
        rng = numpy.random.default_rng(3)
        for name in ("image", "first", "second"):
            pixels = rng.integers(0, 255, (*SIZE[::-1], 3), dtype=numpy.uint8)
            PIL.Image.fromarray(pixels).save(directory / f"{name}.png")
        mask = PIL.Image.new("L", SIZE)
        mask.paste(255, (0, 0, SIZE[0] // 2, SIZE[1]))
        mask.convert("RGB").save(directory / "mask.png")

    def new_transformer(self) -> Any:
        """Build another transformer with the engine's weights."""
        return tiny_flux.transformer(self.dtype, **self._settings)

    def request(self, kind: Any, **fields: Any) -> Any:
        body = {"prompt": "a fish", "num_inference_steps": 6, "image_size": {"width": SIZE[0], "height": SIZE[1]}}
        urls = {f"{name}_url": name for name in ("image", "mask") if f"{name}_url" in kind.model_fields}
        return kind.model_validate({**body, **urls, **fields})

    def start(self, request: Any, seed: int = SEED) -> FluxTask:
        inputs = {
            ".".join(map(str, loc)): self.directory / f"{url}{'.png' if kind == 'image' else '.safetensors'}"
            for loc, kind, url in input_urls(request)
        }
        return self.engine.start(request, seed, inputs)

    def generate(self, request: Any) -> Image:
        (image,) = finish_task(self.engine, self.start(request))
        return image

    def image(self, name: str) -> Image:
        return PIL.Image.open(self.directory / f"{name}.png")

    def build_pipeline(self, kind: Any, **parts: Any) -> Any:
        """Build a pipeline of a class of diffusers from `parts` and, for the others, the engine's."""
        return pipeline_of(kind, {**self.pipeline.components, **parts})

    def call_diffusers(self, pipeline: Any, request: Any, **more: Any) -> Image:
        """Generate a request's image with a pipeline of diffusers."""
        if hasattr(request, "image_url"):
            more["image"] = self.image("image")
        if hasattr(request, "mask_url"):
            more["mask_image"] = self.image("mask")
        return image_of(pipeline, request, SIZE, **more)
