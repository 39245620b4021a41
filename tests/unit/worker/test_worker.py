"""The worker, turn by turn; models without weights, everything else real."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image as PILImage
from PIL.Image import Image

from models.base import NO_INPUTS, Engine, EngineConfig, GenerationFailed
from server.errors import DiskFull
from server.queue.jobs import Job, Mode, Outcome, Priority, State
from server.queue.notifier import WORKER
from server.settings import Settings
from server.storage.file_store import Lifecycle
from server.worker.worker import Worker
from tests.support.components import Clock, Parts, full_disk, opened, reached, submission
from tests.support.fake_models import GateEngine, NullEngine, NullModel, NullTask, RaisesEngine, UnsafeEngine
from tests.support.server_process import Gate, completed, serving

ENGINES: dict[str, type[NullEngine]] = {
    "test/null": NullEngine,
    "test/raises": RaisesEngine,
    "test/unsafe": UnsafeEngine,
    "test/gate": GateEngine,
}
SMALL: dict[str, Any] = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 2, "output_format": "png"}
#: An output that needs pages of its own in the database, because it repeats the prompt.
LONG: dict[str, Any] = {**SMALL, "prompt": "x" * 20_000}


def worker_of(parts: Parts, *models: NullModel, **settings: Any) -> Worker:
    """A worker that was not set up yet."""
    served = {model.endpoint: model for model in models or [NullModel(*item) for item in ENGINES.items()]}
    placements = {endpoint: EngineConfig(None, "") for endpoint in served}
    chosen = Settings(data_dir=parts.folder, **settings)
    return Worker(chosen, served, placements, parts.queue, parts.files, parts.inputs.cache.path, parts.notifier)


def ready(parts: Parts, *models: NullModel, **settings: Any) -> Worker:
    """A worker whose turns the test takes itself."""
    worker = worker_of(parts, *models, **settings)
    worker.setup()
    return worker


def submitted(
    parts: Parts,
    endpoint: str = "test/null",
    *,
    mode: Mode = Mode.QUEUE,
    owner: str = "me",
    priority: Priority = Priority.NORMAL,
    **fields: Any,
) -> Job:
    """A small request."""
    fields = {**SMALL, **fields}
    return parts.queue.submit(submission(endpoint, mode=mode, owner=owner, priority=priority, fields=fields))


def worked_off(worker: Worker) -> None:
    """Take turns until nothing is left to do."""
    while worker.run_once():
        continue


def wait_until(parts: Parts, job: Job, is_reached: Callable[[], bool]) -> None:
    """Wait for what the worker's threads do to a job, or for their end."""

    async def heard() -> None:
        parts.notifier.bind_loop(asyncio.get_running_loop())
        with parts.notifier.subscribe(job.request_id, WORKER) as bell:
            while not is_reached():
                bell.clear()
                # Read again: it may have rung between the look and the clearing.
                if not is_reached():
                    await bell.wait()

    asyncio.run(heard())


def answer(parts: Parts, job: Job) -> tuple[Outcome, dict[str, Any]]:
    """How a job ended, and its body."""
    outcome = parts.queue.result(job)
    return outcome, json.loads(outcome.body)


def told(parts: Parts, job: Job) -> tuple[int, str, str | None]:
    """Status, text and type of the error a job ended with."""
    outcome, body = answer(parts, job)
    return outcome.status, body["detail"], body.get("error_type")


def pictures(parts: Parts, job: Job) -> list[Image]:
    """The pictures of an answer, from the disk or out of their data URIs."""
    _, body = answer(parts, job)
    return [PILImage.open(io.BytesIO(_content(parts, image["url"]))).convert("RGB") for image in body["images"]]


def _content(parts: Parts, url: str) -> bytes:
    if url.startswith("data:"):
        return base64.b64decode(url.partition(",")[2])
    found = parts.files.find(url.removeprefix("http://here/files/"))
    assert found
    return parts.files.path(found).read_bytes()


# -- painting


def test_a_turn_without_work_says_so(parts: Parts) -> None:
    assert not ready(parts).run_once()


