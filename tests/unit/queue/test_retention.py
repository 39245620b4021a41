"""Which results and files retention deletes, and when."""

from typing import Any

import pytest

from server.queue.jobs import Job, State
from server.queue.retention import GRACE_SECONDS, Retention
from server.storage.file_store import Lifecycle, StoredFile, insert_file_row
from tests.support.components import Components, claim_job, finish_job, submission

DAY = 86_400.0


def retention(parts: Components, max_age: float = 7 * DAY, max_bytes: float = 1e9) -> Retention:
    """Return a retention policy; the defaults are one week and one gigabyte."""
    return Retention(parts.database, parts.queue, parts.files, max_age=max_age, max_bytes=max_bytes, clock=parts.clock)


def finished_with_image(parts: Components, size: int = 100, lifetime: float | None = None, **changes: Any) -> Job:
    """Finish a job with one image of `size` bytes."""
    owner = changes.get("owner", "me")
    return finish_job(parts, parts.files.create(b"x" * size, "png", "image/png", owner, Lifecycle(lifetime)), **changes)


def known_ids(parts: Components) -> list[str]:
    """Return the ids of the jobs that still have a row, oldest first."""
    return [request_id for (request_id,) in parts.rows("SELECT request_id FROM jobs ORDER BY sequence")]


def test_results_and_images_are_deleted_by_age(parts: Components) -> None:
    old = finished_with_image(parts)
    parts.clock.now += DAY
    young = finished_with_image(parts)
    parts.clock.now += 6 * DAY - 1
    assert retention(parts).sweep() == 0
    parts.clock.now += 1
    assert retention(parts).sweep() == 1
    assert known_ids(parts) == [young.request_id]
    assert len(parts.stored_file_names()) == 1
    assert parts.queue.get(old.request_id) is None


def test_a_result_is_kept_while_its_webhook_is_due(parts: Components) -> None:
    """The webhook may still be due after a year, for example when the clock is corrected by one year."""
    job = finished_with_image(parts, webhook_url="http://there/hook")
    parts.clock.now += 366 * DAY
    assert retention(parts).sweep() == 0
    deliver_webhooks(parts)
    assert retention(parts).sweep() == 1
    assert parts.queue.get(job.request_id) is None


def test_a_result_without_storage_is_kept_while_its_webhook_is_due(parts: Components) -> None:
    job = finished_with_image(parts, store_io=False, webhook_url="http://there/hook")
    parts.queue.result(job)
    parts.clock.now += GRACE_SECONDS
    assert retention(parts).sweep() == 0
    deliver_webhooks(parts)
    assert retention(parts).sweep() == 1


def test_younger_results_are_deleted_before_one_whose_webhook_is_due(parts: Components) -> None:
    job = finished_with_image(parts, webhook_url="http://there/hook")
    parts.clock.now += 1
    young, file = finished_with_image(parts), upload(parts)
    assert retention(parts, max_bytes=0).sweep() == 1
    assert known_ids(parts) == [job.request_id]
    assert (parts.queue.get(young.request_id), parts.files.find(file.name)) == (None, None)
    assert len(remaining_files(parts)) == 1
    deliver_webhooks(parts)
    assert retention(parts, max_bytes=0).sweep() == 1
    assert remaining_files(parts) == []


def deliver_webhooks(parts: Components) -> None:
    """Mark all webhooks as no longer due, as after their delivery."""
    with parts.database.transaction() as connection:
        connection.execute("UPDATE deliveries SET due_at = NULL")


def test_age_counts_from_the_end_of_a_request_not_from_its_submission(parts: Components) -> None:
    job = parts.queue.submit(submission())
    parts.clock.now += 30 * DAY
    parts.queue.cancel(job)
    assert retention(parts).sweep() == 0


def test_waiting_and_running_requests_are_never_deleted(parts: Components) -> None:
    jobs = [claim_job(parts), parts.queue.submit(submission())]
    parts.clock.now += 365 * DAY
    assert retention(parts, max_bytes=0).sweep() == 0
    assert known_ids(parts) == [job.request_id for job in jobs]
    assert [job.state for job in jobs] == [State.IN_PROGRESS, State.IN_QUEUE]


def test_an_image_with_an_expiry_is_deleted_then_and_its_result_stays(parts: Components) -> None:
    job = finished_with_image(parts, lifetime=60)
    parts.clock.now += 59
    retention(parts).sweep()
    assert len(parts.stored_file_names()) == 1
    parts.clock.now += 1
    assert retention(parts).sweep() == 0
    assert parts.stored_file_names() == []
    assert parts.rows("SELECT * FROM files") == []
    assert parts.queue.result(job).status == 200


