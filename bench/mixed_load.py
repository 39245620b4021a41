"""The waits of requests that arrive at random, at this server and at a naive server of FastAPI and a lock.

    python -m bench.mixed_load [--weights cost|demo] [--mix drafts] [--requests 300] [--load 0.7] [--seeds 5] [--json F]

One server is measured after the other, with the same requests at the same intervals, once for each seed. The latency of
a request is the time to its response. Its wait is the latency less the time that the request takes alone on the naive
server. The mix `drafts` has many small images, some of the default size and few large ones; `even` has as many small
ones as default ones; `equal` has one size; and `at-once` is eight equal requests sent together.
"""

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.support.subprocess_server import running_server
from models.loading import cpu
from models.loading.specs import DEMO
from tests.support.server_process import ROOT, free_port, serving


@dataclass(frozen=True)
class Kind:
    """One kind of request, and its share of the mix."""

    name: str
    share: float
    width: int
    height: int
    num_steps: int


MIXES = {
    "drafts": (
        Kind("draft", 0.80, 512, 512, 8),
        Kind("default", 0.17, 1024, 768, 28),
        Kind("large", 0.03, 1536, 1536, 50),
    ),
    "even": (Kind("draft", 0.5, 512, 512, 8), Kind("default", 0.5, 1024, 768, 28)),
    "equal": (Kind("default", 1.0, 1024, 768, 28),),
    "at-once": (Kind("default", 1.0, 1024, 768, 28),),
}
AT_ONCE = 8
Arrivals = list[tuple[float, Kind]]


class Naive:
    """The naive server, bench/support/naive_server.py."""

    name = "naive"

    def __init__(self, url: str) -> None:
        self.url = f"{url}/generate"

    def body(self, kind: Kind) -> dict[str, Any]:
        """Return a request with the naive server's fields."""
        return {
            "prompt": "a red apple",
            "width": kind.width,
            "height": kind.height,
            "num_inference_steps": kind.num_steps,
        }


class Ours:
    """This server, through its synchronous route."""

    name = "flux-server"

    def __init__(self, url: str, endpoint: str) -> None:
        self.url = f"{url}/{endpoint}"

    def body(self, kind: Kind) -> dict[str, Any]:
        """Return a request with fal's fields."""
        size = {"width": kind.width, "height": kind.height}
        return {"prompt": "a red apple", "seed": 1, "image_size": size, "num_inference_steps": kind.num_steps}


@contextmanager
def naive(weights: str) -> Iterator[Naive]:
    """Run the naive server until the block ends; yield it once it answers."""
    port = free_port()
    environment = {"FLUX": str(DEMO)} if weights == "demo" else {}
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "bench.support.naive_server:app",
        "--port",
        str(port),
        "--log-level",
        "error",
    ]
    url = f"http://127.0.0.1:{port}"
    with running_server(command, f"{url}/docs", environment):
        yield Naive(url)


@contextmanager
def ours(weights: str) -> Iterator[Ours]:
    """Run this server until the block ends; yield it once it is ready."""
    models_dir = str(ROOT / "bench" / "support" / "cost_models")
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory), "demo", models_dir=models_dir) as server:
        yield Ours(server.ready().url, "fal-ai/flux/dev" if weights == "demo" else "bench/cost")


async def _send(client: httpx.AsyncClient, server: Naive | Ours, kind: Kind) -> float:
    start = time.perf_counter()
    (await client.post(server.url, json=server.body(kind))).raise_for_status()
    return time.perf_counter() - start


async def _seconds_alone(server: Naive | Ours, mix: tuple[Kind, ...]) -> dict[str, float]:
    """Return the seconds that each kind takes on an idle server: the best of three."""
    async with httpx.AsyncClient(timeout=None) as client:
        return {kind.name: min([await _send(client, server, kind) for _ in range(3)]) for kind in mix}


