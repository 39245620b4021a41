"""Tests that replay the requests of chat programs for images, written from their sources.

Open WebUI, LibreChat and AnythingLLM speak OpenAI's API. Open WebUI and LibreChat also speak AUTOMATIC1111's. Packages
that can be installed are in test_chat_packages.py; their requests here are for runs without these packages.
"""

import base64
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.support.error_bodies import error_message, first_field_error
from tests.support.hostile_images import BOMB
from tests.support.image_files import decode, encode
from tests.support.server_process import TEST_MODELS, Gate, Server, serving, wait_until

BLUE, RED = (0, 0, 255), (255, 0, 0)
SOURCE = encode(Image.new("RGB", (160, 128), BLUE))
BEARER = {"authorization": "Bearer id:secret"}
BASIC = {"authorization": f"Basic {base64.b64encode(b'id:secret').decode()}"}


@pytest.fixture(scope="module")
def chat_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    names = ",".join(f"{name}=test/null" for name in ("gpt-image-1", "dall-e-3", "dall-e-2", "flux"))
    settings = {"openai_models": names, "a1111": "true", "keys": "id:secret,other:secret"}
    with serving(tmp_path_factory.mktemp("chat"), TEST_MODELS, **settings) as running:
        yield running.ready()


@pytest.fixture
def http(chat_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=chat_server.url, timeout=60, trust_env=False) as client:
        yield client


# -- OpenAI's API: the body of each program's request for a generation, and whether it expects base64

GENERATIONS: dict[str, tuple[dict[str, Any], bool]] = {
    # Open WebUI at 02530d5: image_generations in backend/open_webui/routers/images.py
    "Open WebUI": ({"model": "gpt-image-1", "prompt": "a fish", "n": 1, "size": "auto"}, True),
    "Open WebUI, older model": (
        {"model": "dall-e-2", "prompt": "a fish", "n": 1, "size": "512x512", "response_format": "b64_json"},
        True,
    ),
    # LibreChat of 2026: imageGenTool in api/app/clients/tools/structured/OpenAIImageTools.js
    "LibreChat": (
        {
            "model": "gpt-image-1",
            "prompt": "a fish",
            "n": 1,
            "background": "auto",
            "output_format": "webp",
            "output_compression": 100,
            "quality": "auto",
            "size": "auto",
        },
        True,
    ),
    # LibreChat of 2026: api/app/clients/tools/structured/DALLE3.js
    "LibreChat's DALL-E": (
        {"model": "dall-e-3", "quality": "standard", "style": "vivid", "size": "1024x1024", "prompt": "a fish", "n": 1},
        False,
    ),
    # LiteLLM 1.110.2: litellm/llms/openai/image_generation
    "LiteLLM": ({"model": "gpt-image-1", "prompt": "a fish", "user": "alice", "quality": "low"}, True),
    # langchain-community 0.4.2: langchain_community/utilities/dalle_image_generator.py
    "LangChain": (
        {"model": "dall-e-3", "prompt": "a fish", "n": 1, "size": "1024x1024", "quality": "standard"},
        False,
    ),
    # AnythingLLM since pull request 6176: server/utils/ImageGenerators/localAi/index.js
    "AnythingLLM": ({"model": "dall-e-2", "prompt": "a fish", "size": "1024x1024", "n": 1}, False),
    # @ai-sdk/openai 3.0.141: src/image/openai-image-model.ts
    "AI SDK": ({"model": "gpt-image-1", "prompt": "a fish", "n": 1, "size": "1024x1024"}, True),
    "AI SDK, unknown model": (
        {"model": "flux", "prompt": "a fish", "n": 1, "size": "512x512", "response_format": "b64_json"},
        True,
    ),
}


@pytest.mark.parametrize(("body", "is_base64"), GENERATIONS.values(), ids=GENERATIONS)
def test_generations(http: httpx.Client, body: dict[str, Any], is_base64: bool) -> None:
    answer = http.post("/v1/images/generations", json=body, headers=BEARER, params={"api-version": "2025-04-01"})
    assert answer.status_code == 200, answer.text
    (datum,) = answer.json()["data"]
    # The AI SDK requires the key b64_json. Others look for `url` first, so it must be absent, not null.
    assert datum.keys() == ({"b64_json"} if is_base64 else {"url"})
    if is_base64:
        # LibreChat writes the format that it asked for into a data URI; the others assume a PNG or look at the bytes.
        expected = body.get("output_format", "jpeg" if body["model"] == "flux" else "png")
        assert decode(datum["b64_json"]).format == expected.upper()
    else:
        assert http.get(datum["url"]).headers["content-type"] == "image/png"


