"""What is in a picture: one or two objects, where, how big, and on which background."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy

from models.demo.recipe.objects import BACKGROUNDS, SIMPLE, Colour, Object
from models.demo.recipe.plan import TOKEN_PIXELS

PLACES = {"centre": (0.5, 0.5), "left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73)}
#: Side of an object in pixels, whatever the picture's size, in whole tokens: a drawing is learnt once for all presets.
SIDES = {"": 8 * TOKEN_PIXELS, "small": 4 * TOKEN_PIXELS, "big": 12 * TOKEN_PIXELS}
#: Away from the middle, and two together, objects are smaller, so that they stay inside.
PLACED_SIDE = 6 * TOKEN_PIXELS
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

    def boxes(self, width: int, height: int) -> list[tuple[int, int, int]]:
        """Left, top and side of each object in a picture of this size, all on the tokens' grid."""
        places = ("left", "right") if len(self.objects) == 2 else (self.place,)
        side = SIDES[self.size] if places == ("centre",) else PLACED_SIDE
        middles = [(_on_grid(PLACES[place][0] * width), _on_grid(PLACES[place][1] * height)) for place in places]
        return [(x - side // 2, y - side // 2, side) for x, y in middles]

    def to_json(self) -> dict[str, Any]:
        """As plain lists and strings."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Scene":
        """The scene that `to_json` wrote."""
        (a, b, c), (d, e, f) = fields["colours"]
        return cls(**{**fields, "objects": tuple(fields["objects"]), "colours": ((a, b, c), (d, e, f))})


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


def _on_grid(place: float) -> int:
    return round(place / TOKEN_PIXELS) * TOKEN_PIXELS


def sample(things: tuple[Object, ...], rng: numpy.random.Generator) -> Scene:
    """A scene at random: a third hold two objects, a quarter of the rest are off the middle."""
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
