"""Tests of the plot of `flux-server bench`: every bar has its label, and a missing bar leaves the others in place."""

from pathlib import Path
from typing import Any

from server.cli.bench_plot import draw


def figure(plan: str, way: str, size: str, seconds: float, ms_per_step: float | None) -> dict[str, Any]:
    return {
        "memory_plan": plan,
        "way": way,
        "size": size,
        "num_steps": 28,
        "num_waiting": 2,
        "seconds": seconds,
        "ms_per_step": ms_per_step,
    }


def test_each_bar_has_its_figures(tmp_path: Path) -> None:
    """In the second size, one way of the first plan failed."""
    figures = [
        figure("resident", "naive", "64x64", 4.97, None),
        figure("resident", "high", "64x64", 1.316, 47.04),
        figure("resident", "naive", "96x96", 9.1, None),
        figure("group-offload", "naive", "64x64", 26.8, None),
        figure("group-offload", "none", "64x64", 34.2, 1220.4),
        figure("group-offload", "none", "96x96", 120.6, 4321.0),
    ]
    report = {"weights": "demo", "device": "A GPU", "figures": figures}
    for path in (tmp_path / "one.svg", tmp_path / "two.svg"):
        draw(path, report)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    svg = (tmp_path / "one.svg").read_text()
    # Matplotlib draws text as shapes, and repeats it in comments.
    for label in (
        *("4.97 s", "1.32 s, 47 ms a step", "9.1 s", "26.8 s", "34.2 s, 1,220 ms a step", "121 s, 4,321 ms a step"),
        *("resident", "group-offload", "naive", "none", "high", "demo, 28 steps, 2 requests at a time"),
    ):
        assert svg.count(f"<!-- {label} -->") == 1
