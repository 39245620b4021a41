"""LoRA weights, loaded into clones of the pipeline. The clones share the base weights, which never change."""

import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from models.base import GenerationFailed, IncompatibleInput
from models.flux.compilation import clone_sharing_weights

#: The maximum bytes of LoRAs kept on the device; the least recently used are unloaded first. A LoRA of rank 16 takes
#: some 40 MB for FLUX.1. The LoRAs of a single task may exceed the limit while the task runs.
CACHE_BYTES = 2_000_000_000
#: The layers whose weights a control LoRA replaces, by a part of their names.
_REPLACED = ("x_embedder", ".norm_q", ".norm_k", ".norm_added_q", ".norm_added_k")
#: The endings of a layer's two keys, after diffusers has converted the keys of the file to its own names.
_MATRICES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class LoraAdapter:
    """LoRA weights in a safetensors file, and their scale.

    A control LoRA is the operator's. With it, the transformer takes the latents of a control image next to its own. All
    other LoRAs are in content-addressed files.
    """

    path: Path
    scale: float
    is_control: bool = False

    @property
    def name(self) -> str:
        """The adapter's name in peft, without dots, which the names of modules cannot contain."""
        return self.path.stem.replace(".", "_")

    @property
    def num_bytes(self) -> int:
        """The size of the file in bytes, taken as the size on the device. Raises OSError if the file is gone."""
        return self.path.stat().st_size


@dataclass
class _Twin:
    """A clone of the pipeline, with the LoRAs that are active in it."""

    pipeline: Any
    active: tuple[LoraAdapter, ...] = ()


