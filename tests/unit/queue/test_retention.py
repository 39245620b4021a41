"""Tests of which results and files retention deletes, and when."""

from typing import Any

import pytest

from server.queue.jobs import Job, State
from server.queue.retention import GRACE_SECONDS, Retention
from server.storage.file_store import Lifecycle, StoredFile, insert_file_row
from tests.support.components import Components, claim_job, finish_job, submission

DAY = 86_400.0


def retention(components: Components, max_age: float = 7 * DAY, max_bytes: float = 1e9) -> Retention:
    """Return a retention policy; the defaults are one week and one gigabyte."""
    return Retention(
        components.database,
        components.queue,
        components.files,
        max_age=max_age,
        max_bytes=max_bytes,
        clock=components.clock,
    )


def finished_with_image(components: Components, size: int = 100, lifetime: float | None = None, **changes: Any) -> Job:
    """Finish a job with one image of `size` bytes; return the job."""
    owner = changes.get("owner", "me")
    return finish_job(
        components, components.files.create(b"x" * size, "png", "image/png", owner, Lifecycle(lifetime)), **changes
    )


def known_ids(components: Components) -> list[str]:
    """Return the ids of the jobs that still have a row, oldest first."""
    return [request_id for (request_id,) in components.rows("SELECT request_id FROM jobs ORDER BY sequence")]


def test_results_and_images_are_deleted_by_age(components: Components) -> None:
    old = finished_with_image(components)
    components.clock.now += DAY
    young = finished_with_image(components)
    components.clock.now += 6 * DAY - 1
    assert retention(components).sweep() == 0
    components.clock.now += 1
    assert retention(components).sweep() == 1
    assert known_ids(components) == [young.request_id]
    assert len(components.stored_file_names()) == 1
    assert components.queue.get(old.request_id) is None


def test_a_result_is_kept_while_its_webhook_is_due(components: Components) -> None:
    """The webhook may still be due after a year, for example when the clock is corrected by one year."""
    job = finished_with_image(components, webhook_url="http://there/hook")
    components.clock.now += 366 * DAY
    assert retention(components).sweep() == 0
    deliver_webhooks(components)
    assert retention(components).sweep() == 1
    assert components.queue.get(job.request_id) is None


def test_a_result_without_storage_is_kept_while_its_webhook_is_due(components: Components) -> None:
    job = finished_with_image(components, store_io=False, webhook_url="http://there/hook")
    components.queue.result(job)
    components.clock.now += GRACE_SECONDS
    assert retention(components).sweep() == 0
    deliver_webhooks(components)
    assert retention(components).sweep() == 1


def test_younger_results_are_deleted_before_one_whose_webhook_is_due(components: Components) -> None:
    job = finished_with_image(components, webhook_url="http://there/hook")
    components.clock.now += 1
    young, file = finished_with_image(components), upload(components)
    assert retention(components, max_bytes=0).sweep() == 1
    assert known_ids(components) == [job.request_id]
    assert (components.queue.get(young.request_id), components.files.find(file.name)) == (None, None)
    assert len(remaining_files(components)) == 1
    deliver_webhooks(components)
    assert retention(components, max_bytes=0).sweep() == 1
    assert remaining_files(components) == []


def test_the_log_says_what_is_deleted(components: Components, caplog: pytest.LogCaptureFixture) -> None:
    finished_with_image(components)
    upload(components)
    with caplog.at_level("INFO", "server.queue.retention"):
        assert retention(components).sweep() == 0
        assert not caplog.messages
        retention(components, max_bytes=0).sweep()
        finished_with_image(components)
        components.clock.now += 7 * DAY
        retention(components).sweep()
    assert [record.getMessage() for record in caplog.records if record.name == "server.queue.retention"] == [
        "deleted the oldest 1 results and 1 uploads of owner me, to stay within --retention-gb",
        "deleted 1 results and 0 uploads that had expired",
    ]


def deliver_webhooks(components: Components) -> None:
    """Mark all webhooks as no longer due, as after their delivery."""
    with components.database.transaction() as connection:
        connection.execute("UPDATE deliveries SET due_at = NULL")


def test_age_counts_from_the_end_of_a_request_not_from_its_submission(components: Components) -> None:
    job = components.queue.submit(submission())
    components.clock.now += 30 * DAY
    components.queue.cancel(job)
    assert retention(components).sweep() == 0


def test_waiting_and_running_requests_are_never_deleted(components: Components) -> None:
    jobs = [claim_job(components), components.queue.submit(submission())]
    components.clock.now += 365 * DAY
    assert retention(components, max_bytes=0).sweep() == 0
    assert known_ids(components) == [job.request_id for job in jobs]
    assert [job.state for job in jobs] == [State.IN_PROGRESS, State.IN_QUEUE]


