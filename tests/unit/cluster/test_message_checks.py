"""Tests of false messages from runners: they affect only the requests of the runner that sends them."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest

from models.base import LoadProgress
from server.cluster import message_checks, messages
from server.cluster.head import ClusterHead
from server.cluster.ray_backend import RunnerLost
from server.queue.jobs import Job, Mode, Outcome, Priority, State
from server.storage.file_store import Lifecycle, StoredFile
from tests.support.components import Components, finish_job, submission
from tests.unit.cluster.test_head import FakeRayCluster, FakeRunner, job_finished, ray_cluster, start, submit, until

__all__ = ["ray_cluster", "start"]

Start = Callable[..., ClusterHead]
NAME = "a" * 32 + ".jpg"


def with_file(job: Job, content: bytes = b"mine", **changes: Any) -> messages.JobFinished:
    """Return a JobFinished message with one file; `changes` replace fields of the file."""
    file = dataclasses.replace(StoredFile(NAME, job.owner, len(content), "image/jpeg"), **changes)
    return messages.JobFinished(job.request_id, Outcome(200, "{}", files=(file,)), {file.name: content})


def with_outcome(job: Job, **changes: Any) -> messages.JobFinished:
    return messages.JobFinished(job.request_id, dataclasses.replace(Outcome(200, "{}"), **changes), {})


def log_record(**changes: Any) -> logging.LogRecord:
    record = logging.makeLogRecord({"name": "models", "levelno": logging.INFO, "msg": "a line"})
    vars(record).update(changes)
    return record


INVALID_MESSAGES: dict[str, Callable[[Job], messages.Message]] = {
    "a name in another directory": lambda job: with_file(job, name="../../stolen.jpg"),
    "a name with a slash": lambda job: with_file(job, name=f"x/{NAME}"),
    "no name": lambda job: with_file(job, name=""),
    "no content": lambda job: dataclasses.replace(with_file(job), contents={}),
    "a wrong size": lambda job: with_file(job, size=10**12),
    "a negative size": lambda job: with_file(job, size=-1),
    "a file of another owner": lambda job: with_file(job, owner="you"),
    "an HTML page": lambda job: with_file(job, content_type="text/html"),
    "a file twice": lambda job: dataclasses.replace(
        with_file(job), outcome=dataclasses.replace(with_file(job).outcome, files=with_file(job).outcome.files * 2)
    ),
    "not JSON": lambda job: with_outcome(job, body="nonsense"),
    "not an object": lambda job: with_outcome(job, body="[]"),
    "no body": lambda job: with_outcome(job, body=None),
    "a lone surrogate": lambda job: with_outcome(job, body='{"x": "\ud800"}'),
    "too long a body": lambda job: with_outcome(job, body='{"x": "' + "x" * 100_000 + '"}'),
    "a negative status": lambda job: with_outcome(job, status=-1),
    "too high a status": lambda job: with_outcome(job, status=99_999),
    "no status": lambda job: with_outcome(job, status=None),
    "negative units": lambda job: with_outcome(job, billable_units=-1),
    "too many units": lambda job: with_outcome(job, billable_units=10**30),
    "a time that is not a number": lambda job: with_outcome(job, inference_time=float("nan")),
    "a provenance with unknown names": lambda job: with_outcome(job, provenance={"inference_time": "1"}),
    "a provenance that is not text": lambda job: with_outcome(job, provenance={"dtype": None}),
    "a provenance that is too long": lambda job: with_outcome(job, provenance={"dtype": "x" * 10_000}),
    "an error that is not text": lambda job: with_outcome(job, status=500, error=b"x"),
    "no outcome": lambda job: messages.JobFinished(job.request_id, None, {}),  # type: ignore[arg-type]
    "too long a line": lambda job: messages.JobLog(job.request_id, "x" * 3_000_000, "INFO"),
    "too large a preview": lambda job: messages.JobProgress(job.request_id, 1, 2, "x" * 10_000_000),
    "a step too many": lambda job: messages.JobProgress(job.request_id, 3, 2, None),
    "too many steps": lambda job: messages.JobProgress(job.request_id, 1, 10**9, None),
    "a request id that is not text": lambda job: messages.JobReleased([]),  # type: ignore[arg-type]
    "a crash of an invalid request": lambda job: messages.CrashReported([[]]),  # type: ignore[list-item]
    "an invalid state": lambda job: messages.RunnerState(None, True, {}),  # type: ignore[arg-type]
    "an invalid step time": lambda job: messages.StepMeasured((64, 64), "none", float("nan")),
    "a negative number of images": lambda job: messages.ImagesGenerated("test/null", -1, 0),
    "an invalid log record": lambda job: messages.LogRecord("x"),  # type: ignore[arg-type]
    "no list of crashes": lambda job: messages.CrashReported(None),  # type: ignore[arg-type]
    "no list of files": lambda job: with_outcome(job, files=None),
    "no contents": lambda job: dataclasses.replace(with_file(job), contents=None),  # type: ignore[arg-type]
    "images of no endpoint": lambda job: messages.ImagesGenerated(None, 1, 0),  # type: ignore[arg-type]
    "an image without a height": lambda job: messages.StepMeasured((64,), "none", 1.0),  # type: ignore[arg-type]
    "an image without a size": lambda job: messages.StepMeasured(None, "none", 1.0),  # type: ignore[arg-type]
    "a log record of no logger": lambda job: messages.LogRecord(log_record(name=None)),
    "a log record of no level": lambda job: messages.LogRecord(log_record(levelno="high")),
}


@pytest.mark.parametrize("invalid_message", INVALID_MESSAGES.values(), ids=INVALID_MESSAGES)
def test_a_runner_that_sends_an_invalid_message_is_replaced_and_its_request_retried(
    components: Components,
    ray_cluster: FakeRayCluster,
    start: Start,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    invalid_message: Callable[[Job], messages.Message],
) -> None:
    monkeypatch.setattr(message_checks, "MAX_BODY", 50_000)
    cluster = start()
    job = submit(components)
    liar = ray_cluster.next()
    assert liar.next_job_id() == job.request_id
    liar.incoming.put(invalid_message(job))
    honest = ray_cluster.next()
    assert honest.next_job_id() == job.request_id
    assert (job.attempt, job.crash_count, job.logs) == (2, 0, [])
    honest.incoming.put(job_finished(job))
    until(lambda: job.state == State.COMPLETED)
    assert (cluster.failure, cluster.gpus()[0].num_restarts) == (None, 1)
    assert [
        message
        for message in caplog.messages
        if message.startswith("GPU 0: starting another runner, because it lost its runner: the runner reported ")
    ]
    assert [(name,) for name in components.stored_file_names()] == components.rows(
        "SELECT name FROM files WHERE name <> ?", NAME
    )
    assert {path.name for path in components.data_dir.parent.iterdir()} == {components.data_dir.name}


def test_files_of_other_requests_are_not_changed(
    components: Components, ray_cluster: FakeRayCluster, start: Start
) -> None:
    """The same holds when the request is cancelled and its files are deleted."""
    theirs = components.files.create(b"theirs", "jpg", "image/jpeg", "me", Lifecycle())
    first = finish_job(components, theirs)
    cluster = start()
    for is_cancelled in (False, True):
        job = submit(components)
        liar = ray_cluster.next()
        assert liar.next_job_id() == job.request_id
        if is_cancelled:
            components.queue.cancel(job)
        liar.incoming.put(with_file(job, name=theirs.name))
        if not is_cancelled:
            honest = ray_cluster.next()
            assert honest.next_job_id() == job.request_id
            honest.incoming.put(with_outcome(job))
            until(lambda job=job: job.state == State.COMPLETED)  # type: ignore[misc]
            honest.incoming.put(RunnerLost("enough"))
    until(lambda: job.state == State.COMPLETED)
    assert components.files.path(theirs).read_bytes() == b"theirs"
    assert components.rows("SELECT name, request_id FROM files") == [(theirs.name, first.request_id)]
    assert cluster.failure is None


def start_two_runners(
    components: Components, ray_cluster: FakeRayCluster, start: Start
) -> tuple[ClusterHead, dict[str, FakeRunner], list[Job]]:
    """Start two runners with one request each; return the head, the runners by request id, and the jobs."""
    ray_cluster.gpu_count = 2
    cluster = start()
    runners = [ray_cluster.next(), ray_cluster.next()]
    until(lambda: [gpu.state for gpu in cluster.gpus()] == ["ready", "ready"])
    jobs = [submit(components), submit(components)]
    return cluster, {runner.next_job_id(): runner for runner in runners}, jobs


def test_a_runner_cannot_finish_requests_of_others_or_finished_ones(
    components: Components, ray_cluster: FakeRayCluster, start: Start
) -> None:
    """Messages about waiting or unknown requests are ignored too."""
    cluster, runners, (mine, other) = start_two_runners(components, ray_cluster, start)
    waiting = submit(components)
    liar = runners[mine.request_id]
    for name in (other.request_id, waiting.request_id, "never"):
        for report in (
            messages.JobProgress(name, 1, 2, "data:image/jpeg;base64,eA=="),
            messages.JobLog(name, "lies", "INFO"),
            messages.JobFinished(name, Outcome(500, '{"detail": "lies"}', "lies"), {}),
            messages.JobReleased(name),
            messages.JobRejected(name),
            messages.CrashReported([name]),
        ):
            liar.incoming.put(report)
    # Finish the request twice. The second message is ignored, because the request is already finished.
    liar.incoming.put(with_outcome(mine, body='{"seed": 1}'))
    liar.incoming.put(with_outcome(mine, status=500, body='{"seed": 2}', error="lies"))
    assert liar.orders.get(timeout=20)[0] == "hear"
    until(lambda: waiting.state == State.IN_PROGRESS)
    liar.incoming.put(with_outcome(waiting))
    until(lambda: waiting.state == State.COMPLETED)
    assert (other.state, other.attempt, other.crash_count, other.logs, other.preview) == ("IN_PROGRESS", 1, 0, [], None)
    runners[other.request_id].incoming.put(with_outcome(other))
    until(lambda: other.state == State.COMPLETED)
    assert components.rows("SELECT status, error, attempt FROM jobs") == [(200, None, 1)] * 3
    assert components.queue.result(mine).body == '{"seed": 1}'
    assert cluster.failure is None
    assert [gpu.num_restarts for gpu in cluster.gpus()] == [0, 0]


def test_the_log_of_a_request_is_limited(
    components: Components, ray_cluster: FakeRayCluster, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_checks, "MAX_LINES", 100)
    start()
    job = submit(components)
    liar = ray_cluster.next()
    liar.next_job_id()
    for _ in range(101):
        liar.incoming.put(messages.JobLog(job.request_id, "again", "INFO"))
    assert ray_cluster.next().next_job_id() == job.request_id


def test_log_records_of_a_runner_are_truncated(
    components: Components, ray_cluster: FakeRayCluster, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    start()
    long = logging.LogRecord("server.worker.worker", logging.WARNING, "", 0, "x" * 3_000_000, None, None)
    runner = ray_cluster.next()
    runner.incoming.put(messages.LogRecord(long))
    until(lambda: any(message.startswith("xxx") for message in caplog.messages))
    assert max(map(len, caplog.messages)) == message_checks.MAX_LINE
    assert ray_cluster.started.empty()


def test_valid_messages_are_accepted() -> None:
    job = Job(1, "one", "test/null", "me", Mode.QUEUE, Priority.NORMAL, "http://here", State.IN_PROGRESS)
    for report in (
        job_finished(job),
        messages.JobProgress(job.request_id, 2, 2, None),
        messages.RunnerState(LoadProgress(), True, {}),
        messages.StepMeasured((512, 512), "none", 0.0),
        messages.ImagesGenerated("test/null", 4, 1),
        messages.RunnerStopped("the GPU is lost"),
    ):
        message_checks.check(report, {job.request_id: job})


def test_an_unreadable_input_does_not_block_other_requests(
    components: Components, ray_cluster: FakeRayCluster, start: Start
) -> None:
    """A damaged database row may have such an input. The runner of the request reports the error."""
    bad = components.queue.submit(submission(input="nonsense"))
    start()
    runner = ray_cluster.next()
    assert runner.next_job_id() == bad.request_id
    runner.incoming.put(with_outcome(bad, status=500, error="it cannot be read"))
    good = submit(components)
    assert runner.next_job_id() == good.request_id
    assert bad.error == "it cannot be read"
