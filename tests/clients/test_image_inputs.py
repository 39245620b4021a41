"""Tests of image inputs with every SDK: by URL, as a data URI and as an uploaded file, as fal's endpoint page shows."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from PIL import Image
from pytest_httpserver import HTTPServer

from tests.clients.test_node_clients import NAMES
from tests.support.connect_clients import VERSIONS, client_output
from tests.support.node import clients
from tests.support.server_process import Server, serving_with_proxy


@pytest.fixture(scope="module")
def copying_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server that returns its input image and may fetch from the loopback network."""
    with serving_with_proxy(
        tmp_path_factory.mktemp("copying"), "test/copy=demo", outbound_allow="127.0.0.0/8"
    ) as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Create an image of random pixels, which no other image equals by chance; return its path."""
    values = numpy.random.default_rng(2).integers(0, 256, (72, 96, 3), dtype=numpy.uint8)
    Image.fromarray(values).save(tmp_path / "in.png")
    return tmp_path / "in.png"


@pytest.fixture
def hosted_url(httpserver: HTTPServer, source: Path) -> str:
    httpserver.expect_request("/in.png").respond_with_data(source.read_bytes(), content_type="image/png")
    return httpserver.url_for("/in.png")


def assert_same_pixels(answers: dict[str, Any], source: Path, expected_ways: set[str]) -> None:
    """Check that each expected way to pass the source image returned the pixels of the source."""
    assert set(answers) == expected_ways
    expected = Image.open(source)
    for name, answer in answers.items():
        content = httpx.get(answer["images"][0]["url"], verify=False, trust_env=False).content
        actual = Image.open(io.BytesIO(content))
        assert (actual.size, actual.tobytes()) == (expected.size, expected.tobytes()), name


@pytest.mark.parametrize("version", VERSIONS)
def test_python(copying_server: Server, source: Path, hosted_url: str, version: str) -> None:
    answers = client_output(copying_server, version, "image_inputs", str(source), hosted_url)
    assert_same_pixels(answers, source, {"hosted", "data URI", "data URI of a file", "uploaded", "uploaded image"})


@pytest.mark.parametrize("name", NAMES)
def test_node(node: None, copying_server: Server, source: Path, hosted_url: str, name: str) -> None:
    answers = clients(copying_server)[name].run("image_inputs.mjs", str(source), hosted_url)
    assert_same_pixels(answers, source, {"hosted", "data URI", "uploaded", "a Blob"})
