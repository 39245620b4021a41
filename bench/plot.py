"""Draw what `bench.mixed --json` wrote: how many requests waited no longer than so.

python -m bench.plot MIXED.json PICTURE.svg
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("measured", type=Path, nargs="+")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    # The same numbers give the same bytes.
    mpl.rcParams["svg.hashsalt"] = "flux-server"
    figure = Figure(figsize=(4.6 * len(options.measured), 3.4), layout="constrained")
    for axes, path in zip(figure.subplots(1, len(options.measured), squeeze=False)[0], options.measured, strict=True):
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, colour in (("naive", "#9a9a9a"), ("flux-server", "#c2410c")):
            waits = found[name]["waits"]
            axes.step(waits, [100 * (index + 1) / len(waits) for index in range(len(waits))], label=name, color=colour)
        axes.axhline(95, color="#dddddd", linewidth=0.8)
        axes.set_xlabel("wait beyond its own work, seconds")
        axes.set_ylabel("requests, %")
        axes.set_title(f"{found['weights']}, {found['mix']}, load {found['load']}", fontsize=10)
        axes.legend(frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
