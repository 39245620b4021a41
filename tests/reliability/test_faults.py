"""What a client and the next one see of each fault in the middle of a picture: with real weights, over HTTP."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.reliability.test_kill import client_of, digests, rows, submit
from tests.support.server_process import ROOT, Server, completed, serving

FATES = "SELECT status, attempt, strikes FROM jobs ORDER BY sequence"
NOT_A_NUMBER = "The image came out as not-a-number, so none is returned."


def body(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "image_size": {"width": 128, "height": 128}, "num_inference_steps": 3, "seed": 1}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where it is remembered what happened."""
    folder = tmp_path_factory.mktemp("seen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTS_SEEN", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def forget(seen: Path) -> None:
    for mark in seen.iterdir():
        mark.unlink()


def faulty(data_dir: Path) -> Any:
    """A server of test/faulty whose steps may take two seconds."""
    models = str(ROOT / "tests" / "support" / "faults" / "demo")
    return serving(data_dir, "test/faulty=demo", models_dir=models, step_deadline="2")


@pytest.fixture(scope="module")
def client(seen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Of a server that lives through everything that is asked of it."""
    with faulty(tmp_path_factory.mktemp("data")) as server, client_of(server) as asking:
        yield asking
        assert server.stop() == 0


@pytest.fixture
def error_of(client: httpx.Client) -> Callable[[str], str | None]:
    """What its client is told of a request; the next one is painted in any case."""

    def told(prompt: str) -> str | None:
        error: str | None = completed(client, submit(client, body(prompt), "test/faulty")).get("error")
        assert completed(client, submit(client, body("a fish"), "test/faulty")).get("error") is None
        return error

    return told


@pytest.mark.parametrize("fault", ["slow once", "out of memory once"])
def test_what_is_mended_is_not_seen(client: httpx.Client, seen: Path, fault: str) -> None:
    disturbed = digests(client, submit(client, body(fault), "test/faulty"))
    assert [mark.name for mark in seen.iterdir()] == [fault.removesuffix(" once")]
    assert digests(client, submit(client, body(fault), "test/faulty")) == disturbed


def test_out_of_memory(error_of: Callable[[str], str | None]) -> None:
    assert (error_of("out of memory") or "").startswith("Out of memory: an image of 128x128 did not fit")


@pytest.mark.parametrize("fault", ["raises", "exhausts"])
def test_an_error_of_our_own_says_nothing_of_the_inside(error_of: Callable[[str], str | None], fault: str) -> None:
    error = error_of(fault) or ""
    assert error
    assert "secret" not in error
    assert "Memory" not in error


def test_not_a_number(error_of: Callable[[str], str | None]) -> None:
    assert error_of("nan") == NOT_A_NUMBER


def test_a_picture_that_is_black_is_a_picture(client: httpx.Client) -> None:
    answer = client.post("/test/faulty", json=body("black")).raise_for_status().json()
    picture = client.get(httpx.URL(answer["images"][0]["url"]).path).content
    with Image.open(io.BytesIO(picture)) as shown:
        assert shown.convert("RGB").getextrema() == ((0, 0),) * 3


def ended(server: Server) -> int:
    """The exit code of a server that ends by itself."""
    return server.process.wait(60)


@pytest.mark.parametrize(
    ("fault", "code", "fate"),
    [("poisoned once", 1, (200, 2, 1)), ("hangs once", 3, (200, 2, 1)), ("exits once", 5, (200, 2, 0))],
)
def test_what_ends_the_process_is_painted_by_the_next(
    tmp_path: Path, fault: str, code: int, fate: tuple[int, int, int]
) -> None:
    with faulty(tmp_path) as first, client_of(first) as client:
        path = submit(client, body(fault), "test/faulty")
        assert ended(first) == code
    with faulty(tmp_path) as second, client_of(second) as client:
        assert len(digests(client, path)) == 1
        assert second.stop() == 0
    assert rows(tmp_path, FATES) == [fate]


def test_not_a_number_twice_in_a_row_ends_the_process(tmp_path: Path) -> None:
    """The weights on the device may be spoilt: the next process loads them again."""
    with faulty(tmp_path) as first, client_of(first) as client:
        paths = [submit(client, body("nan"), "test/faulty") for _ in range(2)]
        assert ended(first) == 1
        assert "two images in a row came out as not-a-number" in first.output
    with faulty(tmp_path) as second, client_of(second) as client:
        assert [completed(client, path).get("error") for path in paths] == [NOT_A_NUMBER] * 2
        assert second.stop() == 0
    assert rows(tmp_path, "SELECT status, attempt, strikes FROM jobs ORDER BY sequence") == [(500, 1, 0), (500, 2, 1)]


def test_three_times_and_it_fails_alone(tmp_path: Path) -> None:
    with faulty(tmp_path) as server, client_of(server) as client:
        path = submit(client, body("poisoned"), "test/faulty")
        assert ended(server) == 1
    for _ in range(2):
        with faulty(tmp_path) as server:
            assert ended(server) == 1
    with faulty(tmp_path) as server, client_of(server) as client:
        error = completed(client, path).get("error")
        assert error == "The server crashed 3 times while it ran this request."
        assert completed(client, submit(client, body("a fish"), "test/faulty")).get("error") is None
        assert server.stop() == 0


def test_weights_that_cannot_be_loaded_end_the_process(
    seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTS_AT_SETUP", "1")
    with faulty(tmp_path) as server:
        assert ended(server) == 1
        assert "these weights cannot be loaded" in server.output
