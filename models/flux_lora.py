"""fal-ai/flux-lora: FLUX.1 [dev] with LoRA weights of the client's choice, text to image."""

from typing import Any

from pydantic import Field

from models.flux_dev import FluxDev, FluxDevInput
from models.schema import LoraAccelerationField, Loras


class FluxLoraInput(FluxDevInput):
    """A request for FLUX.1 [dev] with LoRA weights."""

    loras: Loras = Field([])
    acceleration: LoraAccelerationField = "none"


class FluxLora(FluxDev):
    """FLUX.1 [dev] with LoRA weights, which add a style or a subject."""

    endpoint = "fal-ai/flux-lora"
    Input = FluxLoraInput

    def metadata(self, request: Any, seed: int) -> dict[str, Any]:
        """Return FluxDev's parameters and the scale of each LoRA. The LoRAs' URLs are left out: they may be private."""
        return {**super().metadata(request, seed), "lora_scales": [lora.scale for lora in request.loras]}


MODEL = FluxLora()
