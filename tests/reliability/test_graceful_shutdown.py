"""Tests of SIGTERM with running requests, streams and waiting clients: nothing is lost and no client hangs.

SIGINT and SIGHUP stop a server the same way.
"""

import contextlib
import fcntl
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.queue.jobs import State
from tests.support.components import open_components
from tests.support.repeats import round_params
from tests.support.server_process import (
    ROOT,
    TEST_MODELS,
    Gate,
    Server,
    free_port,
    serving,
    wait_until_claimed,
    wait_until_completed,
)

NUM_CLIENTS = 20
GRACE_SECONDS = 1


def follow_status(url: str, path: str, is_open: threading.Barrier) -> tuple[float, dict[str, Any]]:
    """Return the time and the content of a status stream's last event. Raises RemoteProtocolError if it is cut off."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client, client.stream("GET", path) as response:
        lines = response.iter_lines()
        last = next(line for line in lines if line.startswith("data: "))
        is_open.wait(60)
        received_at = 0.0
        for line in lines:
            if line.startswith("data: "):
                last, received_at = line, time.monotonic()
        return received_at, json.loads(last[6:])


def release_steps(server: Server, gate: Gate) -> None:
    """Release a step every 20 ms until the server exits, so that every running step ends."""
    while True:
        try:
            server.process.wait(0.02)
        except subprocess.TimeoutExpired:
            gate.release(1)
        else:
            return


def run(url: str, gate: Gate) -> httpx.Response:
    """Run a request, wait for its answer and return the answer."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        return client.post("/test/gate", json={"prompt": str(gate.path)})


def stream(url: str, gate: Gate) -> dict[str, Any]:
    """Stream a request and return its last event, after which the server cuts the stream off."""
    last: dict[str, Any] = {}
    with (
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
        client.stream("POST", "/test/gate/stream", json={"prompt": str(gate.path)}) as response,
        contextlib.suppress(httpx.RemoteProtocolError),
    ):
        for line in response.iter_lines():
            if line.startswith("data: "):
                last = json.loads(line[6:])
    return last


def start_clients(clients: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Any) -> list[Future[Any]]:
    return [clients.submit(function, *arguments) for _ in range(NUM_CLIENTS)]


def stop_and_wait(server: Server, client: httpx.Client, *, is_at_once: bool) -> tuple[float, float]:
    """Stop the server and wait for its exit. Return the time of the signal and the seconds until the exit."""
    stopped_at = time.monotonic()
    server.process.terminate()
    server.wait_for("stopping")
    # The server is unready from the first moment. It may have exited already if it has nothing to wait for.
    with contextlib.suppress(httpx.TransportError) if is_at_once else contextlib.nullcontext():
        answer = client.get("/health/ready")
        assert (answer.status_code, answer.json()["status"]) == (503, "stopping")
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.output
    return stopped_at, time.monotonic() - stopped_at


def stop_with_everything_open(data_dir: Path, gate: Gate, steps: int, hangs: bool) -> tuple[list[str], float]:
    """Stop a server with a running and a queued request, status streams of the first, and waiting runs and streams.

    Return the status paths of the two requests and the seconds until the exit.
    """
    is_open = threading.Barrier(NUM_CLIENTS + 1)
    body = {"prompt": str(gate.path), "num_inference_steps": steps, "num_images": 4}
    with (
        serving(data_dir, TEST_MODELS, max_running="1", shutdown_grace=str(GRACE_SECONDS)) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
        ThreadPoolExecutor(3 * NUM_CLIENTS + 1) as clients,
    ):
        paths = [httpx.URL(client.post("/queue/test/gate", json=body).json()["status_url"]).path for _ in range(2)]
        wait_until_claimed(client, paths[0])
        streams = start_clients(clients, follow_status, server.url, f"{paths[0]}/stream", is_open)
        runs = start_clients(clients, run, server.url, gate)
        image_streams = start_clients(clients, stream, server.url, gate)
        is_open.wait(60)
        # Send the signal only after every request has a row.
        while client.get("/status.json").json()["now"]["queue_length"] < 2 * NUM_CLIENTS + 1:
            continue
        if not hangs:
            clients.submit(release_steps, server, gate)
        stopped_at, seconds = stop_and_wait(server, client, is_at_once=not hangs)
        times, last_events = zip(*(each.result(60) for each in streams), strict=True)
        assert min(times) > stopped_at
        states = {status["status"] for status in last_events}
        assert states == {"COMPLETED"} or states <= {"IN_PROGRESS", "IN_QUEUE"}
        answers = [answer.result(60) for answer in runs]
        assert {answer.status_code for answer in answers} == {500}
        assert {answer.json()["detail"] for answer in answers} == {"The server is stopping."}
        assert {each.result(60)["detail"] for each in image_streams} == {"The server is stopping."}
    return paths, seconds


