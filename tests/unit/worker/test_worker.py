"""Tests of the worker, one iteration at a time, with models without weights. Everything else is real."""

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
from tests.support.components import Clock, Components, full_disk, open_components, submission, wait_for_state
from tests.support.fake_models import GateEngine, NullEngine, NullModel, NullTask, RaisesEngine, UnsafeEngine
from tests.support.server_process import Gate, serving, wait_until_completed

ENGINES: dict[str, type[NullEngine]] = {
    "test/null": NullEngine,
    "test/raises": RaisesEngine,
    "test/unsafe": UnsafeEngine,
    "test/gate": GateEngine,
}
SMALL: dict[str, Any] = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 2, "output_format": "png"}
#: A request whose output needs extra pages in the database, because the output repeats the prompt.
LONG: dict[str, Any] = {**SMALL, "prompt": "x" * 20_000}


def worker_of(components: Components, *models: NullModel, **settings: Any) -> Worker:
    """Return a worker that is not set up yet."""
    models_by_endpoint = {model.endpoint: model for model in models or [NullModel(*item) for item in ENGINES.items()]}
    configs = {endpoint: EngineConfig(None, "") for endpoint in models_by_endpoint}
    worker_settings = Settings(data_dir=components.data_dir, **settings)
    return Worker(
        worker_settings,
        models_by_endpoint,
        configs,
        components.queue,
        components.files,
        components.inputs.cache.path,
        components.notifier,
    )


def ready_worker(components: Components, *models: NullModel, **settings: Any) -> Worker:
    """Return a worker that is set up but not started; the test calls `run_once`."""
    worker = worker_of(components, *models, **settings)
    worker.setup()
    return worker


def submit(
    components: Components,
    endpoint: str = "test/null",
    *,
    mode: Mode = Mode.QUEUE,
    owner: str = "me",
    priority: Priority = Priority.NORMAL,
    **fields: Any,
) -> Job:
    """Submit a small request; return its job."""
    fields = {**SMALL, **fields}
    return components.queue.submit(submission(endpoint, mode=mode, owner=owner, priority=priority, fields=fields))


def run_all(worker: Worker) -> None:
    """Call `run_once` until no work is left."""
    while worker.run_once():
        continue


def wait_until(components: Components, job: Job, is_reached: Callable[[], bool]) -> None:
    """Wait until `is_reached` is true, checking at each notification of the job or the worker."""

    async def wait() -> None:
        components.notifier.bind_loop(asyncio.get_running_loop())
        with components.notifier.subscribe(job.request_id, WORKER) as event:
            while not is_reached():
                event.clear()
                # Check again: a notification may have come between the check and `clear`.
                if not is_reached():
                    await event.wait()

    asyncio.run(wait())


def outcome_and_body(components: Components, job: Job) -> tuple[Outcome, dict[str, Any]]:
    """Return the outcome of a job and its JSON body."""
    outcome = components.queue.result(job)
    return outcome, json.loads(outcome.body)


def error_of(components: Components, job: Job) -> tuple[int, str, str | None]:
    """Return the status, the message and the type of the error of a job."""
    outcome, body = outcome_and_body(components, job)
    return outcome.status, body["detail"], body.get("error_type")


def output_images(components: Components, job: Job) -> list[Image]:
    """Return the images of a result, read from the disk or from their data URIs."""
    _, body = outcome_and_body(components, job)
    return [PILImage.open(io.BytesIO(_content(components, image["url"]))).convert("RGB") for image in body["images"]]


def _content(components: Components, url: str) -> bytes:
    if url.startswith("data:"):
        return base64.b64decode(url.partition(",")[2])
    found = components.files.find(url.removeprefix("http://here/files/"))
    assert found
    return components.files.path(found).read_bytes()


# -- generating


def test_run_once_returns_false_without_work(components: Components) -> None:
    assert not ready_worker(components).run_once()


def test_a_job_advances_one_step_at_a_time(components: Components) -> None:
    worker, job = ready_worker(components), submit(components)
    assert worker.run_once()
    assert (job.state, job.attempt, job.step, job.num_steps) == (State.IN_PROGRESS, 1, 1, 2)
    assert worker.run_once()
    assert (job.state, job.step, components.stored_file_names()) == (State.IN_PROGRESS, 2, [])
    # Decoding is a separate iteration, so that other jobs can advance in the meantime.
    assert worker.run_once()
    assert (job.state, job.step, job.provenance["acceleration"]) == (State.COMPLETED, 2, "none")
    assert [line["message"] for line in job.logs] == ["step 1/2", "step 2/2"]
    assert not worker.run_once()


