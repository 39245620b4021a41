"""Tests of weights arguments, and of loading the weights that they name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from models import discover
from models.base import EngineConfig, LoadProgress, Model, SingleFile
from models.flux_dev import FluxDev
from models.loading import hub, memory_plans, pipeline
from models.loading.pipeline import load_pipeline
from models.loading.specs import DEMO, assign_weights, name_of
from tests.support.fake_hub import write_flux_dev
from tests.support.fake_models import NullEngine, NullModel

DEV, SCHNELL, NULL = "fal-ai/flux/dev", "fal-ai/flux/schnell", "test/null"
HUB = "black-forest-labs/FLUX.1-dev"


class Schnell(FluxDev):
    endpoint = SCHNELL
    weights = ("black-forest-labs/FLUX.1-schnell",)


MODELS: dict[str, Model] = {DEV: FluxDev(), SCHNELL: Schnell(), NULL: NullModel(NULL, NullEngine)}


def problem(*specs: str) -> str:
    """Return the error message for these arguments."""
    with pytest.raises(ValueError) as error:
        assign_weights(specs, MODELS)
    return str(error.value)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory that looks like a pipeline."""
    path = tmp_path / "weights"
    path.mkdir()
    (path / "model_index.json").write_text("{}")
    return path


def test_demo_serves_every_endpoint() -> None:
    assert assign_weights(["demo"], MODELS) == {DEV: DEMO, SCHNELL: DEMO, NULL: None}
    assert (DEMO / "model_index.json").is_file()


def test_the_demo_has_weights_for_every_endpoint_of_the_package() -> None:
    models = discover()
    found = assign_weights(["demo"], models)
    assert found.keys() == models.keys()
    names = {name_of(where) for where in found.values() if where}
    assert names == {"demo", "demo/fill.safetensors"}
    fill = assign_weights(["fal-ai/flux-lora-fill=demo"], models)
    assert fill == {"fal-ai/flux-lora-fill": SingleFile(DEMO / "fill.safetensors", DEMO)}


@pytest.mark.parametrize("name", ["canny", "depth"])
def test_canny_and_depth_on_a_directory_of_dev_need_a_control_lora(directory: Path, name: str) -> None:
    models, endpoint = discover(), f"fal-ai/flux-lora-{name}"
    (directory / "depth").mkdir()
    with pytest.raises(ValueError, match=rf"also needs one safetensors file of \S+-dev-lora in the \S+ .*{name}-lora"):
        assign_weights([f"{endpoint}={directory}"], models)
    (directory / f"{name}-lora").mkdir()
    (directory / f"{name}-lora" / "lora.safetensors").touch()
    assert assign_weights([f"{endpoint}={directory}"], models) == {endpoint: directory}


def test_a_model_without_weights_is_always_served() -> None:
    assert assign_weights([], MODELS) == {NULL: None}


def test_a_hub_id_serves_the_endpoints_that_name_it() -> None:
    assert assign_weights([HUB], MODELS) == {DEV: HUB, NULL: None}


def test_a_directory_serves_flux_dev(directory: Path) -> None:
    assert assign_weights([str(directory)], MODELS) == {DEV: directory, NULL: None}


def test_a_relative_directory_is_found_from_the_working_directory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory.parent)
    assert assign_weights(["weights"], MODELS)[DEV] == assign_weights(["./weights"], MODELS)[DEV] == directory


def test_a_directory_is_found_in_the_home_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(directory.parent))
    assert assign_weights(["~/weights"], MODELS)[DEV] == directory


def test_weights_can_be_assigned_to_an_endpoint(directory: Path) -> None:
    specs = [f"{SCHNELL}={directory}", f"{DEV}=someone/FLUX.1-dev-finetuned"]
    assert assign_weights(specs, MODELS) == {DEV: "someone/FLUX.1-dev-finetuned", SCHNELL: directory, NULL: None}
    assert assign_weights([f"{DEV}=demo"], MODELS) == {DEV: DEMO, NULL: None}


