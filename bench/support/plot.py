"""Plots of the files that `bench.mixed_load --json` (waits) or `bench.peers --json` (requests a second, p99) writes.

python -m bench.support.plot MIXED.json... IMAGE.svg
python -m bench.support.plot PEERS.json IMAGE.svg
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

_OURS = ("#fdba74", "#f97316", "#c2410c")
_THEIRS = ("#cfcfcf", "#9a9a9a", "#6b6b6b")


def main() -> None:
    """Read the measurements and write the plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("measured", type=Path, nargs="+")
    parser.add_argument("image", type=Path)
    options = parser.parse_args()
    # With a fixed salt, the same numbers give the same bytes.
    mpl.rcParams["svg.hashsalt"] = "flux-server"
    results = [json.loads(path.read_text(encoding="utf-8")) for path in options.measured]
    figure = _peers(results[0]["peers"]) if "peers" in results[0] else _waits(results)
    figure.savefig(options.image, metadata={"Date": None})


def _waits(measurements: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(4.6 * len(measurements), 3.4), layout="constrained")
    for axes, results in zip(figure.subplots(1, len(measurements), squeeze=False)[0], measurements, strict=True):
        for name, colour in (("naive", "#9a9a9a"), ("flux-server", "#c2410c")):
            # Each curve holds the waits of all rounds.
            waits = sorted(wait for each in results["rounds"] for wait in each[name]["waits"])
            axes.step(waits, [100 * (index + 1) / len(waits) for index in range(len(waits))], label=name, color=colour)
        axes.axhline(95, color="#dddddd", linewidth=0.8)
        axes.set_xlabel("wait beyond the time alone, seconds")
        axes.set_ylabel("requests, %")
        load = "" if results["mix"] == "at-once" else f", load {results['load']}"
        axes.set_title(f"{results['weights']}, {results['mix']}{load}", fontsize=10)
        axes.legend(frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _peers(results: dict[str, dict[str, list[dict[str, float]]]]) -> Figure:
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, results, "per_second")
    _bars(right, results, "p99_ms")
    left.set_xlabel("requests a second")
    right.set_xlabel("p99, ms (logarithmic)")
    left.set_yticks(range(len(results)), list(results))
    left.invert_yaxis()
    right.set_xscale("log")
    right.set_xlim(left=0.1)
    clients = next(iter(results.values()))
    shades = [
        Patch(color=shade, label=f"{count} client{'s' * (count != '1')}")
        for shade, count in zip(_THEIRS, clients, strict=False)
    ]
    figure.legend(handles=shades, frameon=False, loc="outside upper right", ncols=len(shades))
    return figure


def _bars(axes: Axes, results: dict[str, dict[str, list[dict[str, float]]]], key: str) -> None:
    """Draw a group of bars for each server, with a bar for each number of clients."""
    for row, (name, by_clients) in enumerate(results.items()):
        shades = _OURS if name.startswith("flux-server") else _THEIRS
        for index, (rounds, shade) in enumerate(zip(by_clients.values(), shades, strict=False)):
            value = statistics.median(figures[key] for figures in rounds)
            bar = axes.barh(row + 0.27 * (index - 1), value, 0.25, color=shade)
            axes.bar_label(bar, fmt="{:,.0f}" if value >= 100 else "{:.3g}", padding=2, fontsize=7)
    # Leave room for the number next to the longest bar.
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
