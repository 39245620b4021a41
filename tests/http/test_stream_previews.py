"""Previews in a stream: small images of a few steps, the newest only, and only for requests that stream."""

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
from tests.support.components import Components
from tests.support.fake_models import NullEngine, NullModel, SharingEngine
from tests.support.server_process import TEST_MODELS, Gate, Server, serving, statuses, wait_until_completed
from tests.unit.worker.test_worker import outcome_and_body, ready_worker, run_all, submit

PREFIX = "data:image/jpeg;base64,"


class PreviewedEngine(SharingEngine):
    """Engine that records the steps of which previews are requested.

    The prompt "dark" has no preview; a preview of the prompt "broken" raises an error.
    """

    def __init__(self) -> None:
        self.shown: list[int] = []

    def preview(self, task: Any) -> Image | None:
        self.shown.append(task.step)
        if task.request.prompt == "broken":
            raise RuntimeError("out of memory")
        return None if task.request.prompt == "dark" else super().preview(task)


def decoded(preview: str) -> Image:
    """Decode the image in a data URI."""
    assert preview.startswith(PREFIX)
    return PILImage.open(io.BytesIO(base64.b64decode(preview.removeprefix(PREFIX), validate=True)))


@contextmanager
def streaming(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    """Start a stream; yield its request id, and an iterator over its events."""
    with client.stream("POST", path, json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        yield response.headers["x-fal-request-id"], (from_json(line.removeprefix("data: ")) for line in lines)


# -- on the wire


def test_a_stream_shows_previews(constrained_client: httpx.Client, gate: Gate) -> None:
    body = {"prompt": str(gate.path), "num_inference_steps": 28, "seed": 200}
    progress: list[dict[str, Any]] = []
    with streaming(constrained_client, "/test/gate/stream", body) as (_, events):
        for _ in range(27):
            gate.release(1)
            progress.append(next(events))
        gate.release(1)
        *_, output = events
    assert [event["step"] for event in progress] == list(range(1, 28))
    assert output["images"] and "preview" not in output
    assert "preview" not in progress[0]
    previews = {event["step"]: event["preview"] for event in progress if "preview" in event}
    # Each preview is sent once.
    assert 5 <= len(previews) == len(set(previews.values())) <= PREVIEWS
    for step, preview in previews.items():
        image = decoded(preview)
        assert (image.format, image.size) == ("JPEG", (16, 12))
        # The null model encodes its step in the colour, which JPEG changes a little.
        red, green, _ = image.getpixel((8, 6))  # type: ignore[misc]
        assert abs(red - 200) < 8 and abs(green - step * 20 % 256) < 8


def test_an_enforced_checker_turns_previews_off(tmp_path: Path, gate: Gate) -> None:
    """Send no previews, because the checker judges finished images only."""
    with (
        serving(tmp_path / "data", TEST_MODELS, enforce_safety_checker="true") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        gate.release(28)
        with streaming(client, "/test/gate/stream", {"prompt": str(gate.path)}) as (_, events):
            assert not any("preview" in event for event in events)


def test_a_slow_client_receives_the_newest_preview(constrained_server: Server, gate: Gate) -> None:
    body = {"prompt": str(gate.path), "num_inference_steps": 50}
    transport = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)])
    with (
        httpx.Client(base_url=constrained_server.url, timeout=60, trust_env=False) as fast_client,
        httpx.Client(base_url=constrained_server.url, timeout=60, transport=transport) as slow_client,
        streaming(slow_client, "/test/large-previews/stream", body) as (request_id, events),
    ):
        status_url = f"/queue/test/large-previews/requests/{request_id}/status"
        gate.release(40)
        # The worker waits for no client: it runs forty steps although no event is read.
        next(status for status in statuses(fast_client, status_url) if last_message(status) == "step 40/50")
        seen: list[int] = []
        while not seen or seen[-1] < 40:
            seen.append(next(events)["step"])
        assert seen == sorted(set(seen)) and len(seen) < 20
        gate.release(10)
        assert wait_until_completed(fast_client, status_url).get("error") is None
        assert [event["images"] for event in events if "images" in event]


