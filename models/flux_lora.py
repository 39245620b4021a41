"""fal-ai/flux-lora: FLUX.1 [dev] with LoRA weights that the client chooses."""

from typing import Any

from pydantic import Field

from models.flux_dev import FluxDev, FluxDevInput
from models.schema import LoraAccelerationField, Loras


class FluxLoraInput(FluxDevInput):
    """A request for FLUX.1 [dev] with LoRA weights."""

    loras: Loras = Field([])
    acceleration: LoraAccelerationField = "none"


class FluxLora(FluxDev):
    """FLUX.1 [dev] with the style or the subject that LoRA weights were trained on."""

    endpoint = "fal-ai/flux-lora"
    Input = FluxLoraInput

    def metadata(self, request: Any, seed: int) -> dict[str, Any]:
        """Return the parameters of one image, without the URLs of the LoRAs, as URLs may reveal personal data."""
        return {**super().metadata(request, seed), "lora_scales": [lora.scale for lora in request.loras]}


MODEL = FluxLora()
