"""Durable disk writes: files that survive a power cut, and writers that wait for disk space."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from server.errors import DiskFull

RETRY_SECONDS = 1.0


def sync_directory(directory: Path) -> None:
    """Make new names in a directory survive a power cut. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def wait_for_room(error: DiskFull, log: logging.Logger, wait: Callable[[float], object]) -> None:
    """Log that the disk is full, and wait before the next try."""
    log.error("%s; nothing is lost, trying again every second", error)
    wait(RETRY_SECONDS)
