"""Several Ray nodes on one machine: jobs of a lost runner or node run elsewhere, with the same results."""

import base64
import contextlib
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from tests.support.components import open_components
from tests.support.ray_nodes import (
    MODELS,
    SLOW,
    client_of,
    gpus,
    image_digest,
    ray_cluster,
    request_body,
    runner_processes,
    serving_on,
    status_path,
    wait_for_gpu_states,
)
from tests.support.server_process import TEST_MODELS, Gate, serving, statuses, wait_until_claimed, wait_until_completed

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Any]:
    """Start three nodes with one GPU each."""
    with ray_cluster(3) as cluster:
        yield cluster


def kill_a_runner(rng: random.Random) -> None:
    """Kill a random runner as soon as one is running."""
    while True:
        with contextlib.suppress(IndexError, psutil.NoSuchProcess):
            rng.choice(runner_processes()).kill()
            return


def test_each_gpu_generates_images_and_appears_in_metrics(three_nodes: Any, tmp_path: Path) -> None:
    with serving_on(three_nodes, tmp_path) as server, client_of(server.ready()) as client:
        wait_for_gpu_states(client, ["ready"] * 3)
        paths = [status_path(client.post(SLOW, json=request_body(seed))) for seed in range(12)]
        assert len({image_digest(client, each) for each in paths}) == 12
        metrics = client.get("/metrics").text
        assert all(f'flux_server_gpu_ready{{gpu="{number}",node=' in metrics for number in range(3))
        assert 'flux_server_images_total{endpoint="test/slow"} 12.0' in metrics
        # All GPUs were free, so each received jobs.
        assert {int(line.split("gpu=")[1]) for line in server.lines if "ready [server.worker.worker]" in line} == {
            0,
            1,
            2,
        }
        assert server.stop() == 0
    assert not runner_processes()


def test_progress_previews_and_cancel_between_steps(three_nodes: Any, tmp_path: Path, gate: Gate) -> None:
    with serving_on(three_nodes, tmp_path) as server, client_of(server.ready()) as client:
        queued = status_path(client.post("/queue/test/gate", json=request_body(1, prompt=str(gate.path))))
        gate.release(1)
        seen = next(status for status in statuses(client, queued) if status["logs"])
        assert [line["message"] for line in seen["logs"]] == ["step 1/10"]
        assert client.put(queued.removesuffix("status") + "cancel").status_code == 202
        gate.release(1)
        assert wait_until_completed(client, queued)["error_type"] == "client_cancelled"
        with client.stream("POST", "/test/slow/stream", json=request_body(2)) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        # A newer preview replaces one that was not sent in time.
        assert 1 <= sum('"preview"' in line for line in lines) <= 9
        assert '"images"' in lines[-1]


def test_an_input_image_reaches_the_runner(three_nodes: Any, tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (64, 64), (1, 2, 250)).save(content, "PNG")
    data_uri = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    with serving_on(three_nodes, tmp_path) as server, client_of(server.ready()) as client:
        for seed in range(2):
            request = {"prompt": "x", "image_url": data_uri, "seed": seed, "output_format": "png"}
            (output,) = client.post("/test/copy", json=request).raise_for_status().json()["images"]
            image = Image.open(io.BytesIO(client.get(httpx.URL(output["url"]).path).content))
            assert image.convert("RGB").getpixel((0, 0)) == (1, 2, 250)


