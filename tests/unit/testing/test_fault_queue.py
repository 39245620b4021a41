"""Tests of the queue for tests: faults, holds, delays and records, on a real SQLite file with a manual clock."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.auth import ANONYMOUS
from server.errors import InvalidInput, ServerError, TooManyRequests
from server.queue.jobs import Job, State
from server.testing.fault import Fault
from server.testing.fault_queue import FaultQueue
from tests.support.components import Components, open_components, submission, success


@pytest.fixture
def components(tmp_path: Path) -> Iterator[Components]:
    """Open the components with a queue for tests."""
    with open_components(tmp_path, queue_type=FaultQueue) as components:
        yield components


@pytest.fixture
def queue(components: Components) -> FaultQueue:
    """Return the queue for tests."""
    assert isinstance(components.queue, FaultQueue)
    return components.queue


def claimed(queue: FaultQueue) -> Job | None:
    """Claim the next job; return it, or None."""
    claim = queue.claim()
    return claim[0] if claim else None


def test_without_faults_it_is_a_queue(queue: FaultQueue) -> None:
    sent = submission()
    job = queue.submit(sent)
    assert queue.claim() == (job, sent.input)
    assert queue.claim() is None


def test_a_refusal_raises_the_error_once(queue: FaultQueue) -> None:
    queue.plan("me", Fault(status=429, retry_after=3))
    with pytest.raises(TooManyRequests) as refusal:
        queue.submit(submission())
    assert refusal.value.headers["retry-after"] == "3"
    assert queue.length == 0
    queue.submit(submission())
    first, second = queue.requests("me")
    assert (first["status"], first["refused"], first["request_id"]) == ("REFUSED", 429, None)
    assert (second["status"], second["refused"]) == ("IN_QUEUE", None)


def test_faults_come_in_their_order_and_as_often_as_asked(queue: FaultQueue) -> None:
    queue.plan("me", Fault(status=429, times=2))
    queue.plan("me", Fault(status=404))
    statuses = []
    for _ in range(3):
        with pytest.raises(ServerError) as refusal:
            queue.submit(submission())
        statuses.append(refusal.value.status)
    assert statuses == [429, 429, 404]
    assert queue.submit(submission()).state == State.IN_QUEUE


def test_a_fault_waits_for_its_endpoint(queue: FaultQueue) -> None:
    queue.plan("me", Fault(status=429, endpoint="test/other"))
    queue.submit(submission("test/null"))
    with pytest.raises(TooManyRequests):
        queue.submit(submission("test/other"))


@pytest.mark.parametrize("status", [422, 500, 504])
def test_a_failure_ends_the_job_instead_of_a_claim(queue: FaultQueue, status: int) -> None:
    queue.plan("me", Fault(status=status))
    job, next_job = queue.submit(submission()), queue.submit(submission())
    assert claimed(queue) is next_job
    assert job.state == State.COMPLETED
    assert not job.is_cancelled
    assert queue.result(job).status == status


def test_a_cancellation_ends_the_job_as_cancelled(queue: FaultQueue) -> None:
    queue.plan("me", Fault(status=499))
    job = queue.submit(submission())
    assert claimed(queue) is None
    assert (job.state, job.is_cancelled, queue.result(job).status) == (State.COMPLETED, True, 499)
    assert queue.requests("me")[0]["is_cancelled"]


def test_a_delayed_job_is_in_progress_until_its_time(components: Components, queue: FaultQueue) -> None:
    queue.plan("me", Fault(delay=5))
    job, other = queue.submit(submission()), queue.submit(submission())
    assert claimed(queue) is other
    assert job.state == State.IN_PROGRESS
    components.clock.now += 4.9
    assert claimed(queue) is None
    components.clock.now += 0.1
    assert claimed(queue) is job
    assert queue.finish(job, success())


def test_the_worker_is_woken_when_a_delay_is_over(components: Components, queue: FaultQueue) -> None:
    queue.plan("me", Fault(delay=5))
    queue.submit(submission())
    queue.claim()
    components.notifier.work_available.clear()
    queue.fail_expired()
    assert not components.notifier.work_available.is_set()
    components.clock.now += 5
    queue.fail_expired()
    assert components.notifier.work_available.is_set()


def test_a_delayed_failure(components: Components, queue: FaultQueue) -> None:
    queue.plan("me", Fault(delay=5, status=500))
    job = queue.submit(submission())
    assert claimed(queue) is None
    assert job.state == State.IN_PROGRESS
    components.clock.now += 5
    assert claimed(queue) is None
    assert queue.result(job).status == 500


def test_a_delayed_job_that_is_cancelled_goes_to_the_worker_at_once(queue: FaultQueue) -> None:
    queue.plan("me", Fault(delay=5, status=500))
    job = queue.submit(submission())
    assert claimed(queue) is None
    assert queue.cancel(job) == State.IN_PROGRESS
    assert claimed(queue) is job
    assert not queue.finish(job, success())
    assert queue.result(job).status == 499


def test_a_held_job_waits_until_it_is_released(queue: FaultQueue) -> None:
    hold = queue.plan("me", Fault(hold=True))
    job, other = queue.submit(submission()), queue.submit(submission())
    assert claimed(queue) is other
    assert claimed(queue) is None
    assert job.state == State.IN_QUEUE
    assert queue.release_held("me", "of another fault") == 0
    assert queue.release_held("me", hold) == 1
    assert claimed(queue) is job


def test_a_hold_that_no_request_has_taken_can_be_released(queue: FaultQueue) -> None:
    hold = queue.plan("me", Fault(hold=True))
    assert queue.release_held("me", hold) == 0
    job = queue.submit(submission())
    assert claimed(queue) is job


def test_a_held_job_has_the_position_that_the_test_set(queue: FaultQueue) -> None:
    queue.plan("me", Fault(hold=True, queue_position=7))
    queue.plan("me", Fault(hold=True))
    job, other = queue.submit(submission()), queue.submit(submission())
    assert (queue.position(job), queue.position(other)) == (7, 0)
    queue.release_held("me")
    assert (queue.position(job), queue.position(other)) == (0, 1)


def test_a_held_job_can_be_cancelled_and_is_not_released_then(queue: FaultQueue) -> None:
    queue.plan("me", Fault(hold=True))
    job = queue.submit(submission())
    assert queue.cancel(job) == State.IN_QUEUE
    assert job.state == State.COMPLETED
    assert queue.release_held("me") == 0
    assert claimed(queue) is None


def test_the_start_deadline_of_a_held_job_counts(components: Components, queue: FaultQueue) -> None:
    queue.plan("me", Fault(hold=True))
    job = queue.submit(submission(start_deadline=components.clock.now + 2))
    components.clock.now += 2
    assert queue.fail_expired() == 1
    assert queue.result(job).status == 504
    assert queue.release_held("me") == 0


def test_only_flagged_jobs_get_the_checkers_verdict(queue: FaultQueue) -> None:
    queue.plan("me", Fault(flag=True))
    assert [queue.submit(submission()).verdict for _ in range(2)] == [True, False]


def test_a_late_webhook_is_due_later(components: Components, queue: FaultQueue) -> None:
    queue.plan("me", Fault(webhook_delay=30, webhook_copies=2))
    job = queue.submit(submission(webhook_url="http://here/hook"))
    assert claimed(queue) is job
    queue.finish(job, success())
    assert components.rows("SELECT due_at FROM deliveries") == [(components.clock.now + 30,)]
    assert queue.webhook_copies(job.request_id) == 2
    assert queue.webhook_copies("of another request") == 1


def test_a_repeated_idempotency_key_takes_no_fault(queue: FaultQueue) -> None:
    job = queue.submit(submission(idempotency_key="a"))
    queue.plan("me", Fault(flag=True))
    assert queue.submit(submission(idempotency_key="a")) is job
    assert not job.verdict
    assert [request["idempotency_key"] for request in queue.requests("me")] == ["a", "a"]
    assert queue.submit(submission(idempotency_key="b")).verdict


def test_an_idempotency_key_is_new_after_a_reset(queue: FaultQueue) -> None:
    job = queue.submit(submission(idempotency_key="a"))
    queue.reset("me")
    queue.plan("me", Fault(flag=True))
    other = queue.submit(submission(idempotency_key="a", body_hash="1" * 64))
    assert other is not job
    assert other.verdict


def test_a_job_that_ended_before_a_restart_is_not_held(components: Components, queue: FaultQueue) -> None:
    job = queue.submit(submission(idempotency_key="a"))
    assert claimed(queue) is job
    queue.finish(job, success())
    restarted = FaultQueue(components.database, components.notifier, clock=components.clock)
    restarted.plan("me", Fault(hold=True))
    assert restarted.submit(submission(idempotency_key="a")).state == State.COMPLETED
    held = restarted.submit(submission())
    assert restarted.release_held("me") == 1
    assert claimed(restarted) == held
    assert claimed(restarted) is None


def test_refusals_of_the_queue_itself_are_recorded(queue: FaultQueue) -> None:
    queue.submit(submission(idempotency_key="a"))
    with pytest.raises(InvalidInput):
        queue.submit(submission(idempotency_key="a", body_hash="1" * 64))
    assert queue.requests("me")[1]["refused"] == 422


def test_owners_do_not_disturb_each_other(queue: FaultQueue) -> None:
    queue.plan("you", Fault(status=429))
    held = queue.plan("you", Fault(hold=True))
    job = queue.submit(submission(owner="me"))
    assert queue.requests("you") == []
    with pytest.raises(TooManyRequests):
        queue.submit(submission(owner="you"))
    yours = queue.submit(submission(owner="you"))
    assert queue.release_held("me", held) == 0
    queue.reset("me")
    assert (job.state, yours.state) == (State.COMPLETED, State.IN_QUEUE)
    assert queue.requests("me") == []
    assert len(queue.requests("you")) == 2


def test_without_a_key_a_test_concerns_all_requests(queue: FaultQueue) -> None:
    queue.plan(ANONYMOUS, Fault(status=429))
    with pytest.raises(TooManyRequests):
        queue.submit(submission(owner="me"))
    queue.plan("you", Fault(hold=True))
    job = queue.submit(submission(owner="you"))
    assert [request["status"] for request in queue.requests(ANONYMOUS)] == ["REFUSED", "IN_QUEUE"]
    assert queue.release_held(ANONYMOUS) == 1
    queue.reset(ANONYMOUS)
    assert job.state == State.COMPLETED
    assert queue.requests(ANONYMOUS) == []


def test_reset_leaves_no_fault_no_job_and_no_webhook(components: Components, queue: FaultQueue) -> None:
    """Check a running, a delayed, a held and a finished job, and a fault that no request has taken."""
    hook = "http://here/hook"
    finished, running = (queue.submit(submission(webhook_url=hook)) for _ in range(2))
    assert (claimed(queue), claimed(queue)) == (finished, running)
    queue.finish(finished, success())
    queue.plan("me", Fault(delay=5))
    delayed = queue.submit(submission(webhook_url=hook))
    assert claimed(queue) is None
    queue.plan("me", Fault(hold=True))
    held = queue.submit(submission(webhook_url=hook))
    queue.plan("me", Fault(status=500))
    queue.reset("me")
    assert held.state == State.COMPLETED
    assert running.is_cancelled
    assert delayed.is_cancelled
    assert claimed(queue) is delayed
    for job in (running, delayed):
        queue.finish(job, success())
    assert components.rows("SELECT count(*) FROM deliveries") == [(0,)]
    job = queue.submit(submission())
    assert claimed(queue) is job
