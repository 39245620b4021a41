"""The device that generates images: its streams, its pace, and the classification of its errors."""

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
#: No larger matrix product is timed after one that took more seconds than this.
_SLOW = 0.2
#: Transformers with more parameters take a CPU minutes a step; the demo's has a thousandth of this.
FULL_SIZE = 1_000_000_000


class Device:
    """A CPU or the GPU. `decode_stream` is the GPU's second stream, which decodes images while steps go on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.decode_stream = torch.cuda.Stream() if name == "cuda" else None
        self._last_step: Any = None

    @property
    def description(self) -> str:
        """The name of the device, for the operator."""
        return torch.cuda.get_device_name() if self.name == "cuda" else cpu.describe()

    def now(self) -> float:
        """Wait until the device has finished its work; return the clock in seconds."""
        if self.name == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Measure the FLOP per second of matrix products: the best of several, of growing size on a CPU."""
        rate = 0.0
        for side in (8192,) * 12 if self.name == "cuda" else (256, 1024, *(2048,) * 6):
            one, other = (torch.randn(side, side, device=self.name, dtype=dtype) for _ in range(2))
            started = self.now()
            one @ other
            seconds = self.now() - started
            rate = max(rate, 2 * side**3 / seconds)
            # Where this type is emulated, the next size would take minutes.
            if self.name == "cpu" and seconds > _SLOW:
                break
        return rate

    def step_description(self, config: Mapping[str, Any], dtype: torch.dtype) -> str:
        """Estimate the least time of a FLUX step at 1024x768: closed-form FLOP over the rate of matrix products."""
        rate, flop = self.matmul_rate(dtype), step_flops(config, 1024 * 768 // 256, NUM_TOKENS)
        seconds, name = flop / rate, devices.type_name(dtype)
        return (
            f"a step at 1024x768 takes {seconds:,.0f} s or more here, an image of 28 steps {28 * seconds / 60:,.0f} min"
            f" ({flop / 1e12:.1f} TFLOP at {rate / 1e12:.4f} TFLOP/s in {name}, plus the time to read from disk)"
        )

    def memory(self) -> tuple[int | None, int | None]:
        """Return bytes in use, by any process, and bytes in total; None for both on a CPU."""
        if self.name == "cpu":
            return None, None
        free, total = torch.cuda.mem_get_info()
        return total - free, total

    def free(self) -> None:
        """Release memory that is only cached."""
        gc.collect()
        if self.name == "cuda":
            torch.cuda.empty_cache()

    def throttle(self) -> Any:
        """Limit the GPU to one step ahead of the running one; otherwise tasks could not be cancelled or overtaken.

        Returns the event recorded after the last launched step; None on a CPU, which does not run ahead.
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
        """Run the block on the GPU's decode stream; with `latents`, only after the `event` of their last step."""
        if self.decode_stream is None:
            yield
            return
        with torch.cuda.stream(self.decode_stream):
            if latents is not None and event is not None:
                self.decode_stream.wait_event(event)
                latents.record_stream(self.decode_stream)
            yield

    def retry_on_oom(self, what: str, first: Callable[[], T], again: Callable[[], T]) -> T:
        """Return the result of `first`; if memory runs out, release cached memory and try `again` once."""
        with suppress(torch.OutOfMemoryError), self.classify_errors(what):
            return first()
        # Free only after the error is handled: its traceback holds on to the tensors of the forward.
        self.free()
        with self.classify_errors(what, is_last_try=True):
            return again()

    @contextmanager
    def classify_errors(self, what: str, *, is_last_try: bool = False) -> Iterator[None]:
        """Classify errors: out of memory, device lost, or an error of the request."""
        try:
            yield
        except RuntimeError as error:
            # Libraries below PyTorch report out of memory only in the message.
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
        """Return whether the device still works: after some errors, it never does again in this process."""
        try:
            if self.name == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


def log_dtype(config: EngineConfig, transformer: Any, device: str) -> None:
    """Log the number type of the weights, and warn of large weights on a CPU."""
    target = Device(device)
    log.info("computing in %s on %s", devices.type_name(transformer.dtype), target.description)
    if device == "cpu" and devices.is_emulated(config, transformer.dtype):
        log.warning(
            "this CPU emulates bfloat16, which is slow; float32 would need twice the weights' size in memory; "
            "--dtype float32 uses it anyway"
        )
    if device == "cpu" and transformer.num_parameters() > FULL_SIZE:
        log.warning("%s; use a GPU", target.step_description(transformer.config, transformer.dtype))
