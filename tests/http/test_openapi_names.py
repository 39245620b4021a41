"""The OpenAPI documents of models whose classes have the names of other classes."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.support.server_process import serving

#: Modules for --models-dir whose classes have the names of each other's classes or of the server's.
SAME_NAMES = {
    "one": 'class Input(FluxDevInput):\n    zest: int = 1\n\nMODEL = model("me/one", Input)',
    "two": 'class Input(FluxDevInput):\n    salt: int = 1\n\nMODEL = model("me/two", Input)',
    "three": (
        "class Problem(FluxDevInput):\n    doubt: int = 1\n\n"
        "class QueueStatus(FluxDevOutput):\n    crowd: int = 1\n\n"
        'MODEL = model("me/three", Problem, QueueStatus)'
    ),
    "four": 'class Options(FluxDevInput):\n    choice: int = 1\n\nMODEL = model("me/four", Options)',
}
_HEAD = """
from models.flux_dev import FluxDevInput, FluxDevOutput
from tests.support.fake_models import NullEngine, NullModel


def model(endpoint, input, output=FluxDevOutput):
    made = NullModel(endpoint, NullEngine)
    made.Input, made.Output = input, output
    return made

"""
OWN_FIELDS = {"me/one": "zest", "me/two": "salt", "me/three": "doubt", "me/four": "choice"}


@pytest.fixture(scope="module")
def same_names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Serve models of several files whose classes have the same names."""
    directory = tmp_path_factory.mktemp("models")
    for name, source in SAME_NAMES.items():
        (directory / f"{name}.py").write_text(f"{_HEAD}\n{source}\n")
    with (
        serving(tmp_path_factory.mktemp("data"), "me/one=demo", models_dir=str(directory), a1111="true") as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        yield client


def fields_of(document: Any, container: Any) -> set[str]:
    """Return the names of the fields of a JSON body."""
    reference = container["content"]["application/json"]["schema"]["$ref"]
    return set(document["components"]["schemas"][reference.rpartition("/")[2]]["properties"])


def references_in(value: Any) -> Iterator[str]:
    """Yield every reference to a schema."""
    if isinstance(value, dict):
        if isinstance(reference := value.get("$ref"), str) and "/schemas/" in reference:
            yield reference.rpartition("/")[2]
        for item in value.values():
            yield from references_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from references_in(item)


def test_classes_with_the_same_name_have_schemas_of_their_own(same_names: httpx.Client) -> None:
    document = same_names.get("/openapi.json").raise_for_status().json()
    schemas = document["components"]["schemas"]
    for endpoint, field in OWN_FIELDS.items():
        for prefix in "", "/queue":
            assert field in fields_of(document, document["paths"][f"{prefix}/{endpoint}"]["post"]["requestBody"])
    assert "crowd" in fields_of(document, document["paths"]["/me/three"]["post"]["responses"]["200"])
    assert set(references_in(document)) <= set(schemas)
    assert [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()] == []
    assert {"Input", "Problem"} & {name for name in schemas if "prompt" in schemas[name].get("properties", {})} == set()
    # Generators name classes after the titles.
    titles = [schema["title"] for schema in schemas.values() if "title" in schema]
    assert len(set(titles)) == len(titles)


def test_the_servers_schemas_keep_their_names(same_names: httpx.Client, client: httpx.Client) -> None:
    usual = client.get("/openapi.json").raise_for_status().json()["components"]["schemas"]
    schemas = same_names.get("/openapi.json").raise_for_status().json()["components"]["schemas"]
    for name in "Problem", "QueueStatus":
        assert schemas[name] == usual[name]
    assert list(schemas["Options"]["properties"]) == ["sd_model_checkpoint"]


@pytest.mark.parametrize("endpoint", OWN_FIELDS)
def test_the_document_of_a_queue_tells_its_schemas_apart(same_names: httpx.Client, endpoint: str) -> None:
    answer = same_names.get("/api/openapi/queue/openapi.json", params={"endpoint_id": endpoint}).raise_for_status()
    document = answer.json()
    assert set(references_in(document)) <= set(document["components"]["schemas"])
    submit = document["paths"][f"/{endpoint}"]["post"]
    assert OWN_FIELDS[endpoint] in fields_of(document, submit["requestBody"])
    assert "queue_position" in fields_of(document, submit["responses"]["200"])
    assert "detail" in fields_of(document, submit["responses"]["4XX"])
    llms_txt = same_names.get(f"/models/{endpoint}/llms.txt").raise_for_status().text
    assert f"- **`{OWN_FIELDS[endpoint]}`** (" in llms_txt