def test_two_hundred_jobs_survive_thirty_kills_of_runners_and_nodes(three_nodes: Any, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    with (
        serving(tmp_path / "undisturbed", "test/slow=demo", models_dir=str(MODELS)) as server,
        client_of(server.ready()) as client,
    ):
        paths = [status_path(client.post(SLOW, json=request_body(number))) for number in range(200)]
        expected = [image_digest(client, each) for each in paths]
    with serving_on(three_nodes, tmp_path / "data") as server, client_of(server.ready()) as client:
        wait_for_gpu_states(client, ["ready"] * 3)
        paths = [status_path(client.post(SLOW, json=request_body(number))) for number in range(200)]
        for kill in range(30):
            # Six more jobs complete before each kill, so that jobs are still running at the last one.
            assert wait_until_completed(client, paths[6 * kill]).get("error") is None
            if kill % 5 == 4:
                three_nodes.remove_node(rng.choice(list(three_nodes.worker_nodes)), allow_graceful=False)
                three_nodes.add_node(num_cpus=1, num_gpus=1)
            else:
                kill_a_runner(rng)
        assert [image_digest(client, each) for each in paths] == expected, f"with seed {seed}"
        assert server.stop() == 0
    with open_components(tmp_path / "data") as components:
        counts = components.rows("SELECT status, count(*), sum(strikes) FROM jobs GROUP BY status")
        assert counts == [(200, 200, 0)]
        assert components.rows("SELECT count(*) FROM jobs WHERE attempt > 1")[0][0] > 0
        assert [(name,) for name in components.stored_file_names()] == components.rows(
            "SELECT name FROM files ORDER BY name"
        )
        assert len(components.stored_file_names()) == 200


def test_a_job_that_kills_three_runners_fails_alone(three_nodes: Any, tmp_path: Path) -> None:
    with serving_on(three_nodes, tmp_path) as server, client_of(server.ready()) as client:
        deadly = status_path(client.post("/queue/test/fatal", json=request_body(1, prompt="SIGSEGV")))
        error = wait_until_completed(client, deadly)["error"]
        assert error == "The server crashed 3 times while it ran this request."
        assert image_digest(client, status_path(client.post(SLOW, json=request_body(3))))
        assert max(gpu["num_restarts"] for gpu in gpus(client)) >= 1


def test_a_step_that_hangs_counts_as_a_crash(three_nodes: Any, tmp_path: Path, gate: Gate) -> None:
    with serving_on(three_nodes, tmp_path, step_deadline="2") as server, client_of(server.ready()) as client:
        stuck = status_path(client.post("/queue/test/gate", json=request_body(1, prompt=str(gate.path))))
        assert wait_until_completed(client, stuck)["error"].startswith("The server crashed 3 times")


def test_the_head_is_killed_and_started_again(three_nodes: Any, tmp_path: Path, gate: Gate) -> None:
    with serving_on(three_nodes, tmp_path) as server, client_of(server.ready()) as client:
        held = status_path(client.post("/queue/test/gate", json=request_body(1, prompt=str(gate.path))))
        waiting = [status_path(client.post(SLOW, json=request_body(seed))) for seed in range(20)]
        wait_until_claimed(client, held)
        old = {process.pid for process in runner_processes()}
        server.kill()
    with serving_on(three_nodes, tmp_path) as server, client_of(server.ready()) as client:
        gate.release_all()
        assert all(image_digest(client, each) for each in waiting)
        wait_until_completed(client, held)
        # The runners of the old head end on their own.
        while old & {process.pid for process in runner_processes()}:
            continue
        assert server.stop() == 0
    with open_components(tmp_path) as components:
        assert components.rows("SELECT count(*) FROM jobs WHERE state <> 'COMPLETED'") == [(0,)]
        # The held job succeeds only if it reached its gate before the gate was removed. Each job that succeeded has
        # exactly one file.
        finished = components.rows("SELECT request_id FROM jobs WHERE status = 200 ORDER BY 1")
        assert len(finished) >= 20
        assert components.rows("SELECT request_id FROM files ORDER BY 1") == finished


def test_a_node_that_joins_takes_work(tmp_path: Path, gate: Gate) -> None:
    with (
        ray_cluster(1) as cluster,
        serving_on(cluster, tmp_path, max_running="1") as server,
        client_of(server.ready()) as client,
    ):
        status_path(client.post("/queue/test/gate", json=request_body(1, prompt=str(gate.path))))
        waiting = status_path(client.post(SLOW, json=request_body(2)))
        cluster.add_node(num_cpus=1, num_gpus=1)
        assert image_digest(client, waiting)
        wait_for_gpu_states(client, ["ready", "ready"])
        gate.release_all()


def test_gpus_are_requested_as_the_queue_grows(three_nodes: Any, tmp_path: Path, gate: Gate) -> None:
    settings = {"max_gpus": "3", "min_gpus": "1", "max_running": "1"}
    with serving_on(three_nodes, tmp_path, **settings) as server, client_of(server.ready()) as client:
        wait_for_gpu_states(client, ["ready"])
        paths = [
            status_path(client.post("/queue/test/gate", json=request_body(n, prompt=str(gate.path)))) for n in range(12)
        ]
        wait_for_gpu_states(client, ["ready"] * 3)
        gate.release_all()
        assert all(wait_until_completed(client, each)["status"] == "COMPLETED" for each in paths)


def test_requests_with_one_hint_go_to_one_gpu(three_nodes: Any, tmp_path: Path, gate: Gate) -> None:
    with serving_on(three_nodes, tmp_path) as server, client_of(server.ready()) as client:
        wait_for_gpu_states(client, ["ready"] * 3)
        hint = {"x-fal-runner-hint": "mine"}
        for seed in range(2):
            held = status_path(
                client.post("/queue/test/gate", json=request_body(seed, prompt=str(gate.path)), headers=hint)
            )
            wait_until_claimed(client, held)
        assert sorted(gpu["num_running"] for gpu in gpus(client)) == [0, 0, 2]
        gate.release_all()


@pytest.mark.parametrize("kind", ["local"])
def test_local_ray_listens_on_loopback_only(tmp_path: Path, kind: str) -> None:
    with serving(tmp_path, TEST_MODELS, ray=kind, gpus="2") as server, client_of(server.ready()) as client:
        assert client.post("/test/null", json={"prompt": "x"}).status_code == 200
        pids = [server.process.pid, *(child.pid for child in psutil.Process(server.process.pid).children(True))]
        addresses = {
            connection.laddr.ip
            for connection in psutil.net_connections("tcp")
            if connection.pid in pids and connection.status == psutil.CONN_LISTEN
        }
        assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert server.stop() == 0
    assert not runner_processes()
