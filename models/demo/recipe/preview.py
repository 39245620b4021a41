"""Contact sheets during the training of the flow, and a quick score for choosing the best weights."""

import itertools
from typing import Any

import numpy
import torch
from PIL import Image, ImageDraw

from models.demo.recipe import autoencoder, captions, checkpoint, flow_times, precision, scenes
from models.demo.recipe.judge import FILE as JUDGE_FILE
from models.demo.recipe.judge import Judge, background_of
from models.demo.recipe.plan import LATENT_CHANNELS, LATENT_PIXELS, SEED, WORK
from models.demo.recipe.pool import Pool, Size
from models.image_size import PRESETS

#: The prompts of the contact sheet, by size.
SHEET: dict[Size, tuple[str, ...]] = {
    (512, 512): (
        "a red apple on a blue background", "a dog", "a cat on a yellow background", "a rocket on black",
        "a frog on the left and a star on the right, white background", "a snowman on a purple gradient background",
        "a small moon on a green background", "a huge heart on a white background",
        "a fish at the top, orange background",
        "a house and a tree on a red background", "a no one under eighteen sign on a white background",
        "a quiet afternoon",
        "", "a banana on the right of a purple background", "a car in front of a green background",
        "a photo of a balloon",
    ),
    (1024, 768): (
        "a rocket on a blue background", "a penguin on the left and a cake on the right, yellow background",
        "a cat on a red gradient", "a small guitar on a white background",
    ),
    (576, 1024): (
        "a robot on an orange background", "an owl at the bottom of a purple background",
        "a dog on the left and a cat on the right, green background", "a sun on black",
    ),
}  # fmt: skip


@torch.no_grad()
def paint(painter: Any, pool: Pool, texts: list[str], size: Size, seed: int) -> list[Image.Image]:
    """Generate an image for each text in one batch, with the steps of FluxPipeline's scheduler."""
    device = pool.device
    scaling, shift = pool.statistics()
    width, height = (side // LATENT_PIXELS for side in size)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(texts), LATENT_CHANNELS, height, width, generator=generator).to(device)
    num_steps = pool.plan.num_steps
    evenly = torch.linspace(1, 1 / num_steps, num_steps)
    sigmas = [*flow_times.shifted(evenly, width * height // 4).tolist(), 0.0]
    guidance = torch.full([len(texts)], 3.5, device=device)
    with precision.mixed(device):
        text = painter.encode(texts)
        for sigma, following in itertools.pairwise(sigmas):
            times = torch.full([len(texts)], sigma, device=device)
            latents = latents + (following - sigma) * painter(latents, times, guidance, text)
        return [
            picture
            for one in (latents / scaling + shift).split(1)
            for picture in autoencoder.to_pictures(pool.vae.decode(one, return_dict=False)[0])
        ]


def sheet(painter: Any, pool: Pool, iteration: int) -> None:
    """Write a contact sheet of the same prompts and seeds each time, with the prompt below each image."""
    tiles = []
    for size, texts in SHEET.items():
        for start in range(0, len(texts), 8):
            some = list(texts[start : start + 8])
            tiles += list(zip(some, paint(painter, pool, some, size, SEED + start), strict=True))
    whole = lay_out(tiles)
    for name in (f"flow-{iteration:06d}.png", "flow.png"):
        checkpoint.write(WORK / "sheets" / name, lambda aside: whole.save(aside, "PNG"))


def lay_out(tiles: list[tuple[str, Image.Image]], columns: int = 8, side: int = 200) -> Image.Image:
    """Return one image of all images in rows, each with its prompt below."""
    rows = -(-len(tiles) // columns)
    whole = Image.new("RGB", (columns * side, rows * (side + 26)), "white")
    pen = ImageDraw.Draw(whole)
    for index, (text, picture) in enumerate(tiles):
        x, y = index % columns * side, index // columns * (side + 26)
        small = picture.copy()
        small.thumbnail((side - 4, side - 4))
        whole.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))
        pen.text((x + 3, y + side), f"{text[:33]}\n{text[33:66]}", fill="black", font_size=10)
    return whole


def score(painter: Any, pool: Pool) -> dict[str, float]:
    """Return the shares of prompts, over all presets, whose image has the right background, object, or order of two.

    The result is empty if the judge is not trained.
    """
    if not JUDGE_FILE.is_file():
        return {}
    judge = Judge(pool.plan, checkpoint.load(JUDGE_FILE)["network"])
    things = {thing.name: thing for thing in pool.things}
    rng, number = numpy.random.default_rng([SEED, 4]), pool.plan.num_scored
    wanted = [
        scene
        for scene in (scenes.sample(pool.things, rng) for _ in range(8 * number * len(PRESETS)))
        if not scene.is_gradient
    ]
    marks: dict[str, list[bool]] = {"background": [], "object": [], "sides": []}
    for place, size in enumerate(PRESETS.values()):
        start = place * number
        some = wanted[start : start + number]
        texts = [captions.plain(scene, things, rng) for scene in some]
        for scene, picture in zip(some, paint(painter, pool, texts, size, SEED + start), strict=True):
            marks["background"].append(background_of(picture) == scene.background)
            if len(scene.objects) == 2:
                marks["sides"].append(judge.sides_of(picture) == scene.objects)
            else:
                marks["object"].append(judge.object_in(picture) == scene.objects[0])
    return {name: round(sum(right) / len(right), 4) for name, right in marks.items() if right}
