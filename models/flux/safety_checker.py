"""The safety checkers, which decide which images are unsafe."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image

from models.base import EngineConfig, GenerationFailed, SingleFile
from models.loading import hub, verify
from models.loading.devices import device_for
from models.loading.pipeline import dtype_of, weights_directory

#: An image with a higher "nsfw" probability is flagged. fal's toolkit uses this value with the same classifier.
THRESHOLD = 0.5
#: Unless `trust_remote_code` is False, transformers asks on the terminal whether code from the directory may run.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}

log = logging.getLogger(__name__)

_INVALID_OUTPUT = "The safety checker's output is invalid, so no image is returned."


class Checker(Protocol):
    """A safety checker of images."""

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        """Return for each image whether it is unsafe. Raises GenerationFailed if the checker cannot decide."""


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
                f"{directory} has no label 'nsfw', only {', '.join(labels)}; use another safety checker"
            )
        self.nsfw = labels["nsfw"]

    @torch.no_grad()
    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        """Flag images whose "nsfw" probability exceeds THRESHOLD. Raises GenerationFailed if a logit is not finite."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device, self.model.dtype)
        logits = self.model(**inputs).logits.float()
        # Check the logits, because an infinite one can give a probability of 0 or 1.
        if not logits.isfinite().all():
            raise GenerationFailed(_INVALID_OUTPUT)
        return [probability > THRESHOLD for probability in logits.softmax(dim=-1)[:, self.nsfw].tolist()]


class CompVis:
    """CompVis/stable-diffusion-safety-checker, which compares an image's CLIP embedding with forbidden concepts."""

    def __init__(self, directory: Path, device: str, **options: Any) -> None:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import AutoImageProcessor

        self.processor = AutoImageProcessor.from_pretrained(directory, backend="pil", **_LOCAL)
        model = _load_complete(StableDiffusionSafetyChecker, directory, trust_remote_code=False, **options)
        self.model = model.to(device)
        # The model calls an image safe if its embedding is not a number, and it returns no embeddings to check. A hook
        # checks them on the way.
        self.model.visual_projection.register_forward_hook(_reject_degenerate_embeddings)

    @torch.no_grad()
    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        """Flag images with a forbidden concept. Raises GenerationFailed if an embedding is zero or not finite."""
        pixels = self.processor(images=list(images), return_tensors="pt").pixel_values
        pixels = pixels.to(self.model.device, self.model.dtype)
        # The model blacks out flagged images in the array `images`, which is not used afterwards.
        _, flagged = self.model(clip_input=pixels, images=pixels.float().cpu().numpy())
        return [bool(flag) for flag in flagged]


class Unavailable:
    """A stand-in for a checker that could not be loaded. It fails every check, so no unchecked image is returned."""

    def __init__(self, reason: str) -> None:
        """Keep the reason. `load` logs it; clients do not get it, because it may name paths."""
        self.reason = reason

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        """Raise GenerationFailed."""
        raise GenerationFailed(
            "The safety checker could not be loaded, so no image is returned; the server's log says why."
        )


def _load_complete(kind: Any, directory: Path, **options: Any) -> Any:
    """Load a model. Raises hub.BadWeights if its weights are malformed, incomplete or not finite."""
    model = verify.load_complete(kind, directory, **options)
    if spoilt := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise hub.BadWeights(f"{directory} has values that are not finite in {verify.shortened(spoilt)}; {hub.RESTORE}")
    return model


def _reject_degenerate_embeddings(projection: torch.nn.Module, inputs: Any, embeddings: torch.Tensor) -> None:
    # Compute lengths in the embeddings' number type, as the model does. If a length overflows there, the model finds no
    # concept in the image.
    lengths = embeddings.norm(dim=-1)
    if not ((lengths > 0) & (lengths < torch.inf)).all():
        raise GenerationFailed(_INVALID_OUTPUT)


def load(config: EngineConfig) -> Checker:
    """Load the checker in the weights' directory, or else the one that the operator configured.

    Return an Unavailable checker if loading raises OSError.
    """
    try:
        directory = _directory(config)
        with verify.translate_errors(directory):
            return _load(directory, device_for(config.device), dtype_of(config))
    except OSError as error:
        log.error("the safety checker could not be loaded, so every request that needs it fails: %s", error)
        return Unavailable(str(error))


def _directory(config: EngineConfig) -> Path:
    if config.weights is not None:
        own = weights_directory(config.weights) / "safety_checker"
        if own.is_dir():
            return own
    configured = Path(config.safety_checker)
    if configured.is_dir():
        return configured
    # If the weights come from the hub, download the checker too. If they are a local directory, download nothing.
    cached = hub.cached_path(config.safety_checker)
    weights = config.weights.base if isinstance(config.weights, SingleFile) else config.weights
    if cached is None and isinstance(weights, str):
        cached = hub.pull(config.safety_checker)
    if cached is None:
        raise OSError(f"{config.safety_checker} is not downloaded; run `flux-server pull {config.safety_checker}`")
    return cached


def _load(directory: Path, device: str, dtype: torch.dtype) -> Checker:
    from transformers import PretrainedConfig

    verify.verify(directory)
    config: dict[str, Any] = PretrainedConfig.get_config_dict(directory, local_files_only=True)[0]
    # Run in the number type of the files. If the pipeline runs in float32, use float32, which loses no precision.
    options = {"dtype": dtype} if dtype == torch.float32 else {}
    if "StableDiffusionSafetyChecker" in (config.get("architectures") or ()):
        return CompVis(directory, device, **options)
    return ImageClassifier(directory, device, **options)
