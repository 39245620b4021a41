"""Tests of uploads: their parts, limits, lifetime and names, on a real disk and with a manual clock."""

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
from tests.support.components import Components, open_components


def uploads_of(components: Components, *, max_bytes: int = 1000, max_bytes_per_owner: int = 10_000) -> Uploads:
    """Return uploads; the default limits are 1 kB per file and 10 kB per owner. A second call acts as a restart."""
    return Uploads(
        components.data_dir / "uploads",
        components.database,
        components.files,
        max_bytes=max_bytes,
        max_bytes_per_owner=max_bytes_per_owner,
        clock=components.clock,
    )


@pytest.fixture
def uploads(components: Components) -> Uploads:
    """Return uploads with the default limits of `uploads_of`."""
    return uploads_of(components)


def start_upload(uploads: Uploads, owner: str = "me", lifecycle: Lifecycle | None = None) -> Upload:
    """Start an upload of a text file; return the upload."""
    return uploads.create(owner, "text/plain", "a.txt", lifecycle or Lifecycle())


async def _chunks(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def send_part(uploads: Uploads, upload: Upload, part_number: int, *chunks: bytes) -> str:
    """Send one part and return its ETag."""
    return asyncio.run(uploads.write_part(upload, part_number, _chunks(*chunks)))


def served_bytes(components: Components, file: StoredFile) -> bytes:
    """Return the bytes that a client gets for this file."""
    assert components.files.find(file.name) == file
    return components.files.path(file).read_bytes()


def unfinished_paths(components: Components) -> list[str]:
    """Return the names of all files and directories of unfinished uploads."""
    return sorted(path.name for path in (components.data_dir / "uploads").rglob("*"))


# -- in parts


def test_a_completed_file_is_listed_with_its_metadata(components: Components, uploads: Uploads) -> None:
    upload = uploads.create("alice", "text/plain; charset=utf-8", "Tagebuch März.txt", Lifecycle(60.0, True))
    components.clock.now += 5
    send_part(uploads, upload, 1, b"hel", b"", b"lo")
    file = uploads._join(upload)
    expires_at = components.clock.now + 60
    assert file == StoredFile(
        upload.name, "alice", 5, "text/plain; charset=utf-8", "Tagebuch März.txt", True, expires_at
    )
    assert served_bytes(components, file) == b"hello"
    rows = components.rows("SELECT request_id, created_at FROM files")
    assert rows == [(None, components.clock.now)]


def test_completing_an_upload_removes_its_parts_and_its_row(components: Components, uploads: Uploads) -> None:
    upload = start_upload(uploads)
    send_part(uploads, upload, 1, b"hello")
    file = uploads._join(upload)
    assert (unfinished_paths(components), components.stored_file_names()) == ([], [file.name])
    assert components.rows("SELECT * FROM uploads") == []
    with pytest.raises(NotFound):
        uploads.find(upload.upload_id)


def test_a_file_is_not_served_before_it_is_complete(components: Components, uploads: Uploads) -> None:
    upload = start_upload(uploads)
    send_part(uploads, upload, 1, b"hello")
    assert components.files.find(upload.name) is None
    assert components.stored_file_names() == []


def test_an_etag_is_the_md5_of_its_part_in_quotes(uploads: Uploads) -> None:
    upload = start_upload(uploads)
    expected = hashlib.md5(b"hello").hexdigest()
    assert send_part(uploads, upload, 7, b"hel", b"lo") == f'"{expected}"'


@pytest.mark.parametrize("sent", [(1, 2, 3), (3, 1, 2), (10, 2, 9)])
@pytest.mark.parametrize("is_listed_backwards", [False, True])
def test_parts_are_joined_by_number_in_any_order(
    components: Components, uploads: Uploads, sent: tuple[int, ...], is_listed_backwards: bool
) -> None:
    upload = start_upload(uploads)
    for number in sent:
        send_part(uploads, upload, number, f"<{number}>".encode())
    listed = sorted(sent, reverse=is_listed_backwards)
    file = uploads._join(upload, listed)
    assert served_bytes(components, file) == "".join(f"<{number}>" for number in sorted(sent)).encode()


def test_a_part_that_is_sent_twice_or_listed_twice_counts_once(components: Components, uploads: Uploads) -> None:
    upload = start_upload(uploads)
    for chunk in (b"first try", b"second", b"third"):
        send_part(uploads, upload, 1, chunk)
    send_part(uploads, upload, 2, b"!")
    assert served_bytes(components, uploads._join(upload, [1, 2, 1, 2])) == b"third!"


def test_without_a_list_of_parts_all_sent_parts_are_joined(components: Components, uploads: Uploads) -> None:
    listings: tuple[list[int] | None, ...] = (None, [])
    for listed in listings:
        upload = start_upload(uploads)
        send_part(uploads, upload, 2, b"b")
        send_part(uploads, upload, 1, b"a")
        assert served_bytes(components, uploads._join(upload, listed)) == b"ab"


def test_a_missing_part_is_named_and_can_still_be_sent(components: Components, uploads: Uploads) -> None:
    upload = start_upload(uploads)
    send_part(uploads, upload, 1, b"a")
    send_part(uploads, upload, 3, b"c")
    with pytest.raises(BadRequest, match="Part 2 was not sent"):
        uploads._join(upload, [1, 2, 3])
    assert components.stored_file_names() == []
    send_part(uploads, upload, 2, b"b")
    assert served_bytes(components, uploads._join(upload, [1, 2, 3])) == b"abc"


def test_an_empty_file_is_a_file(components: Components, uploads: Uploads) -> None:
    upload = start_upload(uploads)
    send_part(uploads, upload, 1)
    assert served_bytes(components, uploads._join(upload)) == b""


@pytest.mark.parametrize("number", [0, -1, MAX_PARTS + 1])
def test_a_part_number_out_of_range_is_refused(components: Components, uploads: Uploads, number: int) -> None:
    upload = start_upload(uploads)
    with pytest.raises(BadRequest, match=f"from 1 to {MAX_PARTS}"):
        send_part(uploads, upload, number, b"x")
    assert unfinished_paths(components) == [upload.upload_id]
    send_part(uploads, upload, MAX_PARTS, b"x")


def test_an_unknown_upload_is_not_found(uploads: Uploads) -> None:
    start_upload(uploads)
    for upload_id in ("", "..", "0" * 32):
        with pytest.raises(NotFound):
            uploads.find(upload_id)


def test_a_disconnect_deletes_the_partial_part(components: Components, uploads: Uploads) -> None:
    async def interrupted_chunks() -> AsyncIterator[bytes]:
        yield b"half"
        raise ClientDisconnect

    upload = start_upload(uploads)
    with pytest.raises(ClientDisconnect):
        asyncio.run(uploads.write_part(upload, 1, interrupted_chunks()))
    assert unfinished_paths(components) == [upload.upload_id]
    send_part(uploads, upload, 1, b"whole")
    assert served_bytes(components, uploads._join(upload)) == b"whole"


def test_names_are_secrets_of_128_bits(uploads: Uploads) -> None:
    created = [start_upload(uploads) for _ in range(20)]
    assert len({upload.upload_id for upload in created} | {upload.name for upload in created}) == 40
    assert {len(upload.upload_id) for upload in created} == {32}
    assert {len(upload.name.partition(".")[0]) for upload in created} == {32}


# -- limits on bytes


def test_a_file_can_be_as_large_as_the_limit_but_not_larger(components: Components, uploads: Uploads) -> None:
    upload = start_upload(uploads)
    with pytest.raises(BodyTooLarge, match="1000 bytes"):
        send_part(uploads, upload, 1, b"x" * 600, b"x" * 401)
    assert unfinished_paths(components) == [upload.upload_id]
    send_part(uploads, upload, 1, b"x" * 600, b"x" * 400)
    assert uploads._join(upload).size == 1000


def test_the_size_limit_applies_to_all_parts_together(uploads: Uploads) -> None:
    upload = start_upload(uploads)
    send_part(uploads, upload, 1, b"x" * 600)
    with pytest.raises(BodyTooLarge, match="1000 bytes"):
        send_part(uploads, upload, 2, b"x" * 401)
    send_part(uploads, upload, 2, b"x" * 400)


def test_a_part_that_is_sent_again_replaces_the_earlier_one(uploads: Uploads) -> None:
    upload = start_upload(uploads)
    for _ in range(3):
        send_part(uploads, upload, 1, b"x" * 1000)
    assert uploads._join(upload).size == 1000


def test_the_size_limit_applies_to_parts_sent_at_the_same_time(components: Components, uploads: Uploads) -> None:
    upload = start_upload(uploads)

    async def send_all_at_once() -> list[str | BaseException]:
        all_started = asyncio.Barrier(4)

        async def chunks() -> AsyncIterator[bytes]:
            await all_started.wait()
            yield b"x" * 400

        tasks = (uploads.write_part(upload, number, chunks()) for number in range(1, 5))
        return await asyncio.gather(*tasks, return_exceptions=True)

    refused = [result for result in asyncio.run(send_all_at_once()) if not isinstance(result, str)]
    try:
        uploads._join(upload)
    except BodyTooLarge as error:
        refused.append(error)
    assert sum(size for (size,) in components.rows("SELECT size FROM files")) <= 1000
    assert refused and all(isinstance(error, BodyTooLarge) for error in refused)


def test_parallel_files_do_not_count_towards_the_limit_of_one_file(components: Components) -> None:
    uploads = uploads_of(components, max_bytes=10_000, max_bytes_per_owner=19_000)

    async def send_two() -> list[str | BaseException]:
        arrived = asyncio.Barrier(2)

        async def halves() -> AsyncIterator[bytes]:
            yield b"x" * 3000
            await arrived.wait()
            yield b"x" * 3000

        parts = (uploads.write_part(start_upload(uploads), 1, halves()) for _ in range(2))
        return await asyncio.gather(*parts, return_exceptions=True)

    results = asyncio.run(send_two())
    assert all(isinstance(result, str) for result in results), results
    # With both files stored, two more files exceed the limit of their owner.
    refused = [result for result in asyncio.run(send_two()) if not isinstance(result, str)]
    assert refused and all(isinstance(error, BodyTooLarge) for error in refused)


def test_the_owner_limit_applies_to_files_and_parts_together(components: Components) -> None:
    uploads = uploads_of(components, max_bytes=10_000, max_bytes_per_owner=20_000)
    first = start_upload(uploads)
    send_part(uploads, first, 1, b"x" * 8000)
    uploads._join(first)
    second, third = start_upload(uploads), start_upload(uploads)
    send_part(uploads, second, 1, b"x" * 6000)
    with pytest.raises(BodyTooLarge, match="20000 bytes"):
        send_part(uploads, third, 1, b"x" * 6001)
    send_part(uploads, third, 1, b"x" * 6000)
    assert [uploads._join(upload).size for upload in (second, third)] == [6000, 6000]


def test_each_owner_has_a_separate_limit(components: Components) -> None:
    uploads = uploads_of(components, max_bytes_per_owner=500)
    for owner in ("alice", "bob"):
        upload = start_upload(uploads, owner)
        send_part(uploads, upload, 1, b"x" * 500)
        uploads._join(upload)
        with pytest.raises(BodyTooLarge):
            send_part(uploads, start_upload(uploads, owner), 1, b"x")


def test_generated_images_do_not_count_towards_the_owner_limit(components: Components) -> None:
    uploads = uploads_of(components, max_bytes_per_owner=500)
    with components.database.transaction() as connection:
        connection.execute(
            "INSERT INTO jobs (request_id, endpoint, owner, mode, priority, input, base_url, body_hash, is_kept,"
            " is_private, state, submitted_at) VALUES ('r', 'e', 'me', 'queue', 'normal', '', '', '', 1, 0,"
            " 'IN_QUEUE', 1)"
        )
        connection.execute("INSERT INTO files VALUES ('a.png', 'r', 'me', 5000, 'image/png', NULL, 0, 1, NULL)")
    upload = start_upload(uploads)
    send_part(uploads, upload, 1, b"x" * 500)
    assert uploads._join(upload).size == 500


def test_an_expired_upload_frees_space_for_its_owner(components: Components) -> None:
    uploads = uploads_of(components, max_bytes_per_owner=500)
    upload = start_upload(uploads)
    send_part(uploads, upload, 1, b"x" * 500)
    components.clock.now += LIFETIME
    assert uploads.sweep() == 1
    second = start_upload(uploads)
    send_part(uploads, second, 1, b"x" * 500)
    assert uploads._join(second).size == 500


# -- lifetime and restarts


def test_the_sweep_deletes_only_abandoned_uploads(components: Components, uploads: Uploads) -> None:
    old = start_upload(uploads)
    send_part(uploads, old, 1, b"old")
    components.clock.now += LIFETIME / 2
    young = start_upload(uploads)
    send_part(uploads, young, 1, b"young")
    components.clock.now += LIFETIME / 2 - 1
    assert uploads.sweep() == 0
    assert uploads.find(old.upload_id) == old
    components.clock.now += 1
    assert uploads.sweep() == 1
    assert unfinished_paths(components) == sorted([young.upload_id, "1"])
    assert served_bytes(components, uploads._join(young)) == b"young"


def test_an_upload_ends_at_its_lifetime_before_the_sweep(components: Components, uploads: Uploads) -> None:
    upload = start_upload(uploads)
    components.clock.now += LIFETIME
    with pytest.raises(NotFound, match="has ended"):
        uploads.find(upload.upload_id)


def test_a_finished_file_is_not_swept(components: Components, uploads: Uploads) -> None:
    upload = start_upload(uploads)
    send_part(uploads, upload, 1, b"hello")
    file = uploads._join(upload)
    components.clock.now += 2 * LIFETIME
    assert uploads.sweep() == 0
    assert served_bytes(components, file) == b"hello"


def test_a_restart_keeps_an_unfinished_upload(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        uploads = uploads_of(components)
        upload = uploads.create("alice", "image/png", "a.png", Lifecycle(60.0, True))
        send_part(uploads, upload, 2, b"b")
    with open_components(tmp_path) as components:
        uploads = uploads_of(components)
        assert components.files.delete_orphans() == 0
        found = uploads.find(upload.upload_id)
        assert found == upload
        send_part(uploads, found, 1, b"a")
        file = uploads._join(found, [2, 1])
        assert (served_bytes(components, file), file.owner, file.is_private) == (b"ab", "alice", True)


def test_a_restart_keeps_a_finished_file(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        uploads = uploads_of(components)
        upload = start_upload(uploads)
        send_part(uploads, upload, 1, b"hello")
        file = uploads._join(upload)
    with open_components(tmp_path) as components:
        assert components.files.delete_orphans() == 0
        assert served_bytes(components, file) == b"hello"


def test_leftovers_of_a_crash_are_deleted_after_a_restart_and_a_sweep(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        uploads = uploads_of(components)
        deleted, kept = start_upload(uploads), start_upload(uploads)
        for upload in (deleted, kept):
            send_part(uploads, upload, 1, b"hello")
        # An upload is deleted row first, then directory. Deleting only the row acts as a crash in between.
        with components.database.transaction() as connection:
            connection.execute("DELETE FROM uploads WHERE upload_id = ?", (deleted.upload_id,))
    with open_components(tmp_path) as components:
        uploads = uploads_of(components)
        uploads.sweep()
        assert unfinished_paths(components) == sorted([kept.upload_id, "1"])
        assert served_bytes(components, uploads._join(kept)) == b"hello"


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
    ("lora.safetensors", "application/octet-stream", "safetensors"),
    ("a.toolongforanending", "image/jpeg", "jpg"),
    ("a.пнг", "image/webp", "webp"),
    ("1700000000000.png", "image/png", "png"),
]


@pytest.mark.parametrize(("file_name", "content_type", "extension"), NAMES)
def test_the_server_names_the_file_and_the_client_only_its_extension(
    components: Components, uploads: Uploads, file_name: str, content_type: str, extension: str
) -> None:
    upload = uploads.create("me", content_type, file_name, Lifecycle())
    assert upload.name.partition(".")[2] == extension
    send_part(uploads, upload, 1, b"x")
    assert served_bytes(components, uploads._join(upload)) == b"x"


CLEANED_NAMES = [
    ("a.txt", "a.txt"),
    ("  a b.txt ", "a b.txt"),
    ("a\r\nset-cookie: x.txt", "aset-cookie: x.txt"),
    ("a\0\x7f\u202etxt.exe", "atxt.exe"),
    ("März 🍎.txt", "März 🍎.txt"),
    ("x" * 300, "x" * 255),
    ("", "file"),
    ("\r\n", "file"),
]


@pytest.mark.parametrize(("file_name", "cleaned"), CLEANED_NAMES)
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
def test_a_content_type_outside_ascii_becomes_octet_stream(uploads: Uploads, content_type: str) -> None:
    assert uploads.create("me", content_type, "a", Lifecycle()).content_type == "application/octet-stream"


# -- the disk


def test_the_directories_are_private(components: Components, uploads: Uploads) -> None:
    upload = start_upload(uploads)
    directory = components.data_dir / "uploads"
    assert [path.stat().st_mode & 0o777 for path in (directory, directory / upload.upload_id)] == [0o700, 0o700]


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    """Limit every file to `size` bytes while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_part_refused_by_a_full_disk_leaves_nothing_and_can_be_sent_again(components: Components) -> None:
    uploads = uploads_of(components, max_bytes=1_000_000, max_bytes_per_owner=1_000_000)
    upload = start_upload(uploads)
    with limited_file_size(1000), pytest.raises(DiskFull):
        send_part(uploads, upload, 1, b"x" * 100_000)
    assert unfinished_paths(components) == [upload.upload_id]
    send_part(uploads, upload, 1, b"x" * 100_000)
    assert uploads._join(upload).size == 100_000


def test_an_upload_whose_completion_fills_the_disk_can_be_completed_later(components: Components) -> None:
    uploads = uploads_of(components, max_bytes=100_000, max_bytes_per_owner=100_000)
    upload = start_upload(uploads)
    for number in (1, 2):
        send_part(uploads, upload, number, b"x" * 50_000)
    with limited_file_size(60_000), pytest.raises(DiskFull):
        uploads._join(upload)
    assert (components.stored_file_names(), components.rows("SELECT * FROM files")) == ([], [])
    # The discarded join does not count towards the limit.
    send_part(uploads, upload, 2, b"y" * 50_000)
    assert served_bytes(components, uploads._join(upload)) == b"x" * 50_000 + b"y" * 50_000


def test_a_part_that_vanishes_while_sizes_are_measured_is_no_error(components: Components, uploads: Uploads) -> None:
    upload = start_upload(uploads)
    # This link to nothing acts as a part that is renamed right after the directory was listed.
    (components.data_dir / "uploads" / upload.upload_id / "0123456789abcdef.part").symlink_to("gone")
    send_part(uploads, upload, 1, b"hello")
    assert served_bytes(components, uploads._join(upload)) == b"hello"


def test_a_completed_upload_is_not_found(components: Components, uploads: Uploads) -> None:
    upload = start_upload(uploads)
    send_part(uploads, upload, 1, b"hello")
    uploads._join(upload)
    with pytest.raises(NotFound):
        uploads._join(upload)
    with pytest.raises(NotFound):
        send_part(uploads, upload, 1, b"hello")
    assert len(components.rows("SELECT * FROM files")) == 1


# -- limits on the number of files


def test_empty_files_count_towards_the_number_of_files(components: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each empty file counts as one disk block and towards the limit on the number of files."""
    monkeypatch.setattr(uploads_module, "MAX_FILES", 3)
    uploads = uploads_of(components, max_bytes_per_owner=100_000)
    for _ in range(3):
        uploads._join(start_upload(uploads))
    assert components.rows("SELECT num_uploads, upload_bytes FROM kept") == [(3, 3 * 4096)]
    with pytest.raises(TooManyRequests, match="3 uploaded files"):
        start_upload(uploads)
    start_upload(uploads, owner="you")


def test_empty_parts_count_towards_the_number_of_files(components: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each empty part counts, and so does the upload that it belongs to."""
    monkeypatch.setattr(uploads_module, "MAX_FILES", 5)
    uploads = uploads_of(components, max_bytes_per_owner=100_000)
    upload, other = start_upload(uploads), start_upload(uploads)
    for number in (1, 2):
        send_part(uploads, upload, number)
    send_part(uploads, other, 1)
    with pytest.raises(TooManyRequests, match="5 uploaded files and parts"):
        send_part(uploads, other, 2)
    # A stored part can be sent again. An aborted upload frees its share.
    send_part(uploads, upload, 2, b"more")
    uploads.abort(upload)
    send_part(uploads, other, 2)


def test_empty_files_count_towards_the_byte_limit_of_their_owner(components: Components) -> None:
    uploads = uploads_of(components, max_bytes_per_owner=3 * 4096)
    for _ in range(3):
        uploads._join(start_upload(uploads))
    with pytest.raises(BodyTooLarge):
        send_part(uploads, start_upload(uploads), 1, b"x")


def test_a_restart_counts_the_stored_parts(components: Components) -> None:
    uploads = uploads_of(components, max_bytes_per_owner=3 * 4096)
    upload = start_upload(uploads)
    for number in (1, 2):
        send_part(uploads, upload, number, b"x" * 100)
    uploads = uploads_of(components, max_bytes_per_owner=3 * 4096)
    send_part(uploads, upload, 3, b"x" * 100)
    with pytest.raises(BodyTooLarge):
        send_part(uploads, upload, 4, b"x" * 100)
    assert uploads._join(upload).size == 300
