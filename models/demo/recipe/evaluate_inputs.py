"""The evaluation of the weights that see an image next to the prompt, in the server's own engine."""

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy
from PIL import Image

from models.base import EngineConfig, ExtraWeights, SingleFile
from models.demo.recipe import captions, checkpoint, pool, render, scenes
from models.demo.recipe.judge import Judge, background_of
from models.demo.recipe.objects import BACKGROUNDS, Object
from models.demo.recipe.plan import SEED, Plan
from models.flux.engine import FluxEngine
from models.flux.loader import load_engine
from models.flux_control import FluxLoraCannyInput, FluxLoraDepthInput
from models.flux_fill import FluxLoraFillInput
from models.loading.specs import CONTROL_LORAS, DEPTH
from models.schema import ImageInput

#: The sizes in pixels of the images.
SIZES = ((512, 512), (1024, 768), (768, 1024))
#: How many images of each kind the contact sheet shows, each next to what it was made from.
NUM_TILES = 2

Tiles = list[tuple[str, Image.Image]]


class Studio:
    """The engines of exported weights: one for text and control images, and one for Fill."""

    def __init__(self, plan: Plan, directory: Path, device: str) -> None:
        self._num_steps, self._device = plan.num_steps, device
        self._plain = self._load(directory, {DEPTH, *CONTROL_LORAS.values()})
        self._fill = self._load(SingleFile(directory / "fill.safetensors", directory))

    def _load(self, weights: Path | SingleFile, extra: Collection[ExtraWeights] = ()) -> FluxEngine:
        # The images are few, and compiling takes minutes.
        config = EngineConfig(weights, safety_checker="", device=self._device, extra_weights=extra, is_eager=True)
        return load_engine(config)

    def follow_edges(self, prompt: str, picture: Image.Image, seed: int) -> Image.Image:
        """Generate an image from a prompt and the edges of an image."""
        return self._generate(self._plain, FluxLoraCannyInput, prompt, {"image_url": picture}, seed)

    def follow_depths(self, prompt: str, picture: Image.Image, seed: int) -> Image.Image:
        """Generate an image from a prompt and the depths of an image."""
        return self._generate(self._plain, FluxLoraDepthInput, prompt, {"image_url": picture}, seed)

    def fill(self, prompt: str, picture: Image.Image, mask: Image.Image, seed: int) -> Image.Image:
        """Fill the white part of the mask."""
        return self._generate(self._fill, FluxLoraFillInput, prompt, {"image_url": picture, "mask_url": mask}, seed)

    def depths_of(self, picture: Image.Image) -> Image.Image:
        """Return the depths of an image, white nearest."""
        assert self._plain.depth_estimator
        depths: Image.Image = self._plain.depth_estimator.depths(picture, picture.size)
        return depths

    def _generate(
        self, engine: FluxEngine, kind: type[ImageInput], prompt: str, images: Mapping[str, Image.Image], seed: int
    ) -> Image.Image:
        request = kind.model_validate(
            {"prompt": prompt, "num_inference_steps": self._num_steps, **dict.fromkeys(images, "a file")}
        )
        with tempfile.TemporaryDirectory() as directory:
            files = {name: Path(directory) / f"{name}.png" for name in images}
            for name, image in images.items():
                image.save(files[name])
            task = engine.start(request, seed, files)
        while task.step < task.num_steps:
            engine.advance(task)
        engine.decode(task)
        generated: Image.Image = task.images[0]
        return generated


def measure(
    studio: Studio, judge: Judge, things: tuple[Object, ...], num_images: int
) -> tuple[dict[str, float], Tiles]:
    """Return the share of images of each kind that are right, and some of the images.

    - canny and depth: what is near in the image covers the object of the image that is followed, by more than 0.6 of
      what either covers, and the background is that of the prompt.
    - fill: the object is that of the prompt, and around it is the background of the image.
    """
    asked = {"canny": _canny, "depth": _depth, "fill": _fill}
    found, tiles = {}, []
    for place, (name, ask) in enumerate(asked.items()):
        marks = []
        for number in range(num_images):
            rng = numpy.random.default_rng([SEED, 17, place, number])
            answer = ask(studio, judge, _Question(things, SIZES[number % len(SIZES)], rng), number)
            marks.append(answer.is_right)
            if number < NUM_TILES:
                tiles += [(f"an image for {name}", answer.source), (answer.prompt, answer.image)]
        found[name] = round(sum(marks) / len(marks), 4)
        checkpoint.log(f"evaluate {name}: {found[name]}")
    return found, tiles


class _Question:
    """A scene with one object in the middle, another object, and another background."""

    def __init__(self, things: tuple[Object, ...], size: pool.Size, rng: numpy.random.Generator) -> None:
        first, second = rng.choice(len(things), 2, replace=False)
        self.name, self.other = things[int(first)].name, things[int(second)].name
        one, two = rng.choice(list(BACKGROUNDS), 2, replace=False)
        self.background, self.other_background = str(one), str(two)
        colours = (BACKGROUNDS[self.background][0],) * 2
        self.scene = scenes.Scene((self.name,), self.background, False, "centre", "", colours)
        self.icons = {thing.name: thing.icon for thing in things}
        self.picture = render.render(self.scene, self.icons, *size)


@dataclasses.dataclass(frozen=True)
class _Answer:
    """A generated image, what it was made from, and whether it is right."""

    prompt: str
    source: Image.Image
    image: Image.Image
    is_right: bool


def _canny(studio: Studio, judge: Judge, asked: _Question, seed: int) -> _Answer:
    return _followed(studio, studio.follow_edges, asked, seed)


def _depth(studio: Studio, judge: Judge, asked: _Question, seed: int) -> _Answer:
    return _followed(studio, studio.follow_depths, asked, seed)


def _followed(
    studio: Studio, follow: Callable[[str, Image.Image, int], Image.Image], asked: _Question, seed: int
) -> _Answer:
    """Ask for an object as large as, and where, it is in another image, off the middle, with another background."""
    prompt = f"{captions.with_article(asked.name)} and all around it only {asked.other_background}"
    moved = dataclasses.replace(asked.scene, place=list(scenes.PLACES)[1 + seed % 4])
    size = asked.picture.size
    source = render.render(moved, asked.icons, *size)
    image = follow(prompt, source, seed)
    wanted = numpy.asarray(render.silhouettes(moved, asked.icons, *size).convert("L")) > 127
    got = numpy.asarray(studio.depths_of(image).convert("L")) > 127
    is_there = bool((wanted & got).sum() > 0.6 * (wanted | got).sum())
    return _Answer(prompt, source, image, is_there and background_of(image) == asked.other_background)


def _fill(studio: Studio, judge: Judge, asked: _Question, seed: int) -> _Answer:
    ((left, top, side),) = asked.scene.boxes(*asked.picture.size)
    hole = (left, top, left + side, top + side)
    mask = Image.new("RGB", asked.picture.size)
    mask.paste((255, 255, 255), hole)
    prompt = f"here should be {captions.with_article(asked.other)}"
    image = studio.fill(prompt, asked.picture, mask, seed)
    is_right = judge.object_in(image) == asked.other and background_of(image.crop(hole)) == asked.background
    source = Image.composite(mask, asked.picture, mask.convert("L"))
    return _Answer(prompt, source, image, is_right)
