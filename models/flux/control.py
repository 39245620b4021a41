"""Canny and depth: the transformer sees an image of edges or of depths, as in FluxControlPipeline."""

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy
import PIL.Image
import torch
from PIL.Image import Image
from transformers import DepthAnythingForDepthEstimation, DPTImageProcessorPil

from models.flux.image_encoder import ImageEncoder
from models.flux.input_images import InputImages
from models.loading import verify

#: The thresholds of Canny's method. Those that FLUX.1 Canny [dev] was trained with are not verified here.
_LOW, _HIGH = 50, 200
#: Images with a larger ratio of the sides are stretched before their depths are found.
MAX_ASPECT_RATIO = 32


def edges(image: Image, size: tuple[int, int]) -> Image:
    """Return the edges of an RGB image by Canny's method, white on black in RGB, in `size`, (width, height)."""
    pixels = numpy.asarray(image.resize(size, PIL.Image.Resampling.LANCZOS))
    return PIL.Image.fromarray(cv2.Canny(pixels, _LOW, _HIGH)).convert("RGB")


class DepthEstimator:
    """A DepthAnythingForDepthEstimation model with its image processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor

    @classmethod
    def load(cls, directory: Path, device: str, dtype: torch.dtype) -> "DepthEstimator":
        """Load the weights onto the device. Raises OSError if they cannot be loaded: BadWeights if malformed."""
        verify.verify(directory)
        with verify.translate_errors(directory):
            model = verify.load_complete(
                DepthAnythingForDepthEstimation, directory, dtype=dtype, trust_remote_code=False
            )
            # The Pillow variant scales images identically everywhere and does not need torchvision.
            processor = DPTImageProcessorPil.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        return cls(model.to(device), processor)

    @torch.no_grad()
    def depths(self, image: Image, size: tuple[int, int]) -> Image:
        """Return the depths of an image, white nearest in RGB, in `size`, (width, height).

        They are those of DepthEstimationPipeline, scaled.
        """
        # In a narrower image, the processor would leave no pixel of the shorter side.
        least = max(image.size) // MAX_ASPECT_RATIO
        image = image.resize((max(image.width, least), max(image.height, least)))
        inputs = self._processor(images=image, return_tensors="pt").to(self._model.device, self._model.dtype)
        outputs = self._model(**inputs)
        (found,) = self._processor.post_process_depth_estimation(outputs, [(image.height, image.width)])
        depths = found["predicted_depth"].float().cpu().numpy()
        # An image of one colour can have one depth everywhere.
        spread = max(float(depths.max() - depths.min()), 1e-12)
        grey = PIL.Image.fromarray(numpy.uint8((depths - depths.min()) / spread * 255))
        return grey.convert("RGB").resize(size, PIL.Image.Resampling.LANCZOS)


def prepare(images: InputImages, size: tuple[int, int], estimator: DepthEstimator | None) -> InputImages:
    """Return the input images of a task with edges or depths in place of the image whose edges or depths to follow."""
    if images.control and images.control_by == "canny":
        return dataclasses.replace(images, control=edges(images.control, size), control_by="")
    if images.control and images.control_by and estimator:
        return dataclasses.replace(images, control=estimator.depths(images.control, size), control_by="")
    return images


def channels(encoder: ImageEncoder, image: Image) -> torch.Tensor:
    """Return the latents of an image of edges or depths, packed: (1, image tokens, channels)."""
    # The order of the numbers in memory decides the last bits of the encoder's result: here it is the pipeline's.
    return encoder.pack(encoder.latents(encoder.pixels(image).contiguous()))
