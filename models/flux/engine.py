"""The FLUX engine, in which tasks share one device and advance step by step."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from PIL.Image import Image

from models.base import (
    NO_INPUTS,
    DeviceLost,
    EngineInfo,
    GenerationFailed,
    GenerationTask,
    NonFiniteOutput,
)
from models.flux import acceleration, batch
from models.flux.acceleration import Tier
from models.flux.attempts import Attempts
from models.flux.batch import BatchItem
from models.flux.device import Device, summary
from models.flux.first_block_cache import FirstBlockCache
from models.flux.flops import step_flops
from models.flux.loras import LoraAdapter, LoraManager
from models.flux.preview import Preview
from models.flux.prompt_cache import PromptCache, count_text_tokens
from models.flux.redux import Redux
from models.flux.safety_checker import Checker
from models.flux.sample import Sample, begin, tiled_autoencoder, unpacked
from models.flux.sharing import Sharing
from models.flux.task import FluxTask, open_image, requested_size
from models.loading import devices, specs
from models.loading.memory_plans import PLANS, Plan

log = logging.getLogger(__name__)

#: The side in pixels of the tiles in which an image is decoded if memory is short.
TILE_SIDE = 512
#: After this many images in a row that are not finite, the device counts as lost. Images with LoRAs do not count.
MAX_NONFINITE_IMAGES = 2


class FluxEngine:
    """A FluxPipeline run step by step. Uncompiled, the tier "none" gives the pipeline's own images, bit for bit."""

    def __init__(
        self,
        pipeline: FluxPipeline,
        checker: Checker,
        offered: Sequence[Tier],
        device: str,
        *,
        plan: Plan = PLANS[0],
        redux: Redux | None = None,
        sharing: Sharing | None = None,
        attempts: Attempts | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.checker = checker
        self.tiers = list(offered)
        self.device = Device(device)
        self.prompts = PromptCache(device)
        self.sharing = sharing or Sharing(self.device.now)
        self.plan = plan
        self.loras = LoraManager(pipeline) if plan.is_resident else None
        self.redux = redux
        self.previews = Preview(pipeline.vae)
        self._num_nonfinite = 0
        #: Sides are rounded down to a multiple of this many pixels.
        self.multiple: int = pipeline.vae_scale_factor * 2
        self.num_text_tokens = count_text_tokens(pipeline)
        self.attempts = attempts or Attempts(None)
        #: What failed on this device, each with the reason, for the operator.
        self.unavailable: list[str] = []
        # On a CPU, decoding on a second thread gains nothing: measured, the threads of OpenMP slow each other down.
        self.decodes_concurrently = self.device.decode_stream is not None

    def info(self) -> EngineInfo:
        """Return the device and its memory, the number type, the memory plan, the ready tiers, and what failed."""
        ready = tuple(tier.name for tier in self.tiers if tier.is_ready)
        dtype = devices.type_name(self.pipeline.transformer.dtype)
        memory, unavailable = self.device.memory(), tuple(self.unavailable)
        return EngineInfo(self.device.description, dtype, self.plan.name, ready, *memory, unavailable)

    def warm_up(self) -> bool:
        """Make the next tier ready; return False if all tiers are ready. Raises the error of a tier that fails.

        If a second thread calls this, steps of other tiers continue meanwhile.
        """
        cold = [tier for tier in self.tiers if not tier.is_ready]
        if not cold:
            return False
        tier = cold[0]
        # The ways to run the tier "none" are separate attempts, which the loader makes.
        attempt = self.attempts.attempt(tier.name) if tier.name != "none" else nullcontext()
        try:
            with (
                attempt,
                self.device.classify_errors(tier.name),
                self.device.on_decode_stream(),
                # Another engine may have stopped compiling in this process.
                torch.compiler.set_stance("default"),
            ):
                tier.warm_up(self.device.name, self.pipeline.transformer.dtype, self.num_text_tokens)
        except Exception as error:
            self.tiers.remove(tier)
            if tier.name != "none":
                self.unavailable.append(f"acceleration {tier.name}: {summary(error)}")
            raise
        log.info("acceleration %s is ready", tier.name)
        return True

    def close(self) -> None:
        """Release the device's memory."""
        # Empty this list instead of deleting it, because `warm_up` on another thread may still read it.
        self.tiers = []
        del self.pipeline, self.checker, self.prompts, self.loras, self.redux, self.previews
        self.device.free()

    def freeze_compilation(self) -> None:
        """Stop compiling. From now on, a forward that no compiled code fits runs uncompiled.

        Such a forward is slow, but compiling for it would take a minute. The setting applies to the whole process, so
        all engines must have warmed up before.
        """
        if any(tier.transformer is not self.pipeline.transformer for tier in self.tiers):
            torch.compiler.set_stance("eager_on_recompile")

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> FluxTask:
        """Create a task; fast, because only its first step encodes text and input image. Raises GenerationFailed."""
        loras = tuple(
            LoraAdapter(inputs[f"loras.{place}.path"], lora.scale)
            for place, lora in enumerate(getattr(request, "loras", ()))
        )
        if loras and self.loras is None:
            raise GenerationFailed("LoRA weights do not work with this server's memory plan; use --memory resident.")
        offered = acceleration.uncompiled_tiers(self.tiers) if loras else self.tiers
        tier = acceleration.best_ready(offered, request.acceleration)
        image, mask = (open_image(inputs.get(name)) for name in ("image_url", "mask_url"))
        # In a request without a strength, the image takes the place of the prompt, and generation starts from noise.
        start, reference_image = (image, None) if hasattr(request, "strength") else (None, image)
        if reference_image and self.redux is None:
            raise GenerationFailed(f"An image cannot replace the prompt, because {specs.REDUX.hub_id} is missing here.")
        width, height = (self._round_down(side) for side in requested_size(request, start))
        work = self._step_work(width, height, reference_image)
        dtype = devices.type_name(self.pipeline.transformer.dtype)
        return FluxTask(request, seed, width, height, tier, work, dtype, start, mask, reference_image, loras)

    @torch.no_grad()
    def advance(self, task: GenerationTask, others: Sequence[GenerationTask] = ()) -> Sequence[GenerationTask]:
        """Take a step of `task` and of those `others` that can share its forward; return the tasks that took a step."""
        assert isinstance(task, FluxTask)
        shared, alone = partial(self._step, task, others), partial(self._step_alone, task)
        members, velocities = self.device.retry_on_oom(task.description, shared, alone)
        with self.device.classify_errors(task.description, is_last_try=True):
            for (member, sample), velocity in zip(members, velocities, strict=True):
                sample.step_with(velocity)
                member.step += 1
            event = self.device.throttle()
            for _, sample in members:
                sample.event = event
        return list({id(member): member for member, _ in members}.values())

    @torch.no_grad()
    def preview(self, task: GenerationTask) -> Image | None:
        """Return a small RGB preview of what the newest image will look like, as estimated in its last step."""
        assert isinstance(task, FluxTask)
        samples = [sample for sample in task.samples if sample.velocity is not None]
        if not samples:
            return None
        image: Image = self.previews.image(unpacked(self.pipeline, samples[-1], samples[-1].estimate))
        return image

    @torch.no_grad()
    def decode(self, task: GenerationTask) -> None:
        """Decode the next image. Raises NonFiniteOutput, or DeviceLost if MAX_NONFINITE_IMAGES is reached."""
        assert isinstance(task, FluxTask)
        sample = task.samples[len(task.images)]
        decode = partial(self._decode, sample, self.pipeline.vae)
        try:
            again = partial(self.device.retry_on_oom, task.description, decode, partial(self._decode_in_tiles, sample))
            image = self.device.retry_on_oom(task.description, decode, again)
        except NonFiniteOutput as error:
            # LoRAs can cause this in their own task. Without LoRAs, the weights on the device must be damaged.
            self._num_nonfinite += not task.loras
            if self._num_nonfinite >= MAX_NONFINITE_IMAGES:
                raise DeviceLost("two images in a row had values that are not finite") from error
            raise
        self._num_nonfinite = 0
        task.images.append(image)
        sample.free()

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        """Return for each image whether it is unsafe. Raises GenerationFailed if the check fails."""
        check = partial(self._check_safety, images)
        return self.device.retry_on_oom("the safety check of an image", check, check)

    # -- one step

    def _due(self, task: FluxTask) -> list[Sample]:
        """Return the samples of a task that can take a step; begin further samples if they are due."""
        due = task.due
        while len(task.samples) < task.request.num_images and (not due or task.tier.shares_forwards):
            task.samples.append(self._begin(task, task.seed + len(task.samples)))
            due = task.due
        return due

    def _due_candidates(self, task: FluxTask) -> list[Sample]:
        """Return `_due` of another task; none if an input of that task is bad, which its own step will report."""
        try:
            return self._due(task)
        except RuntimeError:
            # The device failed, not the other task's input.
            raise
        except Exception:
            return []

    def _step(
        self, task: FluxTask, others: Sequence[GenerationTask], limit: int | None = None
    ) -> tuple[list[BatchItem], Sequence[torch.Tensor]]:
        """Run the next forward, of at most `limit` samples; return its samples with their tasks, and the velocities."""
        members = self._select_batch(task, [other for other in others if isinstance(other, FluxTask)])[:limit]
        size = (task.tier.name, bool(task.loras), members[0][1].num_tokens)
        members = members[: self.sharing.number(size, len(members))]
        transformer = self._pipeline_of(task).transformer if task.loras else task.tier.transformer
        with self.sharing.timed(size, len(members)):
            return members, batch.predict_velocities(transformer, [sample for _, sample in members])

    def _step_alone(self, task: FluxTask) -> tuple[list[BatchItem], Sequence[torch.Tensor]]:
        """Run the forward of one sample alone, after unloading the LoRAs that the task does not use."""
        if self.loras:
            self.loras.unload_idle(task.loras)
        return self._step(task, (), limit=1)

    def _select_batch(self, task: FluxTask, others: Sequence[FluxTask]) -> list[BatchItem]:
        """Select samples for the next forward: those of `task` first, then those of tasks that may share it."""
        candidates = [other for other in others if batch.can_share(task, other)]
        due = [(task, self._due(task)), *((other, self._due_candidates(other)) for other in candidates)]
        return batch.select_batch(due)

    def _step_work(self, width: int, height: int, reference_image: Image | None) -> int:
        num_text_tokens = self.redux.num_tokens if reference_image and self.redux else self.num_text_tokens
        return step_flops(self.pipeline.transformer.config, width * height // self.multiple**2, num_text_tokens)

    # -- start and end of an image

    def _round_down(self, side: int) -> int:
        return max(self.multiple, side // self.multiple * self.multiple)

    def _begin(self, task: FluxTask, seed: int) -> Sample:
        if task.reference_image and self.redux:
            text = self.redux.encode(task.reference_image)
        else:
            text = self.prompts.encode(task.request.prompt, self._pipeline_of(task), task.loras)
        size = (task.width, task.height)
        sample = begin(self.pipeline, self.device.name, text, task.request, size, seed, task.init_image, task.mask)
        sample.cache = FirstBlockCache() if task.tier.skips_blocks else None
        return sample

    def _pipeline_of(self, task: FluxTask) -> Any:
        """Return the pipeline with the task's LoRAs active, or the plain one for a task without LoRAs."""
        return self.loras.activate(task.loras) if self.loras and task.loras else self.pipeline

    def _decode(self, sample: Sample, vae: Any) -> Image:
        with self.device.on_decode_stream(sample.latents, sample.event):
            latents = unpacked(self.pipeline, sample, sample.latents)
            decoded = vae.decode(latents, return_dict=False)[0]
            if not (torch.isfinite(latents).all() and torch.isfinite(decoded).all()):
                raise NonFiniteOutput("The image has values that are not finite, so no image is returned.")
            image: Image = self.pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        return image

    def _decode_in_tiles(self, sample: Sample) -> Image:
        """Decode with less memory, in tiles whose seams are blended, which changes the image slightly."""
        log.warning("decoding an image in tiles of %d pixels, because the memory is short", TILE_SIDE)
        return self._decode(sample, tiled_autoencoder(self.pipeline, TILE_SIDE))

    def _check_safety(self, images: Sequence[Image]) -> Sequence[bool]:
        with self.device.on_decode_stream():
            return self.checker.is_unsafe(images)
