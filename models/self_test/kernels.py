"""Tests of computations on the device against the same in float32, and of compiled blocks against uncompiled ones."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from models.flux import acceleration, compilation
from models.flux.acceleration import Tier
from models.flux.device import Device
from models.flux.prompt_cache import FLUX_TEXT_TOKENS
from models.flux.verdict import FP8_TEST
from models.image_size import PRESETS
from models.loading import fp8
from models.loading.devices import dtype_for
from models.self_test.trials import Failed, Skipped, Subject, Trial, need_gpu

#: The numbers of image and text tokens together, of 1024x1024 and of 1024x576; fewer on a CPU.
_TOKENS = {"cuda": (4608, 2816), "cpu": (320, 96)}
_HEADS, _HEAD_WIDTH = 24, 128
#: The largest accepted difference, as a share of the mean size of the values: by rounding to bfloat16, and to fp8.
_BFLOAT16_BOUND, _FP8_BOUND = 0.02, 0.15


def _share(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the mean difference as a share of the mean size of `expected`; infinity if `found` is not finite."""
    if not torch.isfinite(found).all():
        return float("inf")
    expected = expected.float()
    return float((found.float() - expected).abs().mean() / expected.abs().mean())


def _check(share: float, bound: float) -> str:
    if not share <= bound:
        raise Failed(f"the results differ by {share:.2%}, more than {bound:.0%}")
    return f"the results differ by {share:.2%}"


def _random(subject: Subject, *shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator).to(subject.device, dtype_for("auto", subject.device))


def _product(subject: Subject) -> str:
    one, other = _random(subject, 512, 768), _random(subject, 768, 512)
    return _check(_share((one @ other).cpu(), one.cpu().float() @ other.cpu().float()), _BFLOAT16_BOUND)


def _attention(backend: str) -> Callable[[Subject], str]:
    def test(subject: Subject) -> str:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        if backend != "native":
            need_gpu(subject)
            if not compilation.has_faster_attention():
                raise Skipped(f"for {torch.cuda.get_device_name()}, no attention is faster than PyTorch's")
        messages = []
        for num_tokens in _TOKENS[subject.device]:
            query, key, value = (_random(subject, 1, num_tokens, _HEADS, _HEAD_WIDTH, seed=seed) for seed in range(3))
            now = Device(subject.device).now
            dispatch_attention_fn(query, key, value, backend=backend)
            started = now()
            found = dispatch_attention_fn(query, key, value, backend=backend)
            seconds = now() - started
            heads_first = (each.float().transpose(1, 2) for each in (query, key, value))
            expected = functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
            messages.append(f"{num_tokens} tokens in {seconds * 1000:.1f} ms: {_check(_share(found, expected), 0.05)}")
        return "; ".join(messages)

    return test


def _kernel(subject: Subject) -> str:
    need_gpu(subject, "nothing is compiled there")
    values = _random(subject, 4096, 256)

    def compute(numbers: torch.Tensor) -> torch.Tensor:
        return functional.gelu(numbers) * 2 + 1

    started = time.perf_counter()
    found = torch.compile(compute)(values)
    return f"{_check(_share(found, compute(values)), _BFLOAT16_BOUND)}; {time.perf_counter() - started:.0f} s"


def _blocks(way: str) -> Callable[[Subject], str]:
    def test(subject: Subject) -> str:
        need_gpu(subject, "nothing is compiled there")
        if way == acceleration.FASTEST and not compilation.has_faster_attention():
            raise Skipped(f"for {torch.cuda.get_device_name()}, no attention is faster than PyTorch's")
        transformer = two_blocks(subject)
        compiled = compilation.clone_sharing_weights(transformer)
        if way == acceleration.FASTEST:
            compilation.choose_attention(compiled)
        return compare(subject, transformer, compilation.compile_blocks(compiled), _BFLOAT16_BOUND)

    return test


def _fp8(subject: Subject) -> str:
    need_gpu(subject)
    transformer = two_blocks(subject)
    if reason := compilation.fp8_copy_unavailable_reason(transformer):
        raise Skipped(reason)
    quantized = compilation.clone_sharing_weights(transformer)
    fp8.quantize(quantized)
    return compare(subject, transformer, compilation.compile_blocks(quantized), _FP8_BOUND)


def two_blocks(subject: Subject) -> Any:
    """Build a transformer of one joint and one single block in FLUX.1's widths; its random weights take a gigabyte."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype_for("auto", subject.device))
    try:
        with torch.device(subject.device):
            return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).eval()
    finally:
        torch.set_default_dtype(before)


def compare(subject: Subject, transformer: Any, compiled: Any, bound: float) -> str:
    """Warm up a compiled transformer, and compare it with the uncompiled one at all presets, without compiling again.

    Returns a message with the largest difference and the compilation time. Raises Failed if a difference exceeds
    `bound`.
    """
    dtype = dtype_for("auto", subject.device)
    started = time.perf_counter()
    Tier("none", compiled, shares_forwards=True).warm_up(subject.device, dtype, FLUX_TEXT_TOKENS)
    seconds = time.perf_counter() - started
    shares = []
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for width, height in PRESETS.values():
            sizes = (1, width * height // 256, FLUX_TEXT_TOKENS)
            inputs = acceleration.random_inputs(transformer.config, sizes, subject.device, dtype)
            shares.append(_share(compiled(**inputs)[0], transformer(**inputs)[0]))
    return f"{_check(max(shares), bound)} at most over {len(shares)} sizes; compiled in {seconds:.0f} s"


TRIALS = (
    Trial("matrix product", _product),
    Trial("PyTorch's attention", _attention("native")),
    Trial("cuDNN's attention", _attention("_native_cudnn")),
    Trial("compiled kernel", _kernel),
    Trial(f"blocks {acceleration.FASTEST}", _blocks(acceleration.FASTEST)),
    Trial(f"blocks {acceleration.COMPILED}", _blocks(acceleration.COMPILED)),
    Trial(FP8_TEST, _fp8),
)
