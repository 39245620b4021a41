"""Checkpoints and log lines. A file is written under a temporary name and then renamed, so a crash cannot damage it."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a temporary file, then rename it to `path`. Create the directory if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    save(aside)
    with aside.open("rb") as written:
        os.fsync(written.fileno())
    aside.replace(path)


def save(path: Path, content: Any) -> None:
    """Write tensors and plain values to a file."""
    write(path, lambda aside: torch.save(content, aside))


def load(path: Path) -> Any:
    """Return what `save` wrote, on the CPU; None if there is no file."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


class Timer:
    """A timer that is due every `minutes`."""

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self.last = time.monotonic()

    def is_due(self) -> bool:
        """Return whether the time has passed; if so, start the next period."""
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


def log(text: str) -> None:
    """Print a line with the time of day, without buffering."""
    print(time.strftime("%H:%M:%S"), text, flush=True)
