"""The disk is full in each phase of a request's life: 507 in JSON, never a 500, and all goes on when there is room."""

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

from tests.support.components import opened
from tests.support.hostile_images import encoded, noise
from tests.support.repeats import rounds
from tests.support.server_process import TEST_MODELS, Gate, Server, completed, in_progress, serving
from tests.support.small_disk import SmallDisk, small_disk

SIZE = 8 * 2**20
PAGE = 4096
#: Its picture takes five pages of the disk, and in an answer more.
LARGE: dict[str, Any] = {"image_size": {"width": 1024, "height": 1024}, "num_inference_steps": 1}
PICTURE = encoded(noise(256, 256))
FINISHER, WEBHOOK = (
    "trying again every second [server.worker.postprocessor]",
    "a webhook's attempt could not be recorded",
)


@dataclass
class Receiver:
    """Where webhooks go: the first one fills the disk, so that its delivery cannot be written down."""

    disk: SmallDisk
    url: str
    is_filled: threading.Event = field(default_factory=threading.Event)
    has_come_again: threading.Event = field(default_factory=threading.Event)

    def hear(self, request: Request) -> Response:
        """One delivery."""
        if self.is_filled.is_set():
            self.has_come_again.set()
        else:
            self.disk.fill()
            self.is_filled.set()
        return Response()


@dataclass
class Scene:
    """A server on a small disk, and those who use both."""

    rng: random.Random
    disk: SmallDisk
    server: Server
    client: httpx.Client
    gate: Gate
    receiver: Receiver
    #: The paths of what was accepted.
    accepted: list[str] = field(default_factory=list)

    @contextmanager
    def full(self, pages: int) -> Iterator[None]:
        """While the block lasts nothing fits but a few pages; after it, everything goes on at once."""
        self.disk.fill(self.rng.randint(0, pages) * PAGE)
        with self.freed():
            yield

    @contextmanager
    def freed(self) -> Iterator[None]:
        """There is room again after the block; a further request wakes who waits for it."""
        yield
        self.disk.free()
        assert self.client.post("/test/null", json={"prompt": "x"}).status_code == 200

    def submit(self, endpoint: str = "test/null", query: str = "", **fields: Any) -> httpx.Response:
        """Ask for a picture; what is accepted must come."""
        answer = self.client.post(f"/queue/{endpoint}{query}", json={"prompt": "x", **fields})
        if answer.status_code == 200:
            self.accepted.append(httpx.URL(answer.json()["response_url"]).path)
        return answer

    def held(self, **fields: Any) -> str:
        """A request that stands at the gate before its only step; its path."""
        assert self.submit("test/gate", prompt=str(self.gate.path), **LARGE, **fields).status_code == 200
        in_progress(self.client, f"{self.accepted[-1]}/status")
        return self.accepted[-1]

    @contextmanager
    def waits_for(self, words: str) -> Iterator[None]:
        """Whatever the block does makes the server say this once more."""
        times = self.server.output.count(words) + 1
        yield
        self.server.wait_for("(?s)" + ".*".join([re.escape(words)] * times))


def refused(answer: httpx.Response) -> None:
    """As it is said that there is no room."""
    assert (answer.status_code, answer.headers["content-type"]) == (507, "application/json"), answer.text
    assert answer.json()["detail"] == "The disk of the server is full"


def submit(scene: Scene) -> None:
    """Requests are accepted as long as there is room for them; everything else is answered all the same."""
    with scene.full(16):
        while (answer := scene.submit()).status_code == 200:
            continue
        refused(answer)
        refused(scene.client.post("/test/null", json={"prompt": "x"}))
        pages = ["/health", "/metrics", "/status.json", scene.accepted[0], f"{scene.accepted[-1]}/status"]
        assert {scene.client.get(page).status_code for page in pages} <= {200, 202, 400}


def upload(scene: Scene) -> None:
    """In one request and in two; the second can be sent again."""
    content = scene.rng.randbytes(200_000)
    announced = {"content_type": "text/plain", "file_name": "hello.txt"}
    begun = scene.client.post("/storage/upload/initiate", json=announced).json()
    with scene.full(40):
        refused(scene.client.post("/files/upload", content=content))
        refused(scene.client.put(begun["upload_url"], content=content))
    assert scene.client.put(begun["upload_url"], content=content).status_code == 200
    assert scene.client.get(begun["file_url"]).content == content


