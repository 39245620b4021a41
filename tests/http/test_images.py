"""The images as a client receives them: sizes, seeds, bytes, provenance metadata and the safety checker."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import ExifTags, Image

from models.image_size import PRESETS
from models.loading.devices import dtype_for, type_name
from server.worker.image_encoder import DIGITAL_SOURCE_TYPE
from tests.support.server_process import TEST_MODELS, Gate, Server, serving, wait_until_claimed, wait_until_completed

FLUX = "/fal-ai/flux/dev"
APPLE: dict[str, Any] = {
    "prompt": "a red apple",
    "seed": 11,
    "image_size": {"width": 128, "height": 96},
    "num_inference_steps": 3,
}
#: How this server makes its images, in `metrics` and in the parameters in image files.
PROVENANCE = {
    "acceleration": "none",
    "dtype": type_name(dtype_for("auto", "cpu")),
    "weights": "safetensors",
    "memory": "resident",
}
FORMATS = {"jpeg": "image/jpeg", "png": "image/png"}
by_format = pytest.mark.parametrize("output_format", FORMATS)


def generate(client: httpx.Client, path: str = FLUX, **changed: Any) -> dict[str, Any]:
    """Send a request that must succeed; return its output."""
    answer = client.post(path, json={**APPLE, **changed})
    assert answer.status_code == 200, answer.text
    output: dict[str, Any] = answer.json()
    return output


def contents(client: httpx.Client, output: dict[str, Any]) -> list[bytes]:
    """Fetch the bytes of all images of an output."""
    answers = [client.get(image["url"]) for image in output["images"]]
    for answer, image in zip(answers, output["images"], strict=True):
        assert answer.headers["content-type"] == image["content_type"]
    return [answer.content for answer in answers]


def decoded(content: bytes) -> Image.Image:
    """Decode an image completely."""
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def is_black(image: Image.Image) -> bool:
    return image.convert("RGB").getbbox() is None


def failed_stream(client: httpx.Client, path: str, body: dict[str, Any]) -> list[str]:
    """Return the lines of a stream that fails: the server closes it after the last event, without a proper end."""
    lines: list[str] = []
    with (
        client.stream("POST", path, json=body) as answer,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        lines.extend(answer.iter_lines())
    return [line for line in lines if line]


def stored(server: Server) -> set[str]:
    """List the names of all files in the file store of the server."""
    return {path.name for path in (server.data_dir / "files").iterdir()}


def embedded(image: Image.Image) -> Any:
    """Return the parameters in the metadata of an image, or None."""
    if image.format == "PNG":
        text = image.info.get("parameters")
        return json.loads(text) if text else None
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    return json.loads(comment.removeprefix(b"UNICODE\0").decode("utf-16-be")) if comment else None


def assert_marked(image: Image.Image) -> None:
    """Check that the metadata declares an AI-generated image, in plain text and with IPTC's term."""
    if image.format == "PNG":
        assert image.info["Source"] == "AI generated"
        xmp = image.info["XML:com.adobe.xmp"]
    else:
        assert image.getexif()[ExifTags.Base.ImageDescription] == "AI generated"
        xmp = image.info["xmp"].decode()
    assert f"<Iptc4xmpExt:DigitalSourceType>{DIGITAL_SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>" in xmp


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(client: httpx.Client, preset: str) -> None:
    output = generate(client, image_size=preset, num_inference_steps=1)
    (image,) = output["images"]
    assert (image["width"], image["height"]) == PRESETS[preset]
    assert decoded(contents(client, output)[0]).size == PRESETS[preset]


#: Requested and generated sizes: the demo's pipeline generates multiples of 32 pixels.
SIZES = [((500, 333), (480, 320)), ((64, 64), (64, 64)), ((95, 127), (64, 96)), ((2048, 64), (2048, 64))]


@pytest.mark.parametrize(("requested", "generated"), SIZES)
def test_odd_sizes_are_rounded_down_and_reported(
    client: httpx.Client, requested: tuple[int, int], generated: tuple[int, int]
) -> None:
    size = {"width": requested[0], "height": requested[1]}
    output = generate(client, image_size=size, num_inference_steps=1)
    assert (output["images"][0]["width"], output["images"][0]["height"]) == generated
    image = decoded(contents(client, output)[0])
    assert image.size == generated
    assert (embedded(image)["width"], embedded(image)["height"]) == generated


