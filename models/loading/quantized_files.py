"""Weights that are quantized in their files: which libraries load them, what must be installed, and what is refused.

A component's `config.json` says in `quantization_config` how it is quantized. diffusers and transformers load such
components themselves.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models.loading import hub
from models.loading.hub import BadWeights

#: The repository on the hub whose code multiplies the matrices of Nunchaku (SVDQuant), as diffusers names it.
NUNCHAKU_KERNELS = "rootonchair/nunchaku-lite-kernels"
#: The components whose weights may be quantized.
_COMPONENTS = ("transformer", "text_encoder", "text_encoder_2")
#: The name of a class in a configuration of torchao, which looks names up in its modules.
_CLASS = re.compile(r"[A-Z][A-Za-z0-9]*|torch\.dtype")


@dataclass(frozen=True)
class _Method:
    """A library that quantizes, by its `quant_method`.

    Attributes:
        module: the module that must be installed.
        package: what to install.
        fields: the fields of a configuration that describe the form, of which the first one present is named.
        needs_gpu: whether the library works on a GPU only.
    """

    module: str
    package: str
    fields: tuple[str, ...]
    needs_gpu: bool = False


_METHODS: Mapping[str, _Method] = {
    "torchao": _Method("torchao", "flux-server[quantize]", ("quant_type",)),
    "sdnq": _Method("sdnq", "sdnq", ("weights_dtype",)),
    "quanto": _Method("optimum.quanto", "optimum-quanto", ("weights_dtype", "weights")),
    "bitsandbytes": _Method("bitsandbytes", "bitsandbytes", ("bnb_4bit_quant_type",), needs_gpu=True),
    "nunchaku_lite": _Method("kernels", "kernels", ("svdq_w4a4", "awq_w4a16"), needs_gpu=True),
}


def description(directory: Path) -> str:
    """Return how a component is quantized, such as "torchao Int8WeightOnlyConfig"; "" if it is not."""
    config = _config(directory)
    if not config:
        return ""
    method = _method_name(config)
    if method == "bitsandbytes":
        return f"{method} {'int8' if config.get('load_in_8bit') else config.get('bnb_4bit_quant_type', 'fp4')}"
    fields = _METHODS[method].fields if method in _METHODS else ()
    found = next((config[name] for name in fields if config.get(name)), "")
    if isinstance(found, dict):
        # torchao nests the name of a class, Nunchaku the precision.
        found = found.get("precision") or found.get("default", {}).get("_type", "")
    return f"{method} {str(found)[:50]}".strip()


def check(
    directory: Path, device: str, dtype: str, kernels_allow: Collection[str] = (), without: Collection[str] = ()
) -> None:
    """Check that every quantized component of a pipeline can be loaded, before any is loaded.

    `device` and `dtype` are those of the computation, by PyTorch's names. `kernels_allow` are the repositories on the
    hub whose code the operator allows. Components in `without` are not loaded from the directory. Raises BadWeights,
    and OSError for what this machine lacks.
    """
    for other in (path.parent for path in directory.glob("*/config.json") if path.parent.name not in _COMPONENTS):
        if _config(other):
            raise BadWeights(f"{other} is quantized, which is supported for {', '.join(_COMPONENTS)} only")
    for name in _COMPONENTS:
        if name not in without and (config := _config(directory / name)):
            _check(directory / name, config, device, dtype)
            if _method_name(config) == "nunchaku_lite" and NUNCHAKU_KERNELS not in kernels_allow:
                raise OSError(
                    f"{directory / name} is quantized by Nunchaku (SVDQuant), whose kernels are code from the hub that"
                    f" runs without a check; if you trust it, allow it with --kernels-allow {NUNCHAKU_KERNELS}"
                )


def _check(directory: Path, config: Mapping[str, Any], device: str, dtype: str) -> None:
    path, name = directory / "config.json", _method_name(config)
    method = _METHODS.get(name)
    if method is None:
        raise BadWeights(
            f"{path}: the quant_method {name!r} is not supported; use weights of {', '.join(_METHODS)}, or a GGUF file"
        )
    for kind in _types(config):
        if not isinstance(kind, str) or not _CLASS.fullmatch(kind):
            raise BadWeights(f"{path}: {str(kind)[:50]!r} is not the name of a quantization of torchao")
    if not _is_installed(method.module):
        raise OSError(f"{directory} is quantized by {name}; run pip install '{method.package}'")
    if name == "sdnq":
        # Its import registers it with transformers, which otherwise would ignore how a text encoder is quantized.
        import_module("sdnq")
    if method.needs_gpu and device == "cpu":
        raise OSError(f"{directory} is quantized by {name}, which needs a GPU; use other weights on a CPU")
    if (name, device, dtype, config.get("weights_dtype")) == ("quanto", "cpu", "bfloat16", "int8"):
        # Its products call torch._weight_int8pack_mm with shapes that PyTorch 2.13 does not check.
        raise OSError(f"{directory} is quantized by quanto to int8, which crashes on CPUs in bf16; use --dtype float32")
    if dtype == "float32" and any("Float8" in str(kind) for kind in _types(config)):
        raise OSError(f"{directory} is quantized by torchao to fp8, which is multiplied in bf16; use --dtype bfloat16")


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    config = hub.read_json(path).get("quantization_config") if path.is_file() else None
    if config is not None and not isinstance(config, dict):
        raise BadWeights(f"{path}: quantization_config is {str(config)[:100]}, not an object; {hub.REPLACE}")
    return config or {}


def _method_name(config: Mapping[str, Any]) -> str:
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    return str(config.get("quant_method", ""))[:50]


def _types(config: Mapping[str, Any]) -> list[Any]:
    """Return every `_type` in a configuration, at any depth."""
    found, waiting = [], [config]
    while waiting:
        each: Any = waiting.pop()
        if isinstance(each, dict):
            found += [value for name, value in each.items() if name == "_type"]
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return found


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
