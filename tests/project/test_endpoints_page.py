"""The tables of docs/endpoints.md against the endpoints in the package."""

import re

import pytest

from models import discover
from tests.support.endpoint_images import COLUMNS, EXAMPLES
from tests.support.fal_endpoints import FACTS
from tests.support.server_process import ROOT

MODELS = discover()
#: The words for a licence in the table of endpoints, by a part of its name in the table of weights.
LICENCES = {"Tencent": "Tencent's", "Apache": "Apache 2.0", "Non-Commercial": "non-commercial"}


def rows(first_column: str) -> dict[str, list[str]]:
    """Return the cells of each row of the table whose first column has this heading, by the cell of that column."""
    text = (ROOT / "docs" / "endpoints.md").read_text(encoding="utf-8")
    lines = text.partition(f"\n| {first_column} |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


ENDPOINTS, WEIGHTS = rows("endpoint"), rows("weights")


def test_the_table_has_each_endpoint() -> None:
    assert set(ENDPOINTS) == set(FACTS)


@pytest.mark.parametrize("endpoint", FACTS)
def test_weights_licence_and_memory_of_an_endpoint(endpoint: str) -> None:
    model = MODELS[endpoint.removesuffix("/stream")]
    _, weights, licence, memory, _ = ENDPOINTS[endpoint]
    needed = [*model.weights, *(extra.hub_id for extra in model.extra_weights)]
    named = [WEIGHTS[name] for name in re.split(" with | and ", weights)]
    for hub_id, (where, _, _) in zip(needed, named, strict=True):
        assert f"`{hub_id}" in f"`{where}`"
    names = ", ".join(entry[1] for entry in named)
    if weights.startswith("SRPO"):
        # The other parts of its directory are those of [dev].
        names += WEIGHTS["[dev]"][1]
    assert licence.split(", ") == [short for part, short in LICENCES.items() if part in names]
    gigabytes = [int(re.match(r"\d+", entry[2])[0]) for entry in named]  # type: ignore[index]
    assert memory == f"{sum(gigabytes)} GB"


@pytest.mark.parametrize("endpoint", FACTS)
def test_the_place_of_an_endpoints_image(endpoint: str) -> None:
    place = list(EXAMPLES).index(endpoint)
    assert ENDPOINTS[endpoint][4] == f"row {place // COLUMNS + 1}, column {place % COLUMNS + 1}"


def test_the_default_acceleration_is_as_the_page_says() -> None:
    for endpoint, facts in FACTS.items():
        default = facts.get("acceleration", {}).get("default", "none")
        assert default == ("regular" if endpoint.startswith("fal-ai/flux-1/") else "none")
