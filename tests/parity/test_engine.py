"""The step loop against diffusers' own pipeline, bit for bit, and which tasks share a forward."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from models.base import EngineConfig
from models.flux.batch import TOKEN_BUDGET
from models.flux.engine import FluxEngine
from models.flux.loader import load_engine
from models.flux.prompt_cache import PromptEmbeds
from models.flux.task import FluxTask
from models.flux_dev import FluxDevInput
from models.image_size import PRESETS
from models.loading.devices import dtype_for
from models.loading.specs import DEMO
from tests.support import tiny_flux
from tests.support.diffusers_calls import image_of
from tests.support.tiny_flux import (
    difference,
    finish_task,
    generate,
    generate_latents,
    make_request,
    record_batch_sizes,
    run_steps,
)


def call_diffusers(pipeline: FluxPipeline, request: FluxDevInput, seed: int, **arguments: Any) -> Any:
    """Return what FluxPipeline generates for the request: the image, or latents if the arguments ask for them."""
    size = (request.image_size.width, request.image_size.height)
    return image_of(pipeline, request, size, seed=seed, **arguments)


# -- the demo weights


@pytest.fixture(scope="module")
def demo_engine() -> FluxEngine:
    return load_engine(EngineConfig(DEMO, safety_checker="", device="cpu"))


@pytest.fixture(scope="module")
def diffusers_pipeline() -> FluxPipeline:
    """Load the demo weights into a plain FluxPipeline, without any code of this project but the choice of dtype."""
    pipeline = FluxPipeline.from_pretrained(DEMO, dtype=dtype_for("auto", "cpu"), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_the_pipeline(demo_engine: FluxEngine, diffusers_pipeline: FluxPipeline, preset: str) -> None:
    request = FluxDevInput.model_validate(
        {"prompt": "a red apple on a blue table", "image_size": preset, "num_inference_steps": 2, "guidance_scale": 2.5}
    )
    latents_by_step: list[torch.Tensor] = []

    def record_latents(_: Any, __: int, ___: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        latents_by_step.append(inputs["latents"])
        return inputs

    expected = call_diffusers(diffusers_pipeline, request, 11, callback_on_step_end=record_latents)
    task = demo_engine.start(request, 11)
    for latents in latents_by_step:
        demo_engine.advance(task)
        assert torch.equal(task.samples[0].latents, latents)
    (image,) = finish_task(demo_engine, task)
    assert image.size == PRESETS[preset]
    assert difference(image, expected) == 0


def test_sizes_are_rounded_down_to_the_multiple(demo_engine: FluxEngine) -> None:
    assert demo_engine.multiple == 32
    request = FluxDevInput(prompt="", image_size={"width": 500, "height": 333}, num_inference_steps=1)
    assert generate(demo_engine, request, 1)[0].size == (480, 320)


def test_prompt_seed_and_guidance_each_change_the_image(demo_engine: FluxEngine) -> None:
    base = {"prompt": "a fish", "image_size": {"width": 256, "height": 192}, "num_inference_steps": 2}
    first = generate(demo_engine, FluxDevInput.model_validate(base), 1)[0]
    for change, seed in (({"prompt": "a car"}, 1), ({"guidance_scale": 9}, 1), ({}, 2)):
        assert difference(first, generate(demo_engine, FluxDevInput.model_validate({**base, **change}), seed)[0]) > 0


# -- random weights: with guidance and a dynamic shift like FLUX.1 [dev], and without both like FLUX.1 [schnell]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_dev", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("acceleration", ["none", "regular"])
def test_random_weights_equal_the_pipeline(dtype: torch.dtype, is_dev: bool, acceleration: str) -> None:
    settings = {"guidance": is_dev, "dynamic_shift": is_dev}
    engine, pipeline = tiny_flux.engine(dtype, **settings), tiny_flux.pipeline(dtype, **settings)
    for seed, (width, height, num_steps) in enumerate([(96, 64, 4), (80, 176, 1), (160, 112, 3)]):
        request = make_request("a fish", width, height, num_inference_steps=num_steps, acceleration=acceleration)
        task = run_steps(engine, engine.start(request, seed))
        expected = call_diffusers(pipeline, request, seed, output_type="latent")
        assert torch.equal(task.samples[0].latents[0], expected)
        (image,) = finish_task(engine, task)
        assert image.size == (width, height)
        assert difference(image, call_diffusers(pipeline, request, seed)) == 0


# -- without shared forwards


@pytest.fixture(scope="module")
def engine() -> FluxEngine:
    """Build an fp32 engine, which rounds so little that matching and different latents are easy to tell apart."""
    return tiny_flux.engine()


@pytest.fixture(scope="module")
def engine_bf16() -> FluxEngine:
    """Build a bf16 engine, as on a GPU."""
    return tiny_flux.engine(torch.bfloat16)


@pytest.fixture
def batch_sizes(engine: FluxEngine) -> Iterator[list[int]]:
    """Record how many samples go through each forward."""
    with record_batch_sizes(engine.pipeline.transformer) as seen:
        yield seen


def test_images_of_one_request_use_consecutive_seeds(engine_bf16: FluxEngine) -> None:
    images = generate(engine_bf16, make_request("three stars", 96, 64, num_images=3), 40)
    assert len(images) == 3
    for index, image in enumerate(images):
        (alone,) = generate(engine_bf16, make_request("three stars", 96, 64), 40 + index)
        assert difference(image, alone) == 0


def test_steps_and_work_are_counted_over_all_images(engine: FluxEngine) -> None:
    for acceleration in ("none", "regular", "high"):
        one, three = (make_request(num_images=number, acceleration=acceleration) for number in (1, 3))
        alone, task = engine.start(one, 1), engine.start(three, 1)
        assert (task.step, task.num_steps, task.work) == (0, 6, 0)
        run_steps(engine, alone)
        run_steps(engine, task)
        assert (task.step, task.work) == (6, 3 * alone.work)
        for number in range(3):
            assert len(task.images) == number
            assert not task.is_decoded
            engine.decode(task)
        assert task.is_decoded


def test_interleaved_tasks_do_not_affect_each_other(engine_bf16: FluxEngine) -> None:
    requests = [make_request(f"picture {n}", 64 + 32 * n, 64, num_inference_steps=2 + n) for n in range(3)]
    alone = [generate(engine_bf16, request, n)[0] for n, request in enumerate(requests)]
    tasks = [engine_bf16.start(request, n) for n, request in enumerate(requests)]
    while not all(task.is_decoded for task in tasks):
        for task in tasks:
            if task.step < task.num_steps:
                engine_bf16.advance(task)
            elif not task.is_decoded:
                engine_bf16.decode(task)
    assert [difference(task.images[0], image) for task, image in zip(tasks, alone, strict=True)] == [0] * 3


# -- shared forwards


def start_tasks(engine: FluxEngine, number: int, *, acceleration: str = "regular", **arguments: Any) -> list[FluxTask]:
    """Start and return `number` tasks that differ only in prompt and seed."""
    return [
        engine.start(make_request(f"picture {seed}", acceleration=acceleration, **arguments), seed)
        for seed in range(number)
    ]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `other`."""
    return float((one - other).float().norm() / other.float().norm())


