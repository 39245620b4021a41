"""What the operator does beside serving, with the server running and without."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
from pytest_httpserver import HTTPServer

from server.auth import KeyScope, add_key
from server.cli import control_socket
from server.cli.control import Control
from server.queue.jobs import Job
from server.storage.file_store import Lifecycle
from tests.clients.test_realtime import SMALL, UNAUTHORIZED, last_words, painted, session
from tests.support.components import Parts, finished, opened, submission
from tests.support.components import painted as outcome
from tests.support.server_process import ROOT, TEST_MODELS, completed, free_port, serving
from tests.unit.storage.test_uploads import files_of_at_most


def flux_server(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, as the operator runs it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FAL_", "FLUX_SERVER_"))}
    command = [sys.executable, "-m", "server", *arguments]
    environment["FLUX_SERVER_DATA_DIR"] = str(data_dir)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def said(data_dir: Path, *arguments: str) -> str:
    """What a command prints that goes well."""
    done = flux_server(data_dir, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def status_of(url: str, key: str, path: str) -> int:
    """What a request with this key is answered."""
    answer = httpx.post(f"{url}{path}", json={"prompt": "x"}, headers={"authorization": f"Key {key}"}, trust_env=False)
    return answer.status_code


def test_a_key_comes_and_goes_while_the_server_runs(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS, keys="boss-key") as server:
        url = server.ready().url
        key = said(tmp_path, "keys", "add", "shop")
        assert status_of(url, key, "/test/null") == 200
        assert httpx.get(f"{url}/metrics", headers={"authorization": "Key boss-key"}, trust_env=False).is_success
        assert httpx.get(f"{url}/metrics", headers={"authorization": f"Key {key}"}, trust_env=False).status_code == 403
        operator = said(tmp_path, "keys", "add", "boss", "--scope", "operator")
        assert httpx.get(f"{url}/metrics", headers={"authorization": f"Key {operator}"}, trust_env=False).is_success
        listed = said(tmp_path, "keys", "list")
        assert [line.split("\t")[:2] for line in listed.splitlines()] == [["shop", "client"], ["boss", "operator"]]
        assert key not in listed
        said(tmp_path, "keys", "revoke", "shop")
        assert status_of(url, key, "/test/null") == 401
        assert status_of(url, "boss-key", "/test/null") == 200
        again = flux_server(tmp_path, "keys", "revoke", "shop")
        assert (again.returncode, again.stderr) == (1, "There is no key shop\n")


def test_tokens_and_sessions_end_with_their_key(tmp_path: Path) -> None:
    """Those of others do not."""
    with serving(tmp_path, TEST_MODELS, keys="boss-key") as server:
        shop = {"authorization": f"Key {said(tmp_path, 'keys', 'add', 'shop')}"}
        with httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client:
            query = f"?fal_jwt_token={client.post('/tokens', json={'allowed_apps': ['null']}, headers=shop).json()}"
            bearer = f"Bearer {client.post('/storage/auth/token', headers=shop).json()['token']}"

            def answers() -> list[int]:
                stream = client.post(f"/test/null/stream{query}", json=SMALL)
                upload = client.post("/files/upload", content=b"x", headers={"authorization": bearer})
                return [stream.status_code, upload.status_code]

            assert answers() == [200, 200]
            with session(server, query=query) as theirs, session(server, authorization="Key boss-key") as other:
                assert painted(theirs)["seed"] == painted(other)["seed"] == 5
                said(tmp_path, "keys", "revoke", "shop")
                theirs.send(msgpack.packb(SMALL))
                assert last_words(theirs) == (UNAUTHORIZED, 1008)
                assert painted(other)["seed"] == 5
            assert answers() == [401, 401]
            with session(server, query=query) as again:
                assert last_words(again) == (UNAUTHORIZED, 1008)


def test_without_a_server_too(tmp_path: Path) -> None:
    """And the next server asks for the key, also on loopback."""
    key = said(tmp_path, "keys", "add", "shop")
    with serving(tmp_path, TEST_MODELS) as server:
        assert status_of(server.ready().url, key, "/test/null") == 200
        assert status_of(server.url, "wrong", "/test/null") == 401
    assert "shop" in said(tmp_path, "keys", "list")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("keys", "add", ""), "should have 1 to 100 printable characters"),
        (("keys", "add", "a\nb"), "should have 1 to 100 printable characters"),
        (("keys", "add", "shop", "--scope", "king"), "one of client, operator"),
        (("keys", "revoke", "nobody"), "There is no key nobody"),
        (("webhooks", "redeliver", "nothing"), "There is no webhook of request nothing"),
        (("backup", "/proc/nowhere"), "/proc/nowhere: "),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    with opened(tmp_path):
        pass
    done = flux_server(tmp_path, *arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", ["keys list", "keys revoke x", "webhooks list", "backup /x"])
def test_a_folder_without_a_server_is_not_made(tmp_path: Path, arguments: str) -> None:
    """A backup of nothing must not look like one."""
    done = flux_server(tmp_path / "mistyped", *arguments.split())
    assert done.returncode == 1
    assert f"no data directory of a server at {tmp_path / 'mistyped'}" in done.stderr
    assert not (tmp_path / "mistyped").exists()


def test_the_first_and_the_last_key_are_told_of(tmp_path: Path) -> None:
    assert "will require one from its next start" in flux_server(tmp_path, "keys", "add", "one").stderr
    assert flux_server(tmp_path, "keys", "add", "two").stderr == ""
    assert flux_server(tmp_path, "keys", "revoke", "one").stderr == ""
    assert "No named key is left" in flux_server(tmp_path, "keys", "revoke", "two").stderr
    assert flux_server(tmp_path, "keys", "list").stderr == "There are no keys.\n"


def test_the_servers_own_key_counts_for_none_on_loopback(tmp_path: Path) -> None:
    """It was made behind a proxy, and a server without one does not ask for it."""
    with opened(tmp_path) as parts:
        add_key(parts.database, "", KeyScope.OPERATOR)
    assert "(the first)" in said(tmp_path, "keys", "list")
    assert "will require one from its next start" in flux_server(tmp_path, "keys", "add", "late").stderr
    assert flux_server(tmp_path, "keys", "add", "later").stderr == ""
    said(tmp_path, "keys", "revoke", "late")
    assert "No named key is left" in flux_server(tmp_path, "keys", "revoke", "later").stderr


def test_as_long_as_a_server_asks_for_no_key_each_new_one_says_so(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as server:
        server.ready()
        for name in ("one", "two"):
            assert "will require one from its next start" in flux_server(tmp_path, "keys", "add", name).stderr
        assert server.stop() == 0
    with serving(tmp_path, TEST_MODELS) as server:
        server.ready()
        assert flux_server(tmp_path, "keys", "add", "three").stderr == ""


def test_a_key_for_a_folder_that_was_not_there_says_so(tmp_path: Path) -> None:
    """Its path may be mistyped."""
    folder = tmp_path / "mistyped"
    made = f"Created a new data directory at {folder}; no server is using it"
    assert made in flux_server(folder, "keys", "add", "one").stderr
    assert made not in flux_server(folder, "keys", "add", "two").stderr


def test_the_socket_is_the_owners_alone(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as server:
        server.ready()
        assert (tmp_path / control_socket.NAME).stat().st_mode & 0o777 == 0o600
        assert server.stop() == 0
    assert not (tmp_path / control_socket.NAME).exists()


def test_a_long_path_and_a_socket_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir(mode=0o700)
    for _ in range(2):
        with serving(folder, TEST_MODELS) as server:
            server.ready()
            assert said(folder, "keys", "list") == ""
            server.kill()


@pytest.mark.parametrize("line", [b"\n", b"nonsense\n", b"{}\n", b'{"act": "exit", "arguments": {}}\n', b"[1]\n", b"x"])
def test_nonsense_on_the_socket_harms_nothing(tmp_path: Path, line: bytes) -> None:
    with serving(tmp_path, TEST_MODELS) as server:
        server.ready()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(tmp_path / control_socket.NAME))
            connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(65_536)
        assert said(tmp_path, "keys", "list") == ""


def test_a_webhook_is_sent_again(tmp_path: Path, httpserver: HTTPServer) -> None:
    """One that was delivered, and the receiver sees the same id."""
    httpserver.expect_ordered_request("/hook").respond_with_data("")
    httpserver.expect_ordered_request("/hook").respond_with_data("")
    with serving(tmp_path, TEST_MODELS, outbound_allow="127.0.0.0/8") as server:
        with (
            httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
            httpserver.wait(raise_assertions=True, stop_on_nohandler=False) as _,
        ):
            hook = httpserver.url_for("/hook")
            posted = client.post("/queue/test/null", params={"fal_webhook": hook}, json={"prompt": "x"}).json()
            completed(client, posted["status_url"])
            while "delivered" not in said(tmp_path, "webhooks", "list", "--all"):
                continue
            assert said(tmp_path, "webhooks", "list") == ""
            said(tmp_path, "webhooks", "redeliver", posted["request_id"])
        ids = [request.headers["x-fal-webhook-request-id"] for request, _ in httpserver.log]
        assert ids == [posted["request_id"]] * 2


def test_webhooks_by_their_state(parts: Parts) -> None:
    control = Control(parts.database, parts.folder)
    due, given_up, delivered = (finished(parts, webhook_url=f"http://here/{n}").request_id for n in range(3))
    parts.rows(f"UPDATE deliveries SET due_at = NULL, error = 'answered 500' WHERE request_id = '{given_up}'")
    parts.rows(f"UPDATE deliveries SET due_at = NULL, delivered_at = 5 WHERE request_id = '{delivered}'")
    assert {each["request_id"] for each in control.list_webhooks()} == {due, given_up}
    assert len(control.list_webhooks(with_delivered=True)) == 3
    assert len(control.list_webhooks(with_delivered=True, limit=2)) == 2
    control.redeliver(given_up)
    assert parts.rows(f"SELECT attempt, error FROM deliveries WHERE request_id = '{given_up}'") == [(0, None)]


def test_a_backup_of_a_running_server_is_served(tmp_path: Path) -> None:
    """With what was painted, what waits, and the key; what came after it is not in it."""
    with serving(tmp_path / "data", TEST_MODELS, keys="one", tls_port=str(free_port())) as server:
        headers = {"authorization": "Key one"}
        with httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False, headers=headers) as client:
            picture = client.post("/test/null", json={"prompt": "x"}).json()["images"][0]["url"]
            content = client.get(picture).content
            extra = said(tmp_path / "data", "keys", "add", "shop")
            assert "MB" in said(tmp_path / "data", "backup", str(tmp_path / "copy"))
            later = client.post("/queue/test/null", json={"prompt": "later"}).json()
            completed(client, later["status_url"])
        mode = (tmp_path / "copy" / "queue.sqlite3").stat().st_mode & 0o777
        authority = (tmp_path / "data" / "tls" / "ca.pem").read_bytes()
    assert mode == 0o600
    assert (tmp_path / "copy" / "tls" / "ca.pem").read_bytes() == authority
    with serving(tmp_path / "copy", TEST_MODELS, keys="one") as server:
        with httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False, headers=headers) as client:
            assert client.get(httpx.URL(picture).path).content == content
            assert client.get(f"/queue/test/null/requests/{later['request_id']}/status").status_code == 404
        assert status_of(server.url, extra, "/test/null") == 200


def test_a_backup_overwrites_nothing(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists"):
        Control(parts.database, parts.folder).back_up(str(tmp_path / "there"))


@pytest.mark.parametrize(
    "name", ["files", "files/copy", "inputs/a/b", "uploads/copy", "tls/copy", "./copy/../files/copy"]
)
def test_a_backup_into_what_it_copies_is_refused(parts: Parts, name: str) -> None:
    finished(parts)
    target = parts.folder / name
    with pytest.raises(ValueError, match=r"(choose another target|exists)$"):
        Control(parts.database, parts.folder).back_up(str(target))
    assert not target.exists() or name == "files"


def test_a_backup_that_fails_leaves_nothing_behind(parts: Parts, tmp_path: Path) -> None:
    for _ in range(3):
        parts.files.create(b"x" * 2_000_000, "png", "image/png", "me", Lifecycle())
    # For one that is found there must be no doubt that it is whole.
    with files_of_at_most(1_000_000), pytest.raises(ValueError, match=r"copy: File too large \(3 files\)$"):
        Control(parts.database, parts.folder).back_up(str(tmp_path / "copy"))
    with files_of_at_most(1000), pytest.raises(ValueError, match=r"copy: disk I/O error$"):
        Control(parts.database, parts.folder).back_up(str(tmp_path / "copy"))
    assert list(tmp_path.iterdir()) == [parts.folder]
    Control(parts.database, parts.folder).back_up(str(tmp_path / "copy"))
    assert {path.name for path in tmp_path.iterdir()} == {parts.folder.name, "copy"}


def test_a_backup_is_whole(parts: Parts, tmp_path: Path) -> None:
    job = finished(parts)
    parts.queue.submit(submission())
    Control(parts.database, parts.folder).back_up(str(tmp_path / "copy"))
    with opened(tmp_path / "copy") as copy:
        assert copy.rows("PRAGMA integrity_check") == [("ok",)]
        assert copy.queue.recover() == 1
        found = copy.queue.get(job.request_id)
        assert found
        assert copy.queue.result(found).body == outcome().body


BROUGHT = f"{1:064x}.png"


def accepted(parts: Parts) -> Job:
    """A request that waits, and the picture that it brought."""
    (parts.folder / "inputs" / BROUGHT).write_bytes(b"1")
    return parts.queue.submit(submission(input_files={"image_url": BROUGHT}))


@pytest.mark.parametrize("is_there_before", [True, False], ids=["before", "meanwhile"])
def test_a_backup_has_what_waiting_requests_brought(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there_before: bool
) -> None:
    """However long the rest of it takes: here it comes just before the database is copied, and goes right after."""
    copy = parts.database.backup_to

    def copied(*given: Any, **named: Any) -> None:
        job = waiting or accepted(parts)
        copy(*given, **named)
        parts.queue.cancel(job)
        parts.clock.now = 4_000_000_000.0
        assert parts.inputs.sweep() == 1

    waiting = accepted(parts) if is_there_before else None
    monkeypatch.setattr(parts.database, "backup_to", copied)
    Control(parts.database, parts.folder).back_up(str(tmp_path / "copy"))
    assert list((parts.folder / "inputs").iterdir()) == []
    with opened(tmp_path / "copy") as restored:
        assert restored.queue.recover() == 1
        assert restored.inputs.cache.path(BROUGHT).read_bytes() == b"1"


def test_a_backup_reads_what_was_brought_once(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait while the database is copied, so little may be left to do then."""
    accepted(parts)
    read, copy2 = list[str](), shutil.copy2

    def copied(source: str, target: str) -> None:
        read.append(Path(source).name)
        copy2(source, target)

    monkeypatch.setattr(shutil, "copy2", copied)
    Control(parts.database, parts.folder).back_up(str(tmp_path / "copy"))
    assert read == [BROUGHT]


def test_env_gives_no_key_that_would_be_refused(tmp_path: Path) -> None:
    """Neither beside the server nor without it; one that asks for none takes any."""
    local, wanted = "export FAL_KEY=local", "# FAL_KEY: this server requires a key"
    assert local in said(tmp_path / "none", "env")
    (tmp_path / "none").mkdir()
    assert local in said(tmp_path / "none", "env")
    assert list((tmp_path / "none").iterdir()) == []
    with serving(tmp_path / "open", TEST_MODELS) as server:
        server.ready()
        assert local in said(tmp_path / "open", "env")
    assert local in said(tmp_path / "open", "env")
    with serving(tmp_path / "given", TEST_MODELS, keys="alice") as server:
        server.ready()
        assert wanted in said(tmp_path / "given", "env")
    said(tmp_path / "open", "keys", "add", "shop")
    files = {path.name for path in (tmp_path / "open").iterdir()}
    printed = said(tmp_path / "open", "env")
    assert wanted in printed and local not in printed and 'credentials: "your-key"' in printed
    assert {path.name for path in (tmp_path / "open").iterdir()} == files
