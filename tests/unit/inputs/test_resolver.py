"""Tests of input images and masks: every way to send one, every limit, and URLs that must not be fetched."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy
import pytest
from PIL import ExifTags, Image
from pytest_httpserver import HTTPServer
from safetensors.numpy import save
from werkzeug import Request, Response

from models.flux_control_lora import FluxControlLoraCannyInput, FluxControlLoraDepthImageToImageInput
from models.flux_fill import FluxLoraFillInput
from models.flux_general import FluxGeneralInput
from models.flux_kontext import FluxKontextLoraInpaintInput
from models.flux_lora import FluxLoraImageToImageInput, FluxLoraInpaintingInput
from models.image_size import Limits
from models.loading.specs import DEMO
from models.schema import EXAMPLE_IMAGE, EXAMPLE_MASK, ImageInput
from server.errors import InternalError, InvalidInput, InvalidInputFile
from server.inputs import child_process, images
from server.inputs.resolver import dump_input
from tests.support.components import Clock, Components, open_components, submission
from tests.support.hostile_images import ACCEPTED, AVIF, GIF, PNG, REFUSED
from tests.support.image_files import data_uri, encode, noise_image
from tests.support.server_process import Gate, Server, free_port, serving, wait_until_claimed, wait_until_completed
from tests.support.tiny_kinds import control_lora_for, control_net_for, ip_adapter_for
from tests.unit.net.test_outbound import FORBIDDEN

COPY = "/test/copy"
ALICE, BOB = {"authorization": "Key alice:secret"}, {"authorization": "Key bob:secret"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server that has two keys and may fetch files from this machine."""
    settings = {"keys": "alice:secret,bob:secret", "outbound_allow": "127.0.0.0/8"}
    with serving(tmp_path_factory.mktemp("inputs"), "test/copy=demo", **settings) as server:
        yield server.ready()


@pytest.fixture
def alice(running: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60, trust_env=False, headers=ALICE) as client:
        yield client


def engine_input(client: httpx.Client, url: str, **more: Any) -> Image.Image:
    """Return the image that the engine receives."""
    body = {"prompt": "", "image_url": url, "output_format": "png", "sync_mode": True, **more}
    response = client.post(COPY, json=body)
    assert response.status_code == 200, response.text
    content = base64.b64decode(response.json()["images"][0]["url"].partition(",")[2])
    return Image.open(io.BytesIO(content))


def rejection(client: httpx.Client, url: str, path: str = COPY) -> dict[str, Any]:
    """Return the error of a rejected request, which is always a 422 that names the field."""
    response = client.post(path, json={"prompt": "", "image_url": url})
    assert response.status_code == 422, response.text
    (entry,) = response.json()["detail"]
    assert entry["loc"] == ["body", "image_url"]
    assert entry["msg"]
    result: dict[str, Any] = entry
    return result


