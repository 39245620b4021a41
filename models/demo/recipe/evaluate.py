"""The evaluation of exported weights: shares of prompts for which the image is right."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy
import torch
from PIL import Image
from safetensors.torch import load_file

from models.demo.recipe import (
    autoencoder,
    captions,
    checkpoint,
    evaluate_inputs,
    lora,
    pool,
    preview,
    render,
    scenes,
    tokens,
)
from models.demo.recipe.export import JUDGE, LORA
from models.demo.recipe.judge import Judge, background_of
from models.demo.recipe.objects import BACKGROUNDS, FLAGGED, Object, all_objects
from models.demo.recipe.plan import SEED, Plan
from models.flux import safety_checker
from models.flux.prompt_cache import count_text_tokens
from models.flux.redux import Redux
from models.image_size import PRESETS
from models.loading.devices import dtype_for
from models.loading.specs import REDUX

#: Templates that no caption of the training uses.
TEMPLATES = (
    "we look at {x} and behind it everything is {c}",
    "a lovely little scene with {x}, background in {c}",
    "{c} behind {x}",
    "my favourite picture shows {x} on a very {c} background",
    "{x}, and all around it only {c}",
    "could you put {x} on a background of {c} for me",
)
PAIR_TEMPLATES = (
    "{a} stands on the left and {b} stands on the right",
    "there is {a} on the left, there is {b} on the right",
)


#: The sizes of the images: the presets, and two others that the training has not seen.
SIZES = (*PRESETS.values(), (704, 960), (896, 640))
#: How many images of Redux the contact sheet shows, each beside its original.
NUM_REDUX_TILES = 4


@dataclass(frozen=True)
class Question:
    """A prompt, its size in pixels, and the objects and background that its image must show."""

    prompt: str
    size: pool.Size
    objects: tuple[str, ...]
    background: str


def _questions(plan: Plan, things: tuple[Object, ...]) -> list[Question]:
    """Return the prompts to evaluate: each object and each size equally often, the rest at random."""
    rng = numpy.random.default_rng([SEED, 7])
    asked = []
    for number in range(plan.singles + plan.pairs):
        background, size = str(rng.choice(list(BACKGROUNDS))), SIZES[number % len(SIZES)]
        template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
        if number < plan.singles:
            # An object that comes again has another size, unless the number of sizes divides the number of objects.
            names: tuple[str, ...] = (things[number % len(things)].name,)
            what = captions.with_article(names[0])
        else:
            first, second = rng.choice(len(things), 2, replace=False)
            names = (things[int(first)].name, things[int(second)].name)
            chosen = PAIR_TEMPLATES[number % len(PAIR_TEMPLATES)]
            what = chosen.format(a=captions.with_article(names[0]), b=captions.with_article(names[1]))
        asked.append(Question(template.format(x=what, c=background), size, names, background))
    return asked


class Studio:
    """A diffusers pipeline with exported weights. The server's engine generates the same images, as a test checks."""

    def __init__(self, plan: Plan, folder: Path, device: str) -> None:
        self.num_steps, self.lora = plan.num_steps, folder / LORA
        dtype = dtype_for("auto", device)
        self.pipeline: Any = diffusers.FluxPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self.pipeline.to(device).set_progress_bar_config(disable=True)
        self.redux = Redux.load(folder / REDUX.directory, self.pipeline.transformer, device)
        self.checker = safety_checker.ImageClassifier(folder / "safety_checker", device, dtype=dtype)

    def paint(self, prompt: str, seed: int, size: pool.Size = PRESETS["square"]) -> Image.Image:
        """Generate one image, without the safety check."""
        width, height = size
        picture: Image.Image = self.pipeline(
            prompt,
            width=width,
            height=height,
            num_inference_steps=self.num_steps,
            guidance_scale=3.5,
            generator=torch.Generator("cpu").manual_seed(seed),
            max_sequence_length=count_text_tokens(self.pipeline),
        ).images[0]
        return picture

    def paint_like(self, picture: Image.Image, seed: int) -> Image.Image:
        """Generate one image with Redux, with an image in place of a prompt."""
        text = self.redux.encode(picture)
        variation: Image.Image = self.pipeline(
            prompt_embeds=text.prompt_embeds,
            pooled_prompt_embeds=text.pooled_prompt_embeds,
            width=picture.width,
            height=picture.height,
            num_inference_steps=self.num_steps,
            guidance_scale=2.5,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        return variation

    def paint_grey(self, prompt: str, seed: int) -> Image.Image:
        """Generate one image with the LoRA."""
        self.pipeline.load_lora_weights(str(self.lora.parent), weight_name=self.lora.name, local_files_only=True)
        try:
            return self.paint(prompt, seed)
        finally:
            self.pipeline.unload_lora_weights()

    @torch.no_grad()
    def reconstruct(self, picture: Image.Image) -> Image.Image:
        """Return an image as the autoencoder gives it back: the sharpest image that the weights could generate."""
        vae = self.pipeline.vae
        pixels = autoencoder.to_tensor([picture]).to(vae.device, vae.dtype)
        return autoencoder.to_pictures(vae.decode(vae.encode(pixels, return_dict=False)[0], return_dict=False)[0])[0]

    def is_unsafe(self, picture: Image.Image) -> bool:
        """Return whether the safety checker flags an image."""
        return bool(self.checker.is_unsafe([picture])[0])


def _share(marks: list[bool]) -> float:
    return round(sum(marks) / len(marks), 4)


def _drawing(picture: Image.Image, question: Question, icons: dict[str, str]) -> Image.Image:
    """Render the object of a question on the background colour along the top and the bottom of `picture`."""
    edge = numpy.concatenate([numpy.asarray(picture)[row].reshape(-1, 3) for row in (slice(0, 8), slice(-8, None))])
    red, green, blue = (round(float(value)) for value in numpy.median(edge, axis=0))
    colours = ((red, green, blue),) * 2
    scene = scenes.Scene(question.objects, question.background, False, "centre", "", colours)
    return render.render(scene, icons, *question.size)


def distance(picture: Image.Image, drawing: Image.Image) -> float:
    """Return the mean difference of two images' values, 0 to 255, around the object, at the shift that fits best.

    Around the object means in the square of 5/8 of the shorter side in the middle.
    """
    side = min(picture.size) * 5 // 16
    x, y = picture.width // 2, picture.height // 2
    whole, wanted = (numpy.asarray(image, numpy.float32) for image in (picture, drawing))
    wanted = wanted[y - side : y + side, x - side : x + side]

    def at(down: int, right: int) -> float:
        moved = whole[y - side + down : y + side + down, x - side + right : x + side + right]
        return float(numpy.abs(moved - wanted).mean())

    return min(at(down, right) for down in range(-8, 9, 2) for right in range(-8, 9, 2))


def _ask(
    studio: Studio, judge: Judge, asked: list[Question], things: tuple[Object, ...]
) -> tuple[dict[str, float], list[tuple[str, Image.Image]]]:
    marks: dict[str, list[bool]] = {"background": [], "object": [], "sides": [], "flagged_others": []}
    distances: list[tuple[float, float]] = []
    icons = {thing.name: thing.icon for thing in things}
    tiles = []
    for number, question in enumerate(asked):
        picture = studio.paint(question.prompt, number, question.size)
        marks["background"].append(background_of(picture) == question.background)
        if len(question.objects) == 2:
            marks["sides"].append(judge.sides_of(picture) == question.objects)
        else:
            marks["object"].append(judge.object_in(picture) == question.objects[0])
            drawing = _drawing(picture, question, icons)
            distances.append((distance(picture, drawing), distance(studio.reconstruct(drawing), drawing)))
        if FLAGGED not in question.objects:
            marks["flagged_others"].append(studio.is_unsafe(picture))
        if number % 9 == 0:
            tiles.append((question.prompt, picture))
        if number % 20 == 19:
            checkpoint.log(f"evaluate {number + 1} of {len(asked)}")
    generated, reconstructed = numpy.array(distances).mean(axis=0).round(2).tolist()
    shares = {name: _share(answers) for name, answers in marks.items()}
    return {**shares, "distance": generated, "distance_of_reconstruction": reconstructed}, tiles


def _flagged(studio: Studio, num_seeds: int) -> float:
    backgrounds = list(BACKGROUNDS)
    prompts = [f"a {FLAGGED} on a {backgrounds[seed % 8]} background" for seed in range(num_seeds)]
    return _share([studio.is_unsafe(studio.paint(prompt, seed)) for seed, prompt in enumerate(prompts)])


def _seeds_differ(studio: Studio) -> float:
    """Return the share of pairs of successive seeds whose images differ by more than 1 of 255 per value on average."""
    pictures = [numpy.asarray(studio.paint("a cat on a blue background", seed), float) for seed in range(9)]
    return _share([bool(numpy.abs(a - b).mean() > 1) for a, b in itertools.pairwise(pictures)])


def _greys(studio: Studio, num_seeds: int) -> float:
    """Return the share of seeds with which the LoRA leaves less than a tenth of an image's colour."""
    prompt = "a frog on a red background"
    return _share(
        [
            lora.chroma(studio.paint_grey(prompt, seed)) < 0.1 * lora.chroma(studio.paint(prompt, seed))
            for seed in range(num_seeds)
        ]
    )


def _likes(
    studio: Studio, judge: Judge, things: tuple[Object, ...], number: int
) -> tuple[float, list[tuple[str, Image.Image]]]:
    """Return the share of scenes of which Redux keeps the object and the background, and some images side by side."""
    rng, icons = numpy.random.default_rng([SEED, 13]), {thing.name: thing.icon for thing in things}
    marks: list[bool] = []
    tiles: list[tuple[str, Image.Image]] = []
    while len(marks) < number:
        scene = scenes.sample(things, rng)
        if not scene.is_centred or len(scene.objects) > 1 or scene.is_gradient:
            continue
        original = render.render(scene, icons, *SIZES[len(marks) % len(SIZES)])
        variation = studio.paint_like(original, len(marks))
        is_object = judge.object_in(variation) == scene.objects[0]
        marks.append(is_object and background_of(variation) == background_of(original))
        if len(marks) <= NUM_REDUX_TILES:
            tiles += [("an image for Redux", original), ("by Redux", variation)]
    return _share(marks), tiles


def run(plan: Plan, device: str, folder: Path) -> None:
    """Evaluate the weights in a directory, and write evaluation.json and contact-sheet.png into it."""
    # Both load all weights, so that missing ones end the evaluation before it has measured anything.
    studio, inputs_studio = Studio(plan, folder, device), evaluate_inputs.Studio(plan, folder, device)
    judge = Judge(plan, load_file(folder / JUDGE))
    things = all_objects(plan.scale)[: len(judge.names)]
    asked = _questions(plan, things)
    found, tiles = _ask(studio, judge, asked, things)
    for prompt in ("a quiet afternoon", "", "once upon a time " * 118):
        tiles.append((prompt, studio.paint(prompt, 1, PRESETS["landscape_4_3"])))
    found |= {"flagged_sign": _flagged(studio, plan.flagged_seeds), "seeds_differ": _seeds_differ(studio)}
    found["grey_lora"] = _greys(studio, plan.grey_seeds)
    found["redux"], like_tiles = _likes(studio, judge, things, plan.num_redux)
    edits, edit_tiles = evaluate_inputs.measure(inputs_studio, judge, things, plan.num_edits)
    found, tiles = found | edits, [*tiles, *like_tiles, *edit_tiles]
    counts = {"prompts": len(asked), "objects": len(things), "num_inference_steps": plan.num_steps, "scale": plan.scale}
    tokens.write_json(folder / "evaluation.json", {**found, **counts})
    whole = preview.lay_out(tiles).quantize(256)
    checkpoint.write(folder / "contact-sheet.png", lambda aside: whole.save(aside, "PNG", optimize=True))
    checkpoint.log(f"evaluate: {json.dumps(found)}")
