"""Copies of the demo's weights whose transformer is quantized by a library: torchao, SDNQ or optimum-quanto."""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FluxTransformer2DModel

from models.loading.specs import DEMO


@dataclass(frozen=True)
class Form:
    """A form that a library gives weights.

    Attributes:
        module: the module that must be installed.
        config: builds the configuration, with which diffusers quantizes.
        dtype: a type in which a CPU can compute with these weights.
        can_offload: whether the weights can be copied block by block.
    """

    module: str
    config: Callable[[], Any]
    dtype: str = "bfloat16"
    can_offload: bool = True


def _torchao(form: str) -> Form:
    return Form(
        "torchao.quantization", lambda: diffusers.TorchAoConfig(getattr(import_module("torchao.quantization"), form)())
    )


def _sdnq(form: str, dtype: str) -> Form:
    return Form("sdnq", lambda: diffusers.SDNQConfig(weights_dtype=form, group_size=16), dtype)


def _quanto(form: str, dtype: str) -> Form:
    return Form("optimum.quanto", lambda: diffusers.QuantoConfig(weights_dtype=form), dtype, can_offload=False)


#: The forms, by the names that the server gives them.
FORMS = {
    "torchao Int8WeightOnlyConfig": _torchao("Int8WeightOnlyConfig"),
    "torchao Float8WeightOnlyConfig": _torchao("Float8WeightOnlyConfig"),
    "sdnq uint4": _sdnq("uint4", "bfloat16"),
    "sdnq int8": _sdnq("int8", "float32"),
    "quanto int8": _quanto("int8", "float32"),
    "quanto float8": _quanto("float8", "bfloat16"),
}


def write_quantized(directory: Path, form: Form) -> Path:
    """Write a copy of the demo whose transformer has a form; return the directory. Raises ImportError."""
    import_module(form.module)
    shutil.copytree(DEMO, directory, ignore=shutil.ignore_patterns("recipe", "judge", "transformer"))
    with warnings.catch_warnings():
        # The libraries warn of their own deprecations.
        warnings.simplefilter("ignore")
        exact = {"dtype": torch.bfloat16, "local_files_only": True}
        transformer = FluxTransformer2DModel.from_pretrained(
            DEMO / "transformer", quantization_config=form.config(), **exact
        )
        transformer.save_pretrained(directory / "transformer")
    return directory
