"""Decompression bombs and other small inputs that need much memory, on every route."""

import base64
import json
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import msgpack
import psutil
import pytest

from server.inputs import image_decoder
from server.inputs.resolver import MAX_IMAGE_BYTES
from tests.clients.test_realtime import receive, session
from tests.support.hostile_images import EMPTY_BLOCK, HIDDEN_PIXELS, PNG, chunk, hide_blocks, in_between, png
from tests.support.server_process import TEST_MODELS, Server, serving

ALICE, BOB = {"authorization": "Key alice:secret"}, {"authorization": "Key bob:secret"}
#: Bytes by which the process may grow.
MAX_GROWTH = 300 * 2**20
#: Bytes of the processes that it starts, of which two may decode images at a time.
MAX_CHILDREN = 2 * image_decoder.MAX_BYTES


@pytest.fixture(scope="module")
def bombed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"keys": "alice:secret,bob:secret", "outbound_allow": "127.0.0.0/8", "a1111": "true"}
    with serving(tmp_path_factory.mktemp("bombed"), TEST_MODELS, **settings) as server:
        httpx.post(f"{server.ready().url}/test/null", json={"prompt": "x"}, headers=BOB, trust_env=False)
        yield server


@contextmanager
def unharmed(server: Server, max_growth: int = MAX_GROWTH) -> Iterator[None]:
    """Check that during the block the process grows little, answers other requests and logs no traceback.

    The processes that it starts must be small too.
    """
    process, is_over = psutil.Process(server.process.pid), threading.Event()
    before, seen, children, answers = process.memory_info().rss, list[int](), list[int](), list[int]()

    def watch() -> None:
        with httpx.Client(base_url=server.url, timeout=20, trust_env=False) as client:
            while not is_over.is_set():
                seen.append(process.memory_info().rss)
                children.append(children_bytes(process))
                answers.append(client.get("/health").status_code)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
    assert answers and set(answers) == {200}
    assert max(seen) - before < max_growth, f"the process grew by {(max(seen) - before) / 2**20:.0f} MiB"
    assert max(children) < MAX_CHILDREN, f"its children took {max(children) / 2**20:.0f} MiB"
    assert "Traceback" not in server.output


def children_bytes(process: psutil.Process) -> int:
    """Return the memory of the processes that a process started."""
    num_bytes = 0
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            num_bytes += child.memory_info().rss
    return num_bytes


# -- the routes: each sends a body as it is, and returns the status and the body of the answer

#: The status codes of refusals in fal's and in OpenAI's shape.
REFUSALS = (422, 400)
Route = Callable[[Server, str, bytes], tuple[int, Any]]


def over_http(path: str, **headers: str) -> Route:
    def send(server: Server, endpoint: str, body: bytes) -> tuple[int, Any]:
        all_headers = {
            "content-type": "application/json",
            **ALICE,
            **{name: value.format(endpoint) for name, value in headers.items()},
        }
        answer = httpx.post(
            f"{server.url}{path.format(endpoint)}", content=body, headers=all_headers, timeout=60, trust_env=False
        )
        return answer.status_code, answer.json()

    return send


def over_openai(server: Server, endpoint: str, body: bytes) -> tuple[int, Any]:
    content = body.replace(b"{", b'{"model": "%s", ' % endpoint.encode(), 1) if body.startswith(b"{") else body
    return over_http("/v1/images/generations")(server, endpoint, content)


def as_frame(is_text: bool) -> Route:
    def send(server: Server, endpoint: str, body: bytes) -> tuple[int, Any]:
        with session(server, endpoint, **ALICE) as socket:
            socket.send(body.decode() if is_text else body)
            message = receive(socket)
            return {"INVALID_INPUT": 422}.get(message["error"], 500), {"detail": message["reason"]}

    return send


