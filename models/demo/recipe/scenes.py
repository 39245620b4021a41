"""What is in a picture: one or two objects, where, how big, and on which background."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy

from models.demo.recipe.objects import BACKGROUNDS, SIMPLE, Colour, Object

PLACES = {"centre": (0.5, 0.5), "left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73)}
#: Side of an object as a share of the picture's short side, from and to.
SHARES = {"": (0.50, 0.58), "small": (0.25, 0.29), "big": (0.68, 0.76)}
#: Away from the middle, and two together, objects are smaller, so that they stay inside.
PLACED_SHARE, PAIR_SHARE = (0.40, 0.44), (0.38, 0.43)
ANGLES = ("down", "right", "diagonal")
#: Share of the scenes that is kept for prompts that name no object.
SIMPLE_SHARE = 0.08


@dataclass(frozen=True)
class Scene:
    """Objects by name from left to right; `place` and `size` are of a single object; colours are (red, green, blue)."""

    objects: tuple[str, ...]
    background: str
    is_gradient: bool
    place: str
    size: str
    #: Centre x, centre y and side of each object; x by the width, y by the height, side by the short side.
    boxes: tuple[tuple[float, float, float], ...]
    colours: tuple[Colour, Colour]
    angle: str

    @property
    def is_simple(self) -> bool:
        """Whether a prompt that says nothing of this scene may show it."""
        return self.is_centred and self.objects[0] in SIMPLE

    @property
    def is_centred(self) -> bool:
        """Whether it shows one thing of the usual size, in the middle."""
        return self.place == "centre" and not self.size

    def to_json(self) -> dict[str, Any]:
        """As plain lists and strings."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Scene":
        """The scene that `to_json` wrote."""
        boxes = tuple((x, y, side) for x, y, side in fields["boxes"])
        (a, b, c), (d, e, f) = fields["colours"]
        return cls(**{**fields, "objects": tuple(fields["objects"]), "boxes": boxes, "colours": ((a, b, c), (d, e, f))})


def _shade(background: str, rng: numpy.random.Generator) -> Colour:
    """A colour near the middle one: towards its dark or its light end, a little."""
    middle, dark, light = (numpy.array(colour, float) for colour in BACKGROUNDS[background])
    amount = rng.uniform(-0.3, 0.3)
    red, green, blue = middle + (light - middle) * amount if amount > 0 else middle + (middle - dark) * amount
    return round(float(red)), round(float(green)), round(float(blue))


def _colours(background: str, is_gradient: bool, rng: numpy.random.Generator) -> tuple[Colour, Colour]:
    if not is_gradient:
        shade = _shade(background, rng)
        return shade, shade
    _, dark, light = BACKGROUNDS[background]
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def _box(place: str, shares: tuple[float, float], rng: numpy.random.Generator) -> tuple[float, float, float]:
    x, y = PLACES[place]
    jitter_x, jitter_y = rng.uniform(-0.02, 0.02, 2)
    return x + float(jitter_x), y + float(jitter_y), float(rng.uniform(*shares))


def sample(things: tuple[Object, ...], rng: numpy.random.Generator) -> Scene:
    """A scene at random: a third hold two objects, a quarter of the rest are off the middle."""
    background = str(rng.choice(list(BACKGROUNDS)))
    is_gradient = bool(rng.random() < 0.25)
    colours = _colours(background, is_gradient, rng)
    angle = str(rng.choice(ANGLES))
    if rng.random() < SIMPLE_SHARE:
        box = _box("centre", SHARES[""], rng)
        return Scene((str(rng.choice(SIMPLE)),), background, is_gradient, "centre", "", (box,), colours, angle)
    if rng.random() < 0.34:
        first, second = rng.choice(len(things), 2, replace=False)
        pair = (things[first].name, things[second].name)
        boxes = tuple(_box(place, PAIR_SHARE, rng) for place in ("left", "right"))
        return Scene(pair, background, is_gradient, "", "", boxes, colours, angle)
    place, size = "centre", ""
    chance = rng.random()
    if chance < 0.25:
        place = str(rng.choice(list(PLACES)[1:]))
    elif chance < 0.5:
        size = str(rng.choice(["small", "big"]))
    shares = SHARES[size] if place == "centre" else PLACED_SHARE
    name = things[int(rng.integers(len(things)))].name
    return Scene((name,), background, is_gradient, place, size, (_box(place, shares, rng),), colours, angle)
