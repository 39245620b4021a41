"""What a picture looks like before it is done: its latents as small RGB, by a linear map."""

from typing import Any

import numpy
import torch
from PIL import Image as PILImage
from PIL.Image import Image

#: Longer side of a preview, in pixels.
MAX_SIDE = 256
_FIT_SIDE = 256


class Preview:
    """Fits, once, how the autoencoder's channels mix into red, green and blue.

    The autoencoder itself is asked: smooth colours go through its encoder, and least squares tell how to get back
    from (channels, height, width) to (3, height, width). So it holds for every autoencoder.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._map: torch.Tensor | None = None

    @torch.no_grad()
    def image(self, latents: torch.Tensor) -> Image:
        """A small picture of unpacked latents (1, channels, height, width), which the autoencoder would decode."""
        if self._map is None:
            self._map = self._fit()
        flat = latents[0].float().flatten(1).T
        rgb = (torch.cat([flat, torch.ones_like(flat[:, :1])], dim=1) @ self._map.to(flat.device)).clamp(0, 1)
        pixels = (rgb * 255).round().to(torch.uint8).reshape(*latents.shape[2:], 3).cpu()
        small = PILImage.fromarray(pixels.numpy())
        # A whole number of times larger, or as much smaller as it must be.
        scale = MAX_SIDE // max(small.size) or MAX_SIDE / max(small.size)
        width, height = (max(1, round(side * scale)) for side in small.size)
        image: Image = small.resize((width, height), PILImage.Resampling.BILINEAR)
        return image

    def _fit(self) -> torch.Tensor:
        """The map, of shape (channels + 1, 3)."""
        parameter = next(self.vae.parameters())
        colours = _smooth_colours()
        pixels = torch.from_numpy(colours).permute(2, 0, 1)[None].to(parameter.device, parameter.dtype) / 127.5 - 1
        encoded = self.vae.encode(pixels)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        height, width = latents.shape[2:]
        small = numpy.asarray(PILImage.fromarray(colours).resize((width, height), PILImage.Resampling.BOX))
        flat = latents[0].float().cpu().flatten(1).T
        wanted = torch.from_numpy(small.copy()).reshape(-1, 3).float() / 255
        # A little ridge, because an autoencoder may have channels that these colours never move.
        known = torch.cat([flat, torch.ones_like(flat[:, :1])], dim=1).double()
        ridge = 1e-3 * len(known) * torch.eye(known.shape[1], dtype=torch.double)
        return torch.linalg.solve(known.T @ known + ridge, known.T @ wanted.double()).float()


def _smooth_colours() -> numpy.ndarray[Any, Any]:
    """All sorts of colours beside each other, (side, side, 3) in uint8: few random ones, enlarged smoothly."""
    few = numpy.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=numpy.uint8)
    return numpy.asarray(PILImage.fromarray(few).resize((_FIT_SIDE, _FIT_SIDE), PILImage.Resampling.BICUBIC)).copy()
