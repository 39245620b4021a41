"""What a Ray cluster costs and gives, on one machine with GPUs that are none, and what one head can hold.

    python -m bench.cluster [overhead] [kill] [join] [scale] [head] [whole]

The GPUs are logical ones, the models sleep or do nothing: these are figures of the server and of Ray, not of painting.
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
from tests.support.ray_nodes import MODELS, nodes, runners, serving_on
from tests.support.server_process import ROOT, Server, completed, gated, serving

SMALL = {"prompt": "x", "seed": 1, "num_inference_steps": 1, "image_size": {"width": 64, "height": 64}}


def _client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.ready().url, timeout=120, trust_env=False)


def _path(answer: httpx.Response) -> str:
    return httpx.URL(answer.raise_for_status().json()["status_url"]).path


def _ready(client: httpx.Client, number: int) -> None:
    while sum(gpu["state"] == "ready" for gpu in client.get("/status.json").json()["gpus"]) < number:
        continue


def overhead(rounds: int = 5, requests: int = 100) -> None:
    """A job that costs nothing, in the server's own process and on a runner of Ray's, in turns."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        own = stack.enter_context(serving(folder / "own", "test/slow=demo", models_dir=str(MODELS)))
        rays = stack.enter_context(
            serving(folder / "ray", "test/slow=demo", models_dir=str(MODELS), ray="local", gpus="1")
        )
        clients = {"in process": stack.enter_context(_client(own)), "on Ray": stack.enter_context(_client(rays))}
        seconds: dict[str, list[float]] = {name: [] for name in clients}
        for client in clients.values():
            _ready(client, 1)
        for _ in range(rounds):
            for name, client in clients.items():
                for _ in range(requests):
                    begun = time.perf_counter()
                    client.post("/test/fatal", json=SMALL).raise_for_status()
                    seconds[name].append(time.perf_counter() - begun)
    for name, taken in seconds.items():
        print(f"{name:12} p50 {1000 * statistics.median(taken):6.1f} ms  p99 {_percentile(taken, 99):6.1f} ms")
    more = statistics.median(seconds["on Ray"]) - statistics.median(seconds["in process"])
    print(f"{'a job on Ray costs':40} {1000 * more:.1f} ms more (p50)")


def kill(times: int = 10) -> None:
    """A runner is killed with -9 in the middle of a job: when the job is at work elsewhere."""
    taken = []
    with (
        nodes(2) as cluster,
        tempfile.TemporaryDirectory() as name,
        serving_on(cluster, Path(name) / "data") as server,
        _client(server) as client,
    ):
        for number in range(times):
            _ready(client, 2)
            with gated(Path(name) / f"gate-{number}") as gate:
                body = {**SMALL, "prompt": str(gate.path), "num_inference_steps": 3}
                queued = _path(client.post("/queue/test/gate", json=body))
                gate.let(1)
                _wait_for_step(client, queued, 1)
                at_work = max(runners(), key=lambda process: str(gate.path) in _open_files(process))
                begun = time.perf_counter()
                at_work.kill()
                while client.get(queued).json()["status"] == "IN_PROGRESS":
                    if any(str(gate.path) in _open_files(each) for each in runners() if each.pid != at_work.pid):
                        break
                gate.let(1)
                _wait_for_step(client, queued, 1)
                taken.append(time.perf_counter() - begun)
                gate.open()
                assert completed(client, queued).get("error") is None
    _say("a killed runner: its job runs elsewhere", taken)


def _open_files(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error, OSError):
        return [str(each.readlink()) for each in Path(f"/proc/{process.pid}/fd").iterdir()]
    return []


def _wait_for_step(client: httpx.Client, queued: str, step: int) -> None:
    while f"step {step}/" not in str(client.get(queued, params={"logs": 1}).json().get("logs")):
        continue


def join(times: int = 3) -> None:
    """The only GPU is busy when a node joins: when the job that waited is done there."""
    taken = []
    for _ in range(times):
        with (
            nodes(1) as cluster,
            tempfile.TemporaryDirectory() as name,
            serving_on(cluster, Path(name) / "data", max_running="1") as server,
            _client(server) as client,
            gated(Path(name) / "gate") as gate,
        ):
            _path(client.post("/queue/test/gate", json={**SMALL, "prompt": str(gate.path)}))
            waits = _path(client.post("/queue/test/slow", json=SMALL))
            cluster.add_node(num_cpus=1, num_gpus=1)
            begun = time.perf_counter()
            assert completed(client, waits).get("error") is None
            taken.append(time.perf_counter() - begun)
    _say("a node that joined: its first job is done", taken)


