"""Where weights come from."""

from pathlib import Path

import pytest

from models.base import Model
from models.flux_dev import FluxDev
from models.weights import DEMO, assign
from tests.null_model import NullEngine, NullModel

DEV, SCHNELL, NULL = "fal-ai/flux/dev", "fal-ai/flux/schnell", "test/null"
HUB = "black-forest-labs/FLUX.1-dev"


class Schnell(FluxDev):
    endpoint = SCHNELL
    weights = ("black-forest-labs/FLUX.1-schnell",)


MODELS: dict[str, Model] = {DEV: FluxDev(), SCHNELL: Schnell(), NULL: NullModel(NULL, NullEngine)}


def complaint(*specs: str) -> str:
    """What is said of these."""
    with pytest.raises(ValueError) as refused:
        assign(specs, MODELS)
    return str(refused.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Looks like a pipeline."""
    place = tmp_path / "weights"
    place.mkdir()
    (place / "model_index.json").write_text("{}")
    return place


def test_demo_serves_every_endpoint() -> None:
    assert assign(["demo"], MODELS) == {DEV: DEMO, SCHNELL: DEMO, NULL: None}
    assert (DEMO / "model_index.json").is_file()


def test_a_model_without_weights_is_always_served() -> None:
    assert assign([], MODELS) == {NULL: None}


def test_a_hub_id_serves_the_endpoints_that_name_it() -> None:
    assert assign([HUB], MODELS) == {DEV: HUB, NULL: None}


def test_a_folder_is_flux_dev(folder: Path) -> None:
    assert assign([str(folder)], MODELS) == {DEV: folder, NULL: None}


def test_a_folder_is_found_from_where_the_server_was_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert assign(["weights"], MODELS)[DEV] == assign(["./weights"], MODELS)[DEV] == folder


def test_a_folder_is_found_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert assign(["~/weights"], MODELS)[DEV] == folder


def test_an_endpoint_can_be_bound(folder: Path) -> None:
    specs = [f"{SCHNELL}={folder}", f"{DEV}=somebody/FLUX.1-dev-finetuned"]
    assert assign(specs, MODELS) == {DEV: "somebody/FLUX.1-dev-finetuned", SCHNELL: folder, NULL: None}
    assert assign([f"{DEV}=demo"], MODELS) == {DEV: DEMO, NULL: None}


def test_the_last_word_on_an_endpoint_counts(folder: Path) -> None:
    assert assign(["demo", f"{DEV}={folder}"], MODELS) == {DEV: folder, SCHNELL: DEMO, NULL: None}


@pytest.mark.parametrize("name", ["flux1-dev.safetensors", "flux1-dev-Q4.gguf", "flux.ckpt", "somebody/flux.gguf"])
@pytest.mark.parametrize("endpoint", ["", f"{DEV}="])
def test_a_single_file_is_refused_with_the_reason(name: str, endpoint: str) -> None:
    said = complaint(endpoint + name)
    assert said == f"{name}: single-file checkpoints are not supported; give a folder in diffusers layout"


@pytest.mark.parametrize(
    "place", ["", ".", "/nowhere", "./nowhere", "~/nowhere/else", "nowhere", "a/b/c", "https://huggingface.co/a/b"]
)
def test_what_is_neither_folder_nor_hub_id_is_refused(place: str) -> None:
    said = complaint(f"{DEV}={place}")
    assert said == f"{place}: not a folder in diffusers layout (no model_index.json) and not a hub id"


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    assert "no model_index.json" in complaint(str(tmp_path))


def test_an_unknown_hub_id_is_refused_with_what_to_say_instead() -> None:
    said = complaint("stabilityai/sdxl-turbo")
    assert said == ("stabilityai/sdxl-turbo: no endpoint is known to run on it; say ENDPOINT=stabilityai/sdxl-turbo")


def test_an_unknown_endpoint_is_refused_with_those_there_are() -> None:
    said = complaint("fal-ai/flux/pro=demo")
    assert said == f"fal-ai/flux/pro=demo: fal-ai/flux/pro is not an endpoint here; there are {DEV}, {SCHNELL}, {NULL}"


def test_every_problem_is_listed() -> None:
    said = complaint("flux.gguf", "demo", "/nowhere", "x=demo").splitlines()
    assert [line.partition(":")[0] for line in said] == ["flux.gguf", "/nowhere", "x=demo"]
