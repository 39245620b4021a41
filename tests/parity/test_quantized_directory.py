"""Directories whose transformer is quantized, against diffusers' own pipeline: the images differ in no pixel value.

Each test needs its library: torchao, SDNQ or optimum-quanto. A test without it is skipped.
"""

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from models.base import EngineConfig
from models.flux.loader import load_engine
from models.loading import pipeline
from tests.parity.test_single_file import assert_equal_images
from tests.support.quantized_directories import FORMS, write_quantized


# The libraries warn of their own deprecations.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("memory", ["resident", "group-offload"])
@pytest.mark.parametrize("name", FORMS)
def test_quantized_directories(name: str, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS[name]
    pytest.importorskip(form.module)
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")
    if memory == "group-offload" and not form.can_offload:
        pytest.skip("these weights cannot be copied block by block")
    directory = write_quantized(tmp_path / "weights", form)
    assert pipeline.quantization_of(directory) == name
    engine = load_engine(EngineConfig(directory, safety_checker="", device="cpu", dtype=form.dtype, memory=memory))
    expected = FluxPipeline.from_pretrained(directory, dtype=getattr(torch, form.dtype), local_files_only=True)
    expected.set_progress_bar_config(disable=True)
    assert_equal_images(engine, expected)
