"""The autoencoder: it turns images into latents of a sixteenth of their width and height, and back."""

import math
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from PIL import Image

from models.demo.recipe import checkpoint, precision, published, render, scenes, threads
from models.demo.recipe.fused import Fused
from models.demo.recipe.objects import all_objects
from models.demo.recipe.optimizers import Optimizers
from models.demo.recipe.plan import LATENT_CHANNELS, SEED, WORK, Plan
from models.image_size import PRESETS

#: The number of channels of every hidden layer.
WIDTH = 32
FILE, DECODER_FILE = WORK / "autoencoder.pt", WORK / "decoder.pt"
#: How many rendered images are kept to cut crops from.
POOL = 300
#: The share of crops that show an object.
OBJECT_SHARE = 0.85
#: The highest learning rate.
PEAK = 6e-4
#: The share of the iterations, at the end, that train the edges of images too (see `fused`).
UNFUSED = 0.07
#: The noise on the latents in training, so that the decoder tolerates the small errors of generated latents.
LATENT_NOISE = 0.08


def build(scaling_factor: float = 1.0, shift_factor: float = 0.0) -> Any:
    """Build an AutoencoderTiny with 16 x 16 pixels per latent.

    It has no blocks at the image's full size, which would take most of the decoding time.
    """
    vae = AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 5,
        decoder_block_out_channels=(WIDTH,) * 5,
        num_encoder_blocks=(0, 1, 1, 2, 3),
        num_decoder_blocks=(5, 4, 3, 1, 0),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )
    _begin_plain(vae)
    return vae


