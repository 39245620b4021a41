"""Tests of the file store on a real disk."""

import resource
from pathlib import Path

import pytest

from server.errors import DiskFull
from server.storage.file_store import Lifecycle, StoredFile
from tests.support.components import Components, finish_job, open_components

NAME = "0123456789abcdef0123456789abcdef"


def save_unlisted(components: Components, content: bytes = b"an image", extension: str = "png") -> StoredFile:
    """Save a file on the disk without listing it in the database; return the file."""
    return components.files.create(content, extension, f"image/{extension}", "me", Lifecycle())


def save_listed(components: Components, lifetime: float | None = None, is_private: bool = False) -> StoredFile:
    """Save a file and finish the job that lists it; return the file."""
    file = components.files.create(b"an image", "png", "image/png", "me", Lifecycle(lifetime, is_private))
    finish_job(components, file)
    return file


@pytest.mark.parametrize(("lifetime", "is_private"), [(None, False), (60.0, True)])
def test_a_listed_file_is_found_with_its_content_and_metadata(
    components: Components, lifetime: float | None, is_private: bool
) -> None:
    file = save_listed(components, lifetime, is_private)
    expires_at = None if lifetime is None else components.clock.now + lifetime
    assert file == StoredFile(file.name, "me", 8, "image/png", None, is_private, expires_at)
    assert components.files.find(file.name) == file
    assert components.files.path(file) == components.data_dir / "files" / file.name
    assert components.files.path(file).read_bytes() == b"an image"


def test_a_name_is_128_random_bits_and_an_extension(components: Components) -> None:
    names = {save_unlisted(components, extension="jpg").name for _ in range(50)}
    assert len(names) == 50
    assert {(len(name.partition(".")[0]), name.partition(".")[2]) for name in names} == {(32, "jpg")}


def test_saving_leaves_no_partial_file(components: Components) -> None:
    file = save_unlisted(components)
    assert components.stored_file_names() == [file.name]


def test_the_directories_are_private(components: Components) -> None:
    assert [directory.stat().st_mode & 0o777 for directory in (components.data_dir, components.data_dir / "files")] == [
        0o700,
        0o700,
    ]


def test_a_file_that_no_job_lists_is_not_served(components: Components) -> None:
    file = save_unlisted(components)
    assert components.files.find(file.name) is None


def test_a_file_expires(components: Components) -> None:
    file = save_listed(components, lifetime=60.0)
    assert file.expires_at == components.clock.now + 60
    components.clock.now += 59.9
    assert components.files.find(file.name)
    components.clock.now += 0.1
    assert components.files.find(file.name) is None


def test_deleting_a_missing_file_is_no_error(components: Components) -> None:
    file = save_listed(components)
    components.files.delete([file.name, file.name, f"{NAME}.png"])
    assert components.stored_file_names() == []


BAD_NAMES = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "../queue.sqlite3",
    "..%2fqueue.sqlite3",
    "..\\queue.sqlite3",
    f"../files/{NAME}.png",
    f"./{NAME}.png",
    f"{NAME}.png/",
    f"{NAME}.png/../../lock",
    f"{NAME}.png\0",
    f"{NAME}.png\n",
    f"{NAME}.png.part",
    f"{NAME.upper()}.png",
    f"{NAME}.PNG",
    f"{NAME}",
    f"{NAME}.",
    f"{NAME}.abcdefghijklmnopq",
    f"{NAME}.p-g",
    f"{NAME}.p_g",
    f"{NAME}.tar.gz",
    f"{NAME}0.png",
    f"{NAME[:-1]}.png",
    f" {NAME}.png",
    "".join(chr(ord(letter) + 0xFEE0) for letter in NAME) + ".png",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_invalid_name_is_never_found(components: Components, name: str) -> None:
    finish_job(components, StoredFile(name, "me", 1, "image/png"))
    assert components.files.find(name) is None


def test_orphans_are_deleted_and_listed_files_kept(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        kept = save_listed(components)
        save_unlisted(components, b"its row never came")
        (tmp_path / "files" / f"{NAME}.png.part").write_bytes(b"half")
    with open_components(tmp_path) as components:
        assert components.files.delete_orphans() == 2
        assert components.stored_file_names() == [kept.name]
        assert components.files.delete_orphans() == 0


def test_a_full_disk_raises_disk_full_and_leaves_no_file(components: Components) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskFull):
            save_unlisted(components, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert components.stored_file_names() == []
    assert save_unlisted(components, b"x" * 100_000).size == 100_000
