"""Tests of multipart forms whose files go to temporary files while the body arrives."""

import json
import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from server.errors import InvalidInput, InvalidInputFile
from server.inputs.form import MAX_PARTS, SpooledForm
from server.inputs.spool import MAX_TEXT

TYPE = "multipart/form-data; boundary=frontier"
MAX_BYTES = 200_000
CONTENT = random.Random(0).randbytes(100_000) + b"\r\n--front\r\n--\r\n"


def part(name: str, content: bytes, filename: str | None = None, more: str = "") -> bytes:
    """Encode one part of a form; `more` is the end of its Content-Disposition."""
    more += "" if filename is None else f'; filename="{filename}"\r\nContent-Type: image/png'
    return f'--frontier\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"


END = b"--frontier--\r\n"


@pytest.fixture
def temp_dir(tmp_path: Path) -> Iterator[Path]:
    """Yield a directory for the temporary files, which must be empty at the end."""
    directory = tmp_path / "temp"
    directory.mkdir()
    yield directory
    assert not list(directory.iterdir())


def empty_form(directory: Path, content_type: str = TYPE) -> SpooledForm:
    names = iter(range(1000))
    return SpooledForm(lambda: directory / str(next(names)), content_type, max_file_bytes=MAX_BYTES)


@pytest.mark.parametrize("part_size", [1, 7, 1000, 2**20])
def test_files_go_to_the_disk_and_fields_stay(temp_dir: Path, tmp_path: Path, part_size: int) -> None:
    form = empty_form(temp_dir)
    body = part("prompt", "é\r\n".encode()) + part("image[]", CONTENT, "a.png") + part("image", b"x", "") + END
    for start in range(0, len(body), part_size):
        form.write(body[start : start + part_size])
    form.finish()
    assert json.loads(form.text) == {"prompt": "é\r\n"}
    first, second = form.files["image"]
    file = form.find(first.url)
    assert file is first
    file.link(tmp_path / "linked", MAX_BYTES)
    assert (tmp_path / "linked").read_bytes() == CONTENT
    assert first.url != second.url
    assert form.is_in(f"a {first.name} b")
    form.close()


def test_a_converted_file(temp_dir: Path, tmp_path: Path) -> None:
    """Convert a file that is as large as a file may be; the result may be larger."""
    form = empty_form(temp_dir)
    form.write(part("image", bytes(MAX_BYTES), "a.png") + END)
    form.finish()
    (file,) = form.files["image"]
    file.convert = lambda source, target: target.write_bytes(source.read_bytes() + b"more")
    file.link(tmp_path / "converted", MAX_BYTES)
    assert (tmp_path / "converted").stat().st_size == MAX_BYTES + 4
    assert (tmp_path / "converted").stat().st_nlink == 1
    form.close()


def test_a_file_input_without_a_chosen_file_is_absent(temp_dir: Path) -> None:
    """Ignore the empty part that browsers send for such an input; an empty file with a name is a file."""
    form = empty_form(temp_dir)
    form.write(part("mask", b"", "") + part("image", b"", "a.png") + END)
    form.finish()
    assert not form.files.get("mask")
    assert len(form.files["image"]) == 1
    form.close()


def test_a_file_name_in_another_encoding(temp_dir: Path) -> None:
    form = empty_form(temp_dir)
    form.write(part("image", CONTENT, more="; FileName*=UTF-8''%C3%A9.png") + part("a; filename*=b", b"x") + END)
    form.finish()
    assert len(form.files["image"]) == 1
    assert json.loads(form.text) == {"a; filename*=b": "x"}
    form.close()


def test_a_large_file_is_neither_kept_nor_converted(temp_dir: Path, tmp_path: Path) -> None:
    form = empty_form(temp_dir)
    form.write(part("image", bytes(MAX_BYTES), "a.png")[:-2])
    form.write(b"x\r\n" + END)
    form.finish()
    (file,) = form.files["image"]
    assert [path.stat().st_size for path in temp_dir.iterdir()] == [MAX_BYTES]
    file.convert = lambda source, target: pytest.fail("the file was converted")
    with pytest.raises(InvalidInputFile, match="larger than"):
        file.link(tmp_path / "linked", MAX_BYTES)
    assert not (tmp_path / "linked").exists()
    form.close()


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_full_disk_keeps_no_file(temp_dir: Path, is_cut: bool) -> None:
    """Delete all files, also if the first one cannot be closed, because the rest of it cannot be written."""
    (temp_dir / "0").symlink_to("/dev/full")
    form = empty_form(temp_dir)
    body = part("image", b"abc", "a.png") + part("mask", b"def", "b.png") + END
    with nullcontext() if is_cut else pytest.raises(OSError, match="No space left"):
        form.write(body[: body.index(b"abc") + 3] if is_cut else body)
    form.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"prompt=x",
        part("prompt", b"x"),
        part("image", b"x", "a.png"),
        part("image", b"x", "a.png")[:-5],
        part("x", b"") * (MAX_PARTS + 1) + END,
        part("prompt", bytes(MAX_TEXT + 1)) + END,
        b"--frontier\r\n" + b"A: b\r\n" * 1000 + b"\r\n\r\n" + END,
        b"--frontier\r\n" + b"A" * 100_000 + b": b\r\n\r\n\r\n" + END,
        b"--frontier\r\nno header\r\n\r\n\r\n" + END,
        part("image", b"\r\n--frontier-x" * MAX_PARTS, "a.png") + END,
        part("image", b"", "a.png") + b"--frontier" + b" \t" * 50 + b"\r\n\r\n\r\n" + END,
    ],
    ids=[
        *("empty", "urlencoded", "no end", "no end of a file", "a cut file", "parts", "text", "headers", "long", "bad"),
        *("near boundaries", "padding"),
    ],
)
def test_malformed_and_oversized_forms(temp_dir: Path, body: bytes) -> None:
    form = empty_form(temp_dir)
    with pytest.raises(InvalidInput) as raised:
        form.write(body)
        form.finish()
    assert raised.value.detail[0]["type"] == "multipart_invalid"
    form.close()


@pytest.mark.parametrize("part_size", [64, 2**20])
def test_padding_after_a_boundary(temp_dir: Path, part_size: int) -> None:
    """Accept a little, as RFC 2046 demands, but not so much that the parser takes long, however the body is cut."""
    start, end = part("prompt", b"x") + b"--frontier", b"\r\n" + part("size", b"y").partition(b"\r\n")[2] + END
    for padding, is_accepted in ((b" " * 60 + b"\t", True), (b" " * 65, False), (b" " * 1000, False)):
        form, body = empty_form(temp_dir), start + padding + end
        with nullcontext() if is_accepted else pytest.raises(InvalidInput, match="spaces after a boundary"):
            for place in range(0, len(body), part_size):
                form.write(body[place : place + part_size])
            form.finish()
            assert json.loads(form.text) == {"prompt": "x", "size": "y"}
        form.close()


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=x"])
def test_other_content_types(temp_dir: Path, content_type: str) -> None:
    with pytest.raises(InvalidInput, match="multipart/form-data with a boundary"):
        empty_form(temp_dir, content_type)
