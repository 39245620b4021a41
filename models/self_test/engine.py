"""Tests of the engine on the device: decoding during steps, running out of memory, and the weights themselves."""

import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import PIL.Image
import torch
from PIL.Image import Image

from models.base import NO_INPUTS
from models.benchmark import random_weights
from models.flux import safety_checker
from models.flux.acceleration import Tier
from models.flux.device import Device
from models.flux.engine import FluxEngine
from models.flux.loader import load_engine
from models.flux.prompt_cache import count_text_tokens
from models.loading.devices import dtype_for
from models.self_test.trials import Failed, Skipped, Subject, Trial, need_gpu

#: The largest accepted mean difference of pixel values, 0 to 255, between the engine's image and that of diffusers.
_MAX_DIFFERENCE = 8.0


def _request(acceleration: str = "none", side: int = 512, num_steps: int = 2) -> Any:
    return SimpleNamespace(
        prompt="a red apple",
        image_size=SimpleNamespace(width=side, height=side),
        num_inference_steps=num_steps,
        num_images=1,
        guidance_scale=3.5,
        acceleration=acceleration,
        # What requests to Fill say.
        resize_to_original=False,
        paste_back=False,
    )


def _inputs(kind: str, directory: Path) -> Mapping[str, Path]:
    """Write the input images that weights of a kind need: a white square, which for Fill is the mask too."""
    if kind == "plain":
        return NO_INPUTS
    file = directory / "square.png"
    square = PIL.Image.new("RGB", (512, 512))
    square.paste((255, 255, 255), (128, 128, 384, 384))
    square.save(file)
    return {"image_url": file, "mask_url": file} if kind == "fill" else {"image_url": file}


def _decode_during_steps(subject: Subject) -> str:
    pipeline = random_weights.build("tiny", subject.device, dtype_for("auto", subject.device))
    checker = safety_checker.Unavailable("not used")
    engine = FluxEngine(pipeline, checker, [Tier("none", pipeline.transformer)], subject.device)
    side = 512 if subject.device == "cuda" else 64
    alone = _generate(engine, _request(side=side))
    task, other = engine.start(_request(side=side), 1), engine.start(_request(side=side, num_steps=40), 2)
    while task.step < task.num_steps:
        engine.advance(task)
    with ThreadPoolExecutor(1) as second_thread:
        decoding = second_thread.submit(engine.decode, task)
        while other.step < other.num_steps and not (decoding.done() and other.step >= 10):
            engine.advance(other)
        decoding.result()
    if task.images[0].tobytes() != alone.tobytes():
        raise Failed("an image that is decoded while other tasks take steps differs from the same image decoded alone")
    return f"the image is the same as when decoded alone; another task took {other.step} steps meanwhile"


#: What the image of a request is for, by the kind of the weights.
_ROLES = {"plain": "start", "control": "canny", "fill": "fill"}


def _generate(engine: FluxEngine, request: Any, inputs: Mapping[str, Path] = NO_INPUTS) -> Image:
    request.image_role = _ROLES[engine.kind]
    task = engine.start(request, 1, inputs)
    while task.step < task.num_steps:
        engine.advance(task)
    engine.decode(task)
    return task.images[0]


def _out_of_memory(subject: Subject) -> str:
    need_gpu(subject, "memory that runs out ends the process")
    device = Device(subject.device)
    _, total = torch.cuda.mem_get_info()

    def take_all() -> torch.Tensor:
        return torch.empty(2 * total, dtype=torch.uint8, device=subject.device)

    def take_little() -> torch.Tensor:
        return torch.ones(16, 16, device=subject.device) @ torch.ones(16, 16, device=subject.device)

    product = device.retry_on_oom("a tensor larger than the GPU", take_all, take_little)
    if product.shape != (16, 16) or not bool((product == 16).all()):
        raise Failed("after memory ran out, a matrix product is wrong")
    return "after memory ran out, the GPU works"


def _weights(subject: Subject) -> str:
    if subject.config is None:
        raise Skipped("no weights were named")
    if subject.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    engine = load_engine(subject.config)
    try:
        return _tiers(engine, subject.device)
    finally:
        engine.close()


def _tiers(engine: FluxEngine, device: str) -> str:
    """Generate an image with each tier; return the results as one line of text.

    Raises Failed if an image has one colour, or differs too much from diffusers' own.
    """
    is_warm = False
    while not is_warm:
        # As in the server, a tier that fails is left out; `unavailable` has the reason.
        with suppress(RuntimeError, ValueError, OSError):
            is_warm = not engine.warm_up()
    messages = []
    for tier in engine.info().acceleration:
        with tempfile.TemporaryDirectory() as directory:
            inputs = _inputs(engine.kind, Path(directory))
            pixels = numpy.asarray(_generate(engine, _request(tier), inputs), float)
        if pixels.std() < 1:
            raise Failed(f"with acceleration {tier}, the image has one colour")
        messages.append(f"{tier} generates" if tier != "none" else f"none {_compared(engine, pixels)}")
    if device == "cuda":
        messages.append(
            f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB with the plan {engine.plan.name}"
        )
    return "; ".join((*messages, *engine.info().unavailable))


def _compared(engine: FluxEngine, pixels: Any) -> str:
    """Compare an image with that of diffusers' pipeline on the same weights; return the difference as text.

    Raises Failed if the difference is too large. Plans that cannot compile run as diffusers' pipeline does, so nothing
    is compared. Weights that need an input image are not compared either.
    """
    if not engine.plan.can_compile or engine.kind != "plain":
        return "generates"
    generator = torch.Generator("cpu").manual_seed(1)
    length = count_text_tokens(engine.pipeline)
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.5, "generator": generator, "max_sequence_length": length}
    expected = engine.pipeline("a red apple", width=512, height=512, **arguments).images[0]
    difference = float(numpy.abs(pixels - numpy.asarray(expected, float)).mean())
    if difference > _MAX_DIFFERENCE:
        raise Failed(f"the image differs from that of diffusers' pipeline by {difference:.1f} of 255")
    return f"differs from diffusers' pipeline by {difference:.2f} of 255"


WEIGHTS = Trial("weights", _weights)
TRIALS = (
    Trial("decoding during steps", _decode_during_steps),
    Trial("running out of memory", _out_of_memory),
    WEIGHTS,
)
