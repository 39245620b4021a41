"""Environment variables that libraries read at import; every process sets them before it imports the libraries."""

import os


def disable_telemetry_and_warnings() -> None:
    """Turn off the libraries' telemetry, and warnings that the operator cannot act on."""
    os.environ.update(
        HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", DISABLE_TELEMETRY="1", RAY_USAGE_STATS_ENABLED="0"
    )
    # The warnings of these libraries quote prompts or recommend torchvision.
    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")


def limit_openmp_spinning() -> None:
    """Let OpenMP's threads sleep soon while they wait for each other.

    By default, the threads spin for a long time before they sleep. If another program uses one of two cores, an image
    then takes more than three times as long. With 1000 spins, an image takes less than twice as long, and on an idle
    machine the time does not change (`bench/threads.py`). PyTorch still uses one thread per core. Operators change the
    number of threads with OMP_NUM_THREADS, and the spinning with OMP_WAIT_POLICY or GOMP_SPINCOUNT.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
