"""The end of an image: its latents are decoded, by a compiled decoder once that is ready."""

import logging
from functools import partial
from typing import Any

import torch
from PIL.Image import Image

from models.base import DeviceLost, GenerationFailed, NonFiniteOutput
from models.flux.compilation import compiled_autoencoder
from models.flux.device import Device
from models.flux.sample import Sample, tiled_autoencoder, unpacked

log = logging.getLogger(__name__)

#: What a failure of the compiled decoder is reported as.
COMPILED_DECODER = "compiled decoder"
#: The side in pixels of the tiles in which an image is decoded if memory is short.
TILE_SIDE = 512
#: After this many images in a row that are not finite, the device counts as lost. Images with LoRAs do not count.
MAX_NONFINITE_IMAGES = 2
#: The height and width of the latents in the warm-up. Neither they nor their doubles in later blocks equal each other,
#: or a number of channels, so that the compiler treats none of them as a constant.
_WARM_LATENTS = (80, 56)


class Decoder:
    """The decoder of a pipeline's autoencoder. Not compiled, it gives the pipeline's own images, bit for bit."""

    def __init__(self, pipeline: Any, device: Device) -> None:
        self._pipeline, self._device = pipeline, device
        self._vae, self._compiled = pipeline.vae, None
        self._num_nonfinite = 0

    def offer_compiled(self) -> None:
        """Prepare a compiled decoder, which takes over after its warm-up, if the autoencoder is an AutoencoderKL."""
        self._compiled = compiled_autoencoder(self._pipeline.vae)

    def close(self) -> None:
        """Release the weights. Afterwards, nothing is left to warm up."""
        self._pipeline = self._vae = self._compiled = None

    @property
    def is_cold(self) -> bool:
        """Whether there is a compiled decoder that is not ready."""
        return self._compiled is not None

    def warm_up(self) -> None:
        """Make the compiled decoder ready. If that raises an error, it is not tried again."""
        vae, self._compiled = self._compiled, None
        warm_up(vae)
        self._vae = vae

    def decode(self, sample: Sample, what: str, *, can_overflow: bool) -> Image:
        """Decode an image in RGB; `what` names it in errors.

        Raises NonFiniteOutput, or DeviceLost after MAX_NONFINITE_IMAGES.
        """
        try:
            return self._decode_once(sample, what, can_overflow=can_overflow)
        except (GenerationFailed, DeviceLost):
            raise
        except Exception:
            if self._vae is self._pipeline.vae:
                raise
            log.exception("the %s failed; decoding runs uncompiled from now on", COMPILED_DECODER)
            self._vae = self._pipeline.vae
            return self._decode_once(sample, what, can_overflow=can_overflow)

    def _decode_once(self, sample: Sample, what: str, *, can_overflow: bool) -> Image:
        decode = partial(self._decode, sample, self._vae)
        try:
            again = partial(self._device.retry_on_oom, what, decode, partial(self._decode_in_tiles, sample))
            image = self._device.retry_on_oom(what, decode, again)
        except NonFiniteOutput as error:
            # LoRAs can cause this in their own task. Without LoRAs, the weights on the device must be damaged.
            self._num_nonfinite += not can_overflow
            if self._num_nonfinite >= MAX_NONFINITE_IMAGES:
                raise DeviceLost("two images in a row had values that are not finite") from error
            raise
        self._num_nonfinite = 0
        return image

    def _decode(self, sample: Sample, vae: Any) -> Image:
        with self._device.on_decode_stream(sample.latents, sample.event):
            latents = unpacked(self._pipeline, sample, sample.latents)
            decoded = vae.decode(latents, return_dict=False)[0]
            if not (torch.isfinite(latents).all() and torch.isfinite(decoded).all()):
                raise NonFiniteOutput("The image has values that are not finite, so no image is returned.")
            image: Image = self._pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        return image

    def _decode_in_tiles(self, sample: Sample) -> Image:
        """Decode with less memory, in tiles whose seams are blended, which changes the image slightly."""
        log.warning("decoding an image in tiles of %d pixels, because the memory is short", TILE_SIDE)
        return self._decode(sample, tiled_autoencoder(self._pipeline, TILE_SIDE))


def warm_up(vae: Any) -> None:
    """Decode once, so that no request waits for compilation."""
    latents = torch.randn(1, vae.config.latent_channels, *_WARM_LATENTS, device=vae.device, dtype=vae.dtype)
    with torch.no_grad():
        vae.decode(latents, return_dict=False)
