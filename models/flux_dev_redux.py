"""fal-ai/flux/dev/redux: FLUX.1 [dev], variations of a picture."""

from typing import Any

from pydantic import Field

from models.flux_dev import FluxDev
from models.loading.specs import REDUX
from models.schema import (
    ChecksSafety,
    Format,
    GivenSeed,
    Guidance,
    ImageInput,
    ImageURL,
    NumImages,
    Size,
    Speed,
    Steps,
    SyncMode,
)


class FluxDevReduxInput(ImageInput):
    """A request without a prompt: the picture says what to paint."""

    image_url: ImageURL
    image_size: Size = Field("landscape_4_3", validate_default=True, description="The size of the generated image.")
    num_inference_steps: Steps = Field(28, ge=1, le=50)
    seed: GivenSeed = None
    guidance_scale: Guidance = 3.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: ChecksSafety = True
    output_format: Format = "jpeg"
    acceleration: Speed = "none"

    @property
    def prompt(self) -> str:
        """None was given."""
        return ""


class FluxDevRedux(FluxDev):
    """FLUX.1 [dev] painting variations of a picture, as FLUX.1 Redux [dev] reads it."""

    endpoint = "fal-ai/flux/dev/redux"
    add_on = REDUX
    Input = FluxDevReduxInput

    def parameters(self, request: Any, seed: int) -> dict[str, Any]:
        """Of one picture; the one that it varies is not named, because addresses tell about people."""
        told = super().parameters(request, seed)
        del told["prompt"]
        return told


MODEL = FluxDevRedux()
