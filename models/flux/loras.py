"""LoRA weights, loaded into clones of the pipeline. The clones share the base weights, which never change."""

import logging
import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.utils.peft_utils import delete_adapter_layers
from safetensors.torch import load_file

from models.base import GenerationFailed, IncompatibleInput
from models.flux import lora_check
from models.flux.compilation import clone_sharing_weights
from models.flux.input_images import OWN

log = logging.getLogger(__name__)

#: The most clones for control LoRAs of requests. Each takes some 10 MB of host memory, calculated.
MAX_CLONES = 4
#: The maximum bytes of LoRAs kept on the device; the least recently used are unloaded first. A LoRA of rank 16 takes
#: some 40 MB for FLUX.1. The LoRAs of a single task may exceed the limit while the task runs.
CACHE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class LoraAdapter:
    """LoRA weights in a safetensors file, and their scale.

    With a control LoRA, the transformer takes the latents of a control image next to its own. The server's own control
    LoRAs have a `control_name`, from `specs.CONTROL_LORAS`, and no `loc`. All other LoRAs are in content-addressed
    files, and `loc` is the path of the field that names them in the request.
    """

    path: Path
    scale: float
    is_control: bool = False
    control_name: str = ""
    loc: tuple[str | int, ...] | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The adapter's name in peft, without dots, which the names of modules cannot contain."""
        return self.control_name or self.path.stem.replace(".", "_")

    @property
    def num_bytes(self) -> int:
        """The size of the file in bytes, taken as the size on the device. Raises OSError if the file is gone."""
        return self.path.stat().st_size


def adapters_of(
    request: Any, inputs: Mapping[str, Path], control_lora: str, control_loras: Mapping[str, Path]
) -> tuple[LoraAdapter, ...]:
    """Return the LoRAs of a request, first its control LoRA.

    `inputs` are the files of the request's fields. `control_lora` is that of its input images, and `control_loras` are
    the files of the server's.
    """
    loras = []
    if control_lora == OWN:
        loc = ("control_loras", 0, "path")
        file, scale = inputs["control_loras.0.path"], request.control_loras[0].scale
        loras.append(LoraAdapter(file, scale, is_control=True, loc=loc))
    elif control_lora:
        file, strength = control_loras[control_lora], request.control_lora_strength
        loras.append(LoraAdapter(file, strength, is_control=True, control_name=control_lora))
    for place, lora in enumerate(getattr(request, "loras", ())):
        loras.append(LoraAdapter(inputs[f"loras.{place}.path"], lora.scale, loc=("loras", place, "path")))
    return tuple(loras)