def are_same_tasks(tasks: Sequence[FluxTask], expected: Sequence[FluxTask]) -> bool:
    return [id(task) for task in tasks] == [id(task) for task in expected]


@pytest.mark.parametrize("acceleration", ["none", "high"])
def test_tiers_none_and_high_never_share_a_forward(
    engine: FluxEngine, batch_sizes: list[int], acceleration: str
) -> None:
    tasks = start_tasks(engine, 3, acceleration=acceleration, num_images=2)
    for _ in range(4):
        for task in tasks:
            others = [other for other in tasks if other is not task]
            before = [other.step for other in others]
            assert are_same_tasks(engine.advance(task, others), [task])
            assert [other.step for other in others] == before
    assert all(task.step == task.num_steps for task in tasks)
    # A forward with a cache calls the transformer's parts, never the transformer itself.
    assert batch_sizes == ([1] * 12 if acceleration == "none" else [])


def test_tasks_of_one_size_share_a_forward(engine: FluxEngine, batch_sizes: list[int]) -> None:
    tasks = start_tasks(engine, 3)
    assert are_same_tasks(engine.advance(tasks[1], [tasks[2], tasks[0]]), [tasks[1], tasks[2], tasks[0]])
    assert [task.step for task in tasks] == [1, 1, 1]
    assert batch_sizes == [3]


