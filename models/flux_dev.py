"""fal-ai/flux/dev: FLUX.1 [dev], text to image."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from models.base import Engine, EngineConfig, ExtraWeights
from models.schema import (
    AccelerationField,
    EnableSafetyChecker,
    Guidance,
    Image,
    ImageInput,
    ImagesOutput,
    NumImages,
    OptionalSeed,
    OutputFormatField,
    Prompt,
    Size,
    Steps,
    SyncMode,
)


class FluxDevInput(ImageInput):
    """A request, with the fields, defaults and ranges of the endpoint's page and of fal's client types."""

    prompt: Prompt
    # Validate the default too, because the operator may allow only smaller sizes.
    image_size: Size = Field("landscape_4_3", validate_default=True, description="The size of the generated image.")
    num_inference_steps: Steps = Field(28, ge=1, le=50)
    seed: OptionalSeed = None
    guidance_scale: Guidance = 3.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "jpeg"
    acceleration: AccelerationField = "none"


class FluxDevOutput(ImagesOutput):
    """The answer, as on the endpoint's page."""


class FluxDev:
    """FLUX.1 [dev], a 12 billion parameter flow transformer that generates an image from a prompt."""

    endpoint = "fal-ai/flux/dev"
    family = "flux"
    weights = ("black-forest-labs/FLUX.1-dev",)
    extra_weights: ExtraWeights | None = None
    Input: type[ImageInput] = FluxDevInput
    Output = FluxDevOutput

    def setup(self, config: EngineConfig) -> Engine:
        """Load the pipeline and its safety checker. Raises OSError if the weights are missing."""
        from models.flux.engine import FluxEngine

        return FluxEngine.load(config)

    def build_output(
        self,
        request: Any,
        images: Sequence[Mapping[str, Any]],
        has_nsfw_concepts: Sequence[bool],
        timings: Mapping[str, float],
    ) -> FluxDevOutput:
        """Build the answer from images, seed and flags."""
        return FluxDevOutput(
            images=[Image.model_validate(image) for image in images],
            timings=dict(timings),
            seed=request.seed or 0,
            has_nsfw_concepts=list(has_nsfw_concepts),
            prompt=request.prompt,
        )

    def metadata(self, request: Any, seed: int) -> dict[str, Any]:
        """Return prompt, seed, steps and guidance of one image."""
        return {
            "endpoint": self.endpoint,
            "prompt": request.prompt,
            "seed": seed,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
        }


MODEL = FluxDev()