#: The edits of the same versions: image_edits of Open WebUI, imageEditTool of LibreChat, LiteLLM's image_edit, the
#: image model of the AI SDK, and AnythingLLM's server/utils/ImageGenerators/base.js.
EDITS: dict[str, tuple[dict[str, str], str]] = {
    "Open WebUI": ({"model": "gpt-image-1", "prompt": "a fish", "n": "1", "size": "128x96"}, "image"),
    "Open WebUI, a list": ({"model": "dall-e-2", "prompt": "a fish", "response_format": "b64_json"}, "image[]"),
    "LibreChat": ({"model": "gpt-image-1", "prompt": "a fish", "quality": "auto", "size": "auto"}, "image[]"),
    "LiteLLM": ({"model": "gpt-image-1", "prompt": "a fish", "n": "1"}, "image[]"),
    "AI SDK": ({"model": "gpt-image-1", "prompt": "a fish", "n": "1", "size": "128x96"}, "image"),
    "AnythingLLM": ({"model": "dall-e-2", "prompt": "a fish", "n": "1", "size": "1024x1024"}, "image"),
}


@pytest.mark.parametrize(("fields", "name"), EDITS.values(), ids=EDITS)
def test_edits(http: httpx.Client, fields: dict[str, str], name: str) -> None:
    files = {name: ("image.png", SOURCE, "image/png")}
    answer = http.post("/v1/images/edits", data=fields, files=files, headers=BEARER)
    assert answer.status_code == 200, answer.text
    (datum,) = answer.json()["data"]
    image = decode(datum["b64_json"] if "b64_json" in datum else http.get(datum["url"]).content)
    sizes = {"128x96": (128, 96), "1024x1024": (1024, 1024)}
    assert image.size == sizes.get(fields.get("size", ""), (160, 128))
    assert image.getpixel((9, 9)) == BLUE


def test_an_edit_in_a_blob_without_a_name(http: httpx.Client) -> None:
    """Accept the file name "blob", which browsers and Node give to unnamed files, and masks in such a form."""
    mask = encode(Image.new("RGBA", (160, 128), (0, 0, 0, 0)))
    files = {"image": ("blob", SOURCE, "image/png"), "mask": ("blob", mask, "image/png")}
    answer = http.post("/v1/images/edits", data={"model": "gpt-image-1", "prompt": ""}, files=files, headers=BEARER)
    assert decode(answer.json()["data"][0]["b64_json"]).getpixel((9, 9)) == RED


# -- AUTOMATIC1111's API


def test_open_webui_with_automatic1111(http: httpx.Client) -> None:
    """Verify the URL, list the models, choose one, and generate, as backend/open_webui/routers/images.py at 02530d5."""
    options = http.get("/sdapi/v1/options", headers=BASIC).json()
    titles = {model["title"]: model["model_name"] for model in http.get("/sdapi/v1/sd-models", headers=BASIC).json()}
    assert options["sd_model_checkpoint"] in titles
    assert titles["test/null"] == "test/null"
    assert "test/copy" not in titles
    options["sd_model_checkpoint"] = "test/null"
    http.post("/sdapi/v1/options", json=options, headers=BASIC).raise_for_status()
    assert http.get("/sdapi/v1/options", headers=BASIC).json() == options
    other = {"authorization": "Bearer other:secret"}
    assert http.get("/sdapi/v1/options", headers=other).json()["sd_model_checkpoint"] != "test/null"
    body = {"prompt": "a fish", "batch_size": 2, "width": 128, "height": 96, "steps": 3, "negative_prompt": "a bird"}
    answer = http.post("/sdapi/v1/txt2img", json=body, headers=BASIC).json()
    assert [decode(image).size for image in answer["images"]] == [(128, 96)] * 2
    assert decode(answer["images"][0]).format == "PNG"
    info = json.loads(answer["info"])
    assert (info["prompt"], info["steps"], info["sd_model_name"]) == ("a fish", 3, "test/null")


def test_librechat_with_automatic1111(http: httpx.Client) -> None:
    """Send the request of api/app/clients/tools/structured/StableDiffusion.js, with a seed and a checkpoint."""
    body = {
        "prompt": "a fish",
        "negative_prompt": "a bird",
        "cfg_scale": 4.5,
        "steps": 22,
        "width": 1024,
        "height": 1024,
        "seed": 7,
        "override_settings": {"sd_model_checkpoint": "test/null"},
    }
    answer = http.post("/sdapi/v1/txt2img", json=body, headers=BEARER).json()
    info = json.loads(answer["info"])
    assert (info["width"], info["height"], info["seed"], info["all_seeds"]) == (1024, 1024, 7, [7])
    assert info["infotexts"][0].startswith("a fish\nSteps: 22, ")
    assert decode(answer["images"][0]).getpixel((0, 0)) == (7, 128, 64)


