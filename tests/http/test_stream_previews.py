"""What a stream shows of a picture before it is done: small, now and then, the newest only, for streams alone."""

import base64
import io
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image as PILImage
from PIL.Image import Image
from pydantic_core import from_json

from server.api import responses
from server.queue.jobs import Mode
from server.worker.worker import PREVIEWS
from tests.support.components import Parts
from tests.support.fake_models import NullEngine, NullModel, SharingEngine
from tests.support.server_process import TEST_MODELS, Gate, Server, completed, serving, statuses
from tests.unit.worker.test_worker import answer, ready, submitted, worked_off

PREFIX = "data:image/jpeg;base64,"


class PreviewedEngine(SharingEngine):
    """Remembers which steps it was asked to show; shows nothing of the prompt "dark", and fails at "broken"."""

    def __init__(self) -> None:
        self.shown: list[int] = []

    def preview(self, painting: Any) -> Image | None:
        self.shown.append(painting.step)
        if painting.request.prompt == "broken":
            raise RuntimeError("there is no room for the map")
        return None if painting.request.prompt == "dark" else super().preview(painting)


def opened(preview: str) -> Image:
    """The picture in a data URI."""
    assert preview.startswith(PREFIX)
    return PILImage.open(io.BytesIO(base64.b64decode(preview.removeprefix(PREFIX), validate=True)))


@contextmanager
def streaming(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    """The request's own name, and each event as it comes."""
    with client.stream("POST", path, json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        yield response.headers["x-fal-request-id"], (from_json(line.removeprefix("data: ")) for line in lines)


# -- on the wire


def test_a_stream_shows_the_picture_as_it_comes(narrow_client: httpx.Client, gate: Gate) -> None:
    body = {"prompt": str(gate.path), "num_inference_steps": 28, "seed": 200}
    told: list[dict[str, Any]] = []
    with streaming(narrow_client, "/test/gate/stream", body) as (_, events):
        for _ in range(27):
            gate.let(1)
            told.append(next(events))
        gate.let(1)
        *_, output = events
    assert [event["step"] for event in told] == list(range(1, 28))
    assert output["images"] and "preview" not in output
    assert "preview" not in told[0]
    shown = {event["step"]: event["preview"] for event in told if "preview" in event}
    # Each is sent once.
    assert 5 <= len(shown) == len(set(shown.values())) <= PREVIEWS
    for step, preview in shown.items():
        picture = opened(preview)
        assert (picture.format, picture.size) == ("JPEG", (16, 12))
        # The null model paints its step, in a colour that JPEG changes a little.
        red, green, _ = picture.getpixel((8, 6))  # type: ignore[misc]
        assert abs(red - 200) < 8 and abs(green - step * 20 % 256) < 8


def test_where_the_checker_is_enforced_none_is_sent(tmp_path: Path, gate: Gate) -> None:
    """It judges pictures, so nothing that it did not judge leaves."""
    with (
        serving(tmp_path / "data", TEST_MODELS, enforce_safety_checker="true") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        gate.let(28)
        with streaming(client, "/test/gate/stream", {"prompt": str(gate.path)}) as (_, events):
            assert not any("preview" in event for event in events)


def test_a_client_that_reads_slowly_is_shown_the_newest(narrow: Server, gate: Gate) -> None:
    body = {"prompt": str(gate.path), "num_inference_steps": 50}
    transport = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)])
    with (
        httpx.Client(base_url=narrow.url, timeout=60, trust_env=False) as quick,
        httpx.Client(base_url=narrow.url, timeout=60, transport=transport) as slow,
        streaming(slow, "/test/large-previews/stream", body) as (request_id, events),
    ):
        status_url = f"/queue/test/large-previews/requests/{request_id}/status"
        gate.let(40)
        # The worker waits for nobody: forty steps are taken while not one event is read.
        next(status for status in statuses(quick, status_url) if said(status) == "step 40/50")
        seen: list[int] = []
        while not seen or seen[-1] < 40:
            seen.append(next(events)["step"])
        assert seen == sorted(set(seen)) and len(seen) < 20
        gate.let(10)
        assert completed(quick, status_url).get("error") is None
        assert [event["images"] for event in events if "images" in event]