def test_a_job_is_painted_step_by_step(parts: Parts) -> None:
    worker, job = ready(parts), submitted(parts)
    assert worker.run_once()
    assert (job.state, job.attempt, job.step, job.num_steps) == (State.IN_PROGRESS, 1, 1, 2)
    assert worker.run_once()
    assert (job.state, job.step, parts.on_disk()) == (State.IN_PROGRESS, 2, [])
    # Decoded in a turn of its own, so that others may be stepped beside.
    assert worker.run_once()
    assert (job.state, job.step, job.acceleration) == (State.COMPLETED, 2, "none")
    assert [line["message"] for line in job.logs] == ["step 1/2", "step 2/2"]
    assert not worker.run_once()


def test_the_answer_is_the_models_output(parts: Parts) -> None:
    worker, job = ready(parts), submitted(parts, prompt="a tiger", seed=7)
    worked_off(worker)
    outcome, body = answer(parts, job)
    assert (outcome.status, outcome.error) == (200, None)
    assert (body["seed"], body["prompt"], body["has_nsfw_concepts"]) == (7, "a tiger", [False])
    assert body["timings"] == {"inference": outcome.inference_time}
    (image,) = body["images"]
    assert (image["width"], image["height"], image["content_type"]) == (64, 64, "image/png")
    assert image["url"] == f"http://here/files/{parts.on_disk()[0]}"


def test_seconds_are_those_of_the_steps_and_of_the_decoding(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.0)
    monkeypatch.setattr("time.perf_counter", clock)

    class Slow(NullEngine):
        def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
            clock.now += 1
            return super().advance(painting, others)

        def decode(self, painting: Any) -> None:
            clock.now += 10
            super().decode(painting)

        def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
            clock.now += 100
            return super().is_unsafe(pictures)

    worker = ready(parts, NullModel("test/null", Slow))
    jobs = [submitted(parts, num_inference_steps=3, num_images=2) for _ in range(2)]
    worked_off(worker)
    assert [answer(parts, job)[0].inference_time for job in jobs] == [2 * (3 + 10)] * 2


def test_picture_k_has_seed_plus_k_in_pixels_and_parameters(parts: Parts) -> None:
    worker, job = ready(parts), submitted(parts, seed=7, num_images=3)
    worked_off(worker)
    assert [picture.getpixel((0, 0)) for picture in pictures(parts, job)] == [(7 + k, 128, 64) for k in range(3)]
    _, body = answer(parts, job)
    contents = [_content(parts, image["url"]) for image in body["images"]]
    found = [json.loads(PILImage.open(io.BytesIO(content)).info["parameters"]) for content in contents]
    assert [parameters["seed"] for parameters in found] == [7, 8, 9]
    assert found[0]["num_inference_steps"] == 2


def test_parameters_can_be_left_out(parts: Parts) -> None:
    worker, job = ready(parts, embed_parameters=False), submitted(parts, prompt="a secret wish")
    worked_off(worker)
    assert job.state == State.COMPLETED
    (name,) = parts.on_disk()
    content = (parts.folder / "files" / name).read_bytes()
    assert b"AI generated" in content
    assert b"secret wish" not in content and b"num_inference_steps" not in content


def test_sync_mode_gives_the_picture_itself_and_keeps_no_file(parts: Parts) -> None:
    worker, job = ready(parts), submitted(parts, sync_mode=True, seed=9)
    worked_off(worker)
    assert answer(parts, job)[1]["images"][0]["url"].startswith("data:image/png;base64,")
    assert pictures(parts, job)[0].getpixel((0, 0)) == (9, 128, 64)
    assert parts.on_disk() == []


def test_the_same_request_gives_the_same_bytes(parts: Parts) -> None:
    worker = ready(parts)
    jobs = [submitted(parts, output_format="jpeg", seed=9) for _ in range(2)]
    worked_off(worker)
    first, second = (_content(parts, answer(parts, job)[1]["images"][0]["url"]) for job in jobs)
    assert first == second


def test_files_belong_to_the_client_and_expire_when_it_said(parts: Parts) -> None:
    worker = ready(parts)
    parts.queue.submit(submission(fields=SMALL, owner="alice", lifecycle=Lifecycle(60.0, is_private=True)))
    worked_off(worker)
    found = parts.rows("SELECT owner, is_private, created_at, expires_at FROM files")
    assert found == [("alice", 1, parts.clock.now, parts.clock.now + 60)]


# -- taking turns


