"""The scenes of training images: one or two objects, their places and sizes, and the background."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy

from models.demo.recipe.objects import BACKGROUNDS, SIMPLE, Colour, Object
from models.demo.recipe.plan import TOKEN_PIXELS

#: The middle of an object, as shares of the image's width and height.
PLACES = {"centre": (0.5, 0.5), "left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73)}
#: The side of an object in pixels, in whole tokens. It does not depend on the image's size, so that the model learns a
#: drawing once for all presets.
SIDES = {"": 8 * TOKEN_PIXELS, "small": 4 * TOKEN_PIXELS, "big": 12 * TOKEN_PIXELS}
#: The side of objects away from the middle and of two objects, smaller so that they stay inside the image.
PLACED_SIDE = 6 * TOKEN_PIXELS
#: The directions of gradients.
ANGLES = ("down", "right", "diagonal")
#: The share of scenes that only show what a prompt without a known object may show.
SIMPLE_SHARE = 0.08


@dataclass(frozen=True)
class Scene:
    """A scene. Objects are named from left to right; `place` and `size` are those of a single object.

    `colours` are the background's colours at the start and at the end of its gradient.
    """

    objects: tuple[str, ...]
    background: str
    is_gradient: bool
    place: str
    size: str
    colours: tuple[Colour, Colour]
    angle: str

    @property
    def is_simple(self) -> bool:
        """Whether the model may draw this scene for a prompt that names no known object."""
        return self.is_centred and self.objects[0] in SIMPLE

    @property
    def is_centred(self) -> bool:
        """Whether the scene shows one object of the usual size in the middle."""
        return self.place == "centre" and not self.size

    def boxes(self, width: int, height: int) -> list[tuple[int, int, int]]:
        """Return left, top and side in pixels of each object, aligned to tokens, in an image of this size."""
        places = ("left", "right") if len(self.objects) == 2 else (self.place,)
        side = SIDES[self.size] if places == ("centre",) else PLACED_SIDE
        middles = [(_on_grid(PLACES[place][0] * width), _on_grid(PLACES[place][1] * height)) for place in places]
        return [(x - side // 2, y - side // 2, side) for x, y in middles]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Scene":
        """Return the scene whose fields `to_json` returned."""
        (a, b, c), (d, e, f) = fields["colours"]
        return cls(**{**fields, "objects": tuple(fields["objects"]), "colours": ((a, b, c), (d, e, f))})


def _shade(background: str, rng: numpy.random.Generator) -> Colour:
    """Return a random shade of a background colour, close to the middle shade."""
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


def _on_grid(place: float) -> int:
    return round(place / TOKEN_PIXELS) * TOKEN_PIXELS


def sample(things: tuple[Object, ...], rng: numpy.random.Generator) -> Scene:
    """Return a random scene: about a third have two objects; a quarter of the others have theirs off the middle."""
    background = str(rng.choice(list(BACKGROUNDS)))
    is_gradient = bool(rng.random() < 0.25)
    colours = _colours(background, is_gradient, rng)
    angle = str(rng.choice(ANGLES))
    if rng.random() < SIMPLE_SHARE:
        return Scene((str(rng.choice(SIMPLE)),), background, is_gradient, "centre", "", colours, angle)
    if rng.random() < 0.34:
        first, second = rng.choice(len(things), 2, replace=False)
        pair = (things[first].name, things[second].name)
        return Scene(pair, background, is_gradient, "", "", colours, angle)
    place, size = "centre", ""
    chance = rng.random()
    if chance < 0.25:
        place = str(rng.choice(list(PLACES)[1:]))
    elif chance < 0.5:
        size = str(rng.choice(["small", "big"]))
    name = things[int(rng.integers(len(things)))].name
    return Scene((name,), background, is_gradient, place, size, colours, angle)
