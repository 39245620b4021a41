"""The recipe of the demo weights: every step runs, resumes where it was stopped, and reads texts like FluxPipeline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import FluxPipeline

from models.demo.recipe import captions, scenes
from models.demo.recipe.export import JUDGE
from models.demo.recipe.objects import BACKGROUNDS, FLAGGED, SMALL
from models.demo.recipe.plan import TOKEN_PIXELS
from models.image_size import PRESETS
from models.loading.devices import dtype_for
from tests.support.server_process import ROOT

#: The tests take half a minute on an idle machine, and more on a busy one.
pytestmark = pytest.mark.timeout(900)
OBJECTS = {thing.name: thing for thing in SMALL}
REQUIRED_OBJECTS = (
    "rocket apple dog cat tree star sun moon fish car house heart balloon snowman frog banana".split()  # noqa: SIM905
)


def python(work: Path, *arguments: str, **variables: str) -> str:
    """Run Python with `work` as the directory that the recipe writes to; return the output. Fail if Python fails."""
    environment = {**os.environ, "DEMO_WORK": str(work), **variables}
    command = [sys.executable, *arguments]
    completed = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000, check=False
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def recipe(work: Path, *arguments: str, **variables: str) -> str:
    options = ("--scale", "tiny", "--device", "cpu", "--eager")
    return python(work, "-m", "models.demo.recipe", *options, *arguments, **variables)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the recipe on drawings made here, discs of different colours, so that nothing is downloaded."""
    directory = tmp_path_factory.mktemp("demo")
    (directory / "emoji").mkdir()
    icons = {
        thing.icon: {"body": f'<circle cx="16" cy="16" r="12" fill="hsl({9 * n} 80% {30 + n % 5 * 10}%)"/>'}
        for n, thing in enumerate(SMALL)
    }
    (directory / "emoji" / "icons.json").write_text(json.dumps({"icons": icons}))
    recipe(directory)
    return directory


