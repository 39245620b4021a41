"""Captions as people might write them for a scene: from templates, synonyms and unknown words, or empty."""

import string

import numpy

from models.demo.recipe.objects import BACKGROUNDS, PLAIN_BACKGROUND, Object
from models.demo.recipe.scenes import Scene

OPENINGS = (
    "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}", "an illustration of {}", "draw {}",
    "draw me {}", "paint {}", "paint me {}", "show me {}", "please draw {}", "make a picture of {}", "i want {}",
    "create an image of {}", "generate {}", "there is {}", "this is {}", "here is {}", "it shows {}", "can you draw {}",
    "a flat illustration of {}", "a cartoon of {}", "an icon of {}", "a sticker of {}", "a simple drawing of {}",
    "a minimal vector icon of {}", "an emoji of {}", "a close up of {}", "i see {}", "a poster with {}",
    "a little picture of {}", "a small drawing that shows {}", "a very nice picture with {}", "a big poster of {}",
    "you see {}", "please make me {}", "i want to see {}", "my picture of {}", "in this picture there is {}",
    "please put {} in a picture", "can you show me {} please", "the picture has {}", "it is {}", "have {}",
)  # fmt: skip
GROUNDS = (
    "{x} on a {c} background", "{x} on {c}", "{x}, {c} background", "{x} against a {c} background",
    "{x} against a {c} backdrop", "{x} in front of a {c} background", "{x} with a {c} background",
    "{x} on a plain {c} background", "{x} on the {c} background", "{c} background, {x}",
    "{x} in front of a {c} wall", "{x}. the background is {c}", "on a {c} background there is {x}",
    "{x} and the background is {c}", "{x} over a {c} background", "{x} {c} background", "a {c} background with {x}",
    "{x} before a {c} sky", "{x}, {c} backdrop", "{x} on a {c} backdrop", "{x} in a {c} room",
    "{x} with {c} behind it", "{x} and {c} behind", "behind {x} it is {c}", "behind {x} there is only {c}",
    "everything behind {x} is {c}", "{x} in front of {c}", "in front of {c} there is {x}", "{c} with {x} in front",
    "{c} around {x}", "around {x} everything is {c}", "{x} with {c} around it", "just {c} around {x}",
    "{x}, the background in {c}", "background {c}, {x}", "{x} on a background that is {c}", "{x}, background: {c}",
    "a {c} picture with {x}", "a {c} picture of {x}", "{x} on a {c} ground", "{x} and around that {c}",
    "{c}, and on it {x}", "{x} and everything about it is {c}", "put {x} on {c}", "{c} colour around {x}",
    "the colour {c} and {x}", "the backdrop is {c} and there is {x}", "{x}, very {c} background",
    "{x} and also {c}", "only {c} and {x}", "{x}, with the colour {c} for the background",
)  # fmt: skip
GRADIENTS = (
    "{x} on a {c} gradient", "{x} on a {c} gradient background", "{x}, {c} gradient background",
    "{x} against a {c} gradient", "{x} in front of a {c} gradient", "{x} with a {c} gradient background",
)  # fmt: skip
PLACED = {
    "centre": ("{} in the centre", "{} in the middle", "{} in the center", "{}, centered", "one {} in the middle"),
    "left": ("{} on the left", "{} on the left side", "{} at the left", "{} to the left", "{}, left"),
    "right": ("{} on the right", "{} on the right side", "{} at the right", "{} to the right", "{}, right"),
    "top": ("{} at the top", "{} on top", "{} above", "{} in the upper half", "{}, top"),
    "bottom": ("{} at the bottom", "{} below", "{} down low", "{} in the lower half", "{}, bottom"),
}
PAIRS = (
    "{a} on the left and {b} on the right", "{a} on the left, {b} on the right", "{b} on the right and {a} on the left",
    "{a} left and {b} right", "{a} to the left of {b}", "{b} to the right of {a}", "{a} left of {b}",
    "{b} right of {a}", "on the left {a}, on the right {b}", "left: {a}, right: {b}",
    "{a} at the left and {b} at the right",
    "{a} on the left side and {b} on the right side", "to the left is {a} and to the right is {b}",
    "{b} on the right, {a} on the left",
)  # fmt: skip
#: Templates that name no sides: the object named first is on the left.
BESIDE = ("{a} and {b}", "{a} and {b}", "{a} next to {b}", "{a} beside {b}", "{a} with {b}", "{a}, {b}", "{a} near {b}")
SIZES = {
    "small": ("small", "tiny", "little"),
    "big": ("big", "large", "huge", "giant"),
}
ADJECTIVES = (
    "cute", "happy", "beautiful", "lovely", "nice", "funny", "old", "new", "pretty", "single", "cartoon", "friendly",
    "shiny", "colourful", "detailed", "modern", "sad", "wooden", "magic", "sleepy", "fluffy", "golden", "smiling",
)  # fmt: skip
CONTEXTS = (
    "in the park", "at night", "in summer", "in the snow", "by the sea", "on a sunny day", "in the morning",
    "high quality", "4k", "flat design", "digital art", "in the style of an emoji", "for my birthday", "on grass",
    "flying in the sky", "with soft light", "highly detailed", "trending", "on the table", "in the city",
)  # fmt: skip
COLOUR_WORDS = (*BACKGROUNDS, "pink", "brown", "grey", "gold", "silver", "violet")
#: Templates without an object.
NAMELESS = (
    "a {c} background", "{c} background", "on a {c} background", "the background is {c}", "in front of {c}",
    "everything is {c}", "{c}", "on {c}", "a {c} picture", "something on a {c} background",
)  # fmt: skip
#: The share of captions with unknown words at the beginning or end.
FILLED = 0.12
#: Words that name no object and no background. The model learns to ignore them.
STRANGE = """
a quiet afternoon in the old town where nobody speaks of what happened last year because time moves slowly here
and people walk along narrow streets thinking about music work money weather food history science freedom art
love letters journeys mountains rivers forests kings queens wizards dragons zebras leopards camels tables
chairs windows doors bridges walls towers markets kitchens gardens tea bread wine bottle
computer telephone engine wheel bicycle station harbour soldier teacher doctor painter dancer child woman
man crowd portrait landscape abstract dream memory silence storm thunder mist evening dawn midnight winter
autumn once upon a very long story about everything and nothing hello world test lorem ipsum dolor sit amet
""".split()  # noqa: SIM905


