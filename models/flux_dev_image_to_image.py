"""fal-ai/flux/dev/image-to-image: FLUX.1 [dev], a picture painted over another."""

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
    """A request; the picture that comes out has the size of the one that goes in."""

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
    """FLUX.1 [dev] painting over a picture: what it shows is changed towards the prompt."""

    endpoint = "fal-ai/flux/dev/image-to-image"
    Input = FluxDevImageToImageInput

    def metadata(self, request: Any, seed: int) -> dict[str, Any]:
        """Of one picture; the one it was painted over is not named, because addresses tell about people."""
        return {**super().metadata(request, seed), "strength": request.strength}


MODEL = FluxDevImageToImage()
