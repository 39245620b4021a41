"""fal-ai/flux/schnell: FLUX.1 [schnell], text to image and variations of an image, in one to four steps."""

from typing import Any

from pydantic import Field

from models.base import Model
from models.flux_dev import FluxDev, FluxDevInput, FluxDevRedux
from models.schema import (
    AccelerationField,
    EnableSafetyChecker,
    ImageInput,
    ImageURL,
    NumImages,
    OptionalSeed,
    OutputFormatField,
    Size,
    Steps,
    SyncMode,
)

#: The hub ids of the weights.
SCHNELL = ("black-forest-labs/FLUX.1-schnell",)


class FluxSchnellInput(FluxDevInput):
    """A request for an image in few steps. `guidance_scale` has no effect: FLUX.1 [schnell] takes no guidance."""

    num_inference_steps: Steps = Field(4, ge=1, le=12)


class FluxSchnellReduxInput(ImageInput):
    """A request in which an image takes the place of the prompt, as in FluxDevReduxInput, but without guidance."""

    image_url: ImageURL
    num_inference_steps: Steps = Field(4, ge=1, le=12)
    image_size: Size = Field("landscape_4_3", validate_default=True, description="The size of the generated image.")
    seed: OptionalSeed = None
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "jpeg"
    acceleration: AccelerationField = "none"

    @property
    def prompt(self) -> str:
        """An empty prompt, because the output has a field for the prompt."""
        return ""

    @property
    def guidance_scale(self) -> float:
        """The default guidance of FluxPipeline, for weights that take guidance, such as the demo's."""
        return 3.5


class FluxSchnell(FluxDev):
    """FLUX.1 [schnell], a 12 billion parameter flow transformer that generates an image in one to four steps."""

    endpoint = "fal-ai/flux/schnell"
    weights = SCHNELL
    Input = FluxSchnellInput


class FluxSchnellRedux(FluxDevRedux):
    """FLUX.1 [schnell] with FLUX.1 Redux [dev], which generates variations of an image in one to four steps."""

    endpoint = "fal-ai/flux/schnell/redux"
    weights = SCHNELL
    Input = FluxSchnellReduxInput

    def metadata(self, request: Any, seed: int) -> dict[str, Any]:
        """Return the parameters of FluxDevRedux without the guidance scale, which is not a field of the request."""
        parameters = super().metadata(request, seed)
        del parameters["guidance_scale"]
        return parameters


MODELS: tuple[Model, ...] = (FluxSchnell(), FluxSchnellRedux())
