"""The engine with FLUX.1's shapes on a fake GPU: devices and types fit, plans keep their promises, no step waits.

An operation whose tensors are on different devices raises an error, as on a GPU.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.benchmark import random_weights
from models.flux.acceleration import Tier
from models.flux.engine import FluxEngine
from models.flux.safety_checker import Unavailable
from models.loading.memory_plans import PLANS, Plan
from tests.cuda.fake_gpu import H100, fake_gpu
from tests.cuda.recorder import Recorder, recorded

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(900)]

NUM_STEPS = 3
#: The tiers by the number of values that a step may read back: "high" compares residuals once a step.
READS = {"none": 0, "regular": 0, "high": 1}


def request(acceleration: str, side: int) -> Any:
    size = SimpleNamespace(width=side, height=side)
    fields = {"prompt": "a red apple", "image_size": size, "num_inference_steps": NUM_STEPS, "num_images": 1}
    return SimpleNamespace(**fields, guidance_scale=3.5, acceleration=acceleration)


def engine_with(plan: Plan) -> FluxEngine:
    """Build an engine with FLUX.1's shapes, placed by `plan`, and the tiers that such an engine has, uncompiled."""
    pipeline = random_weights.build("full", "cuda" if plan.is_resident else "cpu", torch.bfloat16)
    pipeline = plan.apply(pipeline, "cuda")
    tiers = [Tier("none", pipeline.transformer)]
    if plan.is_resident:
        tiers.append(Tier("regular", pipeline.transformer, shares_forwards=True))
        tiers.append(Tier("high", pipeline.transformer, skips_blocks=True))
    return FluxEngine(pipeline, Unavailable("not used"), tiers, "cuda", plan=plan)


def generate(engine: FluxEngine, recorder: Recorder, acceleration: str, side: int) -> tuple[int, list[str]]:
    """Generate an image with a preview; return the highest memory, and the reads of all steps but the first."""
    task = engine.start(request(acceleration, side), 1)
    recorder.restart()
    engine.advance(task)
    recorder.reads.clear()
    while task.step < task.num_steps:
        engine.advance(task)
    reads = list(recorder.reads)
    assert {tensor.device.type for tensor in (task.samples[0].latents, task.samples[0].velocity)} == {"cuda"}
    assert task.samples[0].latents.dtype == torch.bfloat16
    engine.preview(task)
    engine.decode(task)
    assert task.images[0].size == (side, side)
    return recorder.peak, reads


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_every_tier_keeps_to_the_plan_and_no_step_waits_for_the_gpu(plan: Plan) -> None:
    promised = plan.required_bytes(random_weights.sizes("full", torch.bfloat16))
    with fake_gpu(H100), recorded() as recorder:
        engine = engine_with(plan)
        placed = recorder.live
        for tier in engine.tiers:
            peak, reads = generate(engine, recorder, tier.name, side=1024)
            figures = f"{placed / 1e9:.1f} GB placed, {peak / 1e9:.1f} GB at most, {promised / 1e9:.1f} GB promised"
            print(f"{plan.name}, {tier.name}: {figures}, {len(reads)} reads in {NUM_STEPS - 1} steps")
            # The promise includes more than a gigabyte for CUDA and its libraries, which fake tensors do not take.
            assert peak + 1e9 < promised
            assert len(reads) == READS[tier.name] * (NUM_STEPS - 1)
