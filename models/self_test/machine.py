"""Tests of the machine: driver, memory, the directory of compiled code, and the compiler."""

import ctypes
import os
import shutil

import torch

from models.loading import cpu, devices
from models.self_test.trials import Failed, Skipped, Subject, Trial, need_gpu

#: Bytes that the other tests take on a GPU.
_NEEDED = 3 * 10**9
#: The least compute capability with bfloat16.
_BFLOAT16 = (8, 0)


def _driver(subject: Subject) -> str:
    if subject.device == "cpu":
        raise Skipped(f"on a CPU, {cpu.describe()}")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < _BFLOAT16:
        raise Failed(f"{torch.cuda.get_device_name()} has compute capability {major}.{minor} and no bfloat16")
    # PyTorch has no public name for the driver's version.
    version = torch._C._cuda_getDriverVersion()
    return (
        f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}; PyTorch {torch.__version__} for CUDA"
        f" {torch.version.cuda}; the driver supports CUDA {version // 1000}.{version % 1000 // 10}"
    )


def _memory(subject: Subject) -> str:
    free = devices.free_memory(subject.device)
    message = f"{free / 1e9:.1f} GB free"
    if subject.device == "cuda" and free < _NEEDED:
        raise Failed(f"{message}, and this test needs {_NEEDED / 1e9:.0f} GB; end other programs on the GPU")
    return message


def _libcuda(subject: Subject) -> str:
    need_gpu(subject)
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Failed(f"the driver's library cannot be loaded: {error}") from error
    return "libcuda.so.1 can be loaded"


def _directory(subject: Subject) -> str:
    if subject.directory is None:
        raise Skipped("on a CPU nothing is compiled")
    subject.directory.mkdir(parents=True, exist_ok=True)
    if not os.access(subject.directory, os.W_OK):
        raise Failed(f"{subject.directory} cannot be written")
    if os.statvfs(subject.directory).f_flag & os.ST_NOEXEC:
        raise Failed(f"{subject.directory} is mounted with noexec, so compiled code in it cannot run; use another disk")
    return f"{subject.directory} can hold programs"


def _compiler(subject: Subject) -> str:
    need_gpu(subject, "nothing is compiled there")
    names = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise Failed("there is no C compiler, which Triton needs; install gcc")
    return found


TRIALS = (
    Trial("driver", _driver),
    Trial("memory", _memory),
    Trial("driver library", _libcuda),
    Trial("directory of compiled code", _directory),
    Trial("C compiler", _compiler),
)
