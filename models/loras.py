"""LoRA weights around the base weights, which are never changed: on a twin of the pipeline that shares them."""

import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from models.base import DoesNotFit
from models.tiers import twin

#: Bytes of those that stay on the device, the least recently used go first. One of rank 16 takes some 40 MB for
#: FLUX.1. What one painting asks for may be more, while it is painted.
KEPT_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Lora:
    """Weights as safetensors, in a file named by what is in it, and how strongly they count."""

    path: Path
    scale: float

    @property
    def name(self) -> str:
        """The adapter's; a module's name may hold no dot."""
        return self.path.stem.replace(".", "_")

    @property
    def num_bytes(self) -> int:
        """What it takes on the device, or a little more. Raises OSError where the file is gone."""
        return self.path.stat().st_size


class Loras:
    """Switches LoRAs on for the forwards of those that asked for them. One thread owns it."""

    def __init__(self, pipeline: Any, kept_bytes: int = KEPT_BYTES) -> None:
        self._base = pipeline
        self._kept_bytes = kept_bytes
        self._pipeline: Any = None
        self._loaded: OrderedDict[str, int] = OrderedDict()
        self._active: tuple[Lora, ...] = ()

    @property
    def names(self) -> list[str]:
        """Those on the device, from the least to the most recently used."""
        return list(self._loaded)

    def use(self, loras: tuple[Lora, ...]) -> Any:
        """The pipeline with exactly these switched on. Raises DoesNotFit, naming the one."""
        if self._pipeline is None:
            self._pipeline = self._build()
        if loras != self._active:
            for place, lora in enumerate(loras):
                if lora.name in self._loaded:
                    self._loaded.move_to_end(lora.name)
                else:
                    self._load(lora, place, {wanted.name for wanted in loras})
            scales = _scales(loras)
            self._pipeline.set_adapters(list(scales), list(scales.values()))
            self._active = loras
        return self._pipeline

    def forget_idle(self, loras: tuple[Lora, ...]) -> None:
        """Let all others go, because memory ran out."""
        self._make_room({lora.name for lora in loras}, self._kept_bytes)

    def _build(self) -> Any:
        parts = dict(self._base.components)
        for name in ("transformer", "text_encoder"):
            parts[name] = twin(parts[name])
        pipeline = FluxPipeline(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _load(self, lora: Lora, place: int, wanted: Collection[str]) -> None:
        try:
            num_bytes = lora.num_bytes
            self._make_room(wanted, num_bytes)
            # Tensors alone: what a file's header says of itself would choose how peft sets its layers up.
            tensors = load_file(lora.path)
            self._check(tensors)
            with warnings.catch_warnings():
                # peft warns of a second adapter, which is what is wanted.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                self._pipeline.load_lora_weights(tensors, adapter_name=lora.name)
        except BaseException as error:
            # Half of it may be there, and would paint into the next picture.
            self._forget(lora.name)
            # The device's errors are not the file's: who asked for the step tells these apart.
            if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or not isinstance(error, Exception):
                raise
            words = f"These LoRA weights do not fit this model: {_brief(error)}"
            raise DoesNotFit(("loras", place, "path"), words) from error
        self._loaded[lora.name] = num_bytes

    def _check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Only what stands beside the base weights: anything else would be written into them."""
        # A copy, because it takes some out.
        converted = self._pipeline.lora_state_dict(dict(tensors))
        if strange := [key for key in converted if "lora_" not in key]:
            raise ValueError(f"{strange[0]} is not of a LoRA; changed base weights are not supported")
        for key, weight in converted.items():
            part, _, module = key.partition(".")
            if part == "transformer":
                _check_shape(self._pipeline.transformer, module, weight)

    def _make_room(self, wanted: Collection[str], num_bytes: int) -> None:
        for name in [name for name in self._loaded if name not in wanted]:
            if sum(self._loaded.values()) + num_bytes <= self._kept_bytes:
                return
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._loaded.pop(name, None)
        known = {each for names in self._pipeline.get_list_adapters().values() for each in names}
        if name in known:
            with warnings.catch_warnings():
                # Which others are on is said before the next forward.
                warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
                self._pipeline.delete_adapters(name)
        self._active = ()


def _scales(loras: Sequence[Lora]) -> dict[str, float]:
    """By name; the same one twice counts twice."""
    scales: dict[str, float] = {}
    for lora in loras:
        scales[lora.name] = scales.get(lora.name, 0.0) + lora.scale
    return scales


def _check_shape(transformer: Any, key: str, weight: Any) -> None:
    """Raises ValueError where a matrix does not fit the layer it stands beside."""
    name, _, kind = key.rpartition(".lora_")
    if weight.dim() < 2:
        raise ValueError(f"{key} is not a matrix")
    layer = getattr(transformer.get_submodule(name), "base_layer", transformer.get_submodule(name))
    is_inner = kind.startswith("A")
    expected = layer.in_features if is_inner else layer.out_features
    found = weight.shape[1] if is_inner else weight.shape[0]
    if found != expected:
        raise ValueError(f"{key} is for {found} features where {expected} are")


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