def test_the_oldest_results_are_deleted_until_the_images_fit(parts: Components) -> None:
    jobs = []
    for _ in range(4):
        jobs.append(finished_with_image(parts, size=10_000))
        parts.clock.now += 1
    assert retention(parts, max_bytes=50_000).sweep() == 0
    assert retention(parts, max_bytes=25_000).sweep() == 2
    assert known_ids(parts) == [job.request_id for job in jobs[2:]]
    assert len(parts.stored_file_names()) == 2


def test_results_without_images_count_with_their_prompts(parts: Components) -> None:
    long = finish_job(parts, fields={"prompt": "x" * 20_000})
    parts.clock.now += 1
    short = finish_job(parts)
    assert retention(parts, max_bytes=25_000).sweep() == 0
    assert retention(parts, max_bytes=20_000).sweep() == 1
    assert known_ids(parts) == [short.request_id] != [long.request_id]


def test_a_cancelled_request_loses_its_prompt_at_once(parts: Components) -> None:
    waiting = parts.queue.submit(submission(fields={"prompt": "x" * 20_000}, input_files={"image_url": "a.png"}))
    parts.queue.cancel(waiting)
    running = claim_job(parts, fields={"prompt": "x" * 20_000})
    parts.queue.cancel(running)
    parts.queue.release(running)
    assert parts.rows("SELECT DISTINCT input, inputs FROM jobs") == [("{}", "{}")]
    assert parts.rows("SELECT max(num_bytes) < 5000 FROM row_sizes") == [(1,)]


def test_the_owner_with_the_most_data_makes_room(parts: Components) -> None:
    """Many results of one owner, however young, do not push out the only result of another."""
    single = finished_with_image(parts, size=100_000, owner="alice")
    parts.clock.now += DAY
    many = []
    for _ in range(10):
        many.append(finished_with_image(parts, size=100_000, owner="bob"))
        parts.clock.now += 1
    assert retention(parts, max_bytes=500_000).sweep() == 7
    assert known_ids(parts) == [single.request_id, *(job.request_id for job in many[7:])]


def test_uploads_of_one_owner_do_not_push_out_results_of_another(parts: Components) -> None:
    single = finished_with_image(parts, size=100_000, owner="alice")
    files = [upload(parts, owner="bob", size=100_000) for _ in range(10)]
    retention(parts, max_bytes=500_000).sweep()
    assert parts.queue.get(single.request_id) is not None
    assert sum(parts.files.find(file.name) is not None for file in files) == 3


def test_the_unused_share_of_one_owner_goes_to_the_others(parts: Components) -> None:
    for owner, number in {"alice": 1, "bob": 4, "carol": 9}.items():
        for _ in range(number):
            finished_with_image(parts, size=100_000, owner=owner)
            parts.clock.now += 1
    retention(parts, max_bytes=980_000).sweep()
    assert parts.rows("SELECT owner, count(*) FROM jobs GROUP BY owner") == [("alice", 1), ("bob", 4), ("carol", 4)]


def test_the_totals_of_each_owner_follow_every_insert_and_delete(parts: Components) -> None:
    """The totals in `kept` equal the sums over the rows."""
    jobs = [
        finished_with_image(parts, size=size, owner=owner) for size, owner in [(10, "a"), (9000, "a"), (50_000, "b")]
    ]
    upload(parts, owner="b", size=0)
    deleted_upload = upload(parts, owner="c", size=5000)
    parts.queue.cancel(parts.queue.submit(submission(owner="d")))
    assert maintained_totals(parts) == computed_totals(parts) != []
    retention(parts).delete(jobs[0])
    with parts.database.transaction() as connection:
        connection.execute("DELETE FROM files WHERE name = ?", (deleted_upload.name,))
    assert maintained_totals(parts) == computed_totals(parts)
    retention(parts, max_bytes=0).sweep()
    assert maintained_totals(parts) == computed_totals(parts) == []


def maintained_totals(parts: Components) -> list[tuple[Any, ...]]:
    """Return the totals that the database maintains."""
    return parts.rows("SELECT owner, num_bytes, num_uploads, upload_bytes FROM kept ORDER BY owner")


def computed_totals(parts: Components) -> list[tuple[Any, ...]]:
    """Compute the same totals from the rows."""
    return parts.rows(
        "SELECT owner, sum(size), sum(is_upload), sum(size * is_upload) FROM ("
        " SELECT owner, max(size, 4096) AS size, request_id IS NULL AS is_upload FROM files"
        " UNION ALL SELECT owner, num_bytes, 0 FROM row_sizes"
        ") GROUP BY owner ORDER BY owner"
    )


