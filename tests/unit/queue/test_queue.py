"""Tests of the durable queue on a real SQLite file."""

import json
import logging
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.errors import DiskFull, InvalidInput, NotFound, QueueFull
from server.queue.jobs import Job, Mode, Priority, State
from server.queue.retention import Retention
from server.queue.retry import MAX_ATTEMPTS, MAX_CRASHES
from server.storage.database import Database
from server.storage.file_store import Lifecycle, StoredFile
from server.storage.migrations import DataDirInUse
from tests.support.components import (
    PROVENANCE,
    Clock,
    Components,
    claim_job,
    finish_job,
    full_disk,
    open_components,
    submission,
    success,
)

#: A prompt so long that it needs extra pages in the database.
LONG = {"prompt": "x" * 20_000}


def result_status(components: Components, job: Job) -> tuple[int, str | None]:
    """Return the status and the error type of a job's result."""
    outcome = components.queue.result(job)
    return outcome.status, outcome.error_type


# -- submit, claim, finish


def test_recover_logs_how_many_requests_are_waiting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with open_components(tmp_path) as components:
        components.queue.recover()
        components.queue.submit(submission())
        claim_job(components)
    assert not [line for line in caplog.messages if "wait" in line]
    with open_components(tmp_path) as components:
        components.queue.recover()
    assert "2 requests are waiting" in caplog.messages


def test_a_submitted_job_is_a_row_before_the_call_returns(components: Components) -> None:
    job = components.queue.submit(submission(webhook_url="https://example.com/hook"))
    rows = components.rows("SELECT request_id, state, attempt, owner, webhook_url, submitted_at FROM jobs")
    assert rows == [(job.request_id, "IN_QUEUE", 0, "me", "https://example.com/hook", components.clock.now)]
    assert components.queue.get_cached(job.request_id) is job
    assert components.queue.length == 1


def test_claim_gives_the_input_and_counts_the_attempt(components: Components) -> None:
    sent = submission(fields={"prompt": "a tiger"})
    job = components.queue.submit(sent)
    assert components.queue.claim() == (job, sent.input)
    assert (job.state, job.attempt, components.queue.length) == (State.IN_PROGRESS, 1, 0)
    assert components.rows("SELECT state, attempt, started_at FROM jobs") == [("IN_PROGRESS", 1, components.clock.now)]


def test_claim_of_an_empty_queue_is_none(components: Components) -> None:
    assert components.queue.claim() is None


def test_finish_stores_result_logs_timings_files_and_the_due_webhook(components: Components) -> None:
    job = claim_job(components, webhook_url="https://example.com/hook")
    components.queue.progress(job, 1, 2)
    components.clock.now += 10
    file = StoredFile("a.png", "me", 3, "image/png", is_private=True, expires_at=5.0)
    assert components.queue.finish(job, success('{"seed":7}', file))
    outcome = components.queue.result(job)
    assert (outcome.status, outcome.body, outcome.inference_time) == (200, '{"seed":7}', 1.5)
    ((finished_at, logs, *made),) = components.rows(
        "SELECT finished_at, logs, acceleration, dtype, weights, memory FROM jobs"
    )
    assert (finished_at, made) == (components.clock.now, list(PROVENANCE.values()))
    assert [line["message"] for line in json.loads(logs)] == ["step 1/2"]
    row = ("a.png", job.request_id, "me", 3, "image/png", None, 1, components.clock.now, 5.0)
    assert components.rows("SELECT * FROM files") == [row]
    assert components.rows("SELECT request_id, attempt, due_at FROM deliveries") == [
        (job.request_id, 0, components.clock.now)
    ]


def test_no_webhook_is_due_for_a_request_without_one(components: Components) -> None:
    finish_job(components)
    assert components.rows("SELECT * FROM deliveries") == []


def test_a_finished_job_cannot_be_finished_again(components: Components) -> None:
    job = finish_job(components)
    with pytest.raises(RuntimeError):
        components.queue.finish(job, success('{"seed":8}'))
    assert components.queue.result(job).body == '{"seed":7}'


