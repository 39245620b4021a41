"""Several Ray nodes on this machine, and helpers for the runners on them."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.server_process import ROOT, Server, free_port, serving, wait_until_completed

MODELS = ROOT / "tests" / "support" / "faults" / "cluster"
SLOW = "/queue/test/slow"
#: An environment variable that all processes of this test run inherit. Processes of other test runs have other values.
_MARK = "TESTS_OF_PROCESS"
os.environ[_MARK] = str(os.getpid())
#: The head's node id and node type in the autoscaler's configuration.
_HEAD, _HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"


@contextmanager
def ray_cluster(num_gpus: int) -> Iterator[Any]:
    """Start a cluster: a head without a GPU, and `num_gpus` nodes with one GPU each."""
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
def autoscaling_cluster(config: Path, num_gpus: int, *, is_second: bool) -> Iterator[Any]:
    """Start a head without a GPU and Ray's autoscaler, which may start up to `num_gpus` nodes with one GPU each.

    `is_second` selects version 2 of the autoscaler instead of version 1.

    ray.cluster_utils.AutoscalingCluster cannot be used: it begins with `ray stop`, which ends every other Ray on the
    machine, and it reads a file that is not in Ray's wheels.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray._private.services import get_node_ip_address
    from ray.cluster_utils import Cluster

    port = free_port()
    config.write_text(json.dumps(_autoscaling(f"{get_node_ip_address()}:{port}", num_gpus)), encoding="utf-8")
    head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD,
            "RAY_CLOUD_INSTANCE_ID": _HEAD,
            "RAY_NODE_TYPE_NAME": _HEAD_TYPE,
            "RAY_enable_autoscaler_v2": str(int(is_second)),
        }.items():
            environment.setenv(name, value)
        cluster = Cluster(True, head_node_args={**head, "autoscaling_config": str(config), "gcs_server_port": port})
    (monitor,) = cluster.head_node.all_processes["monitor"]
    try:
        yield cluster
    finally:
        # The autoscaler's nodes are its child processes; without a kill they live on for a minute.
        children = list[psutil.Process]()
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(monitor.process.pid).children(recursive=True)
        cluster.shutdown()
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _autoscaling(address: str, num_gpus: int) -> dict[str, Any]:
    """Build the autoscaler's configuration: nodes are local processes and count as idle after six seconds."""
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "here",
        "max_workers": num_gpus,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 100,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{name}_commands": [] for name in commands},
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": _HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": num_gpus},
        },
    }


def num_worker_nodes(cluster: Any) -> int:
    """Count the live nodes, without the head."""
    return sum(bool(node["Alive"]) for node in cluster.global_state.node_table()) - 1


@contextmanager
def serving_on(cluster: Any, data_dir: Path, **settings: str) -> Iterator[Server]:
    """Start a server that generates on this cluster, with the models in tests/support/faults/cluster."""
    options = {"ray": cluster.address, "models_dir": str(MODELS), "max_running": "2", **settings}
    with serving(data_dir, "test/slow=demo", **options) as server:
        yield server


def runner_processes() -> list[psutil.Process]:
    """List the runner processes of this test run's servers, without those of other programs on this machine."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "".join(process.info["cmdline"] or []).startswith("ray::RayRunner") and _is_ours(process)
    ]


def _is_ours(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.environ().get(_MARK) == os.environ[_MARK])
    return False


def request_body(seed: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": "x", "seed": seed, "num_inference_steps": 10, "image_size": "square", **changes}


def client_of(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=120, trust_env=False)


def status_path(response: httpx.Response) -> str:
    return httpx.URL(response.json()["status_url"]).path


def image_digest(client: httpx.Client, status_path: str) -> str:
    """Wait until a request succeeds; return the SHA-256 of its image file."""
    assert wait_until_completed(client, status_path).get("error") is None
    (image,) = client.get(status_path.removesuffix("/status")).json()["images"]
    return hashlib.sha256(client.get(httpx.URL(image["url"]).path).raise_for_status().content).hexdigest()


def gpus(client: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/status.json").json()["gpus"]
    return found


def wait_for_gpu_states(client: httpx.Client, states: list[str]) -> list[dict[str, Any]]:
    """Wait until the GPUs are in these states, in any order; return the GPUs. The wait itself has no time limit."""
    while True:
        current = gpus(client)
        if sorted(gpu["state"] for gpu in current) == sorted(states):
            return current
