"""Mixed sizes arriving at random, at this server and at the one people write today: who waits how long.

    python -m bench.mixed [--weights cost|demo] [--requests 200] [--load 0.7] [--json FILE]

Both get the same requests at the same moments, one server after the other. A request's wait is what it took beyond
what it takes alone. `drafts` is many small pictures and few large ones; `even` is as many of each.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.program import answering
from models.weights import DEMO
from tests.serving import ROOT, free_port, serving


@dataclass(frozen=True)
class Kind:
    """What some of the clients want."""

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
}


class Naive:
    """bench/naive_server.py."""

    name = "naive"

    def __init__(self, url: str) -> None:
        self.url = f"{url}/generate"

    def body(self, kind: Kind) -> dict[str, Any]:
        """Its own fields."""
        return {
            "prompt": "a red apple",
            "width": kind.width,
            "height": kind.height,
            "num_inference_steps": kind.num_steps,
        }


class Ours:
    """This server, by its synchronous route."""

    name = "flux-server"

    def __init__(self, url: str, endpoint: str) -> None:
        self.url = f"{url}/{endpoint}"

    def body(self, kind: Kind) -> dict[str, Any]:
        """fal's fields."""
        size = {"width": kind.width, "height": kind.height}
        return {"prompt": "a red apple", "seed": 1, "image_size": size, "num_inference_steps": kind.num_steps}


@contextmanager
def naive(weights: str) -> Iterator[Naive]:
    """The naive server, ready."""
    port = free_port()
    environment = {"FLUX": str(DEMO)} if weights == "demo" else {}
    command = [sys.executable, "-m", "uvicorn", "bench.naive_server:app", "--port", str(port), "--log-level", "error"]
    url = f"http://127.0.0.1:{port}"
    with answering(command, f"{url}/docs", environment):
        yield Naive(url)


@contextmanager
def ours(weights: str) -> Iterator[Ours]:
    """This server, ready."""
    models_dir = str(ROOT / "bench" / "models")
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), "demo", models_dir=models_dir) as server:
        yield Ours(server.ready().url, "fal-ai/flux/dev" if weights == "demo" else "bench/cost")


async def _ask(client: httpx.AsyncClient, server: Naive | Ours, kind: Kind) -> float:
    begun = time.perf_counter()
    (await client.post(server.url, json=server.body(kind))).raise_for_status()
    return time.perf_counter() - begun


async def _alone(server: Naive | Ours, mix: tuple[Kind, ...]) -> dict[str, float]:
    """What each kind takes when nobody else is there, in seconds: the best of three."""
    async with httpx.AsyncClient(timeout=None) as client:
        return {kind.name: min([await _ask(client, server, kind) for _ in range(3)]) for kind in mix}


async def _poisson(server: Naive | Ours, arrivals: list[tuple[float, Kind]]) -> tuple[list[float], float]:
    """What each request took, and the time from the first arrival to the last answer."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        begun = time.perf_counter()

        async def one(at: float, kind: Kind) -> float:
            await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
            return await _ask(client, server, kind)

        taken = await asyncio.gather(*(one(at, kind) for at, kind in arrivals))
        return list(taken), time.perf_counter() - begun


def _arrivals(mix: tuple[Kind, ...], alone: dict[str, float], load: float, count: int) -> list[tuple[float, Kind]]:
    chance = random.Random(1)
    mean = sum(kind.share * alone[kind.name] for kind in mix)
    at, found = 0.0, []
    for kind in chance.choices(mix, [kind.share for kind in mix], k=count):
        at += chance.expovariate(load / mean)
        found.append((at, kind))
    return found


def measure(weights: str, mix_name: str, load: float, count: int) -> dict[str, Any]:
    """Both servers under the same arrivals."""
    mix = MIXES[mix_name]
    found: dict[str, Any] = {"weights": weights, "mix": mix_name, "load": load, "requests": count}
    arrivals: list[tuple[float, Kind]] = []
    alone: dict[str, float] = {}
    for opened in (naive, ours):
        with opened(weights) as server:
            if not alone:
                alone = asyncio.run(_alone(server, mix))
                arrivals = _arrivals(mix, alone, load, count)
            else:
                asyncio.run(_alone(server, mix))
            taken, whole = asyncio.run(_poisson(server, arrivals))
        waits = [
            (max(0.0, seconds - alone[kind.name]), kind.name)
            for seconds, (_, kind) in zip(taken, arrivals, strict=True)
        ]
        found[server.name] = {
            "throughput": count / whole,
            **_summary([wait for wait, _ in waits]),
            "by_kind": {kind.name: _summary([wait for wait, name in waits if name == kind.name]) for kind in mix},
            "waits": sorted(wait for wait, _ in waits),
        }
    return found


def _summary(waits: list[float]) -> dict[str, float]:
    if not waits:
        return {}
    ordered = sorted(waits)
    return {
        "mean": statistics.mean(ordered),
        "p50": ordered[len(ordered) // 2],
        "p95": ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))],
    }


def main() -> None:
    """Print waits and throughput of both, and their ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", choices=("cost", "demo"), default="cost")
    parser.add_argument("--mix", choices=tuple(MIXES), default="drafts")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # A draft takes about 20 ms then.
    os.environ.setdefault("COST", "0.000125")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    found = measure(options.weights, options.mix, options.load, options.requests)
    one, other = found["naive"], found["flux-server"]
    for name, server in (("naive", one), ("flux-server", other)):
        kinds = ", ".join(f"{kind} p95 {said['p95']:.2f}" for kind, said in server["by_kind"].items() if said)
        print(
            f"{name:12} waits: mean {server['mean']:.2f}, p50 {server['p50']:.2f}, p95 {server['p95']:.2f} s; "
            f"{server['throughput']:.2f} pictures a second; {kinds}"
        )
    print(
        f"p95 wait, naive over ours: {one['p95'] / other['p95']:.2f}; "
        f"throughput, ours over naive: {other['throughput'] / one['throughput']:.2f}"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
