"""fal-ai/flux/dev/redux: a picture in the place of the prompt, against diffusers' own two pipelines, bit for bit."""

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
from diffusers import FluxPipeline, FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from models.base import EngineConfig, GenerationFailed, Model
from models.flux.engine import FluxEngine
from models.flux.redux import Redux
from models.flux_dev import FluxDev
from models.flux_dev_redux import FluxDevRedux, FluxDevReduxInput
from models.loading import hub
from models.loading.specs import DEMO, assign_weights
from tests.support import tiny_flux
from tests.support.server_process import serving
from tests.support.tiny_flux import CallsAllSafe, SharesAlways, difference, finished, tiers_of
from tests.unit.loading.test_verify import add

DEV, REDUX = "fal-ai/flux/dev", "fal-ai/flux/dev/redux"
HUB, REDUX_HUB = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Redux-dev"
MODELS: dict[str, Model] = {DEV: FluxDev(), REDUX: FluxDevRedux()}
#: What FluxPriorReduxPipeline fills the place of the text with, whatever the transformer reads.
TRUE_WIDTHS = {"joint_attention_dim": 4096, "pooled_projection_dim": 768}


def prior(dtype: torch.dtype, width: int) -> FluxPriorReduxPipeline:
    """As diffusers makes it, with a small eye: 16 patches of a picture; the same weights each time."""
    torch.manual_seed(11)
    eye = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    return FluxPriorReduxPipeline(
        image_encoder=SiglipVisionModel(eye).eval(),
        feature_extractor=SiglipImageProcessorPil(size={"height": 56, "width": 56}),
        image_embedder=ReduxImageEncoder(redux_dim=32, txt_in_features=width).eval(),
    ).to(dtype)


def asked(**more: Any) -> FluxDevReduxInput:
    size = {"width": 96, "height": 64}
    body = {"image_url": "unused", "image_size": size, "num_inference_steps": 2, **more}
    return FluxDevReduxInput.model_validate(body)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    colours = numpy.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
    path = tmp_path / "source.png"
    Image.fromarray(colours).resize((203, 149), Image.Resampling.BICUBIC).save(path)
    return path


def engine(dtype: torch.dtype, redux: Redux | None = None) -> FluxEngine:
    pipeline = tiny_flux.pipeline(dtype)
    pipeline.transformer = tiny_flux.transformer(dtype, **TRUE_WIDTHS)
    redux = redux or Redux(prior(dtype, 4096), pipeline.transformer)
    return FluxEngine(
        pipeline, CallsAllSafe(), tiers_of(pipeline.transformer), "cpu", redux=redux, sharing=SharesAlways()
    )


def inputs(source: Path) -> Mapping[str, Path]:
    return {"image_url": source}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_pipelines(source: Path, dtype: torch.dtype) -> None:
    plain = tiny_flux.pipeline(dtype)
    plain.transformer = tiny_flux.transformer(dtype, **TRUE_WIDTHS)
    told = prior(dtype, 4096)(Image.open(source))
    expected = plain(
        **told, width=96, height=64, num_inference_steps=2, generator=torch.Generator("cpu").manual_seed(5)
    ).images[0]
    painter = engine(dtype)
    (picture,) = finished(painter, painter.start(asked(), 5, inputs(source)))
    assert difference(picture, expected) == 0


