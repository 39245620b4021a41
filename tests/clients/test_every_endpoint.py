"""Every endpoint on the demo weights, called with fal-client and with @fal-ai/client."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.endpoint_requests import (
    check_inputs_matter,
    check_output,
    small_body,
    upload_inputs,
    upload_other_inputs,
)
from tests.support.fal_endpoints import FACTS
from tests.support.node import clients
from tests.support.python_client import run_client
from tests.support.server_process import Server, free_port, serving
from tests.support.tiny_kinds import weights_of_every_endpoint

Outputs = dict[str, dict[str, Any]]
#: The fields that refer to input files.
INPUT_FIELDS = {
    "image_url",
    "mask_url",
    "reference_image_url",
    "control_lora_image_url",
    "fill_image",
    "loras",
    "control_loras",
    "controlnets",
    "controlnet_unions",
    "ip_adapters",
}

#: The endpoints that differ from `fal-ai/flux/dev`, `fal-ai/flux-lora` or their like in defaults and weights only.
VARIANT = re.compile(r"flux-1/|krea|schnell|srpo")


@pytest.fixture(scope="module")
def full_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server of the demo with all endpoints, and with IP adapters."""
    directory = tmp_path_factory.mktemp("every")
    with serving(directory / "data", *weights_of_every_endpoint(directory), tls_port=str(free_port())) as running:
        yield running.ready()


@pytest.fixture(scope="module")
def full_client(full_server: Server) -> Iterator[httpx.Client]:
    """Yield a plain HTTP client of `full_server`."""
    with httpx.Client(base_url=full_server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def inputs(full_client: httpx.Client) -> dict[str, Any]:
    """Upload the input files once; return the fields that refer to them."""
    return upload_inputs(full_client)


@pytest.fixture(scope="module")
def other_inputs(full_client: httpx.Client) -> dict[str, Any]:
    """Upload other input files once; return the fields that refer to them."""
    return upload_other_inputs(full_client)


@pytest.fixture(scope="module")
def inputs_path(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small input for each endpoint into a file that the programs read; return its path."""
    path = tmp_path_factory.mktemp("inputs") / "inputs.json"
    path.write_text(json.dumps({endpoint: small_body(endpoint, inputs) for endpoint in FACTS}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def python_outputs(full_server: Server, inputs_path: Path) -> Outputs:
    """Call every endpoint with fal-client; return the outputs, by endpoint and kind of call."""
    outputs: Outputs = run_client(full_server, "every_endpoint", str(inputs_path), seconds=300)
    return outputs


@pytest.fixture(scope="module")
def node_outputs(node: None, full_server: Server, inputs_path: Path, request: pytest.FixtureRequest) -> Outputs:
    """Call the endpoints of this run's tests with @fal-ai/client; return the outputs, by endpoint and kind of call."""
    inputs = json.loads(inputs_path.read_text(encoding="utf-8"))
    chosen = {endpoint: inputs[endpoint] for endpoint in inputs if _is_tested_with_node(request.session, endpoint)}
    path = inputs_path.with_name("chosen.json")
    path.write_text(json.dumps(chosen), encoding="utf-8")
    outputs: Outputs = clients(full_server)["client, proxyUrl"].run("every_endpoint.mjs", str(path))
    return outputs


def _is_tested_with_node(session: pytest.Session, endpoint: str) -> bool:
    return any(item.name == f"{test_node.__name__}[{endpoint}]" for item in session.items)


def variant(endpoint: str) -> Any:
    """Return the endpoint, marked as thorough if it differs from another one in defaults and weights only."""
    return pytest.param(endpoint, marks=pytest.mark.thorough if VARIANT.search(endpoint) else ())


def check_outputs(client: httpx.Client, endpoint: str, outputs: dict[str, Any], *kinds_of_stream: str) -> None:
    """Check the output of each kind of call that fal's clients have for this endpoint."""
    kinds = ["subscribe", *(kinds_of_stream if endpoint.endswith("/stream") else ())]
    assert list(outputs) == kinds, outputs
    for kind in kinds:
        check_output(client, endpoint, outputs[kind])


@pytest.mark.parametrize("endpoint", FACTS)
def test_python(full_client: httpx.Client, python_outputs: Outputs, endpoint: str) -> None:
    check_outputs(full_client, endpoint, python_outputs[endpoint], "stream", "stream of the stream")


@pytest.mark.parametrize("endpoint", [variant(endpoint) for endpoint in FACTS])
def test_node(full_client: httpx.Client, node_outputs: Outputs, endpoint: str) -> None:
    check_outputs(full_client, endpoint, node_outputs[endpoint], "stream")


@pytest.mark.parametrize(
    "endpoint", [variant(endpoint) for endpoint, facts in FACTS.items() if facts.keys() & INPUT_FIELDS]
)
def test_each_input_matters(
    full_client: httpx.Client, endpoint: str, inputs: dict[str, Any], other_inputs: dict[str, Any]
) -> None:
    check_inputs_matter(full_client, endpoint, inputs, other_inputs)
