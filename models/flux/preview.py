"""Previews of unfinished images: a linear map turns latents into a small RGB image."""

from typing import Any

import numpy
import torch
from PIL import Image as PILImage
from PIL.Image import Image

#: The maximum length of a preview's longer side, in pixels.
MAX_SIDE = 256
#: The side of the square image that the map is fitted on, in pixels.
_FIT_SIDE = 256


class Preview:
    """A linear map from the autoencoder's channels to red, green and blue, fitted once.

    The fit works for every autoencoder: the encoder turns an image of smooth colours into latents, and least squares
    find the map from these latents back to the colours.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._map: torch.Tensor | None = None

    @torch.no_grad()
    def image(self, latents: torch.Tensor) -> Image:
        """Return a small image of latents in the scale that the autoencoder decodes, (1, channels, height, width)."""
        if self._map is None:
            self._map = self._fit()
        flat = latents[0].float().flatten(1).T
        rgb = (torch.cat([flat, torch.ones_like(flat[:, :1])], dim=1) @ self._map.to(flat.device)).clamp(0, 1)
        pixels = (rgb * 255).round().to(torch.uint8).reshape(*latents.shape[2:], 3).cpu()
        small = PILImage.fromarray(pixels.numpy())
        # Make the longer side at most MAX_SIDE: enlarge by a whole number, or shrink by any factor.
        scale = MAX_SIDE // max(small.size) or MAX_SIDE / max(small.size)
        width, height = (max(1, round(side * scale)) for side in small.size)
        image: Image = small.resize((width, height), PILImage.Resampling.BILINEAR)
        return image

    def _fit(self) -> torch.Tensor:
        """Return the fitted map, of shape (channels + 1, 3); the last row is added to every pixel."""
        parameter = next(self.vae.parameters())
        colours = _smooth_colours()
        pixels = torch.from_numpy(colours).permute(2, 0, 1)[None].to(parameter.device, parameter.dtype) / 127.5 - 1
        encoded = self.vae.encode(pixels)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        height, width = latents.shape[2:]
        small = numpy.asarray(PILImage.fromarray(colours).resize((width, height), PILImage.Resampling.BOX))
        flat = latents[0].float().cpu().flatten(1).T
        wanted = torch.from_numpy(small.copy()).reshape(-1, 3).float() / 255
        # A small ridge term keeps the equations solvable if some channels do not depend on these colours.
        known = torch.cat([flat, torch.ones_like(flat[:, :1])], dim=1).double()
        ridge = 1e-3 * len(known) * torch.eye(known.shape[1], dtype=torch.double)
        return torch.linalg.solve(known.T @ known + ridge, known.T @ wanted.double()).float()


def _smooth_colours() -> numpy.ndarray[Any, Any]:
    """Return smoothly varying random colours as uint8, of shape (_FIT_SIDE, _FIT_SIDE, 3)."""
    few = numpy.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=numpy.uint8)
    return numpy.asarray(PILImage.fromarray(few).resize((_FIT_SIDE, _FIT_SIDE), PILImage.Resampling.BICUBIC)).copy()