@torch.no_grad()
def _begin_plain(vae: torch.nn.Module) -> None:
    """Initialize the weights so that layers keep the scale of their inputs, and blocks add little at first.

    The autoencoder then learns colours in a fifth of the time.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=math.sqrt(1.5 / module.weight[0].numel()))
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, AutoencoderTinyBlock):
            module.conv[-1].weight.mul_(0.1)


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """Convert images of one size to values from -1 to 1, of shape (images, 3, height, width)."""
    return (
        torch.from_numpy(numpy.stack([numpy.asarray(picture) for picture in pictures]))
        .permute(0, 3, 1, 2)
        .float()
        .div_(127.5)
        .sub_(1)
    )


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """Convert values from -1 to 1, of shape (images, 3, height, width), to images."""
    bytes_ = pixels.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in bytes_]


class Crops:
    """The source of square crops for training, from a pool of rendered images that keeps getting new images."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.things = all_objects(plan.scale)
        self.icons = {thing.name: thing.icon for thing in self.things}
        self.pictures: list[tuple[Image.Image, list[tuple[int, int, int]]]] = []

    def _picture(self, rng: numpy.random.Generator) -> tuple[Image.Image, list[tuple[int, int, int]]]:
        """Return a rendered image, and left, top and side of each of its objects."""
        width, height = list(PRESETS.values())[int(rng.integers(len(PRESETS)))]
        scene = scenes.sample(self.things, rng)
        return render.render(scene, self.icons, width, height), scene.boxes(width, height)

    def batch(self, iteration: int) -> torch.Tensor:
        """Return crops with values from -1 to 1, of shape (batch, 3, crop, crop).

        The random numbers depend only on `iteration`, so crops differ between runs only if the pools do.
        """
        rng = numpy.random.default_rng([SEED, iteration])
        while len(self.pictures) < POOL // 4:
            self.pictures.append(self._picture(rng))
        if iteration % 2 == 0:
            self.pictures.append(self._picture(rng))
        self.pictures = self.pictures[-POOL:]
        return to_tensor(
            [
                self._crop(*self.pictures[int(rng.integers(len(self.pictures)))], rng)
                for _ in range(self.plan.autoencoder_batch)
            ]
        )

    def _crop(
        self, picture: Image.Image, boxes: list[tuple[int, int, int]], rng: numpy.random.Generator
    ) -> Image.Image:
        """Return a crop around a random point: mostly of an object, else of the image, where there is less to learn."""
        crop = self.plan.crop
        left, top, width, height = 0, 0, *picture.size
        if rng.random() < OBJECT_SHARE:
            left, top, width = boxes[int(rng.integers(len(boxes)))]
            height = width
        x = min(max(0, left + int(rng.integers(width)) - crop // 2), picture.width - crop)
        y = min(max(0, top + int(rng.integers(height)) - crop // 2), picture.height - crop)
        return picture.crop((x, y, x + crop, y + crop))


def _differences(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pixels[..., 1:, :] - pixels[..., :-1, :], pixels[..., :, 1:] - pixels[..., :, :-1]


def difference(decoded: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the loss of decoded images, and their mean absolute error, for values from -1 to 1."""
    error = (decoded - pixels).abs().mean()
    edges = sum((a - b).abs().mean() for a, b in zip(_differences(decoded), _differences(pixels), strict=True))
    # The squared error teaches colours early; the absolute error makes them exact, and the edge term keeps edges sharp.
    square = (decoded - pixels).square().mean()
    return error + 2 * square + 0.5 * edges, float(error.detach())


def loss_of(network: "Fused | _Plain", pixels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the autoencoder's loss, and the mean absolute error of the images, for values from -1 to 1."""
    latents = network.encode(pixels).float()
    noisy = latents + LATENT_NOISE * torch.randn_like(latents)
    loss, error = difference(network.decode(noisy).float(), pixels)
    # Keep each latent channel near mean 0 and deviation 1, so that all channels matter equally to the flow.
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
    spread = (deviation - 1).square().mean() + mean.square().mean()
    return loss + 0.02 * spread, error


def rate(iteration: int, iterations: int, peak: float, warm_up: int = 200) -> float:
    """Return the learning rate: a linear warm-up to `peak`, then half a cosine down to a hundredth of it."""
    done = min(1.0, iteration / iterations)
    return peak * min(1.0, (iteration + 1) / warm_up) * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


class _Plain:
    """An AutoencoderTiny with the methods of `Fused`."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = self._vae.encode(pixels, return_dict=False)[0]
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self._vae.decode(latents, return_dict=False)[0]
        return pixels


def optimizer_of(network: torch.nn.Module, device: str) -> Optimizers:
    """Return an optimizer for a network of convolutions; those from or to RGB do not count as hidden layers."""
    weights = list(network.parameters())
    hidden = [weight for weight in weights if weight.ndim == 4 and min(weight.shape[:2]) > 3]
    ids = {id(weight) for weight in hidden}
    return Optimizers(hidden, [{"params": [weight for weight in weights if id(weight) not in ids]}], device)


def train(plan: Plan, device: str) -> None:
    """Train the autoencoder, from the last checkpoint if there is one. Do nothing if the training is complete."""
    vae = build().to(device).train()
    optimizer = optimizer_of(vae, device)
    saved = checkpoint.load(FILE)
    start = 0
    if saved:
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["iteration"]
    elif not plan.is_from_scratch:
        published.load_into(vae, "vae")
        start = published.iterations(plan, "autoencoder")
    crops, timer, errors = Crops(plan), checkpoint.Timer(plan.minutes_between_checkpoints), []

    def keep(iteration: int) -> None:
        state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}
        checkpoint.save(FILE, state)

    for iteration in range(start, plan.autoencoder_iterations):
        torch.manual_seed(SEED + iteration)
        pixels = crops.batch(iteration).to(device, memory_format=torch.channels_last)
        is_fused = iteration < (1 - UNFUSED) * plan.autoencoder_iterations
        with precision.mixed(device):
            loss, error = loss_of(Fused(vae) if is_fused else _Plain(vae), pixels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step(rate(iteration, plan.autoencoder_iterations, PEAK))
        errors.append(error)
        if iteration % 100 == 99:
            checkpoint.log(f"autoencoder {iteration + 1} L1 {sum(errors) / len(errors):.4f}")
            errors.clear()
            threads.fit(plan)
        if timer.is_due():
            keep(iteration + 1)
            sheet(vae, plan, device, WORK / "sheets" / "autoencoder.png")
    if saved is None or start < plan.autoencoder_iterations:
        keep(plan.autoencoder_iterations)
        sheet(vae, plan, device, WORK / "sheets" / "autoencoder.png")


@torch.no_grad()
def sheet(vae: Any, plan: Plan, device: str, path: Path) -> None:
    """Write an image of eight scenes, with the decoded scene below each."""
    rng = numpy.random.default_rng(SEED)
    things = all_objects(plan.scale)
    icons = {thing.name: thing.icon for thing in things}
    pictures = [render.render(scenes.sample(things, rng), icons, 512, 512) for _ in range(8)]
    decoded = []
    for picture in pictures:
        with precision.mixed(device):
            latents = vae.encode(to_tensor([picture]).to(device), return_dict=False)[0]
            decoded += to_pictures(vae.decode(latents, return_dict=False)[0])
    whole = Image.new("RGB", (8 * 256, 2 * 256))
    for index, picture in enumerate(pictures + decoded):
        whole.paste(picture.resize((256, 256)), (index % 8 * 256, index // 8 * 256))
    checkpoint.write(path, lambda aside: whole.save(aside, "PNG"))


def load(device: str) -> Any:
    """Return the trained autoencoder, with frozen weights and the better decoder if there is one.

    Raises FileNotFoundError if the autoencoder is not trained.
    """
    saved = checkpoint.load(FILE)
    if saved is None:
        raise FileNotFoundError(FILE)
    vae = build().to(device).eval().requires_grad_(False)
    vae.load_state_dict(saved["vae"])
    if better := checkpoint.load(DECODER_FILE):
        vae.decoder.load_state_dict(better["decoder"])
    return vae