def test_another_picture_gives_another_variation(source: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    painter = engine(torch.float32)
    latents = []
    for path in (source, tmp_path / "red.png"):
        (generation,) = tiny_flux.stepped(painter, painter.start(asked(), 5, inputs(path))).samples
        latents.append(generation.latents)
    assert not torch.equal(*latents)


def test_shares_forwards_with_its_like_only(source: Path) -> None:
    """Texts of different lengths cannot go through one forward."""
    painter = engine(torch.float32)
    request = asked(acceleration="regular")
    painting, like = painter.start(request, 1, inputs(source)), painter.start(request, 2, inputs(source))
    with tiny_flux.batches(painter.pipeline.transformer) as sizes:
        painter.advance(painting, [like])
    assert sizes == [2]


def write_beside(weights: Path, width: int) -> None:
    """Redux weights in the folder of some others, as `save_pretrained` writes them."""
    prior(torch.bfloat16, width).save_pretrained(weights / "redux")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, with Redux weights that nobody trained."""
    place = tmp_path_factory.mktemp("weights") / "demo"
    shutil.copytree(DEMO, place, ignore=shutil.ignore_patterns("recipe", "__pycache__"))
    pipeline = FluxPipeline.from_pretrained(place, dtype=torch.bfloat16, local_files_only=True)
    write_beside(place, pipeline.transformer.config.joint_attention_dim)
    return place


def test_it_is_served_where_its_weights_are(folder: Path) -> None:
    assert assign_weights(["demo"], MODELS) == {DEV: DEMO}
    assert assign_weights([f"{REDUX}={folder}"], MODELS) == {REDUX: folder}
    with pytest.raises(ValueError, match=r"/redux also needs the directory redux in .*, with black-forest-labs"):
        assign_weights([f"{REDUX}=demo"], MODELS)


def test_without_its_weights_a_request_is_told_what_lacks(client: httpx.Client) -> None:
    answer = client.post(f"/{REDUX}", json={"image_url": "x"})
    assert answer.status_code == 404
    assert answer.json()["detail"] == f"{REDUX} is not served here: it needs {HUB} with {REDUX_HUB}"


def test_weights_of_the_hub_find_it_there(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert assign_weights([HUB], MODELS) == {DEV: HUB}
    with pytest.raises(ValueError, match=f"also needs {REDUX_HUB}; run `flux-server pull {REDUX_HUB}`"):
        assign_weights([f"{REDUX}={HUB}"], MODELS)
    monkeypatch.setattr(hub, "cached_path", {REDUX_HUB: folder / "redux"}.get)
    assert assign_weights([HUB], MODELS) == {DEV: HUB, REDUX: HUB}


def test_its_folder_is_whole_for_the_hub(folder: Path) -> None:
    """`pull` takes it for a pipeline, and finds nothing missing."""
    assert hub.missing_components(folder / "redux") == []


def test_one_that_does_not_fit_stops_the_start(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "demo")
    shutil.rmtree(tmp_path / "demo" / "redux")
    write_beside(tmp_path / "demo", 48)
    with pytest.raises(OSError, match="this Redux is for text states 48 wide, and the transformer reads"):
        FluxEngine.load(EngineConfig(tmp_path / "demo", safety_checker="", device="cpu"))


@pytest.mark.parametrize(
    ("file", "said", "words"),
    [
        ("image_embedder/config.json", {"redux_dim": 48}, "image_embedder has other shapes than its configuration for"),
        ("image_encoder/config.json", {"num_hidden_layers": 3}, "image_encoder lacks"),
        ("image_encoder/config.json", {"hidden_size": "wide"}, "image_encoder cannot be loaded: "),
        ("feature_extractor/preprocessor_config.json", {"size": "large"}, "redux cannot be loaded: "),
    ],
)
def test_malformed_ones_are_named(tmp_path: Path, folder: Path, file: str, said: dict[str, Any], words: str) -> None:
    """Each part of it is read when it is loaded; what is seen before that stands in test_malformed_weights.py."""
    shutil.copytree(folder / "redux", tmp_path / "redux")
    add(tmp_path / "redux" / file, **said)
    transformer = tiny_flux.transformer(joint_attention_dim=128)
    with pytest.raises(OSError, match=words):
        Redux.load(tmp_path / "redux", transformer, "cpu")


def test_an_engine_without_it_says_so(source: Path) -> None:
    with pytest.raises(GenerationFailed, match=REDUX_HUB):
        tiny_flux.engine().start(asked(), 1, inputs(source))


def test_over_the_wire(tmp_path: Path, folder: Path, source: Path) -> None:
    url = f"data:image/png;base64,{base64.b64encode(source.read_bytes()).decode()}"
    body = {"image_url": url, "image_size": {"width": 96, "height": 64}, "num_inference_steps": 2, "seed": 5}
    body |= {"output_format": "png", "sync_mode": True, "enable_safety_checker": False}
    with (
        serving(tmp_path / "data", f"{DEV}={folder}", f"{REDUX}={folder}") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        answer = client.post(f"/{REDUX}", json=body)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["prompt"], answer.json()["seed"]) == ("", 5)
        told = client.get(f"/models/{REDUX}/llms.txt").text
        assert "**Category**: image-to-image" in told
        document = client.get("/api/openapi/queue/openapi.json", params={"endpoint_id": REDUX}).json()
        described = document["components"]["schemas"]["FluxDevReduxInput"]
        assert described["required"] == ["image_url"] and "prompt" not in described["properties"]
        missing = client.post(f"/{REDUX}", json={})
        assert missing.json()["detail"][0]["loc"] == ["body", "image_url"]
    content = base64.b64decode(answer.json()["images"][0]["url"].partition(",")[2])
    alone = FluxEngine.load(EngineConfig(folder, safety_checker="", device="cpu"))
    (expected,) = finished(alone, alone.start(FluxDevReduxInput.model_validate(body), 5, inputs(source)))
    assert difference(Image.open(io.BytesIO(content)).convert("RGB"), expected) == 0
