"""The step loop against diffusers' own pipeline, bit for bit, and who shares a forward with whom."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from models.base import EngineConfig
from models.flux.batch import TOKEN_BUDGET
from models.flux.engine import FluxEngine
from models.flux.prompt_cache import PromptEmbeds
from models.flux.task import FluxTask
from models.flux_dev import FluxDevInput
from models.loading.devices import dtype_for
from models.loading.specs import DEMO
from models.schema import PRESETS
from tests.support import tiny_flux
from tests.support.tiny_flux import asked, batches, difference, finished, latents_of, painted, stepped

# This file needs torch; it is imported by the tests that paint, and by them alone.


def call(pipeline: FluxPipeline, request: FluxDevInput, seed: int, **more: Any) -> Any:
    """What FluxPipeline itself gives for this request."""
    return pipeline(
        request.prompt,
        width=request.image_size.width,
        height=request.image_size.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        max_sequence_length=512,
        **more,
    ).images[0]


# -- the demo weights


@pytest.fixture(scope="module")
def demo() -> FluxEngine:
    return FluxEngine.load(EngineConfig(DEMO, safety_checker="", device="cpu"))


@pytest.fixture(scope="module")
def plain() -> FluxPipeline:
    """The demo weights as anybody would load them, without anything of ours."""
    pipeline = FluxPipeline.from_pretrained(DEMO, dtype=dtype_for("auto", "cpu"), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_the_pipeline(demo: FluxEngine, plain: FluxPipeline, preset: str) -> None:
    request = FluxDevInput.model_validate(
        {"prompt": "a red apple on a blue table", "image_size": preset, "num_inference_steps": 2, "guidance_scale": 2.5}
    )
    each_step: list[torch.Tensor] = []

    def look(_: Any, __: int, ___: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        each_step.append(inputs["latents"])
        return inputs

    expected = call(plain, request, 11, callback_on_step_end=look)
    painting = demo.start(request, 11)
    for latents in each_step:
        demo.advance(painting)
        assert torch.equal(painting.samples[0].latents, latents)
    (picture,) = finished(demo, painting)
    assert picture.size == PRESETS[preset]
    assert difference(picture, expected) == 0


def test_sizes_are_rounded_down_to_the_multiple(demo: FluxEngine) -> None:
    assert demo.multiple == 32
    request = FluxDevInput(prompt="", image_size={"width": 500, "height": 333}, num_inference_steps=1)
    assert painted(demo, request, 1)[0].size == (480, 320)


def test_prompt_seed_and_guidance_each_change_the_picture(demo: FluxEngine) -> None:
    base = {"prompt": "a fish", "image_size": {"width": 256, "height": 192}, "num_inference_steps": 2}
    first = painted(demo, FluxDevInput.model_validate(base), 1)[0]
    for change, seed in (({"prompt": "a car"}, 1), ({"guidance_scale": 9}, 1), ({}, 2)):
        assert difference(first, painted(demo, FluxDevInput.model_validate({**base, **change}), seed)[0]) > 0


# -- random weights, with guidance and a shift as FLUX.1 [dev] has them, and without as FLUX.1 [schnell]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_dev", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("acceleration", ["none", "regular"])
def test_random_weights_equal_the_pipeline(dtype: torch.dtype, is_dev: bool, acceleration: str) -> None:
    settings = {"guidance": is_dev, "dynamic_shift": is_dev}
    engine, pipeline = tiny_flux.engine(dtype, **settings), tiny_flux.pipeline(dtype, **settings)
    for seed, (width, height, num_steps) in enumerate([(96, 64, 4), (80, 176, 1), (160, 112, 3)]):
        request = asked("a fish", width, height, num_inference_steps=num_steps, acceleration=acceleration)
        painting = stepped(engine, engine.start(request, seed))
        expected = call(pipeline, request, seed, output_type="latent")
        assert torch.equal(painting.samples[0].latents[0], expected)
        (picture,) = finished(engine, painting)
        assert picture.size == (width, height)
        assert difference(picture, call(pipeline, request, seed)) == 0


# -- one after the other


@pytest.fixture(scope="module")
def engine() -> FluxEngine:
    """In fp32, so that what belongs together is told from what does not by far."""
    return tiny_flux.engine()


@pytest.fixture(scope="module")
def rough() -> FluxEngine:
    """In bf16, as on a GPU."""
    return tiny_flux.engine(torch.bfloat16)


@pytest.fixture
def sizes(engine: FluxEngine) -> Iterator[list[int]]:
    """How many generations went through each forward."""
    with batches(engine.pipeline.transformer) as seen:
        yield seen


def test_pictures_of_one_request_are_those_of_the_next_seeds(rough: FluxEngine) -> None:
    pictures = painted(rough, asked("three stars", 96, 64, num_images=3), 40)
    assert len(pictures) == 3
    for index, picture in enumerate(pictures):
        (alone,) = painted(rough, asked("three stars", 96, 64), 40 + index)
        assert difference(picture, alone) == 0


def test_steps_and_work_are_counted_over_all_pictures(engine: FluxEngine) -> None:
    for acceleration in ("none", "regular", "high"):
        one, three = (asked(num_images=number, acceleration=acceleration) for number in (1, 3))
        alone, painting = engine.start(one, 1), engine.start(three, 1)
        assert (painting.step, painting.num_steps, painting.work) == (0, 6, 0)
        stepped(engine, alone)
        stepped(engine, painting)
        assert (painting.step, painting.work) == (6, 3 * alone.work)
        for number in range(3):
            assert len(painting.images) == number
            assert not painting.is_decoded
            engine.decode(painting)
        assert painting.is_decoded


def test_paintings_that_take_turns_do_not_touch_each_other(rough: FluxEngine) -> None:
    requests = [asked(f"picture {n}", 64 + 32 * n, 64, num_inference_steps=2 + n) for n in range(3)]
    alone = [painted(rough, request, n)[0] for n, request in enumerate(requests)]
    paintings = [rough.start(request, n) for n, request in enumerate(requests)]
    while not all(painting.is_decoded for painting in paintings):
        for painting in paintings:
            if painting.step < painting.num_steps:
                rough.advance(painting)
            elif not painting.is_decoded:
                rough.decode(painting)
    assert [difference(painting.images[0], picture) for painting, picture in zip(paintings, alone, strict=True)] == [
        0
    ] * 3


# -- shared forwards


def begun(engine: FluxEngine, number: int, *, acceleration: str = "regular", **more: Any) -> list[FluxTask]:
    """So many alike, with prompts and seeds of their own."""
    return [engine.start(asked(f"picture {seed}", acceleration=acceleration, **more), seed) for seed in range(number)]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to how large they are."""
    return float((one - other).float().norm() / other.float().norm())


