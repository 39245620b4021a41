"""Tests of the cluster head, with fake runners whose messages the tests write: no job is lost or waits forever."""

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models.base import EngineInfo, LoadProgress
from server.cluster import gpu_slot, messages
from server.cluster import head as cluster_module
from server.cluster.head import ClusterHead
from server.cluster.ray_backend import RayLost, RunnerLost
from server.errors import DiskFull
from server.metrics import Metrics
from server.queue.jobs import Job, Outcome, Priority, State
from server.settings import Settings
from server.storage.file_store import StoredFile
from tests.support.components import Components, submission

TEXT = '{"prompt": "x"}'


class FakeRunner:
    """Fake runner whose messages the test writes. An exception among them ends the runner."""

    node = "there"

    def __init__(self) -> None:
        self.incoming: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.orders: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.suspects: list[str] = []
        self.send_error: Exception | None = None
        self.can_send = threading.Event()
        self.can_send.set()

    def messages(self) -> Iterator[messages.Message]:
        while True:
            report = self.incoming.get()
            if isinstance(report, Exception):
                raise report
            yield report
            if isinstance(report, messages.RunnerStopped):
                return

    def send_job(self, job: Job, text: str) -> None:
        if job.input_files:
            self.can_send.wait(60)
        if self.send_error:
            raise self.send_error
        self.orders.put(("take", job.request_id))

    def cancel(self, request_id: str) -> None:
        self.orders.put(("cancel", request_id))

    def preview(self, request_id: str) -> None:
        self.orders.put(("preview", request_id))

    def ack_crash(self) -> None:
        self.orders.put(("hear", ""))

    def stop(self) -> None:
        self.incoming.put(messages.RunnerStopped())

    def kill(self) -> None:
        self.incoming.put(RunnerLost("killed"))

    def crashed_jobs(self) -> list[str]:
        return self.suspects

    def ready(self) -> "FakeRunner":
        self.incoming.put(messages.RunnerState(LoadProgress(), True, {"demo": EngineInfo("a GPU")}))
        return self

    def next_job_id(self) -> str:
        order, request_id = self.orders.get(timeout=20)
        assert order == "take"
        return request_id


class FakeRayCluster:
    """Fake Ray cluster with any number of GPUs. Each new runner is handed to the test."""

    def __init__(self) -> None:
        self.started: queue.SimpleQueue[FakeRunner] = queue.SimpleQueue()
        self.gpu_count = 1
        #: How often the head asked for the number of GPUs.
        self.num_looks = 0

    def connect(self) -> None: ...

    def start_runner(self) -> FakeRunner:
        runner = FakeRunner()
        self.started.put(runner)
        return runner

    def num_gpus(self) -> int:
        self.num_looks += 1
        if not self.gpu_count:
            raise RayLost("it has died")
        return self.gpu_count

    def close(self) -> None: ...

    def next(self) -> FakeRunner:
        return self.started.get(timeout=20).ready()


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> FakeRayCluster:
    monkeypatch.setattr(gpu_slot, "RESTART_BACKOFF", (0.0,))
    monkeypatch.setattr(cluster_module, "POLL_INTERVAL", 0.01)
    return FakeRayCluster()


@pytest.fixture
def start(components: Components, ray_cluster: FakeRayCluster, tmp_path: Path) -> Iterator[Callable[..., ClusterHead]]:
    """Return a function that starts a cluster head with the given settings. The head stops after the test."""
    started: list[ClusterHead] = []

    def start_cluster(**settings: Any) -> ClusterHead:
        chosen = Settings(data_dir=tmp_path, ray="nowhere", **{"max_running": 1, "shutdown_grace": 0, **settings})
        head = ClusterHead(chosen, components.queue, components.files, ray_cluster, components.notifier, Metrics())  # type: ignore[arg-type]
        components.queue.on_cancel = head.cancel
        started.append(head)
        head.start()
        return head

    yield start_cluster
    for each in started:
        each.stop()


