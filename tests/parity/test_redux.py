"""Redux: an image instead of a prompt, against diffusers' own two pipelines, bit for bit."""

import base64
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
import torch
from PIL import Image

from models import discover
from models.base import EngineConfig, GenerationFailed, Model
from models.flux.engine import FluxEngine
from models.flux.loader import load_engine
from models.flux.redux import Redux
from models.flux_dev import FluxDev, FluxDevRedux, FluxDevReduxInput
from models.loading import hub
from models.loading.specs import DEMO, assign_weights
from tests.support import tiny_flux
from tests.support.server_process import serving
from tests.support.tiny_flux import AllSafeChecker, AlwaysShare, difference, finish_task, tiers_of
from tests.support.tiny_redux import prior, write_redux
from tests.unit.loading.test_verify import add_entries

DEV, REDUX = "fal-ai/flux/dev", "fal-ai/flux/dev/redux"
HUB, REDUX_HUB = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Redux-dev"
MODELS: dict[str, Model] = {DEV: FluxDev(), REDUX: FluxDevRedux()}
#: The widths of the text states that FluxPriorReduxPipeline makes, whatever widths the transformer reads.
TRUE_WIDTHS = {"joint_attention_dim": 4096, "pooled_projection_dim": 768}


def request_with(**fields: Any) -> FluxDevReduxInput:
    size = {"width": 96, "height": 64}
    body = {"image_url": "unused", "image_size": size, "num_inference_steps": 2, **fields}
    return FluxDevReduxInput.model_validate(body)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    colours = numpy.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
    path = tmp_path / "source.png"
    Image.fromarray(colours).resize((203, 149), Image.Resampling.BICUBIC).save(path)
    return path


def redux_engine(dtype: torch.dtype, redux: Redux | None = None) -> FluxEngine:
    pipeline = tiny_flux.pipeline(dtype)
    pipeline.transformer = tiny_flux.transformer(dtype, **TRUE_WIDTHS)
    redux = redux or Redux(prior(dtype, 4096), pipeline.transformer)
    return FluxEngine(
        pipeline, AllSafeChecker(), tiers_of(pipeline.transformer), "cpu", redux=redux, sharing=AlwaysShare()
    )


def inputs_of(source: Path) -> Mapping[str, Path]:
    return {"image_url": source}


