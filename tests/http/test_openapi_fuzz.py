"""Schemathesis reads our OpenAPI document and sends what fits it, and what does not: no answer is a 5xx."""

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

from tests.support.server_process import ROOT, serving

# Imported here, while no other thread compiles: schemathesis would import it within the first test, and CPython 3.11
# may then fail to compile one of its large modules (python/cpython#106905).
importlib.import_module("schemathesis.specs.openapi._hypothesis")

OPTIONS: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """Those of the document of a server with one model that paints nothing."""
    models = str(ROOT / "tests" / "support" / "faults" / "models")
    with serving(tmp_path_factory.mktemp("fuzzed"), "test/crash=demo", models_dir=models) as server:
        document = schemathesis.openapi.from_url(f"{server.ready().url}/openapi.json")
        found: Any = document.get_all_operations()
        yield [operation.ok() for operation in found]


def fuzzed(operations: list[Any], mode: GenerationMode, examples: int) -> Counter[int]:
    """So many requests at least, over all operations; returns the statuses. What cannot be got wrong is left out."""
    statuses: Counter[int] = Counter()
    share = examples // len(operations) + 1
    # Where there is little to vary Hypothesis soon has no more, so the others make up for them.
    rich = [operation for operation in operations if _fuzz(operation, mode, share, statuses) >= share]
    while (lacking := examples - statuses.total()) > 0:
        for operation in rich:
            _fuzz(operation, mode, lacking // len(rich) + 1, statuses)
    return statuses


def _fuzz(operation: Any, mode: GenerationMode, examples: int, statuses: Counter[int]) -> int:
    """How many it came to."""
    before = statuses.total()

    @settings(max_examples=examples, **OPTIONS)
    @given(case=operation.as_strategy(generation_mode=mode))
    def sent(case: Any) -> None:
        response = case.call()
        statuses[response.status_code] += 1
        case.validate_response(response, checks=[not_a_server_error])

    with contextlib.suppress(Unsatisfiable):
        sent()
    return statuses.total() - before


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_answer_is_the_servers_fault(operations: list[Any], mode: GenerationMode) -> None:
    statuses = fuzzed(operations, mode, 500)
    # What fits is mostly accepted, and what does not is not, or this would say little.
    accepted = sum(number for status, number in statuses.items() if status < 300)
    refused = sum(number for status, number in statuses.items() if 400 <= status < 500)
    assert accepted > 50 if mode == GenerationMode.POSITIVE else refused > 100


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_nor_of_many_more(operations: list[Any], mode: GenerationMode) -> None:
    statuses = fuzzed(operations, mode, 20_000)
    print(f"{statuses.total()} requests, {mode.value}: {dict(sorted(statuses.items()))}")