def scale(jobs: int = 80) -> None:
    """Jobs a second on one GPU and on four, with a model that sleeps a fifth of a second a picture."""
    found = {}
    body = {**SMALL, "num_inference_steps": 10}
    with nodes(4) as cluster:
        for number in (1, 4):
            with (
                tempfile.TemporaryDirectory() as name,
                serving_on(cluster, Path(name), gpus=str(number)) as server,
                _client(server) as client,
            ):
                _ready(client, number)
                begun = time.perf_counter()
                paths = [_path(client.post("/queue/test/slow", json=body)) for _ in range(jobs)]
                for path in paths:
                    assert completed(client, path).get("error") is None
                found[number] = jobs / (time.perf_counter() - begun)
    for number, each in found.items():
        print(f"{number} GPUs: {each:5.2f} jobs/s")
    print(f"{'four GPUs do':40} {found[4] / found[1]:.2f} times what one does")


# -- what one head can hold: all that is real of it, with runners that end every job at once


def head(gpus: int = 1000, jobs: int = 20_000, waiting: int = 100_000) -> None:
    """Completions a second with so many GPUs' runners, memory, and what a position costs in a long queue."""
    text = json.dumps({**SMALL, "num_inference_steps": 28})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = Settings(data_dir=folder, ray="none", gpus=gpus, max_running=1, max_queue_length=1_000_000)
        database, notifier = Database(folder), Notifier()
        line = Queue(database, notifier, 1_000_000)
        files = FileStore(folder / "files", database)
        before = psutil.Process().memory_info().rss
        submitted = [line.submit(Submission("test/null", "me", text, "http://here")) for _ in range(jobs)]
        cluster: Any = ClusterHead(settings, line, files, NullRayCluster(), notifier, Metrics())  # type: ignore[arg-type]
        begun = time.perf_counter()
        cluster.start()
        while any(job.state != State.COMPLETED for job in submitted[-gpus:]) or line.length:
            threading.Event().wait(0.05)
        taken = time.perf_counter() - begun
        print(f"{f'{gpus} GPUs, {jobs} jobs: completions a second':40} {jobs / taken:.0f}")
        grown = (psutil.Process().memory_info().rss - before) / 2**20
        print(f"{'memory of the head for these':40} {grown:.0f} MiB")
        cluster.stop()
        last = [line.submit(Submission("test/null", "me", text, "http://here")) for _ in range(waiting)][-1]
        begun = time.perf_counter()
        for _ in range(1000):
            line.position(last)
        print(f"{f'a position among {waiting} that wait':40} {1000 * (time.perf_counter() - begun):.1f} µs")
        database.close()


class Asker(Client):
    """Submits, asks for the status until it is done, reads the result, fetches the picture, and again."""

    def __init__(self, until: float) -> None:
        self.submit = request("POST", "/queue/test/null", json.dumps(SMALL).encode())
        super().__init__(self.submit, lambda: time.monotonic() >= until)
        self.step, self.path, self.num_pictures = "submit", "", 0

    def next_request(self, body: bytes) -> bytes:
        """What fal's clients do next."""
        if self.step == "submit":
            self.step, self.path = "status", "/queue/test/null/requests/" + json.loads(body)["request_id"]
        elif self.step == "status" and b'"COMPLETED"' in body:
            self.step = "result"
            return request("GET", self.path)
        elif self.step == "result":
            self.step = "picture"
            return request("GET", httpx.URL(json.loads(body)["images"][0]["url"]).path)
        elif self.step == "picture":
            self.step, self.num_pictures = "submit", self.num_pictures + 1
            return self.submit
        return request("GET", f"{self.path}/status")

    def _send(self) -> None:
        # As fal's client for Python does: ten times a second.
        if self.step == "status":
            asyncio.get_running_loop().call_later(0.1, super()._send)
        else:
            super()._send()


def whole(gpus: int = 1000, seconds: float = 10) -> None:
    """The same over HTTP, from the submit to the picture at the client."""
    for clients in (32, 256):
        _whole(gpus, clients, seconds)


def _whole(gpus: int, clients: int, seconds: float) -> None:
    models = ROOT / "bench" / "support" / "fake_cluster_models"
    askers: list[Asker] = []
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

        def asker() -> Asker:
            askers.append(Asker(until))
            return askers[-1]

        figures = load(port, clients, asker)
        assert figures.bad == 0
    pictures = sum(each.num_pictures for each in askers)
    print(f"{f'{clients} clients: whole requests a second':40} {pictures / figures.taken:.0f}")
    print(f"{'HTTP requests for each of them':40} {len(figures.seconds) / pictures:.1f}")


def _say(what: str, taken: list[float]) -> None:
    print(f"{what:40} after {statistics.median(taken):.2f} s, at most {max(taken):.2f} s")


def _percentile(seconds: list[float], percent: int) -> float:
    return 1000 * statistics.quantiles(seconds, n=100)[percent - 1]


PARTS: dict[str, Callable[[], None]] = {each.__name__: each for each in (overhead, kill, join, scale, head, whole)}


def main() -> None:
    """Every part that is named; all without a name."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS])
    print(f"load average {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores")
    for name in parser.parse_args().parts or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
