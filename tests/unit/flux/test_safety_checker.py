"""The two kinds of safety checker, tiny ones made here, loaded as the real ones are."""

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
PICTURES = [Image.new("RGB", (96, 64), colour) for colour in ("red", "blue")]


def compvis(folder: Path, thresholds: float) -> Any:
    """A checker of CompVis's class: every concept is found when its threshold is below any cosine."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": 32, "patch_size": 16}, projection_dim=8)
    model = StableDiffusionSafetyChecker(config)
    torch.nn.init.constant_(model.concept_embeds_weights, thresholds)
    torch.nn.init.constant_(model.special_care_embeds_weights, 2.0)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return safety_checker.load(EngineConfig(None, safety_checker=str(folder), device="cpu"))


@pytest.mark.parametrize(("threshold", "flagged"), [(-2.0, True), (2.0, False)])
def test_compvis(tmp_path: Path, threshold: float, flagged: bool) -> None:
    checker = compvis(tmp_path, threshold)
    assert isinstance(checker, safety_checker.CompVis)
    assert checker.is_unsafe(PICTURES) == [flagged] * 2


def classifier(folder: Path, bias: list[float]) -> Any:
    """The demo's checker with another bias: [normal, nsfw]."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    source = DEMO / "safety_checker"
    model = AutoModelForImageClassification.from_pretrained(source)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor(bias))
    model.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(source).save_pretrained(folder)
    return safety_checker.load(EngineConfig(None, safety_checker=str(folder), device="cpu"))


@pytest.mark.parametrize(("bias", "flagged"), [([4.0, -4.0], False), ([-4.0, 4.0], True)])
def test_image_classifier(tmp_path: Path, bias: list[float], flagged: bool) -> None:
    checker = classifier(tmp_path, bias)
    assert isinstance(checker, safety_checker.ImageClassifier)
    assert checker.is_unsafe(PICTURES) == [flagged] * 2


@pytest.mark.parametrize("value", [NAN, -INFINITY, INFINITY])
def test_an_answer_that_is_not_a_number_fails_closed(tmp_path: Path, value: float) -> None:
    """Also one that says "surely safe" because it ran out of the range of numbers."""
    checker = classifier(tmp_path, [4.0, -4.0])
    with torch.no_grad():
        checker.model.classifier.bias[checker.nsfw] = value
    with pytest.raises(GenerationFailed, match="not a number"):
        checker.is_unsafe(PICTURES)


@pytest.mark.parametrize("value", [NAN, INFINITY, 3e38, 0.0])
def test_an_embedding_without_a_direction_fails_closed(tmp_path: Path, value: float) -> None:
    """3e38 is a number, and what is counted with it is none. With a usual threshold the model itself flags none."""
    checker = compvis(tmp_path, 0.2)
    with torch.no_grad():
        checker.model.visual_projection.weight[:] = value
    with pytest.raises(GenerationFailed, match="not a number"):
        checker.is_unsafe(PICTURES)


def test_one_picture_without_a_direction_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = compvis(tmp_path, 2.0)
    pixels = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), NAN)])
    monkeypatch.setattr(checker, "processor", lambda **_: BatchFeature({"pixel_values": pixels}))
    with pytest.raises(GenerationFailed, match="not a number"):
        checker.is_unsafe(PICTURES)


def test_a_checker_that_cannot_be_loaded_fails_closed(tmp_path: Path) -> None:
    checker = safety_checker.load(EngineConfig(None, safety_checker=str(tmp_path / "none"), device="cpu"))
    with pytest.raises(GenerationFailed, match="could not be loaded"):
        checker.is_unsafe(PICTURES)


def made(folder: Path, kind: str) -> tuple[str, str]:
    """A checker of this kind in the folder that finds nothing, and the names of two tensors that matter."""
    if kind == "CompVis":
        compvis(folder, 2.0)
        return "concept_embeds", "concept_embeds_weights"
    classifier(folder, [4.0, -4.0])
    return "classifier.weight", "classifier.bias"


SPOILED: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda tensor: None,
    "of another shape": lambda tensor: tensor[:1].clone(),
    "not a number": lambda tensor: torch.full_like(tensor, NAN),
    "infinite": lambda tensor: torch.full_like(tensor, INFINITY),
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("kind", ["CompVis", "ImageClassifier"])
def test_a_checker_without_all_of_its_weights_fails_closed(tmp_path: Path, kind: str, how: str) -> None:
    for name in made(tmp_path, kind):
        whole = load_file(tmp_path / "model.safetensors")
        spoiled = SPOILED[how](whole[name])
        left = {**whole, name: spoiled} if spoiled is not None else {key: whole[key] for key in whole if key != name}
        save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
        checker = safety_checker.load(EngineConfig(None, safety_checker=str(tmp_path), device="cpu"))
        save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(GenerationFailed, match=rf"could not be loaded.*{name}\b"):
            checker.is_unsafe(PICTURES)


@pytest.mark.parametrize(
    ("file", "said", "words"),
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
def test_a_malformed_checker_fails_closed(tmp_path: Path, file: str, said: str, words: str) -> None:
    shutil.copytree(DEMO / "safety_checker", tmp_path / "checker")
    (tmp_path / "checker" / file).write_text(said, encoding="utf-8")
    checker = safety_checker.load(EngineConfig(None, safety_checker=str(tmp_path / "checker"), device="cpu"))
    with pytest.raises(GenerationFailed, match=rf"could not be loaded.*{words}"):
        checker.is_unsafe(PICTURES)


def test_the_published_names_of_compvis_are_whole(tmp_path: Path) -> None:
    """The hub's file is older than transformers' present names for the same tensors."""
    flags = compvis(tmp_path, -2.0).is_unsafe(PICTURES)
    old = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        old[name.replace("vision_model.", "vision_model.vision_model.", 1)] = tensor
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    checker = safety_checker.load(EngineConfig(None, safety_checker=str(tmp_path), device="cpu"))
    assert checker.is_unsafe(PICTURES) == flags == [True, True]


def test_weights_bring_their_own(tmp_path: Path) -> None:
    checker = safety_checker.load(EngineConfig(DEMO, safety_checker=str(tmp_path / "none"), device="cpu"))
    assert checker.is_unsafe(PICTURES) == [False, False]
