"""The file store on a real disk."""

import resource
from pathlib import Path

import pytest

from server.errors import DiskFull
from server.jobs import StoredFile
from tests.parts import Parts, finished, opened

NAME = "0123456789abcdef0123456789abcdef"


def saved(parts: Parts, content: bytes = b"picture", lifetime: float | None = None) -> StoredFile:
    """A file that its job lists."""
    file = parts.files.save(content, "png", "image/png", lifetime)
    finished(parts, file)
    return file


def test_a_listed_file_is_opened(parts: Parts) -> None:
    file = saved(parts)
    assert parts.files.open(file.name) == (parts.folder / "files" / file.name, "image/png")
    assert (parts.folder / "files" / file.name).read_bytes() == b"picture"
    assert (file.size, file.expires_at) == (7, None)


def test_a_name_is_128_random_bits_and_an_ending(parts: Parts) -> None:
    names = {parts.files.save(b"x", "jpg", "image/jpeg", None).name for _ in range(50)}
    assert len(names) == 50
    assert {(len(name.partition(".")[0]), name.partition(".")[2]) for name in names} == {(32, "jpg")}


def test_nothing_half_written_is_left(parts: Parts) -> None:
    file = parts.files.save(b"x", "png", "image/png", None)
    assert parts.on_disk() == [file.name]


def test_the_folder_is_private(parts: Parts) -> None:
    assert [folder.stat().st_mode & 0o777 for folder in (parts.folder, parts.folder / "files")] == [0o700, 0o700]


def test_a_file_that_no_job_lists_is_not_served(parts: Parts) -> None:
    file = parts.files.save(b"x", "png", "image/png", None)
    assert parts.files.open(file.name) is None


def test_a_file_expires(parts: Parts) -> None:
    file = saved(parts, lifetime=60)
    assert file.expires_at == parts.clock.now + 60
    parts.clock.now += 59.9
    assert parts.files.open(file.name)
    parts.clock.now += 0.1
    assert parts.files.open(file.name) is None


def test_removing_what_is_gone_already_is_no_error(parts: Parts) -> None:
    file = saved(parts)
    parts.files.remove([file.name, file.name, f"{NAME}.png"])
    assert parts.on_disk() == []


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
    f"{NAME}.p",
    f"{NAME}0.png",
    f"{NAME[:-1]}.png",
    f" {NAME}.png",
    "".join(chr(ord(letter) + 0xFEE0) for letter in NAME) + ".png",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_of_another_shape_is_never_opened(parts: Parts, name: str) -> None:
    finished(parts, StoredFile(name, 1, "image/png"))
    assert parts.files.open(name) is None


def test_strays_are_removed_and_listed_files_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as parts:
        kept = saved(parts)
        parts.files.save(b"its row never came", "png", "image/png", None)
        (tmp_path / "files" / f"{NAME}.png.part").write_bytes(b"half")
    with opened(tmp_path) as parts:
        assert parts.files.remove_strays() == 2
        assert parts.on_disk() == [kept.name]
        assert parts.files.remove_strays() == 0


def test_a_full_disk_is_told_and_leaves_nothing_behind(parts: Parts) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskFull):
            parts.files.save(b"x" * 100_000, "png", "image/png", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert parts.on_disk() == []
    assert parts.files.save(b"x" * 100_000, "png", "image/png", None).size == 100_000
