"""Training examples for weights that see an image next to the prompt: edges, depths, or a masked image."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch
from PIL import Image

from models.demo.recipe import autoencoder, captions, flow, flow_times, networks, pool, render, scenes
from models.demo.recipe.objects import all_objects
from models.demo.recipe.plan import LATENT_PIXELS, SEED, TEXT_TOKENS, Plan
from models.flux import control

#: What the weights see: edges or depths, or a masked image.
KINDS = ("control", "fill")
#: The share of the images with edges among those with edges or depths.
EDGES_SHARE = 0.65
#: The sizes in pixels of each kind's images. The small ones train whole; of the others, mostly objects are trained, but
#: all of them for Fill, because the hole may be anywhere.
SMALL_SIZE = (320, 320)
SIZES = (SMALL_SIZE, (512, 512), (1024, 768), (768, 1024))
#: The share of prompts that leave out what edges, or the rest of an image, show.
NAMELESS_SHARE = 0.35
#: The side in pixels to which depths are scaled, and back, to be as soft as those that the depth estimator finds.
SOFT_PIXELS = 168


@dataclasses.dataclass(frozen=True)
class Example:
    """An image to generate, and what the transformer sees of it.

    Attributes:
        latents: the scaled latents of the image, (channels, height, width).
        caption: returns a random prompt.
        boxes: the boxes of the objects in the image.
        channels: what the transformer sees of each of the image's tokens: (tokens, channels).
    """

    latents: torch.Tensor
    caption: Callable[[numpy.random.Generator], str]
    boxes: tuple[scenes.Box, ...]
    channels: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples of one size: scaled latents, prompts, the image tokens to train on, and what is seen of each token.

    The latents have the shape (images, channels, height, width), and what is seen (images, tokens, channels).
    """

    latents: torch.Tensor
    texts: list[str]
    kept: networks.Kept | None
    channels: torch.Tensor