def test_the_last_weights_of_an_endpoint_are_used(directory: Path) -> None:
    assert assign_weights(["demo", f"{DEV}={directory}"], MODELS) == {DEV: directory, SCHNELL: DEMO, NULL: None}


@pytest.mark.parametrize("spec", ["{file}", f"{DEV}={{file}}"])
@pytest.mark.parametrize("base", ["demo", HUB])
def test_a_single_file_is_served_on_its_base(tmp_path: Path, spec: str, base: str) -> None:
    # What the file is, its first bytes say, so its name needs no extension.
    for name in ("flux1-dev.safetensors", "flux.gguf", "flux.SFT", "flux"):
        file = tmp_path / name
        file.touch()
        expected = SingleFile(file, DEMO if base == "demo" else base)
        assert assign_weights([spec.format(file=file)], MODELS, base) == {DEV: expected, NULL: None}


def test_a_file_on_the_hub_is_served_on_its_base() -> None:
    place = "city96/FLUX.1-dev-gguf/sub/flux1-dev-Q4_0.gguf"
    assert assign_weights([f"{SCHNELL}={place}"], MODELS, HUB) == {SCHNELL: SingleFile(place, HUB), NULL: None}


@pytest.mark.parametrize("name", ["a/b/flux1-dev.safetensors", "a/b/c.gguf"])
def test_a_single_file_needs_a_base(name: str) -> None:
    assert problem(name).startswith(f"{name}: a single file lacks text encoders or configurations; name the weights")


@pytest.mark.parametrize("name", ["flux1-dev.safetensors", "someone/flux.gguf", "./a/b/flux.gguf", "/a/b/flux.gguf"])
def test_a_file_that_is_not_there_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match="neither a file nor a file on the hub, such as"):
        assign_weights([name], MODELS, HUB)


@pytest.mark.parametrize("name", ["flux.ckpt", "a/b/flux.pt", "flux.pth", "a/b/pytorch_model.bin"])
def test_a_pickle_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match="pickles are not supported, because they can run code"):
        assign_weights([name], MODELS, HUB)


def test_a_base_that_is_no_pipeline_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "flux.gguf").touch()
    with pytest.raises(ValueError, match=f"{tmp_path}: neither a directory in diffusers layout"):
        assign_weights([str(tmp_path / "flux.gguf")], MODELS, str(tmp_path))


@pytest.mark.parametrize(
    "path", ["", ".", "/nowhere", "./nowhere", "~/nowhere/else", "nowhere", "a/b/c", "https://huggingface.co/a/b"]
)
def test_an_argument_that_is_neither_directory_nor_hub_id_is_rejected(path: str) -> None:
    message = problem(f"{DEV}={path}")
    assert message == f"{path}: neither a directory in diffusers layout (no model_index.json) nor a hub id"


def test_a_directory_without_a_pipeline_is_rejected(tmp_path: Path) -> None:
    assert "no model_index.json" in problem(str(tmp_path))


def test_an_unknown_hub_id_is_rejected_with_a_suggestion() -> None:
    name = "stabilityai/sdxl-turbo"
    assert problem(name) == f"{name}: no known endpoint runs on these weights; use ENDPOINT={name}"


def test_an_unknown_endpoint_is_rejected_with_the_known_ones() -> None:
    message = problem("fal-ai/flux/pro=demo")
    listed = f"{DEV}, {SCHNELL}, {NULL}"
    assert message == f"fal-ai/flux/pro=demo: fal-ai/flux/pro is not an endpoint here; choose from {listed}"


def test_every_problem_is_listed() -> None:
    lines = problem("flux.gguf", "demo", "/nowhere", "x=demo").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["flux.gguf", "/nowhere", "x=demo"]


# -- loading


@pytest.fixture(scope="module")
def flux_dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return weights in FLUX.1-dev's exact layout with tiny dimensions."""
    directory = tmp_path_factory.mktemp("weights") / "FLUX.1-dev"
    write_flux_dev(directory)
    return directory


def engine_config(weights: Path, **changes: Any) -> EngineConfig:
    """Return a configuration with the dtype of the files, whichever dtype is fast on this CPU."""
    return EngineConfig(weights, safety_checker="", device="cpu", **{"dtype": "bfloat16", **changes})


def bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


CPU = memory_plans.Target("cpu")


@pytest.mark.parametrize("plan", [plan.name for plan in memory_plans.PLANS if not plan.problem(CPU)])
def test_loading_is_reported_for_each_component(flux_dev: Path, plan: str) -> None:
    reports: list[LoadProgress] = []
    _, plan_used = load_pipeline(engine_config(flux_dev, memory=plan, report=reports.append))
    assert plan_used.name == plan
    names = ("transformer", "text_encoder", "text_encoder_2", "vae")
    sizes = {name: bytes_in(flux_dev / name) for name in names}
    assert all(sizes.values())
    components = [report.component for report in reports]
    assert components == sorted(names, key=lambda name: -sizes[name])
    assert [report.loaded_bytes for report in reports] == [
        sum(sizes[name] for name in components[:index]) for index in range(len(components))
    ]
    assert {report.total_bytes for report in reports} == {sum(sizes.values())}


def test_sharded_weights_are_loaded_as_the_pipeline_loads_them(flux_dev: Path) -> None:
    import torch
    from diffusers import FluxPipeline

    assert (flux_dev / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert len(list((flux_dev / "transformer").glob("*.safetensors"))) > 1
    ours, plan = load_pipeline(engine_config(flux_dev))
    theirs = FluxPipeline.from_pretrained(flux_dev, dtype=torch.bfloat16, local_files_only=True)
    assert plan.name == "resident"
    assert ours.scheduler.config == theirs.scheduler.config
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        loaded, reference = getattr(ours, name), getattr(theirs, name)
        assert type(loaded) is type(reference)
        assert not loaded.training
        expected = reference.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        for key, tensor in loaded.state_dict().items():
            assert tensor.dtype == expected[key].dtype
            assert torch.equal(tensor, expected[key])
    for name in ("tokenizer", "tokenizer_2"):
        text = "A red apple, on a blue table."
        assert getattr(ours, name)(text).input_ids == getattr(theirs, name)(text).input_ids


def test_sharded_weights_generate_an_image(flux_dev: Path) -> None:
    from models.flux.loader import load_engine
    from tests.support.tiny_flux import generate, make_request

    (image,) = generate(load_engine(engine_config(flux_dev)), make_request(width=96, height=64), 1)
    assert image.size == (96, 64)


@pytest.fixture
def demo_with_class(tmp_path: Path) -> Any:
    """Return a function that copies the demo and names an unknown class in its index."""

    def copy_demo(component: str, library: str) -> Path:
        directory = tmp_path / "demo"
        shutil.copytree(DEMO, directory, ignore=shutil.ignore_patterns("recipe"))
        index = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
        index[component] = [library, "Stranger"]
        (directory / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        return directory

    return copy_demo


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2", "scheduler", "tokenizer"])
def test_classes_of_other_libraries_are_rejected_before_anything_is_loaded(
    demo_with_class: Any, component: str
) -> None:
    directory, reports = demo_with_class(component, "custom_lib"), list[LoadProgress]()
    with pytest.raises(OSError, match=f"{component} is of custom_lib"):
        load_pipeline(engine_config(directory, report=reports.append))
    assert reports == []


def test_weights_that_do_not_fit_are_rejected_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = list[LoadProgress]()
    monkeypatch.setattr(pipeline, "device_for", lambda name: "cuda")
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 1000)
    with pytest.raises(OSError, match="GB free"):
        load_pipeline(engine_config(DEMO, report=reports.append, quantize="none"))
    assert reports == []


def test_pickled_weights_are_not_loaded(flux_dev: Path, tmp_path: Path) -> None:
    directory = tmp_path / "pickled"
    shutil.copytree(flux_dev, directory)
    (directory / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert hub.missing_components(directory) == ["vae"]
    with pytest.raises(OSError, match="safetensors"):
        load_pipeline(engine_config(directory))


def test_without_weights_there_is_nothing_to_load() -> None:
    with pytest.raises(ValueError, match="needs weights"):
        load_pipeline(EngineConfig(None, safety_checker="", device="cpu"))
