"""The time of a queue round trip over HTTP, divided by the time of the same image from diffusers' pipeline.

    python -m bench.overhead [--rounds 20] [--size 512] [--steps 8]

Server and pipeline alternate in one process; the figures are medians of one run. Only the server also checks, encodes
and stores the image.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from models.flux.prompt_cache import count_text_tokens
from server.app import create_app
from server.net.listeners import bind_socket
from server.settings import Settings
from tests.support.server_process import wait_until_completed

PROMPT = "a red apple on a blue table"


@contextmanager
def _running_server(directory: Path) -> Iterator[tuple[str, Any]]:
    """Run a server on another thread; yield its URL and its worker, which the calling thread must run."""
    listener = bind_socket("127.0.0.1", 0)
    settings = Settings(data_dir=directory, port=listener.getsockname()[1], tls_port=0)
    app = create_app(settings)
    worker = app.state.components.backend
    # OpenMP slows down as soon as two threads generate, so the pipeline and the server have to share one thread.
    worker.start = lambda: None
    worker.setup()
    server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    yield f"http://127.0.0.1:{settings.port}", worker
    worker.is_ready = False
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
    direct, round_trips = [], []
    with tempfile.TemporaryDirectory() as directory, _running_server(Path(directory)) as (url, worker):
        engine = worker._engines.get_loaded("fal-ai/flux/dev")
        for _ in range(options.rounds + 2):
            direct.append(_pipeline_seconds(engine.pipeline, options.size, options.steps))
            round_trips.append(_round_trip_seconds(url, worker, request))
    # The first two rounds warm up both sides.
    pipeline, round_trip = statistics.median(direct[2:]), statistics.median(round_trips[2:])
    print(f"pipeline {pipeline * 1000:.1f} ms, queue round trip {round_trip * 1000:.1f} ms")
    print(f"ratio {round_trip / pipeline:.3f}; less 10 ms {(round_trip - 0.010) / pipeline:.3f}")


def _pipeline_seconds(pipeline: Any, size: int, steps: int) -> float:
    start = time.perf_counter()
    pipeline(
        PROMPT,
        width=size,
        height=size,
        num_inference_steps=steps,
        guidance_scale=3.5,
        generator=torch.Generator("cpu").manual_seed(1),
        max_sequence_length=count_text_tokens(pipeline),
    )
    return time.perf_counter() - start


def _round_trip_seconds(url: str, worker: Any, request: dict[str, object]) -> float:
    """Time a request from a client on another thread, while this thread runs the worker."""
    seconds: list[float] = []
    with ThreadPoolExecutor(1) as client:
        pending = client.submit(lambda: seconds.append(_send_request(url, request)))
        pending.add_done_callback(lambda _: worker._notifier.work_available.set())
        while not pending.done():
            if not worker.run_once():
                worker._notifier.work_available.wait()
                worker._notifier.work_available.clear()
        pending.result()
    return seconds[0]


def _send_request(url: str, request: dict[str, object]) -> float:
    with httpx.Client() as client:
        client.get(f"{url}/health")
        start = time.perf_counter()
        reply = client.post(f"{url}/queue/fal-ai/flux/dev", json=request).json()
        wait_until_completed(client, reply["status_url"])
        client.get(reply["response_url"]).raise_for_status()
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
