"""Tests of a full disk in each phase of a request: 507 in JSON, never 500; all work continues once there is room."""

import base64
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from server.errors import DiskFull
from tests.support.components import open_components
from tests.support.image_files import encode, noise_image
from tests.support.repeats import round_params
from tests.support.server_process import TEST_MODELS, Gate, Server, serving, wait_until_claimed, wait_until_completed
from tests.support.small_disk import SmallDisk, small_disk

DISK_BYTES = 8 * 2**20
PAGE_BYTES = 4096
#: The image takes five pages on disk, and more inside an answer.
LARGE: dict[str, Any] = {"image_size": {"width": 1024, "height": 1024}, "num_inference_steps": 1}
IMAGE = encode(noise_image(256, 256))
POSTPROCESSOR_RETRIES, WEBHOOK_NOT_RECORDED = (
    "trying again every second [server.worker.postprocessor]",
    "a webhook could not be sent, or its attempt could not be recorded",
)


@dataclass
class Receiver:
    """Webhook target. The first webhook fills the disk, so that the server cannot record its delivery."""

    disk: SmallDisk
    url: str
    is_filled: threading.Event = field(default_factory=threading.Event)
    is_retried: threading.Event = field(default_factory=threading.Event)

    def receive(self, request: Request) -> Response:
        """Answer one delivery."""
        if self.is_filled.is_set():
            self.is_retried.set()
        else:
            self.disk.fill()
            self.is_filled.set()
        return Response()


@dataclass
class Setup:
    """A server on a small disk, with the client, gate and webhook receiver that the checks use."""

    rng: random.Random
    disk: SmallDisk
    server: Server
    client: httpx.Client
    gate: Gate
    receiver: Receiver
    #: Paths of the accepted requests.
    accepted: list[str] = field(default_factory=list)

    @contextmanager
    def full(self, pages: int) -> Iterator[None]:
        """Leave at most this many free pages inside the block. Free the disk after it."""
        self.disk.fill(self.rng.randint(0, pages) * PAGE_BYTES)
        with self.freed():
            yield

    @contextmanager
    def freed(self) -> Iterator[None]:
        """Free the disk after the block. One more request wakes the work that waits for room."""
        yield
        self.disk.free()
        assert self.client.post("/test/null", json={"prompt": "x"}).status_code == 200

    def submit(self, endpoint: str = "test/null", query: str = "", **fields: Any) -> httpx.Response:
        """Submit a request and remember its path if it is accepted, since it must complete."""
        answer = self.client.post(f"/queue/{endpoint}{query}", json={"prompt": "x", **fields})
        if answer.status_code == 200:
            self.accepted.append(httpx.URL(answer.json()["response_url"]).path)
        return answer

    def submit_blocked(self, **fields: Any) -> str:
        """Submit a request that blocks at the gate before its only step, and return its path."""
        assert self.submit("test/gate", prompt=str(self.gate.path), **LARGE, **fields).status_code == 200
        wait_until_claimed(self.client, f"{self.accepted[-1]}/status")
        return self.accepted[-1]

    @contextmanager
    def wait_for_another(self, message: str) -> Iterator[None]:
        """After the block, wait until the server has logged this message once more than before the block."""
        count = self.server.output.count(message) + 1
        yield
        self.server.wait_for("(?s)" + ".*".join([re.escape(message)] * count))


def assert_disk_full(answer: httpx.Response) -> None:
    """Check for the 507 answer of a full disk."""
    assert (answer.status_code, answer.headers["content-type"]) == (507, "application/json"), answer.text
    assert answer.json()["detail"] == DiskFull.message


def check_submits(setup: Setup) -> None:
    """Check that requests are accepted while there is room, and that reads are always answered."""
    with setup.full(16):
        while (answer := setup.submit()).status_code == 200:
            continue
        assert_disk_full(answer)
        assert_disk_full(setup.client.post("/test/null", json={"prompt": "x"}))
        pages = ["/health", "/metrics", "/status.json", setup.accepted[0], f"{setup.accepted[-1]}/status"]
        assert {setup.client.get(page).status_code for page in pages} <= {200, 202, 400}


def check_uploads(setup: Setup) -> None:
    """Check uploads in one request and in two requests. The second of the two, a PUT, can be repeated."""
    content = setup.rng.randbytes(200_000)
    body = {"content_type": "text/plain", "file_name": "hello.txt"}
    initiated = setup.client.post("/storage/upload/initiate", json=body).json()
    with setup.full(40):
        assert_disk_full(setup.client.post("/files/upload", content=content))
        assert_disk_full(setup.client.put(initiated["upload_url"], content=content))
    assert setup.client.put(initiated["upload_url"], content=content).status_code == 200
    assert setup.client.get(initiated["file_url"]).content == content


