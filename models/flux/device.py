"""The device that generates images: its clock, memory, streams and errors."""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from models.base import DeviceLost, EngineConfig, GenerationFailed
from models.flux.flops import step_flops
from models.flux.prompt_cache import FLUX_TEXT_TOKENS
from models.loading import cpu, devices

log = logging.getLogger(__name__)

T = TypeVar("T")
#: After a matrix product that takes more seconds than this on a CPU, no further product is timed.
_SLOW = 0.2
#: A transformer with more parameters takes minutes per step on a CPU. The demo's has 6 million, FLUX.1's 12 billion.
FULL_SIZE = 1_000_000_000


def num_bytes_in(dtype: torch.dtype, tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes that tensors take in a type: those of a file in fp8 or float32 take others than the file."""
    return int(dtype.itemsize * sum(tensor.numel() for tensor in tensors.values()))


class Device:
    """A CPU or the GPU. `decode_stream` is a second stream of the GPU, for decoding while other tasks take steps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.decode_stream = torch.cuda.Stream() if name == "cuda" else None
        self._last_step: Any = None

    @property
    def description(self) -> str:
        """The name of the GPU, or the model and flags of the CPU, for the operator."""
        return torch.cuda.get_device_name() if self.name == "cuda" else cpu.describe()

    def now(self) -> float:
        """Wait until the device has finished its work; return the time in seconds since an arbitrary moment."""
        if self.name == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Measure the FLOP per second of the device: the highest rate of several matrix products."""
        rate = 0.0
        for side in (8192,) * 12 if self.name == "cuda" else (256, 1024, *(2048,) * 6):
            one, other = (torch.randn(side, side, device=self.name, dtype=dtype) for _ in range(2))
            started = self.now()
            one @ other
            seconds = self.now() - started
            rate = max(rate, 2 * side**3 / seconds)
            # On a CPU that emulates this type, the next size would take minutes.
            if self.name == "cpu" and seconds > _SLOW:
                break
        return rate

    def copy_rate(self) -> float:
        """Measure the bytes per second that the GPU copies from pinned host memory: the highest of several copies."""
        host = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()
        seconds = []
        for _ in range(4):
            started = self.now()
            host.to(self.name, non_blocking=True)
            seconds.append(self.now() - started)
        return float(host.nbytes / min(seconds))

    def step_description(self, config: Mapping[str, Any], dtype: torch.dtype) -> str:
        """Describe the least time that a FLUX step at 1024x768 can take: its FLOP divided by the matmul rate."""
        rate, flop = self.matmul_rate(dtype), step_flops(config, 1024 * 768 // 256, FLUX_TEXT_TOKENS)
        seconds, name = flop / rate, devices.type_name(dtype)
        return (
            f"a step at 1024x768 takes at least {seconds:,.0f} s, and an image of 28 steps {28 * seconds / 60:,.0f} min"
            f" ({flop / 1e12:.1f} TFLOP at {rate / 1e12:.4f} TFLOP/s in {name}, plus the time to read from disk)"
        )

    def memory(self) -> tuple[int | None, int | None]:
        """Return the GPU's bytes in use by all processes, and its bytes in total; None for both on a CPU."""
        if self.name == "cpu":
            return None, None
        free, total = torch.cuda.mem_get_info()
        return total - free, total

    def free(self) -> None:
        """Release memory that nothing uses any more but Python or PyTorch still holds."""
        gc.collect()
        if self.name == "cuda":
            torch.cuda.empty_cache()

    def throttle(self) -> Any:
        """Wait until the step before the newest has ended; return an event that marks the end of the newest step.

        Launching a step returns before the GPU has run it. Without the wait, many steps would be launched ahead of
        time, and their tasks could not be cancelled or overtaken. On a CPU, return None: the steps have ended already.
        """
        if self.name == "cpu":
            return None
        # A blocking event lets the thread sleep while it waits, where the default would keep a core busy.
        event = torch.cuda.Event(blocking=True)
        event.record()
        if self._last_step is not None:
            self._last_step.synchronize()
        self._last_step = event
        return event

    @contextmanager
    def on_decode_stream(self, latents: torch.Tensor | None = None, event: Any = None) -> Iterator[None]:
        """Run the block on the GPU's decode stream, after `event`, which marks the last step of `latents`.

        Without latents or event, the block does not wait. On a CPU, the block runs as usual.
        """
        if self.decode_stream is None:
            yield
            return
        with torch.cuda.stream(self.decode_stream):
            if latents is not None and event is not None:
                self.decode_stream.wait_event(event)
                latents.record_stream(self.decode_stream)
            yield

    def retry_on_oom(self, what: str, first: Callable[[], T], again: Callable[[], T]) -> T:
        """Return the result of `first`; if memory runs out, free memory and return the result of `again`.

        Raises the errors of `classify_errors`: GenerationFailed if memory runs out again. `what` names the work.
        """
        with suppress(torch.OutOfMemoryError), self.classify_errors(what):
            return first()
        # Free memory only here: until the error is handled, its traceback keeps the tensors of the forward alive.
        self.free()
        with self.classify_errors(what, is_last_try=True):
            return again()

    @contextmanager
    def classify_errors(self, what: str, *, is_last_try: bool = False) -> Iterator[None]:
        """Translate two kinds of errors of the block, which does the work named `what`. Other errors pass unchanged.

        Out of memory becomes torch.OutOfMemoryError or, on the last try, GenerationFailed. An error after which the
        device does not work any more becomes DeviceLost.
        """
        try:
            yield
        except RuntimeError as error:
            # Some libraries that PyTorch calls say only in the message that memory ran out.
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
                if not is_last_try:
                    raise torch.OutOfMemoryError(str(error)) from None
                free = devices.free_memory(self.name) / 1e9
                raise GenerationFailed(
                    f"Out of memory: {what} did not fit, even when run alone; {free:.1f} GB are free. "
                    "Try a smaller image."
                ) from None
            if isinstance(error, torch.AcceleratorError) or not self._is_alive():
                raise DeviceLost(str(error)) from error
            raise

    def _is_alive(self) -> bool:
        """Return whether the device still works. After some errors, a GPU fails every call of this process."""
        try:
            if self.name == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


def summary(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message, for the operator."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def log_dtype(config: EngineConfig, transformer: Any, device: str) -> None:
    """Log the number type and the device; warn if generation will be slow on a CPU."""
    target = Device(device)
    log.info("computing in %s on %s", devices.type_name(transformer.dtype), target.description)
    if device == "cpu" and config.device == "auto" and torch.version.cuda:
        log.warning("no GPU is used: %s", devices.cuda_problem())
    if device == "cpu" and devices.is_emulated(config, transformer.dtype):
        log.warning(
            "the weights would not fit into memory in float32, so this CPU emulates bfloat16, which is slow; "
            "--dtype float32 loads them in float32 anyway"
        )
    if device == "cpu" and transformer.num_parameters() > FULL_SIZE:
        log.warning("%s; use a GPU", target.step_description(transformer.config, transformer.dtype))
