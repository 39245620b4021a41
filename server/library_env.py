"""Environment variables that libraries read at import; every process sets them before it imports the libraries."""

import os
from collections.abc import Collection

from models.loading.quantized_files import NUNCHAKU_KERNELS


def disable_telemetry_and_warnings() -> None:
    """Turn off the libraries' telemetry, and warnings that the operator cannot act on."""
    os.environ.update(
        HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", DISABLE_TELEMETRY="1", RAY_USAGE_STATS_ENABLED="0"
    )
    # The warnings of these libraries quote prompts or recommend torchvision.
    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
    # SDNQ would compile its functions when the first image is generated, which takes minutes on a CPU.
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")


def allow_kernels(hub_ids: Collection[str]) -> None:
    """Let diffusers load the kernels of Nunchaku from the hub if they are among those that the operator allows."""
    if NUNCHAKU_KERNELS in hub_ids:
        os.environ["DIFFUSERS_TRUST_REMOTE_KERNELS"] = "true"


def set_pytorch_variables() -> None:
    """Set how PyTorch waits on a CPU and takes memory on a GPU. Variables that are set stay as they are.

    By default, OpenMP's threads spin for a long time before they sleep while they wait for each other. If another
    program uses one of two cores, an image then takes more than three times as long. With 1000 spins, an image takes
    less than twice as long, and on an idle machine the time does not change (`bench/threads.py`). PyTorch still uses
    one thread per core; operators change the number with OMP_NUM_THREADS.

    On a GPU, PyTorch keeps the memory of past tensors in blocks of fixed sizes. Images of many sizes would leave more
    and more of it in pieces that are too small to use. Blocks that grow leave fewer of them.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
