"""fal-ai/flux-lora/image-to-image: FLUX.1 [dev] with LoRA weights of the client's choice, image to image."""

from typing import Any

from pydantic import Field

from models.flux_dev_image_to_image import FluxDevImageToImage, FluxDevImageToImageInput
from models.schema import LoraAccelerationField, Loras, Steps, Strength


class FluxLoraImageToImageInput(FluxDevImageToImageInput):
    """A request for image-to-image with LoRA weights."""

    strength: Strength = 0.85
    num_inference_steps: Steps = Field(28, ge=1, le=50)
    loras: Loras = Field([])
    acceleration: LoraAccelerationField = "none"


class FluxLoraImageToImage(FluxDevImageToImage):
    """FLUX.1 [dev] with LoRA weights, starting from an image and changing it towards a prompt."""

    endpoint = "fal-ai/flux-lora/image-to-image"
    Input = FluxLoraImageToImageInput

    def metadata(self, request: Any, seed: int) -> dict[str, Any]:
        """Return the parameters of image-to-image and the scale of each LoRA, but no URLs: they may be private."""
        return {**super().metadata(request, seed), "lora_scales": [lora.scale for lora in request.loras]}


MODEL = FluxLoraImageToImage()
