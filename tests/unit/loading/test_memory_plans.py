"""Memory plans: which one is chosen, and that each of them paints."""

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks.group_offloading import _is_group_offload_enabled

from models.flux.engine import FluxEngine
from models.loading import memory_plans
from models.loading.memory_plans import PLANS, choose
from tests.support import tiny_flux
from tests.support.tiny_flux import CallsAllSafe, asked, latents_of, painted, tiers_of

#: FLUX.1 [dev], in bytes.
FLUX_DEV = {
    "transformer": 23_800_000_000,
    "text_encoder_2": 9_500_000_000,
    "text_encoder": 250_000_000,
    "vae": 170_000_000,
}
BY_NAME = {plan.name: plan for plan in PLANS}


@pytest.mark.parametrize(
    ("free", "name"),
    [
        (80, "resident"),
        (42, "resident"),
        (24, "fp8-storage"),
        (16, "group-offload"),
        (12, "group-offload"),
    ],
)
def test_the_fastest_that_fits_is_chosen(free: int, name: str) -> None:
    assert choose("auto", FLUX_DEV, free * 10**9).name == name


def test_what_fits_just_so_fits() -> None:
    for faster, plan in zip((None, *PLANS), PLANS, strict=False):
        needs = plan.required_bytes(FLUX_DEV)
        assert choose("auto", FLUX_DEV, int(needs) + 1) is plan
        assert faster is None or faster.required_bytes(FLUX_DEV) > needs


def test_where_nothing_fits_both_figures_are_named() -> None:
    with pytest.raises(OSError, match=r"has 2\.0 GB free.* need 7\.2 GB at least.*--memory"):
        choose("auto", FLUX_DEV, 2 * 10**9)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("free", [0, 80 * 10**9])
def test_a_named_plan_is_taken_whatever_is_free(plan: memory_plans.Plan, free: int) -> None:
    assert choose(plan.name, FLUX_DEV, free) is plan


def test_only_what_stays_as_it_is_can_be_compiled() -> None:
    assert [plan.name for plan in PLANS if plan.is_resident] == ["resident"]
    assert memory_plans.NAMES == ("auto", "resident", "fp8-storage", "group-offload")


def placed(name: str) -> FluxEngine:
    parts = BY_NAME[name].apply(tiny_flux.pipeline(torch.bfloat16), "cpu")
    return FluxEngine(parts, CallsAllSafe(), tiers_of(parts.transformer), "cpu", sharing=tiny_flux.SharesAlways())


def num_bytes(module: Any) -> int:
    return sum(weight.nbytes for weight in module.parameters())


REQUEST = asked(width=96, height=64, num_inference_steps=3)


@pytest.mark.parametrize("name", ["resident", "group-offload"])
def test_weights_that_stay_as_they_are_paint_the_same(name: str) -> None:
    engine, expected = placed(name), tiny_flux.engine(torch.bfloat16)
    assert torch.equal(latents_of(engine, REQUEST, 1), latents_of(expected, REQUEST, 1))
    assert painted(engine, REQUEST, 1)[0].tobytes() == painted(expected, REQUEST, 1)[0].tobytes()


def test_what_is_large_is_brought_block_by_block() -> None:
    def brought(name: str) -> list[str]:
        parts = placed(name).pipeline.components.items()
        return [
            part for part, module in parts if getattr(module, "parameters", None) and _is_group_offload_enabled(module)
        ]

    assert sorted(brought("group-offload")) == ["text_encoder_2", "transformer"]
    assert brought("fp8-storage") == ["text_encoder_2"]
    assert brought("resident") == []


def test_8_bits_take_as_much_as_the_plan_says() -> None:
    with torch.device("meta"):
        exact = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
        stored = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    stored.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert num_bytes(exact) == pytest.approx(FLUX_DEV["transformer"], rel=1e-3)
    assert num_bytes(stored) / num_bytes(exact) == pytest.approx(memory_plans.FP8_SHARE, abs=0.01)
    assert num_bytes(stored) <= memory_plans.FP8_SHARE * num_bytes(exact)


def test_8_bits_paint_nearly_the_same_in_less_memory() -> None:
    engine, exact = placed("fp8-storage"), tiny_flux.engine(torch.bfloat16)
    assert num_bytes(engine.pipeline.transformer) < 0.7 * num_bytes(exact.pipeline.transformer)
    one, other = latents_of(engine, REQUEST, 1).float(), latents_of(exact, REQUEST, 1).float()
    assert 0 < (one - other).norm() < 0.05 * other.norm()
    (picture,) = painted(engine, REQUEST, 1)
    assert picture.size == (96, 64)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("acceleration", ["regular", "high"])
def test_every_plan_paints_in_every_tier(name: str, acceleration: str) -> None:
    engine = placed(name)
    paintings = [engine.start(asked(acceleration=acceleration), seed) for seed in range(2)]
    for painting in paintings:
        while painting.step < painting.num_steps:
            engine.advance(painting, [other for other in paintings if other is not painting])
        engine.decode(painting)
        assert painting.is_decoded
