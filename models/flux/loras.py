"""The LoRA weights on the device, and the forwards that use them."""

import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from models.base import GenerationFailed, IncompatibleInput
from models.flux import lora_weights
from models.flux.device import num_bytes_in
from models.flux.input_images import OWN
from models.flux.lora_layers import Pair, installed, widened_linear, with_compiled_loras, with_loras, with_weight
from models.flux.lora_weights import WIDENED, LoraWeights
from models.loading.quantization import linear_layers_of_blocks

log = logging.getLogger(__name__)

#: The maximum bytes of LoRAs kept on the device; the least recently used are unloaded first. A LoRA of rank 16 takes
#: some 40 MB for FLUX.1. The LoRAs of a single task may exceed the limit while the task runs.
CACHE_BYTES = 2_000_000_000
#: The same with plans for smaller GPUs.
SMALL_CACHE_BYTES = 500_000_000

#: The name of a LoRA, and whether it is a control LoRA.
Key = tuple[str, bool]


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
        """The name of the file, or of the server's control LoRA."""
        return self.control_name or self.path.stem

    @property
    def key(self) -> tuple[str, bool]:
        """What tells the LoRA from others, whatever its scale: a file is read in another way as a control LoRA."""
        return self.name, self.is_control


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
        # The requests for Canny and Depth name no strength.
        file, strength = control_loras[control_lora], getattr(request, "control_lora_strength", 1.0)
        loras.append(LoraAdapter(file, strength, is_control=True, control_name=control_lora))
    for place, lora in enumerate(getattr(request, "loras", ())):
        loras.append(LoraAdapter(inputs[f"loras.{place}.path"], lora.scale, loc=("loras", place, "path")))
    return tuple(loras)


