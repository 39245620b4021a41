"""Directories whose transformer is quantized, against diffusers' own pipeline: the images differ in no pixel value.

Each test needs its library: torchao, SDNQ or optimum-quanto. A test without it is skipped.
"""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from models.base import EngineConfig
from models.flux.loader import load_engine
from models.loading import pipeline
from models.loading.specs import DEMO
from tests.parity.test_single_file import assert_equal_images


def torchao(form: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return diffusers.TorchAoConfig(getattr(quantization, form)())


def sdnq(form: str) -> Any:
    pytest.importorskip("sdnq")
    return diffusers.SDNQConfig(weights_dtype=form, group_size=16)


def quanto(form: str) -> Any:
    pytest.importorskip("optimum.quanto")
    return diffusers.QuantoConfig(weights_dtype=form)


CASES: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "torchao Int8WeightOnlyConfig": (torchao, "Int8WeightOnlyConfig", "bfloat16"),
    "torchao Float8WeightOnlyConfig": (torchao, "Float8WeightOnlyConfig", "bfloat16"),
    "sdnq uint4": (sdnq, "uint4", "bfloat16"),
    "sdnq int8": (sdnq, "int8", "float32"),
    "quanto int8": (quanto, "int8", "float32"),
    "quanto float8": (quanto, "float8", "bfloat16"),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a copy of the demo's weights without a transformer."""
    shutil.copytree(DEMO, tmp_path / "weights", ignore=shutil.ignore_patterns("recipe", "judge", "transformer"))
    return tmp_path / "weights"


# The libraries warn of their own deprecations.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("memory", ["resident", "group-offload"])
@pytest.mark.parametrize("form", CASES)
def test_quantized_directories(form: str, memory: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")
    make, kind, dtype = CASES[form]
    if make is quanto and memory == "group-offload":
        pytest.skip("the weights of quanto cannot be copied block by block")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = make(kind)
    exact = {"dtype": torch.bfloat16, "local_files_only": True}
    quantized = FluxTransformer2DModel.from_pretrained(DEMO / "transformer", quantization_config=config, **exact)
    quantized.save_pretrained(directory / "transformer")
    assert pipeline.quantization_of(directory) == form
    engine = load_engine(EngineConfig(directory, safety_checker="", device="cpu", dtype=dtype, memory=memory))
    expected = FluxPipeline.from_pretrained(directory, dtype=getattr(torch, dtype), local_files_only=True)
    expected.set_progress_bar_config(disable=True)
    assert_equal_images(engine, expected)
