"""Several Ray nodes on this machine, and the runners that live on them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.serving import ROOT, Server, serving

MODELS = ROOT / "tests" / "faults" / "cluster"


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