def test_only_the_running_attempt_can_finish(components: Components) -> None:
    job = claim_job(components)
    with components.database.transaction() as connection:
        connection.execute("UPDATE jobs SET attempt = 2")
    with pytest.raises(RuntimeError):
        components.queue.finish(job, success())
    assert components.rows("SELECT state FROM jobs") == [("IN_PROGRESS",)]


def test_each_job_is_claimed_by_one_thread_only(components: Components) -> None:
    with ThreadPoolExecutor(4) as threads:
        submitted = set(threads.map(lambda _: components.queue.submit(submission()).request_id, range(40)))
        found = list(threads.map(lambda _: components.queue.claim(), range(50)))
    assert sorted(job.request_id for job, _ in filter(None, found)) == sorted(submitted)


def test_the_worker_is_woken_by_submit_and_cancel(components: Components) -> None:
    job = components.queue.submit(submission())
    assert components.notifier.work_available.is_set()
    components.notifier.work_available.clear()
    components.queue.cancel(job)
    assert components.notifier.work_available.is_set()


# -- order


def test_normal_priority_runs_before_low_and_each_in_order_of_arrival(components: Components) -> None:
    priorities = [Priority.LOW, Priority.NORMAL, Priority.LOW, Priority.NORMAL]
    jobs = [components.queue.submit(submission(priority=priority)) for priority in priorities]
    assert [components.queue.position(job) for job in jobs] == [2, 0, 3, 1]
    order = [found[0] for _ in jobs if (found := components.queue.claim())]
    assert order == [jobs[1], jobs[3], jobs[0], jobs[2]]


def test_positions_move_up(components: Components) -> None:
    first, second, third = (components.queue.submit(submission()) for _ in range(3))
    components.queue.claim()
    assert [components.queue.position(job) for job in (second, third)] == [0, 1]
    components.queue.cancel(second)
    assert components.queue.position(third) == 0
    assert first.state == State.IN_PROGRESS


def test_a_released_job_returns_to_its_old_position(components: Components) -> None:
    job = claim_job(components)
    later = components.queue.submit(submission())
    components.queue.release(job)
    assert (job.state, components.queue.position(job), components.queue.position(later)) == (State.IN_QUEUE, 0, 1)
    assert components.queue.claim()
    assert job.attempt == 2


def test_releasing_a_cancelled_job_ends_it(components: Components) -> None:
    job = claim_job(components)
    components.queue.cancel(job)
    components.queue.release(job)
    assert result_status(components, job) == (499, "client_cancelled")


def test_without_low_priority_only_normal_jobs_are_claimed(components: Components) -> None:
    low = components.queue.submit(submission(priority=Priority.LOW))
    assert components.queue.claim(include_low_priority=False) is None
    normal = components.queue.submit(submission())
    found = components.queue.claim(include_low_priority=False)
    assert found and found[0] is normal
    assert components.queue.claim(include_low_priority=False) is None
    assert (low.state, low.attempt, components.queue.position(low)) == (State.IN_QUEUE, 0, 0)
    found = components.queue.claim()
    assert found and found[0] is low


def test_an_expired_normal_job_does_not_let_a_low_priority_job_be_claimed(components: Components) -> None:
    components.queue.submit(submission(start_deadline=components.clock.now + 5))
    low = components.queue.submit(submission(priority=Priority.LOW))
    components.clock.now += 5
    assert components.queue.claim(include_low_priority=False) is None
    assert low.state == State.IN_QUEUE


# -- cancel and disconnect


def test_cancel_of_a_queued_job_ends_it_at_once(components: Components) -> None:
    job = components.queue.submit(submission(webhook_url="https://example.com/hook"))
    assert components.queue.cancel(job) == State.IN_QUEUE
    assert result_status(components, job) == (499, "client_cancelled")
    assert components.queue.claim() is None
    assert components.queue.cancel(job) == State.COMPLETED
    assert len(components.rows("SELECT * FROM deliveries")) == 1


def test_cancel_of_a_running_job_is_a_request_until_its_next_step(components: Components) -> None:
    job = claim_job(components)
    assert [components.queue.cancel(job), components.queue.cancel(job)] == [State.IN_PROGRESS, State.IN_PROGRESS]
    assert (job.state, job.is_cancelled) == (State.IN_PROGRESS, True)
    assert components.rows("SELECT state, is_cancelled FROM jobs") == [("IN_PROGRESS", 1)]


