"""fal-ai/flux/srpo: FLUX.1 SRPO [dev], text to image and image to image.

SRPO is a fine-tune of FLUX.1 [dev]'s transformer. Its hub repository holds nothing else, so the server cannot load it
by its hub id: operators serve its file on the base of FLUX.1 [dev], as docs/weights-and-memory.md says.
"""

from models.base import Model
from models.flux_dev import FluxDev, FluxDevImageToImage, FluxDevInput, FluxImageToImageInput
from models.schema import Guidance

#: The hub ids of the weights.
SRPO = ("tencent/SRPO",)


class FluxSrpoInput(FluxDevInput):
    """A request to FLUX.1 SRPO [dev] for an image from a prompt; the default guidance is 4.5."""

    guidance_scale: Guidance = 4.5


class FluxSrpoImageToImageInput(FluxImageToImageInput):
    """A request to FLUX.1 SRPO [dev] to change an image; the default guidance is 4.5."""

    guidance_scale: Guidance = 4.5


class FluxSrpo(FluxDev):
    """FLUX.1 SRPO [dev], tuned with people's preferences for realistic images."""

    endpoint = "fal-ai/flux/srpo"
    weights = SRPO
    Input = FluxSrpoInput


class FluxSrpoImageToImage(FluxDevImageToImage):
    """FLUX.1 SRPO [dev], starting from an image and changing it towards a prompt."""

    endpoint = "fal-ai/flux/srpo/image-to-image"
    weights = SRPO
    Input = FluxSrpoImageToImageInput


MODELS: tuple[Model, ...] = (FluxSrpo(), FluxSrpoImageToImage())
