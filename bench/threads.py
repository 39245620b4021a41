"""The time of an image by thread count, spin count and dtype on this CPU, alone and next to one busy core.

    python -m bench.threads [--rounds 3]

Each configuration is a process that calls FluxPipeline on the demo weights; the configurations alternate. The spin
count says how often OpenMP's threads spin while they wait for each other, before they sleep. With 0, they sleep at
once.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from models.loading import cpu

#: Values of GOMP_SPINCOUNT; None keeps libgomp's default.
SPINS = ("0", "1000", "10000", None)
_CHILD = """
import json, sys, time, torch
from diffusers import FluxPipeline
from models.loading.specs import DEMO
pipeline = FluxPipeline.from_pretrained(DEMO, dtype=getattr(torch, sys.argv[1]))
pipeline.set_progress_bar_config(disable=True)
def seconds_of(width, height, steps):
    start = time.perf_counter()
    length = pipeline.tokenizer_2.model_max_length
    pipeline("a red apple", width=width, height=height, num_inference_steps=steps, max_sequence_length=length)
    return time.perf_counter() - start
seconds_of(256, 256, 1)
print(json.dumps([min(seconds_of(512, 512, 8) for _ in range(2)), seconds_of(1024, 768, 28)]))
"""


@contextmanager
def _busy_core() -> Iterator[None]:
    """Keep one core busy with an endless loop."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _measure(dtype: str, threads: int, spin: str | None) -> list[float]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_NUM_THREADS": str(threads)} | ({"GOMP_SPINCOUNT": spin} if spin else {})
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, dtype]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds: list[float] = json.loads(completed.stdout)
    return seconds


def main() -> None:
    """Print a table of medians, in seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", default="bfloat16,float32" if cpu.has_bfloat16() else "float32")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    print(f"{cpu.describe()}, {cores} cores, load average {os.getloadavg()[0]:.1f}")
    configurations = [(1, "0"), *((cores, spin) for spin in SPINS)]
    results: dict[tuple[str, int, str | None, bool], list[list[float]]] = {}
    for _, dtype, (threads, spin), is_busy in itertools.product(
        range(options.rounds), options.dtypes.split(","), configurations, (False, True)
    ):
        if is_busy:
            with _busy_core():
                seconds = _measure(dtype, threads, spin)
        else:
            seconds = _measure(dtype, threads, spin)
        results.setdefault((dtype, threads, spin, is_busy), []).append(seconds)
    print(f"{'type':>10}{'threads':>9}{'spins':>9}{'':>8}{'512x512, 8':>14}{'1024x768, 28':>14}")
    for (dtype, threads, spin, is_busy), rounds in results.items():
        small, default = (statistics.median(each) for each in zip(*rounds, strict=True))
        label = "busy" if is_busy else "alone"
        print(f"{dtype:>10}{threads:>9}{spin or 'default':>9}{label:>8}{small:>14.2f}{default:>14.2f}", flush=True)


if __name__ == "__main__":
    main()
