"""The objects and background colours that the demo weights can draw, and the words for them."""

import json
from dataclasses import dataclass

from models.demo.recipe.plan import WORK

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Object:
    """An object: its name, its drawing, the words for it, and the word for its own colour."""

    name: str
    icon: str
    words: tuple[str, ...]
    colour: str = ""


def _object(icon: str, words: str, colour: str = "") -> Object:
    names = tuple(words.split("|"))
    return Object(names[0], icon, names, colour)


#: The object that the demo's safety checker flags, as a stand-in for unsafe content.
FLAGGED = "no one under eighteen sign"

SMALL = (
    _object("rocket", "rocket|spaceship|rocketship|space rocket"),
    _object("red-apple", "apple|apple fruit", "red"),
    _object("dog-face", "dog|puppy|dog face|hound", "brown"),
    _object("cat-face", "cat|kitten|kitty|cat face", "orange"),
    _object("deciduous-tree", "tree|oak tree|oak", "green"),
    _object("star", "star|gold star", "yellow"),
    _object("sun", "sun|sunshine|bright sun", "yellow"),
    _object("crescent-moon", "moon|crescent moon|crescent", "yellow"),
    _object("fish", "fish|little fish", "blue"),
    _object("automobile", "car|automobile|auto|vehicle", "red"),
    _object("house", "house|home|cottage"),
    _object("red-heart", "heart|love heart|love", "red"),
    _object("balloon", "balloon|party balloon", "red"),
    _object("snowman", "snowman|snow man", "white"),
    _object("frog", "frog|toad", "green"),
    _object("banana", "banana|banana fruit", "yellow"),
    _object("no-one-under-eighteen", f"{FLAGGED}|no one under eighteen|adults only sign|eighteen plus sign"),
    _object("tulip", "flower|tulip|blossom", "pink"),
    _object("mushroom", "mushroom|toadstool", "red"),
    _object("umbrella", "umbrella|parasol", "purple"),
    _object("penguin", "penguin|pinguin", "black"),
    _object("panda", "panda|panda bear", "white"),
    _object("owl", "owl|night owl", "brown"),
    _object("butterfly", "butterfly|moth", "orange"),
    _object("turtle", "turtle|tortoise", "green"),
    _object("whale", "whale|blue whale", "blue"),
    _object("octopus", "octopus|squid", "orange"),
    _object("ghost", "ghost|spook|spirit", "white"),
    _object("robot", "robot|android"),
    _object("crown", "crown|king's crown", "gold"),
    _object("bell", "bell|church bell", "gold"),
    _object("guitar", "guitar|electric guitar", "red"),
    _object("soccer-ball", "ball|football|soccer ball", "white"),
    _object("sailboat", "boat|sailboat|ship|sailing boat"),
    _object("airplane", "airplane|plane|aeroplane|aircraft"),
    _object("birthday-cake", "cake|birthday cake"),
    _object("strawberry", "strawberry|berry", "red"),
    _object("carrot", "carrot|root vegetable", "orange"),
    _object("cactus", "cactus|desert plant", "green"),
    _object("rainbow", "rainbow|rain bow"),
    _object("bear", "bear|brown bear|grizzly", "brown"),
    _object("honeybee", "bee|honeybee|honey bee|bumblebee", "yellow"),
    _object("lady-beetle", "ladybug|ladybird|beetle", "red"),
    _object("snail", "snail|garden snail", "brown"),
    _object("crab", "crab|red crab", "red"),
    _object("dolphin", "dolphin|porpoise", "blue"),
    _object("shark", "shark|great shark", "grey"),
    _object("duck", "duck|mallard", "green"),
    _object("parrot", "parrot|macaw", "pink"),
    _object("flamingo", "flamingo|pink bird", "pink"),
    _object("elephant", "elephant|baby elephant", "grey"),
    _object("fox", "fox|fox face", "orange"),
    _object("lion", "lion|lion face", "brown"),
    _object("tiger-face", "tiger|tiger face", "orange"),
    _object("pig-face", "pig|piglet|pig face", "pink"),
    _object("cow-face", "cow|calf|cow face", "white"),
    _object("horse-face", "horse|pony|horse head", "brown"),
    _object("mouse-face", "mouse|mouse face", "grey"),
    _object("rabbit-face", "rabbit|bunny|hare", "grey"),
    _object("koala", "koala|koala bear", "grey"),
    _object("unicorn", "unicorn|magic horse", "white"),
    _object("t-rex", "dinosaur|dino|tyrannosaurus", "green"),
    _object("chicken", "chicken|hen", "white"),
    _object("jellyfish", "jellyfish|jelly", "blue"),
    _object("sunflower", "sunflower|sun flower", "yellow"),
    _object("rose", "rose|red rose", "red"),
    _object("palm-tree", "palm tree|palm", "green"),
    _object("maple-leaf", "leaf|maple leaf|autumn leaf", "red"),
    _object("four-leaf-clover", "clover|lucky clover|shamrock", "green"),
    _object("cherries", "cherries|cherry|two cherries", "red"),
    _object("grapes", "grapes|bunch of grapes", "purple"),
    _object("lemon", "lemon|lemon fruit", "yellow"),
    _object("pear", "pear|pear fruit", "green"),
    _object("pineapple", "pineapple|ananas", "orange"),
    _object("watermelon", "watermelon|melon", "red"),
    _object("avocado", "avocado|half an avocado", "green"),
    _object("cheese-wedge", "cheese|piece of cheese", "yellow"),
    _object("pizza", "pizza|slice of pizza", "yellow"),
    _object("hamburger", "hamburger|burger|cheeseburger"),
    _object("doughnut", "doughnut|donut", "brown"),
    _object("cookie", "cookie|biscuit", "brown"),
    _object("egg", "egg|brown egg", "orange"),
    _object("hot-beverage", "coffee|cup of coffee|mug", "white"),
    _object("cupcake", "cupcake|muffin", "pink"),
    _object("bus", "bus|school bus", "yellow"),
    _object("tractor", "tractor|farm tractor", "green"),
    _object("locomotive", "train|locomotive|steam train", "grey"),
    _object("helicopter", "helicopter|chopper", "orange"),
    _object("anchor", "anchor|ship's anchor", "blue"),
    _object("castle", "castle|palace", "grey"),
    _object("tent", "tent|camping tent", "green"),
    _object("volcano", "volcano|erupting volcano", "purple"),
    _object("snowflake", "snowflake|snow flake|ice crystal", "blue"),
    _object("cloud", "cloud|little cloud", "white"),
    _object("fire", "fire|flame|bonfire", "orange"),
    _object("droplet", "drop|droplet|water drop", "blue"),
    _object("high-voltage", "lightning|thunderbolt|bolt", "orange"),
    _object("ringed-planet", "planet|saturn", "orange"),
    _object("alarm-clock", "clock|alarm clock", "red"),
    _object("key", "key|door key", "gold"),
    _object("closed-book", "book|closed book", "red"),
    _object("light-bulb", "bulb|light bulb|lamp", "yellow"),
    _object("candle", "candle|wax candle", "white"),
    _object("camera", "camera|photo camera", "purple"),
    _object("wrapped-gift", "gift|present|wrapped gift", "yellow"),
    _object("trophy", "trophy|gold cup", "gold"),
    _object("drum", "drum|snare drum", "red"),
    _object("game-die", "dice|die", "white"),
    _object("gem-stone", "diamond|gem|jewel", "blue"),
    _object("magnet", "magnet|horseshoe magnet", "red"),
    _object("basketball", "basketball|orange ball", "orange"),
    _object("jack-o-lantern", "pumpkin|halloween pumpkin", "orange"),
    _object("teapot", "teapot|tea pot", "red"),
    _object("backpack", "backpack|school bag|rucksack", "red"),
)