def test_an_image_with_an_expiry_is_deleted_then_and_its_result_stays(components: Components) -> None:
    job = finished_with_image(components, lifetime=60)
    components.clock.now += 59
    retention(components).sweep()
    assert len(components.stored_file_names()) == 1
    components.clock.now += 1
    assert retention(components).sweep() == 0
    assert components.stored_file_names() == []
    assert components.rows("SELECT * FROM files") == []
    assert components.queue.result(job).status == 200


def test_the_oldest_results_are_deleted_until_the_images_fit(components: Components) -> None:
    jobs = []
    for _ in range(4):
        jobs.append(finished_with_image(components, size=10_000))
        components.clock.now += 1
    assert retention(components, max_bytes=50_000).sweep() == 0
    assert retention(components, max_bytes=25_000).sweep() == 2
    assert known_ids(components) == [job.request_id for job in jobs[2:]]
    assert len(components.stored_file_names()) == 2


def test_results_without_images_count_with_their_prompts(components: Components) -> None:
    long = finish_job(components, fields={"prompt": "x" * 20_000})
    components.clock.now += 1
    short = finish_job(components)
    assert retention(components, max_bytes=25_000).sweep() == 0
    assert retention(components, max_bytes=20_000).sweep() == 1
    assert known_ids(components) == [short.request_id] != [long.request_id]


def test_a_cancelled_request_loses_its_prompt_at_once(components: Components) -> None:
    waiting = components.queue.submit(submission(fields={"prompt": "x" * 20_000}, input_files={"image_url": "a.png"}))
    components.queue.cancel(waiting)
    running = claim_job(components, fields={"prompt": "x" * 20_000})
    components.queue.cancel(running)
    components.queue.release(running)
    assert components.rows("SELECT DISTINCT input, inputs FROM jobs") == [("{}", "{}")]
    assert components.rows("SELECT max(num_bytes) < 5000 FROM row_sizes") == [(1,)]


def test_the_owner_with_the_most_data_makes_room(components: Components) -> None:
    """Many results of one owner, however young, do not push out the only result of another."""
    single = finished_with_image(components, size=100_000, owner="alice")
    components.clock.now += DAY
    many = []
    for _ in range(10):
        many.append(finished_with_image(components, size=100_000, owner="bob"))
        components.clock.now += 1
    assert retention(components, max_bytes=500_000).sweep() == 7
    assert known_ids(components) == [single.request_id, *(job.request_id for job in many[7:])]


def test_uploads_of_one_owner_do_not_push_out_results_of_another(components: Components) -> None:
    single = finished_with_image(components, size=100_000, owner="alice")
    files = [upload(components, owner="bob", size=100_000) for _ in range(10)]
    retention(components, max_bytes=500_000).sweep()
    assert components.queue.get(single.request_id) is not None
    assert sum(components.files.find(file.name) is not None for file in files) == 3


def test_the_unused_share_of_one_owner_goes_to_the_others(components: Components) -> None:
    for owner, number in {"alice": 1, "bob": 4, "carol": 9}.items():
        for _ in range(number):
            finished_with_image(components, size=100_000, owner=owner)
            components.clock.now += 1
    retention(components, max_bytes=980_000).sweep()
    assert components.rows("SELECT owner, count(*) FROM jobs GROUP BY owner") == [
        ("alice", 1),
        ("bob", 4),
        ("carol", 4),
    ]


def test_the_totals_of_each_owner_follow_every_insert_and_delete(components: Components) -> None:
    """The totals in `kept` equal the sums over the rows."""
    jobs = [
        finished_with_image(components, size=size, owner=owner)
        for size, owner in [(10, "a"), (9000, "a"), (50_000, "b")]
    ]
    upload(components, owner="b", size=0)
    deleted_upload = upload(components, owner="c", size=5000)
    components.queue.cancel(components.queue.submit(submission(owner="d")))
    assert maintained_totals(components) == computed_totals(components) != []
    retention(components).delete(jobs[0])
    with components.database.transaction() as connection:
        connection.execute("DELETE FROM files WHERE name = ?", (deleted_upload.name,))
    assert maintained_totals(components) == computed_totals(components)
    retention(components, max_bytes=0).sweep()
    assert maintained_totals(components) == computed_totals(components) == []


def maintained_totals(components: Components) -> list[tuple[Any, ...]]:
    """Return the totals that the database maintains."""
    return components.rows("SELECT owner, num_bytes, num_uploads, upload_bytes FROM kept ORDER BY owner")


def computed_totals(components: Components) -> list[tuple[Any, ...]]:
    """Return the same totals, computed from the rows."""
    return components.rows(
        "SELECT owner, sum(size), sum(is_upload), sum(size * is_upload) FROM ("
        " SELECT owner, max(size, 4096) AS size, request_id IS NULL AS is_upload FROM files"
        " UNION ALL SELECT owner, num_bytes, 0 FROM row_sizes"
        ") GROUP BY owner ORDER BY owner"
    )


