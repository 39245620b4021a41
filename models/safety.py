"""The safety checker: says of pictures which must not be shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from safetensors import SafetensorError

from models import hub, trust
from models.base import CannotPaint, Placement
from models.weights import device_for, folder_of

#: Falconsai/nsfw_image_detection's "nsfw" probability above which fal's own toolkit flags a picture.
THRESHOLD = 0.5
#: Without the second, transformers asks on the terminal whether code from the folder may run.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


class Checker(Protocol):
    """Judges pictures."""

    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        """One answer a picture; raises CannotPaint when it cannot tell."""


class ImageClassifier:
    """A transformers image classifier with an "nsfw" label, such as Falconsai/nsfw_image_detection."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **_LOCAL)
        model = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True, **_LOCAL)
        self.model = model.to(device).eval()
        labels = {label.lower(): index for index, label in model.config.id2label.items()}
        if "nsfw" not in labels:
            raise ValueError(f"{folder} has no label 'nsfw', only {', '.join(labels)}")
        self.nsfw = labels["nsfw"]

    @torch.no_grad()
    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        """True where the probability of "nsfw" is above the threshold; raises CannotPaint on NaN."""
        inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.model.device, self.model.dtype)
        probabilities = self.model(**inputs).logits.float().softmax(dim=-1)[:, self.nsfw].tolist()
        if any(probability != probability for probability in probabilities):
            raise CannotPaint("The safety checker's answer is not a number, so no picture is shown.")
        return [probability > THRESHOLD for probability in probabilities]


class CompVis:
    """CompVis/stable-diffusion-safety-checker, which compares CLIP embeddings with forbidden concepts."""

    def __init__(self, folder: Path, device: str) -> None:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import AutoImageProcessor

        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **_LOCAL)
        model = StableDiffusionSafetyChecker.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.model = model.to(device).eval()

    @torch.no_grad()
    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        """True where the model finds a forbidden concept."""
        pixels = self.processor(images=list(pictures), return_tensors="pt").pixel_values
        pixels = pixels.to(self.model.device, self.model.dtype)
        if not torch.isfinite(pixels).all():
            raise CannotPaint("The picture is not finite, so it cannot be checked and is not shown.")
        # The model blacks out flagged pictures itself, in this array, which nobody reads.
        _, flagged = self.model(clip_input=pixels, images=pixels.float().cpu().numpy())
        return [bool(flag) for flag in flagged]


class Unavailable:
    """Stands in for a checker that could not be loaded: refuses to judge, so nothing unchecked leaves."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        """Raises CannotPaint."""
        raise CannotPaint(self.reason)


def load(placement: Placement) -> Checker:
    """The weights' own checker if they bring one, else the configured one, which `flux-server pull` has brought."""
    try:
        return _load(_folder(placement), device_for(placement.device))
    except (OSError, ValueError, SafetensorError) as error:
        return Unavailable(f"The safety checker could not be loaded, so no picture is shown: {error}")


def _folder(placement: Placement) -> Path:
    if placement.weights is not None:
        own = folder_of(placement.weights) / "safety_checker"
        if own.is_dir():
            return own
    configured = Path(placement.safety_checker)
    if configured.is_dir():
        return configured
    # With weights from the hub it may be asked now; with weights from a folder nothing is.
    found = hub.locate(placement.safety_checker)
    if found is None and isinstance(placement.weights, str):
        found = hub.pull(placement.safety_checker)
    if found is None:
        raise OSError(
            f"{placement.safety_checker} is not here; `flux-server pull {placement.safety_checker}` brings it"
        )
    return found


def _load(folder: Path, device: str) -> Checker:
    from transformers import PretrainedConfig

    trust.check(folder)
    config: dict[str, Any] = PretrainedConfig.get_config_dict(folder, local_files_only=True)[0]
    if "StableDiffusionSafetyChecker" in (config.get("architectures") or ()):
        return CompVis(folder, device)
    return ImageClassifier(folder, device)
