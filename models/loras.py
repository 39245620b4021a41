"""LoRA weights around the base weights, which are never changed: on a twin of the pipeline that shares them."""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from models.base import CannotPaint
from models.tiers import twin

#: How many stay on the device, the least recently used go first. One of rank 16 takes some 40 MB for FLUX.1.
KEPT = 8


@dataclass(frozen=True)
class Lora:
    """Weights as safetensors, in a file named by what is in it, and how strongly they count."""

    path: Path
    scale: float

    @property
    def name(self) -> str:
        """The adapter's; a module's name may hold no dot."""
        return self.path.stem.replace(".", "_")


class Loras:
    """Switches LoRAs on for the forwards of those that asked for them. One thread owns it."""

    def __init__(self, pipeline: Any) -> None:
        self._base = pipeline
        self._pipeline: Any = None
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._active: tuple[Lora, ...] = ()

    @property
    def names(self) -> list[str]:
        """Those on the device, from the least to the most recently used."""
        return list(self._loaded)

    def use(self, loras: tuple[Lora, ...]) -> Any:
        """The pipeline with exactly these switched on. Raises CannotPaint, naming the one that does not fit."""
        if self._pipeline is None:
            self._pipeline = self._build()
        if loras != self._active:
            for place, lora in enumerate(loras):
                self._load(lora, place)
            self._make_room(loras)
            scales = _scales(loras)
            self._pipeline.set_adapters(list(scales), list(scales.values()))
            self._active = loras
        return self._pipeline

    def _build(self) -> Any:
        parts = dict(self._base.components)
        for name in ("transformer", "text_encoder"):
            parts[name] = twin(parts[name])
        pipeline = FluxPipeline(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _load(self, lora: Lora, place: int) -> None:
        if lora.name in self._loaded:
            self._loaded.move_to_end(lora.name)
            return
        try:
            self._check(lora)
            with warnings.catch_warnings():
                # peft warns of a second adapter, which is what is wanted.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                self._pipeline.load_lora_weights(
                    str(lora.path.parent), weight_name=lora.path.name, adapter_name=lora.name, local_files_only=True
                )
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            # The device's, not the file's: who asked for the step tells these apart.
            self._forget(lora.name)
            raise
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            # Half of it may be there.
            self._forget(lora.name)
            raise CannotPaint(f"loras.{place} does not fit this model: {_brief(error)}") from error
        self._loaded[lora.name] = None

    def _check(self, lora: Lora) -> None:
        """Only what stands beside the base weights: anything else would be written into them."""
        converted = self._pipeline.lora_state_dict(
            str(lora.path.parent), weight_name=lora.path.name, local_files_only=True, use_safetensors=True
        )
        if strange := [key for key in converted if "lora_" not in key]:
            raise ValueError(f"{strange[0]} is not of a LoRA; changed base weights are not supported")
        for key, weight in converted.items():
            part, _, module = key.partition(".")
            if part == "transformer":
                _check_shape(self._pipeline.transformer, module, weight)

    def _make_room(self, wanted: Sequence[Lora]) -> None:
        needed = {lora.name for lora in wanted}
        for name in [name for name in self._loaded if name not in needed][: max(0, len(self._loaded) - KEPT)]:
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._loaded.pop(name, None)
        known = {each for names in self._pipeline.get_list_adapters().values() for each in names}
        if name in known:
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
    layer = getattr(transformer.get_submodule(name), "base_layer", transformer.get_submodule(name))
    is_inner = kind.startswith("A")
    expected = layer.in_features if is_inner else layer.out_features
    found = weight.shape[1] if is_inner else weight.shape[0]
    if found != expected:
        raise ValueError(f"{key} is for {found} features where {expected} are")


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
