"""The plot of `flux-server bench`: seconds per image of each way, grouped by memory plan, in a panel for each size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"naive": "#9a9a9a", "eager": "#cfcfcf", "none": "#fdba74", "regular": "#f97316", "high": "#c2410c"}
#: Heights in inches, and widths: of a bar, of the title with the legend, and of a panel.
_BAR, _TITLE, _PANEL = 0.26, 1.3, 4.8


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """Draw the figures of a report into a file, .svg or .png. Raises OSError if the file cannot be written."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figures = report["figures"]
    sizes = list(dict.fromkeys(figure["size"] for figure in figures))
    rows = _rows(figures)
    height = _TITLE + _BAR * (max(rows.values()) + 1)
    image = Figure(figsize=(_PANEL * len(sizes) + 1, height), layout="constrained")
    panels = image.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for axes, size in zip(panels, sizes, strict=True):
        _panel(axes, rows, {_key(figure): figure for figure in figures if figure["size"] == size})
        axes.set_title(size, fontsize=10)
    _label_plans(panels[0], rows)
    ways = dict.fromkeys(way for _, way in rows)
    image.legend(
        handles=[Patch(color=_COLOURS[way], label=way) for way in ways],
        frameon=False,
        loc="outside lower center",
        ncols=len(ways),
    )
    steps, waiting = (figures[0][name] for name in ("num_steps", "num_waiting"))
    together = f", {waiting} requests at a time" if waiting > 1 else ""
    image.suptitle(f"{report['weights']}, {steps} steps{together}\n{report['device']}", fontsize=10)
    # With a fixed salt, the same numbers give the same bytes.
    with mpl.rc_context({"svg.hashsalt": "flux-server"}):
        image.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _key(figure: Mapping[str, Any]) -> tuple[str, str]:
    return figure["memory_plan"], figure["way"]


def _rows(figures: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], int]:
    """Return the vertical place of each bar, by memory plan and way, with an empty place between plans."""
    keys = dict.fromkeys(_key(figure) for figure in figures)
    plans = list(dict.fromkeys(plan for plan, _ in keys))
    by_plan = sorted(keys, key=lambda key: plans.index(key[0]))
    return {key: index + plans.index(key[0]) for index, key in enumerate(by_plan)}


def _panel(
    axes: "Axes", rows: Mapping[tuple[str, str], int], by_key: Mapping[tuple[str, str], Mapping[str, Any]]
) -> None:
    for key, figure in by_key.items():
        bar = axes.barh(rows[key], figure["seconds"], 0.85, color=_COLOURS[key[1]])
        axes.bar_label(bar, [_label(figure)], padding=3, fontsize=7)
    # Leave room for the label next to the longest bar.
    axes.margins(x=0.45)
    axes.set_xlabel("seconds per image")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _label(figure: Mapping[str, Any]) -> str:
    seconds = f"{_rounded(figure['seconds'])} s"
    return seconds if figure["ms_per_step"] is None else f"{seconds}, {_rounded(figure['ms_per_step'])} ms a step"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _label_plans(axes: "Axes", rows: Mapping[tuple[str, str], int]) -> None:
    """Write the name of each plan next to the middle of its bars."""
    places: dict[str, list[int]] = {}
    for (plan, _), place in rows.items():
        places.setdefault(plan, []).append(place)
    axes.set_yticks([sum(each) / len(each) for each in places.values()], list(places))
    axes.invert_yaxis()
