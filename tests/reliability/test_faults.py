"""Tests of faults during generation, as the affected client and the next one see them: with real weights, over HTTP."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.reliability.test_kill import client_of, digests, rows, submit
from tests.support.server_process import ROOT, Server, serving, wait_until_completed

SELECT_JOBS = "SELECT status, attempt, strikes FROM jobs ORDER BY sequence"
NOT_A_NUMBER = "The image has values that are not finite, so no image is returned."


def body(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "image_size": {"width": 128, "height": 128}, "num_inference_steps": 3, "seed": 1}


@pytest.fixture(scope="module")
def faults_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Create the directory in which the faulty model marks the faults that occurred."""
    directory = tmp_path_factory.mktemp("seen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTS_SEEN", str(directory))
        yield directory


@pytest.fixture(autouse=True)
def clear_faults(faults_dir: Path) -> None:
    for mark in faults_dir.iterdir():
        mark.unlink()


def faulty(data_dir: Path) -> Any:
    """Return a context manager that runs a server of test/faulty with a step deadline of two seconds."""
    models = str(ROOT / "tests" / "support" / "faults" / "demo")
    return serving(data_dir, "test/faulty=demo", models_dir=models, step_deadline="2")


@pytest.fixture(scope="module")
def client(faults_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Open a client of a server that survives all requests of this module."""
    with faulty(tmp_path_factory.mktemp("data")) as server, client_of(server) as client:
        yield client
        assert server.stop() == 0


@pytest.fixture
def error_of(client: httpx.Client) -> Callable[[str], str | None]:
    """Return a function that runs a request and returns its error, after checking that a further request succeeds."""

    def run(prompt: str) -> str | None:
        error: str | None = wait_until_completed(client, submit(client, body(prompt), "test/faulty")).get("error")
        assert wait_until_completed(client, submit(client, body("a fish"), "test/faulty")).get("error") is None
        return error

    return run


@pytest.mark.parametrize("fault", ["slow once", "out of memory once"])
def test_recovered_faults_do_not_change_the_image(client: httpx.Client, faults_dir: Path, fault: str) -> None:
    with_fault = digests(client, submit(client, body(fault), "test/faulty"))
    assert [mark.name for mark in faults_dir.iterdir()] == [fault.removesuffix(" once")]
    assert digests(client, submit(client, body(fault), "test/faulty")) == with_fault


def test_out_of_memory(error_of: Callable[[str], str | None]) -> None:
    assert (error_of("out of memory") or "").startswith("Out of memory: an image of 128x128 did not fit")


@pytest.mark.parametrize("fault", ["raises", "exhausts"])
def test_internal_errors_reveal_no_details(error_of: Callable[[str], str | None], fault: str) -> None:
    error = error_of(fault) or ""
    assert error
    assert "secret" not in error
    assert "Memory" not in error


def test_not_a_number(error_of: Callable[[str], str | None]) -> None:
    assert error_of("nan") == NOT_A_NUMBER


def test_a_black_image_is_valid(client: httpx.Client) -> None:
    answer = client.post("/test/faulty", json=body("black")).raise_for_status().json()
    content = client.get(httpx.URL(answer["images"][0]["url"]).path).content
    with Image.open(io.BytesIO(content)) as image:
        assert image.convert("RGB").getextrema() == ((0, 0),) * 3


def exit_code(server: Server) -> int:
    """Wait until the server exits by itself and return its exit code."""
    return server.process.wait(60)


@pytest.mark.parametrize(
    ("fault", "code", "job_row"),
    [("poisoned once", 1, (200, 2, 1)), ("hangs once", 3, (200, 2, 1)), ("exits once", 5, (200, 2, 0))],
)
def test_a_request_that_ends_the_process_runs_on_the_next(
    tmp_path: Path, fault: str, code: int, job_row: tuple[int, int, int]
) -> None:
    with faulty(tmp_path) as first, client_of(first) as client:
        path = submit(client, body(fault), "test/faulty")
        assert exit_code(first) == code
    with faulty(tmp_path) as second, client_of(second) as client:
        assert len(digests(client, path)) == 1
        assert second.stop() == 0
    assert rows(tmp_path, SELECT_JOBS) == [job_row]


def test_not_a_number_twice_in_a_row_ends_the_process(tmp_path: Path) -> None:
    """End the process, since the weights on the device may be corrupt. The next process loads them again."""
    with faulty(tmp_path) as first, client_of(first) as client:
        paths = [submit(client, body("nan"), "test/faulty") for _ in range(2)]
        assert exit_code(first) == 1
        assert "two images in a row had values that are not finite" in first.output
    with faulty(tmp_path) as second, client_of(second) as client:
        assert [wait_until_completed(client, path).get("error") for path in paths] == [NOT_A_NUMBER] * 2
        assert second.stop() == 0
    assert rows(tmp_path, SELECT_JOBS) == [(500, 1, 0), (500, 2, 1)]


@pytest.mark.thorough
def test_only_a_request_that_crashes_three_times_fails(tmp_path: Path) -> None:
    with faulty(tmp_path) as server, client_of(server) as client:
        path = submit(client, body("poisoned"), "test/faulty")
        assert exit_code(server) == 1
    for _ in range(2):
        with faulty(tmp_path) as server:
            assert exit_code(server) == 1
    with faulty(tmp_path) as server, client_of(server) as client:
        error = wait_until_completed(client, path).get("error")
        assert error == "The server crashed 3 times while it ran this request."
        assert wait_until_completed(client, submit(client, body("a fish"), "test/faulty")).get("error") is None
        assert server.stop() == 0


def test_weights_that_cannot_be_loaded_end_the_process(
    faults_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTS_AT_SETUP", "1")
    with faulty(tmp_path) as server:
        assert exit_code(server) == 1
        assert "these weights cannot be loaded" in server.output