HTTP: dict[str, Route] = {
    "queue": over_http("/queue/{}"),
    "run": over_http("/{}"),
    "stream": over_http("/{}/stream"),
    "proxy": over_http("/api/fal/proxy", **{"x-fal-target-url": "https://queue.fal.run/{}"}),
    "openai": over_openai,
}
ROUTES = {**HTTP, "realtime": as_frame(is_text=True)}


# -- images

ZEROS = zlib.compress(bytes(80_000_000), 9)
IMAGES = {
    "many pixels": png(60_000, 60_000, chunk(b"IDAT", zlib.compress(bytes(3_000_000), 9))),
    "a profile": in_between(PNG, 33, chunk(b"iCCP", b"a\0\0" + ZEROS)),
    "text": in_between(PNG, 33, chunk(b"zTXt", b"a\0\0" + ZEROS)),
    "texts": in_between(PNG, 33, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000), 9)) * 1000),
    "international text": in_between(PNG, 33, chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS)),
    "frames": png(9000, 9000, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), chunk(b"IDAT", ZEROS)),
    "hidden pixels": HIDDEN_PIXELS,
    "hidden blocks": hide_blocks(EMPTY_BLOCK, 7_000_000),
}
#: A valid image whose 65,000 metadata entries all claim to be larger than the file.
BAD_METADATA = in_between(
    PNG,
    33,
    chunk(
        b"eXIf",
        b"MM\0*"
        + struct.pack(">IH", 8, 65_000)
        + b"".join(struct.pack(">HHII", tag, 1, 2**31, 0) for tag in range(65_000)),
    ),
)


def with_image(content: bytes) -> bytes:
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return json.dumps({"prompt": "x", "image_url": uri}).encode()


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_images_that_decompress_to_gigabytes(bombed: Server, route: Route) -> None:
    """Refuse the images with an error that names their field."""
    with unharmed(bombed):
        for name, content in IMAGES.items():
            status, answer = route(bombed, "test/copy", with_image(content))
            assert status in REFUSALS, (name, answer)
            assert "image_url" in json.dumps(answer), name
            assert len(json.dumps(answer)) < 10_000


@pytest.mark.parametrize("field", ["image", "mask"])
def test_images_in_forms_that_decompress_to_gigabytes(bombed: Server, field: str) -> None:
    with unharmed(bombed), httpx.Client(base_url=bombed.url, headers=ALICE, timeout=60, trust_env=False) as client:
        for name, content in IMAGES.items():
            files = {"image": PNG, field: content}
            answer = client.post("/v1/images/edits", data={"prompt": "x", "model": "test/null"}, files=files)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), name


def test_many_large_images_of_one_key(bombed: Server) -> None:
    """Count AUTOMATIC1111's bodies, which are not written to the disk as they arrive, until their files are checked."""
    image = base64.b64encode(bytes(MAX_IMAGE_BYTES)).decode()
    content = json.dumps({"init_images": [image], "override_settings": {"sd_model_checkpoint": "test/copy"}}).encode()

    def send() -> int:
        url, headers = f"{bombed.url}/sdapi/v1/img2img", {**ALICE, "content-type": "application/json"}
        return httpx.post(url, content=content, headers=headers, timeout=60, trust_env=False).status_code

    # The first request also loads what all later ones use.
    assert send() == 422
    # The bytes in flight have room for two of these bodies. While one is read, there are up to four copies of it.
    max_growth = 2 * 5 * len(content)
    with unharmed(bombed, max_growth), ThreadPoolExecutor(8) as clients:
        statuses = {each.result() for each in [clients.submit(send) for _ in range(8)]}
    assert 422 in statuses <= {422, 429}


def test_bad_metadata_does_not_fill_the_log(bombed: Server) -> None:
    before = len(bombed.output)
    with unharmed(bombed):
        status, answer = HTTP["run"](bombed, "test/copy", with_image(BAD_METADATA))
    assert (status, answer["images"][0]["width"]) == (200, 96)
    assert len(bombed.output) - before < 1000


# -- JSON and msgpack

