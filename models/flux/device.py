"""The device that paints: its streams, its pace, and its errors told apart."""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from models.base import DeviceLost, EngineConfig, GenerationFailed
from models.flux.flops import step_flops
from models.flux.prompt_cache import NUM_TOKENS
from models.loading import cpu, devices

log = logging.getLogger(__name__)

T = TypeVar("T")
#: Seconds of a matrix product after which no larger one is tried.
_SLOW = 0.2
#: Parameters of a transformer for which a CPU takes minutes a step; the demo's has a thousandth.
FULL_SIZE = 1_000_000_000


class Device:
    """A CPU, or the GPU; `side` is its second stream, on which pictures are decoded while steps go on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.decode_stream = torch.cuda.Stream() if name == "cuda" else None
        self._last_step: Any = None

    @property
    def description(self) -> str:
        """Its name for people."""
        return torch.cuda.get_device_name() if self.name == "cuda" else cpu.describe()

    def now(self) -> float:
        """Seconds on a clock, once the device has done what it was given."""
        if self.name == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Floating point operations per second of a matrix product: the best of several, of growing size on a CPU."""
        rate = 0.0
        for side in (8192,) * 12 if self.name == "cuda" else (256, 1024, *(2048,) * 6):
            one, other = (torch.randn(side, side, device=self.name, dtype=dtype) for _ in range(2))
            started = self.now()
            one @ other
            seconds = self.now() - started
            rate = max(rate, 2 * side**3 / seconds)
            # Where numbers of this type are emulated, the next size would take minutes.
            if self.name == "cpu" and seconds > _SLOW:
                break
        return rate

    def step_description(self, config: Mapping[str, Any], dtype: torch.dtype) -> str:
        """What a step of FLUX at 1024x768 takes here at least: its closed form over the rate of matrix products."""
        rate, flop = self.matmul_rate(dtype), step_flops(config, 1024 * 768 // 256, NUM_TOKENS)
        seconds, name = flop / rate, devices.type_name(dtype)
        return (
            f"a step at 1024x768 takes {seconds:,.0f} s or more here, an image of 28 steps {28 * seconds / 60:,.0f} min"
            f" ({flop / 1e12:.1f} TFLOP at {rate / 1e12:.4f} TFLOP/s in {name}, beside what the disk takes)"
        )

    def memory(self) -> tuple[int | None, int | None]:
        """Bytes in use, by whatever process, and bytes in all; neither on a CPU."""
        if self.name == "cpu":
            return None, None
        free, total = torch.cuda.mem_get_info()
        return total - free, total

    def free(self) -> None:
        """Give memory that is only cached back."""
        gc.collect()
        if self.name == "cuda":
            torch.cuda.empty_cache()

    def throttle(self) -> Any:
        """Launch one step while the one before runs, and no more: else nothing could be cancelled or overtaken.

        Returns the event behind the step that was launched last; None on a CPU, which does not run ahead.
        """
        if self.name == "cpu":
            return None
        event = torch.cuda.Event()
        event.record()
        if self._last_step is not None:
            self._last_step.synchronize()
        self._last_step = event
        return event

    @contextmanager
    def on_decode_stream(self, latents: torch.Tensor | None = None, event: Any = None) -> Iterator[None]:
        """On a GPU, a stream of its own, beside the steps; for `latents`, behind the `event` of their last step."""
        if self.decode_stream is None:
            yield
            return
        with torch.cuda.stream(self.decode_stream):
            if latents is not None and event is not None:
                self.decode_stream.wait_event(event)
                latents.record_stream(self.decode_stream)
            yield

    def retry_on_oom(self, what: str, first: Callable[[], T], again: Callable[[], T]) -> T:
        """What `first` gives; when memory runs out, what is only cached is given back, and `again` is tried once."""
        with suppress(torch.OutOfMemoryError), self.classify_errors(what):
            return first()
        # Here, not where the error is caught: its traceback would keep all that the forward had on the device.
        self.free()
        with self.classify_errors(what, is_last_try=True):
            return again()

    @contextmanager
    def classify_errors(self, what: str, *, is_last_try: bool = False) -> Iterator[None]:
        """The device's errors, told apart: out of memory, lost for good, and those of the request."""
        try:
            yield
        except RuntimeError as error:
            # Libraries below PyTorch report both in words only.
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
                if not is_last_try:
                    raise torch.OutOfMemoryError(str(error)) from None
                free = devices.free_memory(self.name) / 1e9
                raise GenerationFailed(
                    f"Out of memory: {what} did not fit, also when tried again by itself; {free:.1f} GB are free. "
                    "A smaller picture may fit."
                ) from None
            if isinstance(error, torch.AcceleratorError) or not self._is_alive():
                raise DeviceLost(str(error)) from error
            raise

    def _is_alive(self) -> bool:
        """Whether the device still does anything: after some errors it never does again in this process."""
        try:
            if self.name == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


def log_dtype(config: EngineConfig, transformer: Any, device: str) -> None:
    """Log what the weights are computed in, and warn of large ones on a CPU."""
    where = Device(device)
    log.info("computing in %s on %s", devices.type_name(transformer.dtype), where.description)
    if device == "cpu" and devices.is_emulated(config, transformer.dtype):
        log.warning(
            "this CPU emulates bfloat16, which is slow; float32 would need twice the weights' size in memory, and "
            "--dtype float32 takes it all the same"
        )
    if device == "cpu" and transformer.num_parameters() > FULL_SIZE:
        log.warning("%s; use a GPU", where.step_description(transformer.config, transformer.dtype))
