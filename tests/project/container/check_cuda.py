"""Checks, inside the image for a GPU and without one, that what PyTorch and Triton need to use a GPU is there.

Run by `build.sh` with the Python of the image, from standard input. The only library that may be missing is the one of
NVIDIA's driver, which the container toolkit adds.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.backends.nvidia.driver as nvidia
from triton.runtime import build

DRIVER = "libcuda.so.1"


def missing_libraries() -> set[str]:
    """Return the names of the libraries that PyTorch's own need, directly or not, and that are not installed."""
    libraries = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("*.so*")]
    found = subprocess.run(["ldd", *libraries], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in found.splitlines() if line.endswith("=> not found")}


def build_tritons_library() -> int:
    """Compile and link the library with which Triton calls the driver, against a stub; return its size in bytes."""
    with tempfile.TemporaryDirectory() as directory:
        stub = Path(directory) / DRIVER
        subprocess.run(["gcc", "-shared", "-x", "c", "-o", stub, "/dev/null"], check=True)
        source = str(Path(nvidia.dirname) / "driver.c")
        libraries = [nvidia.libdevice_dir, directory]
        made = build._build("cuda_utils", source, directory, libraries, nvidia.include_dirs, nvidia.libraries, [])
        return Path(made).stat().st_size


def main() -> None:
    """Check everything; exit with a message if something is missing."""
    if not torch.version.cuda:
        sys.exit("PyTorch is not built for CUDA")
    if missing := missing_libraries() - {DRIVER}:
        sys.exit(f"missing libraries: {', '.join(sorted(missing))}")
    size = build_tritons_library()
    print(f"PyTorch {torch.__version__}: no library is missing; Triton {triton.__version__} links {size} bytes")


if __name__ == "__main__":
    main()