@pytest.mark.thorough
def test_the_export_runs_in_diffusers_own_pipeline(work: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(work / "export", dtype=dtype_for("auto", "cpu"), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a dog on blue", width=64, height=96, num_inference_steps=2).images[0]
    assert image.size == (64, 96)
    assert (work / "export" / JUDGE).is_file()
    assert (work / "export" / "safety_checker" / "model.safetensors").is_file()


@pytest.mark.thorough
def test_the_export_is_evaluated(work: Path) -> None:
    evaluation = json.loads((work / "export" / "evaluation.json").read_text())
    shares = {"background", "object", "sides", "flagged_others", "flagged_sign", "seeds_differ", "grey_lora", "redux"}
    shares |= {"canny", "depth", "fill"}
    assert all(0 <= evaluation[name] <= 1 for name in shares)
    assert (evaluation["prompts"], evaluation["objects"], evaluation["scale"]) == (6, len(SMALL), "tiny")
    assert (work / "export" / "contact-sheet.png").is_file()


@pytest.mark.thorough
def test_another_machine_continues_an_unfinished_training(work: Path, tmp_path: Path) -> None:
    ahead = {"DEMO_AHEAD": str(tmp_path / "ahead")}
    recipe(work, "handover", **ahead)
    assert json.loads((tmp_path / "ahead" / "progress.json").read_text())["iterations"]["flow"] == 4
    other = tmp_path / "other"
    other.mkdir()
    (other / "emoji").symlink_to(work / "emoji")
    log = recipe(other, "autoencoder", "judge", "reading", "flow", **ahead)
    assert "weights from the repository" in log
    # All iterations are done, so the weights are those that were handed over.
    found, expected = (torch.load(directory / "flow.pt", weights_only=True) for directory in (other, work))
    assert found["iteration"] == expected["iteration"] == 4
    assert (other / "latents.json").read_text() == (work / "latents.json").read_text()
    for name, weight in expected["average"].items():
        assert torch.equal(found["average"][name], weight.bfloat16().float()), name


@pytest.mark.thorough
def test_a_second_run_changes_nothing(work: Path) -> None:
    before = {path: path.read_bytes() for path in (work / "export").rglob("*.safetensors")}
    recipe(
        work,
        "autoencoder",
        "judge",
        "reading",
        "flow",
        "decoder",
        "checker",
        "lora",
        "redux",
        "depths",
        "tuning",
        "export",
    )
    after = {path: path.read_bytes() for path in (work / "export").rglob("*.safetensors")}
    assert after == before and len(before) == 13


@pytest.mark.thorough
def test_the_flow_resumes_where_it_was_stopped(work: Path) -> None:
    output = python(
        work,
        "-c",
        """
import torch
from models.demo.recipe import flow
from models.demo.recipe.plan import PLANS
import dataclasses
plan = dataclasses.replace(PLANS["tiny"], is_compiled=False)
torch.set_num_threads(1)

def trainer():
    return flow.Trainer(plan, "cpu")

flow.FILE.unlink()
straight = trainer()
losses = [straight.step() for _ in range(4)]
stopped = trainer()
assert stopped.iteration == 0
first = [stopped.step() for _ in range(2)]
stopped.save()
resumed = trainer()
assert resumed.iteration == 2
assert first + [resumed.step() for _ in range(2)] == losses, losses
assert all(torch.equal(resumed.average[name], weight) for name, weight in straight.average.items())
print("equal")
""",
    )
    assert output.strip().endswith("equal")


@pytest.mark.thorough
def test_training_reads_texts_like_the_pipeline(work: Path) -> None:
    """Check that training pads and encodes texts as FluxPipeline does with the tokenizer's maximum length."""
    output = python(
        work,
        "-c",
        """
import torch
from diffusers import FluxPipeline
from models.demo.recipe import flow
from models.demo.recipe.plan import PLANS, TEXT_TOKENS, WORK
painter = flow.best(PLANS["tiny"]).to(torch.bfloat16)
pipeline = FluxPipeline.from_pretrained(WORK / "export", dtype=torch.bfloat16, local_files_only=True)
assert pipeline.tokenizer_2.model_max_length == TEXT_TOKENS
texts = ["a dog on a blue background", "", "once upon a time " * 118]
with torch.no_grad():
    states, pooled = painter.encode(texts)
    their_states, their_pooled, _ = pipeline.encode_prompt(texts, None, max_sequence_length=TEXT_TOKENS)
assert states.shape[1] == TEXT_TOKENS and torch.equal(states, their_states) and torch.equal(pooled, their_pooled)
print("equal")
""",
    )
    assert output.strip().endswith("equal")


def test_captions_name_the_objects_and_background_of_a_scene() -> None:
    rng = numpy.random.default_rng(1)
    for _ in range(300):
        scene = scenes.sample(SMALL, rng)
        caption = captions.plain(scene, OBJECTS, rng)
        assert scene.background in caption
        assert all(any(word in caption for word in OBJECTS[name].words) for name in scene.objects)


@pytest.mark.parametrize("size", PRESETS.values(), ids=PRESETS)
def test_objects_stay_inside_and_apart(size: tuple[int, int]) -> None:
    """Objects lie on the grid of the tokens, and two objects do not overlap."""
    rng = numpy.random.default_rng(2)
    for _ in range(300):
        boxes = scenes.sample(SMALL, rng).boxes(*size)
        for left, top, side in boxes:
            assert left >= 0 and left + side <= size[0] and top >= 0 and top + side <= size[1]
            assert left % TOKEN_PIXELS == top % TOKEN_PIXELS == side % TOKEN_PIXELS == 0
        if len(boxes) == 2:
            assert boxes[0][0] + boxes[0][2] <= boxes[1][0]


def test_required_objects_and_backgrounds_exist() -> None:
    assert set(REQUIRED_OBJECTS) <= set(OBJECTS)
    assert len(SMALL) >= 100
    assert list(BACKGROUNDS) == ["red", "orange", "yellow", "green", "blue", "purple", "black", "white"]
    assert FLAGGED in OBJECTS


def test_no_word_means_two_objects() -> None:
    words = [word for thing in SMALL for word in thing.words]
    assert len(words) == len(set(words))
