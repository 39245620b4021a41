"""fal-ai/flux/schnell: FLUX.1 [schnell], text to image in one to four steps."""

from pydantic import Field

from models.flux_dev import FluxDev, FluxDevInput
from models.schema import Steps


class FluxSchnellInput(FluxDevInput):
    """A request for an image in few steps. `guidance_scale` has no effect: FLUX.1 [schnell] takes no guidance."""

    num_inference_steps: Steps = Field(4, ge=1, le=12)


class FluxSchnell(FluxDev):
    """FLUX.1 [schnell], a 12 billion parameter flow transformer that generates an image in one to four steps."""

    endpoint = "fal-ai/flux/schnell"
    weights = ("black-forest-labs/FLUX.1-schnell",)
    Input = FluxSchnellInput


MODEL = FluxSchnell()