@pytest.mark.parametrize("start", ["", "data:image/png;base64,"])
def test_automatic1111s_image_to_image(http: httpx.Client, start: str) -> None:
    image = Image.effect_noise((1600, 1200), 100).convert("RGB")
    content = base64.b64encode(encode(image)).decode()
    assert len(content) > 2**20, "more than the text of a body may have"
    body: dict[str, Any] = {
        "prompt": "",
        "init_images": [start + content],
        "denoising_strength": 0.5,
        "steps": 10,
        "override_settings": {"sd_model_checkpoint": "test/null"},
    }
    answer = http.post("/sdapi/v1/img2img", json=body, headers=BEARER)
    assert answer.status_code == 200, answer.text
    assert decode(answer.json()["images"][0]).tobytes() == image.tobytes()
    white = base64.b64encode(encode(Image.new("L", (1600, 1200), 255))).decode()
    for size in ({}, {"width": 128, "height": 96}):
        masked = http.post("/sdapi/v1/img2img", json={**body, "mask": white, **size}, headers=BEARER)
        repainted = decode(masked.json()["images"][0])
        assert (repainted.size, repainted.getpixel((9, 9))) == ((1600, 1200), RED)


def test_automatic1111s_errors(chat_server: Server, http: httpx.Client) -> None:
    bomb = base64.b64encode(BOMB).decode()
    chosen = {"override_settings": {"sd_model_checkpoint": "test/null"}}
    image = {"init_images": [base64.b64encode(SOURCE).decode()], "steps": 10}
    bodies: list[tuple[str, dict[str, Any], list[str | int]]] = [
        ("txt2img", {"steps": 99}, ["steps"]),
        ("txt2img", {"steps": "many"}, ["steps"]),
        ("txt2img", {"width": 8}, ["width"]),
        ("txt2img", {"batch_size": 9}, ["batch_size"]),
        ("txt2img", {"distilled_cfg_scale": 99}, ["distilled_cfg_scale"]),
        ("img2img", {}, ["init_images"]),
        ("img2img", {**image, "init_images": [bomb]}, ["init_images", 0]),
        ("img2img", {**image, "init_images": ["not base64"]}, ["init_images", 0]),
        ("img2img", {**image, "mask": "not base64"}, ["mask"]),
        ("img2img", {**image, "denoising_strength": 2}, ["denoising_strength"]),
    ]
    for path, body, loc in bodies:
        error = first_field_error(http.post(f"/sdapi/v1/{path}", json={**body, **chosen}, headers=BEARER))
        assert error["loc"] == ["body", *loc], (path, body)
    for body in ({"batch_size": 9}, {"n_iter": 9}, {"batch_size": 3, "n_iter": 2}):
        error = first_field_error(http.post("/sdapi/v1/txt2img", json={**body, **chosen}, headers=BEARER))
        assert error["msg"] == "batch_size times n_iter should be less than or equal to 4"
    wanted = {"sd_model_checkpoint": "sdxl"}
    for path, body in (("txt2img", {"override_settings": wanted}), ("options", wanted)):
        error_message(http.post(f"/sdapi/v1/{path}", json=body, headers=BEARER), 404)
    for headers in ({}, {"authorization": "Basic !"}, {"authorization": f"Basic {base64.b64encode(b'a:b').decode()}"}):
        answer = http.get("/sdapi/v1/options", headers=headers)
        assert "ID:SECRET" in error_message(answer, 401)
        assert answer.headers["www-authenticate"] == 'Basic realm="flux-server", Bearer, Key'
    assert not list((chat_server.data_dir / "inputs").glob("*.part"))


def test_automatic1111s_progress(http: httpx.Client, gate: Gate) -> None:
    """Report the progress of the key's own request while it runs, and 0 before and after."""
    body = {"prompt": str(gate.path), "steps": 4, "override_settings": {"sd_model_checkpoint": "test/gate"}}
    thread = threading.Thread(target=http.post, args=("/sdapi/v1/txt2img",), kwargs={"json": body, "headers": BASIC})

    def progress(headers: dict[str, str]) -> float:
        return float(http.get("/sdapi/v1/progress?skip_current_image=true", headers=headers).json()["progress"])

    assert progress(BASIC) == 0
    thread.start()
    gate.release(2)
    wait_until(lambda: progress(BASIC) == 0.5)
    assert progress({"authorization": "Bearer other:secret"}) == 0
    gate.release(2)
    thread.join()
    assert progress(BASIC) == 0


def test_automatic1111_is_off_by_default(server_with_keys: Server) -> None:
    headers = {"authorization": "Bearer alice:secret"}
    with httpx.Client(base_url=server_with_keys.url, timeout=60, trust_env=False, headers=headers) as client:
        for method, path in (("GET", "options"), ("GET", "sd-models"), ("GET", "progress"), ("POST", "txt2img")):
            assert client.request(method, f"/sdapi/v1/{path}", json={}).status_code == 404
