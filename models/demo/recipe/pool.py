"""A pool of scenes with their latents, which are computed once. Captions are not kept: each use makes new ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from models.demo.recipe import autoencoder, checkpoint, precision, published, render, scenes
from models.demo.recipe.objects import all_objects
from models.demo.recipe.plan import EARLY, SEED, WORK, Plan, size_shares

FOLDER = WORK / "pool"
STATISTICS = WORK / "latents.json"
#: The share of scenes with two objects among whole images, and among cropped ones. In the pool it is a third. Which
#: word describes which of two objects is learnt last, so training sees more of them.
PAIR_SHARE, CROPPED_PAIR_SHARE = 0.65, 0.5

Size = tuple[int, int]


def pick_size(rng: numpy.random.Generator, mostly_small: bool) -> Size:
    """Return a random size; each has the probability in `size_shares`."""
    shares = size_shares(mostly_small)
    return list(shares)[int(rng.choice(len(shares), p=list(shares.values())))]


@dataclass
class Shelf:
    """The scenes of one size, and their latents in bfloat16, not yet scaled."""

    scenes: list[scenes.Scene]
    latents: list[torch.Tensor]


class Pool:
    """The scenes by size, stored in chunks on disk. The pool can grow while it is in use."""

    def __init__(self, plan: Plan, vae: Any, device: str) -> None:
        self.plan, self.vae, self.device = plan, vae, device
        self.things = all_objects(plan.scale)
        self.icons = {thing.name: thing.icon for thing in self.things}
        self.shelves = {size: Shelf([], []) for size in size_shares(mostly_small=True)}
        self.num_chunks = 0
        while (FOLDER / f"{self.num_chunks:05d}.pt").is_file():
            self._take(checkpoint.load(FOLDER / f"{self.num_chunks:05d}.pt"))

    @property
    def is_full(self) -> bool:
        """Whether the pool has as many scenes as the plan says."""
        return self.num_chunks * self.plan.chunk >= self.plan.pool_size

    @property
    def is_early(self) -> bool:
        """Whether the next chunk is one for the early iterations."""
        return self.num_chunks * self.plan.chunk < EARLY * self.plan.pool_size

    @property
    def missing(self) -> list[Size]:
        """The sizes without scenes."""
        return [size for size, shelf in self.shelves.items() if not shelf.scenes]

    def grow(self) -> None:
        """Render, encode and store one more chunk of one size. The scenes of chunk n are the same on every machine."""
        rng = numpy.random.default_rng([SEED, 1, self.num_chunks])
        width, height = self._next_size(rng)
        found = [scenes.sample(self.things, rng) for _ in range(self.plan.chunk)]
        latents = []
        for start in range(0, self.plan.chunk, 8):
            pictures = [render.render(scene, self.icons, width, height) for scene in found[start : start + 8]]
            latents.append(self._encode(autoencoder.to_tensor(pictures)))
        content = {
            "size": [width, height],
            "scenes": json.dumps([scene.to_json() for scene in found]),
            "latents": torch.cat(latents),
        }
        checkpoint.save(FOLDER / f"{self.num_chunks:05d}.pt", content)
        self._take(content)

    def _next_size(self, rng: numpy.random.Generator) -> Size:
        """Return the size of the next chunk. Sizes without scenes come first, so that training has every size."""
        if self.missing:
            return self.missing[0]
        return pick_size(rng, self.is_early)

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(self.device, memory_format=torch.channels_last)
        with precision.mixed(self.device):
            latents: torch.Tensor = self.vae.encode(pixels, return_dict=False)[0]
        return latents.bfloat16().cpu().contiguous()

    def _take(self, content: Any) -> None:
        width, height = content["size"]
        shelf = self.shelves[width, height]
        shelf.scenes += [scenes.Scene.from_json(fields) for fields in json.loads(content["scenes"])]
        shelf.latents += list(content["latents"])
        self.num_chunks += 1

    def pick_boxes(self, size: Size, rng: numpy.random.Generator) -> tuple[scenes.Box, ...]:
        """Return the boxes of a random scene of a size."""
        scenes_of_size = self.shelves[size].scenes
        place = _pick_place(range(len(scenes_of_size)), scenes_of_size, CROPPED_PAIR_SHARE, rng)
        return tuple(scenes_of_size[place].boxes(*size))

    def pick(
        self, size: Size, boxes: tuple[scenes.Box, ...] | None, number: int, rng: numpy.random.Generator
    ) -> tuple[list[scenes.Scene], torch.Tensor]:
        """Return random scenes of a size whose objects are in these boxes, if given, and their latents in float32."""
        shelf = self.shelves[size]
        alike = [n for n, scene in enumerate(shelf.scenes) if boxes in (None, tuple(scene.boxes(*size)))]
        chosen = [_pick_place(alike, shelf.scenes, PAIR_SHARE, rng) for _ in range(number)]
        return [shelf.scenes[n] for n in chosen], torch.stack([shelf.latents[n] for n in chosen]).float()

    def statistics(self) -> tuple[float, float]:
        """Return the scaling and the shift that give latents deviation 1 and mean 0; measure them on the first call."""
        if not STATISTICS.is_file():
            found = published.statistics(self.plan) or self._measured()
            checkpoint.write(STATISTICS, lambda aside: aside.write_text(json.dumps(found) + "\n", encoding="utf-8"))
        return statistics()

    def _measured(self) -> dict[str, float]:
        numbers = torch.cat([latents.float().flatten() for latents in self.shelves[512, 512].latents])
        return {
            "scaling_factor": round(1 / float(numbers.std()), 4),
            "shift_factor": round(float(numbers.mean()), 4),
        }


def _pick_place(places: Sequence[int], found: list[scenes.Scene], share: float, rng: numpy.random.Generator) -> int:
    """Return a random one of these places. With probability `share`, its scene has two objects, if one there has."""
    wanted = 2 if rng.random() < share else 1
    fitting = [place for place in places if len(found[place].objects) == wanted] or places
    return fitting[int(rng.integers(len(fitting)))]


def statistics() -> tuple[float, float]:
    """Return the scaling and the shift that were measured before. Raises FileNotFoundError if they were not."""
    kept = json.loads(STATISTICS.read_text(encoding="utf-8"))
    return kept["scaling_factor"], kept["shift_factor"]
