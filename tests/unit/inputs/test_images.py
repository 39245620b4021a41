"""Tests of decoding: mutated images, and the process that decodes GIF and AVIF."""

import logging
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest

from models.image_size import Limits
from server.errors import InternalError, InvalidInputFile
from server.inputs import child_process, image_decoder, images
from server.inputs.child_process import Result
from tests.support.hostile_images import AVIF, GIF, JPEG, PNG, PROGRESSIVE, WEBP

#: Most mutated files have one of the first formats, because each GIF and AVIF starts a process.
FORMATS = ("PNG", "JPEG", "WEBP", "progressive") * 4 + ("GIF", "AVIF")
VALID = {"PNG": PNG, "JPEG": JPEG, "WEBP": WEBP, "progressive": PROGRESSIVE, "GIF": GIF, "AVIF": AVIF}


def mutate(number: int, directory: Path) -> str:
    """Change a few bytes of a valid image, and assert that it decodes to RGB within the limits or is rejected.

    Return the format.
    """
    rng = numpy.random.default_rng(number)
    name = FORMATS[rng.integers(len(FORMATS))]
    content = bytearray(VALID[name])
    for index in rng.integers(len(content) if number % 2 else min(200, len(content)), size=1 + number % 7):
        content[index] = rng.integers(256)
    if number % 5 == 0:
        del content[int(rng.integers(len(content))) :]
    path = directory / "mutated"
    path.write_bytes(content)
    limits = Limits()
    try:
        result = images.decode_image(path, limits)
    except InvalidInputFile:
        return name
    assert result.mode == "RGB"
    assert limits.min_side <= min(result.size) <= max(result.size) <= limits.max_side
    return name


def test_mutations(tmp_path: Path) -> None:
    assert {mutate(number, tmp_path) for number in range(300)} == set(VALID)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_mutations(tmp_path: Path) -> None:
    assert {mutate(number, tmp_path) for number in range(20_000)} == set(VALID)


# -- the process


@pytest.fixture
def gif(tmp_path: Path) -> Path:
    path = tmp_path / "a.gif"
    path.write_bytes(GIF)
    return path


def replace_decoder(monkeypatch: pytest.MonkeyPatch, directory: Path, source: str) -> None:
    """Run another program instead of the decoder."""
    (directory / "decoder.py").write_text(source)
    monkeypatch.setattr(image_decoder, "__file__", str(directory / "decoder.py"))


def test_an_image_that_takes_too_long(monkeypatch: pytest.MonkeyPatch, gif: Path) -> None:
    monkeypatch.setattr(child_process, "MAX_SECONDS", 0.001)
    with pytest.raises(InternalError, match=r"did not end within 0\.001 seconds"):
        images.decode_image(gif, Limits())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys; sys.stderr.write('it is odd'); sys.exit(12)", "cannot be read: it is odd"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", "takes more than 30 seconds"),
    ],
)
def test_an_image_at_fault_is_refused(
    monkeypatch: pytest.MonkeyPatch, gif: Path, tmp_path: Path, source: str, message: str
) -> None:
    replace_decoder(monkeypatch, tmp_path, source)
    with pytest.raises(InvalidInputFile, match=message):
        images.decode_image(gif, Limits())


@pytest.mark.parametrize(
    "source",
    [
        "import server_without_this_module",
        "raise OSError(28, 'No space left on device')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_a_fault_of_the_machine_is_logged_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gif: Path, tmp_path: Path, source: str
) -> None:
    replace_decoder(monkeypatch, tmp_path, source)
    with caplog.at_level(logging.ERROR), pytest.raises(InternalError) as raised:
        images.decode_image(gif, Limits())
    assert str(tmp_path) not in str(raised.value)
    assert "server.inputs.image_decoder ended with the status" in caplog.text


def test_two_processes_run_at_a_time(monkeypatch: pytest.MonkeyPatch, gif: Path) -> None:
    """Run eight decodings, each of which waits for a second one."""
    lock, pair = threading.Lock(), threading.Barrier(2, timeout=60)
    running, most = set[int](), list[int]()

    def run(program: ModuleType, file: Path, *arguments: str, expected: Any) -> Result:
        with lock:
            running.add(threading.get_ident())
            most.append(len(running))
        pair.wait()
        with lock:
            running.remove(threading.get_ident())
        return Result(0, PNG, "")

    monkeypatch.setattr(images, "run_program", run)
    threads = [threading.Thread(target=images.decode_image, args=(gif, Limits())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (8, 2)
