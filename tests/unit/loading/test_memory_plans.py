"""Tests of memory plans: which plan is chosen, and that each plan generates images."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks.group_offloading import _is_group_offload_enabled

from models.flux.engine import FluxEngine
from models.loading import fp8, memory_plans, placement, quantization
from models.loading.memory_plans import PLANS, Target, allowed, choose
from tests.support import tiny_flux
from tests.support.tiny_flux import AllSafeChecker, generate, generate_latents, make_request, tiers_of

#: Sizes of the components of FLUX.1 [dev], in bytes.
FLUX_DEV = {
    "transformer": 23_800_000_000,
    "text_encoder_2": 9_500_000_000,
    "text_encoder": 250_000_000,
    "vae": 170_000_000,
}
BY_NAME = {plan.name: plan for plan in PLANS}
CUDA = Target("cuda")


@pytest.fixture(autouse=True)
def fp8_problem(monkeypatch: pytest.MonkeyPatch, torchao_problem: list[str]) -> list[str]:
    """Fake torchao, which rounds to 8 bits here, and a GPU that multiplies in fp8.

    A reason in the returned list says why the GPU cannot.
    """
    reasons: list[str] = []
    monkeypatch.setattr(fp8, "unavailable_reason", lambda: reasons[0] if reasons else None)

    def round_weights(transformer: Any, device: str | None = None) -> None:
        for name, module in transformer.named_modules():
            if fp8.is_large_matrix(module, name):
                module.weight.data = module.weight.data.to(torch.float8_e4m3fn).to(module.weight.dtype)
        transformer.to(device)

    monkeypatch.setattr(fp8, "quantize", round_weights)
    monkeypatch.setattr(quantization, "unavailable_reason", lambda: torchao_problem[0] if torchao_problem else None)
    monkeypatch.setattr(quantization, "quantize", lambda model, kind, device: round_weights(model, device))
    return reasons


@pytest.fixture
def torchao_problem() -> list[str]:
    """Return a list for the reason why torchao cannot be used. Without one, it can."""
    return []


#: The expected plan for FLUX.1 [dev] on a card with this much memory, in GiB, and without torchao.
CARDS = {
    6: ("group-offload", "group-offload"),
    8: ("group-offload", "group-offload"),
    10: ("group-offload", "group-offload"),
    12: ("int4", "group-offload"),
    16: ("int8", "group-offload"),
    20: ("int8", "fp8-storage"),
    24: ("int8", "fp8-storage"),
    32: ("int8", "fp8-storage"),
    40: ("resident", "resident"),
    48: ("resident", "resident"),
    80: ("resident", "resident"),
}


def choose_for(card: int, quantize: str = "auto", *, is_eager: bool = False) -> str:
    """Choose a plan for a card of so many GiB, of which a desktop and the driver take a gigabyte."""
    return choose(allowed("auto", quantize), FLUX_DEV, card * 2**30 - 10**9, Target("cuda", is_eager)).name


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("is_eager", [False, True])
def test_each_size_of_card_gets_its_plan(
    card: int, is_eager: bool, fp8_problem: list[str], torchao_problem: list[str]
) -> None:
    assert choose_for(card, is_eager=is_eager) == CARDS[card][0]
    for problem in (fp8_problem, torchao_problem):
        problem.append("torchao is not installed")
    assert choose_for(card, is_eager=is_eager) == CARDS[card][1]


@pytest.mark.parametrize(
    ("quantize", "expected"),
    [
        ("none", ["group-offload", "group-offload", "resident"]),
        ("int8", ["int8", "int8", "int8"]),
        ("int4", ["int4", "int4", "int4"]),
    ],
)
def test_the_operator_chooses_the_form_of_the_weights(quantize: str, expected: list[str]) -> None:
    """A form of which there is a single plan is used even if it does not fit."""
    assert [choose_for(card, quantize) for card in (8, 24, 80)] == expected


def test_fp8_is_computed_with_where_it_compiles(fp8_problem: list[str]) -> None:
    assert choose_for(24, "fp8") == "fp8"
    assert choose_for(24, "fp8", is_eager=True) == "fp8-storage"
    fp8_problem.append("a card does not support fp8 matrix products")
    assert choose_for(24, "fp8") == "fp8-storage"


def test_a_plan_of_another_form_is_not_allowed() -> None:
    with pytest.raises(ValueError, match="--memory resident cannot be used with --quantize int4"):
        allowed("resident", "int4")


def test_a_cpu_rounds_weights_only_if_it_is_asked_to() -> None:
    cpu = Target("cpu")
    forms = {"auto": "resident", "none": "resident", "fp8": "fp8-storage", "int8": "int8", "int4": "int4"}
    chosen = {form: choose(allowed("auto", form), FLUX_DEV, 0, cpu).name for form in forms}
    assert chosen == forms


#: Peak memory of each plan at 1024x1024, in GB, simulated with fake tensors. The CUDA context, libraries and
#: fragmentation are not included.
SIMULATED = {
    "resident": 35.4,
    "int8": 14.2,
    "fp8": 17.2,
    "fp8-storage": 17.2,
    "int4": 11.0,
    "group-offload": 2.4,
}


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_plans_need_the_simulated_peak_and_a_reserve(plan: memory_plans.Plan) -> None:
    reserve = plan.required_bytes(FLUX_DEV) / 1e9 - SIMULATED[plan.name]
    assert (0.5 if plan.name == "int4" else 1.2) < reserve < 2.6


@pytest.mark.parametrize("quantized_bytes", [4_000_000_000, 6_800_000_000])
def test_weights_quantized_in_their_files_need_the_reserve_of_exact_ones(quantized_bytes: int) -> None:
    """4.0 GB is FLUX.1's transformer in Q2_K, and 6.8 GB in Q4_0."""
    resident = BY_NAME["resident"]
    exact = resident.required_bytes(FLUX_DEV) - sum(FLUX_DEV.values())
    sizes = FLUX_DEV | {"transformer": quantized_bytes}
    assert resident.required_bytes(sizes) - sum(sizes.values()) == pytest.approx(exact, rel=0.03)


