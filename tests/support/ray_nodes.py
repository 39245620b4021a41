"""Several Ray nodes on this machine, and the runners that live on them."""

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

from tests.support.server_process import ROOT, Server, completed, free_port, serving

MODELS = ROOT / "tests" / "support" / "faults" / "cluster"
SLOW = "/queue/test/slow"
#: All that is started here inherits it.
_MARK = "TESTS_OF_PROCESS"
os.environ[_MARK] = str(os.getpid())
#: The names that the autoscaler knows the head by.
_HEAD, _HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"


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
def autoscaled(config: Path, num_gpus: int, *, is_second: bool) -> Iterator[Any]:
    """A head without a GPU, and Ray's autoscaler, its first or second, which may start so many nodes with one.

    ray.cluster_utils.AutoscalingCluster is not used: it begins with `ray stop`, which ends every other Ray on the
    machine, and reads a file that Ray's wheels lack.
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
        # The autoscaler's nodes are its children, and would live on for a minute.
        started = list[psutil.Process]()
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(monitor.process.pid).children(recursive=True)
        cluster.shutdown()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _autoscaling(address: str, num_gpus: int) -> dict[str, Any]:
    """What the autoscaler is told: machines are processes here, and idle after six seconds."""
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


def num_machines(cluster: Any) -> int:
    """How many nodes there are beside the head."""
    return sum(bool(node["Alive"]) for node in cluster.global_state.node_table()) - 1


@contextmanager
def serving_on(cluster: Any, data_dir: Path, **settings: str) -> Iterator[Server]:
    """A server that paints there, with the models that misbehave."""
    chosen = {"ray": cluster.address, "models_dir": str(MODELS), "max_running": "2", **settings}
    with serving(data_dir, "test/slow=demo", **chosen) as server:
        yield server


def runners() -> list[psutil.Process]:
    """The processes that paint, of whatever server of these tests; others may run beside them."""
    seen = psutil.process_iter(["cmdline"])
    return [
        each for each in seen if "".join(each.info["cmdline"] or []).startswith("ray::RayRunner") and _is_ours(each)
    ]


def _is_ours(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.environ().get(_MARK) == os.environ[_MARK])
    return False


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
