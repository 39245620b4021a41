"""Tests of faults while an image is generated: a fault ends at most one request, with a reason, and leaks nothing."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL.Image import Image

from models.base import DeviceLost, GenerationFailed, NonFiniteOutput
from models.flux.device import Device
from models.flux.engine import FluxEngine
from models.flux.loras import LoraAdapter
from models.flux.task import FluxTask
from tests.support import tiny_flux
from tests.support.tiny_flux import finish_task, generate, make_request, record_batch_sizes

FULL = torch.OutOfMemoryError


@pytest.fixture(scope="module")
def engine() -> Iterator[FluxEngine]:
    # Freeze the objects that exist now, so that the many garbage collections here skip all of PyTorch.
    gc.collect()
    gc.freeze()
    yield tiny_flux.engine()
    gc.unfreeze()


@pytest.fixture
def freed(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list with one entry for each time that memory is freed."""
    seen: list[None] = []

    def free() -> None:
        seen.append(None)
        Device.free(engine.device)

    monkeypatch.setattr(engine.device, "free", free)
    return seen


@contextmanager
def failing(module: Any, *errors: type[Exception] | None) -> Iterator[None]:
    """Make the module's next calls raise these errors in order; None lets a call pass. Assert that all are used."""
    remaining = list(errors)

    def fail(*_: Any) -> None:
        if remaining and (error := remaining.pop(0)):
            raise error("it was said")

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()
    assert not remaining


def parts_of(engine: FluxEngine) -> dict[str, Any]:
    """Return the modules that can fail: for encoding the prompt, for the step and for decoding."""
    pipeline = engine.pipeline
    return {"text": pipeline.text_encoder_2, "step": pipeline.transformer, "decode": pipeline.vae.decoder}


PARTS = ("text", "step", "decode")
#: How many tries each part gets when memory runs out. The third try of "decode" decodes in tiles.
NUM_TRIES = {"text": 2, "step": 2, "decode": 3}


@pytest.fixture(autouse=True)
def clear_prompts(engine: FluxEngine) -> None:
    """Clear the prompt cache, so that every test encodes its prompts."""
    engine.prompts.evict()


def bytes_of(engine: FluxEngine, task: FluxTask) -> list[bytes]:
    return [image.tobytes() for image in finish_task(engine, task)]


# -- out of memory


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("acceleration", ["none", "regular"])
def test_one_out_of_memory_error_is_retried(
    engine: FluxEngine, freed: list[None], part: str, acceleration: str
) -> None:
    request = make_request(num_inference_steps=3, acceleration=acceleration)
    expected = [image.tobytes() for image in generate(engine, request, 1)]
    engine.prompts.evict()
    task = engine.start(request, 1)
    with failing(parts_of(engine)[part], FULL):
        assert bytes_of(engine, task) == expected
    assert len(freed) == 1
    assert (task.step, len(task.images)) == (3, 1)