async def _send_arrivals(server: Naive | Ours, arrivals: Arrivals) -> tuple[list[float], float]:
    """Return each request's latency, and the time from the first arrival to the last response, in seconds."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        start = time.perf_counter()

        async def send_at(at: float, kind: Kind) -> float:
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            return await _send(client, server, kind)

        latencies = await asyncio.gather(*(send_at(at, kind) for at, kind in arrivals))
        return list(latencies), time.perf_counter() - start


def _arrivals(mix: tuple[Kind, ...], alone: dict[str, float], load: float, count: int, seed: int) -> Arrivals:
    rng = random.Random(seed)
    mean = sum(kind.share * alone[kind.name] for kind in mix)
    at, arrivals = 0.0, []
    for kind in rng.choices(mix, [kind.share for kind in mix], k=count):
        at += rng.expovariate(load / mean)
        arrivals.append((at, kind))
    return arrivals


def measure(weights: str, mix_name: str, load: float, count: int, seeds: int) -> dict[str, Any]:
    """Measure both servers under the same arrivals, once for each seed; return the figures of all rounds."""
    mix = MIXES[mix_name]
    if mix_name == "at-once":
        load, count = math.inf, AT_ONCE
    with ExitStack() as stack:
        servers: list[Naive | Ours] = [stack.enter_context(naive(weights)), stack.enter_context(ours(weights))]
        # Waits of both servers are relative to the times of the idle naive server.
        alone, _ = [asyncio.run(_seconds_alone(server, mix)) for server in servers]
        rounds = []
        for seed in range(1, seeds + 1):
            arrivals = _arrivals(mix, alone, load, count, seed)
            rounds.append({server.name: _figures(server, arrivals, alone) for server in servers})
    parameters = {"weights": weights, "mix": mix_name, "load": load, "requests": count}
    return {**parameters, "cpu": cpu.describe(), "rounds": rounds}


def _figures(server: Naive | Ours, arrivals: Arrivals, alone: dict[str, float]) -> dict[str, Any]:
    latencies, elapsed = asyncio.run(_send_arrivals(server, arrivals))
    waits = [
        (max(0.0, seconds - alone[kind.name]), kind.name)
        for seconds, (_, kind) in zip(latencies, arrivals, strict=True)
    ]
    names = sorted({name for _, name in waits})
    return {
        "throughput": len(arrivals) / elapsed,
        "mean_latency": statistics.mean(latencies),
        "p95_wait": _p95([wait for wait, _ in waits]),
        "p95_wait_by_kind": {name: _p95([wait for wait, other in waits if other == name]) for name in names},
        "waits": sorted(wait for wait, _ in waits),
    }


def _p95(waits: list[float]) -> float:
    return sorted(waits)[min(len(waits) - 1, int(len(waits) * 0.95))]


def _median(rounds: list[dict[str, Any]], name: str, key: str) -> float:
    return float(statistics.median(each[name][key] for each in rounds))


def _ratio(rounds: list[dict[str, Any]], key: str) -> str:
    """Return ours ÷ naive within each round: the median and the range."""
    results = sorted(each[Ours.name][key] / max(each[Naive.name][key], 1e-9) for each in rounds)
    return f"{statistics.median(results):.2f} ({results[0]:.2f} to {results[-1]:.2f})"


def main() -> None:
    """Print latencies, waits and throughput of both servers, and their ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", choices=("cost", "demo"), default="cost")
    parser.add_argument("--mix", choices=tuple(MIXES), default="drafts")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # With this cost, a draft takes about 20 ms.
    os.environ.setdefault("COST", "0.000125")
    print(f"{cpu.describe()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    results = measure(options.weights, options.mix, options.load, options.requests, options.seeds)
    rounds = results["rounds"]
    print(f"{results['weights']}, {results['mix']}, {results['requests']} requests, median of {len(rounds)} rounds")
    for name in (Naive.name, Ours.name):
        mean, p95, rate = (_median(rounds, name, key) for key in ("mean_latency", "p95_wait", "throughput"))
        print(f"{name:12} latency: mean {mean:.2f} s; wait: p95 {p95:.2f} s; {rate:.2f} images a second")
    for key in ("mean_latency", "p95_wait", "throughput"):
        print(f"{key}, ours ÷ naive: {_ratio(rounds, key)}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
