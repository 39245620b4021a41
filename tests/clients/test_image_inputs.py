"""Pictures in, as the endpoint's page says: by address, as a data URI and as an uploaded file, with every SDK."""

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
from tests.clients.test_node_clients import node as node
from tests.support.connect_clients import VERSIONS, said
from tests.support.node import clients
from tests.support.server_process import Server, with_door


@pytest.fixture(scope="module")
def copying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose answer is the picture that came in; the operator's own network is allowed."""
    with with_door(tmp_path_factory.mktemp("copying"), "test/copy=demo", outbound_allow="127.0.0.0/8") as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A picture without a pattern, so that any other is another."""
    values = numpy.random.default_rng(2).integers(0, 256, (72, 96, 3), dtype=numpy.uint8)
    Image.fromarray(values).save(tmp_path / "in.png")
    return tmp_path / "in.png"


@pytest.fixture
def hosted(httpserver: HTTPServer, source: Path) -> str:
    httpserver.expect_request("/in.png").respond_with_data(source.read_bytes(), content_type="image/png")
    return httpserver.url_for("/in.png")


def check(answers: dict[str, Any], source: Path, ways: set[str]) -> None:
    """Each way gave the very pixels."""
    assert set(answers) == ways
    expected = Image.open(source)
    for name, answer in answers.items():
        content = httpx.get(answer["images"][0]["url"], verify=False, trust_env=False).content
        found = Image.open(io.BytesIO(content))
        assert (found.size, found.tobytes()) == (expected.size, expected.tobytes()), name


@pytest.mark.parametrize("version", VERSIONS)
def test_python(copying: Server, source: Path, hosted: str, version: str) -> None:
    answers = said(copying, version, "pictures_in", str(source), hosted)
    check(answers, source, {"hosted", "data URI", "data URI of a file", "uploaded", "uploaded image"})


@pytest.mark.parametrize("name", NAMES)
def test_node(node: None, copying: Server, source: Path, hosted: str, name: str) -> None:
    answers = clients(copying)[name].run("pictures_in.mjs", str(source), hosted)
    check(answers, source, {"hosted", "data URI", "uploaded", "a Blob"})