class LoraManager:
    """The LoRAs on the device, put into a model for each forward of a task that uses them.

    Only one thread may use the manager. The base weights never change.
    """

    def __init__(self, pipeline: Any, device: str = "cpu", kept_bytes: int = CACHE_BYTES) -> None:
        self._pipeline = pipeline
        self._like = torch.empty(0, dtype=pipeline.transformer.dtype, device=device)
        self._kept_bytes = kept_bytes
        layers = linear_layers_of_blocks(pipeline.transformer)
        #: The bytes of a LoRA of rank 1 in all linear layers of the blocks.
        self._bytes_of_rank = self._like.itemsize * sum(each.in_features + each.out_features for each in layers)
        #: Each LoRA with its bytes, least recently used first.
        self._loaded: OrderedDict[Key, tuple[LoraWeights, int]] = OrderedDict()
        #: The layers that were last put into a model, with the LoRAs and the model that they are for.
        self._last: tuple[tuple[LoraAdapter, ...], Any, dict[str, Any]] = ((), None, {})

    @property
    def names(self) -> list[str]:
        """The names of the LoRAs on the device, least recently used first."""
        return [name for name, _ in self._loaded]

    @contextmanager
    def in_transformer(self, loras: tuple[LoraAdapter, ...], transformer: Any) -> Iterator[None]:
        """Put LoRAs into a transformer while the block runs, after loading those that are missing.

        Only the first may be a control LoRA. The transformer is the pipeline's, or a compiled clone. Raises
        IncompatibleInput, and GenerationFailed for a LoRA of the server's.
        """
        self._load_missing(loras)
        if loras and self._last[:2] != (loras, transformer):
            # Free the layers first: those of a compiled clone may take as much memory as the LoRAs.
            self._last = ((), None, {})
            self._last = (loras, transformer, self._layers(loras, transformer))
        with installed(transformer, self._last[2] if loras else {}):
            yield

    def fit_compiled(self, loras: tuple[LoraAdapter, ...]) -> bool:
        """Return whether LoRAs may run in compiled code, in which every layer of the blocks has their whole rank.

        The memory for that may not exceed the maximum for LoRAs: a small file with a single layer can have a high rank.
        Raises the errors of `in_transformer`.
        """
        self._load_missing(loras)
        pairs = [self._loaded[lora.key][0].pairs["transformer"].values() for lora in loras]
        rank = sum(max((len(pair.down) for pair in each), default=0) for each in pairs)
        return bool(rank * self._bytes_of_rank <= self._kept_bytes)

    @contextmanager
    def in_text_encoder(self, loras: tuple[LoraAdapter, ...]) -> Iterator[None]:
        """Put LoRAs into the text encoder while the block runs, as `in_transformer` does."""
        self._load_missing(loras)
        encoder = self._pipeline.text_encoder
        with installed(encoder, with_loras(encoder, self._pairs(loras, "text_encoder"))):
            yield

    def unload_idle(self, loras: tuple[LoraAdapter, ...]) -> None:
        """Unload all LoRAs but these, to free memory."""
        self._last = ((), None, {})
        for key in set(self._loaded) - {lora.key for lora in loras}:
            del self._loaded[key]

    @contextmanager
    def zeros(self, transformer: Any, rank: int) -> Iterator[None]:
        """Put a LoRA that changes nothing into every layer of a compiled transformer while the block runs."""
        with installed(transformer, with_compiled_loras(transformer, {}, self._like, rank)):
            yield

    def _layers(self, loras: tuple[LoraAdapter, ...], transformer: Any) -> dict[str, Any]:
        """Return the layers that put LoRAs into a transformer, by name."""
        pairs = self._pairs(loras, "transformer")
        replaced: dict[str, Any] = {}
        if loras[0].is_control:
            control, _ = self._loaded[loras[0].key]
            replaced = {
                name: with_weight(transformer.get_submodule(name), weight) for name, weight in control.norms.items()
            }
            num_inputs = control.pairs["transformer"][WIDENED].down.shape[1]
            replaced[WIDENED] = widened_linear(transformer.x_embedder, num_inputs, self._like)
            pairs[WIDENED] = [pair.widened(num_inputs) for pair in pairs[WIDENED]]
        with installed(transformer, replaced):
            is_compiled = transformer is not self._pipeline.transformer
            if is_compiled:
                return {**replaced, **with_compiled_loras(transformer, pairs, self._like)}
            return {**replaced, **with_loras(transformer, pairs)}

    def _pairs(self, loras: tuple[LoraAdapter, ...], model: str) -> dict[str, list[Pair]]:
        """Return the scaled matrices of each layer of a model, in the order of the LoRAs."""
        pairs: dict[str, list[Pair]] = {}
        for key, scale in _scales(loras).items():
            for layer, pair in self._loaded[key][0].pairs[model].items():
                pairs.setdefault(layer, []).append(pair.scaled(scale))
        return pairs

    def _load_missing(self, loras: tuple[LoraAdapter, ...]) -> None:
        for lora in loras:
            if lora.key in self._loaded:
                self._loaded.move_to_end(lora.key)
            else:
                self._load(lora, {each.key for each in loras})

    def _load(self, lora: LoraAdapter, wanted: Collection[Key]) -> None:
        try:
            # Load only the tensors, without the header's metadata, with which the file could choose how it is read.
            tensors = load_file(lora.path)
            # The memory plan has room for the server's own LoRAs.
            num_bytes = num_bytes_in(self._like.dtype, tensors) if lora.loc else 0
            self._make_room(wanted, num_bytes)
            weights = lora_weights.read(self._pipeline, tensors, self._like, is_control=lora.is_control)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            # Errors of the device are not the file's fault; `Device.classify_errors` translates them.
            raise
        except Exception as error:
            if lora.loc is None:
                log.exception("the control LoRA %s cannot be loaded", lora.path)
                raise GenerationFailed(
                    f"The server's control LoRA for {lora.name} cannot be loaded; its log says why."
                ) from error
            raise IncompatibleInput(lora.loc, f"These LoRA weights do not fit this model: {_brief(error)}") from error
        self._loaded[lora.key] = (weights, num_bytes)

    def _make_room(self, wanted: Collection[Key], num_bytes: int) -> None:
        for key, (_, size) in list(self._loaded.items()):
            if sum(size for _, size in self._loaded.values()) + num_bytes <= self._kept_bytes:
                return
            if size and key not in wanted:
                del self._loaded[key]


def _scales(loras: Sequence[LoraAdapter]) -> dict[Key, float]:
    """Return the scale of each LoRA. The scales of a LoRA that is listed twice add up."""
    scales: dict[Key, float] = {}
    for lora in loras:
        scales[lora.key] = scales.get(lora.key, 0.0) + lora.scale
    return scales


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
