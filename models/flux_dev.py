"""fal-ai/flux/dev: FLUX.1 [dev], text to image, image to image, and variations of an image."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from models.base import Engine, EngineConfig, ExtraWeights, Model
from models.image_size import Size
from models.loading.specs import REDUX
from models.schema import (
    AccelerationField,
    EnableSafetyChecker,
    Guidance,
    Image,
    ImageInput,
    ImageRole,
    ImagesOutput,
    ImageURL,
    NumImages,
    OptionalSeed,
    OutputFormatField,
    Prompt,
    Steps,
    Strength,
    SyncMode,
)


class FluxDevInput(ImageInput):
    """A request to FLUX.1 [dev] for an image from a prompt."""

    prompt: Prompt
    # Validate the default too, because it may exceed the operator's limits.
    image_size: Size = Field("landscape_4_3", validate_default=True, description="The size of the generated image.")
    num_inference_steps: Steps = Field(28, ge=1, le=50)
    seed: OptionalSeed = None
    guidance_scale: Guidance = 3.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "jpeg"
    acceleration: AccelerationField = "none"


class FluxImageToImageInput(ImageInput):
    """A request to change an image. The output has the size of the input image, rounded down to multiples of 16."""

    image_url: ImageURL
    strength: Strength = 0.95
    num_inference_steps: Steps = Field(40, ge=1, le=50)
    prompt: Prompt
    seed: OptionalSeed = None
    guidance_scale: Guidance = 3.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "jpeg"
    acceleration: AccelerationField = "none"


class FluxDevImageToImageInput(FluxImageToImageInput):
    """A request to FLUX.1 [dev] to change an image. The output has its size, rounded down to multiples of 16."""

    # fal documents this minimum for this endpoint alone.
    num_inference_steps: Steps = Field(40, ge=10, le=50)


class FluxReduxInput(ImageInput):
    """A request in which an image takes the place of the prompt."""

    image_role: ClassVar[ImageRole] = "prompt"

    image_url: ImageURL

    @property
    def prompt(self) -> str:
        """An empty prompt, because the output has a field for the prompt."""
        return ""


class FluxDevReduxInput(FluxReduxInput):
    """A request to FLUX.1 [dev] for variations of an image, which takes the place of the prompt."""

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
    """The output of fal-ai/flux/dev, with the fields that fal documents."""


class FluxDev:
    """FLUX.1 [dev], a 12 billion parameter flow transformer that generates an image from a prompt."""

    endpoint = "fal-ai/flux/dev"
    family = "flux"
    weights = ("black-forest-labs/FLUX.1-dev",)
    extra_weights: tuple[ExtraWeights, ...] = ()
    Input: type[ImageInput] = FluxDevInput
    Output = FluxDevOutput

    def setup(self, config: EngineConfig) -> Engine:
        """Load the pipeline and the safety checker into an engine. Raises OSError if the pipeline cannot be loaded."""
        from models.flux.loader import load_engine

        return load_engine(config)

    def build_output(
        self,
        request: Any,
        images: Sequence[Mapping[str, Any]],
        has_nsfw_concepts: Sequence[bool],
        timings: Mapping[str, float],
    ) -> FluxDevOutput:
        """Build the output of a request."""
        return FluxDevOutput(
            images=[Image.model_validate(image) for image in images],
            timings=dict(timings),
            seed=request.seed or 0,
            has_nsfw_concepts=list(has_nsfw_concepts),
            prompt=request.prompt,
        )

    def metadata(self, request: Any, seed: int) -> dict[str, Any]:
        """Return the endpoint and those of the request's parameters that are no URLs: URLs may be private."""
        fields = type(request).model_fields
        names = (
            "prompt",
            "negative_prompt",
            "seed",
            "num_inference_steps",
            "guidance_scale",
            "use_real_cfg",
            "real_cfg_scale",
            "base_shift",
            "max_shift",
            "strength",
            "resolution_mode",
            "control_lora_strength",
            "preprocess_depth",
        )
        parameters = {name: getattr(request, name) for name in names if name in fields}
        scales = {"lora_scales": [lora.scale for lora in request.loras]} if "loras" in fields else {}
        if "control_loras" in fields:
            scales["control_lora_scales"] = [lora.scale for lora in request.control_loras]
        if "controlnets" in fields:
            nets = [*request.controlnets, *(control for each in request.controlnet_unions for control in each.controls)]
            scales["controlnet_scales"] = [net.conditioning_scale for net in nets]
            scales["ip_adapter_scales"] = [adapter.scale for adapter in request.ip_adapters]
        return {"endpoint": self.endpoint, **parameters, "seed": seed, **scales}


class FluxDevImageToImage(FluxDev):
    """FLUX.1 [dev], starting from an image and changing it towards a prompt."""

    endpoint = "fal-ai/flux/dev/image-to-image"
    Input: type[ImageInput] = FluxDevImageToImageInput


class FluxDevRedux(FluxDev):
    """FLUX.1 [dev] with FLUX.1 Redux [dev], which generates variations of an image."""

    endpoint = "fal-ai/flux/dev/redux"
    extra_weights = (REDUX,)
    Input: type[ImageInput] = FluxDevReduxInput


MODELS: tuple[Model, ...] = (FluxDev(), FluxDevImageToImage(), FluxDevRedux())
