"""The table that `flux-server bench` prints: a line for each way in each workload."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figure = Mapping[str, Any]


@dataclass(frozen=True)
class _Column:
    head: str
    width: int
    cell: Callable[[Figure], str]


def _number(name: str, form: str) -> Callable[[Figure], str]:
    return lambda figure: "" if figure[name] is None else format(figure[name], form)


def _psnr(figure: Figure) -> str:
    return lowest_psnr(figure["fidelity"])


def _ssim(figure: Figure) -> str:
    return f"{min(image['ssim'] for image in figure['fidelity']):.4f}" if figure["fidelity"] else ""


_COLUMNS = (
    _Column("plan", 15, lambda figure: str(figure["memory_plan"])),
    _Column("way", 9, lambda figure: str(figure["way"])),
    _Column("size", 11, lambda figure: str(figure["size"])),
    _Column("steps", 7, _number("num_steps", "d")),
    _Column("waiting", 9, _number("num_waiting", "d")),
    _Column("s/image", 9, _number("seconds", ".3f")),
    _Column("ms/step", 9, _number("ms_per_step", ".1f")),
    _Column("x naive", 9, _number("ratio", ".2f")),
    _Column("of matmul", 11, _number("share", ".2f")),
    _Column("skipped", 9, _number("skipped", ".0%")),
    _Column("peak GB", 9, _number("peak_gb", ".1f")),
    _Column("cold s", 8, _number("ready_cold_seconds", ".1f")),
    _Column("warm s", 8, _number("ready_warm_seconds", ".1f")),
)
_FIDELITY = (_Column("PSNR dB", 9, _psnr), _Column("SSIM", 8, _ssim))


def heading(*, with_fidelity: bool) -> str:
    """Return the first line of the table."""
    return "".join(f"{column.head:>{column.width}}" for column in _columns(with_fidelity))


def line(figure: Figure, *, with_fidelity: bool) -> str:
    """Return the line of a figure of the report."""
    return "".join(f"{column.cell(figure):>{column.width}}" for column in _columns(with_fidelity)).rstrip()


def lowest_psnr(fidelity: Sequence[Mapping[str, Any]]) -> str:
    """Return the lowest PSNR of the images in dB, "equal" if all images are equal, or "" if there are no images."""
    ratios = [image["psnr_db"] for image in fidelity if not image["is_equal"]]
    if ratios:
        return f"{min(ratios):.1f}"
    return "equal" if fidelity else ""


def _columns(with_fidelity: bool) -> tuple[_Column, ...]:
    return (*_COLUMNS, *_FIDELITY) if with_fidelity else _COLUMNS
