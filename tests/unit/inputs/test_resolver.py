"""Pictures that come in by address: every way in, every limit, and nothing that should not be fetched."""

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

from models.flux_lora_image_to_image import FluxLoraImageToImageInput
from models.schema import Limits
from server.errors import InvalidInputFile
from server.inputs import images
from server.inputs.resolver import dump_input
from tests.support.components import Clock, Parts, opened, submission
from tests.support.hostile_images import JPEG, PNG, PROGRESSIVE, REFUSED, TAKEN, WEBP, encoded, noise
from tests.support.server_process import Gate, Server, completed, free_port, in_progress, serving
from tests.unit.net.test_outbound import FORBIDDEN

COPY = "/test/copy"
ALICE, BOB = {"authorization": "Key alice:secret"}, {"authorization": "Key bob:secret"}


def data_uri(content: bytes, content_type: str = "image/png") -> str:
    return f"data:{content_type};base64,{base64.b64encode(content).decode()}"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two keys, and the operator's own network allowed."""
    settings = {"keys": "alice:secret,bob:secret", "outbound_allow": "127.0.0.0/8"}
    with serving(tmp_path_factory.mktemp("inputs"), "test/copy=demo", **settings) as server:
        yield server.ready()


@pytest.fixture
def alice(running: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60, trust_env=False, headers=ALICE) as client:
        yield client


def copied(client: httpx.Client, url: str, **more: Any) -> Image.Image:
    """The picture that the engine was given."""
    body = {"prompt": "", "image_url": url, "output_format": "png", "sync_mode": True, **more}
    answer = client.post(COPY, json=body)
    assert answer.status_code == 200, answer.text
    content = base64.b64decode(answer.json()["images"][0]["url"].partition(",")[2])
    return Image.open(io.BytesIO(content))


def refused(client: httpx.Client, url: str, path: str = COPY) -> dict[str, Any]:
    """Why it was not accepted; it is never more than a 422 that names the field."""
    answer = client.post(path, json={"prompt": "", "image_url": url})
    assert answer.status_code == 422, answer.text
    (entry,) = answer.json()["detail"]
    assert entry["loc"] == ["body", "image_url"]
    assert entry["msg"]
    found: dict[str, Any] = entry
    return found


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.convert("RGB").tobytes()


# -- the ways in


def test_data_uri(alice: httpx.Client) -> None:
    assert same(copied(alice, data_uri(encoded(noise()))), noise())


