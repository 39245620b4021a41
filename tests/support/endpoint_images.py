"""A generator of docs/endpoints.jpg, an image from every endpoint on the demo weights.

python -m tests.support.endpoint_images [--output FILE]
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageDraw, ImageFont

from models.demo.recipe.export import LORA
from models.loading.specs import DEMO
from tests.support.fal_endpoints import FACTS
from tests.support.image_files import data_uri, decode, encode
from tests.support.server_process import ROOT, serving

OUTPUT = ROOT / "docs" / "endpoints.jpg"
#: The demo draws best at this size; the page shows the images at half of it.
SIDE, TILE = 512, 256
CAPTION, GAP, COLUMNS, THUMBNAIL = 92, 12, 4, 64
FONT = ImageFont.load_default(13)
GREY = "#666666"

#: The prompts of the input images, by name; fal-ai/flux/dev generates them.
INPUTS = {
    "pair": "a dog on the left and a cat on the right on a blue background",
    "apple": "an apple on a green background",
    "star": "a star on a purple background",
}


@dataclass(frozen=True)
class Example:
    """A request that shows what an endpoint does. `image` names its input image; a `lora_scale` of 0 means no LoRA."""

    prompt: str
    image: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    # At a scale of 1, some objects turn into shapes without detail.
    lora_scale: float = 0.6


#: The share of the noise that changes the object and keeps the background.
CHANGE = {"strength": 0.8}
#: Only four steps, as FLUX.1 [schnell] takes.
FEW_STEPS = {"num_inference_steps": 4}
#: Real guidance, away from what a negative prompt says.
NEGATIVE = {"use_real_cfg": True, "real_cfg_scale": 2, "negative_prompt": "a red background"}
PAIR_WITH_FROG = "a dog on the left and a frog on the right on a blue background"
#: A prompt that names no object: the edges say what to draw.
NAMELESS = "a yellow background"
#: In the order of the sheet.
EXAMPLES = {
    "fal-ai/flux/dev": Example("a rocket on a blue background"),
    "fal-ai/flux/dev/image-to-image": Example("a ball", "apple", CHANGE),
    "fal-ai/flux/krea": Example("a snowman on a purple background"),
    "fal-ai/flux/krea/image-to-image": Example("a balloon", "star", CHANGE),
    "fal-ai/flux/srpo": Example("a frog on a yellow background"),
    "fal-ai/flux/srpo/image-to-image": Example("a flower on a green background", "apple", {"strength": 0.9}),
    "fal-ai/flux/schnell": Example("a star on a black background", fields=FEW_STEPS),
    "fal-ai/flux-1/schnell": Example("a heart on a white background", fields=FEW_STEPS),
    "fal-ai/flux-1/dev": Example("a house on a green background"),
    "fal-ai/flux-1/dev/image-to-image": Example("a sun", "star", CHANGE),
    "fal-ai/flux-1/krea": Example("an umbrella on an orange background"),
    "fal-ai/flux-1/krea/image-to-image": Example("a mushroom", "apple", CHANGE),
    "fal-ai/flux-1/srpo": Example("a fish on a white background"),
    "fal-ai/flux-1/srpo/image-to-image": Example("a moon", "star", CHANGE),
    "fal-ai/flux-lora": Example("a dog on a yellow background"),
    "fal-ai/flux-lora/stream": Example("a penguin on a red background"),
    "fal-ai/flux-lora/image-to-image": Example(INPUTS["pair"], "pair", {"strength": 0.7}, 1),
    "fal-ai/flux-lora/inpainting": Example("a cat on the right on a blue background", "pair", {"strength": 0.8}, 1),
    "fal-ai/flux-krea-lora": Example("an owl on an orange background"),
    "fal-ai/flux-krea-lora/stream": Example("a dog on a blue background"),
    "fal-ai/flux-krea-lora/image-to-image": Example("a star on a purple background", "star", {"strength": 0.7}, 0.8),
    "fal-ai/flux-krea-lora/inpainting": Example(PAIR_WITH_FROG, "pair", {"strength": 0.95}, 0),
    "fal-ai/flux/dev/redux": Example("", "apple"),
    "fal-ai/flux/krea/redux": Example("", "star"),
    "fal-ai/flux/schnell/redux": Example("", "pair", FEW_STEPS),
    "fal-ai/flux-1/dev/redux": Example("", "pair"),
    "fal-ai/flux-1/krea/redux": Example("", "apple"),
    "fal-ai/flux-1/schnell/redux": Example("", "star", FEW_STEPS),
    "fal-ai/flux-kontext/dev": Example("an apple", "apple", {"resolution_mode": "auto"}),
    "fal-ai/flux-kontext-lora": Example("a star", "star", {"resolution_mode": "auto"}, 1),
    "fal-ai/flux-kontext-lora/text-to-image": Example("a robot on a green background", lora_scale=0),
    "fal-ai/flux-kontext-lora/inpaint": Example("make the cat a frog", "pair", {"strength": 1}, 0),
    "fal-ai/flux-lora-fill": Example("a frog", "pair", lora_scale=0),
    "fal-ai/flux-lora-canny": Example(NAMELESS, "apple", lora_scale=0),
    "fal-ai/flux-lora-depth": Example("a ball on a red background", "apple", lora_scale=0),
    "fal-ai/flux-control-lora-canny": Example(NAMELESS, "star", lora_scale=0),
    "fal-ai/flux-control-lora-canny/image-to-image": Example("a dog and a cat", "pair", {"strength": 0.9}, 0),
    "fal-ai/flux-control-lora-depth": Example("a moon on a blue background", "star", lora_scale=0),
    "fal-ai/flux-control-lora-depth/image-to-image": Example("a heart", "apple", {"strength": 0.85}, 0),
    "fal-ai/flux-general": Example("a cactus on a white background", fields=NEGATIVE),
    "fal-ai/flux-general/image-to-image": Example("a banana", "star", CHANGE),
    "fal-ai/flux-general/inpainting": Example(PAIR_WITH_FROG, "pair", {"strength": 0.95}, 0),
}


def main() -> None:
    """Generate the images and write the contact sheet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output: Path = parser.parse_args().output
    with (
        tempfile.TemporaryDirectory() as directory,
        serving(Path(directory)) as server,
        httpx.Client(base_url=server.ready().url, timeout=300, trust_env=False) as client,
    ):
        inputs = {name: _generate(client, "fal-ai/flux/dev", Example(prompt), {}) for name, prompt in INPUTS.items()}
        inputs["mask"] = Image.new("RGB", (SIDE, SIDE), "black")
        inputs["mask"].paste("white", (SIDE // 2, 0, SIDE, SIDE))
        tiles = [_tile(client, endpoint, inputs) for endpoint in EXAMPLES]
    _sheet(tiles).save(output, quality=85, optimize=True)
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB")


def _generate(client: httpx.Client, endpoint: str, example: Example, inputs: Mapping[str, Image.Image]) -> Image.Image:
    lora = data_uri((DEMO / LORA).read_bytes(), "application/octet-stream")
    files = {"image_url": example.image, "mask_url": "mask"}
    files |= dict.fromkeys(("reference_image_url", "control_lora_image_url"), example.image)
    fields = {
        "image_size": {"width": SIDE, "height": SIDE},
        "num_inference_steps": 16,
        "loras": [{"path": lora, "scale": example.lora_scale}] if example.lora_scale else [],
        **{field: data_uri(encode(inputs[name])) for field, name in files.items() if inputs},
        **example.fields,
    }
    body = {name: value for name, value in fields.items() if name in FACTS[endpoint]}
    body |= {"seed": 5, "output_format": "png", "sync_mode": True}
    body |= {"prompt": example.prompt} if example.prompt else {}
    response = client.post(f"/{endpoint}", json=body)
    if response.is_error:
        raise SystemExit(f"{endpoint} responded {response.status_code}: {response.text}")
    # The last event of a stream is the output.
    text = response.text.rpartition("data: ")[2] if endpoint.endswith("/stream") else response.text
    return decode(json.loads(text)["images"][0]["url"]).convert("RGB")


def _tile(client: httpx.Client, endpoint: str, inputs: Mapping[str, Image.Image]) -> Image.Image:
    """Draw the endpoint's image, its id, its prompt and small copies of its input images."""
    example = EXAMPLES[endpoint]
    image = _generate(client, endpoint, example, inputs if example.image else {})
    tile, draw = _captioned(image, endpoint)
    shown = [example.image, "mask"] if "mask_url" in FACTS[endpoint] else [example.image] if example.image else []
    top = TILE + 24
    for place, name in enumerate(reversed(shown), 1):
        left = TILE - place * (THUMBNAIL + GAP // 3) + GAP // 3
        tile.paste(inputs[name].resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS), (left, top))
        draw.rectangle((left, top, left + THUMBNAIL - 1, top + THUMBNAIL - 1), outline=GREY)
    has_lora = "loras" in FACTS[endpoint] and example.lora_scale
    said = example.prompt or "no prompt"
    text = f"{said}, with the LoRA" if has_lora else said
    width = TILE - len(shown) * (THUMBNAIL + GAP // 2)
    draw.multiline_text((0, top), _wrapped(text, width), GREY, FONT)
    return tile


def _captioned(image: Image.Image, endpoint: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    tile = Image.new("RGB", (TILE, TILE + CAPTION), "white")
    tile.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS))
    draw = ImageDraw.Draw(tile)
    draw.text((0, TILE + 4), endpoint.removeprefix("fal-ai/"), "black", FONT)
    return tile, draw


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if FONT.getlength(longer) <= width else [*lines, word]
    return "\n".join(lines)


def _sheet(tiles: list[Image.Image]) -> Image.Image:
    rows = -(-len(tiles) // COLUMNS)
    width, height = TILE + GAP, TILE + CAPTION + GAP
    sheet = Image.new("RGB", (COLUMNS * width + GAP, rows * height + GAP), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (GAP + index % COLUMNS * width, GAP + index // COLUMNS * height))
    return sheet


if __name__ == "__main__":
    main()