def test_an_image_that_is_ready_after_the_cancel_is_discarded(components: Components) -> None:
    job = claim_job(components)
    components.queue.cancel(job)
    assert not components.queue.finish(job, success("{}", StoredFile("a.png", "me", 3, "image/png")))
    assert result_status(components, job) == (499, "client_cancelled")
    assert components.rows("SELECT * FROM files") == []
    assert json.loads(components.queue.result(job).body)["error_type"] == "client_cancelled"


def test_cancel_of_a_completed_job_changes_nothing(components: Components) -> None:
    job = finish_job(components)
    assert components.queue.cancel(job) == State.COMPLETED
    assert result_status(components, job) == (200, None)


@pytest.mark.parametrize("mode", [Mode.RUN, Mode.STREAM])
def test_a_client_that_disconnects_ends_its_queued_job(components: Components, mode: Mode) -> None:
    job = components.queue.submit(submission(mode=mode))
    components.queue.cancel(job)
    assert result_status(components, job) == (499, "client_disconnected")
    assert components.queue.claim() is None


@pytest.mark.parametrize("mode", [Mode.RUN, Mode.STREAM])
def test_a_client_that_disconnects_ends_its_running_job(components: Components, mode: Mode) -> None:
    job = claim_job(components, mode=mode)
    components.queue.cancel(job)
    assert not components.queue.finish(job, success())
    assert result_status(components, job) == (499, "client_disconnected")


def test_a_disconnect_after_the_end_changes_nothing(components: Components) -> None:
    job = finish_job(components, mode=Mode.RUN)
    components.queue.cancel(job)
    assert result_status(components, job) == (200, None)


# -- deadlines


def test_a_job_that_did_not_start_in_time_ends_as_504(components: Components) -> None:
    expired = components.queue.submit(submission(start_deadline=components.clock.now + 5))
    waiting = components.queue.submit(submission(start_deadline=components.clock.now + 6))
    components.clock.now += 4.9
    assert components.queue.fail_expired() == 0
    components.clock.now += 0.1
    assert components.queue.fail_expired() == 1
    assert result_status(components, expired) == (504, "request_timeout")
    assert (waiting.state, components.queue.position(waiting)) == (State.IN_QUEUE, 0)


def test_a_job_past_its_deadline_is_not_claimed(components: Components) -> None:
    components.queue.submit(submission(start_deadline=components.clock.now + 5))
    components.clock.now += 5
    assert components.queue.claim() is None
    follower = components.queue.submit(submission())
    assert components.queue.claim() == (follower, submission().input)


def test_a_job_that_started_in_time_may_take_as_long_as_it_needs(components: Components) -> None:
    job = claim_job(components, start_deadline=components.clock.now + 5)
    components.clock.now += 3600
    assert components.queue.fail_expired() == 0
    assert components.queue.finish(job, success())


# -- limits


def test_a_full_queue_refuses_until_there_is_room(tmp_path: Path) -> None:
    with open_components(tmp_path, max_length=2) as components:
        components.queue.submit(submission())
        components.queue.submit(submission())
        with pytest.raises(QueueFull):
            components.queue.submit(submission())
        components.queue.claim()
        assert components.queue.submit(submission())


def test_a_client_may_ask_for_a_shorter_queue_but_not_a_longer(tmp_path: Path) -> None:
    with open_components(tmp_path, max_length=2) as components:
        components.queue.submit(submission())
        with pytest.raises(QueueFull):
            components.queue.submit(submission(max_queue_length=1))
        components.queue.submit(submission(max_queue_length=2))
        with pytest.raises(QueueFull):
            components.queue.submit(submission(max_queue_length=100))


def test_a_repeated_idempotency_key_returns_the_same_request(components: Components) -> None:
    first = components.queue.submit(submission(idempotency_key="k"))
    assert components.queue.submit(submission(idempotency_key="k")) is first
    components.queue.claim()
    components.queue.finish(first, success())
    assert components.queue.submit(submission(idempotency_key="k")) is first
    assert len(components.rows("SELECT * FROM jobs")) == 1


