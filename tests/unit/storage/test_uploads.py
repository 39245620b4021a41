"""Uploads under way, on a real disk and with a clock that is set by hand."""

import asyncio
import hashlib
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.requests import ClientDisconnect

from server.errors import BadRequest, BodyTooLarge, DiskFull, NotFound, TooManyRequests
from server.storage import uploads as uploads_module
from server.storage.file_store import Lifecycle, StoredFile
from server.storage.multipart import Upload
from server.storage.uploads import LIFETIME, MAX_PARTS, Uploads
from tests.support.components import Parts, opened


def uploads_of(parts: Parts, *, max_bytes: int = 1000, max_bytes_per_owner: int = 10_000) -> Uploads:
    """A kilobyte a file and ten an owner, unless said otherwise; a second one is what a restart makes."""
    return Uploads(
        parts.folder / "uploads",
        parts.database,
        parts.files,
        max_bytes=max_bytes,
        max_bytes_per_owner=max_bytes_per_owner,
        clock=parts.clock,
    )


@pytest.fixture
def uploads(parts: Parts) -> Uploads:
    """Uploads with those limits."""
    return uploads_of(parts)


def begun(uploads: Uploads, owner: str = "me", lifecycle: Lifecycle | None = None) -> Upload:
    """A text that is about to come."""
    return uploads.create(owner, "text/plain", "a.txt", lifecycle or Lifecycle())


