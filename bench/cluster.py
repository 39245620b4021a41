"""The cost and benefit of a Ray cluster, on one machine with logical GPUs, and the capacity of one head.

    python -m bench.cluster [overhead] [kill] [join] [scale] [head] [whole]

No part generates images. `overhead`, `kill`, `join` and `scale` run Ray with logical GPUs, which Ray only counts: their
figures are those of the server and Ray. `head` and `whole` replace Ray by runners that end every job at once: their
figures are those of the head alone.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.support.fake_cluster import NullRayCluster
from bench.support.load_client import Client, load, request
from server.cluster.head import ClusterHead
from server.metrics import Metrics
from server.queue.jobs import State, Submission
from server.queue.notifier import Notifier
from server.queue.queue import Queue
from server.settings import Settings
from server.storage.database import Database
from server.storage.file_store import FileStore
from tests.support.ray_nodes import MODELS, ray_cluster, runner_processes, serving_on
from tests.support.server_process import ROOT, Server, open_gate, serving, wait_until_completed

SMALL = {"prompt": "x", "seed": 1, "num_inference_steps": 1, "image_size": {"width": 64, "height": 64}}


def _client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.ready().url, timeout=120, trust_env=False)


def _path(response: httpx.Response) -> str:
    return httpx.URL(response.raise_for_status().json()["status_url"]).path


def _ready(client: httpx.Client, number: int) -> None:
    while sum(gpu["state"] == "ready" for gpu in client.get("/status.json").json()["gpus"]) < number:
        continue


def overhead(rounds: int = 5, requests: int = 100) -> None:
    """Time a job whose model does nothing, in the server's process and on a Ray runner, alternately."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        in_process_server = stack.enter_context(serving(directory / "own", "test/slow=demo", models_dir=str(MODELS)))
        ray_server = stack.enter_context(
            serving(directory / "ray", "test/slow=demo", models_dir=str(MODELS), ray="local", gpus="1")
        )
        clients = {
            "in process": stack.enter_context(_client(in_process_server)),
            "on Ray": stack.enter_context(_client(ray_server)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in clients}
        for client in clients.values():
            _ready(client, 1)
        for _ in range(rounds):
            for name, client in clients.items():
                for _ in range(requests):
                    start = time.perf_counter()
                    client.post("/test/fatal", json=SMALL).raise_for_status()
                    seconds[name].append(time.perf_counter() - start)
    for name, durations in seconds.items():
        print(f"{name:12} p50 {1000 * statistics.median(durations):6.1f} ms  p99 {_percentile(durations, 99):6.1f} ms")
    extra = statistics.median(seconds["on Ray"]) - statistics.median(seconds["in process"])
    print(f"{'a job on Ray costs':40} {1000 * extra:.1f} ms more (p50)")


def kill(times: int = 10) -> None:
    """Kill a runner with SIGKILL in the middle of a job, and time how long it takes until another runner runs it."""
    durations = []
    with (
        ray_cluster(2) as cluster,
        tempfile.TemporaryDirectory() as name,
        serving_on(cluster, Path(name) / "data") as server,
        _client(server) as client,
    ):
        for number in range(times):
            _ready(client, 2)
            with open_gate(Path(name) / f"gate-{number}") as gate:
                body = {**SMALL, "prompt": str(gate.path), "num_inference_steps": 3}
                status_path = _path(client.post("/queue/test/gate", json=body))
                gate.release(1)
                _wait_for_step(client, status_path, 1)
                runner = max(runner_processes(), key=lambda process: str(gate.path) in _open_files(process))
                start = time.perf_counter()
                runner.kill()
                while client.get(status_path).json()["status"] == "IN_PROGRESS":
                    if any(
                        str(gate.path) in _open_files(each) for each in runner_processes() if each.pid != runner.pid
                    ):
                        break
                gate.release(1)
                _wait_for_step(client, status_path, 1)
                durations.append(time.perf_counter() - start)
                gate.release_all()
                assert wait_until_completed(client, status_path).get("error") is None
    _report("job of a killed runner runs elsewhere", durations)


def _open_files(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error, OSError):
        return [str(each.readlink()) for each in Path(f"/proc/{process.pid}/fd").iterdir()]
    return []


def _wait_for_step(client: httpx.Client, status_path: str, step: int) -> None:
    while f"step {step}/" not in str(client.get(status_path, params={"logs": 1}).json().get("logs")):
        continue


def join(times: int = 3) -> None:
    """Add a node while the only GPU is busy, and time how long it takes until the node has finished a waiting job."""
    durations = []
    for _ in range(times):
        with (
            ray_cluster(1) as cluster,
            tempfile.TemporaryDirectory() as name,
            serving_on(cluster, Path(name) / "data", max_running="1") as server,
            _client(server) as client,
            open_gate(Path(name) / "gate") as gate,
        ):
            _path(client.post("/queue/test/gate", json={**SMALL, "prompt": str(gate.path)}))
            waiting = _path(client.post("/queue/test/slow", json=SMALL))
            cluster.add_node(num_cpus=1, num_gpus=1)
            start = time.perf_counter()
            assert wait_until_completed(client, waiting).get("error") is None
            durations.append(time.perf_counter() - start)
    _report("first job of a new node is done", durations)


def scale(jobs: int = 80) -> None:
    """Compare jobs a second on one GPU and on four, with a model that sleeps 0.2 s an image."""
    jobs_per_second = {}
    body = {**SMALL, "num_inference_steps": 10}
    with ray_cluster(4) as cluster:
        for number in (1, 4):
            with (
                tempfile.TemporaryDirectory() as name,
                serving_on(cluster, Path(name), gpus=str(number)) as server,
                _client(server) as client,
            ):
                _ready(client, number)
                start = time.perf_counter()
                paths = [_path(client.post("/queue/test/slow", json=body)) for _ in range(jobs)]
                for path in paths:
                    assert wait_until_completed(client, path).get("error") is None
                jobs_per_second[number] = jobs / (time.perf_counter() - start)
    for number, each in jobs_per_second.items():
        print(f"{number} GPUs: {each:5.2f} jobs/s")
    print(f"{'four GPUs ÷ one GPU':40} {jobs_per_second[4] / jobs_per_second[1]:.2f}")


# -- the capacity of one head: a real head, with fake runners that finish every job at once


def head(gpus: int = 1000, jobs: int = 20_000, waiting: int = 100_000) -> None:
    """Measure completions a second with `gpus` runners, the head's memory, and the time to look up a position."""
    body = json.dumps({**SMALL, "num_inference_steps": 28})
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        settings = Settings(data_dir=directory, ray="none", gpus=gpus, max_running=1, max_queue_length=1_000_000)
        database, notifier = Database(directory), Notifier()
        queue = Queue(database, notifier, 1_000_000)
        files = FileStore(directory / "files", database)
        before = psutil.Process().memory_info().rss
        submitted = [queue.submit(Submission("test/null", "me", body, "http://here")) for _ in range(jobs)]
        cluster: Any = ClusterHead(settings, queue, files, NullRayCluster(), notifier, Metrics())  # type: ignore[arg-type]
        start = time.perf_counter()
        cluster.start()
        while any(job.state != State.COMPLETED for job in submitted[-gpus:]) or queue.length:
            threading.Event().wait(0.05)
        elapsed = time.perf_counter() - start
        print(f"{f'{gpus} GPUs, {jobs} jobs: completions a second':40} {jobs / elapsed:.0f}")
        growth = (psutil.Process().memory_info().rss - before) / 2**20
        print(f"{'memory growth of the head':40} {growth:.0f} MiB")
        cluster.stop()
        last = [queue.submit(Submission("test/null", "me", body, "http://here")) for _ in range(waiting)][-1]
        start = time.perf_counter()
        for _ in range(1000):
            queue.position(last)
        print(f"{f'a position among {waiting} waiting jobs':40} {1000 * (time.perf_counter() - start):.1f} µs")
        database.close()


class FalClient(Client):
    """A client that submits, polls until the job is done, reads the result, fetches the image, and starts again."""

    def __init__(self, until: float) -> None:
        self.submit = request("POST", "/queue/test/null", json.dumps(SMALL).encode())
        super().__init__(self.submit, lambda: time.monotonic() >= until)
        self.step, self.path, self.num_images = "submit", "", 0

    def next_request(self, body: bytes) -> bytes:
        """Return the request that fal's clients send after this response."""
        if self.step == "submit":
            self.step, self.path = "status", "/queue/test/null/requests/" + json.loads(body)["request_id"]
        elif self.step == "status" and b'"COMPLETED"' in body:
            self.step = "result"
            return request("GET", self.path)
        elif self.step == "result":
            self.step = "image"
            return request("GET", httpx.URL(json.loads(body)["images"][0]["url"]).path)
        elif self.step == "image":
            self.step, self.num_images = "submit", self.num_images + 1
            return self.submit
        return request("GET", f"{self.path}/status")

    def _send(self) -> None:
        # fal's client for Python polls ten times a second.
        if self.step == "status":
            asyncio.get_running_loop().call_later(0.1, super()._send)
        else:
            super()._send()


def whole(gpus: int = 1000, seconds: float = 10) -> None:
    """Measure whole requests over HTTP, from the submit to the image at the client."""
    for clients in (32, 256):
        _measure_whole(gpus, clients, seconds)


def _measure_whole(gpus: int, clients: int, seconds: float) -> None:
    models = ROOT / "bench" / "support" / "fake_cluster_models"
    fal_clients: list[FalClient] = []
    with (
        tempfile.TemporaryDirectory() as name,
        serving(
            Path(name), "test/null=demo", models_dir=str(models), ray="none", gpus=str(gpus), max_running="1"
        ) as server,
    ):
        port = int(server.url.rsplit(":", 1)[1])
        with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client:
            _ready(client, gpus)
        until = time.monotonic() + seconds

        def new_client() -> FalClient:
            fal_clients.append(FalClient(until))
            return fal_clients[-1]

        figures = load(port, clients, new_client)
        assert figures.bad == 0
    images = sum(each.num_images for each in fal_clients)
    print(f"{f'{clients} clients: whole requests a second':40} {images / figures.elapsed:.0f}")
    print(f"{'HTTP requests for each whole request':40} {len(figures.seconds) / images:.1f}")


def _report(description: str, durations: list[float]) -> None:
    print(f"{description:40} after {statistics.median(durations):.2f} s, at most {max(durations):.2f} s")


def _percentile(seconds: list[float], percent: int) -> float:
    return 1000 * statistics.quantiles(seconds, n=100)[percent - 1]


PARTS: dict[str, Callable[[], None]] = {each.__name__: each for each in (overhead, kill, join, scale, head, whole)}


def main() -> None:
    """Run the named parts, or every part if none is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS])
    print(f"load average {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores")
    for name in parser.parse_args().parts or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
