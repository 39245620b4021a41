"""LoRA weights in the layers of a model: linear layers that add them, put in the place of others for a forward."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, pad

from models.base import GenerationFailed
from models.loading.quantization import linear_layers_of_blocks

#: Ranks in compiled layers are multiples of this number.
RANK_STEP = 16
#: The matrices that `fuse_projections` joins, by the name of the joined one, in their order.
_JOINED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}


@dataclass(frozen=True)
class Pair:
    """The two matrices of a layer: `down` of shape (rank, inputs) and `up` of shape (outputs, rank).

    Control LoRAs may have a bias, of shape (outputs,). The sum of `up` and the bias is multiplied by `scale`.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0

    def scaled(self, scale: float) -> "Pair":
        """Return the pair with the scale that a request gives it."""
        return Pair(self.down, self.up, self.bias, scale * self.scale)

    def widened(self, num_inputs: int) -> "Pair":
        """Return the pair for a layer with more inputs, which have no effect."""
        return Pair(pad(self.down, (0, num_inputs - self.down.shape[1])), self.up, self.bias, self.scale)


class LoraLinear(torch.nn.Module):  # type: ignore[misc]
    """A linear layer that adds LoRAs to the output of another, which it does not change.

    Their matrices are no parameters of the module: hooks that move the parameters of a block between host and device
    must not see them.
    """

    def __init__(self, base: Any, pairs: Sequence[Pair]) -> None:
        super().__init__()
        self.base = base
        self.pairs = tuple(pairs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute as peft does, bit for bit."""
        result: torch.Tensor = self.base(inputs)
        for pair in self.pairs:
            result = result + linear(linear(inputs, pair.down), pair.up, pair.bias) * pair.scale
        return result


class CompiledLoraLinear(torch.nn.Module):  # type: ignore[misc]
    """A `LoraLinear` with exactly one pair, of which no number is a constant for the compiler."""

    def __init__(self, base: Any, pair: Pair) -> None:
        super().__init__()
        self.base = base
        self.down, self.up, self.bias = pair.down, pair.up, pair.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Add the LoRA to the output of the base layer."""
        result: torch.Tensor = self.base(inputs) + linear(linear(inputs, self.down), self.up, self.bias)
        return result


@contextmanager
def installed(model: Any, modules: Mapping[str, Any]) -> Iterator[None]:
    """Put other modules in the places of those of these names while the block runs."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            _put(model, name, module)
        yield
    finally:
        for name, module in before.items():
            _put(model, name, module)


def _put(model: Any, name: str, module: Any) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def with_loras(model: Any, pairs: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    """Return the layers with LoRAs that belong into a model, by name, for pairs by the names of unjoined layers."""
    return {name: LoraLinear(model.get_submodule(name), each) for name, each in _in_layers(model, pairs).items()}


def with_compiled_loras(
    model: Any, pairs: Mapping[str, Sequence[Pair]], like: torch.Tensor, min_rank: int = 1
) -> dict[str, Any]:
    """Return layers as `with_loras` does, in a form that is always the same for the compiler.

    Every layer of a block has one pair. Only the rank differs: it is the same in all layers, and three times as high in
    joined ones. Layers outside of blocks are not compiled.
    """
    of_layers = _in_layers(model, pairs)
    in_blocks = {module: name for name, module in model.named_modules() if name.startswith(_BLOCKS)}
    names = [in_blocks[layer] for layer in linear_layers_of_blocks(model)]
    ranks = {
        name: math.ceil(sum(len(pair.down) for pair in each) / _num_joined(name)) for name, each in of_layers.items()
    }
    rank = -(-max([min_rank, *(ranks.get(name, 0) for name in names)]) // RANK_STEP) * RANK_STEP
    layers: dict[str, Any] = {
        name: LoraLinear(model.get_submodule(name), each) for name, each in of_layers.items() if name not in names
    }
    for name in names:
        layer = model.get_submodule(name)
        pair = _joined(layer, of_layers.get(name, ()), rank * _num_joined(name), like)
        layers[name] = CompiledLoraLinear(layer, pair)
    return layers


_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")


def _num_joined(name: str) -> int:
    return len(_JOINED.get(name.rpartition(".")[2], ("",)))


def _joined(layer: Any, pairs: Sequence[Pair], rank: int, like: torch.Tensor) -> Pair:
    """Return one pair of this rank that adds as much as all these pairs, in the type and on the device of `like`."""
    down = like.new_zeros(rank, layer.in_features)
    up = like.new_zeros(layer.out_features, rank)
    bias = like.new_zeros(layer.out_features)
    start = 0
    for pair in pairs:
        end = start + len(pair.down)
        down[start:end] = pair.down
        up[:, start:end] = pair.up * pair.scale
        if pair.bias is not None:
            bias += pair.bias * pair.scale
        start = end
    return Pair(down, up, bias)


def _in_layers(model: Any, pairs: Mapping[str, Sequence[Pair]]) -> dict[str, list[Pair]]:
    """Return pairs by the names of the model's layers, where query, key and value may be joined to one."""
    found: dict[str, list[Pair]] = {}
    for name, each in pairs.items():
        place = joined_place(model, name)
        if place is None:
            found.setdefault(name, []).extend(each)
        else:
            joined, number, count = place
            found.setdefault(joined, []).extend(_in_part(pair, number, count) for pair in each)
    return found


def joined_place(model: Any, name: str) -> tuple[str, int, int] | None:
    """Return the joined layer of which the layer `name` is a part, its number in it, and how many parts there are.

    Return None for a layer that is not joined.
    """
    parent, _, child = name.rpartition(".")
    for joined, parts in _JOINED.items():
        if child in parts and _has(model, f"{parent}.{joined}"):
            return f"{parent}.{joined}", parts.index(child), len(parts)
    return None


def _has(model: Any, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _in_part(pair: Pair, number: int, count: int) -> Pair:
    """Return a pair that adds to one of `count` equal parts of the output, and nothing to the others."""
    size = len(pair.up)
    before, after = number * size, (count - 1 - number) * size
    bias = None if pair.bias is None else pad(pair.bias, (before, after))
    return Pair(pair.down, pad(pair.up, (0, 0, before, after)), bias, pair.scale)


def with_weight(norm: Any, weight: torch.Tensor) -> Any:
    """Return a copy of a normalization with another weight, which is no parameter, as in `LoraLinear`."""
    changed = copy.copy(norm)
    changed._parameters = {key: value for key, value in norm._parameters.items() if key != "weight"}
    changed.__dict__["weight"] = weight
    return changed


def widened_linear(layer: Any, num_inputs: int, like: torch.Tensor) -> Any:
    """Return a copy of a linear layer for more inputs, which have no effect, in the type and place of `like`.

    Raises GenerationFailed if the layer's weights are quantized in their files.
    """
    # Libraries that quantize have layers or classes of tensors of their own.
    is_plain = type(layer) is torch.nn.Linear and type(layer.weight.data).__module__.partition(".")[0] == "torch"
    if not (is_plain and layer.weight.is_floating_point()):
        raise GenerationFailed("Control LoRAs do not work on these quantized weights.")
    wide = torch.nn.Linear(num_inputs, layer.out_features, device="meta")
    weight = pad(layer.weight.detach().to(like), (0, num_inputs - layer.in_features))
    wide.weight = torch.nn.Parameter(weight, requires_grad=False)
    wide.bias = torch.nn.Parameter(layer.bias.detach().to(like), requires_grad=False)
    return wide
