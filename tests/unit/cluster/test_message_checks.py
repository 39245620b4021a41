"""Runners of a cluster whose reports are not true: each harms the requests that it has, and nobody else's."""

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
from tests.support.components import Parts, finished, submission
from tests.unit.cluster.test_head import FakeRayCluster, FakeRunner, ended, fleet, start, submit, until

__all__ = ["fleet", "start"]

Start = Callable[..., ClusterHead]
NAME = "a" * 32 + ".jpg"


def with_file(job: Job, content: bytes = b"mine", **changes: Any) -> messages.JobFinished:
    """An outcome with one file, changed."""
    file = dataclasses.replace(StoredFile(NAME, job.owner, len(content), "image/jpeg"), **changes)
    return messages.JobFinished(job.request_id, Outcome(200, "{}", files=(file,)), {file.name: content})


def with_outcome(job: Job, **changes: Any) -> messages.JobFinished:
    return messages.JobFinished(job.request_id, dataclasses.replace(Outcome(200, "{}"), **changes), {})


LIES: dict[str, Callable[[Job], messages.Message]] = {
    "a name that leads elsewhere": lambda job: with_file(job, name="../../stolen.jpg"),
    "a name with a slash": lambda job: with_file(job, name=f"x/{NAME}"),
    "no name": lambda job: with_file(job, name=""),
    "no content": lambda job: dataclasses.replace(with_file(job), contents={}),
    "a size that lies": lambda job: with_file(job, size=10**12),
    "a negative size": lambda job: with_file(job, size=-1),
    "another's file": lambda job: with_file(job, owner="you"),
    "a page": lambda job: with_file(job, content_type="text/html"),
    "a file twice": lambda job: dataclasses.replace(
        with_file(job), outcome=dataclasses.replace(with_file(job).outcome, files=with_file(job).outcome.files * 2)
    ),
    "not JSON": lambda job: with_outcome(job, body="nonsense"),
    "no object": lambda job: with_outcome(job, body="[]"),
    "no text": lambda job: with_outcome(job, body=None),
    "half a character": lambda job: with_outcome(job, body='{"x": "\ud800"}'),
    "too long an answer": lambda job: with_outcome(job, body='{"x": "' + "x" * 100_000 + '"}'),
    "a status below all": lambda job: with_outcome(job, status=-1),
    "a status beyond all": lambda job: with_outcome(job, status=99_999),
    "no status": lambda job: with_outcome(job, status=None),
    "negative units": lambda job: with_outcome(job, billable_units=-1),
    "units without end": lambda job: with_outcome(job, billable_units=10**30),
    "a time that is none": lambda job: with_outcome(job, inference_time=float("nan")),
    "an error that is none": lambda job: with_outcome(job, status=500, error=b"x"),
    "no outcome": lambda job: messages.JobFinished(job.request_id, None, {}),  # type: ignore[arg-type]
    "too long a line": lambda job: messages.JobLog(job.request_id, "x" * 3_000_000, "INFO"),
    "too large a preview": lambda job: messages.JobProgress(job.request_id, 1, 2, "x" * 10_000_000),
    "a step too many": lambda job: messages.JobProgress(job.request_id, 3, 2, None),
    "steps without end": lambda job: messages.JobProgress(job.request_id, 1, 10**9, None),
    "a request that is none": lambda job: messages.JobReleased([]),  # type: ignore[arg-type]
    "strikes against nothing": lambda job: messages.CrashReported([[]]),  # type: ignore[list-item]
    "a state that is none": lambda job: messages.RunnerState(None, True, {}),  # type: ignore[arg-type]
    "a step that is none": lambda job: messages.StepMeasured((64, 64), "none", float("nan")),
    "fewer pictures than none": lambda job: messages.ImagesGenerated("test/null", -1, 0),
    "a log that is none": lambda job: messages.LogRecord("x"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_who_reports_what_cannot_be_is_let_go_and_its_request_goes_elsewhere(
    parts: Parts,
    fleet: FakeRayCluster,
    start: Start,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    lie: Callable[[Job], messages.Message],
) -> None:
    monkeypatch.setattr(message_checks, "MAX_BODY", 50_000)
    cluster = start()
    job = submit(parts)
    liar = fleet.next()
    assert liar.taken() == job.request_id
    liar.said.put(lie(job))
    honest = fleet.next()
    assert honest.taken() == job.request_id
    assert (job.attempt, job.crash_count, job.logs) == (2, 0, [])
    honest.said.put(ended(job))
    until(lambda: job.state == State.COMPLETED)
    assert (cluster.failure, cluster.gpus()[0].num_restarts) == (None, 1)
    assert [
        message
        for message in caplog.messages
        if message.startswith("GPU 0: lost its runner, starting another: the runner reported ")
    ]
    assert [(name,) for name in parts.on_disk()] == parts.rows("SELECT name FROM files WHERE name <> ?", NAME)
    assert {path.name for path in parts.folder.parent.iterdir()} == {parts.folder.name}


def test_the_file_of_another_stays_as_it_is(parts: Parts, fleet: FakeRayCluster, start: Start) -> None:
    """Also where the request was cancelled, whose files are deleted."""
    theirs = parts.files.create(b"theirs", "jpg", "image/jpeg", "me", Lifecycle())
    first = finished(parts, theirs)
    cluster = start()
    for is_cancelled in (False, True):
        job = submit(parts)
        liar = fleet.next()
        assert liar.taken() == job.request_id
        if is_cancelled:
            parts.queue.cancel(job)
        liar.said.put(with_file(job, name=theirs.name))
        if not is_cancelled:
            honest = fleet.next()
            assert honest.taken() == job.request_id
            honest.said.put(with_outcome(job))
            until(lambda job=job: job.state == State.COMPLETED)  # type: ignore[misc]
            honest.said.put(RunnerLost("enough"))
    until(lambda: job.state == State.COMPLETED)
    assert parts.files.path(theirs).read_bytes() == b"theirs"
    assert parts.rows("SELECT name, request_id FROM files") == [(theirs.name, first.request_id)]
    assert cluster.failure is None


def two_at_work(
    parts: Parts, fleet: FakeRayCluster, start: Start
) -> tuple[ClusterHead, dict[str, FakeRunner], list[Job]]:
    """Two runners with a request each."""
    fleet.number = 2
    cluster = start()
    links = [fleet.next(), fleet.next()]
    until(lambda: [gpu.state for gpu in cluster.gpus()] == ["ready", "ready"])
    jobs = [submit(parts), submit(parts)]
    return cluster, {link.taken(): link for link in links}, jobs


def test_no_runner_ends_what_another_has_or_what_is_over(parts: Parts, fleet: FakeRayCluster, start: Start) -> None:
    """Nor what was given to nobody, or what never was."""
    cluster, links, (mine, other) = two_at_work(parts, fleet, start)
    waiting = submit(parts)
    liar = links[mine.request_id]
    for name in (other.request_id, waiting.request_id, "never"):
        for report in (
            messages.JobProgress(name, 1, 2, "data:image/jpeg;base64,eA=="),
            messages.JobLog(name, "lies", "INFO"),
            messages.JobFinished(name, Outcome(500, '{"detail": "lies"}', "lies"), {}),
            messages.JobReleased(name),
            messages.JobRejected(name),
            messages.CrashReported([name]),
        ):
            liar.said.put(report)
    # Twice: the second time it is over.
    liar.said.put(with_outcome(mine, body='{"seed": 1}'))
    liar.said.put(with_outcome(mine, status=500, body='{"seed": 2}', error="lies"))
    assert liar.orders.get(timeout=20)[0] == "hear"
    until(lambda: waiting.state == State.IN_PROGRESS)
    liar.said.put(with_outcome(waiting))
    until(lambda: waiting.state == State.COMPLETED)
    assert (other.state, other.attempt, other.crash_count, other.logs, other.preview) == ("IN_PROGRESS", 1, 0, [], None)
    links[other.request_id].said.put(with_outcome(other))
    until(lambda: other.state == State.COMPLETED)
    assert parts.rows("SELECT status, error, attempt FROM jobs") == [(200, None, 1)] * 3
    assert parts.queue.result(mine).body == '{"seed": 1}'
    assert cluster.failure is None
    assert [gpu.num_restarts for gpu in cluster.gpus()] == [0, 0]


def test_the_log_of_a_request_has_an_end(
    parts: Parts, fleet: FakeRayCluster, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_checks, "MAX_LINES", 100)
    start()
    job = submit(parts)
    liar = fleet.next()
    liar.taken()
    for _ in range(101):
        liar.said.put(messages.JobLog(job.request_id, "again", "INFO"))
    assert fleet.next().taken() == job.request_id


def test_what_a_runner_logs_is_cut_short(
    parts: Parts, fleet: FakeRayCluster, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    start()
    long = logging.LogRecord("server.worker.worker", logging.WARNING, "", 0, "x" * 3_000_000, None, None)
    link = fleet.next()
    link.said.put(messages.LogRecord(long))
    until(lambda: any(message.startswith("xxx") for message in caplog.messages))
    assert max(map(len, caplog.messages)) == message_checks.MAX_LINE
    assert fleet.made.empty()


def test_what_an_honest_runner_reports_is_believed() -> None:
    job = Job(1, "one", "test/null", "me", Mode.QUEUE, Priority.NORMAL, "http://here", State.IN_PROGRESS)
    for report in (
        ended(job),
        messages.JobProgress(job.request_id, 2, 2, None),
        messages.RunnerState(LoadProgress(), True, {}),
        messages.StepMeasured((512, 512), "none", 0.0),
        messages.ImagesGenerated("test/null", 4, 1),
        messages.RunnerStopped("the GPU is lost"),
    ):
        message_checks.check(report, {job.request_id: job})


def test_an_input_that_cannot_be_read_holds_up_no_other(parts: Parts, fleet: FakeRayCluster, start: Start) -> None:
    """Of a damaged row; its runner says what is wrong with it."""
    bad = parts.queue.submit(submission(input="nonsense"))
    start()
    link = fleet.next()
    assert link.taken() == bad.request_id
    link.said.put(with_outcome(bad, status=500, error="it cannot be read"))
    good = submit(parts)
    assert link.taken() == good.request_id
    assert bad.error == "it cannot be read"
