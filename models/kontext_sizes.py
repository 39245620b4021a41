"""The sizes in pixels that FLUX.1 Kontext [dev] was trained on, and which of them a request asks for."""

from typing import Literal

from pydantic import ValidationInfo
from pydantic_core import PydanticCustomError

from models.image_size import limits_of

ResolutionMode = Literal[
    "auto", "match_input", "1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"
]
#: Width and height, as in diffusers' PREFERRED_KONTEXT_RESOLUTIONS.
TRAINED_SIZES = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
)  # fmt: skip


def nearest(aspect_ratio: float) -> tuple[int, int]:
    """Return the trained width and height nearest to an aspect ratio."""
    _, width, height = min((abs(aspect_ratio - width / height), width, height) for width, height in TRAINED_SIZES)
    return width, height


def named(resolution_mode: str) -> tuple[int, int] | None:
    """Return the trained width and height nearest to an aspect ratio such as "16:9"; None for the other modes."""
    width, _, height = resolution_mode.partition(":")
    return nearest(int(width) / int(height)) if height else None


def check_limits(resolution_mode: str, info: ValidationInfo) -> str:
    """Return the mode if every size that it may give is within the operator's limits, else raise an error for 422."""
    limits = limits_of(info)
    if not limits or resolution_mode == "match_input":
        return resolution_mode
    size = named(resolution_mode)
    for width, height in [size] if size else TRAINED_SIZES:
        if max(width, height) > limits.max_side or width * height > limits.max_pixels:
            raise PydanticCustomError(
                "image_too_large",
                "{mode} may give {width}x{height} pixels, but this server's limits are {max_side} pixels a side and "
                "{max_pixels} in all; use match_input",
                {
                    "mode": resolution_mode,
                    "width": width,
                    "height": height,
                    "max_side": limits.max_side,
                    "max_pixels": limits.max_pixels,
                },
            )
    return resolution_mode