def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds. The timeout of the test ends the wait."""
    while not condition():
        threading.Event().wait(0.005)


def submit(components: Components, **changes: Any) -> Job:
    return components.queue.submit(submission(input=TEXT, **changes))


def job_finished(job: Job, content: bytes = b"an image") -> messages.JobFinished:
    name = "0" * 31 + f"{job.sequence % 10}.jpg"
    file = StoredFile(name, job.owner, len(content), "image/jpeg")
    return messages.JobFinished(job.request_id, Outcome(200, "{}", files=(file,)), {name: content})


def test_images_from_a_runner_are_stored_on_the_head(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    cluster = start()
    job = submit(components)
    runner = ray_cluster.next()
    assert runner.next_job_id() == job.request_id
    runner.incoming.put(messages.JobProgress(job.request_id, 1, 2, "data:preview"))
    runner.incoming.put(messages.JobLog(job.request_id, "hello", "INFO"))
    until(lambda: [line["message"] for line in job.logs] == ["step 1/2", "hello"])
    assert job.preview == "data:preview"
    (gpu,) = cluster.gpus()
    assert (gpu.state, gpu.node, gpu.num_running, gpu.engines) == ("ready", "there", 1, {"demo": EngineInfo("a GPU")})
    runner.incoming.put(job_finished(job))
    until(lambda: job.state == State.COMPLETED)
    (name,) = components.stored_file_names()
    assert (components.data_dir / "files" / name).read_bytes() == b"an image"
    assert components.rows("SELECT name, request_id FROM files") == [(name, job.request_id)]


def test_jobs_of_a_lost_runner_are_retried(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    cluster = start()
    job = submit(components)
    first = ray_cluster.next()
    first.next_job_id()
    first.incoming.put(RunnerLost("its node is gone"))
    second = ray_cluster.next()
    assert second.next_job_id() == job.request_id
    # This message comes too late: the lost runner no longer has a job.
    first.incoming.put(job_finished(job, b"old"))
    second.incoming.put(job_finished(job, b"new"))
    until(lambda: job.state == State.COMPLETED)
    assert (job.attempt, job.crash_count, cluster.gpus()[0].num_restarts) == (2, 0, 1)
    (name,) = components.stored_file_names()
    assert (components.data_dir / "files" / name).read_bytes() == b"new"


def test_a_job_fails_alone_after_three_crashes(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    start(max_running=2)
    deadly, other = submit(components), submit(components)
    for number in range(3):
        runner = ray_cluster.next()
        assert {runner.next_job_id(), runner.next_job_id()} == {deadly.request_id, other.request_id}
        if number == 0:
            # As the watchdog does, the runner reports the crash before the process ends.
            runner.incoming.put(messages.CrashReported([deadly.request_id]))
            assert runner.orders.get(timeout=20) == ("hear", "")
        else:
            runner.suspects = [deadly.request_id]
        runner.incoming.put(RunnerLost("the process crashed"))
    runner = ray_cluster.next()
    assert runner.next_job_id() == other.request_id
    assert (deadly.state, deadly.error) == (
        State.COMPLETED,
        "The server crashed 3 times while it ran this request.",
    )
    assert other.crash_count == 0


def test_a_job_that_caused_no_crash_fails_after_ten_attempts(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    start()
    job = submit(components)
    for _ in range(10):
        runner = ray_cluster.next()
        runner.next_job_id()
        runner.incoming.put(RunnerLost("killed"))
    until(lambda: job.state == State.COMPLETED)
    assert job.error == "Gave up after 10 attempts: the server's process ended each time; submit the request again."


def test_cancel_and_preview_requests_reach_the_runner(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    start()
    job = submit(components)
    runner = ray_cluster.next()
    runner.next_job_id()
    job.wants_previews = True
    runner.incoming.put(messages.JobProgress(job.request_id, 1, 2, None))
    assert runner.orders.get(timeout=20) == ("preview", job.request_id)
    components.queue.cancel(job)
    assert runner.orders.get(timeout=20) == ("cancel", job.request_id)
    # The job finishes anyway, but too late: its images are not stored.
    runner.incoming.put(job_finished(job))
    until(lambda: job.state == State.COMPLETED)
    assert (job.is_cancelled, components.stored_file_names()) == (True, [])


def test_storing_images_is_retried_when_the_disk_is_full(
    components: Components,
    ray_cluster: FakeRayCluster,
    start: Callable[..., ClusterHead],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start()
    job = submit(components)
    runner = ray_cluster.next()
    runner.next_job_id()
    tried = threading.Event()
    write = components.files.write

    def full(*args: Any) -> StoredFile:
        if not tried.is_set():
            tried.set()
            raise DiskFull
        return write(*args)

    monkeypatch.setattr(components.files, "write", full)
    runner.incoming.put(job_finished(job))
    until(lambda: job.state == State.COMPLETED)
    assert tried.is_set()
    assert len(components.stored_file_names()) == 1


def test_a_stop_requeues_running_jobs(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    cluster = start()
    running, waiting = submit(components), submit(components)
    ray_cluster.next().next_job_id()
    cluster.stop()
    assert components.rows("SELECT state FROM jobs") == [("IN_QUEUE",), ("IN_QUEUE",)]
    assert (components.queue.position(running), components.queue.position(waiting)) == (0, 1)
    assert not cluster.is_ready


def test_low_priority_waits_for_a_gpu_without_blocking_normal_priority(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    start()
    low = [submit(components, priority=Priority.LOW) for _ in range(2)]
    runner = ray_cluster.next()
    assert runner.next_job_id() == low[0].request_id
    normal = submit(components)
    assert runner.next_job_id() == normal.request_id
    assert low[1].state == State.IN_QUEUE


def test_gpus_are_added_for_the_queue_and_removed_when_idle(
    components: Components,
    ray_cluster: FakeRayCluster,
    start: Callable[..., ClusterHead],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster_module, "IDLE_SECONDS", 0.05)
    cluster = start(max_gpus=2, min_gpus=0)
    assert (cluster.gpus(), cluster.is_ready) == ([], False)
    jobs = {job.request_id: job for job in (submit(components) for _ in range(cluster_module.MAX_JOBS_PER_GPU + 1))}
    runners = [ray_cluster.next(), ray_cluster.next()]
    until(lambda: [gpu.state for gpu in cluster.gpus()] == ["ready", "ready"])
    while any(job.state != State.COMPLETED for job in jobs.values()):
        for runner in runners:
            while not runner.orders.empty():
                runner.incoming.put(job_finished(jobs[runner.next_job_id()]))
        threading.Event().wait(0.005)
    until(lambda: not cluster.gpus())


def test_an_idle_gpu_is_removed_while_a_later_one_is_busy(
    components: Components,
    ray_cluster: FakeRayCluster,
    start: Callable[..., ClusterHead],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster_module, "IDLE_SECONDS", 0.05)
    cluster = start(max_gpus=2, min_gpus=0)
    jobs = {job.request_id: job for job in (submit(components) for _ in range(cluster_module.MAX_JOBS_PER_GPU + 1))}
    first = ray_cluster.next()
    running_id = first.next_job_id()
    second = ray_cluster.next()
    held = jobs.pop(second.next_job_id())
    while jobs:
        first.incoming.put(job_finished(jobs.pop(running_id)))
        running_id = first.next_job_id() if jobs else ""
    until(lambda: [(gpu.name, gpu.state, gpu.num_running) for gpu in cluster.gpus()] == [("1", "ready", 1)])
    second.incoming.put(job_finished(held))
    until(lambda: held.state == State.COMPLETED)
    assert held.attempt == 1
    until(lambda: not cluster.gpus())


@pytest.mark.parametrize(("node", "expected_states"), [("there", ["ready", "loading"]), ("", ["ready"])])
def test_a_shorter_queue_withdraws_a_requested_gpu_but_not_a_loading_one(
    components: Components,
    ray_cluster: FakeRayCluster,
    start: Callable[..., ClusterHead],
    node: str,
    expected_states: list[str],
) -> None:
    cluster = start(max_gpus=2, min_gpus=0)
    jobs = {job.request_id: job for job in (submit(components) for _ in range(cluster_module.MAX_JOBS_PER_GPU + 1))}
    first = ray_cluster.next()
    running_id = first.next_job_id()
    ray_cluster.started.get(timeout=20).node = node
    first.incoming.put(job_finished(jobs[running_id]))
    until(lambda: jobs[running_id].state == State.COMPLETED)
    looks = ray_cluster.num_looks
    until(lambda: ray_cluster.num_looks > looks + 3)
    until(lambda: [gpu.state for gpu in cluster.gpus()] == expected_states)


def test_every_gpu_of_the_cluster_is_used(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    cluster = start()
    ray_cluster.next()
    ray_cluster.gpu_count = 3
    ray_cluster.next()
    ray_cluster.next()
    until(lambda: [gpu.state for gpu in cluster.gpus()] == ["ready"] * 3)


def test_a_runner_that_fails_to_load_is_restarted(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    cluster = start()
    for _ in range(3):
        ray_cluster.started.get(timeout=20).incoming.put(messages.RunnerStopped("these weights cannot be read"))
    ray_cluster.next()
    until(lambda: cluster.is_ready)
    assert cluster.gpus()[0].num_restarts == 3


def test_the_head_stops_when_ray_dies_and_keeps_its_queue(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    cluster = start()
    submit(components)
    ray_cluster.next().next_job_id()
    ray_cluster.gpu_count = 0
    until(lambda: cluster.failure is not None)
    assert str(cluster.failure) == "it has died"
    cluster.stop()
    assert components.rows("SELECT state FROM jobs") == [("IN_QUEUE",)]


@pytest.mark.parametrize("is_rejected_by_runner", [False, True])
def test_a_job_that_a_runner_cannot_receive_goes_to_another(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead], is_rejected_by_runner: bool
) -> None:
    ray_cluster.gpu_count = 2
    cluster = start()
    first = ray_cluster.started.get(timeout=20)
    first.send_error = None if is_rejected_by_runner else RunnerLost("the object store is full")
    first.ready()
    until(lambda: cluster.is_ready)
    job = submit(components)
    if is_rejected_by_runner:
        assert first.next_job_id() == job.request_id
        first.incoming.put(messages.JobRejected(job.request_id))
    assert ray_cluster.next().next_job_id() == job.request_id
    assert (job.attempt, job.crash_count) == (2, 0)


def test_a_job_whose_input_is_missing_fails_alone(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    cluster = start()
    runner = ray_cluster.next()
    runner.send_error = FileNotFoundError("gone")
    job = submit(components, input_files={"image_url": "gone"})
    until(lambda: job.state == State.COMPLETED)
    assert (job.error_type, cluster.is_ready) == ("internal_error", True)


def test_a_slow_transfer_to_one_gpu_does_not_delay_another(
    components: Components, ray_cluster: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    ray_cluster.gpu_count = 2
    cluster = start()
    runners = [ray_cluster.next(), ray_cluster.next()]
    until(lambda: all(gpu.state == "ready" for gpu in cluster.gpus()) and len(cluster.gpus()) == 2)
    for runner in runners:
        runner.can_send.clear()
    large = submit(components, input_files={"image_url": "0" * 32 + ".png"})
    until(lambda: large.state == State.IN_PROGRESS)
    small = submit(components)
    until(lambda: not all(runner.orders.empty() for runner in runners))
    first, second = sorted(runners, key=lambda runner: runner.orders.empty())
    assert first.next_job_id() == small.request_id
    for runner in runners:
        runner.can_send.set()
    assert second.next_job_id() == large.request_id


def test_the_head_stops_when_it_cannot_write_to_the_database(
    components: Components,
    ray_cluster: FakeRayCluster,
    start: Callable[..., ClusterHead],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = start()
    job = submit(components)
    runner = ray_cluster.next()
    runner.next_job_id()
    monkeypatch.setattr(components.queue, "finish", lambda *args: (_ for _ in ()).throw(RuntimeError("disk I/O error")))
    runner.incoming.put(job_finished(job))
    until(lambda: cluster.failure is not None)
    assert str(cluster.failure) == "disk I/O error"


def test_a_job_whose_image_cannot_be_written_fails_alone(
    components: Components,
    ray_cluster: FakeRayCluster,
    start: Callable[..., ClusterHead],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = start()
    job = submit(components)
    runner = ray_cluster.next()
    runner.next_job_id()
    monkeypatch.setattr(components.files, "write", lambda *args: (_ for _ in ()).throw(OSError("bad sector")))
    runner.incoming.put(job_finished(job))
    until(lambda: job.state == State.COMPLETED)
    assert (job.error_type, cluster.failure) == ("internal_error", None)
