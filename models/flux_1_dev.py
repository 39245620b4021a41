"""fal-ai/flux-1/dev: FLUX.1 [dev] under its newer name on fal."""

from models.flux_dev import FluxDev


class Flux1Dev(FluxDev):
    """FLUX.1 [dev], a 12 billion parameter flow transformer that generates an image from a prompt."""

    endpoint = "fal-ai/flux-1/dev"


MODEL = Flux1Dev()