def test_a_plan_that_just_fits_is_chosen() -> None:
    needs = [plan.required_bytes(FLUX_DEV) for plan in PLANS]
    for plan, needed in zip(PLANS, needs, strict=True):
        chosen = choose(PLANS, FLUX_DEV, int(needed) + 1, Target("cuda", is_eager=True))
        # The plans in fp8 need more than "int8", which changes images less.
        assert chosen.name == ("int8" if plan.quantize == "fp8" else plan.name)


def test_when_no_plan_fits_the_error_names_free_and_required_memory() -> None:
    with pytest.raises(OSError, match=r"has 2\.0 GB free.* need at least 4\.9 GB.*--memory"):
        choose(PLANS, FLUX_DEV, 2 * 10**9, CUDA)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("free", [0, 80 * 10**9])
def test_a_named_plan_is_used_regardless_of_free_memory(plan: memory_plans.Plan, free: int) -> None:
    assert choose((plan,), FLUX_DEV, free, CUDA) is plan


@pytest.mark.parametrize(
    ("device", "is_eager", "expected"),
    [
        ("cpu", False, "memory plan fp8: on a CPU, products in fp8 are slow; choose another plan"),
        ("cuda", True, "memory plan fp8: products in fp8 are slow unless they are compiled; choose another plan"),
        ("cuda", False, "memory plan fp8: a card does not support fp8 matrix products; choose another plan"),
    ],
)
def test_a_named_plan_that_the_device_cannot_use_is_an_error(
    device: str, is_eager: bool, expected: str, fp8_problem: list[str]
) -> None:
    fp8_problem.append("a card does not support fp8 matrix products")
    with pytest.raises(memory_plans.PlanFailed, match=expected):
        choose(allowed("fp8", "auto"), FLUX_DEV, 80 * 10**9, Target(device, is_eager))


def test_a_plan_that_the_device_cannot_use_is_left_out(fp8_problem: list[str]) -> None:
    _, int8, fp8_plan, fp8_storage, _, group_offload = PLANS
    assert memory_plans.following(int8, PLANS, CUDA) is fp8_plan
    assert memory_plans.following(int8, PLANS, Target("cuda", is_eager=True)) is fp8_storage
    assert memory_plans.following(int8, PLANS, Target("cuda", fp8_failure="CantSplit")) is fp8_storage
    fp8_problem.append("a reason")
    assert memory_plans.following(int8, PLANS, CUDA) is fp8_storage
    assert memory_plans.following(group_offload, PLANS, CUDA) is None


def test_weights_that_cannot_be_quantized_lead_to_the_next_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    (plan,) = (plan for plan in PLANS if plan.needs_fp8)
    errors: list[Exception] = [ImportError("torchao does not load"), torch.OutOfMemoryError("full")]

    def fail(*_: Any) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(fp8, "quantize", fail)
    pipeline = tiny_flux.pipeline(torch.bfloat16)
    with pytest.raises(memory_plans.PlanFailed, match="cannot be quantized: ImportError: torchao does not load"):
        plan.place(pipeline, "cpu")
    with pytest.raises(torch.OutOfMemoryError):
        plan.place(pipeline, "cpu")


