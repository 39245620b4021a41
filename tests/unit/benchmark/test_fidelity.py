"""Tests of fidelity: PSNR and SSIM of images against references, which the first caller generates."""

import math
from pathlib import Path

import numpy
import pytest
from PIL import Image

from models.benchmark.fidelity import compare, references


def grey(level: int) -> Image.Image:
    return Image.fromarray(numpy.full((64, 64, 3), level, dtype=numpy.uint8))


def test_psnr_follows_its_definition() -> None:
    fidelity = compare("a cat", grey(110), grey(100))
    assert (fidelity.prompt, fidelity.is_equal) == ("a cat", False)
    assert fidelity.psnr_db == pytest.approx(20 * math.log10(255 / 10))
    assert 0.99 < fidelity.ssim < 1


def test_other_content_is_less_similar_than_noise() -> None:
    generator = numpy.random.default_rng(1)
    drawn = generator.integers(0, 200, (64, 64, 3))
    noisy, other = drawn + generator.integers(0, 10, drawn.shape), generator.integers(0, 200, drawn.shape)
    exact, near, far = (Image.fromarray(pixels.astype(numpy.uint8)) for pixels in (drawn, noisy, other))
    assert compare("", near, exact).ssim > 0.9 > 0.2 > compare("", far, exact).ssim


@pytest.mark.filterwarnings("error")
def test_equal_images_have_no_finite_psnr() -> None:
    fidelity = compare("a cat", grey(100), grey(100))
    assert (fidelity.is_equal, fidelity.psnr_db, fidelity.ssim) == (True, None, 1.0)


def test_the_first_caller_generates_the_references(tmp_path: Path) -> None:
    first = references(tmp_path, "64x64", 2, lambda: [grey(1), grey(2)])
    second = references(tmp_path, "64x64", 2, lambda: pytest.fail("there are references already"))
    assert [image.getpixel((0, 0)) for image in (*first, *second)] == [(1,) * 3, (2,) * 3] * 2
    (other,) = references(tmp_path, "96x64", 1, lambda: [grey(3)])
    assert other.getpixel((0, 0)) == (3,) * 3
