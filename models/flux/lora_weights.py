"""The reading of LoRA weights from untrusted files: they may change nothing but the layers that they are for."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from torch.nn.functional import pad

from models.flux.lora_layers import Pair, joined_place

#: The normalizations whose weights a control LoRA replaces, and the layer that it widens.
NORMS, WIDENED = ("norm_q", "norm_k", "norm_added_q", "norm_added_k"), "x_embedder"
#: The endings of a layer's two keys, after diffusers has converted the keys of the file to its own names.
_MATRICES = (".lora_A.weight", ".lora_B.weight")
#: The ending of a key that only the layers of control LoRAs have.
_BIAS = ".lora_B.bias"


#: The parts of a pipeline that a LoRA may change.
_MODELS = ("transformer", "text_encoder")


@dataclass
class LoraWeights:
    """The weights of a LoRA, in the type and on the device of the model.

    Attributes:
        pairs: for "transformer" and "text_encoder", the matrices of each layer, by its name.
        norms: the weights that a control LoRA gives to normalizations of the transformer, by the normalization's name.
    """

    pairs: dict[str, dict[str, Pair]] = field(default_factory=lambda: {name: {} for name in _MODELS})
    norms: dict[str, torch.Tensor] = field(default_factory=dict)


def read(pipeline: Any, tensors: Mapping[str, torch.Tensor], like: torch.Tensor, *, is_control: bool) -> LoraWeights:
    """Read the tensors of a file, and check that all of them belong to a LoRA whose layers fit the model.

    Other tensors could overwrite base weights. A control LoRA may have biases and weights of normalizations too, and it
    must take two sets of latents. The weights get the type and the device of `like`. Raises ValueError.
    """
    _check_values(tensors)
    # Pass a copy, because the conversion removes entries.
    converted, alphas = pipeline.lora_state_dict(dict(tensors), return_alphas=True)
    parts = {name: _of(name, converted) for name in _MODELS}
    others = [key for key in converted if not key.startswith(tuple(f"{name}." for name in _MODELS))]
    if is_control and (others := others + list(parts["text_encoder"])):
        raise ValueError(f"{others[0]} is not of the transformer, which alone a control LoRA may change")
    norms = _norms(pipeline.transformer, parts["transformer"]) if is_control else {}
    parts["text_encoder"] = _in_new_names(pipeline.text_encoder, parts["text_encoder"])
    for name, part in parts.items():
        endings = (*_MATRICES, _BIAS) if is_control else _MATRICES
        # Any other ending could name base weights.
        others += [f"{name}.{key}" for key in part if not key.endswith(endings)]
    if others:
        raise ValueError(f"{others[0]} is not one of a LoRA's matrices; new base weights and biases are not supported")
    read = LoraWeights(norms={name: weight.to(like) for name, weight in norms.items()})
    for name, part in parts.items():
        model = getattr(pipeline, name)
        factors = _of(name, {key.replace(".alpha", ""): value for key, value in (alphas or {}).items()})
        factors = {key: float(value) for key, value in factors.items()}
        read.pairs[name] = _pairs(model, part, factors, like, is_control=is_control)
    if is_control and WIDENED not in read.pairs["transformer"]:
        raise ValueError(f"it has no layer {WIDENED}, which would take the control image; use a control LoRA")
    if not any(read.pairs.values()):
        raise ValueError("none of their layers is in this model; use a LoRA that was trained on this model")
    return read


def _check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Check what diffusers does not check when it converts tensors. Raises ValueError."""
    for key, tensor in tensors.items():
        # diffusers halves a scale until it is small enough, which for a negative one never ends.
        if "alpha" in key and not (tensor.numel() == 1 and 0 <= float(tensor) < math.inf):
            raise ValueError(f"{key} is not a single number from 0")
        if tensor.numel() == 0:
            raise ValueError(f"{key} is empty")
        # diffusers ignores the first of these keys, and the image would be another.
        if "dora_scale" in key or "lora_magnitude_vector" in key:
            raise ValueError("it is a DoRA, which is not supported; use a LoRA")


def _of(name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of one part of the pipeline, without its name in their keys."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _in_new_names(text_encoder: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of the text encoder by the names of its layers, from older names of diffusers and transformers."""
    if not tensors:
        return tensors
    converted = convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))
    prefix = "" if hasattr(text_encoder, "text_model") else "text_model."
    return {key.removeprefix(prefix): value for key, value in converted.items()}


def _norms(transformer: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the weights of normalizations from the tensors, and return them by name. Raises ValueError for a shape."""
    found = {}
    for key in list(tensors):
        name, _, kind = key.rpartition(".")
        if kind == "weight" and name.rpartition(".")[2] in NORMS:
            found[name] = tensors.pop(key)
            expected = getattr(_layer(transformer, name), "weight", None)
            if expected is None or found[name].shape != expected.shape:
                raise _misfit(f"transformer.{key}", found[name])
    return found


def _misfit(key: str, tensor: torch.Tensor) -> ValueError:
    return ValueError(f"{key} has the shape {list(tensor.shape)}, which does not fit this model")


def _layer(model: Any, name: str) -> Any:
    """Return the module of this name; None if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _pairs(
    model: Any,
    tensors: Mapping[str, torch.Tensor],
    alphas: Mapping[str, float],
    like: torch.Tensor,
    *,
    is_control: bool,
) -> dict[str, Pair]:
    """Return the matrices of each layer. A matrix that lacks a scale has the most frequent one. Raises ValueError."""
    common = Counter(alphas.values()).most_common(1)
    pairs = {}
    for name in dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors):
        down, up = (tensors.get(name + ending) for ending in _MATRICES)
        bias = tensors.get(name + _BIAS)
        down, up = _check_pair(model, name, down, up, is_control=is_control)
        if bias is not None and bias.shape != up.shape[:1]:
            raise _misfit(f"transformer.{name}{_BIAS}", bias)
        rank = len(down)
        scale = alphas.get(name, common[0][0] if common else rank) / rank
        pairs[name] = Pair(down.to(like), up.to(like), None if bias is None else bias.to(like), scale)
    return pairs


def _check_pair(
    model: Any, name: str, inner: torch.Tensor | None, outer: torch.Tensor | None, *, is_control: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two matrices of the layer `name`, which fit each other and the layer. Raises ValueError."""
    joined, _, count = joined_place(model, name) or (name, 0, 1)
    layer = _layer(model, joined)
    if not isinstance(layer, torch.nn.Linear):
        raise ValueError(f"the model has no linear layer {name}")
    if inner is None or outer is None:
        raise ValueError(f"{name} has one matrix where a LoRA has two")
    if not (inner.dim() == outer.dim() == 2 and inner.shape[0] == outer.shape[1]):
        raise ValueError(
            f"{name} has matrices of {list(inner.shape)} and {list(outer.shape)}, which do not form a pair"
        )
    # The layer is widened for a control LoRA, which takes two sets of latents.
    num_inputs = 2 * layer.in_features if is_control and name == WIDENED else layer.in_features
    # The transformers of Fill, Canny and Depth take more channels than that of [dev], which get zeros.
    if not is_control and name == WIDENED and inner.shape[1] < num_inputs:
        inner = pad(inner, (0, num_inputs - inner.shape[1]))
    num_outputs = layer.out_features // count
    if (inner.shape[1], outer.shape[0]) != (num_inputs, num_outputs):
        actual, expected = f"{inner.shape[1]} to {outer.shape[0]}", f"{num_inputs} to {num_outputs}"
        raise ValueError(f"{name} maps {actual} features, and the model expects {expected}")
    return inner, outer
