"""What is forgotten, and when."""

from typing import Any

import pytest

from server.queue.jobs import Job, State
from server.queue.retention import GRACE_SECONDS, Retention
from server.storage.file_store import Lifecycle, StoredFile, insert_file_row
from tests.support.components import Parts, claimed, finished, submission

DAY = 86_400.0


def retention(parts: Parts, max_age: float = 7 * DAY, max_bytes: float = 1e9) -> Retention:
    """A week and a gigabyte, unless said otherwise."""
    return Retention(parts.database, parts.queue, parts.files, max_age=max_age, max_bytes=max_bytes, clock=parts.clock)


def with_picture(parts: Parts, size: int = 100, lifetime: float | None = None, **changes: Any) -> Job:
    """A finished job with one picture of this many bytes."""
    owner = changes.get("owner", "me")
    return finished(parts, parts.files.create(b"x" * size, "png", "image/png", owner, Lifecycle(lifetime)), **changes)


def known(parts: Parts) -> list[str]:
    """Ids of the jobs that are left, in order."""
    return [request_id for (request_id,) in parts.rows("SELECT request_id FROM jobs ORDER BY sequence")]


def test_results_and_pictures_go_by_age(parts: Parts) -> None:
    old = with_picture(parts)
    parts.clock.now += DAY
    young = with_picture(parts)
    parts.clock.now += 6 * DAY - 1
    assert retention(parts).sweep() == 0
    parts.clock.now += 1
    assert retention(parts).sweep() == 1
    assert known(parts) == [young.request_id]
    assert len(parts.on_disk()) == 1
    assert parts.queue.get(old.request_id) is None


def test_a_result_whose_webhook_is_due_is_kept_until_it_was_told(parts: Parts) -> None:
    """Its clock may have been set right by a year meanwhile."""
    job = with_picture(parts, webhook_url="http://there/hook")
    parts.clock.now += 366 * DAY
    assert retention(parts).sweep() == 0
    told(parts)
    assert retention(parts).sweep() == 1
    assert parts.queue.get(job.request_id) is None


def test_what_is_not_to_be_kept_stays_too_until_its_webhook_was_told(parts: Parts) -> None:
    job = with_picture(parts, store_io=False, webhook_url="http://there/hook")
    parts.queue.result(job)
    parts.clock.now += GRACE_SECONDS
    assert retention(parts).sweep() == 0
    told(parts)
    assert retention(parts).sweep() == 1


def test_the_budget_takes_younger_ones_before_those_whose_webhook_is_due(parts: Parts) -> None:
    job = with_picture(parts, webhook_url="http://there/hook")
    parts.clock.now += 1
    young, file = with_picture(parts), uploaded(parts)
    assert retention(parts, max_bytes=0).sweep() == 1
    assert known(parts) == [job.request_id]
    assert (parts.queue.get(young.request_id), parts.files.find(file.name)) == (None, None)
    assert len(left(parts)) == 1
    told(parts)
    assert retention(parts, max_bytes=0).sweep() == 1
    assert left(parts) == []


def told(parts: Parts) -> None:
    """As after the deliveries of all webhooks."""
    with parts.database.transaction() as connection:
        connection.execute("UPDATE deliveries SET due_at = NULL")


def test_age_counts_from_the_end_not_from_the_submit(parts: Parts) -> None:
    job = parts.queue.submit(submission())
    parts.clock.now += 30 * DAY
    parts.queue.cancel(job)
    assert retention(parts).sweep() == 0


def test_what_waits_or_runs_is_never_forgotten(parts: Parts) -> None:
    jobs = [claimed(parts), parts.queue.submit(submission())]
    parts.clock.now += 365 * DAY
    assert retention(parts, max_bytes=0).sweep() == 0
    assert known(parts) == [job.request_id for job in jobs]
    assert [job.state for job in jobs] == [State.IN_PROGRESS, State.IN_QUEUE]


def test_a_picture_with_an_expiry_of_its_own_goes_then_and_its_result_stays(parts: Parts) -> None:
    job = with_picture(parts, lifetime=60)
    parts.clock.now += 59
    retention(parts).sweep()
    assert len(parts.on_disk()) == 1
    parts.clock.now += 1
    assert retention(parts).sweep() == 0
    assert parts.on_disk() == []
    assert parts.rows("SELECT * FROM files") == []
    assert parts.queue.result(job).status == 200