def test_the_errors_of_a_stop_have_the_ids_of_their_requests(tmp_path: Path, gate: Gate) -> None:
    """Answer the waiting clients of each API in its own shape, with the id under which the log has the request."""
    body = {"prompt": str(gate.path)}
    calls = {
        "/test/gate": body,
        "/v1/images/generations": {**body, "model": "test/gate"},
        "/sdapi/v1/txt2img": {**body, "override_settings": {"sd_model_checkpoint": "test/gate"}},
    }
    with (
        serving(tmp_path / "data", TEST_MODELS, a1111="true", shutdown_grace="0") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
        ThreadPoolExecutor(len(calls)) as clients,
    ):
        answers = [clients.submit(client.post, path, json=call) for path, call in calls.items()]
        now = {"requests_running": 0, "queue_length": 0}
        while now["requests_running"] + now["queue_length"] < len(calls):
            now = client.get("/status.json").json()["now"]
        stop_and_wait(server, client, is_at_once=True)
        by_run, by_openai, by_a1111 = (answer.result(60) for answer in answers)
    assert [answer.status_code for answer in (by_run, by_openai, by_a1111)] == [500] * 3
    assert by_run.json()["detail"] == by_a1111.json()["detail"] == "The server is stopping."
    assert by_openai.json()["error"]["message"] == "The server is stopping."
    with open_components(tmp_path / "data") as components:
        ids = {request_id for (request_id,) in components.rows("SELECT request_id FROM jobs")}
    assert {answer.headers["x-fal-request-id"] for answer in (by_run, by_openai, by_a1111)} == ids


@pytest.mark.parametrize("number", round_params(2, 50))
def test_shutdown_with_everything_open(tmp_path: Path, gate: Gate, number: int, request: pytest.FixtureRequest) -> None:
    """Vary the steps, so that some requests finish within the grace period. In every fifth round the step hangs."""
    steps, hangs = random.Random(number).randint(1, 50), number % 5 == 0
    paths, seconds = stop_with_everything_open(tmp_path / "data", gate, steps, hangs)
    print(f"{seconds:.2f} s from the signal to the exit; {steps} steps, {hangs=}")
    # The time depends on the load of the machine, so only the soak test checks it.
    if request.node.get_closest_marker("soak"):
        assert seconds <= GRACE_SECONDS + 2
    gate.release(2 * 4 * 50)
    with (
        serving(tmp_path / "data", TEST_MODELS) as second,
        httpx.Client(base_url=second.ready().url, timeout=60, trust_env=False) as client,
    ):
        for path in paths:
            assert wait_until_completed(client, path).get("error") is None
    with open_components(tmp_path / "data") as components:
        counts = components.rows("SELECT mode, state, status, count(*) FROM jobs GROUP BY 1, 2, 3 ORDER BY 1")
    disconnected = [(mode, State.COMPLETED, 499, NUM_CLIENTS) for mode in ("run", "stream")]
    assert counts == [("queue", State.COMPLETED, 200, 2), *disconnected]


def start_request(url: str, gate: Gate) -> None:
    """Submit a request of two steps and wait until it is running."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        body = {"prompt": str(gate.path), "num_inference_steps": 2}
        wait_until_claimed(client, client.post("/queue/test/gate", json=body).json()["status_url"])


def job_rows(data_dir: Path) -> list[tuple[Any, ...]]:
    """Return state, status and number of attempts of each request."""
    with open_components(data_dir) as components:
        return components.rows("SELECT state, status, attempt FROM jobs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_running_requests_finish_first(tmp_path: Path, gate: Gate, number: signal.Signals) -> None:
    with serving(tmp_path / "data", TEST_MODELS, shutdown_grace="60") as server:
        start_request(server.ready().url, gate)
        server.process.send_signal(number)
        server.wait_for("stopping")
        gate.release(2)
        assert server.process.wait(60) == 0
    assert "Traceback" not in server.output
    assert job_rows(tmp_path / "data") == [(State.COMPLETED, 200, 1)]


def start_on_terminal(data_dir: Path, port: int) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server on a new terminal and return its process and our end of the terminal."""
    terminal, server_end = pty.openpty()
    command = [sys.executable, "-m", "server", "serve", TEST_MODELS, "--port", str(port), "--tls-port", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FAL_", "FLUX_SERVER_"))}
    process = subprocess.Popen(
        [*command, "--data-dir", str(data_dir), "--models-dir", str(ROOT / "tests" / "support" / "models")],
        cwd=ROOT,
        env=environment,
        stdin=server_end,
        stdout=server_end,
        stderr=server_end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(server_end)
    return process, terminal


def read_until(terminal: int, expected: bytes) -> None:
    """Read from the terminal until these bytes appear."""
    received = b""
    while expected not in received:
        received += os.read(terminal, 65_536)


def test_running_requests_finish_after_the_terminal_closes(tmp_path: Path, gate: Gate) -> None:
    """Finish the request although the server can no longer log."""
    port = free_port()
    process, terminal = start_on_terminal(tmp_path / "data", port)
    try:
        read_until(terminal, b"ready")
        start_request(f"http://127.0.0.1:{port}", gate)
        os.close(terminal)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            while client.get("/health/ready").status_code != 503:
                continue
        gate.release(2)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert job_rows(tmp_path / "data") == [(State.COMPLETED, 200, 1)]


def test_under_nohup_the_server_outlives_its_terminal(tmp_path: Path) -> None:
    nohup = shutil.which("nohup")
    assert nohup
    with serving(tmp_path / "data", TEST_MODELS, within=(nohup,)) as server:
        url = server.ready().url
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        ignored = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn"))
        assert ignored >> (signal.SIGHUP - 1) & 1
        server.process.send_signal(signal.SIGHUP)
        answer = httpx.post(f"{url}/test/null", json={"prompt": "still there?"}, trust_env=False)
        assert answer.json()["prompt"] == "still there?"
        assert httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200
        assert server.stop() == 0