def test_a_result_without_storage_is_deleted_a_grace_period_after_its_first_fetch(components: Components) -> None:
    job = finished_with_image(components, store_io=False)
    components.clock.now += DAY
    assert retention(components).sweep() == 0
    components.queue.result(job)
    components.clock.now += GRACE_SECONDS - 1
    assert retention(components).sweep() == 0
    components.clock.now += 1
    assert retention(components).sweep() == 1
    assert (known_ids(components), components.stored_file_names()) == ([], [])


def test_a_stored_result_stays_after_it_was_fetched(components: Components) -> None:
    job = finished_with_image(components)
    components.queue.result(job)
    components.clock.now += GRACE_SECONDS
    assert retention(components).sweep() == 0


def test_a_deleted_job_is_evicted_from_memory(components: Components) -> None:
    job = finished_with_image(components)
    components.clock.now += 7 * DAY
    retention(components).sweep()
    assert components.queue.get_cached(job.request_id) is None


@pytest.mark.parametrize("count", [1, 501])
def test_many_jobs_are_deleted_in_one_sweep(components: Components, count: int) -> None:
    for _ in range(count):
        components.queue.cancel(components.queue.submit(submission()))
    components.clock.now += 7 * DAY
    assert retention(components).sweep() == count
    assert known_ids(components) == []


# -- uploads


def upload(components: Components, size: int = 100, lifetime: float | None = None, owner: str = "me") -> StoredFile:
    """Store a file that belongs to no job; return the file."""
    file = components.files.create(b"x" * size, "png", "image/png", owner, Lifecycle(lifetime))
    with components.database.transaction() as connection:
        insert_file_row(connection, file, None, components.clock.now)
    return file


def remaining_files(components: Components) -> list[str]:
    """Return the names of the remaining files; assert that the directory and the rows agree."""
    names = sorted(name for (name,) in components.rows("SELECT name FROM files"))
    assert names == components.stored_file_names()
    return names


def test_uploads_are_deleted_by_age(components: Components) -> None:
    upload(components)
    components.clock.now += DAY
    young = upload(components)
    components.clock.now += 6 * DAY - 1
    retention(components).sweep()
    assert len(remaining_files(components)) == 2
    components.clock.now += 1
    # The sweep counts jobs only, and no job was deleted.
    assert retention(components).sweep() == 0
    assert remaining_files(components) == [young.name]


def test_an_upload_with_an_expiry_is_deleted_then(components: Components) -> None:
    short_lived, long_lived = upload(components, lifetime=60), upload(components, lifetime=30 * DAY)
    components.clock.now += 60
    assert components.files.find(short_lived.name) is None
    retention(components).sweep()
    assert remaining_files(components) == [long_lived.name]
    # The operator's maximum age also limits a longer lifetime.
    components.clock.now += 7 * DAY
    retention(components).sweep()
    assert remaining_files(components) == []


def test_uploads_and_results_share_the_disk_and_the_oldest_are_deleted(components: Components) -> None:
    uploads, jobs = [], []
    for _ in range(3):
        uploads.append(upload(components, size=10_000))
        components.clock.now += 1
        jobs.append(finished_with_image(components, size=10_000))
        components.clock.now += 1
    assert retention(components, max_bytes=70_000).sweep() == 0
    assert len(remaining_files(components)) == 6
    assert retention(components, max_bytes=40_000).sweep() == 1
    assert known_ids(components) == [job.request_id for job in jobs[1:]]
    assert len(remaining_files(components)) == 3
    assert [components.files.find(file.name) is not None for file in uploads] == [False, False, True]


def test_a_young_upload_outlives_old_results(components: Components) -> None:
    finished_with_image(components, size=10_000)
    components.clock.now += 1
    file = upload(components, size=10_000)
    assert retention(components, max_bytes=10_000).sweep() == 1
    assert remaining_files(components) == [file.name]


def test_a_job_is_deleted_with_all_its_images_among_uploads_of_the_same_moment(components: Components) -> None:
    files = [components.files.create(b"x" * 10_000, "png", "image/png", "me", Lifecycle()) for _ in range(3)]
    upload(components, size=10_000)
    finish_job(components, *files)
    later = upload(components, size=10_000)
    components.clock.now += 1
    newest = finished_with_image(components, size=10_000)
    retention(components, max_bytes=35_000).sweep()
    assert known_ids(components) == [newest.request_id]
    assert later.name not in remaining_files(components)
    assert len(remaining_files(components)) == 1


def test_an_upload_larger_than_the_whole_budget_is_deleted(components: Components) -> None:
    upload(components, size=10_000)
    retention(components, max_bytes=9_999).sweep()
    assert remaining_files(components) == []
