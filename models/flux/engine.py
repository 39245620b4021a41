"""The FLUX engine, in which tasks share one device and advance step by step."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from PIL.Image import Image

from models.base import (
    NO_INPUTS,
    EngineInfo,
    GenerationTask,
)
from models.flux import acceleration, batch, control, fill, input_images, real_cfg, warm_up
from models.flux.acceleration import Tier
from models.flux.attempts import Attempts
from models.flux.batch import BatchItem
from models.flux.control import DepthEstimator
from models.flux.decoder import Decoder
from models.flux.device import Device
from models.flux.first_block_cache import FirstBlockCache
from models.flux.image_adapters import ImageAdapters
from models.flux.loras import CACHE_BYTES, SMALL_CACHE_BYTES, LoraManager, adapters_of
from models.flux.preview import Preview
from models.flux.prompt_cache import PromptCache, PromptEmbeds, count_text_tokens
from models.flux.real_cfg import RealCfg
from models.flux.redux import Redux
from models.flux.safety_checker import Checker
from models.flux.sample import Sample, begin, unpacked
from models.flux.sharing import Sharing
from models.flux.task import FluxTask
from models.flux.work import step_work, work_of_control_nets
from models.loading import conditioning, devices
from models.loading.memory_plans import PLANS, Plan


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
        depth_estimator: DepthEstimator | None = None,
        control_loras: Mapping[str, Path] = NO_INPUTS,
        clip_vision: Path | None = None,
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
        self.loras = LoraManager(pipeline, device, CACHE_BYTES if plan.is_resident else SMALL_CACHE_BYTES)
        self.image_adapters = ImageAdapters(pipeline, clip_vision)
        self.redux = redux
        self.depth_estimator = depth_estimator
        #: The files of the server's control LoRAs, by name: "canny" or "depth".
        self.control_loras = control_loras
        self.previews = Preview(pipeline.vae)
        self.decoder = Decoder(pipeline, self.device)
        #: Sides are rounded down to a multiple of this many pixels.
        self.multiple: int = pipeline.vae_scale_factor * 2
        self.num_text_tokens = count_text_tokens(pipeline)
        self.kind = conditioning.kind_of(pipeline)
        self.attempts = attempts or Attempts(None)
        #: How the transformer runs, for the operator.
        self.way = ""
        #: The form of the transformer's weights in their files, such as "GGUF Q4_0".
        self.form = ""
        #: What failed on this device, each with the reason, for the operator.
        self.unavailable: list[str] = []
        # On a CPU, decoding on a second thread gains nothing: measured, the threads of OpenMP slow each other down.
        self.decodes_concurrently = self.device.decode_stream is not None

    def info(self) -> EngineInfo:
        """Return the device, its memory, the number type, the plan, the ready tiers, what failed, and how it runs."""
        ready = tuple(tier.name for tier in self.tiers if tier.is_ready)
        dtype = devices.type_name(self.pipeline.transformer.dtype)
        memory, unavailable = self.device.memory(), tuple(self.unavailable)
        return EngineInfo(
            self.device.description, dtype, self.plan.name, ready, *memory, unavailable, self.way, self.form
        )

    def warm_up(self) -> bool:
        """Make the next tier ready, then the compiled decoder, then LoRAs; return False if all are ready.

        Raises the error of what fails. It is not tried again, and requests do without it. If a second thread calls
        this, steps of other tiers continue meanwhile.
        """
        return warm_up.warm_up_next(self)

    def close(self) -> None:
        """Release the device's memory."""
        # Empty this list instead of deleting it, because `warm_up` on another thread may still read it.
        self.tiers = []
        self.decoder.close()
        del self.pipeline, self.checker, self.prompts, self.loras, self.image_adapters
        del self.redux, self.previews, self.depth_estimator
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
        images = input_images.read(request, inputs).on(self.kind)
        images.check(
            self.kind,
            has_redux=self.redux is not None,
            has_depth=self.depth_estimator is not None,
            control_loras=self.control_loras,
        )
        loras = adapters_of(request, inputs, images.control_lora, self.control_loras)
        adapter_images = self.image_adapters.images_of(request, inputs, self.plan)
        choose = acceleration.tiers_for_loras if loras and not adapter_images else acceleration.uncompiled_tiers
        offered = choose(self.tiers) if loras or adapter_images else self.tiers
        tier = acceleration.best_ready(offered, getattr(request, "acceleration", "none"))
        sides = input_images.requested_size(request, images, self.multiple)
        width, height = (max(self.multiple, side // self.multiple * self.multiple) for side in sides)
        work = step_work(self, request, (width, height), images)
        dtype = devices.type_name(self.pipeline.transformer.dtype)
        return FluxTask(request, seed, width, height, tier, work, dtype, images, loras, adapter_images)

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
        """Decode the next image. Raises NonFiniteOutput, or DeviceLost after several such images."""
        assert isinstance(task, FluxTask)
        sample = task.samples[len(task.images)]
        image = self.decoder.decode(sample, task.description, can_overflow=task.can_overflow)
        task.images.append(fill.finish(image, task.request, task.inputs))
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
        first = members[0][1]
        size = (task.tier.name, bool(task.loras), first.num_tokens, first.real_cfg is not None)
        members = members[: self.sharing.number(size, len(members))]
        compiled = task.tier.lora_transformer if task.loras else task.tier.transformer
        if task.loras and (limit == 1 or not self.loras.fit_compiled(task.loras)):
            # Compiled code takes more memory for LoRAs than their files have.
            compiled = None
        transformer = compiled or self.pipeline.transformer
        with (
            self.loras.in_transformer(task.loras, transformer),
            self.image_adapters.attached(transformer, task.adapter_images),
            self.sharing.timed(size, len(members)),
        ):
            return members, batch.predict_velocities(transformer, [sample for _, sample in members])

    def _step_alone(self, task: FluxTask) -> tuple[list[BatchItem], Sequence[torch.Tensor]]:
        """Run the forward of one sample alone, after unloading the LoRAs and other adapters that it does not use."""
        self.loras.unload_idle(task.loras)
        self.image_adapters.unload_idle(task.adapter_images)
        return self._step(task, (), limit=1)

    def _select_batch(self, task: FluxTask, others: Sequence[FluxTask]) -> list[BatchItem]:
        """Select samples for the next forward: those of `task` first, then those of tasks that may share it."""
        candidates = [other for other in others if batch.can_share(task, other)]
        due = [(task, self._due(task)), *((other, self._due_candidates(other)) for other in candidates)]
        return batch.select_batch(due)

    # -- start and end of an image

    def _begin(self, task: FluxTask, seed: int) -> Sample:
        if task.inputs.prompt and self.redux:
            text = self.redux.encode(task.inputs.prompt)
        else:
            text = self._encode(task.request.prompt, task)
        if task.inputs.after_prompt and self.redux:
            text = self.redux.append(text, task.inputs.after_prompt)
        size = (task.width, task.height)
        task.inputs = control.prepare(task.inputs, size, self.depth_estimator)
        nets, followed = self.image_adapters.control_nets, task.adapter_images.control
        images = list(zip(followed, nets.finders(followed), strict=True))
        sample = begin(self.pipeline, self.device.name, text, task.request, size, seed, task.inputs, images)
        sample.image_prompts = self.image_adapters.ip_adapters.prompts(task.adapter_images.prompts)
        if real_cfg.is_used(task.request):
            sample.real_cfg = RealCfg(self._encode(task.request.negative_prompt, task), task.request.real_cfg_scale)
        if not task.samples:
            task.step_work += work_of_control_nets(self, nets.load(followed), task.size)
        # With real guidance, the two forwards of a step would overwrite each other's first blocks.
        sample.cache = FirstBlockCache() if task.tier.skips_blocks and not sample.real_cfg else None
        return sample

    def _encode(self, prompt: str, task: FluxTask) -> PromptEmbeds:
        with self.loras.in_text_encoder(task.loras):
            text: PromptEmbeds = self.prompts.encode(prompt, self.pipeline, task.loras)
        return text

    def _check_safety(self, images: Sequence[Image]) -> Sequence[bool]:
        with self.device.on_decode_stream():
            return self.checker.is_unsafe(images)