def test_the_oldest_go_until_the_pictures_fit(parts: Parts) -> None:
    jobs = []
    for _ in range(4):
        jobs.append(with_picture(parts, size=10_000))
        parts.clock.now += 1
    assert retention(parts, max_bytes=50_000).sweep() == 0
    assert retention(parts, max_bytes=25_000).sweep() == 2
    assert known(parts) == [job.request_id for job in jobs[2:]]
    assert len(parts.on_disk()) == 2


def test_results_without_pictures_count_with_their_prompts(parts: Parts) -> None:
    long = finished(parts, fields={"prompt": "x" * 20_000})
    parts.clock.now += 1
    short = finished(parts)
    assert retention(parts, max_bytes=25_000).sweep() == 0
    assert retention(parts, max_bytes=20_000).sweep() == 1
    assert known(parts) == [short.request_id] != [long.request_id]


def test_a_cancelled_request_loses_its_prompt_at_once(parts: Parts) -> None:
    waiting = parts.queue.submit(submission(fields={"prompt": "x" * 20_000}, input_files={"image_url": "a.png"}))
    parts.queue.cancel(waiting)
    running = claimed(parts, fields={"prompt": "x" * 20_000})
    parts.queue.cancel(running)
    parts.queue.release(running)
    assert parts.rows("SELECT DISTINCT input, inputs FROM jobs") == [("{}", "{}")]
    assert parts.rows("SELECT max(num_bytes) < 5000 FROM row_sizes") == [(1,)]


def test_whoever_keeps_most_makes_room(parts: Parts) -> None:
    """One owner's many, however young, make nobody's only one go."""
    lone = with_picture(parts, size=100_000, owner="alice")
    parts.clock.now += DAY
    many = []
    for _ in range(10):
        many.append(with_picture(parts, size=100_000, owner="bob"))
        parts.clock.now += 1
    assert retention(parts, max_bytes=500_000).sweep() == 7
    assert known(parts) == [lone.request_id, *(job.request_id for job in many[7:])]


def test_uploads_of_one_make_nobody_elses_go(parts: Parts) -> None:
    lone = with_picture(parts, size=100_000, owner="alice")
    files = [uploaded(parts, owner="bob", size=100_000) for _ in range(10)]
    retention(parts, max_bytes=500_000).sweep()
    assert parts.queue.get(lone.request_id) is not None
    assert sum(parts.files.find(file.name) is not None for file in files) == 3


def test_what_one_leaves_of_its_share_is_the_others(parts: Parts) -> None:
    for owner, number in {"alice": 1, "bob": 4, "carol": 9}.items():
        for _ in range(number):
            with_picture(parts, size=100_000, owner=owner)
            parts.clock.now += 1
    retention(parts, max_bytes=980_000).sweep()
    assert parts.rows("SELECT owner, count(*) FROM jobs GROUP BY owner") == [("alice", 1), ("bob", 4), ("carol", 4)]


def test_what_each_keeps_is_counted_as_it_comes_and_goes(parts: Parts) -> None:
    """As the rows themselves say."""
    jobs = [with_picture(parts, size=size, owner=owner) for size, owner in [(10, "a"), (9000, "a"), (50_000, "b")]]
    uploaded(parts, owner="b", size=0)
    gone = uploaded(parts, owner="c", size=5000)
    parts.queue.cancel(parts.queue.submit(submission(owner="d")))
    assert kept(parts) == counted(parts) != []
    retention(parts).delete(jobs[0])
    with parts.database.transaction() as connection:
        connection.execute("DELETE FROM files WHERE name = ?", (gone.name,))
    assert kept(parts) == counted(parts)
    retention(parts, max_bytes=0).sweep()
    assert kept(parts) == counted(parts) == []


def kept(parts: Parts) -> list[tuple[Any, ...]]:
    """What the database has counted."""
    return parts.rows("SELECT owner, num_bytes, num_uploads, upload_bytes FROM kept ORDER BY owner")


def counted(parts: Parts) -> list[tuple[Any, ...]]:
    """The same from the rows themselves."""
    return parts.rows(
        "SELECT owner, sum(size), sum(is_upload), sum(size * is_upload) FROM ("
        " SELECT owner, max(size, 4096) AS size, request_id IS NULL AS is_upload FROM files"
        " UNION ALL SELECT owner, num_bytes, 0 FROM row_sizes"
        ") GROUP BY owner ORDER BY owner"
    )