async def _chunks(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def send(uploads: Uploads, upload: Upload, part_number: int, *chunks: bytes) -> str:
    """One part; returns its ETag."""
    return asyncio.run(uploads.write_part(upload, part_number, _chunks(*chunks)))


def content(parts: Parts, file: StoredFile) -> bytes:
    """What a client gets who asks for this file."""
    assert parts.files.find(file.name) == file
    return parts.files.path(file).read_bytes()


def under_way(parts: Parts) -> list[str]:
    """Everything on the disk that belongs to uploads."""
    return sorted(path.name for path in (parts.folder / "uploads").rglob("*"))


# -- in parts


def test_a_file_is_listed_with_what_was_said_of_it(parts: Parts, uploads: Uploads) -> None:
    upload = uploads.create("alice", "text/plain; charset=utf-8", "Tagebuch März.txt", Lifecycle(60.0, True))
    parts.clock.now += 5
    send(uploads, upload, 1, b"hel", b"", b"lo")
    file = uploads._join(upload)
    expires_at = parts.clock.now + 60
    assert file == StoredFile(
        upload.name, "alice", 5, "text/plain; charset=utf-8", "Tagebuch März.txt", True, expires_at
    )
    assert content(parts, file) == b"hello"
    rows = parts.rows("SELECT request_id, created_at FROM files")
    assert rows == [(None, parts.clock.now)]


def test_nothing_of_an_upload_is_left_when_it_is_complete(parts: Parts, uploads: Uploads) -> None:
    upload = begun(uploads)
    send(uploads, upload, 1, b"hello")
    file = uploads._join(upload)
    assert (under_way(parts), parts.on_disk()) == ([], [file.name])
    assert parts.rows("SELECT * FROM uploads") == []
    with pytest.raises(NotFound):
        uploads.find(upload.upload_id)


def test_a_file_is_not_served_before_it_is_complete(parts: Parts, uploads: Uploads) -> None:
    upload = begun(uploads)
    send(uploads, upload, 1, b"hello")
    assert parts.files.find(upload.name) is None
    assert parts.on_disk() == []


def test_an_etag_is_the_md5_of_its_part_in_quotes(uploads: Uploads) -> None:
    upload = begun(uploads)
    expected = hashlib.md5(b"hello").hexdigest()
    assert send(uploads, upload, 7, b"hel", b"lo") == f'"{expected}"'


@pytest.mark.parametrize("sent", [(1, 2, 3), (3, 1, 2), (10, 2, 9)])
@pytest.mark.parametrize("is_listed_backwards", [False, True])
def test_parts_are_joined_by_number_whatever_the_order(
    parts: Parts, uploads: Uploads, sent: tuple[int, ...], is_listed_backwards: bool
) -> None:
    upload = begun(uploads)
    for number in sent:
        send(uploads, upload, number, f"<{number}>".encode())
    listed = sorted(sent, reverse=is_listed_backwards)
    file = uploads._join(upload, listed)
    assert content(parts, file) == "".join(f"<{number}>" for number in sorted(sent)).encode()


def test_a_part_that_is_sent_twice_or_listed_twice_counts_once(parts: Parts, uploads: Uploads) -> None:
    upload = begun(uploads)
    for chunk in (b"first try", b"second", b"third"):
        send(uploads, upload, 1, chunk)
    send(uploads, upload, 2, b"!")
    assert content(parts, uploads._join(upload, [1, 2, 1, 2])) == b"third!"


def test_no_list_of_parts_stands_for_all_that_were_sent(parts: Parts, uploads: Uploads) -> None:
    listings: tuple[list[int] | None, ...] = (None, [])
    for listed in listings:
        upload = begun(uploads)
        send(uploads, upload, 2, b"b")
        send(uploads, upload, 1, b"a")
        assert content(parts, uploads._join(upload, listed)) == b"ab"


def test_a_missing_part_is_named_and_can_still_be_sent(parts: Parts, uploads: Uploads) -> None:
    upload = begun(uploads)
    send(uploads, upload, 1, b"a")
    send(uploads, upload, 3, b"c")
    with pytest.raises(BadRequest, match="Part 2 was not sent"):
        uploads._join(upload, [1, 2, 3])
    assert parts.on_disk() == []
    send(uploads, upload, 2, b"b")
    assert content(parts, uploads._join(upload, [1, 2, 3])) == b"abc"


def test_an_empty_file_is_a_file(parts: Parts, uploads: Uploads) -> None:
    upload = begun(uploads)
    send(uploads, upload, 1)
    assert content(parts, uploads._join(upload)) == b""


@pytest.mark.parametrize("number", [0, -1, MAX_PARTS + 1])
def test_a_part_number_out_of_range_is_refused(parts: Parts, uploads: Uploads, number: int) -> None:
    upload = begun(uploads)
    with pytest.raises(BadRequest, match=f"from 1 to {MAX_PARTS}"):
        send(uploads, upload, number, b"x")
    assert under_way(parts) == [upload.upload_id]
    send(uploads, upload, MAX_PARTS, b"x")


def test_an_unknown_upload_is_not_found(uploads: Uploads) -> None:
    begun(uploads)
    for upload_id in ("", "..", "0" * 32):
        with pytest.raises(NotFound):
            uploads.find(upload_id)


def test_a_client_that_leaves_takes_its_half_part_along(parts: Parts, uploads: Uploads) -> None:
    async def half() -> AsyncIterator[bytes]:
        yield b"half"
        raise ClientDisconnect

    upload = begun(uploads)
    with pytest.raises(ClientDisconnect):
        asyncio.run(uploads.write_part(upload, 1, half()))
    assert under_way(parts) == [upload.upload_id]
    send(uploads, upload, 1, b"whole")
    assert content(parts, uploads._join(upload)) == b"whole"


def test_names_are_secrets_of_128_bits(uploads: Uploads) -> None:
    begin = [begun(uploads) for _ in range(20)]
    assert len({upload.upload_id for upload in begin} | {upload.name for upload in begin}) == 40
    assert (
        {len(upload.upload_id) for upload in begin} == {len(upload.name.partition(".")[0]) for upload in begin} == {32}
    )


# -- limits


def test_a_file_may_be_as_large_as_the_limit_and_no_larger(parts: Parts, uploads: Uploads) -> None:
    upload = begun(uploads)
    with pytest.raises(BodyTooLarge, match="1000 bytes"):
        send(uploads, upload, 1, b"x" * 600, b"x" * 401)
    assert under_way(parts) == [upload.upload_id]
    send(uploads, upload, 1, b"x" * 600, b"x" * 400)
    assert uploads._join(upload).size == 1000


def test_parts_count_together(uploads: Uploads) -> None:
    upload = begun(uploads)
    send(uploads, upload, 1, b"x" * 600)
    with pytest.raises(BodyTooLarge, match="1000 bytes"):
        send(uploads, upload, 2, b"x" * 401)
    send(uploads, upload, 2, b"x" * 400)


def test_a_part_that_is_sent_again_takes_the_place_of_its_first_try(uploads: Uploads) -> None:
    upload = begun(uploads)
    for _ in range(3):
        send(uploads, upload, 1, b"x" * 1000)
    assert uploads._join(upload).size == 1000


def test_parts_that_come_at_the_same_time_count_together(parts: Parts, uploads: Uploads) -> None:
    upload = begun(uploads)

    async def together() -> list[str | BaseException]:
        everyone_is_in = asyncio.Barrier(4)

        async def part() -> AsyncIterator[bytes]:
            await everyone_is_in.wait()
            yield b"x" * 400

        tasks = (uploads.write_part(upload, number, part()) for number in range(1, 5))
        return await asyncio.gather(*tasks, return_exceptions=True)

    refused = [answer for answer in asyncio.run(together()) if not isinstance(answer, str)]
    try:
        uploads._join(upload)
    except BodyTooLarge as error:
        refused.append(error)
    assert sum(size for (size,) in parts.rows("SELECT size FROM files")) <= 1000
    assert refused and all(isinstance(error, BodyTooLarge) for error in refused)


def test_an_owner_has_a_limit_of_files_and_parts_together(parts: Parts) -> None:
    uploads = uploads_of(parts, max_bytes=10_000, max_bytes_per_owner=20_000)
    first = begun(uploads)
    send(uploads, first, 1, b"x" * 8000)
    uploads._join(first)
    second, third = begun(uploads), begun(uploads)
    send(uploads, second, 1, b"x" * 6000)
    with pytest.raises(BodyTooLarge, match="20000 bytes"):
        send(uploads, third, 1, b"x" * 6001)
    send(uploads, third, 1, b"x" * 6000)
    assert [uploads._join(upload).size for upload in (second, third)] == [6000, 6000]


def test_an_owners_limit_is_its_own(parts: Parts) -> None:
    uploads = uploads_of(parts, max_bytes_per_owner=500)
    for owner in ("alice", "bob"):
        upload = begun(uploads, owner)
        send(uploads, upload, 1, b"x" * 500)
        uploads._join(upload)
        with pytest.raises(BodyTooLarge):
            send(uploads, begun(uploads, owner), 1, b"x")


def test_pictures_of_the_owner_do_not_count(parts: Parts) -> None:
    uploads = uploads_of(parts, max_bytes_per_owner=500)
    with parts.database.transaction() as connection:
        connection.execute(
            "INSERT INTO jobs (request_id, endpoint, owner, mode, priority, input, base_url, body_hash, is_kept,"
            " is_private, state, submitted_at) VALUES ('r', 'e', 'me', 'queue', 'normal', '', '', '', 1, 0,"
            " 'IN_QUEUE', 1)"
        )
        connection.execute("INSERT INTO files VALUES ('a.png', 'r', 'me', 5000, 'image/png', NULL, 0, 1, NULL)")
    upload = begun(uploads)
    send(uploads, upload, 1, b"x" * 500)
    assert uploads._join(upload).size == 500


def test_an_owner_has_room_again_when_a_file_is_gone(parts: Parts) -> None:
    uploads = uploads_of(parts, max_bytes_per_owner=500)
    upload = begun(uploads)
    send(uploads, upload, 1, b"x" * 500)
    parts.clock.now += LIFETIME
    assert uploads.sweep() == 1
    again = begun(uploads)
    send(uploads, again, 1, b"x" * 500)
    assert uploads._join(again).size == 500


# -- time


def test_what_was_abandoned_is_swept_and_the_rest_is_not(parts: Parts, uploads: Uploads) -> None:
    old = begun(uploads)
    send(uploads, old, 1, b"old")
    parts.clock.now += LIFETIME / 2
    young = begun(uploads)
    send(uploads, young, 1, b"young")
    parts.clock.now += LIFETIME / 2 - 1
    assert uploads.sweep() == 0
    assert uploads.find(old.upload_id) == old
    parts.clock.now += 1
    assert uploads.sweep() == 1
    assert under_way(parts) == sorted([young.upload_id, "1"])
    assert content(parts, uploads._join(young)) == b"young"


def test_an_upload_is_over_before_it_is_swept(parts: Parts, uploads: Uploads) -> None:
    upload = begun(uploads)
    parts.clock.now += LIFETIME
    with pytest.raises(NotFound, match="has ended"):
        uploads.find(upload.upload_id)


def test_a_finished_file_is_not_swept(parts: Parts, uploads: Uploads) -> None:
    upload = begun(uploads)
    send(uploads, upload, 1, b"hello")
    file = uploads._join(upload)
    parts.clock.now += 2 * LIFETIME
    assert uploads.sweep() == 0
    assert content(parts, file) == b"hello"


def test_a_restart_keeps_an_upload_under_way(tmp_path: Path) -> None:
    with opened(tmp_path) as parts:
        uploads = uploads_of(parts)
        upload = uploads.create("alice", "image/png", "a.png", Lifecycle(60.0, True))
        send(uploads, upload, 2, b"b")
    with opened(tmp_path) as parts:
        uploads = uploads_of(parts)
        assert parts.files.delete_orphans() == 0
        again = uploads.find(upload.upload_id)
        assert again == upload
        send(uploads, again, 1, b"a")
        file = uploads._join(again, [2, 1])
        assert (content(parts, file), file.owner, file.is_private) == (b"ab", "alice", True)


def test_a_restart_keeps_a_finished_file(tmp_path: Path) -> None:
    with opened(tmp_path) as parts:
        uploads = uploads_of(parts)
        upload = begun(uploads)
        send(uploads, upload, 1, b"hello")
        file = uploads._join(upload)
    with opened(tmp_path) as parts:
        assert parts.files.delete_orphans() == 0
        assert content(parts, file) == b"hello"


def test_what_a_crash_left_behind_is_gone_after_a_restart_and_a_sweep(tmp_path: Path) -> None:
    with opened(tmp_path) as parts:
        uploads = uploads_of(parts)
        lost, kept = begun(uploads), begun(uploads)
        for upload in (lost, kept):
            send(uploads, upload, 1, b"hello")
        # The row goes first, the folder after it: killed in between.
        with parts.database.transaction() as connection:
            connection.execute("DELETE FROM uploads WHERE upload_id = ?", (lost.upload_id,))
    with opened(tmp_path) as parts:
        uploads = uploads_of(parts)
        uploads.sweep()
        assert under_way(parts) == sorted([kept.upload_id, "1"])
        assert content(parts, uploads._join(kept)) == b"hello"


# -- names


NAMES = [
    ("a.png", "image/png", "png"),
    ("A.PNG", "image/png", "png"),
    ("archive.tar.gz", "application/gzip", "gz"),
    ("a", "image/png", "png"),
    ("a", "text/plain; charset=utf-8", "txt"),
    ("a", "nonsense", "bin"),
    ("a", "", "bin"),
    ("", "", "bin"),
    ("a.", "", "bin"),
    (".png", "", "bin"),
    ("a.p/../x", "", "bin"),
    ("../../a.png", "image/png", "png"),
    ("a.png\0", "", "bin"),
    ("a.toolongforanending", "image/jpeg", "jpg"),
    ("a.пнг", "image/webp", "webp"),
    ("1700000000000.png", "image/png", "png"),
]


@pytest.mark.parametrize(("file_name", "content_type", "ending"), NAMES)
def test_the_stored_name_is_ours_with_an_ending_of_theirs(
    parts: Parts, uploads: Uploads, file_name: str, content_type: str, ending: str
) -> None:
    upload = uploads.create("me", content_type, file_name, Lifecycle())
    assert upload.name.partition(".")[2] == ending
    send(uploads, upload, 1, b"x")
    assert content(parts, uploads._join(upload)) == b"x"


CLEANED = [
    ("a.txt", "a.txt"),
    ("  a b.txt ", "a b.txt"),
    ("a\r\nset-cookie: x.txt", "aset-cookie: x.txt"),
    ("a\0\x7f\u202etxt.exe", "atxt.exe"),
    ("März 🍎.txt", "März 🍎.txt"),
    ("x" * 300, "x" * 255),
    ("", "file"),
    ("\r\n", "file"),
]


@pytest.mark.parametrize(("file_name", "cleaned"), CLEANED)
def test_a_file_name_cannot_break_a_header(uploads: Uploads, file_name: str, cleaned: str) -> None:
    assert uploads.create("me", "text/plain", file_name, Lifecycle()).file_name == cleaned


@pytest.mark.parametrize(
    ("content_type", "cleaned"),
    [
        ("image/png", "image/png"),
        (" text/plain; charset=utf-8\t", "text/plain; charset=utf-8"),
        ("text/html\r\nx: y", "text/htmlx: y"),
        ("", "application/octet-stream"),
        ("\0", "application/octet-stream"),
    ],
)
def test_a_content_type_cannot_break_a_header(uploads: Uploads, content_type: str, cleaned: str) -> None:
    assert uploads.create("me", content_type, "a", Lifecycle()).content_type == cleaned


@pytest.mark.parametrize("content_type", ["image/пнг", "text/plain; name=файл", "🍎"])
def test_a_content_type_that_no_header_can_carry_is_bytes(uploads: Uploads, content_type: str) -> None:
    assert uploads.create("me", content_type, "a", Lifecycle()).content_type == "application/octet-stream"


# -- the disk


def test_the_folder_is_private(parts: Parts, uploads: Uploads) -> None:
    upload = begun(uploads)
    folder = parts.folder / "uploads"
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / upload.upload_id)] == [0o700, 0o700]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file may grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_part_that_finds_the_disk_full_leaves_nothing_and_can_be_sent_again(parts: Parts) -> None:
    uploads = uploads_of(parts, max_bytes=1_000_000, max_bytes_per_owner=1_000_000)
    upload = begun(uploads)
    with files_of_at_most(1000), pytest.raises(DiskFull):
        send(uploads, upload, 1, b"x" * 100_000)
    assert under_way(parts) == [upload.upload_id]
    send(uploads, upload, 1, b"x" * 100_000)
    assert uploads._join(upload).size == 100_000


