"""Every kind of endpoint with FLUX.1's shapes on a fake GPU: plans keep their promises, and no step waits.

An operation whose tensors are on different devices raises an error, as on a GPU.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.flux.sample import Sample
from models.loading.memory_plans import PLANS, Plan
from tests.cuda.engines import (
    GROUP_OFFLOAD,
    IN_CHANNELS,
    NUM_STEPS,
    RESIDENT,
    SIDE,
    WAITS,
    Files,
    adapted_task,
    check_plan,
    engine_with,
    generate,
    request,
)
from tests.cuda.engines import files as files
from tests.cuda.fake_gpu import H100, fake_gpu
from tests.cuda.recorder import recorded

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.timeout(900),
    # A fake tensor has no values, so diffusers takes those of an image for values from -1 to 1.
    pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning"),
]


@pytest.mark.parametrize("kind", IN_CHANNELS)
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_every_endpoint_keeps_to_the_plan_and_no_step_waits_for_the_gpu(
    plan: Plan, kind: str, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_plan(plan, files, monkeypatch, kind)


def test_weights_without_guidance() -> None:
    """FLUX.1 [schnell] has no guidance embedding; otherwise it has the shapes of [dev]."""
    with fake_gpu(H100), recorded() as recorder:
        engine = engine_with(RESIDENT, guidance_embeds=False)
        for tier in engine.tiers:
            run = generate(engine, recorder, engine.start(request(tier.name, SIDE), 1))
            assert len(run.waits) == WAITS[tier.name] * (NUM_STEPS - 1) and not run.uploads


def test_a_control_net_and_an_ip_adapter(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control net has as many blocks as the published unions of 6.6 GB. No plan counts its memory."""
    with fake_gpu(H100), recorded() as recorder:
        engine = engine_with(RESIDENT)
        placed = recorder.live
        task = adapted_task(engine, monkeypatch, files, torch.bfloat16, SIDE, num_layers=5, num_single_layers=10)
        run = generate(engine, recorder, task)
        assert not run.waits and not run.uploads
        print(f"resident, control net and IP adapter, in GB: {placed / 1e9:.1f} placed, {run.peak / 1e9:.1f}")


# -- faults, each of which must be found


def test_a_plan_that_promises_too_little_is_found(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    too_little = replace(GROUP_OFFLOAD, required_bytes=lambda sizes: GROUP_OFFLOAD.required_bytes(sizes) - 2e9)
    with pytest.raises(AssertionError, match="the plan promises too little"):
        check_plan(too_little, files, monkeypatch)


def check_finite(velocity: torch.Tensor) -> None:
    assert velocity.isfinite().all()


def copy_to_the_cpu(velocity: torch.Tensor) -> None:
    velocity.cpu()


def copy_from_the_cpu(velocity: torch.Tensor) -> None:
    velocity.add_(torch.zeros(velocity.shape).to(velocity.device))


def multiply_in_float32(velocity: torch.Tensor) -> None:
    torch.einsum("btc,btd->bcd", velocity.float(), velocity.float())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (check_finite, "steps wait for the GPU"),
        (copy_to_the_cpu, "steps wait for the GPU"),
        (copy_from_the_cpu, "steps copy tensors"),
        (multiply_in_float32, "steps multiply in {torch.float32}"),
    ],
)
def test_a_faulty_step_is_found(
    files: Files, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], None], message: str
) -> None:
    step_with = Sample.step_with

    def faulty(sample: Sample, velocity: torch.Tensor) -> None:
        fault(velocity)
        step_with(sample, velocity)

    monkeypatch.setattr(Sample, "step_with", faulty)
    with pytest.raises(AssertionError, match=message):
        check_plan(RESIDENT, files, monkeypatch, "fill")
