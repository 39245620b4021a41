"""Tests of model discovery."""

from pathlib import Path

import httpx
import pytest

from models import discover
from tests.support.server_process import MODELS, serving

NULL = """
from tests.support.fake_models import NullEngine, NullModel

MODEL = NullModel("{endpoint}", NullEngine)
"""


def write_module(directory: Path, name: str, source: str) -> Path:
    """Write a module into a directory of models; return the directory. Tests use new names: Python caches modules."""
    (directory / f"{name}.py").write_text(source)
    return directory


def test_the_package_has_flux_dev() -> None:
    found = discover()
    assert found["fal-ai/flux/dev"].weights == ("black-forest-labs/FLUX.1-dev",)
    assert {endpoint: model.endpoint for endpoint, model in found.items()} == {name: name for name in found}


def test_a_directory_adds_its_models() -> None:
    added = {
        f"test/{name}"
        for name in (
            "null",
            "gate",
            "raises",
            "unsafe",
            "lost",
            "memory",
            "large-previews",
            "copy",
            "lora",
            "inpaint",
            "vary",
        )
    }
    assert set(discover(MODELS)) == set(discover()) | added


def test_a_file_without_a_model_is_not_run(tmp_path: Path) -> None:
    directory = write_module(tmp_path, "discover_no_model", "raise RuntimError('run')\nNOT_A_MODEL = 1\nMODELLED = 2\n")
    (directory / "notes.txt").write_text("MODEL = 1")
    assert discover(directory) == discover()


def test_a_model_may_have_a_type_annotation(tmp_path: Path) -> None:
    source = NULL.format(endpoint="test/typed").replace("MODEL =", "MODEL: NullModel =")
    assert "test/typed" in discover(write_module(tmp_path, "discover_typed", source))


def test_a_module_may_offer_several_models(tmp_path: Path) -> None:
    source = NULL.format(endpoint="test/one").replace("MODEL = ", "MODELS = (")[:-1]
    write_module(tmp_path, "discover_several", f'{source}, NullModel("test/two", NullEngine))\n')
    assert set(discover(tmp_path)) - set(discover()) == {"test/one", "test/two"}


def test_a_module_may_offer_one_model_and_several(tmp_path: Path) -> None:
    source = NULL.format(endpoint="test/single") + 'MODELS = (NullModel("test/first", NullEngine),)\n'
    added = set(discover(write_module(tmp_path, "discover_both", source))) - set(discover())
    assert added == {"test/single", "test/first"}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("discover_only_text", '"""\nMODELS is in this text only.\n"""\n'),
        ("discover_empty", "MODELS = ()\n"),
        ("discover_names", 'MODELS = ("test/one", "test/two")\n'),
        ("discover_text", 'MODELS = "test/one"\n'),
        ("discover_number", "MODEL = 1\n"),
        ("discover_no_tuple", NULL.format(endpoint="test/one").replace("MODEL =", "MODELS =")),
        ("discover_class", "from models.flux_dev import FluxDev\n\nMODELS = (FluxDev,)\n"),
    ],
)
def test_a_module_without_models_is_an_error_that_names_the_file(tmp_path: Path, name: str, source: str) -> None:
    write_module(tmp_path, name, source)
    with pytest.raises(ValueError, match=rf"{name}\.py: MODEL must be a model, and MODELS a tuple of models"):
        discover(tmp_path)


def test_two_models_of_one_endpoint_are_an_error(tmp_path: Path) -> None:
    write_module(tmp_path, "discover_first", NULL.format(endpoint="test/same"))
    write_module(tmp_path, "discover_second", NULL.format(endpoint="test/same"))
    with pytest.raises(ValueError, match=r"two models serve test/same; one is in .*discover_second\.py"):
        discover(tmp_path)


def test_a_directory_cannot_replace_an_endpoint_of_the_package(tmp_path: Path) -> None:
    write_module(tmp_path, "discover_taken", NULL.format(endpoint="fal-ai/flux/dev"))
    with pytest.raises(ValueError, match="two models serve fal-ai/flux/dev"):
        discover(tmp_path)


def test_a_module_that_fails_raises_its_error_and_is_not_cached(tmp_path: Path) -> None:
    write_module(tmp_path, "discover_fails", "import discover_nothing\nMODEL = 1\n")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="discover_nothing"):
            discover(tmp_path)


def test_a_file_in_a_directory_is_served_without_other_changes(tmp_path: Path) -> None:
    """The server serves the endpoint, its descriptions and its own fields."""
    directory = tmp_path / "models"
    directory.mkdir()
    write_module(
        directory,
        "discover_served",
        """
from pydantic import Field

from models.flux_dev import FluxDevInput
from tests.support.fake_models import NullEngine, NullModel


class Input(FluxDevInput):
    zest: int = Field(3, ge=1, le=5, description="How much lemon.")


class Lemon(NullModel):
    Input = Input


MODEL = Lemon("me/lemon", NullEngine)
""",
    )
    with (
        serving(tmp_path / "data", "me/lemon=demo", models_dir=str(directory)) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        assert client.post("/me/lemon", json={"prompt": "a lemon"}).json()["images"]
        entry = client.post("/me/lemon", json={"prompt": "a lemon", "zest": 9}).json()["detail"][0]
        assert (entry["loc"], entry["ctx"]) == (["body", "zest"], {"le": 5})
        llms_txt = client.get("/models/me/lemon/llms.txt").text
        assert "How much lemon." in llms_txt
        assert "me/lemon" in [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert "/me/lemon" in client.get("/openapi.json").json()["paths"]
