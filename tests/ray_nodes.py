"""Several Ray nodes on this machine, and the runners that live on them."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.serving import ROOT, Server, completed, serving

MODELS = ROOT / "tests" / "faults" / "cluster"
SLOW = "/queue/test/slow"


@contextmanager
def nodes(num_gpus: int) -> Iterator[Any]:
    """A cluster: a head without a GPU, and so many nodes with one."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    try:
        for _ in range(num_gpus):
            cluster.add_node(num_cpus=1, num_gpus=1)
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def serving_on(cluster: Any, data_dir: Path, **settings: str) -> Iterator[Server]:
    """A server that paints there, with the models that misbehave."""
    chosen = {"ray": cluster.address, "models_dir": str(MODELS), "max_running": "2", **settings}
    with serving(data_dir, "test/slow=demo", **chosen) as server:
        yield server


def runners() -> list[psutil.Process]:
    """The processes that paint, of whatever server on this machine."""
    seen = psutil.process_iter(["cmdline"])
    return [process for process in seen if "".join(process.info["cmdline"] or []).startswith("ray::RayRunner")]


def body(seed: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": "x", "seed": seed, "num_inference_steps": 10, "image_size": "square", **changes}


def client_of(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=120, trust_env=False)


def path(answer: httpx.Response) -> str:
    return httpx.URL(answer.json()["status_url"]).path


def digest(client: httpx.Client, status_path: str) -> str:
    """Wait for a request to end well; what its picture's bytes come to."""
    assert completed(client, status_path).get("error") is None
    (image,) = client.get(status_path.removesuffix("/status")).json()["images"]
    return hashlib.sha256(client.get(httpx.URL(image["url"]).path).raise_for_status().content).hexdigest()


def gpus(client: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/status.json").json()["gpus"]
    return found


def until(client: httpx.Client, states: list[str]) -> list[dict[str, Any]]:
    """Wait until the GPUs are in these states; the test's own time limit ends it."""
    while True:
        seen = gpus(client)
        if sorted(gpu["state"] for gpu in seen) == sorted(states):
            return seen
