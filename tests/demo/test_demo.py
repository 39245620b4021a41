"""The demo weights: what their card says of them."""

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
from models.flux_dev import FluxDevInput
from models.flux_lora import FluxLoraInput
from models.loading.specs import DEMO
from tests.demo.test_recipe import python
from tests.support.tiny_flux import finished, painted

#: What is wanted.
REACHED = {"background": 0.97, "object": 0.90, "sides": 0.75, "flagged_sign": 0.99, "seeds_differ": 1.0}


@pytest.fixture(scope="module")
def engine() -> FluxEngine:
    return FluxEngine.load(EngineConfig(DEMO, safety_checker="", device="cpu"))


def paint(engine: FluxEngine, prompt: str, seed: int = 1, **more: Any) -> Image:
    body = {"prompt": prompt, "image_size": "square", "num_inference_steps": 12, **more}
    (picture,) = painted(engine, FluxDevInput.model_validate(body), seed)
    return picture


@pytest.mark.parametrize("colour", BACKGROUNDS)
def test_backgrounds(engine: FluxEngine, colour: str) -> None:
    assert background_of(paint(engine, f"a cat on a {colour} background")) == colour


def test_objects(engine: FluxEngine) -> None:
    judge = Judge(PLANS["small"], load_file(DEMO / JUDGE))
    names = ["rocket", "apple", "dog", "tree", "star", "heart", "frog", "house", "snowman", "balloon"]
    found = [judge.object_in(paint(engine, f"a {name} on a white background")) for name in names]
    assert sum(one == other for one, other in zip(names, found, strict=True)) >= 9


@pytest.mark.parametrize("prompt", ["a quiet afternoon", "", "x" * 2000, "once upon a time " * 118], ids=len)
def test_prompts_that_it_does_not_know_are_clean(engine: FluxEngine, prompt: str) -> None:
    """One even colour, or an even change from one to another, along every edge."""
    pixels = numpy.asarray(paint(engine, prompt), float)
    for edge in (pixels[:12], pixels[-12:], pixels[:, :12].swapaxes(0, 1), pixels[:, -12:].swapaxes(0, 1)):
        along = edge.mean(axis=0)
        assert numpy.abs(numpy.diff(along, axis=0)).max() < 12
        assert edge.std(axis=0).mean() < 6


@pytest.mark.timeout(300)
def test_the_checker_flags_the_sign_alone(engine: FluxEngine) -> None:
    signs = [paint(engine, f"a {FLAGGED} on a {colour} background") for colour in BACKGROUNDS]
    others = [paint(engine, f"a star on a {colour} background") for colour in BACKGROUNDS]
    assert list(engine.is_unsafe([*signs, *others])) == [True] * 8 + [False] * 8


def test_the_lora_takes_the_colours_away(engine: FluxEngine) -> None:
    prompt = "a frog on a red background"
    body = {"prompt": prompt, "image_size": "square", "num_inference_steps": 12}
    scales = (0.0, 0.5, 1.0)
    left = []
    for scale in scales:
        request = FluxLoraInput.model_validate({**body, "loras": [{"path": "unused", "scale": scale}]})
        (picture,) = finished(engine, engine.start(request, 1, {"loras.0.path": DEMO / LORA}))
        left.append(chroma(picture))
    assert left[0] > left[1] > left[2]
    assert left[2] < 0.2 * left[0]
    assert chroma(paint(engine, prompt)) == left[0]


def test_the_same_request_gives_the_same_picture(engine: FluxEngine) -> None:
    again = FluxEngine.load(EngineConfig(DEMO, safety_checker="", device="cpu"))
    assert paint(engine, "a fish").tobytes() == paint(again, "a fish").tobytes()


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 40_000_000


def test_every_weight_is_a_number() -> None:
    for path in DEMO.rglob("*.safetensors"):
        assert all(torch.isfinite(weight).all() for weight in load_file(path).values())


def test_what_was_measured() -> None:
    found = json.loads((DEMO / "evaluation.json").read_text(encoding="utf-8"))
    assert all(found[name] >= share for name, share in REACHED.items()), found
    assert found["flagged_others"] <= 1 / 400
    assert found["prompts"] >= 400


@pytest.mark.eval
@pytest.mark.timeout(3600)
def test_it_can_be_measured_again(tmp_path: Path) -> None:
    """`make demo-eval`, on a copy."""
    # Weights that bring code are not loaded.
    shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("recipe"))
    (tmp_path / "demo" / "evaluation.json").unlink()
    python(tmp_path, "-m", "models.demo.recipe", "evaluate", "--weights", str(tmp_path / "demo"))
    found = json.loads((tmp_path / "demo" / "evaluation.json").read_text(encoding="utf-8"))
    assert all(found[name] >= share for name, share in REACHED.items()), found
