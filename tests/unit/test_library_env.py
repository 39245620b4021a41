"""Tests of the variables that the server sets for PyTorch."""

import os

import pytest

from server.library_env import set_pytorch_variables

OURS = {"GOMP_SPINCOUNT": "1000", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, OURS),
        ({"GOMP_SPINCOUNT": "5", "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, {}),
        ({"OMP_WAIT_POLICY": "passive", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, {}),
    ],
)
def test_variables_of_the_operator_stay(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    set_pytorch_variables()
    assert os.environ == {**given, **expected}
