"""The tests of this directory import what only PyTorch for CUDA has, so they are collected only for `-m cuda`."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the test files, unless the tests marked `cuda` are wanted, and only these."""
    is_wanted = config.option.markexpr == "cuda" or not collection_path.name.startswith("test_")
    return None if is_wanted else True
