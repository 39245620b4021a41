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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from server.app import create_app
from server.net.listeners import bind_socket
from server.settings import Settings
from tests.support.server_process import completed

PROMPT = "a red apple on a blue table"


@contextmanager
def _served(folder: Path) -> Iterator[tuple[str, Any]]:
    """A server on a thread of this process: its URL, and its worker, whose turns this thread takes itself."""
    bound = bind_socket("127.0.0.1", 0)
    settings = Settings(data_dir=folder, port=bound.getsockname()[1], tls_port=0)
    app = create_app(settings)
    worker = app.state.components.backend
    # OpenMP slows down as soon as two threads paint, so the pipeline and the server have to share one.
    worker.start = lambda: None
    worker.setup()
    server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
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
    direct, served = [], []
    with tempfile.TemporaryDirectory() as folder, _served(Path(folder)) as (url, worker):
        engine = worker._engines.get_loaded("fal-ai/flux/dev")
        for _ in range(options.rounds + 2):
            direct.append(_direct(engine.pipeline, options.size, options.steps))
            served.append(_round_trip(url, worker, request))
    # The first rounds warm both sides up.
    one, other = statistics.median(direct[2:]), statistics.median(served[2:])
    print(f"pipeline {one * 1000:.1f} ms, queue round trip {other * 1000:.1f} ms")
    print(f"ratio {other / one:.3f}; less 10 ms {(other - 0.010) / one:.3f}")


def _direct(pipeline: Any, size: int, steps: int) -> float:
    begun = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(1)
    pipeline(PROMPT, width=size, height=size, num_inference_steps=steps, guidance_scale=3.5, generator=generator)
    return time.perf_counter() - begun


def _round_trip(url: str, worker: Any, request: dict[str, object]) -> float:
    """A client on a thread of its own, for which this one paints."""
    taken: list[float] = []
    with ThreadPoolExecutor(1) as client:
        asking = client.submit(lambda: taken.append(_ask(url, request)))
        asking.add_done_callback(lambda _: worker._notifier.work_available.set())
        while not asking.done():
            if not worker.run_once():
                worker._notifier.work_available.wait()
                worker._notifier.work_available.clear()
        asking.result()
    return taken[0]


def _ask(url: str, request: dict[str, object]) -> float:
    with httpx.Client() as client:
        client.get(f"{url}/health")
        begun = time.perf_counter()
        reply = client.post(f"{url}/queue/fal-ai/flux/dev", json=request).json()
        completed(client, reply["status_url"])
        client.get(reply["response_url"]).raise_for_status()
        return time.perf_counter() - begun


if __name__ == "__main__":
    main()