@dataclass
class _Clone:
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
        self._clones: dict[str, _Clone] = {}
        #: The bytes of each LoRA, by the name of its clone and its own name.
        self._loaded: OrderedDict[tuple[str, str], int] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """The names of the LoRAs on the device, least recently used first."""
        return [name for _, name in self._loaded]

    def activate(self, loras: tuple[LoraAdapter, ...]) -> Any:
        """Load missing LoRAs; return a pipeline with exactly `loras` active. Only the first may be a control LoRA.

        Raises IncompatibleInput, and GenerationFailed for a LoRA of the server's.
        """
        key = _clone_of(loras)
        if key not in self._clones:
            if loras and loras[0].loc:
                self._make_room_for_a_clone()
            self._clones[key] = self._build(is_control=bool(key))
        clone = self._clones[key]
        if loras != clone.active:
            for lora in loras:
                if (key, lora.name) in self._loaded:
                    self._loaded.move_to_end((key, lora.name))
                else:
                    self._load(lora, key, _keys(loras))
            scales = _scales(loras)
            clone.pipeline.set_adapters(list(scales), list(scales.values()))
            clone.active = loras
        return clone.pipeline

    def unload_idle(self, loras: tuple[LoraAdapter, ...]) -> None:
        """Unload all LoRAs but these, to free memory."""
        for key, name in [each for each in self._loaded if each not in _keys(loras)]:
            self._unload(key, name)

    def _make_room_for_a_clone(self) -> None:
        """Leave fewer clones for the control LoRAs of requests than the maximum, which the new one fills."""
        of_requests = [name for (key, name), size in self._loaded.items() if key == name and size]
        for name in of_requests[: max(0, len(of_requests) + 1 - MAX_CLONES)]:
            self._unload(name, name)

    def _build(self, *, is_control: bool) -> _Clone:
        parts = dict(self._base.components)
        for name in ("transformer", "text_encoder"):
            parts[name] = clone_sharing_weights(parts[name])
        if is_control:
            for name, module in parts["transformer"].named_modules():
                if name.rpartition(".")[2] in (*lora_check.NORMS, lora_check.WIDENED):
                    for key, weight in module.named_parameters(recurse=False):
                        setattr(module, key, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
        pipeline = FluxPipeline(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return _Clone(pipeline)

    def _load(self, lora: LoraAdapter, key: str, wanted: Collection[tuple[str, str]]) -> None:
        clone = self._clones[key]
        try:
            # The memory plan has room for the server's own LoRAs.
            num_bytes = lora.num_bytes if lora.loc else 0
            self._make_room(wanted, num_bytes)
            # Load only the tensors: with the header's metadata, the file could change how peft sets up its layers.
            tensors = load_file(lora.path)
            lora_check.check(clone.pipeline, tensors, is_control=lora.is_control)
            with warnings.catch_warnings():
                # peft warns of a second adapter, but several adapters are intended here.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                clone.pipeline.load_lora_weights(tensors, adapter_name=lora.name)
            # diffusers skips layers that the model does not have, without an error even if it skips all.
            if lora.name not in _known(clone):
                raise ValueError("none of their layers is in this model; use a LoRA that was trained on this model")
        except BaseException as error:
            # A partly loaded adapter would change the next image.
            self._unload(key, lora.name)
            # Errors of the device are not the file's fault; `Device.classify_errors` translates them.
            if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or not isinstance(error, Exception):
                raise
            if lora.loc is None:
                log.exception("the control LoRA %s cannot be loaded", lora.path)
                raise GenerationFailed(
                    f"The server's control LoRA for {lora.name} cannot be loaded; its log says why."
                ) from error
            raise IncompatibleInput(lora.loc, f"These LoRA weights do not fit this model: {_brief(error)}") from error
        self._loaded[key, lora.name] = num_bytes

    def _make_room(self, wanted: Collection[tuple[str, str]], num_bytes: int) -> None:
        for key, name in [each for each, size in self._loaded.items() if size and each not in wanted]:
            if sum(self._loaded.values()) + num_bytes <= self._kept_bytes:
                return
            self._unload(key, name)

    def _unload(self, key: str, name: str) -> None:
        if key not in self._clones:
            # The clone went with its control LoRA.
            return
        if name == key:
            # The base weights that the control LoRA has replaced go with it.
            del self._clones[key]
            self._loaded = OrderedDict((each, size) for each, size in self._loaded.items() if each[0] != key)
            return
        self._loaded.pop((key, name), None)
        clone = self._clones[key]
        with warnings.catch_warnings():
            # peft warns of deleting an active adapter, but `activate` sets the active adapters again.
            warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
            # After a failed load, layers can have an adapter of which the pipeline does not know.
            for component in (clone.pipeline.transformer, clone.pipeline.text_encoder):
                delete_adapter_layers(component, name)
        clone.active = ()


def _clone_of(loras: Sequence[LoraAdapter]) -> str:
    return loras[0].name if loras and loras[0].is_control else ""


def _keys(loras: Sequence[LoraAdapter]) -> set[tuple[str, str]]:
    return {(_clone_of(loras), lora.name) for lora in loras}


def _known(clone: _Clone) -> set[str]:
    """Return the names of all adapters in any component of the pipeline."""
    return {each for names in clone.pipeline.get_list_adapters().values() for each in names}


def _scales(loras: Sequence[LoraAdapter]) -> dict[str, float]:
    """Return the scale of each LoRA by name. The scales of a LoRA that is listed twice add up."""
    scales: dict[str, float] = {}
    for lora in loras:
        scales[lora.name] = scales.get(lora.name, 0.0) + lora.scale
    return scales


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
