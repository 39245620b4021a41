"""Tests of request bodies whose long base64 data goes to temporary files while the body arrives."""

import base64
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.errors import InvalidInput, InvalidInputFile
from server.inputs.spool import MAX_IN_MEMORY, MAX_TEXT, SpooledBody

LONG = random.Random(0).randbytes(MAX_IN_MEMORY)
URI = f"data:image/png;base64,{base64.b64encode(LONG).decode()}"


@pytest.fixture
def temp_dir(tmp_path: Path) -> Iterator[Path]:
    """Yield a directory for the temporary files, which must be empty at the end."""
    directory = tmp_path / "temp"
    directory.mkdir()
    yield directory
    assert not list(directory.iterdir())


def spooled(text: bytes, directory: Path, part_size: int = 2**18) -> SpooledBody:
    """Return a body that arrived in parts of this size."""
    names = iter(range(1000))
    body = SpooledBody(lambda: directory / str(next(names)))
    for start in range(0, len(text), part_size):
        body.write(text[start : start + part_size])
    body.finish()
    return body


def content(body: SpooledBody, url: str, to: Path) -> bytes:
    """Link the data that a URL of the body stands for to the file `to`; return the bytes."""
    data = body.find(url)
    assert data
    to.unlink(missing_ok=True)
    data.link(to, 2**30)
    return to.read_bytes()


@pytest.mark.parametrize("part_size", [7, 1000, 65_536, 2**20])
def test_long_data_goes_to_a_file_and_the_rest_stays(temp_dir: Path, tmp_path: Path, part_size: int) -> None:
    short = "data:image/png;base64,AAAA"
    sent = {"prompt": 'a ";base64," sign', "image_url": URI, "small": short, "again": [URI, 1, ";base64,"]}
    body = spooled(json.dumps(sent).encode(), temp_dir, part_size)
    read = json.loads(body.text)
    assert read["again"][0] == read["image_url"]
    assert content(body, read["image_url"], tmp_path / "file") == LONG
    assert len(list(temp_dir.iterdir())) == 1, "the same data is kept once"
    assert (read["prompt"], read["small"], read["again"][1:]) == (sent["prompt"], short, [1, ";base64,"])
    assert read["image_url"][:1000] == URI[:1000], "error messages quote the start"
    assert len(body.text) < 3000
    body.close()


@pytest.mark.parametrize(
    "escapes",
    [{"/": "\\/"}, {"+": "\\u002B", "=": "\\u003D"}, {"+": "\\u002b", "/": "\\u002f", "=": "\\u003d"}],
    ids=["php", "dotnet", "lower case"],
)
@pytest.mark.parametrize("part_size", [7, 1001, 2**20])
def test_escapes_of_json_encoders(temp_dir: Path, tmp_path: Path, escapes: dict[str, str], part_size: int) -> None:
    # One byte more needs padding.
    data = LONG + b"x"
    text = json.dumps({"url": f"data:;base64,{base64.b64encode(data).decode()}"})
    start, sent, end = text.partition(base64.b64encode(data).decode())
    for plain, escaped in escapes.items():
        sent = sent.replace(plain, escaped)
    body = spooled((start + sent + end).encode(), temp_dir, part_size)
    assert content(body, json.loads(body.text)["url"], tmp_path / "file") == data
    body.close()


def test_any_json_reads_as_before_in_any_parts(temp_dir: Path, tmp_path: Path) -> None:
    chance = random.Random(1)
    for _ in range(60):
        sent = [_any_string(chance) for _ in range(chance.randrange(1, 8))]
        text = json.dumps(sent, ensure_ascii=chance.random() < 0.5).encode()
        body = spooled(text, temp_dir, chance.choice([1009, 65_536, len(text)]))
        read: list[str] = json.loads(body.text)
        for was, now in zip(sent, read, strict=True):
            if was != now:
                head = was.rindex(";base64,") + len(";base64,")
                assert content(body, now, tmp_path / "file") == base64.b64decode(was[head:])
                assert now.startswith(was[:head])
        body.close()


def _any_string(chance: random.Random) -> str:
    pieces = [
        "".join(chance.choices('abc;base64,"\\/é\n🎨{}[]', k=chance.randrange(40))),
        chance.choice(["", ";base64,", "data:image/png;base64,"]),
        base64.b64encode(chance.randbytes(chance.choice([0, 5, 1000, 50_000, 70_000]))).decode(),
    ]
    return "".join(pieces)


def test_text_of_any_other_kind_is_limited(temp_dir: Path) -> None:
    with pytest.raises(InvalidInput, match="at most"):
        spooled(json.dumps({"prompt": "x" * MAX_TEXT}).encode(), temp_dir)
    with pytest.raises(InvalidInput, match="at most"):
        spooled(b'";base64,"' * (MAX_TEXT // 10 + 1), temp_dir)


def _broken(where: str) -> Any:
    encoded = base64.b64encode(LONG + b"x").decode()
    return {"inside": encoded[:9] + "=" + encoded[9:], "after": encoded + "AAAA", "cut": encoded[:-1]}[where]


@pytest.mark.parametrize("where", ["inside", "after", "cut"])
def test_data_that_is_not_base64_is_refused(temp_dir: Path, tmp_path: Path, where: str) -> None:
    body = spooled(json.dumps({"url": f"data:;base64,{_broken(where)}"}).encode(), temp_dir, 1000)
    data = body.find(json.loads(body.text)["url"])
    assert data
    with pytest.raises(InvalidInputFile, match="not base64"):
        data.link(tmp_path / "file", 2**30)
    body.close()


def test_a_string_that_continues_after_its_data_stands_for_no_file(temp_dir: Path) -> None:
    body = spooled(json.dumps({"url": f"{URI}\n"}).encode(), temp_dir)
    url = json.loads(body.text)["url"]
    assert body.find(url) is None
    assert body.is_in(url)
    body.close()
