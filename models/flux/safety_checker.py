"""The safety checker: says of pictures which must not be shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image

from models.base import EngineConfig, GenerationFailed
from models.loading import hub, verify
from models.loading.devices import device_for
from models.loading.pipeline import dtype_of, folder_of

#: Falconsai/nsfw_image_detection's "nsfw" probability above which fal's own toolkit flags a picture.
THRESHOLD = 0.5
#: Without the second, transformers asks on the terminal whether code from the folder may run.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}

_NOT_A_NUMBER = "The safety checker's answer is not a number, so no picture is shown."


class Checker(Protocol):
    """Judges pictures."""

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        """One answer a picture; raises GenerationFailed when it cannot tell."""


class ImageClassifier:
    """A transformers image classifier with an "nsfw" label, such as Falconsai/nsfw_image_detection."""

    def __init__(self, directory: Path, device: str, **options: Any) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.processor = AutoImageProcessor.from_pretrained(directory, backend="pil", **_LOCAL)
        model = _load_complete(AutoModelForImageClassification, directory, trust_remote_code=False, **options)
        self.model = model.to(device)
        labels = {label.lower(): index for index, label in model.config.id2label.items()}
        if "nsfw" not in labels:
            raise hub.BadWeights(
                f"{directory} has no label 'nsfw', only {', '.join(labels)}; take another safety checker"
            )
        self.nsfw = labels["nsfw"]

    @torch.no_grad()
    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        """True where the probability of "nsfw" is above the threshold; raises GenerationFailed where it is none."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device, self.model.dtype)
        logits = self.model(**inputs).logits.float()
        # An infinite one would be a probability of 0 or of 1.
        if not logits.isfinite().all():
            raise GenerationFailed(_NOT_A_NUMBER)
        return [probability > THRESHOLD for probability in logits.softmax(dim=-1)[:, self.nsfw].tolist()]


class CompVis:
    """CompVis/stable-diffusion-safety-checker, which compares CLIP embeddings with forbidden concepts."""

    def __init__(self, directory: Path, device: str, **options: Any) -> None:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import AutoImageProcessor

        self.processor = AutoImageProcessor.from_pretrained(directory, backend="pil", **_LOCAL)
        model = _load_complete(StableDiffusionSafetyChecker, directory, trust_remote_code=False, **options)
        self.model = model.to(device)
        # Within the model, which calls what is not a number safe, and hands on nothing that it was counted from.
        self.model.visual_projection.register_forward_hook(_reject_degenerate_embeddings)

    @torch.no_grad()
    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        """True where the model finds a forbidden concept; raises GenerationFailed where it cannot compare."""
        pixels = self.processor(images=list(images), return_tensors="pt").pixel_values
        pixels = pixels.to(self.model.device, self.model.dtype)
        # The model blacks out flagged pictures itself, in this array, which nobody reads.
        _, flagged = self.model(clip_input=pixels, images=pixels.float().cpu().numpy())
        return [bool(flag) for flag in flagged]


class Unavailable:
    """Stands in for a checker that could not be loaded: refuses to judge, so nothing unchecked leaves."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        """Raises GenerationFailed."""
        raise GenerationFailed(self.reason)


def _load_complete(kind: Any, directory: Path, **options: Any) -> Any:
    """A model with all of its weights from the folder, each a number. Raises hub.BadWeights."""
    model = verify.load_complete(kind, directory, **options)
    if spoilt := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise hub.BadWeights(f"{directory} has no numbers for {verify.shortened(spoilt)}; {hub.REPLACE}")
    return model


def _reject_degenerate_embeddings(projection: torch.nn.Module, inputs: Any, embeddings: torch.Tensor) -> None:
    # In the embeddings' own type, as the model divides by it: what overflows here is like nothing there.
    lengths = embeddings.norm(dim=-1)
    if not ((lengths > 0) & (lengths < torch.inf)).all():
        raise GenerationFailed(_NOT_A_NUMBER)


def load(config: EngineConfig) -> Checker:
    """The weights' own checker if they bring one, else the configured one, which `flux-server pull` has brought."""
    try:
        directory = _directory(config)
        with verify.translate_errors(directory):
            return _load(directory, device_for(config.device), dtype_of(config))
    except OSError as error:
        return Unavailable(f"The safety checker could not be loaded, so no picture is shown: {error}")


def _directory(config: EngineConfig) -> Path:
    if config.weights is not None:
        own = folder_of(config.weights) / "safety_checker"
        if own.is_dir():
            return own
    configured = Path(config.safety_checker)
    if configured.is_dir():
        return configured
    # With weights from the hub it may be asked now; with weights from a folder nothing is.
    found = hub.cached_path(config.safety_checker)
    if found is None and isinstance(config.weights, str):
        found = hub.pull(config.safety_checker)
    if found is None:
        raise OSError(f"{config.safety_checker} is not here; `flux-server pull {config.safety_checker}` brings it")
    return found


def _load(directory: Path, device: str, dtype: torch.dtype) -> Checker:
    from transformers import PretrainedConfig

    verify.verify(directory)
    config: dict[str, Any] = PretrainedConfig.get_config_dict(directory, local_files_only=True)[0]
    # Judged in the type of its file, unless this CPU is slow in that: a checker in float32 is no worse in float32.
    options = {"dtype": dtype} if dtype == torch.float32 else {}
    if "StableDiffusionSafetyChecker" in (config.get("architectures") or ()):
        return CompVis(directory, device, **options)
    return ImageClassifier(directory, device, **options)
