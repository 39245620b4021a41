"""A queue round trip through HTTP over the same picture made by calling diffusers' pipeline, in one process.

    python -m bench.overhead [--rounds 20] [--size 512] [--steps 8]

Both sides alternate; medians of one run. The server's side checks, encodes and stores the picture as well.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from server.app import create_app
from server.serving import _bound
from server.settings import Settings
from tests.serving import completed

PROMPT = "a red apple on a blue table"


@contextmanager
def _served(folder: Path) -> Iterator[tuple[str, Any]]:
    """A server on a thread of this process: its URL and its worker."""
    bound = _bound("127.0.0.1", 0)
    settings = Settings(data_dir=folder, port=bound.getsockname()[1], tls_port=0)
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
    thread.start()
    url = f"http://127.0.0.1:{settings.port}"
    with httpx.Client() as client:
        while client.get(f"{url}/health/ready").status_code != 200:
            time.sleep(0.1)
    yield url, app.state.worker
    server.should_exit = True
    thread.join()


def main() -> None:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    request = {
        "prompt": PROMPT,
        "seed": 1,
        "image_size": {"width": options.size, "height": options.size},
        "num_inference_steps": options.steps,
    }
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    direct, served = [], []
    with tempfile.TemporaryDirectory() as folder, _served(Path(folder)) as (url, worker), httpx.Client() as client:
        (engine,) = worker._engines.values()
        for _ in range(options.rounds + 2):
            direct.append(_direct(engine.pipeline, options.size, options.steps))
            served.append(_round_trip(client, url, request))
    # The first rounds warm both sides up.
    one, other = statistics.median(direct[2:]), statistics.median(served[2:])
    print(f"pipeline {one * 1000:.1f} ms, queue round trip {other * 1000:.1f} ms")
    print(f"ratio {other / one:.3f}; less 10 ms {(other - 0.010) / one:.3f}")


def _direct(pipeline: Any, size: int, steps: int) -> float:
    begun = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(1)
    pipeline(PROMPT, width=size, height=size, num_inference_steps=steps, guidance_scale=3.5, generator=generator)
    return time.perf_counter() - begun


def _round_trip(client: httpx.Client, url: str, request: dict[str, object]) -> float:
    begun = time.perf_counter()
    reply = client.post(f"{url}/queue/fal-ai/flux/dev", json=request).json()
    completed(client, reply["status_url"])
    client.get(reply["response_url"]).raise_for_status()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
