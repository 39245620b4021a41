"""The benchmark of one memory plan: the job of a process, and the results that the process sends back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.base import EngineConfig


@dataclass(frozen=True)
class Workload:
    """The workload to measure: a size in pixels, a number of steps, and how many requests run at the same time."""

    width: int
    height: int
    num_steps: int
    num_waiting: int = 1

    @property
    def size(self) -> str:
        """Width and height in pixels, such as "1024x768"."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Job:
    """The job of one process.

    Attributes:
        config: the weights, the device, the memory plan, and the directory of compiled code.
        shape: the shape of random weights, which replace those of `config`; empty for the weights of `config`.
        workloads: the workloads to measure.
        num_rounds: the number of rounds whose medians are taken.
        prompts: the prompts of the compared images; the first one is also the prompt of the measured images.
        references: the directory of the images to compare with; None to compare no images.
        cap_gb: the maximum GPU memory to use, in 10**9 bytes; 0 for no limit.
        is_cold: whether the directory of compiled code is empty. If the engine compiles code, only its start is then
            measured, and a second process measures the workloads.
    """

    config: EngineConfig
    shape: str
    workloads: Sequence[Workload]
    num_rounds: int
    prompts: Sequence[str]
    references: Path | None = None
    cap_gb: float = 0
    is_cold: bool = True


@dataclass(frozen=True)
class Start:
    """The start of an engine.

    Attributes:
        machine: the device and the versions of the libraries, by name.
        memory_plan: the name of the memory plan.
        dtype: the number type of the computation, by PyTorch's name.
        ready_seconds: for each way to generate, the seconds from the start of loading until it could generate.
        is_compiled: whether the engine runs compiled code.
        unavailable: the tiers, and the ways to run them, that do not work on this device, each with the reason.
        matmul_tflop_per_second: the device's matmul rate; None if only the start is measured.
        eager_difference: the largest difference of a pixel value, 0 to 255, between the images of "naive" and "eager"
            in the smallest workload; None if these are not measured, or failed.
    """

    machine: Mapping[str, Any]
    memory_plan: str
    dtype: str
    ready_seconds: Mapping[str, float]
    is_compiled: bool = False
    unavailable: Sequence[str] = ()
    matmul_tflop_per_second: float | None = None
    eager_difference: int | None = None


@dataclass(frozen=True)
class ImageFidelity:
    """The fidelity of an image to the image of the tier "none" for the same prompt and seed.

    Attributes:
        prompt: the prompt of both images.
        is_equal: whether all pixels are equal.
        psnr_db: the peak signal-to-noise ratio in dB; None for equal images, whose ratio is infinite.
        ssim: the structural similarity; 1 for equal images.
    """

    prompt: str
    is_equal: bool
    psnr_db: float | None
    ssim: float


@dataclass(frozen=True)
class Measurement:
    """The speed of one way to run a workload, as medians over the rounds.

    Attributes:
        way: "naive" calls FluxPipeline, "eager" is the engine with the same kernels, and others are the engine's tiers.
        size: width and height in pixels, such as "1024x768".
        seconds: seconds per image, for text encoding, steps and decoding, without loading.
        ms_per_step: milliseconds per step and image, without text encoding and decoding; those of "naive" without its
            first step, and None if that is the only one.
        ratio: the speed as a multiple of the speed of "naive"; None if "naive" failed or is not measured.
        share: FLOP per second of the steps as a share of the device's matmul rate. The FLOP are those of steps that
            skip no block. None without `ms_per_step`.
        skipped: the share of steps that skipped blocks; None for ways that skip no blocks.
        peak_gb: peak device memory in 10**9 bytes, including the weights of all tiers; None on a CPU.
        fidelity: the fidelity of an image for each prompt; empty if no images are compared.
    """

    way: str
    size: str
    num_steps: int
    num_waiting: int
    seconds: float
    ms_per_step: float | None
    ratio: float | None
    share: float | None
    skipped: float | None
    peak_gb: float | None
    fidelity: Sequence[ImageFidelity] = ()


@dataclass(frozen=True)
class Problem:
    """A way that failed in a workload, so that it has no measurement or no fidelity there; with the reason."""

    way: str
    size: str
    reason: str
