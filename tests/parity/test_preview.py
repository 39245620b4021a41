"""Previews: when there is one, how large it is, and that its colours are those of the picture."""

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
from tests.support.tiny_flux import asked, finished

RED, BLUE = (200, 40, 60), (30, 90, 180)
#: Of 255: by how much a preview may be off.
LEVELS = 6


class Mixing:
    """An autoencoder that is known through: means of 8 x 8 pixels, whose colours are mixed into channels.

    `answers_with`: "latents", as AutoencoderTiny, or "latent_dist", as AutoencoderKL.
    """

    def __init__(self, num_channels: int, answers_with: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(2)
        self.mix = torch.randn(num_channels, 3, generator=generator).to(dtype)
        self.offset = torch.randn(num_channels, 1, 1, generator=generator).to(dtype)
        self.answers_with = answers_with
        self.num_encoded = 0

    def parameters(self) -> Iterator[torch.Tensor]:
        yield self.mix

    def encode(self, pixels: torch.Tensor) -> Any:
        self.num_encoded += 1
        means = torch.nn.functional.avg_pool2d(pixels, 8)
        latents = torch.einsum("cr,brhw->bchw", self.mix, means) + self.offset
        if self.answers_with == "latents":
            return SimpleNamespace(latents=latents)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))


def two_colours(width: int, height: int) -> torch.Tensor:
    """Red on the left and blue on the right, as an autoencoder takes it: (1, 3, height, width), -1 to 1."""
    pixels = torch.empty(1, 3, height, width)
    pixels[..., : width // 2] = torch.tensor(RED)[:, None, None] / 127.5 - 1
    pixels[..., width // 2 :] = torch.tensor(BLUE)[:, None, None] / 127.5 - 1
    return pixels


def is_about(picture: Image, place: tuple[int, int], colour: tuple[int, int, int]) -> bool:
    shown = numpy.asarray(picture.getpixel(place), dtype=int)
    return bool(numpy.abs(shown - numpy.asarray(colour)).max() <= LEVELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("answers_with", ["latents", "latent_dist"])
@pytest.mark.parametrize("num_channels", [3, 16])
def test_colours_are_those_of_the_picture(num_channels: int, answers_with: str, dtype: torch.dtype) -> None:
    vae = Mixing(num_channels, answers_with, dtype)
    previews = Preview(vae)
    latents = Mixing(num_channels, "latents", dtype).encode(two_colours(512, 256).to(dtype)).latents
    picture = previews.image(latents)
    assert (picture.mode, picture.size) == ("RGB", (256, 128))
    for height in (4, 64, 124):
        assert is_about(picture, (32, height), RED)
        assert is_about(picture, (224, height), BLUE)
    # The autoencoder is asked once.
    previews.image(latents)
    assert vae.num_encoded == 1


def test_channels_that_say_nothing_do_no_harm() -> None:
    vae = Mixing(16, "latents", torch.float32)
    vae.mix[3:] = 0
    picture = Preview(vae).image(vae.encode(two_colours(64, 64)).latents)
    assert is_about(picture, (32, 128), RED)
    assert is_about(picture, (224, 128), BLUE)


@pytest.mark.parametrize(
    ("latents", "size"),
    [
        ((1, 1), (256, 256)),
        ((8, 8), (256, 256)),
        # Enlarged by whole numbers.
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
    picture = Preview(Mixing(4, "latents", torch.float32)).image(torch.zeros(1, 4, *latents))
    assert max(picture.size) <= MAX_SIDE == 256
    assert picture.size == size


# -- in the engine


@pytest.fixture(scope="module")
def engine() -> FluxEngine:
    return tiny_flux.engine(torch.bfloat16)


@pytest.mark.parametrize("acceleration", ["none", "regular", "high"])
def test_there_is_one_from_the_first_step_on(engine: FluxEngine, acceleration: str) -> None:
    painting = engine.start(asked(width=128, height=96, acceleration=acceleration), 1)
    assert engine.preview(painting) is None
    engine.advance(painting)
    first = engine.preview(painting)
    assert first
    assert (first.mode, first.size) == ("RGB", (256, 192))
    engine.advance(painting)
    second = engine.preview(painting)
    assert second
    assert second.tobytes() != first.tobytes()


def test_looking_changes_nothing(engine: FluxEngine) -> None:
    request = asked(num_inference_steps=3)
    expected = tiny_flux.painted(engine, request, 1)
    painting = engine.start(request, 1)
    while painting.step < painting.num_steps:
        engine.preview(painting)
        engine.advance(painting)
        engine.preview(painting)
    assert [picture.tobytes() for picture in finished(engine, painting)] == [picture.tobytes() for picture in expected]
    # What it was seen in is let go with the rest.
    assert engine.preview(painting) is None


def test_it_is_of_the_picture_that_is_painted_now(engine: FluxEngine) -> None:
    request = asked(num_images=2)

    def after_first_step(request: FluxDevInput, seed: int) -> bytes:
        alone = engine.start(request, seed)
        engine.advance(alone)
        picture: Image | None = engine.preview(alone)
        assert picture
        return picture.tobytes()

    painting = engine.start(request, 5)
    seen = []
    for _ in range(painting.num_steps):
        engine.advance(painting)
        picture = engine.preview(painting)
        assert picture
        seen.append(picture.tobytes())
    # Two steps of the first picture, then two of the second.
    assert seen[0] == after_first_step(asked(), 5)
    assert seen[2] == after_first_step(asked(), 6)
    assert len(set(seen)) == 4


def test_after_the_last_step_it_is_the_picture_itself(engine: FluxEngine) -> None:
    painting = tiny_flux.stepped(engine, engine.start(asked(), 1))
    (generation,) = painting.samples
    assert torch.equal(generation.estimate, generation.latents)
