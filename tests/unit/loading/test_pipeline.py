"""Where weights come from, and how they are loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from models.base import EngineConfig, LoadProgress, Model
from models.flux_dev import FluxDev
from models.loading import hub, memory_plans, pipeline
from models.loading.pipeline import load_pipeline
from models.loading.specs import DEMO, assign_weights
from tests.support.fake_hub import write_flux_dev
from tests.support.fake_models import NullEngine, NullModel

DEV, SCHNELL, NULL = "fal-ai/flux/dev", "fal-ai/flux/schnell", "test/null"
HUB = "black-forest-labs/FLUX.1-dev"


class Schnell(FluxDev):
    endpoint = SCHNELL
    weights = ("black-forest-labs/FLUX.1-schnell",)


MODELS: dict[str, Model] = {DEV: FluxDev(), SCHNELL: Schnell(), NULL: NullModel(NULL, NullEngine)}


def complaint(*specs: str) -> str:
    """What is said of these."""
    with pytest.raises(ValueError) as refused:
        assign_weights(specs, MODELS)
    return str(refused.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Looks like a pipeline."""
    place = tmp_path / "weights"
    place.mkdir()
    (place / "model_index.json").write_text("{}")
    return place


def test_demo_serves_every_endpoint() -> None:
    assert assign_weights(["demo"], MODELS) == {DEV: DEMO, SCHNELL: DEMO, NULL: None}
    assert (DEMO / "model_index.json").is_file()


def test_a_model_without_weights_is_always_served() -> None:
    assert assign_weights([], MODELS) == {NULL: None}


def test_a_hub_id_serves_the_endpoints_that_name_it() -> None:
    assert assign_weights([HUB], MODELS) == {DEV: HUB, NULL: None}


def test_a_folder_is_flux_dev(folder: Path) -> None:
    assert assign_weights([str(folder)], MODELS) == {DEV: folder, NULL: None}


def test_a_folder_is_found_from_where_the_server_was_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert assign_weights(["weights"], MODELS)[DEV] == assign_weights(["./weights"], MODELS)[DEV] == folder


def test_a_folder_is_found_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert assign_weights(["~/weights"], MODELS)[DEV] == folder


def test_an_endpoint_can_be_bound(folder: Path) -> None:
    specs = [f"{SCHNELL}={folder}", f"{DEV}=somebody/FLUX.1-dev-finetuned"]
    assert assign_weights(specs, MODELS) == {DEV: "somebody/FLUX.1-dev-finetuned", SCHNELL: folder, NULL: None}
    assert assign_weights([f"{DEV}=demo"], MODELS) == {DEV: DEMO, NULL: None}


def test_the_last_word_on_an_endpoint_counts(folder: Path) -> None:
    assert assign_weights(["demo", f"{DEV}={folder}"], MODELS) == {DEV: folder, SCHNELL: DEMO, NULL: None}


@pytest.mark.parametrize("name", ["flux1-dev.safetensors", "flux1-dev-Q4.gguf", "flux.ckpt", "somebody/flux.gguf"])
@pytest.mark.parametrize("endpoint", ["", f"{DEV}="])
def test_a_single_file_is_refused_with_the_reason(name: str, endpoint: str) -> None:
    said = complaint(endpoint + name)
    assert said == f"{name}: single-file checkpoints are not supported; use a directory in diffusers layout"


@pytest.mark.parametrize(
    "place", ["", ".", "/nowhere", "./nowhere", "~/nowhere/else", "nowhere", "a/b/c", "https://huggingface.co/a/b"]
)
def test_what_is_neither_folder_nor_hub_id_is_refused(place: str) -> None:
    said = complaint(f"{DEV}={place}")
    assert said == f"{place}: neither a directory in diffusers layout (no model_index.json) nor a hub id"


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    assert "no model_index.json" in complaint(str(tmp_path))


def test_an_unknown_hub_id_is_refused_with_what_to_say_instead() -> None:
    name = "stabilityai/sdxl-turbo"
    assert complaint(name) == f"{name}: no known endpoint runs on these weights; use ENDPOINT={name}"


def test_an_unknown_endpoint_is_refused_with_those_there_are() -> None:
    said = complaint("fal-ai/flux/pro=demo")
    listed = f"{DEV}, {SCHNELL}, {NULL}"
    assert said == f"fal-ai/flux/pro=demo: fal-ai/flux/pro is not an endpoint here; choose from {listed}"