def is_each(ours: Sequence[FluxTask], these: Sequence[FluxTask]) -> bool:
    return [id(painting) for painting in ours] == [id(painting) for painting in these]


@pytest.mark.parametrize("acceleration", ["none", "high"])
def test_other_tiers_never_share(engine: FluxEngine, sizes: list[int], acceleration: str) -> None:
    paintings = begun(engine, 3, acceleration=acceleration, num_images=2)
    for _ in range(4):
        for painting in paintings:
            others = [other for other in paintings if other is not painting]
            before = [other.step for other in others]
            assert is_each(engine.advance(painting, others), [painting])
            assert [other.step for other in others] == before
    assert all(painting.step == painting.num_steps for painting in paintings)
    # A forward with a cache is made of the transformer's parts, without itself.
    assert sizes == ([1] * 12 if acceleration == "none" else [])


def test_those_of_one_size_share(engine: FluxEngine, sizes: list[int]) -> None:
    paintings = begun(engine, 3)
    assert is_each(
        engine.advance(paintings[1], [paintings[2], paintings[0]]), [paintings[1], paintings[2], paintings[0]]
    )
    assert [painting.step for painting in paintings] == [1, 1, 1]
    assert sizes == [3]


@pytest.mark.parametrize(("width", "height"), [(96, 64), (128, 32)])
def test_those_of_other_sizes_do_not(engine: FluxEngine, sizes: list[int], width: int, height: int) -> None:
    leader, alike = begun(engine, 2)
    stranger = engine.start(asked("a fish", width, height, acceleration="regular"), 3)
    assert is_each(engine.advance(leader, [stranger, alike]), [leader, alike])
    assert is_each(engine.advance(stranger, [leader, alike]), [stranger])
    assert sizes == [2, 1]


