"""Durable disk writes: files that survive a power cut, and writers that wait for disk space."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from server.errors import DiskFull

#: The pause between two tries on a full disk, in seconds.
RETRY_SECONDS = 1.0


def sync_directory(directory: Path) -> None:
    """Write a directory's new file names to the disk, so that they survive a power cut. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def wait_for_room(error: DiskFull, log: logging.Logger, wait: Callable[[float], object]) -> None:
    """Log that the disk is full, and call `wait` with RETRY_SECONDS, after which the caller should try again."""
    log.error("%s. Nothing is lost; trying again every second", error)
    wait(RETRY_SECONDS)