def said(status: dict[str, Any]) -> str | None:
    """The last line of a status's log."""
    return status["logs"][-1]["message"] if status["logs"] else None


# -- how many, and for whom


@pytest.mark.parametrize("num_images", [1, 4])
@pytest.mark.parametrize("num_inference_steps", [2, 4, 10, 11, 19, 28, 50])
def test_a_stream_is_shown_a_few(parts: Parts, num_inference_steps: int, num_images: int) -> None:
    engine = PreviewedEngine()
    worker = ready(parts, NullModel("test/null", lambda: engine))
    job = submitted(parts, mode=Mode.STREAM, num_inference_steps=num_inference_steps, num_images=num_images)
    worked_off(worker)
    assert answer(parts, job)[0].status == 200
    num_steps = num_inference_steps * num_images
    assert 0 < len(engine.shown) <= PREVIEWS
    # At equal distances, and never of the last step, which the picture itself follows.
    assert engine.shown == list(range(engine.shown[0], num_steps, engine.shown[0]))


@pytest.mark.parametrize("mode", [Mode.QUEUE, Mode.RUN, Mode.REALTIME])
def test_nobody_else_pays_for_previews(parts: Parts, mode: Mode) -> None:
    engine = PreviewedEngine()
    worker, job = ready(parts, NullModel("test/null", lambda: engine)), submitted(parts, mode=mode)
    beside = submitted(parts, mode=Mode.STREAM, num_inference_steps=1)
    worked_off(worker)
    assert (engine.shown, job.preview, beside.preview) == ([], None, None)


def test_one_that_shared_the_forward_is_shown_too(parts: Parts) -> None:
    engine = PreviewedEngine()
    worker = ready(parts, NullModel("test/null", lambda: engine))
    jobs = [submitted(parts, mode=mode, num_inference_steps=4) for mode in (Mode.QUEUE, Mode.STREAM)]
    worker.run_once()
    assert [job.step for job in jobs] == [1, 1]
    assert [job.preview is None for job in jobs] == [True, False]


# -- events


def test_the_newest_takes_the_place_of_the_one_before(parts: Parts) -> None:
    worker = ready(parts, NullModel("test/null", PreviewedEngine))
    job = submitted(parts, mode=Mode.STREAM, num_inference_steps=8)
    seen = []
    for _ in range(7):
        worker.run_once()
        seen.append(responses.progress_event(job)["preview"])
    assert len(set(seen)) == 7
    assert responses.progress_event(job) == {
        "type": "progress",
        "step": 7,
        "num_inference_steps": 8,
        "preview": seen[-1],
    }


@pytest.mark.parametrize("prompt", ["dark", "broken"])
def test_without_a_preview_the_picture_is_none_the_worse(parts: Parts, prompt: str) -> None:
    worker = ready(parts, NullModel("test/null", PreviewedEngine))
    job = submitted(parts, mode=Mode.STREAM, prompt=prompt, num_inference_steps=4)
    other = submitted(parts, mode=Mode.STREAM, num_inference_steps=4)
    worker.run_once()
    assert responses.progress_event(job) == {"type": "progress", "step": 1, "num_inference_steps": 4}
    worked_off(worker)
    assert [answer(parts, each)[0].status for each in (job, other)] == [200, 200]


def test_a_restart_begins_without_a_preview(parts: Parts) -> None:
    worker = ready(parts, NullModel("test/null", NullEngine))
    job = submitted(parts, mode=Mode.STREAM, num_inference_steps=8)
    worker.run_once()
    assert job.preview
    parts.queue.release(job)
    assert responses.progress_event(job) == {"type": "progress", "step": 0, "num_inference_steps": 0}
