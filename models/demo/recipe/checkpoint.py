"""Files that survive a machine that stops without warning: written aside, then renamed."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a file aside, and put it in the place of `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    save(aside)
    with aside.open("rb") as written:
        os.fsync(written.fileno())
    aside.replace(path)


def save(path: Path, content: Any) -> None:
    """Write tensors and plain values."""
    write(path, lambda aside: torch.save(content, aside))


def load(path: Path) -> Any:
    """What `save` wrote, on the CPU; None where there is nothing."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


class Timer:
    """Says when `minutes` have passed since it last said so."""

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self.last = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time again; a yes starts the next wait."""
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


def log(text: str) -> None:
    """One line with the time of day, at once."""
    print(time.strftime("%H:%M:%S"), text, flush=True)
