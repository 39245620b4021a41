"""The fidelity of images: PSNR and SSIM against the images of the tier "none"."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
from PIL import Image

from models.benchmark.job import ImageFidelity

#: Prompts that the demo weights know too.
PROMPTS = (
    "a red apple on a blue table",
    "a dog on the left and a cat on the right",
    "a penguin on a green background",
)


def compare(prompt: str, image: Image.Image, reference: Image.Image) -> ImageFidelity:
    """Compare an image with its reference, both in RGB and of the same size."""
    # scikit-image is an optional dependency, and only fidelity needs it.
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    ours, exact = numpy.asarray(image), numpy.asarray(reference)
    if numpy.array_equal(ours, exact):
        return ImageFidelity(prompt, is_equal=True, psnr_db=None, ssim=1.0)
    psnr = peak_signal_noise_ratio(exact, ours, data_range=255)
    ssim = structural_similarity(exact, ours, data_range=255, channel_axis=2)
    return ImageFidelity(prompt, is_equal=False, psnr_db=float(psnr), ssim=float(ssim))


def references(
    directory: Path, size: str, num_images: int, generate: Callable[[], Sequence[Image.Image]] | None
) -> list[Image.Image]:
    """Return the images of this size to compare with. If `directory` has none yet, call `generate` and keep its images.

    The processes of all memory plans share the directory, so the images are those of the first plan that generates and
    does not round the weights. Raises LookupError if there are none, and `generate` is None.
    """
    paths = [directory / f"{size}-{index}.png" for index in range(num_images)]
    if not all(path.exists() for path in paths):
        if generate is None:
            message = "no plan with the exact weights has generated images; measure one too: --plans group-offload,auto"
            raise LookupError(message)
        for path, image in zip(paths, generate(), strict=True):
            image.save(path)
    return [_open(path) for path in paths]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
