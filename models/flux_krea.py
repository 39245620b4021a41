"""fal-ai/flux/krea: FLUX.1 Krea [dev], text to image."""

from models.flux_dev import FluxDev


class FluxKrea(FluxDev):
    """FLUX.1 Krea [dev], tuned for images that look like natural photographs."""

    endpoint = "fal-ai/flux/krea"
    weights = ("black-forest-labs/FLUX.1-Krea-dev",)


MODEL = FluxKrea()
