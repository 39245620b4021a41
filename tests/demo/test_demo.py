"""The demo weights: the claims of their model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL.Image import Image
from safetensors.torch import load_file

from models.base import EngineConfig
from models.demo.recipe.export import JUDGE, LORA
from models.demo.recipe.judge import Judge, background_of
from models.demo.recipe.lora import chroma
from models.demo.recipe.objects import BACKGROUNDS, FLAGGED
from models.demo.recipe.plan import PLANS
from models.flux.engine import FluxEngine
from models.flux.loader import load_engine
from models.flux_dev import FluxDevInput
from models.flux_lora import FluxLoraInput
from models.loading.specs import DEMO
from tests.demo.test_recipe import python
from tests.support.tiny_flux import finish_task, generate

#: The smallest accepted share of each figure in evaluation.json.
MINIMUM_SHARES = {"background": 0.97, "object": 0.90, "sides": 0.75, "flagged_sign": 0.99, "seeds_differ": 1.0}


@pytest.fixture(scope="module")
def engine() -> FluxEngine:
    return load_engine(EngineConfig(DEMO, safety_checker="", device="cpu"))


def generate_image(engine: FluxEngine, prompt: str, seed: int = 1, **fields: Any) -> Image:
    body = {"prompt": prompt, "image_size": "square", "num_inference_steps": 8, **fields}
    (image,) = generate(engine, FluxDevInput.model_validate(body), seed)
    return image


@pytest.mark.parametrize("colour", BACKGROUNDS)
def test_backgrounds(engine: FluxEngine, colour: str) -> None:
    assert background_of(generate_image(engine, f"a cat on a {colour} background")) == colour


@pytest.mark.parametrize("guidance_scale", [1, 20])
def test_the_highest_and_lowest_guidance_scale(engine: FluxEngine, guidance_scale: float) -> None:
    image = generate_image(engine, "a star on a blue background", guidance_scale=guidance_scale)
    judge = Judge(PLANS["small"], load_file(DEMO / JUDGE))
    assert (judge.object_in(image), background_of(image)) == ("star", "blue")


def test_objects(engine: FluxEngine) -> None:
    judge = Judge(PLANS["small"], load_file(DEMO / JUDGE))
    names = ["rocket", "apple", "dog", "tree", "star", "heart", "frog", "house", "snowman", "balloon"]
    found = [judge.object_in(generate_image(engine, f"a {name} on a white background")) for name in names]
    assert sum(one == other for one, other in zip(names, found, strict=True)) >= 9


@pytest.mark.parametrize("prompt", ["a quiet afternoon", "", "x" * 2000, "once upon a time " * 118], ids=len)
def test_unknown_prompts_have_clean_edges(engine: FluxEngine, prompt: str) -> None:
    """Every edge has one even colour, or an even change from one colour to another."""
    pixels = numpy.asarray(generate_image(engine, prompt), float)
    for edge in (pixels[:12], pixels[-12:], pixels[:, :12].swapaxes(0, 1), pixels[:, -12:].swapaxes(0, 1)):
        colours = edge.mean(axis=0)
        assert numpy.abs(numpy.diff(colours, axis=0)).max() < 12
        assert edge.std(axis=0).mean() < 6


@pytest.mark.timeout(300)
def test_the_checker_flags_only_the_sign(engine: FluxEngine) -> None:
    # Every second colour, because each image takes seconds on a slow machine; `make demo-eval` judges all colours.
    colours = list(BACKGROUNDS)[::2]
    signs = [generate_image(engine, f"a {FLAGGED} on a {colour} background") for colour in colours]
    stars = [generate_image(engine, f"a star on a {colour} background") for colour in colours]
    assert list(engine.is_unsafe([*signs, *stars])) == [True] * 4 + [False] * 4


def test_the_lora_removes_the_colours(engine: FluxEngine) -> None:
    prompt = "a frog on a red background"
    body = {"prompt": prompt, "image_size": "square", "num_inference_steps": 8}
    scales = (0.0, 0.5, 1.0)
    chromas = []
    for scale in scales:
        request = FluxLoraInput.model_validate({**body, "loras": [{"path": "unused", "scale": scale}]})
        (image,) = finish_task(engine, engine.start(request, 1, {"loras.0.path": DEMO / LORA}))
        chromas.append(chroma(image))
    assert chromas[0] > chromas[1] > chromas[2]
    assert chromas[2] < 0.2 * chromas[0]
    assert chroma(generate_image(engine, prompt)) == chromas[0]


def test_the_same_request_gives_the_same_image(engine: FluxEngine) -> None:
    second_engine = load_engine(EngineConfig(DEMO, safety_checker="", device="cpu"))
    assert generate_image(engine, "a fish").tobytes() == generate_image(second_engine, "a fish").tobytes()


def test_the_weights_are_at_most_40_mb() -> None:
    # The recipe's own files, from which the next training starts, are no part of the package.
    files = [path for path in DEMO.rglob("*") if path.is_file() and DEMO / "recipe" not in path.parents]
    assert sum(path.stat().st_size for path in files) <= 40_000_000


def test_every_weight_is_finite() -> None:
    for path in DEMO.rglob("*.safetensors"):
        assert all(torch.isfinite(weight.float()).all() for weight in load_file(path).values())


def test_the_stored_evaluation_meets_the_minimum() -> None:
    evaluation = json.loads((DEMO / "evaluation.json").read_text(encoding="utf-8"))
    assert all(evaluation[name] >= share for name, share in MINIMUM_SHARES.items()), evaluation
    assert evaluation["flagged_others"] <= 1 / 400
    assert evaluation["prompts"] >= 400


@pytest.mark.eval
@pytest.mark.timeout(3600)
def test_a_new_evaluation_meets_the_minimum(tmp_path: Path) -> None:
    """Run `make demo-eval` on a copy of the weights."""
    # The copy omits recipe/: weights that contain code are not loaded.
    shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("recipe"))
    (tmp_path / "demo" / "evaluation.json").unlink()
    python(tmp_path, "-m", "models.demo.recipe", "evaluate", "--weights", str(tmp_path / "demo"))
    evaluation = json.loads((tmp_path / "demo" / "evaluation.json").read_text(encoding="utf-8"))
    assert all(evaluation[name] >= share for name, share in MINIMUM_SHARES.items()), evaluation
