"""fal-ai/flux/dev: FLUX.1 [dev], text to image."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from models.base import Engine, Placement
from models.schema import (
    Acceleration,
    Image,
    ImageInput,
    ImagesOutput,
    OutputFormat,
    Prompt,
    Seed,
    Size,
)

EXAMPLE = (
    "Extreme close-up of a single tiger eye, direct frontal view. Detailed iris and pupil. Sharp focus on eye texture "
    'and color. Natural lighting to capture authentic eye shine and depth. The word "FLUX" is painted over it in big, '
    "white brush strokes with visible texture."
)


class FluxDevInput(ImageInput):
    """A request, with the fields, defaults and ranges of the endpoint's page and of fal's own client types."""

    prompt: Prompt = Field(description="The prompt to generate an image from.", examples=[EXAMPLE])
    # Checked like a size that was asked for, because the operator may allow less.
    image_size: Size = Field("landscape_4_3", validate_default=True, description="The size of the generated image.")
    num_inference_steps: int = Field(28, ge=1, le=50, description="The number of inference steps to perform.")
    seed: Seed | None = Field(
        None,
        description="The same seed and the same prompt given to the same version of the model "
        "will output the same image every time.",
    )
    guidance_scale: float = Field(
        3.5,
        ge=1,
        le=20,
        description="The CFG (Classifier Free Guidance) scale is a measure of how close you want the model "
        "to stick to your prompt when looking for a related image to show you.",
    )
    sync_mode: bool = Field(
        False, description="If set to true, the picture comes back as a data URI and is not kept in the file store."
    )
    num_images: int = Field(1, ge=1, le=4, description="The number of images to generate.")
    enable_safety_checker: bool = Field(True, description="If set to true, the safety checker will be enabled.")
    output_format: OutputFormat = Field("jpeg", description="The format of the generated image.")
    acceleration: Acceleration = Field(
        "none", description="How much speed to trade for exactness; the higher, the faster."
    )


class FluxDevOutput(ImagesOutput):
    """The answer, as on the endpoint's page."""


class FluxDev:
    """FLUX.1 [dev], a 12 billion parameter flow transformer that paints a picture from a prompt."""

    endpoint = "fal-ai/flux/dev"
    weights = ("black-forest-labs/FLUX.1-dev",)
    Input = FluxDevInput
    Output = FluxDevOutput

    def setup(self, placement: Placement) -> Engine:
        """Load the pipeline and its safety checker; raises OSError when the weights are not there."""
        from models.engine import FluxEngine

        return FluxEngine.load(placement)

    def answer(
        self,
        request: FluxDevInput,
        images: Sequence[Mapping[str, Any]],
        has_nsfw_concepts: Sequence[bool],
        timings: Mapping[str, float],
    ) -> FluxDevOutput:
        """Pictures, seed and flags, as on the endpoint's page."""
        return FluxDevOutput(
            images=[Image.model_validate(image) for image in images],
            timings=dict(timings),
            seed=request.seed or 0,
            has_nsfw_concepts=list(has_nsfw_concepts),
            prompt=request.prompt,
        )

    def parameters(self, request: FluxDevInput, seed: int) -> dict[str, Any]:
        """Prompt, seed, steps and guidance of one picture."""
        return {
            "endpoint": self.endpoint,
            "prompt": request.prompt,
            "seed": seed,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
        }


MODEL = FluxDev()