def are_equal(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.convert("RGB").tobytes()


# -- ways to send an image


def test_a_data_uri_is_accepted(alice: httpx.Client) -> None:
    assert are_equal(engine_input(alice, data_uri(encode(noise_image()))), noise_image())


def test_a_hosted_file_is_accepted(alice: httpx.Client, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/image.png").respond_with_data(encode(noise_image()), content_type="image/png")
    assert are_equal(engine_input(alice, httpserver.url_for("/image.png")), noise_image())


@pytest.mark.parametrize("file_name", ["in.png", "an_image.safetensors"])
def test_an_uploaded_file_is_accepted_for_its_bytes_not_its_name(alice: httpx.Client, file_name: str) -> None:
    headers = {"host": "rest.fal.ai"}
    file_info = {"content_type": "image/png", "file_name": file_name}
    upload = alice.post("/storage/upload/initiate", json=file_info, headers=headers).json()
    alice.put(
        upload["upload_url"], content=encode(noise_image()), headers={"content-type": "image/png"}
    ).raise_for_status()
    assert are_equal(engine_input(alice, upload["file_url"]), noise_image())


def test_a_result_can_be_an_input(alice: httpx.Client) -> None:
    url = data_uri(encode(noise_image()))
    response = alice.post(COPY, json={"prompt": "", "image_url": url, "output_format": "png"}).json()
    assert are_equal(engine_input(alice, response["images"][0]["url"]), noise_image())


def test_only_the_owner_can_use_a_private_file(alice: httpx.Client) -> None:
    headers = {"x-fal-object-lifecycle-preference": '{"initial_acl": {"default": "forbid"}}'}
    body = {"prompt": "", "image_url": data_uri(encode(noise_image())), "output_format": "png"}
    url = alice.post(COPY, json=body, headers=headers).json()["images"][0]["url"]
    assert are_equal(engine_input(alice, url), noise_image())
    response = alice.post(COPY, json={"prompt": "", "image_url": url}, headers=BOB)
    assert response.status_code == 422
    assert response.json()["detail"][0]["type"] == "file_download_error"


def test_redirects_are_followed_up_to_a_limit(alice: httpx.Client, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/image.png").respond_with_data(encode(noise_image()))
    httpserver.expect_request("/moved").respond_with_response(Response(status=302, headers={"location": "/image.png"}))
    httpserver.expect_request("/circle").respond_with_response(Response(status=302, headers={"location": "/circle"}))
    assert are_equal(engine_input(alice, httpserver.url_for("/moved")), noise_image())
    assert "more than 5 times" in rejection(alice, httpserver.url_for("/circle"))["msg"]


def test_a_redirect_is_checked_like_any_other_url(alice: httpx.Client, httpserver: HTTPServer) -> None:
    location = {"location": "http://169.254.169.254/latest/meta-data/"}
    httpserver.expect_request("/away").respond_with_response(Response(status=302, headers=location))
    assert rejection(alice, httpserver.url_for("/away"))["type"] == "file_download_error"


def test_an_accepted_input_survives_a_kill_and_the_loss_of_its_host(
    tmp_path: Path, httpserver: HTTPServer, gate: Gate
) -> None:
    """The request runs with the bytes that were fetched at submit time."""
    httpserver.expect_request("/image.png").respond_with_data(encode(noise_image()))
    body = {"prompt": "", "image_url": httpserver.url_for("/image.png"), "output_format": "png"}
    settings = {"outbound_allow": "127.0.0.0/8", "max_running": "1"}
    with (
        serving(tmp_path / "data", "test/copy=demo", **settings) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        # This request runs until the gate opens, so the next one waits.
        first = client.post("/queue/test/gate", json={"prompt": str(gate.path)}).json()
        wait_until_claimed(client, first["status_url"])
        path = urlsplit(client.post("/queue/test/copy", json=body).json()["response_url"]).path
        server.kill()
    gate.release_all()
    httpserver.clear()
    with (
        serving(tmp_path / "data", "test/copy=demo", **settings) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        assert wait_until_completed(client, f"{path}/status")["status"] == "COMPLETED"
        result = client.get(urlsplit(client.get(path).json()["images"][0]["url"]).path)
        assert are_equal(Image.open(io.BytesIO(result.content)), noise_image())


# -- how images are decoded


def test_orientation_and_first_frame(alice: httpx.Client) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = engine_input(alice, data_uri(encode(noise_image(96, 80), exif=exif)))
    assert are_equal(turned, noise_image(96, 80).transpose(Image.Transpose.ROTATE_270))
    second = Image.new("RGB", (96, 80))
    animated = encode(noise_image(), "PNG", save_all=True, append_images=[second])
    assert are_equal(engine_input(alice, data_uri(animated)), noise_image())


def test_the_first_frame_of_a_gif(alice: httpx.Client) -> None:
    first = noise_image().quantize(64)
    animated = encode(first, "GIF", save_all=True, append_images=[Image.new("RGB", (96, 80))], comment=b"x" * 9000)
    assert are_equal(engine_input(alice, data_uri(animated, "image/gif")), first.convert("RGB"))


@pytest.mark.skipif("AVIF" not in images.SOURCE_FORMATS, reason="Pillow was built without AVIF")
def test_orientation_and_first_frame_of_an_avif(alice: httpx.Client) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = engine_input(alice, data_uri(encode(noise_image(), "AVIF", exif=exif), "image/avif"))
    with Image.open(io.BytesIO(AVIF)) as image:
        assert are_equal(turned, image.transpose(Image.Transpose.ROTATE_270))
    animated = encode(noise_image(), "AVIF", save_all=True, append_images=[Image.new("RGB", (96, 80))])
    with Image.open(io.BytesIO(animated)) as image:
        assert are_equal(engine_input(alice, data_uri(animated, "image/avif")), image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(alice: httpx.Client, mode: str) -> None:
    grey = numpy.arange(96 * 80, dtype=numpy.uint16).reshape(80, 96) * 8
    source = Image.fromarray(grey) if mode == "I;16" else noise_image().convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    result = engine_input(alice, data_uri(encode(source, kind)))
    assert result.mode == "RGB"
    expected = Image.fromarray((grey // 257).astype(numpy.uint8)) if mode == "I;16" else source
    if mode != "CMYK":
        assert are_equal(result, expected)


def test_large_ones_are_scaled_down_to_the_limit(alice: httpx.Client) -> None:
    assert engine_input(alice, data_uri(encode(Image.new("RGB", (4000, 1000))))).size == (2048, 512)
    assert engine_input(alice, data_uri(encode(Image.new("RGB", (2048, 2048))))).size == (2048, 2048)
    # The scale factor of this size is not exact.
    assert engine_input(alice, data_uri(encode(Image.new("RGB", (2215, 2215))))).size == (2048, 2048)


# -- rejected inputs


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_images_are_rejected(alice: httpx.Client, name: str) -> None:
    content, error_type = REFUSED[name]
    entry = rejection(alice, data_uri(content))
    assert entry["type"] == error_type
    assert len(entry["input"]) <= 1000
    assert are_equal(engine_input(alice, data_uri(encode(noise_image()))), noise_image())


@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_images_are_accepted(alice: httpx.Client, name: str) -> None:
    assert are_equal(engine_input(alice, data_uri(ACCEPTED[name])), noise_image())


def test_at_least_48_images_are_tested() -> None:
    assert len(REFUSED) + len(ACCEPTED) >= 48


@pytest.mark.parametrize(
    "url", ["", "nonsense", "data:", "data:image/png;base64,%%%", "data:image/png,abc", "/etc/passwd"]
)
def test_invalid_urls_are_rejected(alice: httpx.Client, url: str) -> None:
    assert rejection(alice, url)["type"] == "file_download_error"


@pytest.mark.parametrize("url", ["in.png", "/tmp/in.png", "C:\\in.png"])
def test_the_error_for_a_path_names_what_is_accepted(alice: httpx.Client, url: str) -> None:
    assert "http or https URL, a data URI" in rejection(alice, url)["msg"]


def test_the_error_names_an_unreachable_host(alice: httpx.Client) -> None:
    assert "from 127.0.0.1 failed" in rejection(alice, f"http://127.0.0.1:{free_port()}/in.png")["msg"]


def test_the_size_is_limited_before_and_during_the_download(alice: httpx.Client, httpserver: HTTPServer) -> None:
    def dribble(request: Request) -> Response:
        return Response((b"\x00" * 2**20 for _ in range(64)), content_type="image/png")

    def boast(request: Request) -> Response:
        response = Response(b"\x89PNG", content_type="image/png")
        response.automatically_set_content_length = False
        response.headers["content-length"] = str(2**40)
        return response

    httpserver.expect_request("/endless").respond_with_handler(dribble)
    httpserver.expect_request("/boast").respond_with_handler(boast)
    for path in ("/endless", "/boast"):
        entry = rejection(alice, httpserver.url_for(path))
        assert (entry["type"], entry["ctx"]) == ("file_too_large", {"max_size": 25 * 2**20})


@pytest.mark.parametrize("status", [401, 404, 500])
def test_the_error_names_the_status_of_the_host(alice: httpx.Client, httpserver: HTTPServer, status: int) -> None:
    httpserver.expect_request("/gone").respond_with_data(b"", status=status)
    entry = rejection(alice, httpserver.url_for("/gone"))
    assert entry["type"] == "file_download_error"
    assert str(status) in entry["msg"]


def test_no_compression_is_requested(alice: httpx.Client, httpserver: HTTPServer) -> None:
    recorded: list[str] = []

    def record_encoding(request: Request) -> Response:
        recorded.append(request.headers["accept-encoding"])
        return Response(encode(noise_image()), content_type="image/png")

    httpserver.expect_request("/image.png").respond_with_handler(record_encoding)
    engine_input(alice, httpserver.url_for("/image.png"))
    assert recorded == ["identity"]


@pytest.mark.parametrize("url", [*FORBIDDEN, "http://0x7f.1/", "http://localhost:8000/health"])
def test_internal_addresses_are_rejected(constrained_client: httpx.Client, url: str) -> None:
    """Every URL that the guard rejects for webhooks is rejected here too."""
    assert rejection(constrained_client, url)["type"] == "file_download_error"


# -- how long a file stays

NEEDED, STRAY = f"{'1' * 64}.png", f"{'2' * 64}.png"


def test_a_file_stays_until_its_request_is_finished(tmp_path: Path) -> None:
    clock = Clock()
    with open_components(tmp_path, clock=clock) as components:
        (components.data_dir / "inputs" / NEEDED).write_bytes(b"1")
        (components.data_dir / "inputs" / STRAY).write_bytes(b"2")
        job = components.queue.submit(submission(input_files={"image_url": NEEDED}))
        clock.now = (components.data_dir / "inputs" / NEEDED).stat().st_mtime + 60
        assert components.inputs.sweep() == 0
        clock.now += 3600
        assert components.inputs.sweep() == 1
        components.queue.cancel(job)
        assert components.inputs.sweep() == 1
        assert _names(components) == []


def test_needed_files_are_known_after_a_restart(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        (components.data_dir / "inputs" / NEEDED).write_bytes(b"1")
        components.queue.submit(submission(input_files={"image_url": NEEDED}))
    clock = Clock()
    with open_components(tmp_path, clock=clock) as components:
        components.queue.recover()
        clock.now = (components.data_dir / "inputs" / NEEDED).stat().st_mtime + 3600
        assert components.inputs.sweep() == 0
        assert _names(components) == [NEEDED]


def test_fetched_files_stay_while_the_others_are_fetched(tmp_path: Path) -> None:
    """Fetched files stay, however long the request's other files take."""
    clock = Clock()
    with open_components(tmp_path, clock=clock) as components:
        cache = components.inputs.cache
        with cache.pin() as pin:
            temp_path = cache.temp_path()
            temp_path.write_bytes(b"1")
            name = cache.add(temp_path, ".png")
            pin(name)
            clock.now = cache.path(name).stat().st_mtime + 3600
            assert cache.sweep() == 0
        clock.now = cache.path(name).stat().st_mtime + 3600
        assert cache.sweep() == 1


def test_a_file_that_disappears_does_not_stop_the_sweep(tmp_path: Path) -> None:
    clock = Clock(now=4_000_000_000.0)
    with open_components(tmp_path, clock=clock) as components:
        cache = components.inputs.cache
        for name in (f"{'a' * 16}.part", STRAY):
            cache.path(name).write_bytes(b"1")
        recorded = []

        def needed() -> set[str]:
            recorded.append(True)
            return set()

        cache._in_use = needed
        iterdir = Path.iterdir
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "iterdir", lambda directory: [*iterdir(directory), directory / f"{'b' * 16}.part"])
            assert cache.sweep() == 3
        assert recorded == [True]


def test_the_same_url_is_checked_again_for_another_kind_of_file(
    alice: httpx.Client, httpserver: HTTPServer, running: Server
) -> None:
    """An ETag says that a file is the same, not that it is an image."""
    lora = save({"x.lora_A.weight": numpy.ones((4, 8), "float32")})

    def respond(request: Request) -> Response:
        is_same = request.headers.get("if-none-match") == '"1"'
        return Response(b"" if is_same else lora, status=304 if is_same else 200, headers={"etag": '"1"'})

    httpserver.expect_request("/file").respond_with_handler(respond)
    url = httpserver.url_for("/file")
    assert alice.post("/test/lora", json={"prompt": "", "loras": [{"path": url}]}).status_code == 200
    assert rejection(alice, url)["type"] == "unsupported_image_format"


def test_a_data_uri_is_not_stored_with_its_file() -> None:
    """This holds for nested data URIs too. Other references are stored unchanged."""
    url = data_uri(encode(noise_image()))
    small = data_uri(b"lora")
    fields = {"prompt": "x", "image_url": url, "loras": [{"path": "owner/name"}, {"path": small, "scale": 0.5}]}
    request = FluxLoraImageToImageInput.model_validate(fields)
    input_files = {"image_url": "a.png", "loras.0.path": "b.safetensors", "loras.1.path": "c.safetensors"}
    stored = json.loads(dump_input(request, input_files))
    assert stored["image_url"] == "a.png"
    assert stored["loras"] == [{"path": "owner/name", "scale": 1}, {"path": "c.safetensors", "scale": 0.5}]
    reloaded = FluxLoraImageToImageInput.model_validate_json(dump_input(request, input_files))
    assert reloaded.model_dump(exclude={"image_url", "loras"}) == request.model_dump(exclude={"image_url", "loras"})


def test_one_key_cannot_fill_the_disk(tmp_path: Path, gate: Gate) -> None:
    """The inputs of a key's waiting requests have a size limit. Other keys are not affected."""
    settings = {"keys": "alice:secret,bob:secret", "max_uploads_gb": "0.00005", "max_running": "1"}
    with (
        serving(tmp_path / "data", "test/copy=demo", **settings) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False, headers=ALICE) as client,
    ):
        body = {"prompt": str(gate.path), "num_inference_steps": 1}
        wait_until_claimed(client, client.post("/queue/test/gate", json=body).json()["status_url"])
        data_uris = [data_uri(encode(noise_image(96, 80 + n))) for n in range(3)]
        responses = [
            client.post("/queue/test/copy", json={"prompt": "", "image_url": url}, headers=headers)
            for headers in (ALICE, BOB)
            for url in data_uris
        ]
        gate.release_all()
    assert [response.status_code for response in responses] == [200, 200, 429] * 2
    assert "--max-uploads-gb" in responses[2].json()["detail"]


def test_a_rejected_input_leaves_no_file(alice: httpx.Client, running: Server) -> None:
    before = sorted((running.data_dir / "inputs").iterdir())
    rejection(alice, data_uri(b"hello"))
    assert sorted((running.data_dir / "inputs").iterdir()) == before


def _names(components: Components) -> list[str]:
    return sorted(path.name for path in (components.data_dir / "inputs").iterdir())


# -- Masks: the same checks as of other input images, with errors that name the mask


def resolve_mask(components: Components, mask_url: str) -> dict[str, str]:
    """Resolve the files of an inpainting request with this mask; return their names by field."""
    request = FluxLoraInpaintingInput(prompt="x", image_url=EXAMPLE_IMAGE, mask_url=mask_url)
    return asyncio.run(components.inputs.resolve(request, "me"))


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_masks_are_rejected(components: Components, name: str) -> None:
    content, error_type = REFUSED[name]
    with pytest.raises(InvalidInput) as rejected:
        resolve_mask(components, data_uri(content))
    (entry,) = rejected.value.detail
    assert (entry["loc"], entry["type"]) == (["body", "mask_url"], error_type)


NET, ADAPTER = data_uri(control_net_for(DEMO, 1)), data_uri(ip_adapter_for(DEMO, 1))
CONTROL_LORA = data_uri(control_lora_for(DEMO, 1))
#: A request for each other field with an image, in which `IMAGE` stands for it, and the path of the field.
IMAGE = "IMAGE"
OTHER_FIELDS: list[tuple[type[ImageInput], dict[str, Any], tuple[str | int, ...]]] = [
    (FluxControlLoraCannyInput, {"control_lora_image_url": IMAGE}, ("control_lora_image_url",)),
    (FluxControlLoraDepthImageToImageInput, {"control_lora_image_url": IMAGE}, ("control_lora_image_url",)),
    (FluxKontextLoraInpaintInput, {"reference_image_url": IMAGE}, ("reference_image_url",)),
    (FluxLoraFillInput, {"fill_image": {"fill_image_url": IMAGE}}, ("fill_image", "fill_image_url")),
    (FluxGeneralInput, {"controlnets": [{"path": NET, "image_url": IMAGE}]}, ("controlnets", 0, "image_url")),
    (
        FluxGeneralInput,
        {"controlnet_unions": [{"path": NET, "controls": [{"control_image_url": IMAGE, "control_mode": "canny"}]}]},
        ("controlnet_unions", 0, "controls", 0, "control_image_url"),
    ),
    (
        FluxGeneralInput,
        {"control_loras": [{"path": CONTROL_LORA, "control_image_url": IMAGE}]},
        ("control_loras", 0, "control_image_url"),
    ),
    (
        FluxGeneralInput,
        {"ip_adapters": [{"path": ADAPTER, "ip_adapter_image_url": IMAGE}]},
        ("ip_adapters", 0, "ip_adapter_image_url"),
    ),
]


def with_image(value: Any, url: str) -> Any:
    """Return a copy of a request's fields in which a URL takes the place of IMAGE."""
    if isinstance(value, dict):
        return {name: with_image(part, url) for name, part in value.items()}
    if isinstance(value, list):
        return [with_image(part, url) for part in value]
    return url if value == IMAGE else value


#: The fields with files of weights, each in a request without the file, and what they hold.
WEIGHTS: list[tuple[str, dict[str, Any], str]] = [
    ("controlnets", {"image_url": EXAMPLE_IMAGE}, "control_net"),
    ("controlnet_unions", {"controls": [{"control_image_url": EXAMPLE_IMAGE, "control_mode": "canny"}]}, "control_net"),
    ("control_loras", {"control_image_url": EXAMPLE_IMAGE}, "lora"),
    ("ip_adapters", {"ip_adapter_image_url": EXAMPLE_IMAGE}, "ip_adapter"),
]
#: Good files of each kind, in fields of other kinds.
WRONG_KINDS = {"lora": NET, "control_net": ADAPTER, "ip_adapter": CONTROL_LORA}


@pytest.mark.parametrize(("name", "fields", "kind"), WEIGHTS)
def test_weights_of_another_kind_are_rejected(
    components: Components, name: str, fields: dict[str, Any], kind: str
) -> None:
    request = FluxGeneralInput.model_validate({"prompt": "x", name: [{**fields, "path": WRONG_KINDS[kind]}]})
    with pytest.raises(InvalidInput) as rejected:
        asyncio.run(components.inputs.resolve(request, "me"))
    (entry,) = rejected.value.detail
    assert (entry["loc"], entry["type"]) == (["body", name, 0, "path"], "value_error")
    assert "it holds no" in entry["msg"]


@pytest.mark.parametrize("name", ["bomb", "truncated png", "two million chunks"])
@pytest.mark.parametrize(("kind", "fields", "path"), OTHER_FIELDS)
def test_hostile_images_in_other_fields_are_rejected(
    components: Components, kind: type[ImageInput], fields: dict[str, Any], path: tuple[str | int, ...], name: str
) -> None:
    content, error_type = REFUSED[name]
    known = {"prompt": "x", "image_url": EXAMPLE_IMAGE, "mask_url": EXAMPLE_MASK}
    request = kind.model_validate({**known, **with_image(fields, data_uri(content))})
    with pytest.raises(InvalidInput) as rejected:
        asyncio.run(components.inputs.resolve(request, "me"))
    (entry,) = rejected.value.detail
    assert (entry["loc"], entry["type"]) == (["body", *path], error_type)


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_images_whose_transparency_is_a_mask_are_rejected(tmp_path: Path, name: str) -> None:
    """OpenAI's clients send such masks. Most of these images have no transparency, which is found last."""
    content, error_type = REFUSED[name]
    (tmp_path / "mask").write_bytes(content)
    with pytest.raises(InvalidInputFile) as rejected:
        images.decode_transparency(tmp_path / "mask", Limits(2048, 4_194_304))
    assert rejected.value.type in (error_type, "value_error")
    if rejected.value.type == "value_error":
        assert "has no transparency" in str(rejected.value)
        assert error_type == "image_too_small"


@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_masks_are_accepted(components: Components, name: str) -> None:
    mask = resolve_mask(components, data_uri(ACCEPTED[name]))["mask_url"]
    with Image.open(components.inputs.cache.path(mask)) as image:
        assert image.tobytes() == noise_image().tobytes()


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/", "http://10.0.0.1/a.png", "/etc/passwd", "file:///etc/passwd", "mask.png", "data:,"],
)
def test_masks_are_not_fetched_from_private_addresses_or_read_from_the_disk(components: Components, url: str) -> None:
    with pytest.raises(InvalidInput) as rejected:
        resolve_mask(components, url)
    (entry,) = rejected.value.detail
    assert (entry["loc"], entry["type"]) == (["body", "mask_url"], "file_download_error")


def test_the_image_and_its_mask_may_be_one_file(components: Components) -> None:
    request = FluxLoraInpaintingInput(prompt="x", image_url=data_uri(PNG), mask_url=data_uri(PNG))
    names = asyncio.run(components.inputs.resolve(request, "me"))
    assert names["image_url"] == names["mask_url"]


def test_a_check_that_takes_too_long_names_the_field(
    components: Components, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(child_process, "MAX_SECONDS", 0.001)
    with pytest.raises(InternalError, match=r"^mask_url: The check of the file did not end within 0\.001 seconds"):
        resolve_mask(components, data_uri(GIF))
