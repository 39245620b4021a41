"""The rendering of scenes: drawings are rendered once, then scaled and pasted onto a background."""

import functools
import importlib
import io
import json
import subprocess

import numpy
from PIL import Image

from models.demo.recipe.plan import WORK
from models.demo.recipe.scenes import Scene

#: The npm package of the drawings.
PACKAGE = "@iconify-json/fluent-emoji-flat@1.2.6"
#: The side in pixels at which a drawing is rendered.
SPRITE_PIXELS = 768


def fetch() -> None:
    """Download the drawings (Fluent Emoji Flat, MIT) with npm, unless they are there already."""
    folder = WORK / "emoji"
    if (folder / "icons.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(  # noqa: S603
        ["npm", "pack", "--silent", PACKAGE],  # noqa: S607
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    archive = packed.stdout.strip().splitlines()[-1]
    subprocess.run(["tar", "xzf", archive, "--strip-components=1"], cwd=folder, check=True)  # noqa: S603, S607


@functools.cache
def _drawings() -> dict[str, str]:
    icons = json.loads((WORK / "emoji" / "icons.json").read_text(encoding="utf-8"))["icons"]
    return {name: icon["body"] for name, icon in icons.items()}


@functools.lru_cache(maxsize=2048)
def sprite(icon: str, level: int = 0) -> Image.Image:
    """Return a drawing without its margins, in a square, with premultiplied alpha. Each level halves the side."""
    if level:
        return sprite(icon, level - 1).reduce(2)
    body = _drawings()[icon]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
    resvg = importlib.import_module("resvg_py")
    png = resvg.svg_to_bytes(svg_string=svg, width=SPRITE_PIXELS, height=SPRITE_PIXELS)
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    cut = drawn.crop(drawn.getbbox())
    side = max(cut.size)
    square = Image.new("RGBA", (side, side))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square.convert("RGBa")


def _scaled(icon: str, side: int) -> Image.Image:
    level = 0
    while level < 3 and sprite(icon, level + 1).width >= side:
        level += 1
    return sprite(icon, level).resize((side, side), Image.Resampling.BICUBIC).convert("RGBA")


def _background(scene: Scene, width: int, height: int) -> Image.Image:
    start, end = scene.colours
    if start == end:
        return Image.new("RGB", (width, height), start)
    ramp = numpy.linspace(0, 1, height, dtype=numpy.float32)[:, None, None]
    colours = numpy.array(start, numpy.float32) * (1 - ramp) + numpy.array(end, numpy.float32) * ramp
    colours = numpy.broadcast_to(colours, (height, width, 3))
    return Image.fromarray(colours.round().astype(numpy.uint8))


def render(scene: Scene, icons: dict[str, str], width: int, height: int, *, smaller: int = 1) -> Image.Image:
    """Render a scene in RGB, with both sides divided by `smaller`. `icons` maps object names to drawings."""
    picture = _background(scene, width // smaller, height // smaller)
    for name, (left, top, side) in zip(scene.objects, scene.boxes(width, height), strict=True):
        drawn = _scaled(icons[name], side // smaller)
        picture.paste(drawn, (left // smaller, top // smaller), drawn)
    return picture


def silhouettes(scene: Scene, icons: dict[str, str], width: int, height: int) -> Image.Image:
    """Render the shapes of a scene's objects, white on black in RGB."""
    picture = Image.new("RGB", (width, height))
    for name, (left, top, side) in zip(scene.objects, scene.boxes(width, height), strict=True):
        picture.paste((255, 255, 255), (left, top, left + side, top + side), _scaled(icons[name], side))
    return picture
