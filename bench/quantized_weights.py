"""The fidelity of quantized weights: images of the demo weights in each form, against those of the exact weights.

python -m bench.quantized_weights [--prompts 100] [--steps 8] [--forms sdnq GGUF]

Each form generates the same images at 512x512 with "none", on the CPU. The table has the PSNR and SSIM of the images
against those of the exact weights, and the share of images in which the demo's judge sees the object of the prompt.
Forms that this machine cannot load are named with the reason. Needs `pip install -e '.[quantize,gguf,bench]'`, and
sdnq and optimum-quanto for the directories that they quantize.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from PIL.Image import Image
from safetensors.torch import load_file

from models.base import EngineConfig, GenerationFailed, SingleFile
from models.benchmark.fidelity import compare
from models.demo.recipe.export import JUDGE
from models.demo.recipe.judge import Judge
from models.demo.recipe.objects import BACKGROUNDS
from models.demo.recipe.plan import PLANS
from models.flux.device import Device
from models.flux.loader import load_engine
from models.loading.specs import DEMO
from tests.support import quantized_directories
from tests.support.quantized_directories import write_quantized
from tests.support.single_files import write_gguf
from tests.support.tiny_flux import finish_task

SIDE = 512
#: The types of matrices in GGUF files.
GGUF_TYPES = ("Q8_0", "Q5_1", "Q4_0")
EXACT = EngineConfig(DEMO, safety_checker="", device="cpu")


def _gguf(directory: Path, kind: str) -> EngineConfig:
    (weights,) = (DEMO / "transformer").glob("*.safetensors")
    return replace(EXACT, weights=SingleFile(write_gguf(directory / f"{kind}.gguf", load_file(weights), kind), DEMO))


def _quantized(directory: Path, name: str) -> EngineConfig:
    return replace(EXACT, weights=write_quantized(directory / name, quantized_directories.FORMS[name]))


#: What gives the settings of each form, after writing its weights into a directory.
FORMS: dict[str, Callable[[Path], EngineConfig]] = {
    "int8 at load": lambda _: replace(EXACT, quantize="int8"),
    "fp8, computed in bf16": lambda _: replace(EXACT, memory="fp8-storage"),
    "int4 at load": lambda _: replace(EXACT, quantize="int4"),
    **{f"GGUF {kind}": partial(_gguf, kind=kind) for kind in GGUF_TYPES},
    **{name: partial(_quantized, name=name) for name in quantized_directories.FORMS},
}


def main() -> None:
    """Generate the images of every form and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--forms", nargs="*", default=[""], help="parts of the names of the forms to measure")
    arguments = parser.parse_args()
    judge = Judge(PLANS["small"], load_file(DEMO / JUDGE))
    objects = [judge.names[number % len(judge.names)] for number in range(arguments.prompts)]
    backgrounds = list(BACKGROUNDS)
    prompts = [f"a {name} on a {backgrounds[n % len(backgrounds)]} background" for n, name in enumerate(objects)]
    print(f"{arguments.prompts} prompts, {SIDE}x{SIDE}, {arguments.steps} steps, {Device('cpu').description}")
    print("| form | PSNR in dB, median and lowest | SSIM, median and lowest | object right |")
    print("|---|---|---|---|")
    exact = _images(EXACT, prompts, arguments.steps)
    print(f"| exact | | | {_share_right(judge, exact, objects)} |", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for name, write in FORMS.items():
            if not any(part in name for part in arguments.forms):
                continue
            try:
                images = _images(write(Path(directory)), prompts, arguments.steps)
            except (OSError, ImportError, GenerationFailed) as error:
                print(f"| {name} | {error} | | |", flush=True)
                continue
            found = [compare(*each) for each in zip(prompts, images, exact, strict=True)]
            ratios = [each.psnr_db for each in found if each.psnr_db is not None]
            alike = [each.ssim for each in found]
            psnr = f"{statistics.median(ratios):.1f}, {min(ratios):.1f}" if ratios else "equal"
            ssim = f"{statistics.median(alike):.3f}, {min(alike):.3f}"
            print(f"| {name} | {psnr} | {ssim} | {_share_right(judge, images, objects)} |", flush=True)


def _images(config: EngineConfig, prompts: Sequence[str], num_steps: int) -> list[Image]:
    """Load the weights in a form, and generate an image for each prompt, with its number as the seed."""
    engine = load_engine(config)
    images = []
    for seed, prompt in enumerate(prompts):
        size = SimpleNamespace(width=SIDE, height=SIDE)
        request = SimpleNamespace(
            prompt=prompt, image_size=size, num_inference_steps=num_steps, num_images=1, guidance_scale=3.5
        )
        images += finish_task(engine, engine.start(request, seed))
    engine.close()
    return images


def _share_right(judge: Judge, images: Sequence[Image], objects: Sequence[str]) -> str:
    right = [judge.object_in(image) == name for image, name in zip(images, objects, strict=True)]
    return f"{sum(right) / len(right):.1%}"


if __name__ == "__main__":
    main()