def test_an_image_that_cannot_be_decoded_whole_is_decoded_in_tiles(
    engine: FluxEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("models.flux.decoder.TILE_SIDE", 64)
    request, vae = make_request(width=160, height=96), engine.pipeline.vae
    expected = numpy.asarray(generate(engine, request, 1)[0], int)
    sizes: list[tuple[int, int]] = []
    record = vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    try:
        with failing(vae.decoder, FULL, FULL):
            (image,) = finish_task(engine, engine.start(request, 1))
    finally:
        record.remove()
    # Twice whole, then in tiles of at most 8 x 8 latents.
    assert sizes[:2] == [(12, 20)] * 2
    assert len(sizes) > 4 and all(max(size) <= 8 for size in sizes[2:])
    assert image.size == (160, 96)
    assert numpy.abs(numpy.asarray(image, int) - expected).mean() < 16
    assert "in tiles of 64 pixels" in caplog.text
    # The next image is decoded whole again.
    assert not vae.use_tiling
    assert numpy.array_equal(numpy.asarray(generate(engine, request, 1)[0], int), expected)


def test_out_of_memory_at_every_step_is_retried_each_time(engine: FluxEngine, freed: list[None]) -> None:
    expected = [image.tobytes() for image in generate(engine, make_request(num_inference_steps=3), 1)]
    with failing(engine.pipeline.transformer, *[FULL, None] * 3):
        assert bytes_of(engine, engine.start(make_request(num_inference_steps=3), 1)) == expected
    assert len(freed) == 3


@pytest.mark.parametrize("part", PARTS)
def test_repeated_out_of_memory_errors_fail_the_task_and_name_its_size_and_free_memory(
    engine: FluxEngine, freed: list[None], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr("models.loading.devices.free_memory", lambda device: 1_234_000_000)
    others = [engine.start(make_request("other", acceleration=acceleration), 2) for acceleration in ("none", "regular")]
    expected = [[image.tobytes() for image in generate(engine, other.request, 2)] for other in others]
    for other in others:
        engine.advance(other)
    task = engine.start(make_request(width=96, height=64, acceleration="regular"), 1)
    with failing(parts_of(engine)[part], *[FULL] * NUM_TRIES[part]), pytest.raises(GenerationFailed) as error:
        finish_task(engine, task)
    assert "96x64" in str(error.value)
    assert "1.2 GB are free" in str(error.value)
    assert len(freed) == NUM_TRIES[part] - 1
    assert task.images == []
    # The other tasks continue, and a new task succeeds.
    assert [bytes_of(engine, other) for other in others] == expected
    assert generate(engine, make_request(), 1)


def test_out_of_memory_in_a_shared_forward_is_retried_alone(engine: FluxEngine, freed: list[None]) -> None:
    requests = [make_request(f"picture {seed}", acceleration="regular") for seed in range(3)]
    alone = [[image.tobytes() for image in generate(engine, request, seed)] for seed, request in enumerate(requests)]
    leader, *others = (engine.start(request, seed) for seed, request in enumerate(requests))
    with record_batch_sizes(engine.pipeline.transformer) as sizes, failing(engine.pipeline.transformer, FULL):
        advanced = engine.advance(leader, others)
    assert sizes == [3, 1]
    assert len(freed) == 1
    assert [task is leader for task in advanced] == [True]
    assert [(task.step, task.work > 0) for task in (leader, *others)] == [(1, True), (0, False), (0, False)]
    assert [bytes_of(engine, task) for task in (leader, *others)] == alone


def test_out_of_memory_for_several_images_of_one_request_generates_them_one_by_one(
    engine: FluxEngine, freed: list[None]
) -> None:
    task = engine.start(make_request(num_images=2, acceleration="regular"), 5)
    with (
        record_batch_sizes(engine.pipeline.transformer) as sizes,
        failing(engine.pipeline.transformer, *[FULL, None] * 3),
    ):
        images = bytes_of(engine, task)
    # Each forward of two samples fails. The first sample takes two steps alone, and the second sample follows.
    assert sizes[:4] == [2, 1, 2, 1]
    assert task.step == task.num_steps == 4
    assert images == [generate(engine, make_request(), seed)[0].tobytes() for seed in (5, 6)]


def test_two_out_of_memory_errors_in_a_shared_forward_fail_only_the_leader(
    engine: FluxEngine, freed: list[None]
) -> None:
    leader, other = (engine.start(make_request(f"picture {seed}", acceleration="regular"), seed) for seed in range(2))
    expected = [image.tobytes() for image in generate(engine, other.request, 1)]
    with failing(engine.pipeline.transformer, FULL, FULL), pytest.raises(GenerationFailed):
        engine.advance(leader, [other])
    assert other.step == 0
    assert bytes_of(engine, other) == expected


@pytest.mark.parametrize("part", ["step", "decode"])
def test_tensors_of_a_failed_try_are_freed_before_the_retry(
    engine: FluxEngine, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    modules = {
        "step": engine.pipeline.transformer.single_transformer_blocks[-1],
        "decode": engine.pipeline.vae.decoder.conv_out,
    }
    tensors: list[weakref.ref[torch.Tensor]] = []
    freed_tensors: list[bool] = []

    def record_tensor(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors.append(weakref.ref(named["hidden_states"] if named else inputs[0]))

    def free() -> None:
        Device.free(engine.device)
        freed_tensors.extend(tensor() is None for tensor in tensors)

    monkeypatch.setattr(engine.device, "free", free)
    task = engine.start(make_request(), 1)
    if part == "decode":
        tiny_flux.run_steps(engine, task)
    hook = modules[part].register_forward_pre_hook(record_tensor, with_kwargs=True)
    try:
        with failing(modules[part], FULL):
            finish_task(engine, task)
    finally:
        hook.remove()
    assert freed_tensors == [True]


def test_a_task_that_cannot_start_fails_alone(engine: FluxEngine) -> None:
    leader, bad = (engine.start(make_request(f"picture {seed}", acceleration="regular"), seed) for seed in range(2))
    expected = [image.tobytes() for image in generate(engine, leader.request, 0)]
    with failing(parts_of(engine)["text"], KeyError, KeyError):
        while leader.step < leader.num_steps:
            assert [task is leader for task in engine.advance(leader, [bad])] == [True]
    assert bytes_of(engine, leader) == expected
    with failing(parts_of(engine)["text"], KeyError), pytest.raises(KeyError):
        engine.advance(bad, [leader])


class FakeChecker:
    """Safety checker that raises the given errors in order, and then finds every second image unsafe."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        if self.errors:
            raise self.errors.pop(0)
        return [index % 2 == 1 for index in range(len(images))]


@pytest.mark.parametrize("error", [FULL("full"), RuntimeError("cuDNN error: out of memory, it was said")])
def test_a_safety_check_that_runs_out_of_memory_is_retried(
    engine: FluxEngine, freed: list[None], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    images = generate(engine, make_request(num_images=2), 1)
    monkeypatch.setattr(engine, "checker", FakeChecker(error))
    assert engine.is_unsafe(images) == [False, True]
    assert len(freed) == 1
    monkeypatch.setattr(engine, "checker", FakeChecker(error, error))
    with pytest.raises(GenerationFailed, match="GB are free"):
        engine.is_unsafe(images)
    monkeypatch.setattr(engine, "checker", FakeChecker(torch.AcceleratorError("it was said")))
    with pytest.raises(DeviceLost, match="it was said"):
        engine.is_unsafe(images)


# -- the device is lost


@pytest.mark.parametrize("part", PARTS)
def test_a_device_error_means_that_the_device_is_lost(engine: FluxEngine, freed: list[None], part: str) -> None:
    task = engine.start(make_request(), 1)
    with failing(parts_of(engine)[part], torch.AcceleratorError), pytest.raises(DeviceLost, match="it was said"):
        finish_task(engine, task)
    assert freed == []


@pytest.mark.parametrize("part", PARTS)
def test_a_device_error_during_the_retry_means_that_the_device_is_lost(engine: FluxEngine, part: str) -> None:
    with failing(parts_of(engine)[part], FULL, torch.AcceleratorError), pytest.raises(DeviceLost):
        finish_task(engine, engine.start(make_request(), 1))


def test_a_device_error_that_appears_only_while_waiting_for_the_step(
    engine: FluxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.device, "throttle", wait)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        engine.advance(engine.start(make_request(), 1))


@pytest.mark.parametrize("part", PARTS)
def test_other_errors_are_raised_unchanged(engine: FluxEngine, freed: list[None], part: str) -> None:
    expected = [image.tobytes() for image in generate(engine, make_request("other"), 2)]
    engine.prompts.evict()
    other = engine.start(make_request("other"), 2)
    engine.advance(other)
    with failing(parts_of(engine)[part], KeyError), pytest.raises(KeyError, match="it was said"):
        finish_task(engine, engine.start(make_request(), 1))
    assert freed == []
    assert bytes_of(engine, other) == expected


# -- not a number


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["step", "decode"])
@pytest.mark.parametrize("acceleration", ["none", "regular", "high"])
def test_not_a_number_is_an_error_and_never_a_black_image(
    engine: FluxEngine, part: str, acceleration: str, value: float
) -> None:
    module = engine.pipeline.transformer.proj_out if part == "step" else engine.pipeline.vae.decoder
    task = engine.start(make_request(acceleration=acceleration), 1)

    def make_non_finite(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[0, 0, 0] = value
        return changed

    hook = module.register_forward_hook(make_non_finite)
    try:
        with pytest.raises(GenerationFailed, match="not finite"):
            finish_task(engine, task)
    finally:
        hook.remove()
    assert task.images == []
    assert not task.is_decoded
    assert generate(engine, make_request(), 1)


def test_non_finite_latents_are_an_error_even_if_the_autoencoder_hides_them(engine: FluxEngine) -> None:
    task = tiny_flux.run_steps(engine, engine.start(make_request(), 1))
    (sample,) = task.samples
    sample.latents = sample.latents * float("inf")
    hook = engine.pipeline.vae.decoder.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    try:
        with pytest.raises(GenerationFailed, match="not finite"):
            engine.decode(task)
    finally:
        hook.remove()
    assert task.images == []
    assert generate(engine, make_request(), 1)


def non_finite_task(engine: FluxEngine, **fields: Any) -> FluxTask:
    """Return a task that has taken every step, and whose latents are not numbers."""
    task = tiny_flux.run_steps(engine, engine.start(make_request(**fields), 1))
    for sample in task.samples:
        sample.latents = sample.latents * float("nan")
    return task


def test_two_non_finite_images_in_a_row_mean_that_the_device_is_lost(engine: FluxEngine) -> None:
    for _ in range(3):
        with pytest.raises(NonFiniteOutput):
            engine.decode(non_finite_task(engine))
        assert generate(engine, make_request(), 1)
    with pytest.raises(NonFiniteOutput):
        engine.decode(non_finite_task(engine))
    with pytest.raises(DeviceLost, match="two images in a row had values that are not finite"):
        engine.decode(non_finite_task(engine))
    assert generate(engine, make_request(), 1)


def test_non_finite_images_with_a_lora_do_not_mean_that_the_device_is_lost(engine: FluxEngine) -> None:
    for _ in range(3):
        task = non_finite_task(engine)
        task.loras = (LoraAdapter(Path("theirs.safetensors"), 1.0, loc=("loras", 0, "path")),)
        with pytest.raises(NonFiniteOutput):
            engine.decode(task)


def test_other_images_of_a_shared_forward_stay_finite(engine: FluxEngine) -> None:
    good, bad = (engine.start(make_request(f"picture {seed}", acceleration="regular"), seed) for seed in range(2))
    engine.advance(good, [bad])
    bad.samples[0].latents = bad.samples[0].latents * float("nan")
    engine.advance(good, [bad])
    with pytest.raises(GenerationFailed, match="not finite"):
        engine.decode(bad)
    assert finish_task(engine, good)


# -- no leaks


def num_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def test_500_cancelled_tasks_leak_nothing(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Leaks do not depend on the length of a prompt, so prompts are short here.
    monkeypatch.setattr(engine.pipeline.tokenizer_2, "model_max_length", 16)
    request = make_request("a fish", num_inference_steps=50)
    expected = [image.tobytes() for image in generate(engine, request, 3)]
    one = engine.prompts.encode("a fish", engine.pipeline).num_bytes
    monkeypatch.setattr(engine.prompts, "max_bytes", 4 * one)
    survivor = engine.start(request, 3)
    engine.advance(survivor)

    def cancel(number: int) -> None:
        """Start two tasks, take up to two steps, and drop both tasks."""
        accelerations = ("none", "regular", "high")
        cancelled_request = make_request(
            f"picture {number % 7}", acceleration=accelerations[number % 4 % 3], num_inference_steps=4
        )
        first, second = engine.start(cancelled_request, number), engine.start(cancelled_request, number + 1)
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
    # The tensors of the survivor are counted both before and after.
    assert num_tensors() <= before
    assert survivor.step > 40
    assert bytes_of(engine, survivor) == expected


def test_failed_tasks_leak_nothing(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.pipeline.tokenizer_2, "model_max_length", 16)

    def fail() -> None:
        for part in PARTS:
            engine.prompts.evict()
            with failing(parts_of(engine)[part], *[FULL] * NUM_TRIES[part]), pytest.raises(GenerationFailed):
                finish_task(engine, engine.start(make_request(), 1))

    fail()
    before = num_tensors()
    for _ in range(3):
        fail()
    assert num_tensors() <= before


def test_finished_tasks_leak_nothing(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.pipeline.tokenizer_2, "model_max_length", 16)
    generate(engine, make_request(acceleration="high"), 1)
    before = num_tensors()
    for seed in range(10):
        assert generate(engine, make_request(acceleration="high", num_images=2), seed)
    assert num_tensors() <= before
