"""fal-ai/flux-lora: FLUX.1 [dev] with LoRA weights of the caller's."""

from typing import Any

from pydantic import Field

from models.flux_dev import FluxDev, FluxDevInput
from models.schema import LoraAccelerationField, Loras


class FluxLoraInput(FluxDevInput):
    """As FLUX.1 [dev]'s, with LoRA weights."""

    loras: Loras = Field([])
    acceleration: LoraAccelerationField = "none"


class FluxLora(FluxDev):
    """FLUX.1 [dev] in the style, or with the subject, that LoRA weights were trained on."""

    endpoint = "fal-ai/flux-lora"
    Input = FluxLoraInput

    def metadata(self, request: Any, seed: int) -> dict[str, Any]:
        """Of one picture; where the LoRAs came from is not named, because addresses tell about people."""
        return {**super().metadata(request, seed), "lora_scales": [lora.scale for lora in request.loras]}


MODEL = FluxLora()
