"""fal-ai/flux/krea: FLUX.1 Krea [dev], text to image, image to image, and variations of an image."""

from models.base import Model
from models.flux_dev import (
    FluxDev,
    FluxDevImageToImage,
    FluxDevInput,
    FluxDevRedux,
    FluxDevReduxInput,
    FluxImageToImageInput,
)
from models.schema import Guidance

#: The hub ids of the weights.
KREA = ("black-forest-labs/FLUX.1-Krea-dev",)


class FluxKreaInput(FluxDevInput):
    """A request to FLUX.1 Krea [dev] for an image from a prompt; the default guidance is 4.5."""

    guidance_scale: Guidance = 4.5


class FluxKreaImageToImageInput(FluxImageToImageInput):
    """A request to FLUX.1 Krea [dev] to change an image; the default guidance is 4.5."""

    guidance_scale: Guidance = 4.5


class FluxKreaReduxInput(FluxDevReduxInput):
    """A request to FLUX.1 Krea [dev] for variations of an image; the default guidance is 4.5."""

    guidance_scale: Guidance = 4.5


class FluxKrea(FluxDev):
    """FLUX.1 Krea [dev], tuned for images that look like natural photographs."""

    endpoint = "fal-ai/flux/krea"
    weights = KREA
    Input = FluxKreaInput


class FluxKreaImageToImage(FluxDevImageToImage):
    """FLUX.1 Krea [dev], starting from an image and changing it towards a prompt."""

    endpoint = "fal-ai/flux/krea/image-to-image"
    weights = KREA
    Input = FluxKreaImageToImageInput


class FluxKreaRedux(FluxDevRedux):
    """FLUX.1 Krea [dev] with FLUX.1 Redux [dev], which generates variations of an image."""

    endpoint = "fal-ai/flux/krea/redux"
    weights = KREA
    Input = FluxKreaReduxInput


MODELS: tuple[Model, ...] = (FluxKrea(), FluxKreaImageToImage(), FluxKreaRedux())
