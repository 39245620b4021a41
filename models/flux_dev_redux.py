"""fal-ai/flux/dev/redux: FLUX.1 [dev], variations of an image, without a prompt."""

from typing import Any

from pydantic import Field

from models.flux_dev import FluxDev
from models.loading.specs import REDUX
from models.schema import (
    AccelerationField,
    EnableSafetyChecker,
    Guidance,
    ImageInput,
    ImageURL,
    NumImages,
    OptionalSeed,
    OutputFormatField,
    Size,
    Steps,
    SyncMode,
)


class FluxDevReduxInput(ImageInput):
    """A request in which an image takes the place of the prompt."""

    image_url: ImageURL
    image_size: Size = Field("landscape_4_3", validate_default=True, description="The size of the generated image.")
    num_inference_steps: Steps = Field(28, ge=1, le=50)
    seed: OptionalSeed = None
    guidance_scale: Guidance = 3.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "jpeg"
    acceleration: AccelerationField = "none"

    @property
    def prompt(self) -> str:
        """An empty prompt, because the output has a field for the prompt."""
        return ""


class FluxDevRedux(FluxDev):
    """FLUX.1 [dev] with FLUX.1 Redux [dev], which generates variations of an image."""

    endpoint = "fal-ai/flux/dev/redux"
    extra_weights = REDUX
    Input = FluxDevReduxInput

    def metadata(self, request: Any, seed: int) -> dict[str, Any]:
        """Return FluxDev's parameters without the prompt. The input image's URL is left out: it may be private."""
        parameters = super().metadata(request, seed)
        del parameters["prompt"]
        return parameters


MODEL = FluxDevRedux()