@pytest.mark.parametrize(("width", "height"), [(96, 64), (128, 32)])
def test_tasks_of_different_sizes_do_not_share(
    engine: FluxEngine, batch_sizes: list[int], width: int, height: int
) -> None:
    leader, same_size = start_tasks(engine, 2)
    other_size = engine.start(make_request("a fish", width, height, acceleration="regular"), 3)
    assert are_same_tasks(engine.advance(leader, [other_size, same_size]), [leader, same_size])
    assert are_same_tasks(engine.advance(other_size, [leader, same_size]), [other_size])
    assert batch_sizes == [2, 1]


def test_tasks_with_different_text_lengths_do_not_share(
    engine: FluxEngine, batch_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = engine.prompts.encode

    def encode_shorter(prompt: str, *arguments: Any) -> PromptEmbeds:
        text: PromptEmbeds = encode(prompt, *arguments)
        if prompt != "picture 1":
            return text
        return PromptEmbeds(text.prompt_embeds[:, :256], text.pooled_prompt_embeds, text.ids[:256])

    monkeypatch.setattr(engine.prompts, "encode", encode_shorter)
    tasks = start_tasks(engine, 3)
    assert are_same_tasks(engine.advance(tasks[0], tasks[1:]), [tasks[0], tasks[2]])
    assert are_same_tasks(engine.advance(tasks[1], tasks[::2]), [tasks[1]])
    assert batch_sizes == [2, 1]


@pytest.mark.parametrize("acceleration", ["none", "high"])
def test_a_task_of_another_tier_does_not_join_a_shared_forward(
    engine: FluxEngine, batch_sizes: list[int], acceleration: str
) -> None:
    leader, other = start_tasks(engine, 2)
    (alone,) = start_tasks(engine, 1, acceleration=acceleration)
    assert are_same_tasks(engine.advance(leader, [alone, other]), [leader, other])
    assert alone.step == 0
    assert are_same_tasks(engine.advance(alone, [leader, other]), [alone])
    assert (leader.step, other.step) == (1, 1)
    assert batch_sizes[0] == 2
    assert set(batch_sizes[1:]) <= {1}


def test_no_forward_exceeds_the_token_budget(
    engine: FluxEngine, batch_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 64 * 64 // tiny_flux.PIXELS_A_TOKEN + 512
    monkeypatch.setattr("models.flux.batch.TOKEN_BUDGET", 4 * one - 1)
    tasks = start_tasks(engine, 5)
    assert are_same_tasks(engine.advance(tasks[0], tasks[1:]), tasks[:3])
    monkeypatch.setattr("models.flux.batch.TOKEN_BUDGET", 4 * one)
    assert are_same_tasks(engine.advance(tasks[4], tasks[:4]), [tasks[4], *tasks[:3]])
    # A task that alone exceeds the budget runs alone.
    monkeypatch.setattr("models.flux.batch.TOKEN_BUDGET", 100)
    assert are_same_tasks(engine.advance(tasks[4], tasks[:4]), [tasks[4]])
    assert batch_sizes == [3, 4, 1]


def test_two_tasks_of_the_largest_preset_share_and_three_do_not(engine: FluxEngine, batch_sizes: list[int]) -> None:
    tasks = start_tasks(engine, 3, width=1024, height=1024)
    assert len(engine.advance(tasks[0], tasks[1:])) == 2
    assert [task.samples[0].num_tokens for task in tasks[:2]] == [TOKEN_BUDGET // 2] * 2
    assert batch_sizes == [2]


def test_images_of_one_request_share_a_forward(
    engine: FluxEngine, batch_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(num_images=3, acceleration="regular")
    task = run_steps(engine, engine.start(request, 40))
    assert batch_sizes == [3, 3]
    alone = [generate_latents(engine, make_request(), 40 + index) for index in range(3)]
    for sample, latents in zip(task.samples, alone, strict=True):
        assert distance(sample.latents, latents) < 1e-4
    # With room for two, the third image gets its own forwards.
    batch_sizes.clear()
    monkeypatch.setattr("models.flux.batch.TOKEN_BUDGET", 2 * 528)
    task = run_steps(engine, engine.start(request, 40))
    assert batch_sizes == [2, 2, 1, 1]
    for sample, latents in zip(task.samples, alone, strict=True):
        assert distance(sample.latents, latents) < 1e-4
    assert len(finish_task(engine, task)) == 3


def test_latents_of_shared_forwards_are_close_to_those_generated_alone(
    engine: FluxEngine, engine_bf16: FluxEngine
) -> None:
    for each, tolerance in ((engine, 1e-4), (engine_bf16, 0.03)):
        requests = [
            make_request(f"picture {n}", 96, 64, guidance_scale=2 + n, acceleration="regular") for n in range(4)
        ]
        # Two requests share a prompt and differ in seed; two share a seed and differ in prompt.
        requests[1] = requests[0].model_copy(update={"guidance_scale": 9.0})
        seeds = [1, 2, 3, 3]
        tasks = [each.start(request, seed) for request, seed in zip(requests, seeds, strict=True)]
        while tasks[0].step < tasks[0].num_steps:
            assert are_same_tasks(each.advance(tasks[0], tasks[1:]), tasks)
        alone = [generate_latents(each, request, seed) for request, seed in zip(requests, seeds, strict=True)]
        for index, task in enumerate(tasks):
            distances = [distance(task.samples[0].latents, latents) for latents in alone]
            assert distances[index] < tolerance
            assert min(distances) == distances[index]
            assert sorted(distances)[1] > 3 * distances[index]


def test_pixels_of_shared_forwards_are_close_to_those_generated_alone(engine_bf16: FluxEngine) -> None:
    tasks = start_tasks(engine_bf16, 3, width=96)
    while tasks[0].step < tasks[0].num_steps:
        engine_bf16.advance(tasks[0], tasks[1:])
    for seed, task in enumerate(tasks):
        (alone,) = generate(engine_bf16, make_request(f"picture {seed}", 96), seed)
        (image,) = finish_task(engine_bf16, task)
        assert difference(image, alone) <= 16


def test_tasks_at_different_steps_share_and_drop_out_when_finished(engine: FluxEngine, batch_sizes: list[int]) -> None:
    requests = [make_request(num_inference_steps=steps, acceleration="regular") for steps in (4, 2, 3)]
    early, short, late = (engine.start(request, seed) for seed, request in enumerate(requests))
    engine.advance(early)
    assert are_same_tasks(engine.advance(short, [early]), [short, early])
    # The three are at steps 2, 1 and 0.
    assert are_same_tasks(engine.advance(early, [short, late]), [early, short, late])
    assert short.step == short.num_steps
    assert are_same_tasks(engine.advance(late, [short, early]), [late, early])
    assert early.step == early.num_steps
    # `others` also holds a task that has taken all its steps, and a decoded one.
    engine.decode(short)
    assert are_same_tasks(engine.advance(late, [early, short]), [late])
    assert batch_sizes == [1, 2, 3, 2, 1]
    for seed, task in ((0, early), (2, late)):
        assert distance(task.samples[0].latents, generate_latents(engine, requests[seed], seed)) < 1e-4
        assert len(finish_task(engine, task)) == 1


def test_tier_none_gives_the_same_images_alone_and_among_others(engine_bf16: FluxEngine) -> None:
    request = make_request("a fish", num_inference_steps=3, num_images=2)
    alone = generate(engine_bf16, request, 7)
    task = engine_bf16.start(request, 7)
    others = [
        *start_tasks(engine_bf16, 3, num_inference_steps=6),
        *start_tasks(engine_bf16, 2, acceleration="none", num_inference_steps=6),
        *start_tasks(engine_bf16, 2, acceleration="high", num_inference_steps=6),
    ]
    while task.step < task.num_steps:
        assert are_same_tasks(engine_bf16.advance(task, others), [task])
        for other in others[::3]:
            engine_bf16.advance(other, [task, *(each for each in others if each is not other)])
    assert all(other.step for other in others[::3])
    assert [difference(one, other) for one, other in zip(finish_task(engine_bf16, task), alone, strict=True)] == [0, 0]