TEXTS: dict[str, str] = {
    "depth": '{"prompt": "x", "more": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "depth of maps": '{"prompt": "x", "more": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}",
    "a list alone": "[" * 100_000,
    "keys": json.dumps({"prompt": "x", **dict.fromkeys(map(str, range(100_001)), 0)}),
    "empty maps": '{"prompt": "x", "more": [' + "{}," * 1_000_000 + "{}]}",
    "a seed of a million digits": '{"prompt": "x", "seed": ' + "9" * 1_000_000 + "}",
    "steps of a million digits": '{"prompt": "x", "num_inference_steps": 1' + "0" * 1_000_000 + "}",
    "a fraction of a million digits": '{"prompt": "x", "guidance_scale": 1e' + "9" * 1_000_000 + "}",
    "a prompt that is a number without end": '{"prompt": ' + "9" * 1_000_000 + "}",
    "the last of two keys": '{"prompt": "x", "seed": 1, "seed": "none"}',
}
FIELDS = {
    "seed": "seed",
    "steps": "num_inference_steps",
    "fraction": "guidance_scale",
    "prompt": "prompt",
    "last": "seed",
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_json_that_needs_more_memory_than_its_size(bombed: Server, route: Route) -> None:
    """Refuse the bodies; if a single field is at fault, name it in the error."""
    with unharmed(bombed):
        for name, text in TEXTS.items():
            status, answer = route(bombed, "test/null", text.encode())
            assert status in REFUSALS, (name, status, str(answer)[:300])
            error = json.dumps(answer)
            assert len(error) < 10_000, name
            fields = [FIELDS[word] for word in name.split() if word in FIELDS]
            # The JSON parser reports the position of a number that is out of range, not its field.
            assert "number out of range" in error or all(field in error for field in fields), (name, error)


SMALL = msgpack.packb({"prompt": "x"})
FRAMES: dict[str, bytes] = {
    "depth": b"\x82\xa6prompt\xa1x\xa4more" + b"\x91" * 100_000 + b"\x01",
    "depth of maps": b"\x81\xa1a" * 100_000 + b"\x01",
    "a million keys": msgpack.packb({"prompt": "x", "more": dict.fromkeys(map(str, range(1_000_000)), 0)}),
    "a map that claims to be long": b"\xdf\xff\xff\xff\xff" + SMALL[1:],
    "a list that claims to be long": b"\x82\xa6prompt\xa1x\xa4more\xdd\xff\xff\xff\xff",
    "a text that claims to be long": b"\x81\xa6prompt\xdb\xff\xff\xff\xff" + b"x" * 1000,
    "bytes that claim to be long": b"\x81\xa6prompt\xc6\xff\xff\xff\xff" + b"x" * 1000,
    "an extension that claims to be long": b"\x81\xa6prompt\xc9\xff\xff\xff\xff\x05" + b"x" * 1000,
    "an extension": msgpack.packb({"prompt": msgpack.ExtType(5, bytes(1_000_000))}),
    "a time": msgpack.packb({"prompt": "x", "seed": msgpack.Timestamp(2**33)}),
    "an invalid time": b"\x82\xa6prompt\xa1x\xa4more\xc7\x0c\xff" + b"\xff" * 12,
    "a time as a key": b"\x82\xa6prompt\xa1x\xd6\xff\x00\x00\x00\x01\x01",
    "a list as a key": b"\x82\xa6prompt\xa1x\x91\x01\x01",
    "many messages in one": SMALL * 100_000,
}


def test_msgpack_that_needs_more_memory_than_its_size(bombed: Server) -> None:
    """Refuse the frames and keep the session open."""
    with unharmed(bombed), session(bombed, **ALICE) as socket:
        for name, frame in FRAMES.items():
            socket.send(frame)
            message = receive(socket)
            assert "type" in message, name
            assert (message["type"], message["error"]) == ("x-fal-error", "INVALID_INPUT"), name
            assert len(message["reason"]) < 10_000
        socket.send(SMALL)
        assert receive(socket)["prompt"] == "x"
