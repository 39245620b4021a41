"""The images that a request comes with: what each is for, and the size that they give the generated image."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.Image import Image

from models.base import GenerationFailed, IncompatibleInput
from models.flux import kontext
from models.loading import specs

#: The name of a control LoRA that the request brings.
OWN = "own"


@dataclass(frozen=True)
class InputImages:
    """The input images of a request, in RGB.

    Attributes:
        start: the image that generation starts from; None to start from noise.
        mask: the mask of `start`, white where the image changes; None to change it everywhere.
        hole: the mask of `start`, white where FLUX.1 Fill fills it; None for other weights.
        prompt: the image that takes the place of the prompt; None to use the prompt.
        after_prompt: the image whose tokens follow those of the prompt; None for none.
        reference: the image that the transformer of Kontext looks at; None for none.
        control: the image that the transformer of Canny or Depth, or of [dev] with a control LoRA, follows; or None.
        control_by: what of `control` it follows, "canny" or "depth"; empty if `control` shows edges or depths already.
        control_lora: the control LoRA for `control`: "canny" or "depth" for one of the server's, "own" for that of the
            request, and empty for the transformers of Canny and Depth.
    """

    start: Image | None = None
    mask: Image | None = None
    hole: Image | None = None
    prompt: Image | None = None
    after_prompt: Image | None = None
    reference: Image | None = None
    control: Image | None = None
    control_by: str = ""
    control_lora: str = ""

    def on(self, kind: str) -> "InputImages":
        """Return the images as a transformer of this kind takes them.

        [dev] follows edges and depths with the server's control LoRA where Canny and Depth do by themselves.
        """
        if self.control and kind == "plain" and not self.control_lora:
            return dataclasses.replace(self, control_lora=self.control_by)
        return self

    def check(self, kind: str, *, has_redux: bool, has_depth: bool, control_loras: Collection[str]) -> None:
        """Raise GenerationFailed if an engine cannot take these images.

        `kind` is that of its transformer. The other arguments say whether it has the weights of Redux, and those that
        find depths, and which control LoRAs it has.
        """
        needed = "fill" if self.hole else "control" if self.control and not self.control_lora else "plain"
        if needed != kind:
            message = f"This endpoint needs the kind of weights {needed!r}, but the server's are of the kind {kind!r}."
            raise GenerationFailed(message)
        if (self.prompt or self.after_prompt) and not has_redux:
            raise GenerationFailed(f"An image cannot be a prompt, because {specs.REDUX.hub_id} is missing here.")
        if self.control_by == "depth" and self.control_lora == OWN and not has_depth:
            message = "Depths cannot be found here; send an image that shows depths, with preprocess None."
            raise IncompatibleInput(("control_loras", 0, "preprocess"), message)
        if self.control_by == "depth" and not has_depth:
            raise GenerationFailed(f"Depths cannot be found, because {specs.DEPTH.hub_id} is missing here.")
        if self.control_lora in specs.CONTROL_LORAS and self.control_lora not in control_loras:
            missing = specs.CONTROL_LORAS[self.control_lora].hub_id
            raise GenerationFailed(f"A control image cannot be followed, because {missing} is missing here.")


def read(request: Any, files: Mapping[str, Path]) -> InputImages:
    """Read the files of a request's images by their fields into memory. Raises OSError."""
    image, mask, reference = (_open(files.get(name)) for name in ("image_url", "mask_url", "reference_image_url"))
    role = getattr(request, "image_role", "start")
    match role:
        case "prompt":
            return InputImages(prompt=image)
        case "reference":
            return InputImages(reference=image)
        case "fill":
            return InputImages(start=image, hole=mask, after_prompt=_open(files.get("fill_image.fill_image_url")))
        case "canny" | "depth":
            return InputImages(control=image, control_by=role)
    if control := _open(files.get("control_lora_image_url")):
        by = request.control_lora if getattr(request, "preprocess_depth", True) else ""
        return InputImages(start=image, control=control, control_by=by, control_lora=request.control_lora)
    if control := _open(files.get("control_loras.0.control_image_url")):
        preprocess = request.control_loras[0].preprocess
        by = "" if preprocess == "None" else preprocess
        return InputImages(start=image, mask=mask, control=control, control_by=by, control_lora=OWN)
    return InputImages(start=image, mask=mask, reference=reference)


def open_image(path: Path) -> Image:
    """Read the PNG file of an input image into memory. Raises OSError."""
    with PIL.Image.open(path, formats=("PNG",)) as image:
        image.load()
        return image


def _open(path: Path | None) -> Image | None:
    return open_image(path) if path else None


def requested_size(request: Any, images: InputImages, multiple: int) -> tuple[int, int]:
    """Return the requested width and height in pixels; by default, those of the image that generation starts from.

    A token covers `multiple` pixels in both directions.
    Raises GenerationFailed without either, which only endpoints of --models-dir allow.
    """
    size = getattr(request, "image_size", None)
    if size is not None:
        return size.width, size.height
    if found := images.start or images.control:
        return found.size
    if images.reference:
        return kontext.size_for(getattr(request, "resolution_mode", "match_input"), images.reference, multiple)
    raise GenerationFailed("The size is unknown: the request has neither image_size nor an image to start from.")
