"""bench/lora: takes LoRA weights by address, and paints without them."""

from models.flux_lora import FluxLoraInput
from tests.support.fake_models import NullEngine, NullModel


class LoraModel(NullModel):
    """Brings LoRA weights along."""

    Input = FluxLoraInput


MODEL = LoraModel("bench/lora", NullEngine)