def check_inputs(setup: Setup) -> None:
    """Check input images as a data URI, by URL, in a form, and in AUTOMATIC1111's API."""
    image_url = setup.receiver.url.replace("/hook", "/in.png")
    data_uri = f"data:image/png;base64,{base64.b64encode(IMAGE).decode()}"
    with setup.full(30):
        for url in (data_uri, image_url):
            assert_disk_full(setup.submit("test/copy", image_url=url))
        # These are so large that not even the temporary file has room.
        content = bytes(2**20)
        fields, files = {"prompt": "x", "model": "test/null"}, {"image": content, "mask": content}
        answer = setup.client.post("/v1/images/edits", data=fields, files=files)
        assert (answer.status_code, answer.json()["error"]["message"]) == (507, DiskFull.message)
        body = {"init_images": [base64.b64encode(content).decode()]}
        assert_disk_full(setup.client.post("/sdapi/v1/img2img", json=body))
    assert [setup.submit("test/copy", image_url=url).status_code for url in (data_uri, image_url)] == [200, 200]


def check_image_files(setup: Setup) -> None:
    """Check that a generated image waits for the room that its file needs."""
    path = setup.submit_blocked()
    with setup.full(3):
        with setup.wait_for_another(POSTPROCESSOR_RETRIES):
            setup.gate.release(1)
        assert setup.client.get(f"{path}/status").json()["status"] == "IN_PROGRESS"
    assert wait_until_completed(setup.client, f"{path}/status").get("error") is None


def check_result_rows(setup: Setup) -> None:
    """Check that an answer that contains its image waits for the room that its row needs."""
    path = setup.submit_blocked(sync_mode=True)
    with setup.full(3):
        with setup.wait_for_another(POSTPROCESSOR_RETRIES):
            setup.gate.release(1)
        assert setup.client.get(f"{path}/status").json()["status"] == "IN_PROGRESS"
    assert wait_until_completed(setup.client, f"{path}/status").get("error") is None


def check_file_names(setup: Setup) -> None:
    """Check a disk with room for bytes but for no further file."""
    path = setup.submit_blocked()
    setup.disk.fill_inodes()
    with setup.freed():
        assert_disk_full(setup.client.post("/files/upload", content=b"x"))
        assert_disk_full(
            setup.submit("test/copy", image_url=f"data:image/png;base64,{base64.b64encode(IMAGE).decode()}")
        )
        with setup.wait_for_another(POSTPROCESSOR_RETRIES):
            setup.gate.release(1)
    assert wait_until_completed(setup.client, f"{path}/status").get("error") is None


def check_webhooks(setup: Setup) -> None:
    """Check that a delivery that could not be recorded is repeated: delivery is at least once."""
    with setup.freed(), setup.wait_for_another(WEBHOOK_NOT_RECORDED):
        assert setup.submit(query=f"?fal_webhook={setup.receiver.url}").status_code == 200
        assert setup.receiver.is_filled.wait(60)
        assert_disk_full(setup.submit())


PHASES: list[Callable[[Setup], None]] = [
    check_submits,
    check_uploads,
    check_inputs,
    check_image_files,
    check_result_rows,
    check_file_names,
    check_webhooks,
]


@pytest.mark.parametrize("number", round_params(1, 20))
def test_a_full_disk(tmp_path: Path, gate: Gate, httpserver: HTTPServer, number: int) -> None:
    """Run all phases on one server in random order. A second server has no room to start; a third has all results."""
    rng = random.Random(number)
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk:
        receiver = Receiver(disk, httpserver.url_for("/hook"))
        httpserver.expect_request("/hook").respond_with_handler(receiver.receive)
        httpserver.expect_request("/in.png").respond_with_data(IMAGE, content_type="image/png")
        settings: dict[str, Any] = {"within": disk.enter_command, "outbound_allow": "127.0.0.0/8", "a1111": "true"}
        with serving(disk.inner_path / "data", TEST_MODELS, **settings) as server, client_of(server) as client:
            setup = Setup(rng, disk, server, client, gate, receiver)
            assert setup.submit().status_code == 200
            for phase in rng.sample(PHASES, len(PHASES)):
                phase(setup)
            assert server.stop() == 0
        # No half-written file remains on the disk.
        assert not list((disk.outer_path / "data").rglob("*.part"))
        disk.fill()
        with serving(disk.inner_path / "data", TEST_MODELS, **settings) as server:
            server.wait_for("The server could not start:\nThe server's disk is full")
            assert server.process.wait(60) == 1
            assert "Traceback" not in server.output
        disk.free()
        with serving(disk.inner_path / "data", TEST_MODELS, **settings) as server, client_of(server) as client:
            assert receiver.is_retried.wait(60)
            for path in setup.accepted:
                assert wait_until_completed(client, f"{path}/status").get("error") is None
                assert client.get(path).status_code == 200
            assert server.stop() == 0
        with open_components(disk.copy("data", tmp_path / "data")) as components:
            assert components.rows("PRAGMA integrity_check") == [("ok",)]
            assert [(name,) for name in components.stored_file_names()] == components.rows(
                "SELECT name FROM files ORDER BY name"
            )
            assert components.rows("SELECT count(*) FROM deliveries") == [(1,)]


def client_of(server: Server) -> httpx.Client:
    """Wait until the server is ready; return a client of the server."""
    return httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False)