class LoraManager:
    """The LoRAs on the device, activated for the tasks that use them. Only one thread may use the manager.

    There is one clone of the pipeline for each control LoRA, because such a LoRA replaces some of the base weights, and
    one for all tasks without.
    """

    def __init__(self, pipeline: Any, kept_bytes: int = CACHE_BYTES) -> None:
        self._base = pipeline
        self._kept_bytes = kept_bytes
        #: By the name of the control LoRA; "" for none.
        self._twins: dict[str, _Twin] = {}
        #: The bytes of each LoRA, by the name of its twin and its own name.
        self._loaded: OrderedDict[tuple[str, str], int] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """The names of the LoRAs on the device, least recently used first."""
        return [name for _, name in self._loaded]

    def activate(self, loras: tuple[LoraAdapter, ...]) -> Any:
        """Load missing LoRAs; return a pipeline with exactly `loras` active, of which only the first may be a control.

        Raises IncompatibleInput.
        """
        key = _twin_of(loras)
        if key not in self._twins:
            self._twins[key] = self._build(is_control=bool(key))
        twin = self._twins[key]
        if loras != twin.active:
            # The number of a LoRA in the request, which does not name the control LoRA.
            first = -1 if key else 0
            for place, lora in enumerate(loras, first):
                if (key, lora.name) in self._loaded:
                    self._loaded.move_to_end((key, lora.name))
                else:
                    self._load(lora, key, place, _keys(loras))
            scales = _scales(loras)
            twin.pipeline.set_adapters(list(scales), list(scales.values()))
            twin.active = loras
        return twin.pipeline

    def unload_idle(self, loras: tuple[LoraAdapter, ...]) -> None:
        """Unload all LoRAs but these, to free memory."""
        self._make_room(_keys(loras), self._kept_bytes)

    def _build(self, *, is_control: bool) -> _Twin:
        parts = dict(self._base.components)
        for name in ("transformer", "text_encoder"):
            parts[name] = clone_sharing_weights(parts[name])
        if is_control:
            for name, module in parts["transformer"].named_modules():
                if any(part in f".{name}" for part in _REPLACED):
                    for key, weight in module.named_parameters(recurse=False):
                        setattr(module, key, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
        pipeline = FluxPipeline(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return _Twin(pipeline)

    def _load(self, lora: LoraAdapter, key: str, place: int, wanted: Collection[tuple[str, str]]) -> None:
        twin = self._twins[key]
        try:
            num_bytes = lora.num_bytes
            self._make_room(wanted, num_bytes)
            # Load only the tensors: with the header's metadata, the file could change how peft sets up its layers.
            tensors = load_file(lora.path)
            if not lora.is_control:
                _check(twin.pipeline, tensors)
            with warnings.catch_warnings():
                # peft warns of a second adapter, but several adapters are intended here.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                twin.pipeline.load_lora_weights(tensors, adapter_name=lora.name)
            # diffusers skips layers that the model does not have, without an error even if it skips all.
            if lora.name not in _known(twin):
                raise ValueError("none of their layers is in this model; use a LoRA that was trained on this model")
        except BaseException as error:
            # A partly loaded adapter would change the next image.
            self._unload(key, lora.name)
            # Errors of the device are not the file's fault; `Device.classify_errors` translates them.
            if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or not isinstance(error, Exception):
                raise
            if lora.is_control:
                raise GenerationFailed(
                    f"The server's control LoRA does not fit its weights: {_brief(error)}"
                ) from error
            message = f"These LoRA weights do not fit this model: {_brief(error)}"
            raise IncompatibleInput(("loras", place, "path"), message) from error
        self._loaded[key, lora.name] = num_bytes

    def _make_room(self, wanted: Collection[tuple[str, str]], num_bytes: int) -> None:
        for key, name in [each for each in self._loaded if each not in wanted]:
            if sum(self._loaded.values()) + num_bytes <= self._kept_bytes:
                return
            self._unload(key, name)

    def _unload(self, key: str, name: str) -> None:
        self._loaded.pop((key, name), None)
        twin = self._twins[key]
        if name in _known(twin):
            with warnings.catch_warnings():
                # peft warns of deleting an active adapter, but `activate` sets the active adapters again.
                warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
                twin.pipeline.delete_adapters(name)
        twin.active = ()


def _twin_of(loras: Sequence[LoraAdapter]) -> str:
    return loras[0].name if loras and loras[0].is_control else ""


def _keys(loras: Sequence[LoraAdapter]) -> set[tuple[str, str]]:
    return {(_twin_of(loras), lora.name) for lora in loras}


def _known(twin: _Twin) -> set[str]:
    """The names of all adapters in any component of the pipeline."""
    return {each for names in twin.pipeline.get_list_adapters().values() for each in names}


def _check(pipeline: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that all tensors belong to a LoRA, and that each pair for the transformer fits a layer.

    Other tensors could overwrite base weights. Raises ValueError.
    """
    if vectors := [key for key, tensor in tensors.items() if "alpha" in key and tensor.numel() != 1]:
        raise ValueError(f"{vectors[0]} is not a single number")
    # Pass a copy, because the conversion removes entries.
    converted = pipeline.lora_state_dict(dict(tensors))
    of_transformer = {key: weight for key, weight in converted.items() if key.startswith("transformer.")}
    for key in converted:
        if "lora_" not in key or (key in of_transformer and not key.endswith(_MATRICES)):
            raise ValueError(f"{key} is not one of a LoRA's matrices; new base weights and biases are not supported")
    for name in {key.rpartition(".lora_")[0] for key in of_transformer}:
        pair = [of_transformer.get(name + extension) for extension in _MATRICES]
        _check_pair(pipeline.transformer, name.removeprefix("transformer."), *pair)


def _scales(loras: Sequence[LoraAdapter]) -> dict[str, float]:
    """Return the scale of each LoRA by name. The scales of a LoRA that is listed twice add up."""
    scales: dict[str, float] = {}
    for lora in loras:
        scales[lora.name] = scales.get(lora.name, 0.0) + lora.scale
    return scales


def _check_pair(transformer: Any, name: str, inner: torch.Tensor | None, outer: torch.Tensor | None) -> None:
    """Check that the two matrices of the layer `name` fit each other and the layer. Raises ValueError."""
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
        raise ValueError(
            f"{name} has matrices of {list(inner.shape)} and {list(outer.shape)}, which do not form a pair"
        )
    # The transformers of Fill, Canny and Depth take more channels than that of [dev]; diffusers adds zeros for these.
    is_narrower = name == "x_embedder" and inner.shape[1] < layer.in_features
    if (layer.in_features if is_narrower else inner.shape[1], outer.shape[0]) != (
        layer.in_features,
        layer.out_features,
    ):
        actual, expected = f"{inner.shape[1]} to {outer.shape[0]}", f"{layer.in_features} to {layer.out_features}"
        raise ValueError(f"{name} maps {actual} features, and the model expects {expected}")


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
