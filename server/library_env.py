"""What libraries read from the environment before they do anything: set first, in every process that loads them."""

import os


def disable_telemetry_and_warnings() -> None:
    """None reports anything to anybody, or warns of what nobody here can change."""
    os.environ.update(
        HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", DISABLE_TELEMETRY="1", RAY_USAGE_STATS_ENABLED="0"
    )
    # Warnings that repeat prompts, and that ask for torchvision.
    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")


def limit_openmp_spinning() -> None:
    """Let OpenMP's threads sleep while they wait for each other.

    They spin first, long by default: beside one busy core of two, a picture then takes more than three times as long.
    Measured with `bench/threads.py`: with 1000 turns it takes less than twice as long, and alone not longer at all.
    One thread for each core is left as PyTorch has it; OMP_NUM_THREADS and OMP_WAIT_POLICY override both.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
