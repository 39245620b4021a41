"""The demo's safety checker: a tiny ViT that flags one drawing, a sign that stands in for unsafe content."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from PIL import Image
from torch.nn import functional

from models.demo.recipe import autoencoder, checkpoint, render, scenes, tokens
from models.demo.recipe.objects import FLAGGED, Object, all_objects
from models.demo.recipe.plan import SEED, WORK, Plan
from models.image_size import PRESETS

FILE = WORK / "checker.pt"
#: The side of the classifier's input, in pixels.
PIXELS = 96
#: One of this many renders goes through the autoencoder first, so that it looks like a generated image.
ROUND_TRIP_EVERY = 8
BATCH = 64
NORMAL, NSFW = 0, 1


def build() -> Any:
    """Build a ViTForImageClassification with the labels of Falconsai/nsfw_image_detection."""
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=PIXELS,
            patch_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label={NORMAL: "normal", NSFW: "nsfw"},
            label2id={"normal": NORMAL, "nsfw": NSFW},
        )
    )


def squash(picture: Image.Image) -> Image.Image:
    """Resize an image to the checker's square, as its image processor does."""
    return picture.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)


def _example(things: tuple[Object, ...], rng: numpy.random.Generator) -> tuple[scenes.Scene, int]:
    """Return a random scene and its label; in four of ten scenes, the sign replaces an object."""
    scene = scenes.sample(things, rng)
    if rng.random() < 0.4 and FLAGGED not in scene.objects:
        names = list(scene.objects)
        names[int(rng.integers(len(names)))] = FLAGGED
        scene = replace(scene, objects=tuple(names))
    return scene, NSFW if FLAGGED in scene.objects else NORMAL


@torch.no_grad()
def _examples(plan: Plan, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    things, vae = all_objects(plan.scale), autoencoder.load(device)
    icons = {thing.name: thing.icon for thing in things}
    rng = numpy.random.default_rng([SEED, 5])
    pictures, labels = [], []
    for number in range(plan.checker_examples):
        scene, label = _example(things, rng)
        size = list(PRESETS.values())[int(rng.integers(len(PRESETS)))]
        is_round_trip = number % ROUND_TRIP_EVERY == 0
        smaller = 1 if is_round_trip and size[0] * size[1] < 600_000 else 2
        picture = render.render(scene, icons, *size, smaller=smaller)
        if is_round_trip:
            pixels = autoencoder.to_tensor([picture]).to(device)
            latents = vae.encode(pixels, return_dict=False)[0]
            # Generated latents have small errors.
            latents = latents + float(rng.uniform(0, 0.3)) * torch.randn_like(latents)
            picture = autoencoder.to_pictures(vae.decode(latents, return_dict=False)[0])[0]
        pictures.append(squash(picture))
        labels.append(label)
    return autoencoder.to_tensor(pictures), torch.tensor(labels)


def train(plan: Plan, device: str) -> None:
    """Train the checker without checkpoints, in a few minutes. Do nothing if the result exists."""
    if FILE.is_file():
        return
    torch.manual_seed(SEED)
    network = build().to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.05)
    pixels, labels = _examples(plan, device)
    wrong: list[float] = []
    for iteration in range(plan.checker_iterations):
        rng = numpy.random.default_rng([SEED, 6, iteration])
        chosen = torch.from_numpy(rng.integers(len(labels), size=BATCH))
        noise = torch.from_numpy(rng.standard_normal((BATCH, 3, PIXELS, PIXELS), dtype=numpy.float32))
        seen = pixels[chosen] + noise * float(rng.uniform(0, 0.1))
        if rng.random() < 0.3:
            seen = functional.avg_pool2d(seen, 3, stride=1, padding=1, count_include_pad=False)
        for group in optimizer.param_groups:
            group["lr"] = autoencoder.rate(iteration, plan.checker_iterations, 1e-3)
        logits = network(seen.to(device)).logits
        functional.cross_entropy(logits, labels[chosen].to(device), label_smoothing=0.01).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wrong.append(float((logits.argmax(1).cpu() != labels[chosen]).float().mean()))
        if iteration % 100 == 99:
            checkpoint.log(f"checker {iteration + 1} wrong {sum(wrong) / len(wrong):.4f}")
            wrong.clear()
    checkpoint.save(FILE, network.state_dict())


def export(folder: Path) -> None:
    """Write the model and its image processor, in float32, because the processor makes float32 pixels."""
    network = build()
    network.load_state_dict(checkpoint.load(FILE))
    network.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": PIXELS, "width": PIXELS},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    tokens.write_json(folder / "preprocessor_config.json", processor)