def test_hosted(alice: httpx.Client, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/picture.png").respond_with_data(encoded(noise()), content_type="image/png")
    assert same(copied(alice, httpserver.url_for("/picture.png")), noise())


def test_uploaded(alice: httpx.Client) -> None:
    headers = {"host": "rest.fal.ai"}
    announced = {"content_type": "image/png", "file_name": "in.png"}
    begun = alice.post("/storage/upload/initiate", json=announced, headers=headers).json()
    alice.put(begun["upload_url"], content=encoded(noise()), headers={"content-type": "image/png"}).raise_for_status()
    assert same(copied(alice, begun["file_url"]), noise())


def test_an_answer_is_an_input_too(alice: httpx.Client) -> None:
    url = data_uri(encoded(noise()))
    answer = alice.post(COPY, json={"prompt": "", "image_url": url, "output_format": "png"}).json()
    assert same(copied(alice, answer["images"][0]["url"]), noise())


def test_a_private_file_is_its_owners_alone(alice: httpx.Client) -> None:
    headers = {"x-fal-object-lifecycle-preference": '{"initial_acl": {"default": "forbid"}}'}
    body = {"prompt": "", "image_url": data_uri(encoded(noise())), "output_format": "png"}
    url = alice.post(COPY, json=body, headers=headers).json()["images"][0]["url"]
    assert same(copied(alice, url), noise())
    answer = alice.post(COPY, json={"prompt": "", "image_url": url}, headers=BOB)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["type"] == "file_download_error"


def test_redirects_are_followed_a_few_times(alice: httpx.Client, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/picture.png").respond_with_data(encoded(noise()))
    httpserver.expect_request("/moved").respond_with_response(
        Response(status=302, headers={"location": "/picture.png"})
    )
    httpserver.expect_request("/circle").respond_with_response(Response(status=302, headers={"location": "/circle"}))
    assert same(copied(alice, httpserver.url_for("/moved")), noise())
    assert "more than 5 times" in refused(alice, httpserver.url_for("/circle"))["msg"]


def test_a_redirect_is_judged_like_any_other_address(alice: httpx.Client, httpserver: HTTPServer) -> None:
    where = {"location": "http://169.254.169.254/latest/meta-data/"}
    httpserver.expect_request("/away").respond_with_response(Response(status=302, headers=where))
    assert refused(alice, httpserver.url_for("/away"))["type"] == "file_download_error"


def test_what_was_accepted_is_painted_whatever_became_of_it(tmp_path: Path, httpserver: HTTPServer, gate: Gate) -> None:
    """The bytes of the day of the submit, after a kill and with the host gone."""
    httpserver.expect_request("/picture.png").respond_with_data(encoded(noise()))
    body = {"prompt": "", "image_url": httpserver.url_for("/picture.png"), "output_format": "png"}
    settings = {"outbound_allow": "127.0.0.0/8", "max_running": "1"}
    with (
        serving(tmp_path / "data", "test/copy=demo", **settings) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        # This one is painted for ever.
        first = client.post("/queue/test/gate", json={"prompt": str(gate.path)}).json()
        in_progress(client, first["status_url"])
        path = urlsplit(client.post("/queue/test/copy", json=body).json()["response_url"]).path
        server.kill()
    gate.open()
    httpserver.clear()
    with (
        serving(tmp_path / "data", "test/copy=demo", **settings) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        assert completed(client, f"{path}/status")["status"] == "COMPLETED"
        found = client.get(urlsplit(client.get(path).json()["images"][0]["url"]).path)
        assert same(Image.open(io.BytesIO(found.content)), noise())


# -- what is read


def test_orientation_and_first_frame(alice: httpx.Client) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = copied(alice, data_uri(encoded(noise(96, 80), exif=exif)))
    assert same(turned, noise(96, 80).transpose(Image.Transpose.ROTATE_270))
    second = Image.new("RGB", (96, 80))
    moving = encoded(noise(), "PNG", save_all=True, append_images=[second])
    assert same(copied(alice, data_uri(moving)), noise())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(alice: httpx.Client, mode: str) -> None:
    grey = numpy.arange(96 * 80, dtype=numpy.uint16).reshape(80, 96) * 8
    source = Image.fromarray(grey) if mode == "I;16" else noise().convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    found = copied(alice, data_uri(encoded(source, kind)))
    assert found.mode == "RGB"
    expected = Image.fromarray((grey // 257).astype(numpy.uint8)) if mode == "I;16" else source
    if mode != "CMYK":
        assert same(found, expected)


def test_large_ones_are_scaled_down_to_the_limit(alice: httpx.Client) -> None:
    assert copied(alice, data_uri(encoded(Image.new("RGB", (4000, 1000))))).size == (2048, 512)
    assert copied(alice, data_uri(encoded(Image.new("RGB", (2048, 2048))))).size == (2048, 2048)
    # Whose share of the limit is no exact number.
    assert copied(alice, data_uri(encoded(Image.new("RGB", (2215, 2215))))).size == (2048, 2048)


# -- what is refused


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_pictures(alice: httpx.Client, name: str) -> None:
    content, error_type = REFUSED[name]
    entry = refused(alice, data_uri(content))
    assert entry["type"] == error_type
    assert len(entry["input"]) <= 1000
    assert same(copied(alice, data_uri(encoded(noise()))), noise())


@pytest.mark.parametrize("name", TAKEN)
def test_odd_pictures(alice: httpx.Client, name: str) -> None:
    assert same(copied(alice, data_uri(TAKEN[name])), noise())


def test_as_many_as_were_promised() -> None:
    assert len(REFUSED) + len(TAKEN) >= 48


def mutate(number: int, folder: Path) -> None:
    """Change a few bytes of a good picture: what comes of it is RGB within the limits, or is refused."""
    rng = numpy.random.default_rng(number)
    good = (PNG, JPEG, WEBP, PROGRESSIVE)[number % 4]
    content = bytearray(good)
    for place in rng.integers(len(content) if number % 2 else min(200, len(content)), size=1 + number % 7):
        content[place] = rng.integers(256)
    if number % 5 == 0:
        del content[int(rng.integers(len(content))) :]
    path = folder / "mutated"
    path.write_bytes(content)
    limits = Limits()
    try:
        found = images.decode_image(path, limits)
    except InvalidInputFile:
        return
    assert found.mode == "RGB"
    assert limits.min_side <= min(found.size) <= max(found.size) <= limits.max_side


def test_mutations(tmp_path: Path) -> None:
    for number in range(300):
        mutate(number, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_mutations(tmp_path: Path) -> None:
    for number in range(20_000):
        mutate(number, tmp_path)


@pytest.mark.parametrize(
    "url", ["", "nonsense", "data:", "data:image/png;base64,%%%", "data:image/png,abc", "/etc/passwd"]
)
def test_what_is_no_address(alice: httpx.Client, url: str) -> None:
    assert refused(alice, url)["type"] == "file_download_error"


@pytest.mark.parametrize("url", ["in.png", "/tmp/in.png", "C:\\in.png"])
def test_a_path_is_told_what_is_accepted(alice: httpx.Client, url: str) -> None:
    assert "http or https URL, a data URI" in refused(alice, url)["msg"]


def test_a_host_that_cannot_be_reached_is_named(alice: httpx.Client) -> None:
    assert "from 127.0.0.1 failed" in refused(alice, f"http://127.0.0.1:{free_port()}/in.png")["msg"]


def test_size_is_bounded_before_and_while_it_comes(alice: httpx.Client, httpserver: HTTPServer) -> None:
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
        entry = refused(alice, httpserver.url_for(path))
        assert (entry["type"], entry["ctx"]) == ("file_too_large", {"max_size": 25 * 2**20})


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_host_that_does_not_have_it(alice: httpx.Client, httpserver: HTTPServer, status: int) -> None:
    httpserver.expect_request("/gone").respond_with_data(b"", status=status)
    entry = refused(alice, httpserver.url_for("/gone"))
    assert entry["type"] == "file_download_error"
    assert str(status) in entry["msg"]


def test_compression_in_transit_is_not_asked_for(alice: httpx.Client, httpserver: HTTPServer) -> None:
    seen: list[str] = []

    def look(request: Request) -> Response:
        seen.append(request.headers["accept-encoding"])
        return Response(encoded(noise()), content_type="image/png")

    httpserver.expect_request("/picture.png").respond_with_handler(look)
    copied(alice, httpserver.url_for("/picture.png"))
    assert seen == ["identity"]


@pytest.mark.parametrize("url", [*FORBIDDEN, "http://0x7f.1/", "http://localhost:8000/health"])
def test_inner_addresses_are_refused(narrow_client: httpx.Client, url: str) -> None:
    """The whole corpus of the guard that webhooks have."""
    assert refused(narrow_client, url)["type"] == "file_download_error"


# -- how long it stays

NEEDED, STRAY = f"{'1' * 64}.png", f"{'2' * 64}.png"


def test_a_file_stays_as_long_as_its_request_is_not_done(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock=clock) as parts:
        (parts.folder / "inputs" / NEEDED).write_bytes(b"1")
        (parts.folder / "inputs" / STRAY).write_bytes(b"2")
        job = parts.queue.submit(submission(input_files={"image_url": NEEDED}))
        clock.now = (parts.folder / "inputs" / NEEDED).stat().st_mtime + 60
        assert parts.inputs.sweep() == 0
        clock.now += 3600
        assert parts.inputs.sweep() == 1
        parts.queue.cancel(job)
        assert parts.inputs.sweep() == 1
        assert _names(parts) == []


def test_a_restart_knows_what_is_needed(tmp_path: Path) -> None:
    with opened(tmp_path) as parts:
        (parts.folder / "inputs" / NEEDED).write_bytes(b"1")
        parts.queue.submit(submission(input_files={"image_url": NEEDED}))
    clock = Clock()
    with opened(tmp_path, clock=clock) as parts:
        parts.queue.recover()
        clock.now = (parts.folder / "inputs" / NEEDED).stat().st_mtime + 3600
        assert parts.inputs.sweep() == 0
        assert _names(parts) == [NEEDED]


def test_what_was_brought_first_stays_while_the_rest_comes(tmp_path: Path) -> None:
    """However long that takes."""
    clock = Clock()
    with opened(tmp_path, clock=clock) as parts:
        brought = parts.inputs.cache
        with brought.pin() as hold:
            ready = brought.temp_path()
            ready.write_bytes(b"1")
            name = brought.add(ready, ".png")
            hold(name)
            clock.now = brought.path(name).stat().st_mtime + 3600
            assert brought.sweep() == 0
        clock.now = brought.path(name).stat().st_mtime + 3600
        assert brought.sweep() == 1


def test_a_file_that_goes_meanwhile_does_not_stop_the_sweep(tmp_path: Path) -> None:
    clock = Clock(now=4_000_000_000.0)
    with opened(tmp_path, clock=clock) as parts:
        brought = parts.inputs.cache
        for name in (f"{'a' * 16}.part", STRAY):
            brought.path(name).write_bytes(b"1")
        seen = []

        def needed() -> set[str]:
            seen.append(True)
            return set()

        brought._in_use = needed
        iterdir = Path.iterdir
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "iterdir", lambda folder: [*iterdir(folder), folder / f"{'b' * 16}.part"])
            assert brought.sweep() == 3
        assert seen == [True]


def test_the_same_address_as_another_kind_is_looked_at_again(
    alice: httpx.Client, httpserver: HTTPServer, running: Server
) -> None:
    """An ETag says that a file is the same, not that it is a picture."""
    lora = save({"x.lora_A.weight": numpy.ones((4, 8), "float32")})

    def answer(request: Request) -> Response:
        is_same = request.headers.get("if-none-match") == '"1"'
        return Response(b"" if is_same else lora, status=304 if is_same else 200, headers={"etag": '"1"'})

    httpserver.expect_request("/file").respond_with_handler(answer)
    url = httpserver.url_for("/file")
    assert alice.post("/test/lora", json={"prompt": "", "loras": [{"path": url}]}).status_code == 200
    assert refused(alice, url)["type"] == "unsupported_image_format"


def test_a_data_uri_is_not_kept_beside_its_file() -> None:
    """Nested ones neither; what came from elsewhere is kept as it was said."""
    url = data_uri(encoded(noise()))
    small = data_uri(b"lora")
    fields = {"prompt": "x", "image_url": url, "loras": [{"path": "owner/name"}, {"path": small, "scale": 0.5}]}
    request = FluxLoraImageToImageInput.model_validate(fields)
    brought = {"image_url": "a.png", "loras.0.path": "b.safetensors", "loras.1.path": "c.safetensors"}
    kept = json.loads(dump_input(request, brought))
    assert kept["image_url"] == "a.png"
    assert kept["loras"] == [{"path": "owner/name", "scale": 1}, {"path": "c.safetensors", "scale": 0.5}]
    again = FluxLoraImageToImageInput.model_validate_json(dump_input(request, brought))
    assert again.model_dump(exclude={"image_url", "loras"}) == request.model_dump(exclude={"image_url", "loras"})


def test_one_key_cannot_fill_the_disk(tmp_path: Path, gate: Gate) -> None:
    """Its waiting requests bring so much along and no more; others are not kept out."""
    settings = {"keys": "alice:secret,bob:secret", "max_uploads_gb": "0.00005", "max_running": "1"}
    with (
        serving(tmp_path / "data", "test/copy=demo", **settings) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False, headers=ALICE) as client,
    ):
        body = {"prompt": str(gate.path), "num_inference_steps": 1}
        in_progress(client, client.post("/queue/test/gate", json=body).json()["status_url"])
        pictures_ = [data_uri(encoded(noise(96, 80 + n))) for n in range(3)]
        answers = [
            client.post("/queue/test/copy", json={"prompt": "", "image_url": url}, headers=who)
            for who in (ALICE, BOB)
            for url in pictures_
        ]
        gate.open()
    assert [answer.status_code for answer in answers] == [200, 200, 429] * 2
    assert "--max-uploads-gb" in answers[2].json()["detail"]


def test_a_refused_one_leaves_nothing(alice: httpx.Client, running: Server) -> None:
    before = sorted((running.data_dir / "inputs").iterdir())
    refused(alice, data_uri(b"hello"))
    assert sorted((running.data_dir / "inputs").iterdir()) == before


def _names(parts: Parts) -> list[str]:
    return sorted(path.name for path in (parts.folder / "inputs").iterdir())