@by_format
def test_format(client: httpx.Client, output_format: str) -> None:
    output = generate(client, output_format=output_format)
    assert output["images"][0]["content_type"] == FORMATS[output_format]
    image = decoded(contents(client, output)[0])
    assert (image.format, image.mode) == (output_format.upper(), "RGB")


@by_format
def test_image_k_equals_that_of_seed_plus_k(client: httpx.Client, output_format: str) -> None:
    together = generate(client, num_images=3, output_format=output_format)
    assert together["seed"] == APPLE["seed"]
    assert together["has_nsfw_concepts"] == [False] * 3
    alone = [generate(client, seed=APPLE["seed"] + k, output_format=output_format) for k in range(3)]
    images = contents(client, together)
    assert images == [contents(client, output)[0] for output in alone]
    assert len(set(images)) == 3


def test_prompt_steps_and_guidance_matter(client: httpx.Client) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"prompt": "a green pear"},
        {"seed": 12},
        {"num_inference_steps": 4},
        {"guidance_scale": 9},
    ]
    pixels = {
        decoded(contents(client, generate(client, output_format="png", **change))[0]).tobytes() for change in changes
    }
    assert len(pixels) == len(changes)


def test_a_missing_seed_is_chosen_and_reported(client: httpx.Client) -> None:
    first = generate(client, seed=None)
    assert 0 <= first["seed"] < 2**32
    assert generate(client, seed=None)["seed"] != first["seed"]
    assert contents(client, generate(client, seed=first["seed"])) == contents(client, first)


def test_same_bytes_among_eight_others(client: httpx.Client, gate: Gate) -> None:
    (alone,) = contents(client, generate(client, num_inference_steps=8))
    holder = client.post("/queue/test/gate", json={"prompt": str(gate.path), "num_inference_steps": 1}).json()
    wait_until_claimed(client, holder["status_url"])
    # All requests wait behind the gate, so the worker claims them together and runs their steps in turns.
    other_bodies = [{**APPLE, "prompt": f"pear {k}", "seed": k, "num_inference_steps": 8 + k} for k in range(8)]
    bodies = [*other_bodies[:3], {**APPLE, "num_inference_steps": 8}, *other_bodies[3:]]
    replies = [client.post(f"/queue{FLUX}", json=body).json() for body in bodies]
    gate.release(1)
    for reply in replies:
        metrics = wait_until_completed(client, reply["status_url"])["metrics"]
        assert metrics.pop("inference_time") > 0
        assert metrics == PROVENANCE
    results = [client.get(reply["response_url"]).json() for reply in replies]
    assert contents(client, results[3]) == [alone]
    for body, result in zip(other_bodies[:3], results[:3], strict=True):
        assert contents(client, generate(client, **body)) == contents(client, result)


@by_format
def test_images_contain_their_parameters(client: httpx.Client, output_format: str) -> None:
    image = decoded(contents(client, generate(client, output_format=output_format))[0])
    assert_marked(image)
    assert embedded(image) == {
        "endpoint": "fal-ai/flux/dev",
        "prompt": "a red apple",
        "seed": 11,
        "num_inference_steps": 3,
        "guidance_scale": 3.5,
        "width": 128,
        "height": 96,
        **PROVENANCE,
    }


@by_format
@pytest.mark.parametrize("prompt", ["\U0001f34e\u00e4\u4e2d\0<&>", "x" * 20_000, "\U0001f34e" * 20_000])
def test_any_prompt_fits_into_the_file(client: httpx.Client, prompt: str, output_format: str) -> None:
    output = generate(client, "/test/null", prompt=prompt, output_format=output_format)
    image = decoded(contents(client, output)[0])
    assert_marked(image)
    found = embedded(image)["prompt"]
    assert found == prompt or (found.endswith("\u2026") and prompt.startswith(found[:-1]) and len(found) > 5_000)


@by_format
def test_sync_mode(client: httpx.Client, server: Server, output_format: str) -> None:
    expected = contents(client, generate(client, output_format=output_format, num_images=2))
    before = stored(server)
    output = generate(client, output_format=output_format, num_images=2, sync_mode=True)
    heads, bodies = zip(*(image["url"].split(",", 1) for image in output["images"]), strict=True)
    assert set(heads) == {f"data:{FORMATS[output_format]};base64"}
    assert [base64.b64decode(body, validate=True) for body in bodies] == expected
    assert stored(server) == before


