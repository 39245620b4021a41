"""The head of a cluster, with runners that say what the test says: nothing is lost with them, nobody waits for ever."""

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
from tests.support.components import Parts, submission

TEXT = '{"prompt": "x"}'


class FakeRunner:
    """A runner whose reports the test writes; an exception among them is its end."""

    node = "there"

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.orders: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.suspects: list[str] = []
        self.cannot_take: Exception | None = None
        self.may_take = threading.Event()
        self.may_take.set()

    def messages(self) -> Iterator[messages.Message]:
        while True:
            report = self.said.get()
            if isinstance(report, Exception):
                raise report
            yield report
            if isinstance(report, messages.RunnerStopped):
                return

    def send_job(self, job: Job, text: str) -> None:
        if job.input_files:
            self.may_take.wait(60)
        if self.cannot_take:
            raise self.cannot_take
        self.orders.put(("take", job.request_id))

    def cancel(self, request_id: str) -> None:
        self.orders.put(("cancel", request_id))

    def preview(self, request_id: str) -> None:
        self.orders.put(("preview", request_id))

    def ack_crash(self) -> None:
        self.orders.put(("hear", ""))

    def stop(self) -> None:
        self.said.put(messages.RunnerStopped())

    def kill(self) -> None:
        self.said.put(RunnerLost("killed"))

    def crashed_jobs(self) -> list[str]:
        return self.suspects

    def ready(self) -> "FakeRunner":
        self.said.put(messages.RunnerState(LoadProgress(), True, {"demo": EngineInfo("a GPU")}))
        return self

    def taken(self) -> str:
        order, request_id = self.orders.get(timeout=20)
        assert order == "take"
        return request_id


class FakeRayCluster:
    """GPUs without end; each new runner is handed to the test."""

    def __init__(self) -> None:
        self.made: queue.SimpleQueue[FakeRunner] = queue.SimpleQueue()
        self.number = 1
        #: How often the cluster looked how many GPUs there are.
        self.num_looks = 0

    def connect(self) -> None: ...

    def start_runner(self) -> FakeRunner:
        made = FakeRunner()
        self.made.put(made)
        return made

    def num_gpus(self) -> int:
        self.num_looks += 1
        if not self.number:
            raise RayLost("it has died")
        return self.number

    def close(self) -> None: ...

    def next(self) -> FakeRunner:
        return self.made.get(timeout=20).ready()


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> FakeRayCluster:
    monkeypatch.setattr(gpu_slot, "RESTART_BACKOFF", (0.0,))
    monkeypatch.setattr(cluster_module, "POLL_INTERVAL", 0.01)
    return FakeRayCluster()


@pytest.fixture
def start(parts: Parts, fleet: FakeRayCluster, tmp_path: Path) -> Iterator[Callable[..., ClusterHead]]:
    """Start a cluster with these settings; it ends with the test."""
    started: list[ClusterHead] = []

    def begin(**settings: Any) -> ClusterHead:
        chosen = Settings(data_dir=tmp_path, ray="nowhere", **{"max_running": 1, "shutdown_grace": 0, **settings})
        made = ClusterHead(chosen, parts.queue, parts.files, fleet, parts.notifier, Metrics())  # type: ignore[arg-type]
        parts.queue.on_cancel = made.cancel
        started.append(made)
        made.start()
        return made

    yield begin
    for each in started:
        each.stop()


def until(condition: Callable[[], bool]) -> None:
    """Wait for it; the test's own time limit ends it."""
    while not condition():
        threading.Event().wait(0.005)


def submit(parts: Parts, **changes: Any) -> Job:
    return parts.queue.submit(submission(input=TEXT, **changes))


def ended(job: Job, content: bytes = b"picture") -> messages.JobFinished:
    name = "0" * 31 + f"{job.sequence % 10}.jpg"
    file = StoredFile(name, job.owner, len(content), "image/jpeg")
    return messages.JobFinished(job.request_id, Outcome(200, "{}", files=(file,)), {name: content})


def test_what_a_runner_painted_is_on_the_disk_of_the_head(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    cluster = start()
    job = submit(parts)
    link = fleet.next()
    assert link.taken() == job.request_id
    link.said.put(messages.JobProgress(job.request_id, 1, 2, "data:preview"))
    link.said.put(messages.JobLog(job.request_id, "hello", "INFO"))
    until(lambda: [line["message"] for line in job.logs] == ["step 1/2", "hello"])
    assert job.preview == "data:preview"
    (gpu,) = cluster.gpus()
    assert (gpu.state, gpu.node, gpu.num_running, gpu.engines) == ("ready", "there", 1, {"demo": EngineInfo("a GPU")})
    link.said.put(ended(job))
    until(lambda: job.state == State.COMPLETED)
    (name,) = parts.on_disk()
    assert (parts.folder / "files" / name).read_bytes() == b"picture"
    assert parts.rows("SELECT name, request_id FROM files") == [(name, job.request_id)]


def test_a_lost_runner_loses_nothing(parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead]) -> None:
    cluster = start()
    job = submit(parts)
    first = fleet.next()
    first.taken()
    first.said.put(RunnerLost("its node is gone"))
    second = fleet.next()
    assert second.taken() == job.request_id
    # Too late, and of nobody any more.
    first.said.put(ended(job, b"old"))
    second.said.put(ended(job, b"new"))
    until(lambda: job.state == State.COMPLETED)
    assert (job.attempt, job.crash_count, cluster.gpus()[0].num_restarts) == (2, 0, 1)
    (name,) = parts.on_disk()
    assert (parts.folder / "files" / name).read_bytes() == b"new"


