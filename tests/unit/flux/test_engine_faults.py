"""What goes wrong while one is painted ends that one at most, says why, and leaves nothing behind."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.Image import Image

from models.base import DeviceLost, GenerationFailed, NonFiniteOutput
from models.flux.device import Device
from models.flux.engine import FluxEngine
from models.flux.loras import LoraAdapter
from models.flux.task import FluxTask
from tests.support import tiny_flux
from tests.support.tiny_flux import asked, batches, finished, painted

FULL = torch.OutOfMemoryError


@pytest.fixture(scope="module")
def engine() -> Iterator[FluxEngine]:
    # What is there by now stays: the many collections of these tests need not look through all of PyTorch.
    gc.collect()
    gc.freeze()
    yield tiny_flux.engine()
    gc.unfreeze()


@pytest.fixture
def freed(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for each time that memory was given back."""
    seen: list[None] = []

    def free() -> None:
        seen.append(None)
        Device.free(engine.device)

    monkeypatch.setattr(engine.device, "free", free)
    return seen


@contextmanager
def failing(module: Any, *errors: type[Exception] | None) -> Iterator[None]:
    """Its next calls raise these, one after the other; None lets one through. All of them must come."""
    left = list(errors)

    def fail(*_: Any) -> None:
        if left and (error := left.pop(0)):
            raise error("it was said")

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()
    assert not left


def parts_of(engine: FluxEngine) -> dict[str, Any]:
    """What can fail: encoding the prompt, the step and decoding."""
    pipeline = engine.pipeline
    return {"text": pipeline.text_encoder_2, "step": pipeline.transformer, "decode": pipeline.vae.decoder}


PARTS = ("text", "step", "decode")


@pytest.fixture(autouse=True)
def forget(engine: FluxEngine) -> None:
    """Every test encodes its prompts itself."""
    engine.prompts.evict()


def bytes_of(engine: FluxEngine, painting: FluxTask) -> list[bytes]:
    return [picture.tobytes() for picture in finished(engine, painting)]


# -- out of memory


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("acceleration", ["none", "regular"])
def test_out_of_memory_once_is_tried_again(engine: FluxEngine, freed: list[None], part: str, acceleration: str) -> None:
    request = asked(num_inference_steps=3, acceleration=acceleration)
    expected = [picture.tobytes() for picture in painted(engine, request, 1)]
    engine.prompts.evict()
    painting = engine.start(request, 1)
    with failing(parts_of(engine)[part], FULL):
        assert bytes_of(engine, painting) == expected
    assert len(freed) == 1
    assert (painting.step, len(painting.images)) == (3, 1)


def test_out_of_memory_at_every_step_is_tried_again_each_time(engine: FluxEngine, freed: list[None]) -> None:
    expected = [picture.tobytes() for picture in painted(engine, asked(num_inference_steps=3), 1)]
    with failing(engine.pipeline.transformer, *[FULL, None] * 3):
        assert bytes_of(engine, engine.start(asked(num_inference_steps=3), 1)) == expected
    assert len(freed) == 3