def test_those_with_texts_of_other_lengths_do_not(
    engine: FluxEngine, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = engine.prompts.encode

    def shorter(prompt: str, *given: Any) -> PromptEmbeds:
        text: PromptEmbeds = encode(prompt, *given)
        if prompt != "picture 1":
            return text
        return PromptEmbeds(text.prompt_embeds[:, :256], text.pooled_prompt_embeds, text.ids[:256])

    monkeypatch.setattr(engine.prompts, "encode", shorter)
    paintings = begun(engine, 3)
    assert is_each(engine.advance(paintings[0], paintings[1:]), [paintings[0], paintings[2]])
    assert is_each(engine.advance(paintings[1], paintings[::2]), [paintings[1]])
    assert sizes == [2, 1]


@pytest.mark.parametrize("acceleration", ["none", "high"])
def test_one_of_another_tier_stays_alone_among_those_that_share(
    engine: FluxEngine, sizes: list[int], acceleration: str
) -> None:
    leader, other = begun(engine, 2)
    (alone,) = begun(engine, 1, acceleration=acceleration)
    assert is_each(engine.advance(leader, [alone, other]), [leader, other])
    assert alone.step == 0
    assert is_each(engine.advance(alone, [leader, other]), [alone])
    assert (leader.step, other.step) == (1, 1)
    assert sizes[0] == 2
    assert set(sizes[1:]) <= {1}


def test_no_forward_exceeds_the_token_budget(
    engine: FluxEngine, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 64 * 64 // tiny_flux.PIXELS_A_TOKEN + 512
    monkeypatch.setattr("models.flux.batch.TOKEN_BUDGET", 4 * one - 1)
    paintings = begun(engine, 5)
    assert is_each(engine.advance(paintings[0], paintings[1:]), paintings[:3])
    monkeypatch.setattr("models.flux.batch.TOKEN_BUDGET", 4 * one)
    assert is_each(engine.advance(paintings[4], paintings[:4]), [paintings[4], *paintings[:3]])
    # One that is too large by itself is painted alone.
    monkeypatch.setattr("models.flux.batch.TOKEN_BUDGET", 100)
    assert is_each(engine.advance(paintings[4], paintings[:4]), [paintings[4]])
    assert sizes == [3, 4, 1]


def test_two_of_the_largest_preset_share_and_three_do_not(engine: FluxEngine, sizes: list[int]) -> None:
    paintings = begun(engine, 3, width=1024, height=1024)
    assert len(engine.advance(paintings[0], paintings[1:])) == 2
    assert [painting.samples[0].num_tokens for painting in paintings[:2]] == [TOKEN_BUDGET // 2] * 2
    assert sizes == [2]


def test_pictures_of_one_request_share(engine: FluxEngine, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    request = asked(num_images=3, acceleration="regular")
    painting = stepped(engine, engine.start(request, 40))
    assert sizes == [3, 3]
    alone = [latents_of(engine, asked(), 40 + index) for index in range(3)]
    for generation, latents in zip(painting.samples, alone, strict=True):
        assert distance(generation.latents, latents) < 1e-4
    # With room for two, the third follows.
    sizes.clear()
    monkeypatch.setattr("models.flux.batch.TOKEN_BUDGET", 2 * 528)
    painting = stepped(engine, engine.start(request, 40))
    assert sizes == [2, 2, 1, 1]
    for generation, latents in zip(painting.samples, alone, strict=True):
        assert distance(generation.latents, latents) < 1e-4
    assert len(finished(engine, painting)) == 3


def test_what_shares_a_forward_is_close_to_what_is_painted_alone(engine: FluxEngine, rough: FluxEngine) -> None:
    for each, tolerance in ((engine, 1e-4), (rough, 0.03)):
        requests = [asked(f"picture {n}", 96, 64, guidance_scale=2 + n, acceleration="regular") for n in range(4)]
        # Two of one prompt with other seeds, and two of one seed with other prompts.
        requests[1] = requests[0].model_copy(update={"guidance_scale": 9.0})
        seeds = [1, 2, 3, 3]
        paintings = [each.start(request, seed) for request, seed in zip(requests, seeds, strict=True)]
        while paintings[0].step < paintings[0].num_steps:
            assert is_each(each.advance(paintings[0], paintings[1:]), paintings)
        alone = [latents_of(each, request, seed) for request, seed in zip(requests, seeds, strict=True)]
        for index, painting in enumerate(paintings):
            distances = [distance(painting.samples[0].latents, latents) for latents in alone]
            assert distances[index] < tolerance
            assert min(distances) == distances[index]
            assert sorted(distances)[1] > 3 * distances[index]


def test_pixels_of_a_shared_forward_are_close_too(rough: FluxEngine) -> None:
    paintings = begun(rough, 3, width=96)
    while paintings[0].step < paintings[0].num_steps:
        rough.advance(paintings[0], paintings[1:])
    for seed, painting in enumerate(paintings):
        (alone,) = painted(rough, asked(f"picture {seed}", 96), seed)
        (picture,) = finished(rough, painting)
        assert difference(picture, alone) <= 16


def test_those_at_other_steps_share_and_leave_when_they_are_done(engine: FluxEngine, sizes: list[int]) -> None:
    requests = [asked(num_inference_steps=steps, acceleration="regular") for steps in (4, 2, 3)]
    early, short, late = (engine.start(request, seed) for seed, request in enumerate(requests))
    engine.advance(early)
    assert is_each(engine.advance(short, [early]), [short, early])
    # At steps 2, 1 and 0.
    assert is_each(engine.advance(early, [short, late]), [early, short, late])
    assert short.step == short.num_steps
    assert is_each(engine.advance(late, [short, early]), [late, early])
    assert early.step == early.num_steps
    # What stepped is named beside it, and what is decoded.
    engine.decode(short)
    assert is_each(engine.advance(late, [early, short]), [late])
    assert sizes == [1, 2, 3, 2, 1]
    for seed, painting in ((0, early), (2, late)):
        assert distance(painting.samples[0].latents, latents_of(engine, requests[seed], seed)) < 1e-4
        assert len(finished(engine, painting)) == 1


def test_none_is_the_same_alone_and_among_others(rough: FluxEngine) -> None:
    request = asked("a fish", num_inference_steps=3, num_images=2)
    alone = painted(rough, request, 7)
    painting = rough.start(request, 7)
    others = [
        *begun(rough, 3, num_inference_steps=6),
        *begun(rough, 2, acceleration="none", num_inference_steps=6),
        *begun(rough, 2, acceleration="high", num_inference_steps=6),
    ]
    while painting.step < painting.num_steps:
        assert is_each(rough.advance(painting, others), [painting])
        for other in others[::3]:
            rough.advance(other, [painting, *(beside for beside in others if beside is not other)])
    assert all(other.step for other in others[::3])
    assert [difference(one, other) for one, other in zip(finished(rough, painting), alone, strict=True)] == [0, 0]
