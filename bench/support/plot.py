"""Draws what `bench.mixed_load --json` or `bench.peers --json` wrote: waits of requests, or requests a second.

python -m bench.support.plot MIXED.json... PICTURE.svg
python -m bench.support.plot PEERS.json PICTURE.svg
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
    """Write the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("measured", type=Path, nargs="+")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    # The same numbers give the same bytes.
    mpl.rcParams["svg.hashsalt"] = "flux-server"
    found = [json.loads(path.read_text(encoding="utf-8")) for path in options.measured]
    figure = _peers(found[0]["peers"]) if "peers" in found[0] else _waits(found)
    figure.savefig(options.picture, metadata={"Date": None})


def _waits(measured: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(4.6 * len(measured), 3.4), layout="constrained")
    for axes, found in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        for name, colour in (("naive", "#9a9a9a"), ("flux-server", "#c2410c")):
            # All rounds together.
            waits = sorted(wait for each in found["rounds"] for wait in each[name]["waits"])
            axes.step(waits, [100 * (index + 1) / len(waits) for index in range(len(waits))], label=name, color=colour)
        axes.axhline(95, color="#dddddd", linewidth=0.8)
        axes.set_xlabel("wait beyond its own work, seconds")
        axes.set_ylabel("requests, %")
        load = "" if found["mix"] == "at-once" else f", load {found['load']}"
        axes.set_title(f"{found['weights']}, {found['mix']}{load}", fontsize=10)
        axes.legend(frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _peers(found: dict[str, dict[str, list[dict[str, float]]]]) -> Figure:
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, found, "per_second")
    _bars(right, found, "p99_ms")
    left.set_xlabel("requests a second")
    right.set_xlabel("p99, ms (logarithmic)")
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    right.set_xscale("log")
    right.set_xlim(left=0.1)
    clients = next(iter(found.values()))
    shades = [
        Patch(color=shade, label=f"{count} client{'s' * (count != '1')}")
        for shade, count in zip(_THEIRS, clients, strict=False)
    ]
    figure.legend(handles=shades, frameon=False, loc="outside upper right", ncols=len(shades))
    return figure


def _bars(axes: Axes, found: dict[str, dict[str, list[dict[str, float]]]], key: str) -> None:
    """A group of bars for each server, a bar for each number of clients."""
    for row, (name, by_clients) in enumerate(found.items()):
        shades = _OURS if name.startswith("flux-server") else _THEIRS
        for index, (rounds, shade) in enumerate(zip(by_clients.values(), shades, strict=False)):
            value = statistics.median(figures[key] for figures in rounds)
            bar = axes.barh(row + 0.27 * (index - 1), value, 0.25, color=shade)
            axes.bar_label(bar, fmt="{:,.0f}" if value >= 100 else "{:.3g}", padding=2, fontsize=7)
    # Room for the number at the longest bar.
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
