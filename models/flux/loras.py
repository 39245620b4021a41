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

from models.base import IncompatibleInput
from models.flux.compilation import clone_sharing_weights

#: Bytes of those that stay on the device, the least recently used go first. One of rank 16 takes some 40 MB for
#: FLUX.1. What one painting asks for may be more, while it is painted.
CACHE_BYTES = 2_000_000_000
#: What diffusers calls a layer's two matrices, whatever the file called them.
_MATRICES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class LoraAdapter:
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


class LoraManager:
    """Switches LoRAs on for the forwards of those that asked for them. One thread owns it."""

    def __init__(self, pipeline: Any, kept_bytes: int = CACHE_BYTES) -> None:
        self._base = pipeline
        self._kept_bytes = kept_bytes
        self._pipeline: Any = None
        self._loaded: OrderedDict[str, int] = OrderedDict()
        self._active: tuple[LoraAdapter, ...] = ()

    @property
    def names(self) -> list[str]:
        """Those on the device, from the least to the most recently used."""
        return list(self._loaded)

    def activate(self, loras: tuple[LoraAdapter, ...]) -> Any:
        """The pipeline with exactly these switched on. Raises IncompatibleInput, naming the one."""
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

    def unload_idle(self, loras: tuple[LoraAdapter, ...]) -> None:
        """Let all others go, because memory ran out."""
        self._make_room({lora.name for lora in loras}, self._kept_bytes)

    def _build(self) -> Any:
        parts = dict(self._base.components)
        for name in ("transformer", "text_encoder"):
            parts[name] = clone_sharing_weights(parts[name])
        pipeline = FluxPipeline(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _load(self, lora: LoraAdapter, place: int, wanted: Collection[str]) -> None:
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
            # diffusers passes over layers that are not the model's, even if that is all of them.
            if lora.name not in self._known:
                raise ValueError("none of its layers is the model's; take weights that were trained on this model")
        except BaseException as error:
            # Half of it may be there, and would paint into the next picture.
            self._unload(lora.name)
            # The device's errors are not the file's: who asked for the step tells these apart.
            if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or not isinstance(error, Exception):
                raise
            message = f"These LoRA weights do not fit this model: {_brief(error)}"
            raise IncompatibleInput(("loras", place, "path"), message) from error
        self._loaded[lora.name] = num_bytes

    def _check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Only what stands beside the base weights, in pairs that fit: anything else would be written into them."""
        if vectors := [key for key, tensor in tensors.items() if "alpha" in key and tensor.numel() != 1]:
            raise ValueError(f"{vectors[0]} is not a single number")
        # A copy, because it takes some out.
        converted = self._pipeline.lora_state_dict(dict(tensors))
        of_transformer = {key: weight for key, weight in converted.items() if key.startswith("transformer.")}
        for key in converted:
            if "lora_" not in key or (key in of_transformer and not key.endswith(_MATRICES)):
                raise ValueError(
                    f"{key} is not of a LoRA's matrices; changed base weights and biases are not supported"
                )
        for name in {key.rpartition(".lora_")[0] for key in of_transformer}:
            pair = [of_transformer.get(name + extension) for extension in _MATRICES]
            _check_pair(self._pipeline.transformer, name.removeprefix("transformer."), *pair)

    def _make_room(self, wanted: Collection[str], num_bytes: int) -> None:
        for name in [name for name in self._loaded if name not in wanted]:
            if sum(self._loaded.values()) + num_bytes <= self._kept_bytes:
                return
            self._unload(name)

    @property
    def _known(self) -> set[str]:
        """The names of all that the pipeline has, in whatever part of it."""
        return {each for names in self._pipeline.get_list_adapters().values() for each in names}

    def _unload(self, name: str) -> None:
        self._loaded.pop(name, None)
        if name in self._known:
            with warnings.catch_warnings():
                # Which others are on is said before the next forward.
                warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
                self._pipeline.delete_adapters(name)
        self._active = ()


def _scales(loras: Sequence[LoraAdapter]) -> dict[str, float]:
    """By name; the same one twice counts twice."""
    scales: dict[str, float] = {}
    for lora in loras:
        scales[lora.name] = scales.get(lora.name, 0.0) + lora.scale
    return scales


def _check_pair(transformer: Any, name: str, inner: torch.Tensor | None, outer: torch.Tensor | None) -> None:
    """Raises ValueError where two matrices do not fit the layer that they stand beside, or each other."""
    try:
        layer = transformer.get_submodule(name)
    except AttributeError:
        layer = None
    layer = getattr(layer, "base_layer", layer)
    if not isinstance(layer, torch.nn.Linear):
        raise ValueError(f"the model has no linear layer {name}")
    if inner is None or outer is None:
        raise ValueError(f"{name} has one matrix where a LoRA has two")
    if not (inner.dim() == outer.dim() == 2 and inner.shape[0] == outer.shape[1]):
        raise ValueError(f"{name} has matrices of {list(inner.shape)} and {list(outer.shape)}, which are no pair")
    if (inner.shape[1], outer.shape[0]) != (layer.in_features, layer.out_features):
        found, expected = f"{inner.shape[1]} to {outer.shape[0]}", f"{layer.in_features} to {layer.out_features}"
        raise ValueError(f"{name} is for {found} features where {expected} are")


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
