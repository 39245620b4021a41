"""The cost of the demo weights: loading, a default request, a small request, and memory.

python -m bench.demo_weights [--rounds 7]
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from models.base import EngineConfig
from models.flux.loader import load_engine
from models.loading.specs import DEMO
from tests.support.server_process import serving

REQUESTS: dict[str, dict[str, Any]] = {
    "1024x768, 28 steps (the default)": {},
    "512x512, 8 steps": {"image_size": "square", "num_inference_steps": 8},
}


def main() -> None:
    """Measure everything and print medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory)) as server:
        server.ready()
        client = httpx.Client(base_url=server.url, timeout=120, trust_env=False)
        process = psutil.Process(server.process.pid)
        for name, request in REQUESTS.items():
            print(f"{name}: {_summary([_generation_seconds(client, request, seed) for seed in range(rounds)])}")
        print(f"resident memory after these requests: {process.memory_info().rss / 1e9:.2f} GB")
    print(f"loading the pipeline and its safety checker: {_summary([_load_seconds() for _ in range(rounds)])}")


def _generation_seconds(client: httpx.Client, request: dict[str, Any], seed: int) -> float:
    start = time.perf_counter()
    client.post("/fal-ai/flux/dev", json={"prompt": "a red apple", "seed": seed, **request}).raise_for_status()
    return time.perf_counter() - start


def _load_seconds() -> float:
    start = time.perf_counter()
    load_engine(EngineConfig(DEMO, safety_checker="", device="cpu"))
    return time.perf_counter() - start


def _summary(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s (worst of {len(seconds)}: {max(seconds):.2f} s)"


if __name__ == "__main__":
    main()
