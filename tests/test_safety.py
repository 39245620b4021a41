"""The two kinds of safety checker, tiny ones made here, loaded as the real ones are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil

from models import safety
from models.base import CannotPaint, Placement
from models.weights import DEMO

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
    return safety.load(Placement(None, safety_checker=str(folder), device="cpu"))


@pytest.mark.parametrize(("threshold", "flagged"), [(-2.0, True), (2.0, False)])
def test_compvis(tmp_path: Path, threshold: float, flagged: bool) -> None:
    checker = compvis(tmp_path, threshold)
    assert isinstance(checker, safety.CompVis)
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
    return safety.load(Placement(None, safety_checker=str(folder), device="cpu"))


@pytest.mark.parametrize(("bias", "flagged"), [([4.0, -4.0], False), ([-4.0, 4.0], True)])
def test_image_classifier(tmp_path: Path, bias: list[float], flagged: bool) -> None:
    checker = classifier(tmp_path, bias)
    assert isinstance(checker, safety.ImageClassifier)
    assert checker.is_unsafe(PICTURES) == [flagged] * 2


def test_an_answer_that_is_not_a_number_fails_closed(tmp_path: Path) -> None:
    with pytest.raises(CannotPaint, match="not a number"):
        classifier(tmp_path, [float("nan")] * 2).is_unsafe(PICTURES)


def test_a_checker_that_cannot_be_loaded_fails_closed(tmp_path: Path) -> None:
    checker = safety.load(Placement(None, safety_checker=str(tmp_path / "none"), device="cpu"))
    with pytest.raises(CannotPaint, match="could not be loaded"):
        checker.is_unsafe(PICTURES)


def test_weights_bring_their_own(tmp_path: Path) -> None:
    checker = safety.load(Placement(DEMO, safety_checker=str(tmp_path / "none"), device="cpu"))
    assert checker.is_unsafe(PICTURES) == [False, False]
