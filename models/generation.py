"""One picture on its way: as FluxPipeline begins it, steps it and ends it."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from models.first_block_cache import FirstBlockCache
from models.texts import Text


@dataclass
class Generation:
    """One picture on its way: packed latents of shape (1, tokens, channels) and the steps still to go."""

    width: int
    height: int
    text: Text
    latents: Any
    latent_ids: Any
    scheduler: Any
    timesteps: Any
    guidance: Any
    cache: FirstBlockCache | None = None
    step: int = 0
    #: The transformer's answer of the last step.
    velocity: Any = None
    #: On a GPU, recorded behind the last kernel of the last step.
    event: Any = None

    @property
    def num_tokens(self) -> int:
        """Of its text and of its picture."""
        return int(self.latents.shape[1] + self.text.prompt_embeds.shape[1])

    @property
    def key(self) -> tuple[int, int, int]:
        """Those that share a forward have this in common."""
        return (self.width, self.height, self.text.prompt_embeds.shape[1])

    @property
    def timestep(self) -> Any:
        """Of the next step."""
        return self.timesteps[self.step]

    @property
    def is_stepped(self) -> bool:
        """Whether the last step was taken."""
        return bool(self.step == len(self.timesteps))

    @property
    def estimate(self) -> Any:
        """What the latents are heading for as of the last step, packed; None before the first."""
        if self.velocity is None:
            return None
        return self.latents - self.scheduler.sigmas[self.step] * self.velocity

    def take(self, velocity: torch.Tensor) -> None:
        """Step along `velocity`, of the shape of the latents."""
        stepped = self.scheduler.step(velocity, self.timestep, self.latents, return_dict=False)
        self.latents, self.velocity = stepped[0], velocity
        self.step += 1

    def let_go(self) -> None:
        """Forget what the picture was made from, once there is one."""
        self.latents = self.velocity = self.cache = None


def begin(pipeline: Any, device: str, text: Text, request: Any, size: tuple[int, int], seed: int) -> Generation:
    """Noise, timesteps and guidance of a picture of (width, height), as FluxPipeline prepares them."""
    width, height = size
    latents, latent_ids = pipeline.prepare_latents(
        1,
        pipeline.transformer.config.in_channels // 4,
        height,
        width,
        text.prompt_embeds.dtype,
        device,
        # Drawn on the CPU, so that a seed gives the same noise on every device.
        torch.Generator("cpu").manual_seed(seed),
    )
    scheduler, timesteps = _timesteps(pipeline.scheduler, request.num_inference_steps, latents.shape[1], device)
    guidance = None
    if pipeline.transformer.config.guidance_embeds:
        guidance = torch.full([1], request.guidance_scale, device=device, dtype=torch.float32)
    return Generation(width, height, text, latents, latent_ids, scheduler, timesteps, guidance)


def unpacked(pipeline: Any, generation: Generation, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the autoencoder takes them: (1, channels, height, width)."""
    whole = pipeline._unpack_latents(latents, generation.height, generation.width, pipeline.vae_scale_factor)
    config = pipeline.vae.config
    scaled: torch.Tensor = whole / config.scaling_factor + config.shift_factor
    return scaled


def _timesteps(scheduler: Any, num_inference_steps: int, num_tokens: int, device: str) -> tuple[Any, torch.Tensor]:
    # A scheduler counts its own steps, so generations that take turns need one each.
    own = copy.deepcopy(scheduler)
    config = own.config
    shift = calculate_shift(
        num_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    sigmas = numpy.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    timesteps, _ = retrieve_timesteps(own, num_inference_steps, device, sigmas=sigmas, mu=shift)
    own.set_begin_index(0)
    return own, timesteps
