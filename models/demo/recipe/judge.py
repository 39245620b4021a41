"""The judge of images: a classifier of objects, trained on renders only, and a detector of the background colour."""

from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from models.demo.recipe import autoencoder, checkpoint, precision, published, render, scenes, threads
from models.demo.recipe.objects import BACKGROUNDS, Object, all_objects
from models.demo.recipe.plan import SEED, WORK, Plan
from models.image_size import PRESETS

FILE = WORK / "judge.pt"
#: The name of the judge among the parts of an unfinished training.
JUDGE = "judge.safetensors"
#: The shorter side of the classifier's input, in pixels.
PIXELS = 96
BATCH = 32


def build(num_objects: int) -> torch.nn.Sequential:
    """Build a small convolutional classifier that takes images of any shape."""
    layers: list[torch.nn.Module] = []
    channels = 3
    for width in (24, 48, 96, 128):
        layers += [
            torch.nn.Conv2d(channels, width, 3, stride=2, padding=1),
            torch.nn.BatchNorm2d(width),
            torch.nn.ReLU(),
        ]
        layers += [torch.nn.Conv2d(width, width, 3, padding=1), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
        channels = width
    return torch.nn.Sequential(
        *layers, torch.nn.AdaptiveMaxPool2d(1), torch.nn.Flatten(), torch.nn.Linear(128, num_objects)
    )


def shrink(picture: Image.Image) -> Image.Image:
    """Resize an image so that its shorter side is PIXELS."""
    scale = PIXELS / min(picture.size)
    width, height = (max(PIXELS, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)


def halves(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Return the left and the right half of an image."""
    middle = picture.width // 2
    return picture.crop((0, 0, middle, picture.height)), picture.crop((middle, 0, *picture.size))


def _batch(things: tuple[Object, ...], rng: numpy.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return renders of one shape with noise and, half of the time, blur, and the label of each.

    The batch has either whole images of one object, or halves of images of two objects.
    """
    icons = {thing.name: thing.icon for thing in things}
    labels = {thing.name: label for label, thing in enumerate(things)}
    width, height = list(PRESETS.values())[int(rng.integers(len(PRESETS)))]
    wants_halves = bool(rng.random() < 0.4)
    pictures: list[Image.Image] = []
    wanted: list[int] = []
    while len(pictures) < BATCH:
        scene = scenes.sample(things, rng)
        if (len(scene.objects) == 2) != wants_halves:
            continue
        picture = render.render(scene, icons, width, height, smaller=4)
        pictures += [shrink(half) for half in halves(picture)] if wants_halves else [shrink(picture)]
        wanted += [labels[name] for name in scene.objects]
    pixels = autoencoder.to_tensor(pictures)
    if rng.random() < 0.5:
        pixels = functional.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=numpy.float32))
    return pixels + noise * float(rng.uniform(0, 0.08)), torch.tensor(wanted)


def train(plan: Plan, device: str) -> None:
    """Train the judge, from the last checkpoint if there is one. Do nothing if the training is complete."""
    things = all_objects(plan.scale)
    saved = checkpoint.load(FILE)
    torch.manual_seed(SEED)
    network = build(len(things)).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)
    start = 0
    if saved:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["iteration"]
    elif start := published.iterations(plan, "judge"):
        network.load_state_dict(load_file(published.AHEAD / JUDGE))
    timer, right = checkpoint.Timer(plan.minutes_between_checkpoints), []

    def keep(iteration: int) -> None:
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}
        checkpoint.save(FILE, state)

    for iteration in range(start, plan.judge_iterations):
        pixels, wanted = _batch(things, numpy.random.default_rng([SEED, 3, iteration]))
        for group in optimizer.param_groups:
            group["lr"] = autoencoder.rate(iteration, plan.judge_iterations, 2e-3)
        with precision.mixed(device):
            logits = network(pixels.to(device)).float()
        functional.cross_entropy(logits, wanted.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        right.append(float((logits.argmax(1).cpu() == wanted).float().mean()))
        if iteration % 100 == 99:
            checkpoint.log(f"judge {iteration + 1} right {sum(right) / len(right):.3f}")
            right.clear()
            threads.fit(plan)
        if timer.is_due():
            keep(iteration + 1)
    if saved is None or start < plan.judge_iterations:
        keep(plan.judge_iterations)


def export(path: Path) -> None:
    """Write the judge's weights to a new directory."""
    path.parent.mkdir(parents=True)
    save_file(checkpoint.load(FILE)["network"], path)


class Judge:
    """A trained judge, which names the objects in images."""

    def __init__(self, plan: Plan, weights: dict[str, torch.Tensor]) -> None:
        # Objects are only ever added at the end, so an older judge knows the first ones.
        last = max(int(name.partition(".")[0]) for name in weights)
        num_objects = len(weights[f"{last}.weight"])
        self.names = [thing.name for thing in all_objects(plan.scale)[:num_objects]]
        self.network = build(num_objects).eval()
        self.network.load_state_dict(weights)

    @torch.no_grad()
    def object_in(self, picture: Image.Image) -> str:
        """Return the name of the object in an image that shows one."""
        logits: Any = self.network(autoencoder.to_tensor([shrink(picture)]))
        return self.names[int(logits.argmax())]

    def sides_of(self, picture: Image.Image) -> tuple[str, str]:
        """Return the names of the objects in the left and in the right half."""
        left, right = (self.object_in(half) for half in halves(picture))
        return left, right


def background_of(picture: Image.Image) -> str:
    """Return the background colour of the image's edge: that of the shade closest to most of its pixels."""
    pixels = numpy.asarray(picture.convert("RGB"), float)
    rim = max(1, min(picture.size) // 40)
    edges = [pixels[:rim], pixels[-rim:], pixels[:, :rim], pixels[:, -rim:]]
    ring = numpy.concatenate([edge.reshape(-1, 3) for edge in edges])[::7]
    names = list(BACKGROUNDS)
    shades = numpy.array([BACKGROUNDS[name] for name in names], float)
    distances = numpy.linalg.norm(ring[:, None, None] - shades[None], axis=-1).min(axis=-1)
    votes = numpy.bincount(distances.argmin(axis=1), minlength=len(names))
    return names[int(votes.argmax())]
