"""Fuzzing with Schemathesis: requests that fit the OpenAPI document and requests that do not.

No answer is a 5xx, and every answer has a status, a type and a body that the document describes.
"""

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.server_process import ROOT, serving

# Import this module now, while no other thread compiles. Schemathesis would import it during the first test, where
# CPython 3.11 may fail to compile one of its large modules (python/cpython#106905).
importlib.import_module("schemathesis.specs.openapi._hypothesis")

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
OPTIONS: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """Read the operations from the OpenAPI document of a server whose only model computes nothing."""
    models = str(ROOT / "tests" / "support" / "faults" / "models")
    with serving(tmp_path_factory.mktemp("fuzzed"), "test/crash=demo", models_dir=models) as server:
        document = schemathesis.openapi.from_url(f"{server.ready().url}/openapi.json")
        found: Any = document.get_all_operations()
        yield [operation.ok() for operation in found]


def fuzzed(operations: list[Any], mode: GenerationMode, examples: int) -> Counter[int]:
    """Send at least `examples` requests over all operations; return the number of answers by status code.

    Operations for which no request of this mode exists are skipped.
    """
    statuses: Counter[int] = Counter()
    share = examples // len(operations) + 1
    # Hypothesis soon runs out of requests for operations with few variations, so the other operations get more.
    varied = [operation for operation in operations if _fuzz(operation, mode, share, statuses) >= share]
    while (missing := examples - statuses.total()) > 0:
        for operation in varied:
            _fuzz(operation, mode, missing // len(varied) + 1, statuses)
    return statuses


def _fuzz(operation: Any, mode: GenerationMode, examples: int, statuses: Counter[int]) -> int:
    """Send up to `examples` requests to one operation; return how many were sent."""
    before = statuses.total()

    @settings(max_examples=examples, **OPTIONS)
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        if isinstance(case.query, dict):
            # The server would look up the host names.
            case.query.pop("fal_webhook", None)
        response = case.call()
        statuses[response.status_code] += 1
        # The document describes an event stream as a string, but Schemathesis compares each event with the schema.
        is_stream = response.headers["content-type"][0].startswith("text/event-stream")
        case.validate_response(response, checks=CHECKS if is_stream else [*CHECKS, response_schema_conformance])

    with contextlib.suppress(Unsatisfiable):
        send()
    return statuses.total() - before


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_answer_is_a_server_error(operations: list[Any], mode: GenerationMode) -> None:
    statuses = fuzzed(operations, mode, 300)
    # The test means little unless many fitting requests are accepted and many others are refused.
    accepted = sum(number for status, number in statuses.items() if status < 300)
    refused = sum(number for status, number in statuses.items() if 400 <= status < 500)
    assert accepted > 50 if mode == GenerationMode.POSITIVE else refused > 100


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_answer_of_many_more_is_a_server_error(operations: list[Any], mode: GenerationMode) -> None:
    statuses = fuzzed(operations, mode, 20_000)
    print(f"{statuses.total()} requests, {mode.value}: {dict(sorted(statuses.items()))}")