def test_every_problem_is_listed() -> None:
    said = complaint("flux.gguf", "demo", "/nowhere", "x=demo").splitlines()
    assert [line.partition(":")[0] for line in said] == ["flux.gguf", "/nowhere", "x=demo"]


# -- loading


@pytest.fixture(scope="module")
def flux_dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-dev's exact layout at tiny dimensions."""
    folder = tmp_path_factory.mktemp("weights") / "FLUX.1-dev"
    write_flux_dev(folder)
    return folder


def placement(where: Path, **changes: Any) -> EngineConfig:
    """In the type that the files are in, whatever this CPU is fast at."""
    return EngineConfig(where, safety_checker="", device="cpu", **{"dtype": "bfloat16", **changes})


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("plan", [plan.name for plan in memory_plans.PLANS])
def test_what_is_loaded_is_reported_by_component(flux_dev: Path, plan: str) -> None:
    reports: list[LoadProgress] = []
    _, taken = load_pipeline(placement(flux_dev, memory=plan, report=reports.append))
    assert taken.name == plan
    parts = ("transformer", "text_encoder", "text_encoder_2", "vae")
    sizes = {name: bytes_in(flux_dev / name) for name in parts}
    assert all(sizes.values())
    told = [report.component for report in reports]
    assert told == sorted(parts, key=lambda name: -sizes[name])
    assert [report.loaded_bytes for report in reports] == [
        sum(sizes[name] for name in told[:index]) for index in range(len(told))
    ]
    assert {report.total_bytes for report in reports} == {sum(sizes.values())}


def test_a_sharded_folder_is_loaded_as_the_pipeline_loads_it(flux_dev: Path) -> None:
    import torch
    from diffusers import FluxPipeline

    assert (flux_dev / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert len(list((flux_dev / "transformer").glob("*.safetensors"))) > 1
    ours, plan = load_pipeline(placement(flux_dev))
    theirs = FluxPipeline.from_pretrained(flux_dev, dtype=torch.bfloat16, local_files_only=True)
    assert plan.name == "resident"
    assert ours.scheduler.config == theirs.scheduler.config
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        mine, its = getattr(ours, name), getattr(theirs, name)
        assert type(mine) is type(its)
        assert not mine.training
        expected = its.state_dict()
        assert mine.state_dict().keys() == expected.keys()
        for key, tensor in mine.state_dict().items():
            assert tensor.dtype == expected[key].dtype
            assert torch.equal(tensor, expected[key])
    for name in ("tokenizer", "tokenizer_2"):
        text = "A red apple, on a blue table."
        assert getattr(ours, name)(text).input_ids == getattr(theirs, name)(text).input_ids


def test_a_sharded_folder_paints(flux_dev: Path) -> None:
    from models.flux.engine import FluxEngine
    from tests.support.tiny_flux import asked, painted

    (picture,) = painted(FluxEngine.load(placement(flux_dev)), asked(width=96, height=64), 1)
    assert picture.size == (96, 64)


@pytest.fixture
def changed(tmp_path: Path) -> Any:
    """A copy of the demo whose index names another class."""

    def change(component: str, library: str) -> Path:
        folder = tmp_path / "demo"
        shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("recipe"))
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index[component] = [library, "Stranger"]
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        return folder

    return change


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2", "scheduler", "tokenizer"])
def test_classes_of_other_libraries_are_refused_before_anything_is_loaded(changed: Any, component: str) -> None:
    folder, reports = changed(component, "custom_lib"), list[LoadProgress]()
    with pytest.raises(OSError, match=f"{component} is of custom_lib"):
        load_pipeline(placement(folder, report=reports.append))
    assert reports == []


def test_what_does_not_fit_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = list[LoadProgress]()
    monkeypatch.setattr(pipeline, "device_for", lambda name: "cuda")
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 1000)
    with pytest.raises(OSError, match="GB free"):
        load_pipeline(placement(DEMO, report=reports.append))
    assert reports == []


def test_pickled_weights_are_not_loaded(flux_dev: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(flux_dev, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert hub.missing_components(folder) == ["vae"]
    with pytest.raises(OSError, match="safetensors"):
        load_pipeline(placement(folder))


def test_without_weights_there_is_nothing_to_load() -> None:
    with pytest.raises(ValueError, match="needs weights"):
        load_pipeline(EngineConfig(None, safety_checker="", device="cpu"))
