"""fal-ai/flux/dev/image-to-image: FLUX.1 [dev], image and prompt to image."""

from typing import Any

from pydantic import Field

from models.flux_dev import FluxDev
from models.schema import (
    AccelerationField,
    EnableSafetyChecker,
    Guidance,
    ImageInput,
    ImageURL,
    NumImages,
    OptionalSeed,
    OutputFormatField,
    Prompt,
    Steps,
    Strength,
    SyncMode,
)


class FluxDevImageToImageInput(ImageInput):
    """A request to change an image. The output has the size of the input image, rounded down to multiples of 16."""

    image_url: ImageURL
    strength: Strength = 0.95
    num_inference_steps: Steps = Field(40, ge=10, le=50)
    prompt: Prompt
    seed: OptionalSeed = None
    guidance_scale: Guidance = 3.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "jpeg"
    acceleration: AccelerationField = "none"


class FluxDevImageToImage(FluxDev):
    """FLUX.1 [dev], starting from an image and changing it towards a prompt."""

    endpoint = "fal-ai/flux/dev/image-to-image"
    Input = FluxDevImageToImageInput

    def metadata(self, request: Any, seed: int) -> dict[str, Any]:
        """Return FluxDev's parameters and the strength. The input image's URL is left out: it may be private."""
        return {**super().metadata(request, seed), "strength": request.strength}


MODEL = FluxDevImageToImage()
