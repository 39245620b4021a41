"""The step loop of FLUX: one generation, one step at a time."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from PIL.Image import Image

from models import safety, weights
from models.base import CannotPaint, Painting, Placement


@dataclass
class Generation:
    """One picture on its way: packed latents of shape (1, tokens, channels) and the steps still to go."""

    latents: Any
    latent_ids: Any
    scheduler: Any
    timesteps: Any
    guidance: Any
    step: int = 0

    @property
    def is_done(self) -> bool:
        """Whether the last step was taken."""
        return bool(self.step == len(self.timesteps))


@dataclass
class FluxPainting:
    """One request: its pictures are painted one after the other, so each is the same bytes as alone."""

    request: Any
    seed: int
    width: int
    height: int
    text: tuple[Any, Any, Any] | None = None
    generation: Generation | None = None
    pictures: list[Image] = field(default_factory=list)
    step: int = 0
    acceleration: str = "none"

    @property
    def num_steps(self) -> int:
        """Steps of all its pictures."""
        return int(self.request.num_inference_steps * self.request.num_images)

    @property
    def is_done(self) -> bool:
        """Whether every picture is ready."""
        return bool(len(self.pictures) == self.request.num_images)


class FluxEngine:
    """A FluxPipeline taken step by step. Bit for bit what `FluxPipeline.__call__` gives for the same seed."""

    def __init__(self, pipeline: FluxPipeline, checker: safety.Checker) -> None:
        self.pipeline = pipeline
        self.checker = checker
        self.device = pipeline._execution_device
        #: Sides are rounded down to this many pixels.
        self.multiple: int = pipeline.vae_scale_factor * 2

    @classmethod
    def load(cls, placement: Placement) -> "FluxEngine":
        """Load pipeline and checker; raises OSError when the pipeline's weights are not there."""
        return cls(weights.load(placement), safety.load(placement))

    def start(self, request: Any, seed: int) -> FluxPainting:
        """Begin to paint; cheap, the text is encoded with the first step."""
        size = request.image_size
        return FluxPainting(request, seed, self._round(size.width), self._round(size.height))

    @torch.no_grad()
    def advance(self, painting: Painting) -> None:
        """One step of one picture, and its decoding after the last. Raises CannotPaint on NaN."""
        assert isinstance(painting, FluxPainting)
        generation = painting.generation or self._begin(painting)
        painting.generation = generation
        self._step(generation, painting)
        painting.step += 1
        if generation.is_done:
            painting.pictures.append(self._decode(generation, painting))
            painting.generation = None

    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        """Ask the safety checker."""
        return self.checker.is_unsafe(pictures)

    def _round(self, side: int) -> int:
        return max(self.multiple, side // self.multiple * self.multiple)

    def _begin(self, painting: FluxPainting) -> Generation:
        """Text, noise, timesteps and guidance of the next picture, as FluxPipeline prepares them."""
        if painting.text is None:
            painting.text = self.pipeline.encode_prompt(
                prompt=painting.request.prompt, prompt_2=None, device=self.device, max_sequence_length=512
            )
        latents, latent_ids = self._noise(painting)
        scheduler, timesteps = self._timesteps(painting.request.num_inference_steps, latents.shape[1])
        guidance = None
        if self.pipeline.transformer.config.guidance_embeds:
            guidance = torch.full([1], painting.request.guidance_scale, device=self.device, dtype=torch.float32)
        return Generation(latents, latent_ids, scheduler, timesteps, guidance)

    def _noise(self, painting: FluxPainting) -> tuple[torch.Tensor, torch.Tensor]:
        assert painting.text is not None
        # Drawn on the CPU, so that a seed gives the same noise on every device.
        generator = torch.Generator("cpu").manual_seed(painting.seed + len(painting.pictures))
        noise: tuple[torch.Tensor, torch.Tensor] = self.pipeline.prepare_latents(
            1,
            self.pipeline.transformer.config.in_channels // 4,
            painting.height,
            painting.width,
            painting.text[0].dtype,
            self.device,
            generator,
        )
        return noise

    def _timesteps(self, num_inference_steps: int, num_tokens: int) -> tuple[Any, torch.Tensor]:
        # A scheduler counts its own steps, so generations that take turns need one each.
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        config = scheduler.config
        shift = calculate_shift(
            num_tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = numpy.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        timesteps, _ = retrieve_timesteps(scheduler, num_inference_steps, self.device, sigmas=sigmas, mu=shift)
        scheduler.set_begin_index(0)
        return scheduler, timesteps

    def _step(self, generation: Generation, painting: FluxPainting) -> None:
        assert painting.text is not None
        prompt_embeds, pooled_prompt_embeds, text_ids = painting.text
        timestep = generation.timesteps[generation.step]
        velocity = self.pipeline.transformer(
            hidden_states=generation.latents,
            timestep=timestep.expand(1).to(generation.latents.dtype) / 1000,
            guidance=generation.guidance,
            pooled_projections=pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_ids,
            img_ids=generation.latent_ids,
            return_dict=False,
        )[0]
        generation.latents = generation.scheduler.step(velocity, timestep, generation.latents, return_dict=False)[0]
        generation.step += 1

    def _decode(self, generation: Generation, painting: FluxPainting) -> Image:
        if not torch.isfinite(generation.latents).all():
            raise CannotPaint("The picture came out as not-a-number, so none is shown.")
        vae = self.pipeline.vae
        latents = self.pipeline._unpack_latents(
            generation.latents, painting.height, painting.width, self.pipeline.vae_scale_factor
        )
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(latents, return_dict=False)[0]
        picture: Image = self.pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        return picture