def test_a_result_without_storage_is_deleted_a_grace_period_after_its_first_fetch(parts: Components) -> None:
    job = finished_with_image(parts, store_io=False)
    parts.clock.now += DAY
    assert retention(parts).sweep() == 0
    parts.queue.result(job)
    parts.clock.now += GRACE_SECONDS - 1
    assert retention(parts).sweep() == 0
    parts.clock.now += 1
    assert retention(parts).sweep() == 1
    assert (known_ids(parts), parts.stored_file_names()) == ([], [])


def test_a_stored_result_stays_after_it_was_fetched(parts: Components) -> None:
    job = finished_with_image(parts)
    parts.queue.result(job)
    parts.clock.now += GRACE_SECONDS
    assert retention(parts).sweep() == 0


def test_a_deleted_job_is_evicted_from_memory(parts: Components) -> None:
    job = finished_with_image(parts)
    parts.clock.now += 7 * DAY
    retention(parts).sweep()
    assert parts.queue.get_cached(job.request_id) is None


@pytest.mark.parametrize("count", [1, 501])
def test_many_jobs_are_deleted_in_one_sweep(parts: Components, count: int) -> None:
    for _ in range(count):
        parts.queue.cancel(parts.queue.submit(submission()))
    parts.clock.now += 7 * DAY
    assert retention(parts).sweep() == count
    assert known_ids(parts) == []


# -- uploads


def upload(parts: Components, size: int = 100, lifetime: float | None = None, owner: str = "me") -> StoredFile:
    """Store a file that belongs to no job."""
    file = parts.files.create(b"x" * size, "png", "image/png", owner, Lifecycle(lifetime))
    with parts.database.transaction() as connection:
        insert_file_row(connection, file, None, parts.clock.now)
    return file


def remaining_files(parts: Components) -> list[str]:
    """Return the names of the remaining files. The directory and the rows must agree."""
    names = sorted(name for (name,) in parts.rows("SELECT name FROM files"))
    assert names == parts.stored_file_names()
    return names


def test_uploads_are_deleted_by_age(parts: Components) -> None:
    upload(parts)
    parts.clock.now += DAY
    young = upload(parts)
    parts.clock.now += 6 * DAY - 1
    retention(parts).sweep()
    assert len(remaining_files(parts)) == 2
    parts.clock.now += 1
    # The sweep counts jobs only, and no job was deleted.
    assert retention(parts).sweep() == 0
    assert remaining_files(parts) == [young.name]


def test_an_upload_with_an_expiry_is_deleted_then(parts: Components) -> None:
    short_lived, long_lived = upload(parts, lifetime=60), upload(parts, lifetime=30 * DAY)
    parts.clock.now += 60
    assert parts.files.find(short_lived.name) is None
    retention(parts).sweep()
    assert remaining_files(parts) == [long_lived.name]
    # The operator's maximum age also limits a longer lifetime.
    parts.clock.now += 7 * DAY
    retention(parts).sweep()
    assert remaining_files(parts) == []


def test_uploads_and_results_share_the_disk_and_the_oldest_are_deleted(parts: Components) -> None:
    uploads, jobs = [], []
    for _ in range(3):
        uploads.append(upload(parts, size=10_000))
        parts.clock.now += 1
        jobs.append(finished_with_image(parts, size=10_000))
        parts.clock.now += 1
    assert retention(parts, max_bytes=70_000).sweep() == 0
    assert len(remaining_files(parts)) == 6
    assert retention(parts, max_bytes=40_000).sweep() == 1
    assert known_ids(parts) == [job.request_id for job in jobs[1:]]
    assert len(remaining_files(parts)) == 3
    assert [parts.files.find(file.name) is not None for file in uploads] == [False, False, True]


def test_a_young_upload_outlives_old_results(parts: Components) -> None:
    finished_with_image(parts, size=10_000)
    parts.clock.now += 1
    file = upload(parts, size=10_000)
    assert retention(parts, max_bytes=10_000).sweep() == 1
    assert remaining_files(parts) == [file.name]


def test_a_job_is_deleted_with_all_its_images_among_uploads_of_the_same_moment(parts: Components) -> None:
    files = [parts.files.create(b"x" * 10_000, "png", "image/png", "me", Lifecycle()) for _ in range(3)]
    upload(parts, size=10_000)
    finish_job(parts, *files)
    later = upload(parts, size=10_000)
    parts.clock.now += 1
    newest = finished_with_image(parts, size=10_000)
    retention(parts, max_bytes=35_000).sweep()
    assert known_ids(parts) == [newest.request_id]
    assert later.name not in remaining_files(parts)
    assert len(remaining_files(parts)) == 1


def test_an_upload_larger_than_the_whole_budget_is_deleted(parts: Components) -> None:
    upload(parts, size=10_000)
    retention(parts, max_bytes=9_999).sweep()
    assert remaining_files(parts) == []
