"""A comparison of the engine's speed with that of diffusers' pipeline, in alternating runs in one process."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from models.base import EngineConfig
from models.flux import acceleration, safety_checker
from models.flux.acceleration import Tier
from models.flux.device import Device
from models.flux.engine import FluxEngine
from models.flux.flops import step_flops
from models.flux.prompt_cache import count_text_tokens
from models.loading.memory_plans import PLANS, Plan

PROMPT = "a red apple on a blue table"
GUIDANCE_SCALE = 3.5


@dataclass(frozen=True)
class Workload:
    """The workload to measure: a size in pixels, a number of steps, and how many requests run at the same time."""

    width: int
    height: int
    num_steps: int
    num_waiting: int = 1


@dataclass(frozen=True)
class Measurement:
    """The speed of one way to run a workload, as medians over the rounds.

    Attributes:
        way: "naive" calls FluxPipeline, "eager" is the engine with the same kernels, and others are the engine's tiers.
        size: width and height in pixels, such as "1024x768".
        seconds: seconds per image, for text encoding, steps and decoding, without loading.
        ms_per_step: milliseconds per step and image, without text encoding and decoding; None for "naive", whose steps
            are not timed.
        ratio: the speed as a multiple of the speed of "naive".
        share: FLOP per second of the steps as a share of the device's matmul rate; None for "naive".
        peak_gb: peak device memory in 10**9 bytes, including the weights of all tiers; None on a CPU.
    """

    way: str
    size: str
    num_steps: int
    num_waiting: int
    seconds: float
    ms_per_step: float | None
    ratio: float
    share: float | None
    peak_gb: float | None


@dataclass(frozen=True)
class _Timing:
    seconds: float
    step_seconds: float | None
    peak: int | None


class EngineBenchmark:
    """A benchmark of diffusers' pipeline against each tier of the engine, all built from the same weights."""

    def __init__(self, pipeline: Any, device: str, config: EngineConfig, plan: Plan = PLANS[0]) -> None:
        self.pipeline = pipeline
        self.device = device
        self._now = Device(device).now
        self.rate = Device(device).matmul_rate(pipeline.transformer.dtype)
        # Neither diffusers nor the engine runs a safety checker here.
        self._checker = safety_checker.Unavailable("not used")
        self.engines = {"eager": self._engine(Tier("none", pipeline.transformer))}
        way = acceleration.ways(config, device, plan)[0]
        for tier in acceleration.build(pipeline, config, plan, way)[0]:
            # Without compilation, the tier "none" is the same as "eager".
            if tier.name != "none" or tier.transformer is not pipeline.transformer:
                self.engines[tier.name] = self._engine(tier)

    def figures(self, job: Workload, num_rounds: int) -> Iterator[Measurement]:
        """Run every way once per round, after one uncounted warm-up round, and yield the measurement of each way."""
        ways: dict[str, Callable[[], _Timing]] = {"naive": lambda: self._naive(job)}
        for name, engine in self.engines.items():
            ways[name] = lambda engine=engine: self._shared(engine, job)  # type: ignore[misc]
        rounds = [{name: generate() for name, generate in ways.items()} for _ in range(num_rounds + 1)][1:]
        naive = statistics.median(one["naive"].seconds for one in rounds)
        for name in ways:
            yield self._figure(name, job, [one[name] for one in rounds], naive)

    def difference(self, job: Workload) -> int:
        """Return the largest difference of a pixel value, 0 to 255, between the images of "naive" and "eager"."""
        tasks, _ = self._generate(self.engines["eager"], job)
        theirs, ours = self._call(job), tasks[0].images[0]
        return int(numpy.abs(numpy.asarray(theirs, dtype=int) - numpy.asarray(ours, dtype=int)).max())

    def _figure(self, name: str, job: Workload, timings: Sequence[_Timing], naive: float) -> Measurement:
        seconds = statistics.median(one.seconds for one in timings)
        stepping = [one.step_seconds for one in timings if one.step_seconds is not None]
        per_step = statistics.median(stepping) / job.num_steps / job.num_waiting if stepping else None
        num_tokens = job.width * job.height // (self.pipeline.vae_scale_factor * 2) ** 2
        flop = step_flops(self.pipeline.transformer.config, num_tokens, count_text_tokens(self.pipeline))
        peaks = [one.peak for one in timings if one.peak is not None]
        return Measurement(
            name,
            f"{job.width}x{job.height}",
            job.num_steps,
            job.num_waiting,
            seconds / job.num_waiting,
            per_step and per_step * 1000,
            naive / seconds,
            per_step and flop / per_step / self.rate,
            max(peaks) / 1e9 if peaks else None,
        )

    def _engine(self, tier: Tier) -> FluxEngine:
        engine = FluxEngine(self.pipeline, self._checker, [tier], self.device)
        while engine.warm_up():
            continue
        return engine

    def _naive(self, job: Workload) -> _Timing:
        started = self._begin()
        for _ in range(job.num_waiting):
            self._call(job)
        return _Timing(self._now() - started, None, self._peak())

    def _shared(self, engine: FluxEngine, job: Workload) -> _Timing:
        started = self._begin()
        # FluxPipeline encodes the prompt in each call, so the engine must not use its cached prompt.
        engine.prompts.evict()
        _, step_seconds = self._generate(engine, job)
        return _Timing(self._now() - started, step_seconds, self._peak())

    def _generate(self, engine: FluxEngine, job: Workload) -> tuple[list[Any], float]:
        """Run one task per waiting request; return the decoded tasks and the seconds that all their steps took."""
        request = SimpleNamespace(
            prompt=PROMPT,
            image_size=SimpleNamespace(width=job.width, height=job.height),
            num_inference_steps=job.num_steps,
            num_images=1,
            guidance_scale=GUIDANCE_SCALE,
            acceleration=engine.tiers[0].name,
        )
        engine.prompts.encode(PROMPT, engine.pipeline)
        started = self._now()
        tasks = [engine.start(request, seed) for seed in range(1, job.num_waiting + 1)]
        while waiting := [task for task in tasks if task.step < task.num_steps]:
            # As in the worker, the task with the least remaining work takes the next step.
            leader = min(waiting, key=lambda task: task.remaining_work)
            engine.advance(leader, [task for task in waiting if task is not leader])
        step_seconds = self._now() - started
        for task in tasks:
            engine.decode(task)
        return tasks, step_seconds

    def _call(self, job: Workload) -> Any:
        return self.pipeline(
            PROMPT,
            width=job.width,
            height=job.height,
            num_inference_steps=job.num_steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator("cpu").manual_seed(1),
            max_sequence_length=count_text_tokens(self.pipeline),
        ).images[0]

    def _begin(self) -> float:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return self._now()

    def _peak(self) -> int | None:
        return int(torch.cuda.max_memory_allocated()) if self.device == "cuda" else None
