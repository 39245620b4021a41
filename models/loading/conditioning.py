"""What the transformer of a FLUX pipeline sees next to the latents and the text, as its number of channels tells."""

from pathlib import Path
from typing import Any

from models.loading.hub import BadWeights, read_json

#: The kinds: nothing else, an image of edges or depths, or a masked image with its mask.
KINDS = ("plain", "control", "fill")


def channels(pipeline: Any) -> dict[str, int]:
    """Return how many channels a transformer of each kind takes for each token."""
    # An image token holds the channels of 2 x 2 latents. The mask has one channel for each pixel of a token.
    latents = 4 * pipeline.vae.config.latent_channels
    return dict(zip(KINDS, (latents, 2 * latents, 2 * latents + 4 * pipeline.vae_scale_factor**2), strict=True))


def is_control(transformer: Path) -> bool:
    """Return whether the configuration in a directory is that of a transformer of the kind "control"."""
    path = transformer / "config.json"
    config = read_json(path) if path.is_file() else {}
    taken, given = config.get("in_channels"), config.get("out_channels")
    return isinstance(given, int) and taken == 2 * given


def kind_of(pipeline: Any) -> str:
    """Return the kind of a pipeline's transformer. Raises BadWeights if it fits none."""
    taken = pipeline.transformer.config.in_channels
    for kind, number in channels(pipeline).items():
        if number == taken:
            return kind
    raise BadWeights(f"the transformer takes {taken} channels, and the autoencoder gives {channels(pipeline)['plain']}")
