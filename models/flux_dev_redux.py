"""fal-ai/flux/dev/redux: FLUX.1 [dev], variations of an image."""

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
    """A request without a prompt: the input image takes its place."""

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
        """The empty prompt."""
        return ""


class FluxDevRedux(FluxDev):
    """FLUX.1 [dev] generating variations of an image, which FLUX.1 Redux [dev] reads."""

    endpoint = "fal-ai/flux/dev/redux"
    extra_weights = REDUX
    Input = FluxDevReduxInput

    def metadata(self, request: Any, seed: int) -> dict[str, Any]:
        """Return the parameters of one image, without the URL of the input image, as URLs may reveal personal data."""
        parameters = super().metadata(request, seed)
        del parameters["prompt"]
        return parameters


MODEL = FluxDevRedux()