def test_the_result_is_the_output_of_the_model(components: Components) -> None:
    worker, job = ready_worker(components), submit(components, prompt="a tiger", seed=7)
    run_all(worker)
    outcome, body = outcome_and_body(components, job)
    assert (outcome.status, outcome.error) == (200, None)
    assert (body["seed"], body["prompt"], body["has_nsfw_concepts"]) == (7, "a tiger", [False])
    assert body["timings"] == {"inference": outcome.inference_time}
    (image,) = body["images"]
    assert (image["width"], image["height"], image["content_type"]) == (64, 64, "image/png")
    assert image["url"] == f"http://here/files/{components.stored_file_names()[0]}"


def test_inference_time_counts_steps_and_decoding_but_not_the_safety_check(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(0.0)
    monkeypatch.setattr("time.perf_counter", clock)

    class Slow(NullEngine):
        def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
            clock.now += 1
            return super().advance(task, others)

        def decode(self, task: Any) -> None:
            clock.now += 10
            super().decode(task)

        def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
            clock.now += 100
            return super().is_unsafe(images)

    worker = ready_worker(components, NullModel("test/null", Slow))
    jobs = [submit(components, num_inference_steps=3, num_images=2) for _ in range(2)]
    run_all(worker)
    assert [outcome_and_body(components, job)[0].inference_time for job in jobs] == [2 * (3 + 10)] * 2


def test_image_k_has_seed_plus_k_in_pixels_and_parameters(components: Components) -> None:
    worker, job = ready_worker(components), submit(components, seed=7, num_images=3)
    run_all(worker)
    assert [image.getpixel((0, 0)) for image in output_images(components, job)] == [(7 + k, 128, 64) for k in range(3)]
    _, body = outcome_and_body(components, job)
    contents = [_content(components, image["url"]) for image in body["images"]]
    found = [json.loads(PILImage.open(io.BytesIO(content)).info["parameters"]) for content in contents]
    assert [parameters["seed"] for parameters in found] == [7, 8, 9]
    assert found[0]["num_inference_steps"] == 2


def test_embedding_of_parameters_can_be_disabled(components: Components) -> None:
    worker, job = ready_worker(components, embed_parameters=False), submit(components, prompt="a secret wish")
    run_all(worker)
    assert job.state == State.COMPLETED
    (name,) = components.stored_file_names()
    content = (components.data_dir / "files" / name).read_bytes()
    assert b"AI generated" in content
    assert b"secret wish" not in content and b"num_inference_steps" not in content


def test_sync_mode_returns_the_image_as_a_data_uri_and_stores_no_file(components: Components) -> None:
    worker, job = ready_worker(components), submit(components, sync_mode=True, seed=9)
    run_all(worker)
    assert outcome_and_body(components, job)[1]["images"][0]["url"].startswith("data:image/png;base64,")
    assert output_images(components, job)[0].getpixel((0, 0)) == (9, 128, 64)
    assert components.stored_file_names() == []


def test_the_same_request_gives_the_same_bytes(components: Components) -> None:
    worker = ready_worker(components)
    jobs = [submit(components, output_format="jpeg", seed=9) for _ in range(2)]
    run_all(worker)
    first, second = (_content(components, outcome_and_body(components, job)[1]["images"][0]["url"]) for job in jobs)
    assert first == second


def test_files_have_the_owner_and_the_expiry_of_their_request(components: Components) -> None:
    worker = ready_worker(components)
    components.queue.submit(submission(fields=SMALL, owner="alice", lifecycle=Lifecycle(60.0, is_private=True)))
    run_all(worker)
    found = components.rows("SELECT owner, is_private, created_at, expires_at FROM files")
    assert found == [("alice", 1, components.clock.now, components.clock.now + 60)]


# -- scheduling


def test_the_request_with_the_least_remaining_work_advances(components: Components) -> None:
    worker = ready_worker(components)
    first = submit(components, num_inference_steps=5)
    for _ in range(2):
        worker.run_once()
    second = submit(components, num_inference_steps=2)
    steps = []
    for _ in range(6):
        worker.run_once()
        steps.append((first.step, second.step))
    # The third iteration here decodes the second job.
    assert steps == [(2, 1), (2, 2), (2, 2), (3, 2), (4, 2), (5, 2)]


def test_an_image_is_kept_until_there_is_disk_space(components: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = ready_worker(components)
    job = submit(components, num_inference_steps=1)
    worker.run_once()
    save = components.files.create
    monkeypatch.setattr(components.files, "create", lambda *_: (_ for _ in ()).throw(DiskFull()))
    with pytest.raises(DiskFull):
        worker.run_once()
    assert job.state == State.IN_PROGRESS
    monkeypatch.setattr(components.files, "create", save)
    worker.run_once()
    assert (job.state, job.error) == (State.COMPLETED, None)


def test_normal_priority_goes_before_low(components: Components) -> None:
    worker = ready_worker(components)
    low = components.queue.submit(submission(fields=SMALL, priority=Priority.LOW))
    worker.run_once()
    normal = submit(components)
    for _ in range(3):
        worker.run_once()
    assert (normal.state, low.state, low.step) == (State.COMPLETED, State.IN_PROGRESS, 1)


def test_at_most_max_running_requests_run(components: Components) -> None:
    worker = ready_worker(components, max_running=2)
    jobs = [submit(components) for _ in range(3)]
    worker.run_once()
    assert [job.state for job in jobs] == [State.IN_PROGRESS, State.IN_PROGRESS, State.IN_QUEUE]
    run_all(worker)
    assert {job.state for job in jobs} == {State.COMPLETED}


# -- cancelling


def test_cancel_takes_effect_before_the_next_step(components: Components) -> None:
    worker, job = ready_worker(components), submit(components, num_inference_steps=5)
    worker.run_once()
    worker.run_once()
    components.queue.cancel(job)
    worker.run_once()
    assert (job.state, job.step) == (State.COMPLETED, 2)
    outcome, body = outcome_and_body(components, job)
    assert (outcome.status, body["error_type"]) == (499, "client_cancelled")


def test_a_cancelled_request_is_ended_before_others_advance(components: Components) -> None:
    worker, other = ready_worker(components), submit(components)
    job = submit(components)
    worker.run_once()
    components.queue.cancel(job)
    worker.run_once()
    assert (job.state, other.step) == (State.COMPLETED, 1)


def test_a_run_ends_as_disconnected_after_its_client_disconnects(components: Components) -> None:
    worker, job = ready_worker(components), submit(components, mode=Mode.RUN)
    worker.run_once()
    components.queue.cancel(job)
    run_all(worker)
    assert (outcome_and_body(components, job)[0].error_type, components.stored_file_names()) == (
        "client_disconnected",
        [],
    )


def test_no_file_is_kept_when_the_request_is_cancelled_while_it_is_checked(components: Components) -> None:
    class CancelDuringCheck(NullEngine):
        def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
            components.queue.cancel(job)
            return super().is_unsafe(images)

    worker = ready_worker(components, NullModel("test/null", CancelDuringCheck))
    job = submit(components, num_images=2)
    run_all(worker)
    assert (outcome_and_body(components, job)[0].status, components.stored_file_names()) == (499, [])


# -- errors


def test_an_error_meant_for_the_client_is_reported(components: Components) -> None:
    worker, job = ready_worker(components), submit(components, "test/raises", prompt="told")
    run_all(worker)
    assert error_of(components, job) == (500, "This cannot be painted.", "internal_error")


def test_the_message_of_any_other_error_is_hidden(components: Components) -> None:
    worker, job = ready_worker(components), submit(components, "test/raises", prompt="x")
    run_all(worker)
    assert error_of(components, job) == (500, "Internal Server Error", "internal_error")
    assert "secret" not in str(components.rows("SELECT * FROM jobs"))


def test_a_failed_request_does_not_affect_others(components: Components) -> None:
    worker, bad, good = ready_worker(components), submit(components, "test/raises"), submit(components)
    run_all(worker)
    assert [outcome_and_body(components, job)[0].status for job in (bad, good)] == [500, 200]


def test_an_endpoint_that_is_no_longer_served_is_not_found(components: Components) -> None:
    worker, job = ready_worker(components), submit(components, "test/gone")
    run_all(worker)
    assert error_of(components, job) == (404, "test/gone is no longer served here", None)


def test_an_endpoint_that_is_not_served_after_a_restart_is_not_found(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        worker, job = ready_worker(components), submit(components, "test/raises")
        worker.run_once()
    with open_components(tmp_path) as components:
        components.queue.recover()
        run_all(ready_worker(components, NullModel("test/null", NullEngine)))
        assert outcome_and_body(components, job)[0].status == 404


def test_input_that_is_no_longer_valid_fails_only_its_request(components: Components) -> None:
    worker = ready_worker(components)
    job = components.queue.submit(submission(input='{"prompt": 5, "seed": 7}'))
    good = submit(components)
    run_all(worker)
    assert error_of(components, job) == (500, "Internal Server Error", "internal_error")
    assert outcome_and_body(components, good)[0].status == 200


def test_an_output_that_cannot_be_built_leaves_no_files(components: Components) -> None:
    class BrokenOutputModel(NullModel):
        def build_output(self, *args: Any) -> Any:
            raise GenerationFailed("The output cannot be built.")

    worker = ready_worker(components, BrokenOutputModel("test/null", NullEngine))
    job = submit(components, num_images=2)
    run_all(worker)
    assert (outcome_and_body(components, job)[0].status, components.stored_file_names()) == (500, [])


# -- safety


def test_flagged_images_are_black(components: Components) -> None:
    worker, job = ready_worker(components), submit(components, "test/unsafe", prompt="x", num_images=2)
    run_all(worker)
    assert outcome_and_body(components, job)[1]["has_nsfw_concepts"] == [True, True]
    assert [image.getextrema() for image in output_images(components, job)] == [((0, 0), (0, 0), (0, 0))] * 2


def test_only_the_flagged_image_is_black(components: Components) -> None:
    class SecondIsUnsafe(NullEngine):
        def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
            return [False, True]

    worker = ready_worker(components, NullModel("test/null", SecondIsUnsafe))
    job = submit(components, num_images=2, seed=7)
    run_all(worker)
    assert outcome_and_body(components, job)[1]["has_nsfw_concepts"] == [False, True]
    assert [image.getpixel((0, 0)) for image in output_images(components, job)] == [(7, 128, 64), (0, 0, 0)]


@pytest.mark.parametrize("prompt", ["silent", "raises"])
def test_without_a_safety_verdict_no_image_is_returned(components: Components, prompt: str) -> None:
    worker, job = ready_worker(components), submit(components, "test/unsafe", prompt=prompt)
    run_all(worker)
    outcome, body = outcome_and_body(components, job)
    assert (outcome.status, components.stored_file_names()) == (500, [])
    assert body["detail"].startswith("The safety checker")


@pytest.mark.parametrize(("is_enforced", "flags"), [(False, [False]), (True, [True])])
def test_the_operator_can_enforce_the_checker(components: Components, is_enforced: bool, flags: list[bool]) -> None:
    worker = ready_worker(components, enforce_safety_checker=is_enforced)
    job = submit(components, "test/unsafe", prompt="x", enable_safety_checker=False)
    run_all(worker)
    assert outcome_and_body(components, job)[1]["has_nsfw_concepts"] == flags


# -- the disk is full


def test_a_result_waits_for_disk_space(components: Components) -> None:
    worker, job = ready_worker(components), submit(components, **LONG)
    worker.run_once()
    worker.run_once()
    with full_disk(components):
        for _ in range(2):
            with pytest.raises(DiskFull):
                worker.run_once()
        assert (job.state, len(components.stored_file_names())) == (State.IN_PROGRESS, 1)
    run_all(worker)
    assert outcome_and_body(components, job)[0].status == 200
    assert components.rows("SELECT name FROM files") == [(name,) for name in components.stored_file_names()]


def test_a_request_cancelled_while_it_waits_for_disk_space_leaves_no_files(components: Components) -> None:
    worker, job = ready_worker(components), submit(components, **LONG)
    worker.run_once()
    worker.run_once()
    with full_disk(components), pytest.raises(DiskFull):
        worker.run_once()
    components.queue.cancel(job)
    run_all(worker)
    assert (outcome_and_body(components, job)[0].status, components.stored_file_names()) == (499, [])


def test_a_job_that_cannot_start_ends_when_there_is_disk_space(components: Components) -> None:
    class LongErrorEngine(NullEngine):
        def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
            raise GenerationFailed("no" * 20_000)

    worker, job = ready_worker(components, NullModel("test/null", LongErrorEngine)), submit(components)
    with full_disk(components), pytest.raises(DiskFull):
        worker.run_once()
    run_all(worker)
    assert (job.state, job.error_type) == (State.COMPLETED, "internal_error")


# -- the thread


def test_the_thread_runs_jobs_until_it_is_stopped(components: Components) -> None:
    worker, job = worker_of(components), submit(components)

    async def run_two_jobs() -> Job:
        worker.start()
        await wait_for_state(components, job, State.COMPLETED)
        # The second job wakes the worker after it was idle.
        later = submit(components)
        await wait_for_state(components, later, State.COMPLETED)
        return later

    later = asyncio.run(run_two_jobs())
    assert worker.is_ready
    worker.stop()
    assert (worker.is_ready, worker.failure) == (False, None)
    assert [outcome_and_body(components, job)[0].status for job in (job, later)] == [200, 200]
    waiting = submit(components)
    assert waiting.state == State.IN_QUEUE


def stop_worker(components: Components, worker: Worker, on_stopping: Callable[[], None]) -> None:
    """Stop a running worker. Call `on_stopping` as soon as the worker is notified of the stop."""
    wake = components.notifier.work_available.set
    stopper = threading.Thread(target=worker.stop, daemon=True)

    def wake_and_continue() -> None:
        wake()
        if threading.current_thread() is stopper:
            on_stopping()

    components.notifier.work_available.set = wake_and_continue  # type: ignore[method-assign]
    stopper.start()
    stopper.join(60)
    assert not stopper.is_alive()


def stop_between_steps(
    components: Components, worker: Worker, gate: Gate, *jobs: Job, is_cancelled: bool = False
) -> None:
    """Stop a worker in the middle of its second step, which completes only after the worker is notified."""
    worker.start()
    gate.release(1)
    wait_until(components, jobs[0], lambda: jobs[0].step == 1)
    if is_cancelled:
        components.queue.cancel(jobs[0])
    stop_worker(components, worker, gate.release_all)


def test_a_stop_releases_unfinished_jobs(components: Components, gate: Gate) -> None:
    worker = worker_of(components, shutdown_grace=0)
    jobs = [submit(components, "test/gate", prompt=str(gate.path), num_inference_steps=5) for _ in range(2)]
    stop_between_steps(components, worker, gate, *jobs)
    assert worker.failure is None
    assert [(job.state, job.attempt, components.queue.position(job)) for job in jobs] == [
        (State.IN_QUEUE, 1, 0),
        (State.IN_QUEUE, 1, 1),
    ]


def test_a_stop_ends_cancelled_jobs(components: Components, gate: Gate) -> None:
    worker = worker_of(components, shutdown_grace=0)
    jobs = [submit(components, "test/gate", prompt=str(gate.path), num_inference_steps=5) for _ in range(2)]
    stop_between_steps(components, worker, gate, *jobs, is_cancelled=True)
    assert worker.failure is None
    assert [job.state for job in jobs] == [State.COMPLETED, State.IN_QUEUE]
    assert outcome_and_body(components, jobs[0])[0].error_type == "client_cancelled"


def test_a_stop_lets_running_jobs_finish_within_the_grace_period(components: Components, gate: Gate) -> None:
    worker = worker_of(components, shutdown_grace=60, max_running=1)
    job = submit(components, "test/gate", prompt=str(gate.path))
    waiting = submit(components)
    stop_between_steps(components, worker, gate, job)
    assert (outcome_and_body(components, job)[0].status, waiting.state, waiting.attempt) == (200, State.IN_QUEUE, 0)


def test_weights_that_fail_to_load_end_the_worker_and_notify(components: Components) -> None:
    class Broken(NullModel):
        def setup(self, config: EngineConfig) -> Engine:  # type: ignore[override]
            raise OSError("no weights here")

    worker = worker_of(components, Broken("test/null", NullEngine))

    async def wait_for_failure() -> None:
        components.notifier.bind_loop(asyncio.get_running_loop())
        with components.notifier.subscribe(WORKER) as event:
            worker.start()
            await event.wait()

    asyncio.run(wait_for_failure())
    assert isinstance(worker.failure, OSError)
    assert not worker.is_ready
    worker.stop()


# -- warm-up while requests run


class ColdEngine(NullEngine):
    """An engine with three tiers to warm up: the first waits for `may_continue`, the second fails."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.num_calls = events, 0
        self.is_warming, self.may_continue, self.is_frozen = threading.Event(), threading.Event(), threading.Event()

    def warm_up(self) -> bool:
        self.events.append(threading.current_thread().name)
        self.num_calls += 1
        if self.num_calls == 1:
            self.is_warming.set()
            assert self.may_continue.wait(60)
        if self.num_calls == 2:
            raise RuntimeError("this card has no such kernel")
        return self.num_calls <= 3

    def freeze_compilation(self) -> None:
        self.events.append("frozen")
        self.is_frozen.set()


def test_warm_up_and_its_failures_do_not_delay_requests(
    components: Components, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[str] = []
    first, second = ColdEngine(events), ColdEngine(events)
    worker = worker_of(components, NullModel("test/null", lambda: first), NullModel("test/other", lambda: second))

    def run_job(endpoint: str) -> None:
        job = submit(components, endpoint)
        asyncio.run(wait_for_state(components, job, State.COMPLETED))
        assert outcome_and_body(components, job)[0].status == 200

    worker.start()
    assert first.is_warming.wait(60)
    assert worker.is_ready
    run_job("test/null")
    run_job("test/other")
    first.may_continue.set()
    # Warm-up goes on with the next tier and the next endpoint, also after a tier that failed.
    assert second.is_warming.wait(60)
    assert events == ["warm-up"] * (4 + 1)
    run_job("test/null")
    second.may_continue.set()
    assert second.is_frozen.wait(60)
    run_job("test/other")
    worker.stop()
    assert worker.failure is None
    # No engine freezes its compilation before all engines are warm.
    assert events == ["warm-up"] * (4 + 4) + ["frozen"] * 2
    assert "a tier or the decoder of the weights test/null could not be made ready" in caplog.text
    assert "this card has no such kernel" in caplog.text


# -- readiness while the weights are loaded


def test_ready_reports_the_progress_of_loading(tmp_path: Path, gate: Gate) -> None:
    models_dir = tmp_path / "models"
    models_dir.mkdir()
    lines = (
        "from tests.support.fake_models import LoadingModel",
        f"MODEL = LoadingModel('test/loading', {str(gate.path)!r})",
    )
    (models_dir / "loading.py").write_text("\n".join(lines), encoding="utf-8")
    with (
        serving(tmp_path / "data", "test/loading=demo", models_dir=str(models_dir)) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        server.wait_for("loading transformer, 1.0 of 4.0 GB loaded")
        response = client.get("/health/ready")
        body = response.json()
        assert (response.status_code, body.pop("status"), bool(body.pop("version"))) == (503, "loading", True)
        assert body == {"component": "transformer", "loaded_bytes": 1_000_000_000, "total_bytes": 4_000_000_000}
        waiting = client.post("/queue/test/loading", json=SMALL | {"prompt": "x"}).json()
        assert waiting["status"] == "IN_QUEUE"
        gate.release(1)
        assert wait_until_completed(client, waiting["status_url"]).get("error") is None
        response = client.get("/health/ready")
        assert (response.status_code, set(response.json())) == (200, {"status", "version"})
        assert server.stop() == 0


# -- out of memory


def test_out_of_memory_is_reported_as_retryable(constrained_client: httpx.Client) -> None:
    response = constrained_client.post("/test/memory", json={"prompt": "x"})
    assert (response.status_code, response.headers["x-fal-retryable"]) == (500, "true")
    assert response.json() == {
        "detail": "Out of memory: an image of 512x512 did not fit, also when tried alone.",
        "message": "Out of memory: an image of 512x512 did not fit, also when tried alone.",
        "error_type": "internal_error",
    }
    assert constrained_client.post("/test/null", json={"prompt": "x"}).status_code == 200
