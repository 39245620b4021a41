"""fal-ai/flux/schnell: FLUX.1 [schnell], text to image and variations of an image, in one to four steps."""

from pydantic import Field

from models.base import Model
from models.flux_dev import FluxDev, FluxDevRedux, FluxReduxInput
from models.image_size import Size
from models.schema import (
    AccelerationField,
    EnableSafetyChecker,
    Guidance,
    ImageInput,
    NumImages,
    OptionalSeed,
    OutputFormatField,
    Prompt,
    Steps,
    SyncMode,
)

#: The hub ids of the weights.
SCHNELL = ("black-forest-labs/FLUX.1-schnell",)


class FluxSchnellInput(ImageInput):
    """A request to FLUX.1 [schnell] for an image in few steps. The model takes no guidance: its scale has no effect."""

    num_inference_steps: Steps = Field(4, ge=1, le=12)
    prompt: Prompt
    image_size: Size = Field("landscape_4_3", validate_default=True, description="The size of the generated image.")
    seed: OptionalSeed = None
    guidance_scale: Guidance = 3.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "jpeg"
    acceleration: AccelerationField = "none"


class FluxSchnellReduxInput(FluxReduxInput):
    """A request to FLUX.1 [schnell] for variations of an image in few steps. The model takes no guidance."""

    num_inference_steps: Steps = Field(4, ge=1, le=12)
    image_size: Size = Field("landscape_4_3", validate_default=True, description="The size of the generated image.")
    seed: OptionalSeed = None
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "jpeg"
    acceleration: AccelerationField = "none"

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


MODELS: tuple[Model, ...] = (FluxSchnell(), FluxSchnellRedux())