def test_an_upload_that_finds_the_disk_full_at_its_end_can_be_completed_later(parts: Parts) -> None:
    uploads = uploads_of(parts, max_bytes=100_000, max_bytes_per_owner=100_000)
    upload = begun(uploads)
    for number in (1, 2):
        send(uploads, upload, number, b"x" * 50_000)
    with files_of_at_most(60_000), pytest.raises(DiskFull):
        uploads._join(upload)
    assert (parts.on_disk(), parts.rows("SELECT * FROM files")) == ([], [])
    # What was joined in vain takes no room from the parts.
    send(uploads, upload, 2, b"y" * 50_000)
    assert content(parts, uploads._join(upload)) == b"x" * 50_000 + b"y" * 50_000


def test_a_part_that_vanishes_while_others_are_weighed_is_no_error(parts: Parts, uploads: Uploads) -> None:
    upload = begun(uploads)
    # What another part of this owner looks like between its listing and its renaming: a name without a file.
    (parts.folder / "uploads" / upload.upload_id / "0123456789abcdef.part").symlink_to("gone")
    send(uploads, upload, 1, b"hello")
    assert content(parts, uploads._join(upload)) == b"hello"


def test_an_upload_that_was_completed_meanwhile_is_not_found(parts: Parts, uploads: Uploads) -> None:
    upload = begun(uploads)
    send(uploads, upload, 1, b"hello")
    uploads._join(upload)
    with pytest.raises(NotFound):
        uploads._join(upload)
    with pytest.raises(NotFound):
        send(uploads, upload, 1, b"hello")
    assert len(parts.rows("SELECT * FROM files")) == 1


