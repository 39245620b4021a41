"""The step loop against diffusers' own pipeline: the same latents and the same pixels, bit for bit."""

from typing import Any

import numpy
import pytest
import torch

from models.base import Placement
from models.engine import FluxEngine
from models.flux_dev import FluxDevInput
from models.schema import PRESETS
from models.weights import DEMO

# This file needs torch; it is imported by the tests that paint, and by them alone.


@pytest.fixture(scope="module")
def engine() -> FluxEngine:
    return FluxEngine.load(Placement(DEMO, safety_checker="", device="cpu"))


def paint(engine: FluxEngine, request: FluxDevInput, seed: int) -> list[Any]:
    painting = engine.start(request, seed)
    while not painting.is_done:
        engine.advance(painting)
    return list(painting.pictures)


def by_pipeline(engine: FluxEngine, request: FluxDevInput, seed: int) -> Any:
    return engine.pipeline(
        request.prompt,
        width=request.image_size.width,
        height=request.image_size.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        max_sequence_length=512,
    ).images[0]


def difference(one: Any, other: Any) -> int:
    return int(numpy.abs(numpy.asarray(one, dtype=int) - numpy.asarray(other, dtype=int)).max())


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_the_pipeline(engine: FluxEngine, preset: str) -> None:
    request = FluxDevInput.model_validate(
        {"prompt": "a red apple on a blue table", "image_size": preset, "num_inference_steps": 3, "guidance_scale": 2.5}
    )
    (picture,) = paint(engine, request, 11)
    assert picture.size == PRESETS[preset]
    assert difference(picture, by_pipeline(engine, request, 11)) == 0


def test_pictures_of_one_request_are_those_of_the_next_seeds(engine: FluxEngine) -> None:
    request = FluxDevInput(
        prompt="three stars", image_size={"width": 256, "height": 192}, num_inference_steps=2, num_images=3
    )
    alone = FluxDevInput(prompt="three stars", image_size={"width": 256, "height": 192}, num_inference_steps=2)
    for index, picture in enumerate(paint(engine, request, 40)):
        assert difference(picture, paint(engine, alone, 40 + index)[0]) == 0


def test_paintings_that_take_turns_do_not_touch_each_other(engine: FluxEngine) -> None:
    requests = [
        FluxDevInput(
            prompt=f"picture {n}", image_size={"width": 128 + 64 * n, "height": 128}, num_inference_steps=2 + n
        )
        for n in range(3)
    ]
    alone = [paint(engine, request, n)[0] for n, request in enumerate(requests)]
    paintings = [engine.start(request, n) for n, request in enumerate(requests)]
    while not all(painting.is_done for painting in paintings):
        for painting in paintings:
            if not painting.is_done:
                engine.advance(painting)
    assert [difference(painting.pictures[0], picture) for painting, picture in zip(paintings, alone, strict=True)] == [
        0
    ] * 3


def test_sizes_are_rounded_down_to_the_multiple(engine: FluxEngine) -> None:
    request = FluxDevInput(prompt="", image_size={"width": 500, "height": 333}, num_inference_steps=1)
    assert paint(engine, request, 1)[0].size == (480, 320)


def test_prompt_seed_and_guidance_each_change_the_picture(engine: FluxEngine) -> None:
    base = {"prompt": "a fish", "image_size": "square", "num_inference_steps": 2, "guidance_scale": 3.5}
    first = paint(engine, FluxDevInput.model_validate(base), 1)[0]
    for change, seed in (({"prompt": "a car"}, 1), ({"guidance_scale": 9}, 1), ({}, 2)):
        assert difference(first, paint(engine, FluxDevInput.model_validate({**base, **change}), seed)[0]) > 0


def test_not_a_number_is_an_error_and_never_a_black_picture(engine: FluxEngine) -> None:
    painting = engine.start(FluxDevInput(prompt="x", image_size="square", num_inference_steps=2), 1)
    engine.advance(painting)
    assert painting.generation
    painting.generation.latents = painting.generation.latents * float("nan")
    with pytest.raises(Exception, match="not-a-number"):
        engine.advance(painting)
