"""A comparison of the engine's speed with that of diffusers' pipeline, in alternating runs in one process."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from PIL.Image import Image

from models.base import GenerationFailed
from models.benchmark.fidelity import compare, references
from models.benchmark.job import ImageFidelity, Measurement, Problem, Workload
from models.flux.acceleration import Tier
from models.flux.device import summary
from models.flux.engine import FluxEngine
from models.flux.flops import step_flops
from models.flux.prompt_cache import count_text_tokens

GUIDANCE_SCALE = 3.5
#: The errors of one way, after which the others can still be measured.
FAILURES = (RuntimeError, GenerationFailed)


@dataclass(frozen=True)
class _Timing:
    """One run of a workload: its seconds, those of all its steps, the share of skipped steps, and the peak bytes."""

    seconds: float
    step_seconds: float | None
    skipped: float | None
    peak: int | None


class EngineBenchmark:
    """A benchmark of diffusers' pipeline against each tier of an engine, all on the same weights.

    The first of the `prompts` is that of the measured images. With a directory of `references`, an image for each
    prompt is compared with that of the tier "none".

    With a plan that needs fp8, the pipeline and the engine are not measured uncompiled: nobody would run them so.
    """

    def __init__(self, engine: FluxEngine, prompts: Sequence[str], references: Path | None = None) -> None:
        self.pipeline = engine.pipeline
        self.device = engine.device
        self.prompts = prompts
        self.references = references
        self.rate = self.device.matmul_rate(self.pipeline.transformer.dtype)
        self.plan = engine.plan
        #: The ways to generate by the engine: for each the engine and the tier's name.
        self.ways: dict[str, tuple[FluxEngine, str]] = {}
        if not self.plan.needs_fp8:
            none = Tier("none", self.pipeline.transformer)
            eager = FluxEngine(self.pipeline, engine.checker, [none], self.device.name, plan=engine.plan)
            self.ways["eager"] = (eager, "none")
        for tier in engine.tiers:
            # Without compilation, the tier "none" is the same as "eager".
            if tier.name != "none" or tier.transformer is not self.pipeline.transformer:
                self.ways[tier.name] = (engine, tier.name)

    def figures(self, job: Workload, num_rounds: int) -> Iterator[Measurement | Problem]:
        """Run every way once per round, after one uncounted warm-up round; yield the measurement of each way.

        A way that fails is left out of the further rounds, and its problem is yielded.
        """
        ways: dict[str, Callable[[], _Timing]] = {}
        if not self.plan.needs_fp8:
            ways["naive"] = partial(self._naive, job)
        ways |= {name: partial(self._shared, *way, job) for name, way in self.ways.items()}
        timings: dict[str, list[_Timing]] = {name: [] for name in ways}
        for _ in range(num_rounds + 1):
            for name in list(timings):
                try:
                    timings[name].append(ways[name]())
                except FAILURES as error:
                    del timings[name]
                    yield Problem(name, job.size, summary(error))
        counted = {name: each[1:] for name, each in timings.items()}
        naive = statistics.median(one.seconds for one in counted["naive"]) if "naive" in counted else None
        for name, each in counted.items():
            measurement = self._measurement(name, job, each, naive)
            try:
                measurement = replace(measurement, fidelity=self._fidelity(name, job))
            except (*FAILURES, LookupError) as error:
                yield Problem(name, job.size, f"no images to compare: {summary(error)}")
            yield measurement

    def difference(self, job: Workload) -> int | None:
        """Return the largest difference of a pixel value, 0 to 255, between the images of "naive" and "eager".

        Return None if these are not measured.
        """
        if "eager" not in self.ways:
            return None
        theirs, ours = self._call(job), self._image("eager", job, self.prompts[0])
        return int(numpy.abs(numpy.asarray(theirs, dtype=int) - numpy.asarray(ours, dtype=int)).max())

    def _measurement(self, name: str, job: Workload, timings: Sequence[_Timing], naive: float | None) -> Measurement:
        seconds = statistics.median(one.seconds for one in timings)
        stepping = [one.step_seconds for one in timings if one.step_seconds is not None]
        per_step = statistics.median(stepping) / job.num_steps / job.num_waiting if stepping else None
        num_tokens = job.width * job.height // (self.pipeline.vae_scale_factor * 2) ** 2
        flop = step_flops(self.pipeline.transformer.config, num_tokens, count_text_tokens(self.pipeline))
        peaks = [one.peak for one in timings if one.peak is not None]
        return Measurement(
            name,
            job.size,
            job.num_steps,
            job.num_waiting,
            seconds / job.num_waiting,
            per_step and per_step * 1000,
            naive and naive / seconds,
            per_step and flop / per_step / self.rate,
            timings[-1].skipped,
            max(peaks) / 1e9 if peaks else None,
        )

    def _fidelity(self, name: str, job: Workload) -> list[ImageFidelity]:
        """Compare an image for each prompt with the reference; empty if no images are compared."""
        if self.references is None or name == "naive":
            return []
        exact = "none" if "none" in self.ways else "eager"
        generate = None if self.plan.quantize != "none" else partial(self._images, exact, job)
        expected = references(self.references, job.size, len(self.prompts), generate)
        images = self._images(name, job)
        return [compare(*each) for each in zip(self.prompts, images, expected, strict=True)]

    def _images(self, name: str, job: Workload) -> list[Image]:
        """Generate an image for each prompt."""
        return [self._image(name, job, prompt) for prompt in self.prompts]

    def _image(self, name: str, job: Workload, prompt: str) -> Image:
        engine, tier = self.ways[name]
        tasks, _, _ = self._generate(engine, tier, replace(job, num_waiting=1), prompt)
        image: Image = tasks[0].images[0]
        return image

    def _naive(self, job: Workload) -> _Timing:
        started = self._begin()
        step_ends: list[float] = []
        for _ in range(job.num_waiting):
            self._call(job, step_ends)
        seconds = self.device.now() - started
        if job.num_steps == 1:
            return _Timing(seconds, None, None, self._peak())
        # The start of the first step cannot be observed, so the time is scaled from the other steps.
        firsts, lasts = step_ends[::2], step_ends[1::2]
        step_seconds = (sum(lasts) - sum(firsts)) * job.num_steps / (job.num_steps - 1)
        return _Timing(seconds, step_seconds, None, self._peak())

    def _shared(self, engine: FluxEngine, tier: str, job: Workload) -> _Timing:
        started = self._begin()
        # FluxPipeline encodes the prompt in each call, so the engine must not use its cached prompt.
        engine.prompts.evict()
        _, step_seconds, skipped = self._generate(engine, tier, job, self.prompts[0])
        return _Timing(self.device.now() - started, step_seconds, skipped, self._peak())

    def _generate(
        self, engine: FluxEngine, tier: str, job: Workload, prompt: str
    ) -> tuple[list[Any], float, float | None]:
        """Run one task per waiting request.

        Return the decoded tasks, the seconds that all their steps took, and the share of the steps that skipped blocks,
        which is None if the tier skips no blocks.
        """
        request = SimpleNamespace(
            prompt=prompt,
            image_size=SimpleNamespace(width=job.width, height=job.height),
            num_inference_steps=job.num_steps,
            num_images=1,
            guidance_scale=GUIDANCE_SCALE,
            acceleration=tier,
        )
        engine.prompts.encode(prompt, engine.pipeline)
        started = self.device.now()
        tasks = [engine.start(request, seed) for seed in range(1, job.num_waiting + 1)]
        while waiting := [task for task in tasks if task.step < task.num_steps]:
            # As in the worker, the task with the least remaining work takes the next step.
            leader = min(waiting, key=lambda task: task.remaining_work)
            engine.advance(leader, [task for task in waiting if task is not leader])
        step_seconds = self.device.now() - started
        # Decoding releases the caches.
        caches = [sample.cache for task in tasks for sample in task.samples if sample.cache]
        skipped = sum(cache.num_skipped for cache in caches) / len(caches) / job.num_steps if caches else None
        for task in tasks:
            engine.decode(task)
        return tasks, step_seconds, skipped

    def _call(self, job: Workload, step_ends: list[float] | None = None) -> Any:
        """Call the pipeline; add to the list when its first and its last step end."""

        def record_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step_ends is not None and step in (0, job.num_steps - 1):
                step_ends.append(self.device.now())
            return tensors

        return self.pipeline(
            self.prompts[0],
            width=job.width,
            height=job.height,
            num_inference_steps=job.num_steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator("cpu").manual_seed(1),
            max_sequence_length=count_text_tokens(self.pipeline),
            callback_on_step_end=record_end,
        ).images[0]

    def _begin(self) -> float:
        if self.device.name == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return self.device.now()

    def _peak(self) -> int | None:
        return int(torch.cuda.max_memory_allocated()) if self.device.name == "cuda" else None