def test_turns_go_to_whom_least_remains(parts: Parts) -> None:
    worker = ready(parts)
    first = submitted(parts, num_inference_steps=5)
    for _ in range(2):
        worker.run_once()
    second = submitted(parts, num_inference_steps=2)
    steps = []
    for _ in range(6):
        worker.run_once()
        steps.append((first.step, second.step))
    # The fourth turn decodes.
    assert steps == [(2, 1), (2, 2), (2, 2), (3, 2), (4, 2), (5, 2)]


def test_a_picture_that_finds_no_room_is_kept_until_there_is(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = ready(parts)
    job = submitted(parts, num_inference_steps=1)
    worker.run_once()
    save = parts.files.create
    monkeypatch.setattr(parts.files, "create", lambda *_: (_ for _ in ()).throw(DiskFull()))
    with pytest.raises(DiskFull):
        worker.run_once()
    assert job.state == State.IN_PROGRESS
    monkeypatch.setattr(parts.files, "create", save)
    worker.run_once()
    assert (job.state, job.error) == (State.COMPLETED, None)


def test_normal_priority_goes_before_low(parts: Parts) -> None:
    worker = ready(parts)
    low = parts.queue.submit(submission(fields=SMALL, priority=Priority.LOW))
    worker.run_once()
    normal = submitted(parts)
    for _ in range(3):
        worker.run_once()
    assert (normal.state, low.state, low.step) == (State.COMPLETED, State.IN_PROGRESS, 1)


def test_no_more_run_than_the_setting_says(parts: Parts) -> None:
    worker = ready(parts, max_running=2)
    jobs = [submitted(parts) for _ in range(3)]
    worker.run_once()
    assert [job.state for job in jobs] == [State.IN_PROGRESS, State.IN_PROGRESS, State.IN_QUEUE]
    worked_off(worker)
    assert {job.state for job in jobs} == {State.COMPLETED}


# -- cancelling


def test_cancel_takes_effect_before_the_next_step(parts: Parts) -> None:
    worker, job = ready(parts), submitted(parts, num_inference_steps=5)
    worker.run_once()
    worker.run_once()
    parts.queue.cancel(job)
    worker.run_once()
    assert (job.state, job.step) == (State.COMPLETED, 2)
    outcome, body = answer(parts, job)
    assert (outcome.status, body["error_type"]) == (499, "client_cancelled")


def test_the_cancelled_goes_before_all_others(parts: Parts) -> None:
    worker, other = ready(parts), submitted(parts)
    job = submitted(parts)
    worker.run_once()
    parts.queue.cancel(job)
    worker.run_once()
    assert (job.state, other.step) == (State.COMPLETED, 1)


def test_a_run_whose_client_left_ends_as_disconnected(parts: Parts) -> None:
    worker, job = ready(parts), submitted(parts, mode=Mode.RUN)
    worker.run_once()
    parts.queue.cancel(job)
    worked_off(worker)
    assert (answer(parts, job)[0].error_type, parts.on_disk()) == ("client_disconnected", [])


def test_files_are_removed_when_a_cancel_came_while_they_were_saved(parts: Parts) -> None:
    class CancelledWhileChecked(NullEngine):
        def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
            parts.queue.cancel(job)
            return super().is_unsafe(pictures)

    worker = ready(parts, NullModel("test/null", CancelledWhileChecked))
    job = submitted(parts, num_images=2)
    worked_off(worker)
    assert (answer(parts, job)[0].status, parts.on_disk()) == (499, [])


# -- errors


def test_an_error_meant_for_the_client_is_told(parts: Parts) -> None:
    worker, job = ready(parts), submitted(parts, "test/raises", prompt="told")
    worked_off(worker)
    assert told(parts, job) == (500, "This cannot be painted.", "internal_error")


def test_any_other_error_keeps_its_secret(parts: Parts) -> None:
    worker, job = ready(parts), submitted(parts, "test/raises", prompt="x")
    worked_off(worker)
    assert told(parts, job) == (500, "Internal Server Error", "internal_error")
    assert "secret" not in str(parts.rows("SELECT * FROM jobs"))


def test_one_that_fails_harms_no_other(parts: Parts) -> None:
    worker, bad, good = ready(parts), submitted(parts, "test/raises"), submitted(parts)
    worked_off(worker)
    assert [answer(parts, job)[0].status for job in (bad, good)] == [500, 200]


def test_an_endpoint_that_is_gone_is_not_found(parts: Parts) -> None:
    worker, job = ready(parts), submitted(parts, "test/gone")
    worked_off(worker)
    assert told(parts, job) == (404, "test/gone is no longer served here", None)


def test_an_endpoint_that_is_gone_after_a_restart_is_not_found(tmp_path: Path) -> None:
    with opened(tmp_path) as parts:
        worker, job = ready(parts), submitted(parts, "test/raises")
        worker.run_once()
    with opened(tmp_path) as parts:
        parts.queue.recover()
        worked_off(ready(parts, NullModel("test/null", NullEngine)))
        assert answer(parts, job)[0].status == 404


def test_input_that_is_no_longer_understood_fails_alone(parts: Parts) -> None:
    worker = ready(parts)
    job = parts.queue.submit(submission(input='{"prompt": 5, "seed": 7}'))
    good = submitted(parts)
    worked_off(worker)
    assert told(parts, job) == (500, "Internal Server Error", "internal_error")
    assert answer(parts, good)[0].status == 200


def test_an_answer_that_cannot_be_given_leaves_no_files(parts: Parts) -> None:
    class Speechless(NullModel):
        def build_output(self, *given: Any) -> Any:
            raise GenerationFailed("There are no words for it.")

    worker = ready(parts, Speechless("test/null", NullEngine))
    job = submitted(parts, num_images=2)
    worked_off(worker)
    assert (answer(parts, job)[0].status, parts.on_disk()) == (500, [])


# -- safety


def test_flagged_pictures_are_black(parts: Parts) -> None:
    worker, job = ready(parts), submitted(parts, "test/unsafe", prompt="x", num_images=2)
    worked_off(worker)
    assert answer(parts, job)[1]["has_nsfw_concepts"] == [True, True]
    assert [picture.getextrema() for picture in pictures(parts, job)] == [((0, 0), (0, 0), (0, 0))] * 2


def test_only_the_flagged_picture_is_black(parts: Parts) -> None:
    class SecondIsUnsafe(NullEngine):
        def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
            return [False, True]

    worker = ready(parts, NullModel("test/null", SecondIsUnsafe))
    job = submitted(parts, num_images=2, seed=7)
    worked_off(worker)
    assert answer(parts, job)[1]["has_nsfw_concepts"] == [False, True]
    assert [picture.getpixel((0, 0)) for picture in pictures(parts, job)] == [(7, 128, 64), (0, 0, 0)]


@pytest.mark.parametrize("prompt", ["silent", "raises"])
def test_a_checker_that_does_not_answer_lets_nothing_out(parts: Parts, prompt: str) -> None:
    worker, job = ready(parts), submitted(parts, "test/unsafe", prompt=prompt)
    worked_off(worker)
    outcome, body = answer(parts, job)
    assert (outcome.status, parts.on_disk()) == (500, [])
    assert body["detail"].startswith("The safety checker")


@pytest.mark.parametrize(("is_enforced", "flags"), [(False, [False]), (True, [True])])
def test_the_operator_can_enforce_the_checker(parts: Parts, is_enforced: bool, flags: list[bool]) -> None:
    worker = ready(parts, enforce_safety_checker=is_enforced)
    job = submitted(parts, "test/unsafe", prompt="x", enable_safety_checker=False)
    worked_off(worker)
    assert answer(parts, job)[1]["has_nsfw_concepts"] == flags


# -- the disk is full


def test_a_result_waits_for_room_on_the_disk(parts: Parts) -> None:
    worker, job = ready(parts), submitted(parts, **LONG)
    worker.run_once()
    worker.run_once()
    with full_disk(parts):
        for _ in range(2):
            with pytest.raises(DiskFull):
                worker.run_once()
        assert (job.state, len(parts.on_disk())) == (State.IN_PROGRESS, 1)
    worked_off(worker)
    assert answer(parts, job)[0].status == 200
    assert parts.rows("SELECT name FROM files") == [(name,) for name in parts.on_disk()]


def test_a_result_that_is_cancelled_while_it_waits_for_room_leaves_no_files(parts: Parts) -> None:
    worker, job = ready(parts), submitted(parts, **LONG)
    worker.run_once()
    worker.run_once()
    with full_disk(parts), pytest.raises(DiskFull):
        worker.run_once()
    parts.queue.cancel(job)
    worked_off(worker)
    assert (answer(parts, job)[0].status, parts.on_disk()) == (499, [])


def test_a_job_that_cannot_begin_ends_when_there_is_room(parts: Parts) -> None:
    class Wordy(NullEngine):
        def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
            raise GenerationFailed("no" * 20_000)

    worker, job = ready(parts, NullModel("test/null", Wordy)), submitted(parts)
    with full_disk(parts), pytest.raises(DiskFull):
        worker.run_once()
    worked_off(worker)
    assert (job.state, job.error_type) == (State.COMPLETED, "internal_error")


# -- the thread


def test_the_thread_paints_until_it_is_stopped(parts: Parts) -> None:
    worker, job = worker_of(parts), submitted(parts)

    async def paint() -> Job:
        worker.start()
        await reached(parts, job, State.COMPLETED)
        # Woken again, after it had nothing to do.
        later = submitted(parts)
        await reached(parts, later, State.COMPLETED)
        return later

    later = asyncio.run(paint())
    assert worker.is_ready
    worker.stop()
    assert (worker.is_ready, worker.failure) == (False, None)
    assert [answer(parts, done)[0].status for done in (job, later)] == [200, 200]
    waiting = submitted(parts)
    assert waiting.state == State.IN_QUEUE


def stopped(parts: Parts, worker: Worker, once_it_knows: Callable[[], None]) -> None:
    """Stop a worker on its threads, and let go what it is at as soon as it knows."""
    ring = parts.notifier.work_available.set
    stopper = threading.Thread(target=worker.stop, daemon=True)

    def ring_and_let_go() -> None:
        ring()
        if threading.current_thread() is stopper:
            once_it_knows()

    parts.notifier.work_available.set = ring_and_let_go  # type: ignore[method-assign]
    stopper.start()
    stopper.join(60)
    assert not stopper.is_alive()


def stop_between_steps(parts: Parts, worker: Worker, gate: Gate, *jobs: Job, is_cancelled: bool = False) -> None:
    """Stop a worker in the middle of its second step, and let it take the step only when it knows."""
    worker.start()
    gate.let(1)
    wait_until(parts, jobs[0], lambda: jobs[0].step == 1)
    if is_cancelled:
        parts.queue.cancel(jobs[0])
    stopped(parts, worker, gate.open)


def test_a_stop_gives_back_what_is_not_done(parts: Parts, gate: Gate) -> None:
    worker = worker_of(parts, shutdown_grace=0)
    jobs = [submitted(parts, "test/gate", prompt=str(gate.path), num_inference_steps=5) for _ in range(2)]
    stop_between_steps(parts, worker, gate, *jobs)
    assert worker.failure is None
    assert [(job.state, job.attempt, parts.queue.position(job)) for job in jobs] == [
        (State.IN_QUEUE, 1, 0),
        (State.IN_QUEUE, 1, 1),
    ]


def test_a_stop_ends_what_was_cancelled(parts: Parts, gate: Gate) -> None:
    worker = worker_of(parts, shutdown_grace=0)
    jobs = [submitted(parts, "test/gate", prompt=str(gate.path), num_inference_steps=5) for _ in range(2)]
    stop_between_steps(parts, worker, gate, *jobs, is_cancelled=True)
    assert worker.failure is None
    assert [job.state for job in jobs] == [State.COMPLETED, State.IN_QUEUE]
    assert answer(parts, jobs[0])[0].error_type == "client_cancelled"


def test_a_stop_lets_what_runs_finish_within_the_grace(parts: Parts, gate: Gate) -> None:
    worker = worker_of(parts, shutdown_grace=60, max_running=1)
    job = submitted(parts, "test/gate", prompt=str(gate.path))
    waiting = submitted(parts)
    stop_between_steps(parts, worker, gate, job)
    assert (answer(parts, job)[0].status, waiting.state, waiting.attempt) == (200, State.IN_QUEUE, 0)


def test_weights_that_do_not_load_end_the_worker_and_ring(parts: Parts) -> None:
    class Broken(NullModel):
        def setup(self, placement: EngineConfig) -> Engine:  # type: ignore[override]
            raise OSError("no weights here")

    worker = worker_of(parts, Broken("test/null", NullEngine))

    async def ended() -> None:
        parts.notifier.bind_loop(asyncio.get_running_loop())
        with parts.notifier.subscribe(WORKER) as bell:
            worker.start()
            await bell.wait()

    asyncio.run(ended())
    assert isinstance(worker.failure, OSError)
    assert not worker.is_ready
    worker.stop()


# -- warm-up, beside the requests


class ColdEngine(NullEngine):
    """Three tiers to make ready: the first takes until it is let go, the second cannot be made ready at all."""

    def __init__(self, told: list[str]) -> None:
        self.told, self.num_tried = told, 0
        self.is_warming, self.may_go_on, self.is_settled = threading.Event(), threading.Event(), threading.Event()

    def warm_up(self) -> bool:
        self.told.append(threading.current_thread().name)
        self.num_tried += 1
        if self.num_tried == 1:
            self.is_warming.set()
            assert self.may_go_on.wait(60)
        if self.num_tried == 2:
            raise RuntimeError("this card has no such kernel")
        return self.num_tried <= 3

    def freeze_compilation(self) -> None:
        self.told.append("settled")
        self.is_settled.set()


def test_warm_up_keeps_nobody_waiting_and_its_failure_harms_nobody(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    cold, last = ColdEngine(told), ColdEngine(told)
    worker = worker_of(parts, NullModel("test/null", lambda: cold), NullModel("test/other", lambda: last))

    def painted_by(endpoint: str) -> None:
        job = submitted(parts, endpoint)
        asyncio.run(reached(parts, job, State.COMPLETED))
        assert answer(parts, job)[0].status == 200

    worker.start()
    assert cold.is_warming.wait(60)
    assert worker.is_ready
    painted_by("test/null")
    painted_by("test/other")
    cold.may_go_on.set()
    # The next tier and the next endpoint have their turn, also after one that failed.
    assert last.is_warming.wait(60)
    assert told == ["warm-up"] * (4 + 1)
    painted_by("test/null")
    last.may_go_on.set()
    assert last.is_settled.wait(60)
    painted_by("test/other")
    worker.stop()
    assert worker.failure is None
    # Nothing is settled before all is warm.
    assert told == ["warm-up"] * (4 + 4) + ["settled"] * 2
    assert "test/null: a tier could not be made ready" in caplog.text
    assert "this card has no such kernel" in caplog.text


# -- what is said while the weights are loaded


def test_ready_says_how_far_loading_has_come(tmp_path: Path, gate: Gate) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    lines = (
        "from tests.support.fake_models import LoadingModel",
        f"MODEL = LoadingModel('test/loading', {str(gate.path)!r})",
    )
    (folder / "loading.py").write_text("\n".join(lines), encoding="utf-8")
    with (
        serving(tmp_path / "data", "test/loading=demo", models_dir=str(folder)) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        server.wait_for("loading transformer, 1.0 of 4.0 GB loaded")
        answer = client.get("/health/ready")
        body = answer.json()
        assert (answer.status_code, body.pop("status"), bool(body.pop("version"))) == (503, "loading", True)
        assert body == {"component": "transformer", "loaded_bytes": 1_000_000_000, "total_bytes": 4_000_000_000}
        waiting = client.post("/queue/test/loading", json=SMALL | {"prompt": "x"}).json()
        assert waiting["status"] == "IN_QUEUE"
        gate.let(1)
        assert completed(client, waiting["status_url"]).get("error") is None
        answer = client.get("/health/ready")
        assert (answer.status_code, set(answer.json())) == (200, {"status", "version"})
        assert server.stop() == 0


# -- out of memory


def test_out_of_memory_is_told_and_may_be_tried_again(narrow_client: httpx.Client) -> None:
    answer = narrow_client.post("/test/memory", json={"prompt": "x"})
    assert (answer.status_code, answer.headers["x-fal-retryable"]) == (500, "true")
    assert answer.json() == {
        "detail": "Out of memory: a picture of 512x512 did not fit, also when tried alone.",
        "message": "Out of memory: a picture of 512x512 did not fit, also when tried alone.",
        "error_type": "internal_error",
    }
    assert narrow_client.post("/test/null", json={"prompt": "x"}).status_code == 200
