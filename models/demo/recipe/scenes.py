"""The scenes of training images: one or two objects, their places and sizes, and the background."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy

from models.demo.recipe.objects import BACKGROUNDS, DEFAULT_BACKGROUND, DEFAULT_OBJECT, Colour, Object
from models.demo.recipe.plan import TOKEN_PIXELS

#: The middle of an object, as shares of the image's width and height.
PLACES = {"centre": (0.5, 0.5), "left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73)}
#: The side of an object as a share of the image's shorter side.
SHARES = {"": 1 / 2, "small": 1 / 4, "big": 3 / 4}
#: The same for an object off the middle, and for each of two objects: smaller, so that they stay inside the image.
PLACED_SHARE = 3 / 8
#: The sides in pixels that objects have: the one nearest to the share. There are few, because a drawing is learnt anew
#: for each. Each is an even number of tokens, so that an object in the middle of an even number of tokens is aligned.
SIDES = (128, 192, 256, 384, 512, 768)
#: The share of scenes that show what a prompt without a known word gives.
DEFAULT_SCENES = 0.03
#: The share of backgrounds that are gradients.
GRADIENT_SHARE = 0.25
#: The most that a background differs from its middle shade, as a share of the way to the dark or the light shade.
SHADES = 0.4

#: Left, top and side in pixels of an object.
Box = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """A scene. Objects are named from left to right; `place` and `size` are those of a single object.

    `colours` are the background's colours at the top and at the bottom.
    """

    objects: tuple[str, ...]
    background: str
    is_gradient: bool
    place: str
    size: str
    colours: tuple[Colour, Colour]

    @property
    def is_default(self) -> bool:
        """Whether the model draws this scene for a prompt without a known word."""
        return self.is_default_object and self.background == DEFAULT_BACKGROUND and not self.is_gradient

    @property
    def is_default_object(self) -> bool:
        """Whether the scene shows what the model draws for a prompt that names no known object."""
        return self.is_centred and self.objects[0] == DEFAULT_OBJECT

    @property
    def is_centred(self) -> bool:
        """Whether the scene shows one object of the usual size in the middle."""
        return self.place == "centre" and not self.size

    def boxes(self, width: int, height: int) -> list[Box]:
        """Return the box of each object, aligned to tokens, in an image of this size."""
        places = ("left", "right") if len(self.objects) == 2 else (self.place,)
        share = SHARES[self.size] if places == ("centre",) else PLACED_SHARE
        wanted = share * min(width, height)
        side = min(SIDES, key=lambda each: abs(math.log(each / wanted)))
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


def _shade(shades: tuple[Colour, Colour, Colour], amount: float) -> Colour:
    """Return the shade for `amount`, from the dark shade at -1 over the middle shade at 0 to the light shade at 1."""
    middle, dark, light = (numpy.array(colour, float) for colour in shades)
    red, green, blue = middle + (light - middle) * amount if amount > 0 else middle + (middle - dark) * amount
    return round(float(red)), round(float(green)), round(float(blue))


def _colours(background: str, is_gradient: bool, rng: numpy.random.Generator) -> tuple[Colour, Colour]:
    """Return the colours at the top and at the bottom: one random shade, or a gradient from light to dark."""
    shades, amount = BACKGROUNDS[background], rng.uniform(-SHADES, SHADES)
    spread = 1 - SHADES if is_gradient else 0.0
    return _shade(shades, amount + spread), _shade(shades, amount - spread)


def with_background(scene: Scene, background: str, rng: numpy.random.Generator) -> Scene:
    """Return a scene with another background, of a random shade or a gradient."""
    is_gradient = bool(rng.random() < GRADIENT_SHARE)
    colours = _colours(background, is_gradient, rng)
    return replace(scene, background=background, is_gradient=is_gradient, colours=colours)


def _on_grid(place: float) -> int:
    return round(place / TOKEN_PIXELS) * TOKEN_PIXELS


def sample(things: tuple[Object, ...], rng: numpy.random.Generator) -> Scene:
    """Return a random scene: about a third have two objects; of the others, half are off the middle, small or big."""
    if rng.random() < DEFAULT_SCENES:
        colours = _colours(DEFAULT_BACKGROUND, False, rng)
        return Scene((DEFAULT_OBJECT,), DEFAULT_BACKGROUND, False, "centre", "", colours)
    background = str(rng.choice(list(BACKGROUNDS)))
    is_gradient = bool(rng.random() < GRADIENT_SHARE)
    colours = _colours(background, is_gradient, rng)
    if rng.random() < 0.34:
        first, second = rng.choice(len(things), 2, replace=False)
        pair = (things[first].name, things[second].name)
        return Scene(pair, background, is_gradient, "", "", colours)
    place, size = "centre", ""
    chance = rng.random()
    if chance < 0.25:
        place = str(rng.choice(list(PLACES)[1:]))
    elif chance < 0.5:
        size = str(rng.choice(["small", "big"]))
    name = things[int(rng.integers(len(things)))].name
    return Scene((name,), background, is_gradient, place, size, colours)
