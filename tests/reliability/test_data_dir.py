"""What a start finds in the data folder: the operator's own files, what is missing, what is damaged."""

import logging
from pathlib import Path

import pytest

from server.inputs.cache import GRACE_SECONDS
from tests.support.components import opened
from tests.support.server_process import TEST_MODELS, serving
from tests.unit.cli.test_control import flux_server
from tests.unit.storage.test_uploads import uploads_of

HEX = "0123456789abcdef"
#: What somebody else would call files, and what comes close to the names of ours.
FOREIGN = ("contract.txt", "notes", f"{HEX}.png", f"{HEX * 2}.PNG", f"{HEX * 2}.png.bak", f"{HEX * 4}.txt", "q.part")


@pytest.mark.parametrize("name", ["files", "uploads", "inputs"])
def test_a_folder_of_somebody_elses_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    """A wrong --data-dir, or one whose database was not restored."""
    precious = tmp_path / name / "sub" / "contract.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    with serving(tmp_path, TEST_MODELS) as server:
        server.wait_for(rf"could not start:\n{tmp_path} has {name}/ but no queue\.sqlite3: it is not a data directory")
        assert server.process.wait(60) == 1
    done = flux_server(tmp_path, "keys", "add", "shop")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"has {name}/ but no queue.sqlite3" in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [precious]


@pytest.mark.parametrize("mode", [0o644, 0o666])
def test_nobody_else_can_hold_the_lock(tmp_path: Path, mode: int) -> None:
    """Whoever can open a file can lock it, and so keep the server from starting."""
    (tmp_path / "lock").touch()
    (tmp_path / "lock").chmod(mode)
    with opened(tmp_path):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


def test_a_new_disk_in_the_place_of_a_folder_is_no_stranger(tmp_path: Path) -> None:
    """Of ext4's, which has a folder of its own from the beginning."""
    (tmp_path / "files" / "lost+found").mkdir(parents=True)
    (tmp_path / "uploads").mkdir()
    with opened(tmp_path) as parts:
        assert parts.files.delete_orphans() == 0
    assert (tmp_path / "files" / "lost+found").is_dir()


def test_only_what_the_server_could_have_made_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with opened(tmp_path) as parts:
        uploads_of(parts)
        folders = [tmp_path / name for name in ("files", "uploads", "inputs")]
        for folder in folders:
            for name in FOREIGN:
                (folder / name).write_text("precious")
            (folder / "sub").mkdir()
            (folder / "sub" / f"{HEX * 2}.png").write_text("precious")
        kept = {path for folder in folders for path in folder.rglob("*")}
        (tmp_path / "files" / f"{HEX * 2}.png").write_text("a picture without a row")
        (tmp_path / "files" / f"{HEX * 2}.png.part").write_text("half of one")
        # By their names these two are ours, and yet they are not: nobody's link is followed.
        (tmp_path / "files" / f"{HEX * 2}.folder").mkdir()
        (tmp_path / "uploads" / (HEX * 2)[::-1]).symlink_to(tmp_path / "files" / "sub")
        kept |= {tmp_path / "files" / f"{HEX * 2}.folder", tmp_path / "uploads" / (HEX * 2)[::-1]}
        (tmp_path / "uploads" / (HEX * 2)).mkdir()
        (tmp_path / "uploads" / (HEX * 2) / "1").write_text("a part")
        (tmp_path / "uploads" / f"{HEX}.whole").write_text("half of one")
        (tmp_path / "inputs" / f"{HEX * 4}.png").write_text("nobody needs it")
        (tmp_path / "inputs" / f"{HEX}.ready").write_text("half of one")
    with opened(tmp_path) as parts:
        uploads_of(parts)
        assert parts.files.delete_orphans() == 2
        parts.inputs.cache._clock = lambda: 4e9 + GRACE_SECONDS
        assert parts.inputs.sweep() == 2
    assert {path for folder in folders for path in folder.rglob("*")} == kept
    assert caplog.messages.count("removed 2 files that no row lists") == 2


def damaged(path: Path, at: int = 0) -> None:
    """Garbage from here on."""
    content = path.read_bytes()
    path.write_bytes(content[:at] + b"garbage " * (len(content[at:]) // 8))


@pytest.mark.parametrize("at", [0, 4096])
def test_a_damaged_database_is_named(tmp_path: Path, at: int) -> None:
    """As a whole, or behind its first page, which SQLite finds out later."""
    with opened(tmp_path / "data"):
        pass
    file = tmp_path / "data" / "queue.sqlite3"
    damaged(file, at)
    content = file.read_bytes()
    for command in (["serve", "--port", "0", "--tls-port", "0"], ["keys", "list"], ["backup", "copy"]):
        done = flux_server(tmp_path / "data", *command)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{file} is not a database of this server" in done.stderr
        assert "restore it from a backup" in done.stderr
        assert "Traceback" not in done.stderr
    assert file.read_bytes() == content
