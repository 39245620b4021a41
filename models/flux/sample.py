"""An image during generation: how it starts, takes steps and is unpacked, as in diffusers' FLUX pipelines."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from models.flux import control, control_nets, fill, kontext
from models.flux.control_nets import Control, ControlImage
from models.flux.first_block_cache import FirstBlockCache
from models.flux.image_encoder import ImageEncoder
from models.flux.inpainting import Inpainting, packed_mask
from models.flux.input_images import InputImages
from models.flux.ip_adapters import ImagePrompts
from models.flux.kontext import Reference
from models.flux.prompt_cache import PromptEmbeds
from models.flux.real_cfg import RealCfg


@dataclass
class Sample:
    """An image during generation: packed latents of shape (1, image tokens, channels), and the steps to take."""

    width: int
    height: int
    text: PromptEmbeds
    latents: Any
    latent_ids: Any
    scheduler: Any
    timesteps: Any
    guidance: Any
    cache: FirstBlockCache | None = None
    #: What the transformers of Fill, Canny and Depth see next to the latents: (1, image tokens, channels).
    channels: Any = None
    #: The control nets, each with its control image.
    controls: Sequence[Control] = ()
    #: What the IP adapters read of their images; None without IP adapters.
    image_prompts: ImagePrompts | None = None
    #: The reference image for the transformer of Kontext; None for other requests.
    reference: Reference | None = None
    #: Restores the unmasked part of the input image after each step; None without a mask.
    inpainting: Inpainting | None = None
    #: The negative prompt, with real guidance; None without.
    real_cfg: RealCfg | None = None
    step: int = 0
    #: The predicted velocity of the last step; None before the first.
    velocity: Any = None
    #: On a GPU, the event that marks the end of the last step.
    event: Any = None

    @property
    def num_tokens(self) -> int:
        """The number of text and image tokens, those of a reference image included."""
        parts = [self.latents, self.text.prompt_embeds, *([self.reference.latents] if self.reference else [])]
        return sum(part.shape[1] for part in parts)

    @property
    def key(self) -> tuple[int, ...]:
        """The sizes of image, text and reference image, and the number of forwards a step.

        Only samples with equal keys can share a forward. A sample with control nets or IP adapters shares none.
        """
        reference = self.reference.size if self.reference else ()
        own = (id(self),) if self.controls or self.image_prompts else ()
        return (self.width, self.height, self.text.prompt_embeds.shape[1], 2 if self.real_cfg else 1, *reference, *own)

    @property
    def timestep(self) -> Any:
        """The timestep of the next step."""
        return self.timesteps[self.step]

    @property
    def steps_done(self) -> bool:
        """Whether all steps are done."""
        return bool(self.step == len(self.timesteps))

    @property
    def estimate(self) -> Any:
        """The packed latents of the finished image, as estimated in the last step; None before the first step."""
        if self.velocity is None:
            return None
        return self.latents - self.scheduler.sigmas[self.scheduler.step_index] * self.velocity

    def step_with(self, velocity: torch.Tensor) -> None:
        """Take a step with `velocity`, which has the shape of the latents."""
        stepped = self.scheduler.step(velocity, self.timestep, self.latents, return_dict=False)
        self.latents, self.velocity = stepped[0], velocity
        self.step += 1
        if self.inpainting:
            following = None if self.steps_done else self.timesteps[self.step : self.step + 1]
            self.latents = self.inpainting.restore(self.latents, self.scheduler, following)

    def free(self) -> None:
        """Release the latents and all else that a decoded image does not need."""
        self.latents = self.velocity = self.cache = self.inpainting = None
        self.channels = self.reference = None
        self.controls, self.image_prompts = (), None


def first_step(request: Any) -> int:
    """Return how many steps are left out because generation starts from an image; 0 if the request has no strength."""
    num_steps, strength = request.num_inference_steps, getattr(request, "strength", 1.0)
    # Use the same arithmetic and rounding as FluxImg2ImgPipeline.
    return int(max(num_steps - min(num_steps * strength, num_steps), 0))


def begin(
    pipeline: Any,
    device: str,
    text: PromptEmbeds,
    request: Any,
    size: tuple[int, int],
    seed: int,
    inputs: InputImages,
    nets: Sequence[tuple[ControlImage, Callable[[], Any]]] = (),
) -> Sample:
    """Return a new sample, with latents, timesteps and guidance, for an image of `size`, (width, height) in pixels.

    Start from noise as FluxPipeline does, or from an image mixed with noise as FluxImg2ImgPipeline does. With a mask,
    keep the image where the mask is black, as FluxInpaintPipeline does. With a hole, do what FluxFillPipeline does,
    with a control image what the FluxControl pipelines do, and with a reference image what those of Kontext do. With
    control images, each with a function that returns its control net, do what the FluxControlNet pipelines do.
    """
    width, height = size
    # Draw noise on the CPU, so that a seed gives the same noise on every device.
    generator = torch.Generator("cpu").manual_seed(seed)
    encoder = ImageEncoder(pipeline, size, text.prompt_embeds.dtype, device, generator)
    num_tokens = (width // pipeline.vae_scale_factor // 2) * (height // pipeline.vae_scale_factor // 2)
    scheduler, timesteps = _timesteps(pipeline.scheduler, request, num_tokens, device)
    guidance = None
    if pipeline.transformer.config.guidance_embeds:
        guidance = torch.full([1], request.guidance_scale, device=device, dtype=torch.float32)
    sample = Sample(width, height, text, None, None, scheduler, timesteps, guidance)
    if inputs.control and inputs.mask:
        # FluxControlInpaintPipeline first encodes what the mask leaves of the image. It uses none of it, but the random
        # numbers that this takes.
        rows, columns = (side // pipeline.vae_scale_factor for side in (height, width))
        encoder.noise(torch.Size([1, pipeline.vae.config.latent_channels, rows, columns]))
    if inputs.control:
        sample.channels = control.channels(encoder, inputs.control)
    sample.controls = [control_nets.prepare(encoder, image, find, request.guidance_scale) for image, find in nets]
    if inputs.start:
        sample.timesteps = timesteps[first_step(request) :]
        scheduler.set_begin_index(first_step(request))
        _start_from_image(sample, encoder, inputs)
    sample.latents, sample.latent_ids = pipeline.prepare_latents(
        1, pipeline.vae.config.latent_channels, height, width, encoder.dtype, device, generator, sample.latents
    )
    if inputs.reference:
        sample.reference = kontext.encode(encoder, inputs.reference)
    return sample


def _start_from_image(sample: Sample, encoder: ImageEncoder, inputs: InputImages) -> None:
    """Set the latents to those of the image to start from, mixed with noise, and what its mask asks for."""
    assert inputs.start
    # The pipelines of Kontext take the middle of the encoder's distribution, the others a random value from it.
    encoded = encoder.latents(encoder.pixels(inputs.start), "argmax" if inputs.reference else "sample")
    noise = encoder.noise(encoded.shape)
    sample.latents = encoder.pack(sample.scheduler.scale_noise(encoded, sample.timesteps[:1], noise))
    if inputs.hole:
        sample.channels = fill.channels(encoder, inputs)
    if inputs.mask:
        mask = packed_mask(encoder, inputs.mask, encoded)
        sample.inpainting = Inpainting(image=encoder.pack(encoded), noise=encoder.pack(noise), mask=mask)


def unpacked(pipeline: Any, sample: Sample, latents: torch.Tensor) -> torch.Tensor:
    """Return packed latents in the shape (1, channels, height, width) and the scale that the autoencoder decodes."""
    whole = pipeline._unpack_latents(latents, sample.height, sample.width, pipeline.vae_scale_factor)
    config = pipeline.vae.config
    scaled: torch.Tensor = whole / config.scaling_factor + config.shift_factor
    return scaled


def _timesteps(scheduler: Any, request: Any, num_tokens: int, device: str) -> tuple[Any, torch.Tensor]:
    # A scheduler counts the steps of one image, so each image needs a copy.
    own = copy.deepcopy(scheduler)
    config = own.config
    shift = calculate_shift(
        num_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        getattr(request, "base_shift", config.get("base_shift", 0.5)),
        getattr(request, "max_shift", config.get("max_shift", 1.15)),
    )
    num_steps = request.num_inference_steps
    sigmas = numpy.linspace(1.0, 1 / num_steps, num_steps)
    timesteps, _ = retrieve_timesteps(own, num_steps, device, sigmas=sigmas, mu=shift)
    own.set_begin_index(0)
    return own, timesteps


def tiled_autoencoder(pipeline: Any, side: int) -> Any:
    """Return a copy of the autoencoder that decodes in tiles of `side` pixels, which takes less memory.

    The copy shares the weights. AutoencoderTiny, whose images need little memory, is returned unchanged.
    """
    if not isinstance(pipeline.vae, AutoencoderKL):
        return pipeline.vae
    # A copy, because another thread may encode with the autoencoder meanwhile.
    tiled = copy.copy(pipeline.vae)
    tiled.tile_sample_min_size, tiled.tile_latent_min_size = side, side // pipeline.vae_scale_factor
    tiled.enable_tiling()
    return tiled