def _pick(choices: tuple[str, ...] | list[str], rng: numpy.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _article(words: str, rng: numpy.random.Generator) -> str:
    chance = rng.random()
    if chance < 0.08:
        return f"the {words}"
    if chance < 0.2:
        return words
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _noun(thing: Object, size: str, rng: numpy.random.Generator) -> str:
    """Return a noun phrase for an object, with a word for `size` unless `size` is empty.

    Some phrases also have the object's own colour, another colour, or an adjective.
    """
    word = thing.name if rng.random() < 0.6 else _pick(thing.words, rng)
    chance = rng.random()
    if thing.colour and chance < 0.12:
        word = f"{thing.colour} {word}"
    elif chance < 0.15:
        word = f"{_pick(COLOUR_WORDS, rng)} {word}"
    elif chance < 0.3:
        word = f"{_pick(ADJECTIVES, rng)} {word}"
    if size:
        word = f"{_pick(SIZES[size], rng)} {word}"
    return _article(word, rng)


def _what(scene: Scene, things: dict[str, Object], rng: numpy.random.Generator) -> str:
    if len(scene.objects) == 2:
        a, b = (_noun(things[name], "", rng) for name in scene.objects)
        return _pick(PAIRS if rng.random() < 0.65 else BESIDE, rng).format(a=a, b=b)
    noun = _noun(things[scene.objects[0]], scene.size, rng)
    if scene.place != "centre" or rng.random() < 0.1:
        # Leave out the fifth template: that of "centre" has its own number word, which would give "one a dog".
        return _pick(PLACED[scene.place][:4], rng).format(noun)
    return noun


def strange(rng: numpy.random.Generator, words: int) -> str:
    """Return as many unknown words as `words` says, some of them random letters."""
    said = []
    for _ in range(words):
        if rng.random() < 0.85:
            said.append(_pick(STRANGE, rng))
        else:
            said.append("".join(_pick(list(string.ascii_lowercase), rng) for _ in range(int(rng.integers(1, 9)))))
    return " ".join(said)


def _nothing_known(scene: Scene, rng: numpy.random.Generator) -> str:
    """Return a caption that names no object, and no background if the scene has the default one."""
    if scene.is_default and rng.random() < 0.25:
        return ""
    said = strange(rng, int(rng.integers(1, 40 if rng.random() < 0.2 else 13)))
    if scene.is_default and rng.random() < 0.7:
        return said
    return _pick(GRADIENTS if scene.is_gradient else GROUNDS, rng).format(x=said, c=scene.background)


def caption(scene: Scene, things: dict[str, Object], rng: numpy.random.Generator) -> str:
    """Return a random caption for `scene`. It may leave out a plain background or a default object, or be empty for a
    default scene.
    """
    if scene.is_default_object and rng.random() < (0.6 if scene.is_default else 0.2):
        return _nothing_known(scene, rng)
    what = _what(scene, things, rng)
    if scene.background == PLAIN_BACKGROUND and not scene.is_gradient and rng.random() < 0.5:
        said = what
    else:
        said = _pick(GRADIENTS if scene.is_gradient else GROUNDS, rng).format(x=what, c=scene.background)
    if rng.random() < 0.1:
        said = f"{said} {_pick(CONTEXTS, rng)}"
    if rng.random() < 0.35:
        said = _pick(OPENINGS, rng).format(said)
    if rng.random() < FILLED:
        words = said.split()
        place = int(rng.choice([0, len(words)]))
        said = " ".join([*words[:place], strange(rng, int(rng.integers(1, 6))), *words[place:]])
    if rng.random() < 0.2:
        said = said.capitalize() + _pick([".", "!", ""], rng)
    return said


def with_article(name: str) -> str:
    """Return a name with its indefinite article."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def nameless(scene: Scene, rng: numpy.random.Generator) -> str:
    """Return a caption that names the background only."""
    colour = f"{scene.background} gradient" if scene.is_gradient else scene.background
    return _pick(NAMELESS, rng).format(c=colour)


def plain(scene: Scene, things: dict[str, Object], rng: numpy.random.Generator) -> str:
    """Return a caption that names the objects and the background, without unknown words around it."""
    return _pick(GROUNDS, rng).format(x=_what(scene, things, rng), c=scene.background)