@pytest.mark.parametrize("size", [(96, 64), pytest.param((64, 160), marks=pytest.mark.thorough)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("endpoint", [name for name in discover() if name.endswith("/redux")])
def test_equals_the_pipelines(source: Path, dtype: torch.dtype, endpoint: str, size: tuple[int, int]) -> None:
    width, height = size
    body = {"image_url": "unused", "image_size": {"width": width, "height": height}, "num_inference_steps": 2}
    request: Any = discover()[endpoint].Input.model_validate(body)
    diffusers_pipeline = tiny_flux.pipeline(dtype)
    diffusers_pipeline.transformer = tiny_flux.transformer(dtype, **TRUE_WIDTHS)
    embeds = prior(dtype, 4096)(Image.open(source))
    expected = diffusers_pipeline(
        **embeds,
        width=width,
        height=height,
        num_inference_steps=2,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(5),
    ).images[0]
    engine = redux_engine(dtype)
    (image,) = finish_task(engine, engine.start(request, 5, inputs_of(source)))
    assert difference(image, expected) == 0


def test_different_source_images_give_different_latents(source: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    engine = redux_engine(torch.float32)
    latents = []
    for path in (source, tmp_path / "red.png"):
        (sample,) = tiny_flux.run_steps(engine, engine.start(request_with(), 5, inputs_of(path))).samples
        latents.append(sample.latents)
    assert not torch.equal(*latents)


def test_redux_tasks_share_a_forward(source: Path) -> None:
    """Check that Redux tasks share forwards. Other tasks cannot join, because their texts have another length."""
    engine = redux_engine(torch.float32)
    request = request_with(acceleration="regular")
    task, other = engine.start(request, 1, inputs_of(source)), engine.start(request, 2, inputs_of(source))
    with tiny_flux.record_batch_sizes(engine.pipeline.transformer) as sizes:
        engine.advance(task, [other])
    assert sizes == [2]


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the demo weights, which have Redux."""
    directory = tmp_path_factory.mktemp("weights") / "demo"
    shutil.copytree(DEMO, directory, ignore=shutil.ignore_patterns("recipe", "__pycache__"))
    return directory


def test_served_only_with_its_weights(weights_dir: Path, tmp_path: Path) -> None:
    assert assign_weights(["demo"], MODELS) == {DEV: DEMO, REDUX: DEMO}
    assert assign_weights([f"{REDUX}={weights_dir}"], MODELS) == {REDUX: weights_dir}
    shutil.copy(weights_dir / "model_index.json", tmp_path)
    assert assign_weights([str(tmp_path)], MODELS) == {DEV: tmp_path}
    with pytest.raises(ValueError, match=r"/redux also needs black-forest-labs/\S+ in the directory .*redux"):
        assign_weights([f"{REDUX}={tmp_path}"], MODELS)


def test_hub_weights_find_redux_in_the_hub_cache(monkeypatch: pytest.MonkeyPatch, weights_dir: Path) -> None:
    assert assign_weights([HUB], MODELS) == {DEV: HUB}
    with pytest.raises(ValueError, match=f"also needs {REDUX_HUB}; run `flux-server pull {REDUX_HUB}`"):
        assign_weights([f"{REDUX}={HUB}"], MODELS)
    monkeypatch.setattr(hub, "cached_path", {REDUX_HUB: weights_dir / "redux"}.get)
    assert assign_weights([HUB], MODELS) == {DEV: HUB, REDUX: HUB}


def test_its_directory_is_complete_for_the_hub(tmp_path: Path) -> None:
    """Check that `pull`, which reads the directory as a pipeline, finds no component missing."""
    write_redux(tmp_path, 48)
    assert hub.missing_components(tmp_path / "redux") == []


def test_weights_of_another_width_stop_the_start(tmp_path: Path, weights_dir: Path) -> None:
    shutil.copytree(weights_dir, tmp_path / "demo")
    shutil.rmtree(tmp_path / "demo" / "redux")
    write_redux(tmp_path / "demo", 48)
    with pytest.raises(OSError, match="the Redux weights make tokens of width 48, but the transformer takes width"):
        load_engine(EngineConfig(tmp_path / "demo", safety_checker="", device="cpu"))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("image_embedder/config.json", {"redux_dim": 48}, "image_embedder has other shapes than its config.json for"),
        ("image_encoder/config.json", {"num_hidden_layers": 4}, "image_encoder lacks"),
        ("image_encoder/config.json", {"hidden_size": "wide"}, "image_encoder cannot be loaded: "),
        ("feature_extractor/preprocessor_config.json", {"size": "large"}, "redux cannot be loaded: "),
    ],
)
def test_malformed_weights_are_named(
    tmp_path: Path, weights_dir: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    """Check the errors while Redux is loaded; test_malformed_weights.py tests the checks before the loading."""
    shutil.copytree(weights_dir / "redux", tmp_path / "redux")
    add_entries(tmp_path / "redux" / file, **changes)
    transformer = tiny_flux.transformer(joint_attention_dim=128)
    with pytest.raises(OSError, match=message):
        Redux.load(tmp_path / "redux", transformer, "cpu")


def test_an_engine_without_redux_names_the_missing_weights(source: Path) -> None:
    with pytest.raises(GenerationFailed, match=REDUX_HUB):
        tiny_flux.engine().start(request_with(), 1, inputs_of(source))


def test_over_the_wire(tmp_path: Path, weights_dir: Path, source: Path) -> None:
    url = f"data:image/png;base64,{base64.b64encode(source.read_bytes()).decode()}"
    body = {"image_url": url, "image_size": {"width": 96, "height": 64}, "num_inference_steps": 2, "seed": 5}
    body |= {"output_format": "png", "sync_mode": True, "enable_safety_checker": False}
    with (
        serving(tmp_path / "data", f"{DEV}={weights_dir}", f"{REDUX}={weights_dir}") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        response = client.post(f"/{REDUX}", json=body)
        assert response.status_code == 200, response.text
        assert (response.json()["prompt"], response.json()["seed"]) == ("", 5)
        llms_txt = client.get(f"/models/{REDUX}/llms.txt").text
        assert "**Category**: image-to-image" in llms_txt
        document = client.get("/api/openapi/queue/openapi.json", params={"endpoint_id": REDUX}).json()
        schema = document["components"]["schemas"]["FluxDevReduxInput"]
        assert schema["required"] == ["image_url"] and "prompt" not in schema["properties"]
        unserved = client.post("/fal-ai/flux-1/dev/redux", json={"image_url": "x"})
        assert unserved.status_code == 404
        assert unserved.json()["detail"].endswith(f"is not served here: it needs the weights {HUB} with {REDUX_HUB}")
        missing = client.post(f"/{REDUX}", json={})
        assert missing.json()["detail"][0]["loc"] == ["body", "image_url"]
    content = base64.b64decode(response.json()["images"][0]["url"].partition(",")[2])
    alone = load_engine(EngineConfig(weights_dir, safety_checker="", device="cpu"))
    (expected,) = finish_task(alone, alone.start(FluxDevReduxInput.model_validate(body), 5, inputs_of(source)))
    assert difference(Image.open(io.BytesIO(content)).convert("RGB"), expected) == 0