class Examples:
    """The examples of a kind in one size, each encoded once."""

    def __init__(self, kind: str, plan: Plan, device: str, size: pool.Size) -> None:
        self._kind, self._device, self._size = kind, device, size
        self._things = {thing.name: thing for thing in all_objects(plan.scale)}
        self._icons = {name: thing.icon for name, thing in self._things.items()}
        self._vae: Any = autoencoder.load(device)
        self._scaling, self._shift = pool.statistics()
        rng = numpy.random.default_rng([SEED, 15, KINDS.index(kind), *size])
        number = max(4, plan.num_examples * 320 * 320 // (size[0] * size[1]))
        self._examples = [self._example(rng) for _ in range(number)]

    def batch(self, num_tokens: int, rng: numpy.random.Generator) -> Batch:
        """Return random examples with about this many tokens in all.

        Of large images, they have their objects in the same places, and few tokens of other places.
        """
        first = self._examples[int(rng.integers(len(self._examples)))]
        is_whole = self._size == SMALL_SIZE or self._kind == "fill"
        alike = [each for each in self._examples if is_whole or each.boxes == first.boxes]
        kept = None if is_whole else flow.kept_tokens(self._size, first.boxes, rng)
        tokens_each = len(kept.indices) if kept else flow_times.tokens_of(self._size)
        number = max(1, num_tokens // (tokens_each + TEXT_TOKENS))
        chosen = [alike[int(place)] for place in rng.integers(len(alike), size=number)]
        latents = torch.stack([each.latents for each in chosen])
        channels = torch.stack([each.channels for each in chosen])
        return Batch(latents, [each.caption(rng) for each in chosen], kept, channels)

    def _example(self, rng: numpy.random.Generator) -> Example:
        scene = scenes.sample(tuple(self._things.values()), rng)
        picture = render.render(scene, self._icons, *self._size)
        caption: Callable[[numpy.random.Generator], str] = partial(captions.caption, scene, self._things)
        if self._kind == "control" and rng.random() < EDGES_SHARE:
            channels = self._packed(control.edges(picture, self._size))
            caption = partial(self._caption_of_edges, scene)
        elif self._kind == "control":
            channels = self._packed(self._soft_depths(scene))
        else:
            hole, hidden = self._hole(scene, rng)
            channels = self._masked(picture, hole)
            caption = partial(self._caption_of_hole, scene, hidden)
        return Example(self._latents(picture), caption, tuple(scene.boxes(*self._size)), channels)

    def _caption_of_edges(self, scene: scenes.Scene, rng: numpy.random.Generator) -> str:
        """Return a caption, often without the object, which the edges show."""
        if rng.random() < NAMELESS_SHARE:
            return captions.nameless(scene, rng)
        return captions.caption(scene, self._things, rng)

    def _caption_of_hole(self, scene: scenes.Scene, hidden: scenes.Scene, rng: numpy.random.Generator) -> str:
        """Return a caption of the whole scene or of what is hidden, often without the background, which can be seen."""
        if rng.random() < NAMELESS_SHARE:
            return " and ".join(captions.with_article(name) for name in hidden.objects)
        return captions.caption(scene if rng.random() < 0.6 else hidden, self._things, rng)

    def _soft_depths(self, scene: scenes.Scene) -> Image.Image:
        drawn = render.silhouettes(scene, self._icons, *self._size)
        share = SOFT_PIXELS / min(self._size)
        small = drawn.resize((round(drawn.width * share), round(drawn.height * share)), Image.Resampling.BILINEAR)
        return small.resize(self._size, Image.Resampling.LANCZOS)

    # -- Fill

    def _hole(self, scene: scenes.Scene, rng: numpy.random.Generator) -> tuple[numpy.ndarray, scenes.Scene]:
        """Return a mask of shape (height, width), true where the image is hidden, and a scene with what it hides.

        It mostly hides an object, with some of what is around it.
        """
        width, height = self._size
        hole = numpy.zeros((height, width), bool)
        boxes, chance = scene.boxes(width, height), rng.random()
        place = int(rng.integers(len(boxes)))
        hidden = scene
        if chance < 0.7:
            left, top, side = boxes[place]
            before, above, after, below = (int(each) for each in rng.integers(-side // 16, side // 3, size=4))
            hole[max(0, top - above) : top + side + below, max(0, left - before) : left + side + after] = True
            hidden = dataclasses.replace(scene, objects=(scene.objects[place],), place="centre", size="")
        elif chance < 0.8:
            hole[:, : width // 2] = True
            hole = hole if rng.random() < 0.5 else ~hole
        elif chance < 0.95:
            x, y = sorted(rng.integers(width + 1, size=2)), sorted(rng.integers(height + 1, size=2))
            hole[y[0] : y[1], x[0] : x[1]] = True
        else:
            hole[:] = True
        return hole, hidden

    def _masked(self, picture: Image.Image, hole: numpy.ndarray) -> torch.Tensor:
        """Return the channels of FLUX.1 Fill, as `models.flux.fill.channels` computes them: (tokens, channels)."""
        mask = torch.from_numpy(hole).float()[None]
        latents = self._encode(autoencoder.to_tensor([picture]) * (1 - mask))
        rows, columns = latents.shape[2:]
        cells = mask.view(1, rows, LATENT_PIXELS, columns, LATENT_PIXELS).permute(0, 2, 4, 1, 3)
        cells = cells.reshape(1, LATENT_PIXELS**2, rows, columns).to(self._device)
        return torch.cat([networks.pack(latents), networks.pack(cells)], dim=-1)[0]

    # -- latents

    def _latents(self, picture: Image.Image) -> torch.Tensor:
        return self._encode(autoencoder.to_tensor([picture]))[0]

    def _packed(self, picture: Image.Image) -> torch.Tensor:
        """Return the latents of an image's tokens, of shape (tokens, channels)."""
        return networks.pack(self._encode(autoencoder.to_tensor([picture])))[0]

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = self._vae.encode(pixels.to(self._device), return_dict=False)[0]
        return (latents - self._shift) * self._scaling