def test_room_is_that_of_the_named_plan() -> None:
    assert memory_plans.has_room(allowed("fp8", "auto"), FLUX_DEV, 24 * 10**9)
    assert not memory_plans.has_room(PLANS, FLUX_DEV, 24 * 10**9)


def test_plans_that_keep_the_transformer_on_the_device_can_be_compiled() -> None:
    assert [plan.name for plan in PLANS if plan.is_resident] == ["resident"]
    assert [plan.name for plan in PLANS if plan.can_compile] == ["resident", "int8", "fp8", "int4"]


def engine_with_plan(name: str) -> FluxEngine:
    pipeline = BY_NAME[name].apply(tiny_flux.pipeline(torch.bfloat16), "cpu")
    return FluxEngine(
        pipeline, AllSafeChecker(), tiers_of(pipeline.transformer), "cpu", sharing=tiny_flux.AlwaysShare()
    )


@pytest.mark.parametrize("has_room", [True, False])
def test_blocks_are_pinned_once_if_the_host_has_room(monkeypatch: pytest.MonkeyPatch, has_room: bool) -> None:
    settings: list[dict[str, Any]] = []
    monkeypatch.setattr("diffusers.hooks.apply_group_offloading", lambda _, **given: settings.append(given))
    module = tiny_flux.transformer(torch.bfloat16)
    available = 3 * num_bytes(module) if has_room else num_bytes(module)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    placement.offload(module, "cuda")
    assert [(given["low_cpu_mem_usage"], given["use_stream"]) for given in settings] == [(not has_room, True)]


def num_bytes(module: Any) -> int:
    return sum(weight.nbytes for weight in module.parameters())


REQUEST = make_request(width=96, height=64, num_inference_steps=3)


@pytest.mark.parametrize("name", ["resident", "group-offload"])
def test_plans_with_unchanged_weights_generate_the_same_image(name: str) -> None:
    engine, expected = engine_with_plan(name), tiny_flux.engine(torch.bfloat16)
    assert torch.equal(generate_latents(engine, REQUEST, 1), generate_latents(expected, REQUEST, 1))
    assert generate(engine, REQUEST, 1)[0].tobytes() == generate(expected, REQUEST, 1)[0].tobytes()


def test_large_components_are_offloaded_in_groups() -> None:
    def offloaded(name: str) -> list[str]:
        components = engine_with_plan(name).pipeline.components.items()
        return [
            part
            for part, module in components
            if getattr(module, "parameters", None) and _is_group_offload_enabled(module)
        ]

    assert sorted(offloaded("group-offload")) == ["text_encoder_2", "transformer"]
    assert offloaded("int8") == offloaded("fp8") == offloaded("fp8-storage") == ["text_encoder_2"]
    assert offloaded("resident") == offloaded("int4") == []


def test_8_bit_weights_take_as_much_memory_as_the_plan_says() -> None:
    with torch.device("meta"):
        exact = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
        stored = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    stored.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert num_bytes(exact) == pytest.approx(FLUX_DEV["transformer"], rel=1e-3)
    assert num_bytes(stored) / num_bytes(exact) == pytest.approx(memory_plans.FP8_SHARE, abs=0.01)
    assert num_bytes(stored) <= memory_plans.FP8_SHARE * num_bytes(exact)


def test_8_bit_weights_generate_nearly_the_same_image_in_less_memory() -> None:
    engine, exact = engine_with_plan("fp8-storage"), tiny_flux.engine(torch.bfloat16)
    assert num_bytes(engine.pipeline.transformer) < 0.7 * num_bytes(exact.pipeline.transformer)
    one, other = generate_latents(engine, REQUEST, 1).float(), generate_latents(exact, REQUEST, 1).float()
    assert 0 < (one - other).norm() < 0.05 * other.norm()
    (image,) = generate(engine, REQUEST, 1)
    assert image.size == (96, 64)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("acceleration", ["regular", "high"])
def test_every_plan_generates_images_in_every_tier(name: str, acceleration: str) -> None:
    engine = engine_with_plan(name)
    tasks = [engine.start(make_request(acceleration=acceleration), seed) for seed in range(2)]
    for task in tasks:
        while task.step < task.num_steps:
            engine.advance(task, [other for other in tasks if other is not task])
        engine.decode(task)
        assert task.is_decoded
