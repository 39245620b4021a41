"""The check of LoRA weights from untrusted files: they may change nothing but the layers that they are for."""

import math
from collections.abc import Mapping
from typing import Any

import torch

#: The normalizations whose weights a control LoRA replaces, and the layer that it widens.
NORMS, WIDENED = ("norm_q", "norm_k", "norm_added_q", "norm_added_k"), "x_embedder"
#: The endings of a layer's two keys, after diffusers has converted the keys of the file to its own names.
_MATRICES = (".lora_A.weight", ".lora_B.weight")
#: The same in the text encoder, where diffusers' older names are converted later.
_OLD_MATRICES = tuple(f"lora{part}.{way}.weight" for part in ("", "_linear_layer") for way in ("down", "up"))
#: The ending of a key that only the layers of control LoRAs have.
_BIAS = ".lora_B.bias"


def check(pipeline: Any, tensors: Mapping[str, torch.Tensor], *, is_control: bool) -> None:
    """Check that all tensors belong to a LoRA, and that each pair for the transformer fits a layer.

    Other tensors could overwrite base weights. A control LoRA may have biases and weights of normalizations too, and it
    must take two sets of latents. Raises ValueError.
    """
    for key, tensor in tensors.items():
        # diffusers halves a scale until it is small enough, which for a negative one never ends.
        if "alpha" in key and not (tensor.numel() == 1 and 0 <= float(tensor) < math.inf):
            raise ValueError(f"{key} is not a single number from 0")
        if tensor.numel() == 0:
            raise ValueError(f"{key} is empty")
    # Pass a copy, because the conversion removes entries.
    converted = pipeline.lora_state_dict(dict(tensors))
    of_transformer = {key: weight for key, weight in converted.items() if key.startswith("transformer.")}
    others = [key for key in converted if key not in of_transformer]
    if is_control:
        if others:
            raise ValueError(f"{others[0]} is not of the transformer, which alone a control LoRA may change")
        of_transformer = _without_extras(pipeline.transformer, of_transformer)
    # Any other ending could name a LoRA that is loaded already, and overwrite it.
    wrong = [key for key in of_transformer if not key.endswith(_MATRICES)]
    wrong += [key for key in others if not key.endswith((*_MATRICES, *_OLD_MATRICES))]
    if wrong:
        raise ValueError(f"{wrong[0]} is not one of a LoRA's matrices; new base weights and biases are not supported")
    layers = {key.rpartition(".lora_")[0] for key in of_transformer}
    if is_control and f"transformer.{WIDENED}" not in layers:
        raise ValueError(f"it has no layer {WIDENED}, which would take the control image; use a control LoRA")
    for name in layers:
        pair = [of_transformer.get(name + extension) for extension in _MATRICES]
        _check_pair(pipeline.transformer, name.removeprefix("transformer."), *pair, is_control=is_control)


def _without_extras(transformer: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors without those that only a control LoRA may have. Raises ValueError for a wrong shape."""
    weights = {f"transformer.{name}": weight for name, weight in transformer.named_parameters()}
    rest = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        if key.endswith(_BIAS):
            outer = tensors.get(key.removesuffix(_BIAS) + _MATRICES[1])
            expected = outer.shape[:1] if outer is not None else None
        elif kind == "weight" and layer.rpartition(".")[2] in NORMS:
            expected = weights[key].shape if key in weights else None
        else:
            rest[key] = tensor
            continue
        if expected is None or tensor.shape != expected:
            raise ValueError(f"{key} has the shape {list(tensor.shape)}, which does not fit this model")
    num_layers = sum(key.endswith(_MATRICES[1]) for key in rest)
    # One bias makes peft expect a bias of every layer.
    if sum(key.endswith(_BIAS) for key in tensors) not in (0, num_layers):
        raise ValueError("some of its layers have a bias and others have none, which is not supported")
    return rest


def _check_pair(
    transformer: Any, name: str, inner: torch.Tensor | None, outer: torch.Tensor | None, *, is_control: bool
) -> None:
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
    # diffusers widens the layer for a control LoRA, which takes two sets of latents.
    num_inputs = 2 * layer.in_features if is_control and name == WIDENED else layer.in_features
    # The transformers of Fill, Canny and Depth take more channels than that of [dev]; diffusers adds zeros for these.
    is_narrower = not is_control and name == WIDENED and inner.shape[1] < num_inputs
    if (num_inputs if is_narrower else inner.shape[1], outer.shape[0]) != (num_inputs, layer.out_features):
        actual, expected = f"{inner.shape[1]} to {outer.shape[0]}", f"{num_inputs} to {layer.out_features}"
        raise ValueError(f"{name} maps {actual} features, and the model expects {expected}")