def test_three_strikes_and_a_job_fails_alone(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    start(max_running=2)
    deadly, other = submit(parts), submit(parts)
    for number in range(3):
        link = fleet.next()
        assert {link.taken(), link.taken()} == {deadly.request_id, other.request_id}
        if number == 0:
            # The watchdog's way: told before the process ends.
            link.said.put(messages.CrashReported([deadly.request_id]))
            assert link.orders.get(timeout=20) == ("hear", "")
        else:
            link.suspects = [deadly.request_id]
        link.said.put(RunnerLost("a fault of its own"))
    link = fleet.next()
    assert link.taken() == other.request_id
    assert (deadly.state, deadly.error) == (
        State.COMPLETED,
        "The server crashed 3 times while it ran this request.",
    )
    assert other.crash_count == 0


def test_ten_attempts_end_a_job_that_is_nobodys_fault(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    start()
    job = submit(parts)
    for _ in range(10):
        link = fleet.next()
        link.taken()
        link.said.put(RunnerLost("killed"))
    until(lambda: job.state == State.COMPLETED)
    assert job.error == "Gave up after 10 attempts."


def test_cancels_and_wishes_for_previews_reach_the_runner(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    start()
    job = submit(parts)
    link = fleet.next()
    link.taken()
    job.wants_previews = True
    link.said.put(messages.JobProgress(job.request_id, 1, 2, None))
    assert link.orders.get(timeout=20) == ("preview", job.request_id)
    parts.queue.cancel(job)
    assert link.orders.get(timeout=20) == ("cancel", job.request_id)
    # It came to its end all the same, too late to be shown.
    link.said.put(ended(job))
    until(lambda: job.state == State.COMPLETED)
    assert (job.is_cancelled, parts.on_disk()) == (True, [])


def test_a_full_disk_keeps_what_was_painted(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    job = submit(parts)
    link = fleet.next()
    link.taken()
    tried = threading.Event()
    put = parts.files.write

    def full(*args: Any) -> StoredFile:
        if not tried.is_set():
            tried.set()
            raise DiskFull
        return put(*args)

    monkeypatch.setattr(parts.files, "write", full)
    link.said.put(ended(job))
    until(lambda: job.state == State.COMPLETED)
    assert tried.is_set()
    assert len(parts.on_disk()) == 1


def test_a_stop_gives_back_what_runs(parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead]) -> None:
    cluster = start()
    running, waiting = submit(parts), submit(parts)
    fleet.next().taken()
    cluster.stop()
    assert parts.rows("SELECT state FROM jobs") == [("IN_QUEUE",), ("IN_QUEUE",)]
    assert (parts.queue.position(running), parts.queue.position(waiting)) == (0, 1)
    assert not cluster.is_ready


def test_low_priority_waits_for_a_gpu_without_keeping_normal_out(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    start()
    low = [submit(parts, priority=Priority.LOW) for _ in range(2)]
    link = fleet.next()
    assert link.taken() == low[0].request_id
    normal = submit(parts)
    assert link.taken() == normal.request_id
    assert low[1].state == State.IN_QUEUE


def test_gpus_come_with_the_queue_and_go_when_they_are_idle(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "IDLE_SECONDS", 0.05)
    cluster = start(max_gpus=2, min_gpus=0)
    assert (cluster.gpus(), cluster.is_ready) == ([], False)
    jobs = {job.request_id: job for job in (submit(parts) for _ in range(cluster_module.MAX_JOBS_PER_GPU + 1))}
    links = [fleet.next(), fleet.next()]
    until(lambda: [gpu.state for gpu in cluster.gpus()] == ["ready", "ready"])
    while any(job.state != State.COMPLETED for job in jobs.values()):
        for link in links:
            while not link.orders.empty():
                link.said.put(ended(jobs[link.taken()]))
        threading.Event().wait(0.005)
    until(lambda: not cluster.gpus())


def test_an_idle_gpu_goes_while_a_later_one_paints_on(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "IDLE_SECONDS", 0.05)
    cluster = start(max_gpus=2, min_gpus=0)
    jobs = {job.request_id: job for job in (submit(parts) for _ in range(cluster_module.MAX_JOBS_PER_GPU + 1))}
    first = fleet.next()
    painting = first.taken()
    second = fleet.next()
    held = jobs.pop(second.taken())
    while jobs:
        first.said.put(ended(jobs.pop(painting)))
        painting = first.taken() if jobs else ""
    until(lambda: [(gpu.name, gpu.state, gpu.num_running) for gpu in cluster.gpus()] == [("1", "ready", 1)])
    second.said.put(ended(held))
    until(lambda: held.state == State.COMPLETED)
    assert held.attempt == 1
    until(lambda: not cluster.gpus())


@pytest.mark.parametrize(("node", "left"), [("there", ["ready", "loading"]), ("", ["ready"])])
def test_a_queue_that_gets_shorter_takes_back_what_was_asked_for_but_not_what_loads(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead], node: str, left: list[str]
) -> None:
    cluster = start(max_gpus=2, min_gpus=0)
    jobs = {job.request_id: job for job in (submit(parts) for _ in range(cluster_module.MAX_JOBS_PER_GPU + 1))}
    first = fleet.next()
    painting = first.taken()
    fleet.made.get(timeout=20).node = node
    first.said.put(ended(jobs[painting]))
    until(lambda: jobs[painting].state == State.COMPLETED)
    looks = fleet.num_looks
    until(lambda: fleet.num_looks > looks + 3)
    until(lambda: [gpu.state for gpu in cluster.gpus()] == left)


def test_as_many_gpus_as_the_cluster_has(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    cluster = start()
    fleet.next()
    fleet.number = 3
    fleet.next()
    fleet.next()
    until(lambda: [gpu.state for gpu in cluster.gpus()] == ["ready"] * 3)


def test_a_runner_that_cannot_load_is_tried_again(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    cluster = start()
    for _ in range(3):
        fleet.made.get(timeout=20).said.put(messages.RunnerStopped("these weights cannot be read"))
    fleet.next()
    until(lambda: cluster.is_ready)
    assert cluster.gpus()[0].num_restarts == 3


def test_a_head_without_ray_ends_and_keeps_its_queue(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    cluster = start()
    submit(parts)
    fleet.next().taken()
    fleet.number = 0
    until(lambda: cluster.failure is not None)
    assert str(cluster.failure) == "it has died"
    cluster.stop()
    assert parts.rows("SELECT state FROM jobs") == [("IN_QUEUE",)]


@pytest.mark.parametrize("is_refused_there", [False, True])
def test_what_cannot_be_handed_over_is_tried_elsewhere(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead], is_refused_there: bool
) -> None:
    fleet.number = 2
    cluster = start()
    first = fleet.made.get(timeout=20)
    first.cannot_take = None if is_refused_there else RunnerLost("the object store is full")
    first.ready()
    until(lambda: cluster.is_ready)
    job = submit(parts)
    if is_refused_there:
        assert first.taken() == job.request_id
        first.said.put(messages.JobRejected(job.request_id))
    assert fleet.next().taken() == job.request_id
    assert (job.attempt, job.crash_count) == (2, 0)


def test_a_job_whose_file_is_gone_fails_alone(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    cluster = start()
    link = fleet.next()
    link.cannot_take = FileNotFoundError("gone")
    job = submit(parts, input_files={"image_url": "gone"})
    until(lambda: job.state == State.COMPLETED)
    assert (job.error_type, cluster.is_ready) == ("internal_error", True)


def test_what_is_long_in_handing_over_holds_up_no_other_gpu(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead]
) -> None:
    fleet.number = 2
    cluster = start()
    links = [fleet.next(), fleet.next()]
    until(lambda: all(gpu.state == "ready" for gpu in cluster.gpus()) and len(cluster.gpus()) == 2)
    for link in links:
        link.may_take.clear()
    large = submit(parts, input_files={"image_url": "0" * 32 + ".png"})
    until(lambda: large.state == State.IN_PROGRESS)
    small = submit(parts)
    until(lambda: not all(link.orders.empty() for link in links))
    first, second = sorted(links, key=lambda link: link.orders.empty())
    assert first.taken() == small.request_id
    for link in links:
        link.may_take.set()
    assert second.taken() == large.request_id


def test_a_head_that_cannot_write_its_rows_ends(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start()
    job = submit(parts)
    link = fleet.next()
    link.taken()
    monkeypatch.setattr(parts.queue, "finish", lambda *given: (_ for _ in ()).throw(RuntimeError("disk I/O error")))
    link.said.put(ended(job))
    until(lambda: cluster.failure is not None)
    assert str(cluster.failure) == "disk I/O error"


def test_a_picture_that_cannot_be_written_fails_alone(
    parts: Parts, fleet: FakeRayCluster, start: Callable[..., ClusterHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start()
    job = submit(parts)
    link = fleet.next()
    link.taken()
    monkeypatch.setattr(parts.files, "write", lambda *given: (_ for _ in ()).throw(OSError("bad sector")))
    link.said.put(ended(job))
    until(lambda: job.state == State.COMPLETED)
    assert (job.error_type, cluster.failure) == ("internal_error", None)
