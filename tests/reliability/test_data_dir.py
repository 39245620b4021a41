"""Tests of startup on a data directory with foreign files, missing files or damaged files."""

import logging
from pathlib import Path

import pytest

from server.inputs.cache import GRACE_SECONDS
from tests.support.components import open_components
from tests.support.server_process import TEST_MODELS, serving
from tests.unit.cli.test_control import flux_server
from tests.unit.storage.test_uploads import uploads_of

HEX = "0123456789abcdef"
#: Names of other programs' files, and names that resemble the server's.
FOREIGN_NAMES = (
    "contract.txt",
    "notes",
    f"{HEX}.png",
    f"{HEX * 2}.PNG",
    f"{HEX * 2}.png.bak",
    f"{HEX * 4}.txt",
    "q.part",
)


@pytest.mark.parametrize("name", ["files", "uploads", "inputs"])
def test_a_directory_without_a_database_is_refused_and_unchanged(tmp_path: Path, name: str) -> None:
    """Start with a wrong --data-dir, or with one whose database was not restored."""
    precious = tmp_path / name / "sub" / "contract.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    with serving(tmp_path, TEST_MODELS) as server:
        server.wait_for(rf"could not start:\n{tmp_path} has {name}/ but no queue\.sqlite3: it is not a data directory")
        assert server.process.wait(60) == 1
    process = flux_server(tmp_path, "keys", "add", "shop")
    assert (process.returncode, process.stdout) == (1, "")
    assert f"has {name}/ but no queue.sqlite3" in process.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [precious]


@pytest.mark.parametrize("mode", [0o644, 0o666])
def test_the_lock_file_is_private(tmp_path: Path, mode: int) -> None:
    """Restrict the lock file, since any user who can open it can lock it and keep the server from starting."""
    (tmp_path / "lock").touch()
    (tmp_path / "lock").chmod(mode)
    with open_components(tmp_path):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


def test_a_new_file_system_as_a_subdirectory_is_accepted(tmp_path: Path) -> None:
    """Start on a fresh ext4 file system, which contains lost+found."""
    (tmp_path / "files" / "lost+found").mkdir(parents=True)
    (tmp_path / "uploads").mkdir()
    with open_components(tmp_path) as components:
        assert components.files.delete_orphans() == 0
    assert (tmp_path / "files" / "lost+found").is_dir()


def test_only_files_with_the_servers_names_are_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with open_components(tmp_path) as components:
        uploads_of(components)
        directories = [tmp_path / name for name in ("files", "uploads", "inputs")]
        for directory in directories:
            for name in FOREIGN_NAMES:
                (directory / name).write_text("precious")
            (directory / "sub").mkdir()
            (directory / "sub" / f"{HEX * 2}.png").write_text("precious")
        kept = {path for directory in directories for path in directory.rglob("*")}
        (tmp_path / "files" / f"{HEX * 2}.png").write_text("an image without a row")
        (tmp_path / "files" / f"{HEX * 2}.png.part").write_text("half of one")
        # A directory and a symbolic link whose names resemble the server's. The server follows no link.
        (tmp_path / "files" / f"{HEX * 2}.directory").mkdir()
        (tmp_path / "uploads" / (HEX * 2)[::-1]).symlink_to(tmp_path / "files" / "sub")
        kept |= {tmp_path / "files" / f"{HEX * 2}.directory", tmp_path / "uploads" / (HEX * 2)[::-1]}
        (tmp_path / "uploads" / (HEX * 2)).mkdir()
        (tmp_path / "uploads" / (HEX * 2) / "1").write_text("a part")
        (tmp_path / "uploads" / f"{HEX}.whole").write_text("half of one")
        (tmp_path / "inputs" / f"{HEX * 4}.png").write_text("nobody needs it")
        (tmp_path / "inputs" / f"{HEX}.ready").write_text("half of one")
    with open_components(tmp_path) as components:
        uploads_of(components)
        assert components.files.delete_orphans() == 2
        components.inputs.cache._clock = lambda: 4e9 + GRACE_SECONDS
        assert components.inputs.sweep() == 2
    assert {path for directory in directories for path in directory.rglob("*")} == kept
    for directory in directories[:2]:
        assert (
            f"removed 2 files from {directory} that no row lists; a crash or a backup leaves such files"
            in caplog.messages
        )


def damage(path: Path, offset: int = 0) -> None:
    """Overwrite the file with garbage from this offset on."""
    content = path.read_bytes()
    path.write_bytes(content[:offset] + b"garbage " * (len(content[offset:]) // 8))


@pytest.mark.parametrize("offset", [0, 4096])
def test_the_error_names_a_damaged_database(tmp_path: Path, offset: int) -> None:
    """Damage the whole file, or all but the first page, which SQLite notices later."""
    with open_components(tmp_path / "data"):
        pass
    file = tmp_path / "data" / "queue.sqlite3"
    damage(file, offset)
    content = file.read_bytes()
    for command in (["serve", "--port", "0", "--tls-port", "0"], ["keys", "list"], ["backup", "copy"]):
        process = flux_server(tmp_path / "data", *command)
        assert (process.returncode, process.stdout) == (1, "")
        assert f"{file} is damaged or is not a database" in process.stderr
        assert "restore it from a backup" in process.stderr
        assert "Traceback" not in process.stderr
    assert file.read_bytes() == content