@pytest.mark.parametrize("part", PARTS)
def test_out_of_memory_twice_ends_it_and_names_size_and_what_is_free(
    engine: FluxEngine, freed: list[None], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr("models.loading.devices.free_memory", lambda device: 1_234_000_000)
    others = [engine.start(asked("other", acceleration=acceleration), 2) for acceleration in ("none", "regular")]
    expected = [[picture.tobytes() for picture in painted(engine, other.request, 2)] for other in others]
    for other in others:
        engine.advance(other)
    painting = engine.start(asked(width=96, height=64, acceleration="regular"), 1)
    with failing(parts_of(engine)[part], FULL, FULL), pytest.raises(GenerationFailed) as told:
        finished(engine, painting)
    assert "96x64" in str(told.value)
    assert "1.2 GB are free" in str(told.value)
    assert len(freed) == 1
    assert painting.images == []
    # The others go on, and so does the next one.
    assert [bytes_of(engine, other) for other in others] == expected
    assert painted(engine, asked(), 1)


def test_out_of_memory_together_is_tried_again_alone(engine: FluxEngine, freed: list[None]) -> None:
    requests = [asked(f"picture {seed}", acceleration="regular") for seed in range(3)]
    alone = [[picture.tobytes() for picture in painted(engine, request, seed)] for seed, request in enumerate(requests)]
    leader, *others = (engine.start(request, seed) for seed, request in enumerate(requests))
    with batches(engine.pipeline.transformer) as sizes, failing(engine.pipeline.transformer, FULL):
        advanced = engine.advance(leader, others)
    assert sizes == [3, 1]
    assert len(freed) == 1
    assert [painting is leader for painting in advanced] == [True]
    assert [(painting.step, painting.work > 0) for painting in (leader, *others)] == [(1, True), (0, False), (0, False)]
    assert [bytes_of(engine, painting) for painting in (leader, *others)] == alone


def test_out_of_memory_for_several_pictures_of_one_request_paints_them_one_by_one(
    engine: FluxEngine, freed: list[None]
) -> None:
    painting = engine.start(asked(num_images=2, acceleration="regular"), 5)
    with batches(engine.pipeline.transformer) as sizes, failing(engine.pipeline.transformer, *[FULL, None] * 3):
        pictures = bytes_of(engine, painting)
    # The first is stepped alone, twice; then the second.
    assert sizes[:4] == [2, 1, 2, 1]
    assert painting.step == painting.num_steps == 4
    assert pictures == [painted(engine, asked(), seed)[0].tobytes() for seed in (5, 6)]


def test_twice_out_of_memory_together_ends_the_leader_alone(engine: FluxEngine, freed: list[None]) -> None:
    leader, other = (engine.start(asked(f"picture {seed}", acceleration="regular"), seed) for seed in range(2))
    expected = [picture.tobytes() for picture in painted(engine, other.request, 1)]
    with failing(engine.pipeline.transformer, FULL, FULL), pytest.raises(GenerationFailed):
        engine.advance(leader, [other])
    assert other.step == 0
    assert bytes_of(engine, other) == expected


@pytest.mark.parametrize("part", ["step", "decode"])
def test_what_failed_is_let_go_before_the_second_try(
    engine: FluxEngine, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    deep = {
        "step": engine.pipeline.transformer.single_transformer_blocks[-1],
        "decode": engine.pipeline.vae.decoder.conv_out,
    }
    held: list[weakref.ref[torch.Tensor]] = []
    at_free: list[bool] = []

    def look(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        held.append(weakref.ref(named["hidden_states"] if named else inputs[0]))

    def free() -> None:
        Device.free(engine.device)
        at_free.extend(tensor() is None for tensor in held)

    monkeypatch.setattr(engine.device, "free", free)
    painting = engine.start(asked(), 1)
    if part == "decode":
        tiny_flux.stepped(engine, painting)
    hook = deep[part].register_forward_pre_hook(look, with_kwargs=True)
    try:
        with failing(deep[part], FULL):
            finished(engine, painting)
    finally:
        hook.remove()
    assert at_free == [True]


def test_one_that_cannot_begin_ends_itself_alone(engine: FluxEngine) -> None:
    leader, bad = (engine.start(asked(f"picture {seed}", acceleration="regular"), seed) for seed in range(2))
    expected = [picture.tobytes() for picture in painted(engine, leader.request, 0)]
    with failing(parts_of(engine)["text"], KeyError, KeyError):
        while leader.step < leader.num_steps:
            assert [painting is leader for painting in engine.advance(leader, [bad])] == [True]
    assert bytes_of(engine, leader) == expected
    with failing(parts_of(engine)["text"], KeyError), pytest.raises(KeyError):
        engine.advance(bad, [leader])


class Judge:
    """A safety checker that raises these, one after the other, and then finds one picture in two unsafe."""

    def __init__(self, *errors: Exception) -> None:
        self.left = list(errors)

    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        if self.left:
            raise self.left.pop(0)
        return [index % 2 == 1 for index in range(len(pictures))]


@pytest.mark.parametrize("error", [FULL("full"), RuntimeError("cuDNN error: out of memory, it was said")])
def test_a_check_that_runs_out_of_memory_is_tried_again(
    engine: FluxEngine, freed: list[None], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    pictures = painted(engine, asked(num_images=2), 1)
    monkeypatch.setattr(engine, "checker", Judge(error))
    assert engine.is_unsafe(pictures) == [False, True]
    assert len(freed) == 1
    monkeypatch.setattr(engine, "checker", Judge(error, error))
    with pytest.raises(GenerationFailed, match="GB are free"):
        engine.is_unsafe(pictures)
    monkeypatch.setattr(engine, "checker", Judge(torch.AcceleratorError("it was said")))
    with pytest.raises(DeviceLost, match="it was said"):
        engine.is_unsafe(pictures)


# -- the device is lost


@pytest.mark.parametrize("part", PARTS)
def test_an_error_of_the_device_means_that_it_is_lost(engine: FluxEngine, freed: list[None], part: str) -> None:
    painting = engine.start(asked(), 1)
    with failing(parts_of(engine)[part], torch.AcceleratorError), pytest.raises(DeviceLost, match="it was said"):
        finished(engine, painting)
    assert freed == []


@pytest.mark.parametrize("part", PARTS)
def test_so_does_one_at_the_second_try(engine: FluxEngine, part: str) -> None:
    with failing(parts_of(engine)[part], FULL, torch.AcceleratorError), pytest.raises(DeviceLost):
        finished(engine, engine.start(asked(), 1))


def test_an_error_that_shows_only_when_the_step_is_waited_for(
    engine: FluxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.device, "throttle", wait)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        engine.advance(engine.start(asked(), 1))


@pytest.mark.parametrize("part", PARTS)
def test_other_errors_are_raised_as_they_are(engine: FluxEngine, freed: list[None], part: str) -> None:
    expected = [picture.tobytes() for picture in painted(engine, asked("other"), 2)]
    engine.prompts.evict()
    other = engine.start(asked("other"), 2)
    engine.advance(other)
    with failing(parts_of(engine)[part], KeyError), pytest.raises(KeyError, match="it was said"):
        finished(engine, engine.start(asked(), 1))
    assert freed == []
    assert bytes_of(engine, other) == expected


# -- not a number


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["step", "decode"])
@pytest.mark.parametrize("acceleration", ["none", "regular", "high"])
def test_not_a_number_is_an_error_and_never_a_black_picture(
    engine: FluxEngine, part: str, acceleration: str, value: float
) -> None:
    module = engine.pipeline.transformer.proj_out if part == "step" else engine.pipeline.vae.decoder
    painting = engine.start(asked(acceleration=acceleration), 1)

    def spoil(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        spoilt = output.clone()
        spoilt[0, 0, 0] = value
        return spoilt

    hook = module.register_forward_hook(spoil)
    try:
        with pytest.raises(GenerationFailed, match="not-a-number"):
            finished(engine, painting)
    finally:
        hook.remove()
    assert painting.images == []
    assert not painting.is_decoded
    assert painted(engine, asked(), 1)


def test_latents_that_are_not_finite_are_an_error_though_the_autoencoder_hides_it(engine: FluxEngine) -> None:
    painting = tiny_flux.stepped(engine, engine.start(asked(), 1))
    (generation,) = painting.samples
    generation.latents = generation.latents * float("inf")
    hook = engine.pipeline.vae.decoder.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    try:
        with pytest.raises(GenerationFailed, match="not-a-number"):
            engine.decode(painting)
    finally:
        hook.remove()
    assert painting.images == []
    assert painted(engine, asked(), 1)


def spoilt(engine: FluxEngine, **fields: Any) -> FluxTask:
    """A painting whose every step was taken, and whose latents are not numbers."""
    painting = tiny_flux.stepped(engine, engine.start(asked(**fields), 1))
    for generation in painting.samples:
        generation.latents = generation.latents * float("nan")
    return painting


def test_twice_in_a_row_means_that_the_device_is_lost(engine: FluxEngine) -> None:
    for _ in range(3):
        with pytest.raises(NonFiniteOutput):
            engine.decode(spoilt(engine))
        assert painted(engine, asked(), 1)
    with pytest.raises(NonFiniteOutput):
        engine.decode(spoilt(engine))
    with pytest.raises(DeviceLost, match="two images in a row came out as not-a-number"):
        engine.decode(spoilt(engine))
    assert painted(engine, asked(), 1)


def test_unless_it_is_somebodys_lora(engine: FluxEngine) -> None:
    for _ in range(3):
        painting = spoilt(engine)
        painting.loras = (LoraAdapter(Path("theirs.safetensors"), 1.0),)
        with pytest.raises(NonFiniteOutput):
            engine.decode(painting)


def test_the_other_pictures_of_a_shared_forward_are_not_spoilt(engine: FluxEngine) -> None:
    good, bad = (engine.start(asked(f"picture {seed}", acceleration="regular"), seed) for seed in range(2))
    engine.advance(good, [bad])
    bad.samples[0].latents = bad.samples[0].latents * float("nan")
    engine.advance(good, [bad])
    with pytest.raises(GenerationFailed, match="not-a-number"):
        engine.decode(bad)
    assert finished(engine, good)


# -- nothing stays


def num_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_500_that_are_cancelled_leave_nothing(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # What this is about does not depend on how long a text is.
    monkeypatch.setattr("models.flux.prompt_cache.NUM_TOKENS", 16)
    request = asked("a fish", num_inference_steps=50)
    expected = [picture.tobytes() for picture in painted(engine, request, 3)]
    one = engine.prompts.encode("a fish", engine.pipeline).num_bytes
    monkeypatch.setattr(engine.prompts, "max_bytes", 4 * one)
    survivor = engine.start(request, 3)
    engine.advance(survivor)

    def cancel(number: int) -> None:
        """One that is dropped before its first step, after it, or after its second, alone or beside others."""
        accelerations = ("none", "regular", "high")
        asked_for = asked(f"picture {number % 7}", acceleration=accelerations[number % 4 % 3], num_inference_steps=4)
        first, second = engine.start(asked_for, number), engine.start(asked_for, number + 1)
        for _ in range(number % 3):
            engine.advance(first, [second, survivor])
            engine.preview(first)

    for number in range(12):
        cancel(number)
    before = num_tensors()
    for number in range(500):
        cancel(number)
        if number % 11 == 0 and survivor.step < survivor.num_steps:
            engine.advance(survivor)
        assert engine.prompts.num_bytes <= 4 * one
    # The survivor's own are counted before and after.
    assert num_tensors() <= before
    assert survivor.step > 40
    assert bytes_of(engine, survivor) == expected


def test_what_fails_leaves_nothing(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.flux.prompt_cache.NUM_TOKENS", 16)

    def fail() -> None:
        for part in PARTS:
            engine.prompts.evict()
            with failing(parts_of(engine)[part], FULL, FULL), pytest.raises(GenerationFailed):
                finished(engine, engine.start(asked(), 1))

    fail()
    before = num_tensors()
    for _ in range(3):
        fail()
    assert num_tensors() <= before


def test_what_is_painted_leaves_nothing(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.flux.prompt_cache.NUM_TOKENS", 16)
    painted(engine, asked(acceleration="high"), 1)
    before = num_tensors()
    for seed in range(10):
        assert painted(engine, asked(acceleration="high", num_images=2), seed)
    assert num_tensors() <= before
