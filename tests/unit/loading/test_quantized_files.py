"""Tests of directories whose configuration says that a component is quantized, without the libraries that load them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from models.base import EngineConfig
from models.loading import memory_plans, quantized_files
from models.loading.pipeline import load_pipeline, quantization_of, sizes_in_memory
from models.loading.quantized_files import NUNCHAKU_KERNELS
from models.loading.specs import DEMO

TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NUNCHAKU = {"quant_method": "nunchaku_lite", "svdq_w4a4": {"precision": "int4", "targets": []}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a copy of the demo's weights."""
    return shutil.copytree(DEMO, tmp_path / "weights", ignore=shutil.ignore_patterns("recipe", "judge", "*.png"))


def quantized(directory: Path, config: Any, component: str = "transformer") -> Path:
    """Say in a component's configuration that it is quantized; return the directory."""
    path = directory / component / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "quantization_config": config}), encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TORCHAO, "torchao Int8WeightOnlyConfig"),
        (NF4, "bitsandbytes nf4"),
        ({"load_in_8bit": True}, "bitsandbytes int8"),
        ({"quant_method": "sdnq", "weights_dtype": "uint4"}, "sdnq uint4"),
        ({"quant_method": "quanto", "weights_dtype": "int8"}, "quanto int8"),
        (NUNCHAKU, "nunchaku_lite int4"),
    ],
)
def test_the_form_is_described(directory: Path, config: Mapping[str, Any], expected: str) -> None:
    assert quantization_of(directory) == ""
    assert quantization_of(quantized(directory, config)) == expected


@pytest.mark.parametrize(
    ("config", "installed", "expected"),
    [
        ({"quant_method": "gptq"}, True, "the quant_method 'gptq' is not supported"),
        ({}, True, None),
        ([], True, "quantization_config is [], not an object"),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "os.system"}}},
            True,
            "'os.system' is not the",
        ),
        ({"quant_method": "torchao", "quant_type": [{"_type": ["X"]}]}, True, "is not the name of a quantization"),
        (TORCHAO, False, "is quantized by torchao; run pip install 'flux-server[quantize]'"),
        ({"quant_method": "sdnq"}, False, "is quantized by sdnq; run pip install 'sdnq'"),
        (NF4, True, "is quantized by bitsandbytes, which needs a GPU"),
        (NUNCHAKU, True, "is quantized by nunchaku_lite, which needs a GPU"),
        (
            {"quant_method": "quanto", "weights_dtype": "int8"},
            True,
            "which crashes on CPUs in bf16; use --dtype float32",
        ),
    ],
)
@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
def test_what_cannot_be_loaded_is_refused_before_loading(
    directory: Path, config: Any, installed: bool, expected: str | None, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_files, "_is_installed", lambda module: installed)
    quantized(directory, config, component)
    if expected is None:
        quantized_files.check(directory, "cpu", "bfloat16")
        return
    with pytest.raises(OSError) as error:
        load_pipeline(EngineConfig(directory, safety_checker="", device="cpu", dtype="bfloat16"))
    assert expected in str(error.value)
    assert str(directory / component) in str(error.value)


def test_fp8_of_torchao_is_multiplied_in_bf16(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_files, "_is_installed", lambda module: True)
    quantized(directory, {"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}})
    with pytest.raises(OSError, match="use --dtype bfloat16"):
        quantized_files.check(directory, "cpu", "float32")
    quantized_files.check(directory, "cpu", "bfloat16")


def test_nunchaku_needs_kernels_that_the_operator_allows(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_files, "_is_installed", lambda module: True)
    quantized(directory, NUNCHAKU)
    with pytest.raises(OSError, match=f"allow it with --kernels-allow {NUNCHAKU_KERNELS}"):
        quantized_files.check(directory, "cuda", "bfloat16")
    quantized_files.check(directory, "cuda", "bfloat16", [NUNCHAKU_KERNELS])
    # A component that a single file gives is not loaded from here.
    quantized_files.check(directory, "cpu", "bfloat16", (), ["transformer"])


def test_quantized_weights_are_not_rounded_again_and_keep_their_size(directory: Path) -> None:
    exact = sizes_in_memory(directory, directory, (), itemsize=4)
    sizes = sizes_in_memory(quantized(directory, NF4), directory, (), itemsize=4)
    assert sizes == {**exact, "transformer": exact["transformer"] // 2}
    target = memory_plans.Target("cuda", quantization=quantization_of(directory))
    usable = [plan.name for plan in memory_plans.PLANS if not plan.problem(target)]
    assert usable == ["resident", "group-offload"]