def test_sync_mode_on_the_queue_and_the_stream(client: httpx.Client, server: Server) -> None:
    before = stored(server)
    reply = client.post("/queue/test/null", json={"prompt": "x", "sync_mode": True}).json()
    wait_until_completed(client, reply["status_url"])
    assert client.get(reply["response_url"]).json()["images"][0]["url"].startswith("data:image/jpeg;base64,")
    streamed = client.post("/test/null/stream", json={"prompt": "x", "sync_mode": True}).text
    assert "data:image/jpeg;base64," in streamed
    assert stored(server) == before


@by_format
def test_flagged_images_are_black(client: httpx.Client, output_format: str) -> None:
    output = generate(client, "/test/unsafe", num_images=2, output_format=output_format)
    assert output["has_nsfw_concepts"] == [True, True]
    for entry, content in zip(output["images"], contents(client, output), strict=True):
        image = decoded(content)
        assert is_black(image)
        assert image.size == (entry["width"], entry["height"]) == (128, 96)
        assert_marked(image)


def test_flagged_data_uri_is_black(client: httpx.Client) -> None:
    output = generate(client, "/test/unsafe", sync_mode=True)
    assert output["has_nsfw_concepts"] == [True]
    assert is_black(decoded(base64.b64decode(output["images"][0]["url"].partition(",")[2])))


@pytest.mark.parametrize("sync_mode", [False, True])
@pytest.mark.parametrize("prompt", ["silent", "raises"])
def test_without_a_verdict_no_image_is_returned(
    client: httpx.Client, server: Server, prompt: str, sync_mode: bool
) -> None:
    before = stored(server)
    body = {**APPLE, "prompt": prompt, "sync_mode": sync_mode}
    reply = client.post("/queue/test/unsafe", json=body).json()
    status = wait_until_completed(client, reply["status_url"])
    answers = [client.post("/test/unsafe", json=body), client.get(reply["response_url"])]
    for answer in answers:
        assert answer.status_code == 500
        assert "safety checker" in answer.json()["detail"]
        assert answer.json()["error_type"] == answer.headers["x-fal-error-type"] == "internal_error"
    assert "safety checker" in status["error"]
    streamed = failed_stream(client, "/test/unsafe/stream", body)
    assert "safety checker" in streamed[-1]
    assert not any("images" in line for line in streamed)
    assert stored(server) == before


@pytest.mark.parametrize("prompt", ["flagged", "silent", "raises"])
def test_checker_does_not_run_when_turned_off(client: httpx.Client, prompt: str) -> None:
    output = generate(client, "/test/unsafe", prompt=prompt, enable_safety_checker=False)
    assert output["has_nsfw_concepts"] == [False]
    assert not is_black(decoded(contents(client, output)[0]))


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server that checks every image and embeds no parameters."""
    settings = {"enforce_safety_checker": "true", "embed_parameters": "false"}
    with serving(tmp_path_factory.mktemp("strict"), TEST_MODELS, **settings) as running:
        yield running.ready()


@pytest.fixture
def strict_client(strict: Server) -> Iterator[httpx.Client]:
    """Open a client of the `strict` server."""
    with httpx.Client(base_url=strict.url, timeout=60, trust_env=False) as client:
        yield client


def test_enforced_checker_cannot_be_turned_off(strict_client: httpx.Client, strict: Server) -> None:
    output = generate(strict_client, "/test/unsafe", enable_safety_checker=False)
    assert output["has_nsfw_concepts"] == [True]
    assert is_black(decoded(contents(strict_client, output)[0]))
    before = stored(strict)
    body = {**APPLE, "prompt": "raises", "enable_safety_checker": False}
    assert strict_client.post("/test/unsafe", json=body).status_code == 500
    assert stored(strict) == before


@by_format
def test_the_ai_mark_stays_without_parameters(strict_client: httpx.Client, output_format: str) -> None:
    output = generate(strict_client, "/test/null", prompt="my secret garden", output_format=output_format)
    (content,) = contents(strict_client, output)
    image = decoded(content)
    assert_marked(image)
    assert embedded(image) is None
    assert b"secret garden" not in content
    assert "secret garden".encode("utf-16-be") not in content


def test_nothing_in_an_image_varies_with_time(client: httpx.Client, tmp_path: Path) -> None:
    first, second = (contents(client, generate(client))[0] for _ in range(2))
    assert first == second