# -- how many


def test_empty_files_count(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as a block, and together as many as may be."""
    monkeypatch.setattr(uploads_module, "MAX_FILES", 3)
    uploads = uploads_of(parts, max_bytes_per_owner=100_000)
    for _ in range(3):
        uploads._join(begun(uploads))
    assert parts.rows("SELECT num_uploads, upload_bytes FROM kept") == [(3, 3 * 4096)]
    with pytest.raises(TooManyRequests, match="3 uploaded files"):
        begun(uploads)
    begun(uploads, owner="you")


def test_empty_parts_count(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the uploads that they belong to."""
    monkeypatch.setattr(uploads_module, "MAX_FILES", 5)
    uploads = uploads_of(parts, max_bytes_per_owner=100_000)
    upload, other = begun(uploads), begun(uploads)
    for number in (1, 2):
        send(uploads, upload, number)
    send(uploads, other, 1)
    with pytest.raises(TooManyRequests, match="5 uploaded files and parts"):
        send(uploads, other, 2)
    # One that is here may come again, and an upload that is over leaves room.
    send(uploads, upload, 2, b"more")
    uploads.abort(upload)
    send(uploads, other, 2)


def test_empty_files_use_up_the_room_of_their_owner(parts: Parts) -> None:
    uploads = uploads_of(parts, max_bytes_per_owner=3 * 4096)
    for _ in range(3):
        uploads._join(begun(uploads))
    with pytest.raises(BodyTooLarge):
        send(uploads, begun(uploads), 1, b"x")


def test_a_restart_counts_what_is_there(parts: Parts) -> None:
    uploads = uploads_of(parts, max_bytes_per_owner=3 * 4096)
    upload = begun(uploads)
    for number in (1, 2):
        send(uploads, upload, number, b"x" * 100)
    uploads = uploads_of(parts, max_bytes_per_owner=3 * 4096)
    send(uploads, upload, 3, b"x" * 100)
    with pytest.raises(BodyTooLarge):
        send(uploads, upload, 4, b"x" * 100)
    assert uploads._join(upload).size == 300