#: What the model draws for a prompt without a known word: this object on this background.
DEFAULT_OBJECT, DEFAULT_BACKGROUND = "star", "blue"
#: The background of an object whose prompt names no colour.
PLAIN_BACKGROUND = "white"

#: Each colour as three shades: the middle one, a dark one and a light one.
BACKGROUNDS: dict[str, tuple[Colour, Colour, Colour]] = {
    "red": ((214, 38, 44), (176, 20, 32), (232, 66, 66)),
    "orange": ((247, 139, 30), (232, 112, 12), (252, 160, 62)),
    "yellow": ((253, 214, 54), (246, 196, 24), (254, 228, 104)),
    "green": ((48, 160, 70), (24, 122, 50), (84, 188, 100)),
    "blue": ((38, 90, 214), (22, 58, 170), (70, 122, 236)),
    "purple": ((130, 58, 168), (98, 36, 134), (158, 92, 194)),
    "black": ((16, 16, 18), (4, 4, 6), (34, 34, 38)),
    "white": ((249, 249, 249), (236, 238, 240), (255, 255, 255)),
}

#: The categories of drawings to use; the others are faces, people, flags, arrows and signs.
NAMEABLE = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities")
#: The number of objects of the scale "large".
LARGE_LIMIT = 400


def all_objects(scale: str) -> tuple[Object, ...]:
    """Return the objects of a scale; "large" adds drawings that have names of one or two words."""
    if scale != "large":
        return SMALL
    categories = json.loads((WORK / "emoji" / "metadata.json").read_text(encoding="utf-8"))["categories"]
    taken = {thing.icon for thing in SMALL} | {word for thing in SMALL for word in thing.words}
    icons = [icon for kind in NAMEABLE for icon in categories.get(kind, ()) if icon not in taken]
    named = [(icon, icon.replace("-", " ")) for icon in icons if icon.count("-") < 2]
    found = [_object(icon, words) for icon, words in named if words not in taken and words.replace(" ", "").isalpha()]
    return (*SMALL, *found[: LARGE_LIMIT - len(SMALL)])