def test_what_is_not_to_be_kept_goes_after_it_was_fetched_and_a_grace(parts: Parts) -> None:
    job = with_picture(parts, store_io=False)
    parts.clock.now += DAY
    assert retention(parts).sweep() == 0
    parts.queue.result(job)
    parts.clock.now += GRACE_SECONDS - 1
    assert retention(parts).sweep() == 0
    parts.clock.now += 1
    assert retention(parts).sweep() == 1
    assert (known(parts), parts.on_disk()) == ([], [])


def test_what_is_to_be_kept_stays_after_it_was_fetched(parts: Parts) -> None:
    job = with_picture(parts)
    parts.queue.result(job)
    parts.clock.now += GRACE_SECONDS
    assert retention(parts).sweep() == 0


def test_memory_forgets_with_the_rows(parts: Parts) -> None:
    job = with_picture(parts)
    parts.clock.now += 7 * DAY
    retention(parts).sweep()
    assert parts.queue.get_cached(job.request_id) is None


@pytest.mark.parametrize("count", [1, 501])
def test_many_are_forgotten_at_once(parts: Parts, count: int) -> None:
    for _ in range(count):
        parts.queue.cancel(parts.queue.submit(submission()))
    parts.clock.now += 7 * DAY
    assert retention(parts).sweep() == count
    assert known(parts) == []


# -- uploads


def uploaded(parts: Parts, size: int = 100, lifetime: float | None = None, owner: str = "me") -> StoredFile:
    """A file that belongs to no job."""
    file = parts.files.create(b"x" * size, "png", "image/png", owner, Lifecycle(lifetime))
    with parts.database.transaction() as connection:
        insert_file_row(connection, file, None, parts.clock.now)
    return file


def left(parts: Parts) -> list[str]:
    """The names of the files that are left: on the disk and in their rows."""
    names = sorted(name for (name,) in parts.rows("SELECT name FROM files"))
    assert names == parts.on_disk()
    return names


def test_uploads_go_by_age(parts: Parts) -> None:
    uploaded(parts)
    parts.clock.now += DAY
    young = uploaded(parts)
    parts.clock.now += 6 * DAY - 1
    retention(parts).sweep()
    assert len(left(parts)) == 2
    parts.clock.now += 1
    # No job was forgotten.
    assert retention(parts).sweep() == 0
    assert left(parts) == [young.name]


def test_an_upload_with_an_expiry_of_its_own_goes_then(parts: Parts) -> None:
    brief, lasting = uploaded(parts, lifetime=60), uploaded(parts, lifetime=30 * DAY)
    parts.clock.now += 60
    assert parts.files.find(brief.name) is None
    retention(parts).sweep()
    assert left(parts) == [lasting.name]
    # The operator's age is the longest there is.
    parts.clock.now += 7 * DAY
    retention(parts).sweep()
    assert left(parts) == []


def test_uploads_and_results_share_the_disk_and_the_oldest_go(parts: Parts) -> None:
    uploads, jobs = [], []
    for _ in range(3):
        uploads.append(uploaded(parts, size=10_000))
        parts.clock.now += 1
        jobs.append(with_picture(parts, size=10_000))
        parts.clock.now += 1
    assert retention(parts, max_bytes=70_000).sweep() == 0
    assert len(left(parts)) == 6
    assert retention(parts, max_bytes=40_000).sweep() == 1
    assert known(parts) == [job.request_id for job in jobs[1:]]
    assert len(left(parts)) == 3
    assert [parts.files.find(file.name) is not None for file in uploads] == [False, False, True]


def test_a_young_upload_outlives_old_results(parts: Parts) -> None:
    with_picture(parts, size=10_000)
    parts.clock.now += 1
    file = uploaded(parts, size=10_000)
    assert retention(parts, max_bytes=10_000).sweep() == 1
    assert left(parts) == [file.name]


def test_a_job_goes_with_all_its_pictures_among_uploads_of_the_same_moment(parts: Parts) -> None:
    files = [parts.files.create(b"x" * 10_000, "png", "image/png", "me", Lifecycle()) for _ in range(3)]
    uploaded(parts, size=10_000)
    finished(parts, *files)
    later = uploaded(parts, size=10_000)
    parts.clock.now += 1
    kept = with_picture(parts, size=10_000)
    retention(parts, max_bytes=35_000).sweep()
    assert known(parts) == [kept.request_id]
    assert later.name not in left(parts)
    assert len(left(parts)) == 1


def test_an_upload_larger_than_the_whole_budget_goes(parts: Parts) -> None:
    uploaded(parts, size=10_000)
    retention(parts, max_bytes=9_999).sweep()
    assert left(parts) == []