def last_message(status: dict[str, Any]) -> str | None:
    """Return the last log message of a status, if there is one."""
    return status["logs"][-1]["message"] if status["logs"] else None


# -- how many previews, and for which requests


@pytest.mark.parametrize("num_images", [1, 4])
@pytest.mark.parametrize("num_inference_steps", [2, 4, 10, 11, 19, 28, 50])
def test_a_stream_receives_a_few_previews(components: Components, num_inference_steps: int, num_images: int) -> None:
    engine = PreviewedEngine()
    worker = ready_worker(components, NullModel("test/null", lambda: engine))
    job = submit(components, mode=Mode.STREAM, num_inference_steps=num_inference_steps, num_images=num_images)
    run_all(worker)
    assert outcome_and_body(components, job)[0].status == 200
    num_steps = num_inference_steps * num_images
    assert 0 < len(engine.shown) <= PREVIEWS
    # Previews have equal distances. The last step has none, because the image itself follows.
    assert engine.shown == list(range(engine.shown[0], num_steps, engine.shown[0]))


@pytest.mark.parametrize("mode", [Mode.QUEUE, Mode.RUN, Mode.REALTIME])
def test_only_streams_have_previews(components: Components, mode: Mode) -> None:
    engine = PreviewedEngine()
    worker, job = ready_worker(components, NullModel("test/null", lambda: engine)), submit(components, mode=mode)
    stream = submit(components, mode=Mode.STREAM, num_inference_steps=1)
    run_all(worker)
    assert (engine.shown, job.preview, stream.preview) == ([], None, None)


def test_a_stream_that_shares_a_forward_pass_has_a_preview(components: Components) -> None:
    engine = PreviewedEngine()
    worker = ready_worker(components, NullModel("test/null", lambda: engine))
    jobs = [submit(components, mode=mode, num_inference_steps=4) for mode in (Mode.QUEUE, Mode.STREAM)]
    worker.run_once()
    assert [job.step for job in jobs] == [1, 1]
    assert [job.preview is None for job in jobs] == [True, False]


# -- events


def test_a_new_preview_replaces_the_one_before(components: Components) -> None:
    worker = ready_worker(components, NullModel("test/null", PreviewedEngine))
    job = submit(components, mode=Mode.STREAM, num_inference_steps=8)
    previews = []
    for _ in range(7):
        worker.run_once()
        previews.append(responses.progress_event(job)["preview"])
    assert len(set(previews)) == 7
    assert responses.progress_event(job) == {
        "type": "progress",
        "step": 7,
        "num_inference_steps": 8,
        "preview": previews[-1],
    }


@pytest.mark.parametrize("prompt", ["dark", "broken"])
def test_a_missing_preview_does_not_affect_the_image(components: Components, prompt: str) -> None:
    worker = ready_worker(components, NullModel("test/null", PreviewedEngine))
    job = submit(components, mode=Mode.STREAM, prompt=prompt, num_inference_steps=4)
    other = submit(components, mode=Mode.STREAM, num_inference_steps=4)
    worker.run_once()
    assert responses.progress_event(job) == {"type": "progress", "step": 1, "num_inference_steps": 4}
    run_all(worker)
    assert [outcome_and_body(components, each)[0].status for each in (job, other)] == [200, 200]


def test_a_restart_begins_without_a_preview(components: Components) -> None:
    worker = ready_worker(components, NullModel("test/null", NullEngine))
    job = submit(components, mode=Mode.STREAM, num_inference_steps=8)
    worker.run_once()
    assert job.preview
    components.queue.release(job)
    assert responses.progress_event(job) == {"type": "progress", "step": 0, "num_inference_steps": 0}