def test_a_repeated_idempotency_key_returns_the_same_request_after_a_restart(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        first = finish_job(components, idempotency_key="k")
    with open_components(tmp_path) as components:
        again = components.queue.submit(submission(idempotency_key="k"))
    assert (again.request_id, again.state) == (first.request_id, State.COMPLETED)


def test_a_repeated_idempotency_key_is_accepted_when_the_queue_is_full(tmp_path: Path) -> None:
    with open_components(tmp_path, max_length=1) as components:
        first = components.queue.submit(submission(idempotency_key="k"))
        assert components.queue.submit(submission(idempotency_key="k")) is first


def test_an_idempotency_key_with_another_body_is_refused(components: Components) -> None:
    components.queue.submit(submission(idempotency_key="k"))
    with pytest.raises(InvalidInput) as refused:
        components.queue.submit(submission(idempotency_key="k", body_hash="1" * 64))
    assert refused.value.status == 422
    assert refused.value.detail[0]["loc"] == ["header", "idempotency-key"]


@pytest.mark.parametrize("other", [{"owner": "you"}, {"endpoint": "test/gate"}])
def test_an_idempotency_key_belongs_to_its_owner_and_endpoint(components: Components, other: dict[str, Any]) -> None:
    first = components.queue.submit(submission(idempotency_key="k"))
    assert components.queue.submit(submission(idempotency_key="k", **other)) is not first


# -- restarts


def test_recover_requeues_running_jobs_at_their_old_position_with_their_attempt(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        running, waiting = claim_job(components), components.queue.submit(submission())
    with open_components(tmp_path) as components:
        assert components.queue.recover() == 2
        requeued, waiting_again = (components.queue.get_cached(job.request_id) for job in (running, waiting))
        assert requeued and waiting_again
        assert (requeued.state, requeued.attempt, components.queue.position(requeued)) == (State.IN_QUEUE, 1, 0)
        assert (waiting_again.state, waiting_again.attempt) == (State.IN_QUEUE, 0)
        assert components.queue.position(waiting_again) == 1
        assert components.queue.claim() == (requeued, submission().input)
        assert requeued.attempt == 2


def test_recover_wakes_the_worker(components: Components) -> None:
    components.queue.recover()
    assert components.notifier.work_available.is_set()


def test_recover_ends_cancelled_jobs(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        job = claim_job(components)
        components.queue.cancel(job)
    with open_components(tmp_path) as components:
        assert components.queue.recover() == 0
        assert result_status(components, job) == (499, "client_cancelled")


@pytest.mark.parametrize("mode", [Mode.RUN, Mode.STREAM])
@pytest.mark.parametrize("is_running", [True, False])
@pytest.mark.parametrize("is_cancelled", [True, False])
def test_recover_ends_jobs_whose_client_cannot_wait_any_longer(
    tmp_path: Path, mode: Mode, is_running: bool, is_cancelled: bool
) -> None:
    with open_components(tmp_path) as components:
        job = claim_job(components, mode=mode) if is_running else components.queue.submit(submission(mode=mode))
        if is_cancelled:
            components.queue.cancel(job)
    with open_components(tmp_path) as components:
        assert components.queue.recover() == 0
        assert result_status(components, job) == (499, "client_disconnected")


def test_recover_gives_up_after_ten_attempts(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        request_id = components.queue.submit(submission()).request_id
    for attempt in range(1, MAX_ATTEMPTS + 1):
        with open_components(tmp_path) as components:
            assert components.queue.recover() == 1
            found = components.queue.claim()
            assert found and found[0].attempt == attempt
    with open_components(tmp_path) as components:
        assert components.queue.recover() == 0
        job = components.queue.get(request_id)
        assert job and result_status(components, job) == (500, "internal_error")
        assert "10 attempts" in components.queue.result(job).body


# -- crashes


def test_the_crash_count_survives_a_restart(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        job, other = claim_job(components), claim_job(components)
        components.queue.record_crash([job])
        components.queue.record_crash([job, other])
        assert components.rows("SELECT strikes, state FROM jobs") == [(2, "IN_PROGRESS"), (1, "IN_PROGRESS")]
    with open_components(tmp_path) as components:
        assert components.queue.recover() == 2
        again = components.queue.claim()
        assert again and (again[0].request_id, again[0].crash_count) == (job.request_id, 2)


def test_a_crash_counts_only_for_running_jobs(components: Components) -> None:
    done, waiting = finish_job(components), claim_job(components)
    components.queue.release(waiting)
    components.queue.record_crash([done, waiting])
    assert components.rows("SELECT strikes FROM jobs") == [(0,), (0,)]


def test_a_crash_of_another_attempt_is_refused(components: Components) -> None:
    job, other = claim_job(components), claim_job(components)
    with components.database.transaction() as connection:
        connection.execute("UPDATE jobs SET attempt = 2 WHERE request_id = ?", (job.request_id,))
    with pytest.raises(RuntimeError):
        components.queue.record_crash([other, job])
    assert components.rows("SELECT strikes FROM jobs") == [(0,), (0,)]


@pytest.mark.parametrize("is_running", [True, False])
def test_recover_gives_up_after_three_crashes(tmp_path: Path, is_running: bool) -> None:
    with open_components(tmp_path) as components:
        job = claim_job(components, webhook_url="https://example.com/hook")
        for _ in range(MAX_CRASHES):
            components.queue.record_crash([job])
        if not is_running:
            components.queue.release(job)
        other = claim_job(components) if is_running else components.queue.submit(submission())
    with open_components(tmp_path) as components:
        assert components.queue.recover() == 1
        assert result_status(components, job) == (500, "internal_error")
        assert "crashed 3 times while it ran this request" in components.queue.result(job).body
        assert components.rows("SELECT request_id FROM deliveries") == [(job.request_id,)]
        found = components.queue.claim()
        assert found and found[0].request_id == other.request_id


def test_recover_requeues_a_job_after_two_crashes(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        job = claim_job(components)
        for _ in range(MAX_CRASHES - 1):
            components.queue.record_crash([job])
    with open_components(tmp_path) as components:
        assert components.queue.recover() == 1


def test_a_cancel_takes_precedence_over_crashes(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        job = claim_job(components)
        for _ in range(MAX_CRASHES):
            components.queue.record_crash([job])
        components.queue.cancel(job)
    with open_components(tmp_path) as components:
        assert components.queue.recover() == 0
        assert result_status(components, job) == (499, "client_cancelled")


def test_close_and_reopen_keeps_everything(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        finish_job(components, StoredFile("a.png", "me", 3, "image/png"), webhook_url="https://example.com/hook")
        claim_job(components, priority=Priority.LOW, start_deadline=5e9, lifecycle=Lifecycle(60.0), store_io=False)
        components.queue.submit(submission(idempotency_key="k"))
        before = {table: components.rows(f"SELECT * FROM {table}") for table in ("jobs", "files", "deliveries")}
    with open_components(tmp_path) as components:
        assert before == {table: components.rows(f"SELECT * FROM {table}") for table in before}
        assert components.rows("PRAGMA integrity_check") == [("ok",)]


def test_recover_restores_the_options_of_the_request(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "priority": Priority.LOW,
        "start_deadline": 5e9,
        "lifecycle": Lifecycle(60.0, is_private=True),
        "store_io": False,
    }
    with open_components(tmp_path) as components:
        request_id = components.queue.submit(submission(**options)).request_id
    with open_components(tmp_path) as components:
        components.queue.recover()
        job = components.queue.get_cached(request_id)
        assert job and {name: getattr(job, name) for name in options} == options


# -- memory and rows


def test_a_job_evicted_from_memory_is_read_from_its_row(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.queue.queue.RECENT", 1)
    job = claim_job(components)
    components.queue.progress(job, 1, 1)
    components.queue.finish(job, success())
    finish_job(components)
    assert components.queue.get_cached(job.request_id) is None
    loaded = components.queue.get(job.request_id)
    assert loaded and (loaded.state, loaded.inference_time, loaded.provenance) == (State.COMPLETED, 1.5, PROVENANCE)
    assert [line["message"] for line in loaded.logs] == ["step 1/1"]
    assert components.queue.cancel(loaded) == State.COMPLETED
    assert components.queue.result(loaded).status == 200


def test_an_unknown_id_is_none(components: Components) -> None:
    assert components.queue.get("00000000-0000-0000-0000-000000000000") is None


def test_the_first_fetch_is_recorded_for_results_that_are_not_stored(components: Components) -> None:
    job, kept = finish_job(components, store_io=False), finish_job(components)
    fetched_at = components.clock.now
    for _ in range(2):
        components.queue.result(job)
        components.queue.result(kept)
        components.clock.now += 100
    assert components.rows("SELECT fetched_at FROM jobs ORDER BY sequence") == [(fetched_at,), (None,)]


def test_the_result_of_a_job_that_was_just_deleted_is_not_found(components: Components) -> None:
    job = finish_job(components)
    components.clock.now += 10
    Retention(
        components.database, components.queue, components.files, max_age=10, max_bytes=1e9, clock=components.clock
    ).sweep()
    with pytest.raises(NotFound):
        components.queue.result(job)


def test_positions_can_be_read_while_a_transaction_is_open(components: Components) -> None:
    job = components.queue.submit(submission())
    writer_started, writer_may_finish = threading.Event(), threading.Event()

    def write_slowly() -> None:
        with components.database.transaction():
            writer_started.set()
            writer_may_finish.wait()

    writer = threading.Thread(target=write_slowly)
    writer.start()
    assert writer_started.wait(60)
    assert (components.queue.get_cached(job.request_id), components.queue.position(job), components.queue.length) == (
        job,
        0,
        1,
    )
    writer_may_finish.set()
    writer.join()


# -- the disk is full


def test_a_request_is_refused_when_the_disk_is_full(components: Components) -> None:
    with full_disk(components), pytest.raises(DiskFull):
        components.queue.submit(submission(fields=LONG))
    assert (components.queue.length, components.rows("SELECT * FROM jobs")) == (0, [])
    assert components.queue.submit(submission(fields=LONG)).state == State.IN_QUEUE


def test_a_job_can_be_finished_again_after_the_disk_was_full(components: Components) -> None:
    job = claim_job(components, webhook_url="https://example.com/hook")
    outcome = success(json.dumps(LONG), StoredFile("a.png", "me", 3, "image/png"))
    with full_disk(components), pytest.raises(DiskFull):
        components.queue.finish(job, outcome)
    assert (job.state, components.rows("SELECT state FROM jobs")) == (State.IN_PROGRESS, [("IN_PROGRESS",)])
    assert components.rows("SELECT * FROM files") == components.rows("SELECT * FROM deliveries") == []
    assert components.queue.finish(job, outcome)
    assert components.rows("PRAGMA integrity_check") == [("ok",)]


def test_a_result_can_be_fetched_when_the_disk_is_too_full_to_record_the_fetch(
    components: Components, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = finish_job(components, store_io=False)

    def raise_disk_full(*_: object) -> None:
        raise DiskFull

    with monkeypatch.context() as patched:
        patched.setattr("server.queue.job_table.mark_fetched", raise_disk_full)
        assert components.queue.result(job).body == '{"seed":7}'
    assert "the disk is full" in caplog.text
    assert components.rows("SELECT fetched_at FROM jobs") == [(None,)]
    components.clock.now += 100
    assert components.queue.result(job).status == 200
    assert components.rows("SELECT fetched_at FROM jobs") == [(components.clock.now,)]


def test_other_sqlite_errors_are_not_reported_as_a_full_disk(components: Components) -> None:
    with pytest.raises(sqlite3.OperationalError), components.database.transaction() as connection:
        connection.execute("SELECT * FROM nothing")


def test_a_transaction_that_fails_changes_nothing(components: Components) -> None:
    components.queue.submit(submission())
    with pytest.raises(KeyError), components.database.transaction() as connection:
        connection.execute("DELETE FROM jobs")
        raise KeyError
    assert len(components.rows("SELECT * FROM jobs")) == 1


# -- the file


def test_every_commit_is_synced(components: Components) -> None:
    pragmas = ("journal_mode", "synchronous", "mmap_size", "foreign_keys")
    found = {name: components.rows(f"PRAGMA {name}")[0][0] for name in pragmas}
    assert found == {"journal_mode": "wal", "synchronous": 2, "mmap_size": 0, "foreign_keys": 1}


def test_a_data_directory_has_one_server(tmp_path: Path) -> None:
    with (
        open_components(tmp_path),
        pytest.raises(DataDirInUse, match=f"another server is using {tmp_path}.*--data-dir"),
    ):
        Database(tmp_path)
    with open_components(tmp_path) as components:
        assert components.queue.length == 0


def test_a_data_directory_of_a_newer_server_is_refused(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        components.rows("PRAGMA user_version = 99")
    with pytest.raises(DataDirInUse, match="newer"):
        Database(tmp_path)


INVALID_STATEMENTS = [
    "UPDATE jobs SET state = 'LOST'",
    "UPDATE jobs SET mode = 'later'",
    "UPDATE jobs SET priority = 'high'",
    "UPDATE jobs SET attempt = -1",
    "UPDATE jobs SET strikes = -1",
    "UPDATE jobs SET strikes = NULL",
    "UPDATE jobs SET is_kept = 2",
    "UPDATE jobs SET state = 'COMPLETED'",
    "UPDATE jobs SET state = 'COMPLETED', finished_at = 1, status = 200",
    "UPDATE jobs SET state = 'COMPLETED', finished_at = 1, output = '{}'",
    "UPDATE jobs SET state = 'COMPLETED', status = 200, output = '{}'",
    "UPDATE jobs SET state = 'COMPLETED', finished_at = 1, status = 200, output = '{}', is_cancelled = 1",
    "UPDATE jobs SET output = '{}'",
    "UPDATE jobs SET state = 'IN_PROGRESS'",
    "UPDATE jobs SET state = 'IN_PROGRESS', attempt = 1",
    "UPDATE jobs SET is_cancelled = 1",
    "UPDATE jobs SET fetched_at = 1",
    "UPDATE jobs SET owner = NULL",
    "UPDATE jobs SET submitted_at = 'yesterday'",
    "UPDATE jobs SET is_private = 2",
    "INSERT INTO files VALUES ('a.png', 'nobody', 'me', 1, 'image/png', NULL, 0, 1, NULL)",
    "INSERT INTO files VALUES ('a.png', NULL, 'me', -1, 'image/png', NULL, 0, 1, NULL)",
    "INSERT INTO files VALUES ('a.png', NULL, 'me', 1, 'image/png', NULL, 2, 1, NULL)",
    "INSERT INTO files VALUES ('a.png', NULL, NULL, 1, 'image/png', NULL, 0, 1, NULL)",
    "INSERT INTO uploads VALUES ('u', 'a.png', NULL, 'image/png', 'a', 0, NULL, 1)",
    "INSERT INTO uploads VALUES ('u', 'a.png', 'me', 'image/png', 'a', 2, NULL, 1)",
    "INSERT INTO uploads VALUES ('u', 'a', 'me', 't', 'f', 0, NULL, 1), ('v', 'a', 'me', 't', 'f', 0, NULL, 1)",
    "INSERT INTO deliveries (request_id, url) VALUES ('nobody', 'https://example.com')",
    "INSERT INTO deliveries (request_id, url, due_at, delivered_at) SELECT request_id, 'u', 1, 1 FROM jobs",
    "INSERT INTO keys VALUES ('short', 'me', 1, '', 'client')",
]


@pytest.mark.parametrize("statement", INVALID_STATEMENTS)
def test_the_schema_refuses_invalid_rows(components: Components, statement: str) -> None:
    components.queue.submit(submission())
    with pytest.raises(sqlite3.IntegrityError), components.database.transaction() as connection:
        connection.execute(statement)


def test_deleting_a_job_deletes_its_files_and_its_webhook(components: Components) -> None:
    finish_job(components, StoredFile("a.png", "me", 3, "image/png"), webhook_url="https://example.com/hook")
    with components.database.transaction() as connection:
        connection.execute("DELETE FROM jobs")
    assert components.rows("SELECT * FROM files") == components.rows("SELECT * FROM deliveries") == []


def test_times_come_from_the_injected_clock(tmp_path: Path) -> None:
    with open_components(tmp_path, clock=Clock(12345.0)) as components:
        finish_job(components)
        assert components.rows("SELECT submitted_at, started_at, finished_at FROM jobs") == [
            (12345.0, 12345.0, 12345.0)
        ]