def brought(scene: Scene) -> None:
    """A picture that a request brings along: within it, or by address."""
    address = scene.receiver.url.replace("/hook", "/in.png")
    within = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
    with scene.full(30):
        for url in (within, address):
            refused(scene.submit("test/copy", image_url=url))
    assert [scene.submit("test/copy", image_url=url).status_code for url in (within, address)] == [200, 200]


def picture(scene: Scene) -> None:
    """A painted picture waits for the room that its file needs."""
    path = scene.held()
    with scene.full(3):
        with scene.waits_for(FINISHER):
            scene.gate.let(1)
        assert scene.client.get(f"{path}/status").json()["status"] == "IN_PROGRESS"
    assert completed(scene.client, f"{path}/status").get("error") is None


def row(scene: Scene) -> None:
    """An answer that holds its picture waits for the room that its row needs."""
    path = scene.held(sync_mode=True)
    with scene.full(3):
        with scene.waits_for(FINISHER):
            scene.gate.let(1)
        assert scene.client.get(f"{path}/status").json()["status"] == "IN_PROGRESS"
    assert completed(scene.client, f"{path}/status").get("error") is None


def names(scene: Scene) -> None:
    """There is room for bytes, but not for one more file."""
    path = scene.held()
    scene.disk.fill_names()
    with scene.freed():
        refused(scene.client.post("/files/upload", content=b"x"))
        refused(scene.submit("test/copy", image_url=f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"))
        with scene.waits_for(FINISHER):
            scene.gate.let(1)
    assert completed(scene.client, f"{path}/status").get("error") is None


def webhook(scene: Scene) -> None:
    """A delivery that could not be written down is made again: at least once."""
    with scene.freed(), scene.waits_for(WEBHOOK):
        assert scene.submit(query=f"?fal_webhook={scene.receiver.url}").status_code == 200
        assert scene.receiver.is_filled.wait(60)
        refused(scene.submit())


PHASES: list[Callable[[Scene], None]] = [submit, upload, brought, picture, row, names, webhook]


@pytest.mark.parametrize("number", rounds(1, 20))
def test_a_full_disk(tmp_path: Path, gate: Gate, httpserver: HTTPServer, number: int) -> None:
    """All phases in the life of one server, in any order; the next cannot start without room; the last finds it all."""
    rng = random.Random(number)
    with small_disk(tmp_path / "disk", SIZE) as disk:
        receiver = Receiver(disk, httpserver.url_for("/hook"))
        httpserver.expect_request("/hook").respond_with_handler(receiver.hear)
        httpserver.expect_request("/in.png").respond_with_data(PICTURE, content_type="image/png")
        settings: dict[str, Any] = {"within": disk.within, "outbound_allow": "127.0.0.0/8"}
        with serving(disk.folder / "data", TEST_MODELS, **settings) as server, client_of(server) as client:
            scene = Scene(rng, disk, server, client, gate, receiver)
            assert scene.submit().status_code == 200
            for phase in rng.sample(PHASES, len(PHASES)):
                phase(scene)
            assert server.stop() == 0
        # Nothing half written takes the room that there was not.
        assert not list((disk.seen / "data").rglob("*.part"))
        disk.fill()
        with serving(disk.folder / "data", TEST_MODELS, **settings) as server:
            server.wait_for("The server could not start:\nThe disk of the server is full")
            assert server.process.wait(60) == 1
            assert "Traceback" not in server.output
        disk.free()
        with serving(disk.folder / "data", TEST_MODELS, **settings) as server, client_of(server) as client:
            assert receiver.has_come_again.wait(60)
            for path in scene.accepted:
                assert completed(client, f"{path}/status").get("error") is None
                assert client.get(path).status_code == 200
            assert server.stop() == 0
        with opened(disk.copy("data", tmp_path / "data")) as parts:
            assert parts.rows("PRAGMA integrity_check") == [("ok",)]
            assert [(name,) for name in parts.on_disk()] == parts.rows("SELECT name FROM files ORDER BY name")
            assert parts.rows("SELECT count(*) FROM deliveries") == [(1,)]


def client_of(server: Server) -> httpx.Client:
    """A client of a server that can paint."""
    return httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False)
