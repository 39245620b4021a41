"""Previews: when one exists, how large it is, and whether its colours are those of the image."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL.Image import Image

from models.flux.engine import FluxEngine
from models.flux.preview import MAX_SIDE, Preview
from models.flux_dev import FluxDevInput
from tests.support import tiny_flux
from tests.support.tiny_flux import finish_task, make_request

RED, BLUE = (200, 40, 60), (30, 90, 180)
#: The largest accepted error of a preview's colour, of 255.
LEVELS = 6


class MixingAutoencoder:
    """An autoencoder with known latents: the means of 8 x 8 pixels, with their colours mixed into channels.

    `output_field` is "latents", as in AutoencoderTiny, or "latent_dist", as in AutoencoderKL.
    """

    def __init__(self, num_channels: int, output_field: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(2)
        self.mix = torch.randn(num_channels, 3, generator=generator).to(dtype)
        self.offset = torch.randn(num_channels, 1, 1, generator=generator).to(dtype)
        self.output_field = output_field
        self.num_encoded = 0

    def parameters(self) -> Iterator[torch.Tensor]:
        yield self.mix

    def encode(self, pixels: torch.Tensor) -> Any:
        self.num_encoded += 1
        means = torch.nn.functional.avg_pool2d(pixels, 8)
        latents = torch.einsum("cr,brhw->bchw", self.mix, means) + self.offset
        if self.output_field == "latents":
            return SimpleNamespace(latents=latents)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))


def two_colours(width: int, height: int) -> torch.Tensor:
    """Make an autoencoder's input, red on the left and blue on the right: (1, 3, height, width), from -1 to 1."""
    pixels = torch.empty(1, 3, height, width)
    pixels[..., : width // 2] = torch.tensor(RED)[:, None, None] / 127.5 - 1
    pixels[..., width // 2 :] = torch.tensor(BLUE)[:, None, None] / 127.5 - 1
    return pixels


def is_close_to(image: Image, position: tuple[int, int], colour: tuple[int, int, int]) -> bool:
    pixel = numpy.asarray(image.getpixel(position), dtype=int)
    return bool(numpy.abs(pixel - numpy.asarray(colour)).max() <= LEVELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output_field", ["latents", "latent_dist"])
@pytest.mark.parametrize("num_channels", [3, 16])
def test_preview_colours_are_those_of_the_image(num_channels: int, output_field: str, dtype: torch.dtype) -> None:
    vae = MixingAutoencoder(num_channels, output_field, dtype)
    previews = Preview(vae)
    latents = MixingAutoencoder(num_channels, "latents", dtype).encode(two_colours(512, 256).to(dtype)).latents
    image = previews.image(latents)
    assert (image.mode, image.size) == ("RGB", (256, 128))
    for height in (4, 64, 124):
        assert is_close_to(image, (32, height), RED)
        assert is_close_to(image, (224, height), BLUE)
    # The autoencoder encodes only once.
    previews.image(latents)
    assert vae.num_encoded == 1


def test_constant_channels_do_not_change_the_colours() -> None:
    vae = MixingAutoencoder(16, "latents", torch.float32)
    vae.mix[3:] = 0
    image = Preview(vae).image(vae.encode(two_colours(64, 64)).latents)
    assert is_close_to(image, (32, 128), RED)
    assert is_close_to(image, (224, 128), BLUE)


@pytest.mark.parametrize(
    ("latents", "size"),
    [
        ((1, 1), (256, 256)),
        ((8, 8), (256, 256)),
        # Previews are enlarged by whole numbers.
        ((64, 96), (192, 128)),
        ((96, 128), (256, 192)),
        ((128, 96), (192, 256)),
        ((128, 72), (144, 256)),
        ((256, 256), (256, 256)),
        ((256, 512), (256, 128)),
        ((1024, 2), (1, 256)),
    ],
)
def test_the_longer_side_has_256_pixels_at_most(latents: tuple[int, int], size: tuple[int, int]) -> None:
    image = Preview(MixingAutoencoder(4, "latents", torch.float32)).image(torch.zeros(1, 4, *latents))
    assert max(image.size) <= MAX_SIDE == 256
    assert image.size == size


# -- in the engine


@pytest.fixture(scope="module")
def engine() -> FluxEngine:
    return tiny_flux.engine(torch.bfloat16)


@pytest.mark.parametrize("acceleration", ["none", "regular", "high"])
def test_previews_exist_from_the_first_step_on(engine: FluxEngine, acceleration: str) -> None:
    task = engine.start(make_request(width=128, height=96, acceleration=acceleration), 1)
    assert engine.preview(task) is None
    engine.advance(task)
    first = engine.preview(task)
    assert first
    assert (first.mode, first.size) == ("RGB", (256, 192))
    engine.advance(task)
    second = engine.preview(task)
    assert second
    assert second.tobytes() != first.tobytes()


def test_previews_do_not_change_the_images(engine: FluxEngine) -> None:
    request = make_request(num_inference_steps=3)
    expected = tiny_flux.generate(engine, request, 1)
    task = engine.start(request, 1)
    while task.step < task.num_steps:
        engine.preview(task)
        engine.advance(task)
        engine.preview(task)
    assert [image.tobytes() for image in finish_task(engine, task)] == [image.tobytes() for image in expected]
    # Decoding frees the estimate that previews are made of.
    assert engine.preview(task) is None


def test_the_preview_shows_the_image_in_progress(engine: FluxEngine) -> None:
    request = make_request(num_images=2)

    def after_first_step(request: FluxDevInput, seed: int) -> bytes:
        alone = engine.start(request, seed)
        engine.advance(alone)
        image: Image | None = engine.preview(alone)
        assert image
        return image.tobytes()

    task = engine.start(request, 5)
    previews_seen = []
    for _ in range(task.num_steps):
        engine.advance(task)
        image = engine.preview(task)
        assert image
        previews_seen.append(image.tobytes())
    # Two steps of the first image, then two of the second.
    assert previews_seen[0] == after_first_step(make_request(), 5)
    assert previews_seen[2] == after_first_step(make_request(), 6)
    assert len(set(previews_seen)) == 4


def test_after_the_last_step_the_estimate_is_the_final_latents(engine: FluxEngine) -> None:
    task = tiny_flux.run_steps(engine, engine.start(make_request(), 1))
    (sample,) = task.samples
    assert torch.equal(sample.estimate, sample.latents)
