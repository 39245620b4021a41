"""Tests of the two kinds of safety checker, with tiny checkers that are loaded as the real ones are."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BatchFeature, CLIPConfig, CLIPImageProcessorPil

from models.base import EngineConfig, GenerationFailed
from models.flux import safety_checker
from models.loading.specs import DEMO

INFINITY = float("inf")
NAN = float("nan")
IMAGES = [Image.new("RGB", (96, 64), colour) for colour in ("red", "blue")]


def compvis(directory: Path, thresholds: float) -> Any:
    """Save, load and return a tiny checker of CompVis's class. A threshold below any cosine flags every concept."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": 32, "patch_size": 16}, projection_dim=8)
    model = StableDiffusionSafetyChecker(config)
    torch.nn.init.constant_(model.concept_embeds_weights, thresholds)
    torch.nn.init.constant_(model.special_care_embeds_weights, 2.0)
    model.save_pretrained(directory)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(directory)
    return safety_checker.load(EngineConfig(None, safety_checker=str(directory), device="cpu"))


@pytest.mark.parametrize(("threshold", "flagged"), [(-2.0, True), (2.0, False)])
def test_compvis(tmp_path: Path, threshold: float, flagged: bool) -> None:
    checker = compvis(tmp_path, threshold)
    assert isinstance(checker, safety_checker.CompVis)
    assert checker.is_unsafe(IMAGES) == [flagged] * 2


def classifier(directory: Path, bias: list[float]) -> Any:
    """Save, load and return the demo's checker with another bias: [normal, nsfw]."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    source = DEMO / "safety_checker"
    model = AutoModelForImageClassification.from_pretrained(source)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor(bias))
    model.save_pretrained(directory)
    AutoImageProcessor.from_pretrained(source).save_pretrained(directory)
    return safety_checker.load(EngineConfig(None, safety_checker=str(directory), device="cpu"))


@pytest.mark.parametrize(("bias", "flagged"), [([4.0, -4.0], False), ([-4.0, 4.0], True)])
def test_image_classifier(tmp_path: Path, bias: list[float], flagged: bool) -> None:
    checker = classifier(tmp_path, bias)
    assert isinstance(checker, safety_checker.ImageClassifier)
    assert checker.is_unsafe(IMAGES) == [flagged] * 2


@pytest.mark.parametrize("value", [NAN, -INFINITY, INFINITY])
def test_a_score_that_is_not_a_number_fails_closed(tmp_path: Path, value: float) -> None:
    """An infinite score fails closed too, even if it means "surely safe"."""
    checker = classifier(tmp_path, [4.0, -4.0])
    with torch.no_grad():
        checker.model.classifier.bias[checker.nsfw] = value
    with pytest.raises(GenerationFailed, match="output is invalid"):
        checker.is_unsafe(IMAGES)


@pytest.mark.parametrize("value", [NAN, INFINITY, 3e38, 0.0])
def test_an_embedding_without_a_direction_fails_closed(tmp_path: Path, value: float) -> None:
    """3e38 is finite, but results computed with it are not. With 0.2, a usual threshold, the model flags no image."""
    checker = compvis(tmp_path, 0.2)
    with torch.no_grad():
        checker.model.visual_projection.weight[:] = value
    with pytest.raises(GenerationFailed, match="output is invalid"):
        checker.is_unsafe(IMAGES)


def test_one_image_without_a_direction_fails_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = compvis(tmp_path, 2.0)
    pixels = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), NAN)])
    monkeypatch.setattr(checker, "processor", lambda **_: BatchFeature({"pixel_values": pixels}))
    with pytest.raises(GenerationFailed, match="output is invalid"):
        checker.is_unsafe(IMAGES)


def test_a_checker_that_cannot_be_loaded_fails_closed(tmp_path: Path) -> None:
    checker = safety_checker.load(EngineConfig(None, safety_checker=str(tmp_path / "none"), device="cpu"))
    assert "none" in reason_of(checker)


def reason_of(checker: safety_checker.Checker) -> str:
    """Return why a checker could not be loaded; assert that it refuses images with a message that contains no path."""
    assert isinstance(checker, safety_checker.Unavailable)
    with pytest.raises(GenerationFailed, match=r"could not be loaded, so no image is returned; [^/]*$"):
        checker.is_unsafe(IMAGES)
    return checker.reason


def save_checker(directory: Path, kind: str) -> tuple[str, str]:
    """Save a checker of this kind that flags nothing, and return the names of two tensors that matter."""
    if kind == "CompVis":
        compvis(directory, 2.0)
        return "concept_embeds", "concept_embeds_weights"
    classifier(directory, [4.0, -4.0])
    return "classifier.weight", "classifier.bias"


DAMAGE: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda tensor: None,
    "of another shape": lambda tensor: tensor[:1].clone(),
    "not a number": lambda tensor: torch.full_like(tensor, NAN),
    "infinite": lambda tensor: torch.full_like(tensor, INFINITY),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["CompVis", "ImageClassifier"])
def test_a_checker_with_damaged_weights_fails_closed(tmp_path: Path, kind: str, damage: str) -> None:
    for name in save_checker(tmp_path, kind):
        complete = load_file(tmp_path / "model.safetensors")
        damaged = DAMAGE[damage](complete[name])
        tensors = (
            {**complete, name: damaged}
            if damaged is not None
            else {key: complete[key] for key in complete if key != name}
        )
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        checker = safety_checker.load(EngineConfig(None, safety_checker=str(tmp_path), device="cpu"))
        save_file(complete, tmp_path / "model.safetensors", {"format": "pt"})
        assert re.search(rf"{name}\b", reason_of(checker))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "config.json is JSON, but not an object"),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "{}", "cannot be loaded: "),
        ("config.json", '{"architectures": 5}', "cannot be loaded: "),
        ("config.json", '{"model_type": "vit", "id2label": 5}', "cannot be loaded: "),
        ("preprocessor_config.json", '{"image_processor_type": 5}', "cannot be loaded: "),
        ("model.safetensors", "x", "model.safetensors is not a safetensors file"),
    ],
)
def test_a_malformed_checker_fails_closed(tmp_path: Path, file: str, content: str, message: str) -> None:
    shutil.copytree(DEMO / "safety_checker", tmp_path / "checker")
    (tmp_path / "checker" / file).write_text(content, encoding="utf-8")
    checker = safety_checker.load(EngineConfig(None, safety_checker=str(tmp_path / "checker"), device="cpu"))
    assert re.search(message, reason_of(checker))


def test_the_published_tensor_names_of_compvis_are_accepted(tmp_path: Path) -> None:
    """The hub's file is older than the names that transformers now uses for the same tensors."""
    flags = compvis(tmp_path, -2.0).is_unsafe(IMAGES)
    old = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        old[name.replace("vision_model.", "vision_model.vision_model.", 1)] = tensor
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    checker = safety_checker.load(EngineConfig(None, safety_checker=str(tmp_path), device="cpu"))
    assert checker.is_unsafe(IMAGES) == flags == [True, True]


def test_weights_may_include_their_own_checker(tmp_path: Path) -> None:
    checker = safety_checker.load(EngineConfig(DEMO, safety_checker=str(tmp_path / "none"), device="cpu"))
    assert checker.is_unsafe(IMAGES) == [False, False]
