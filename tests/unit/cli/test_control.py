"""Tests of the operator's commands other than serve, with and without a running server."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
import typer
from pytest_httpserver import HTTPServer

from server.auth import KeyScope, add_key
from server.cli import admin, control_socket
from server.cli.client_env import env_command
from server.cli.control import Control
from server.queue.jobs import Job
from server.settings import Settings
from server.storage.file_store import Lifecycle
from tests.clients.test_realtime import SMALL, UNAUTHORIZED, generate, last_message_and_code, session
from tests.support.components import Components, finish_job, open_components, submission
from tests.support.components import success as outcome
from tests.support.forking import run_flux_server
from tests.support.server_process import (
    TEST_MODELS,
    free_port,
    open_gate,
    serving,
    wait_until_claimed,
    wait_until_completed,
)
from tests.unit.storage.test_uploads import limited_file_size


def flux_server(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as the operator does; return the completed process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FAL_", "FLUX_SERVER_"))}
    return run_flux_server(*arguments, environment={**environment, "FLUX_SERVER_DATA_DIR": str(data_dir)})


def output_of(data_dir: Path, *arguments: str) -> str:
    """Run a command, assert that it succeeds, and return its output."""
    result = flux_server(data_dir, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def status_with_key(url: str, key: str, path: str) -> int:
    """Return the status of the response to a request with this key."""
    response = httpx.post(
        f"{url}{path}", json={"prompt": "x"}, headers={"authorization": f"Key {key}"}, trust_env=False
    )
    return response.status_code


def test_keys_are_added_and_revoked_while_the_server_runs(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS, keys="boss-key") as server:
        url = server.ready().url
        key = output_of(tmp_path, "keys", "add", "shop")
        assert status_with_key(url, key, "/test/null") == 200
        assert httpx.get(f"{url}/metrics", headers={"authorization": "Key boss-key"}, trust_env=False).is_success
        assert httpx.get(f"{url}/metrics", headers={"authorization": f"Key {key}"}, trust_env=False).status_code == 403
        operator = output_of(tmp_path, "keys", "add", "boss", "--scope", "operator")
        assert httpx.get(f"{url}/metrics", headers={"authorization": f"Key {operator}"}, trust_env=False).is_success
        listed = output_of(tmp_path, "keys", "list")
        assert [line.split("\t")[:2] for line in listed.splitlines()] == [["shop", "client"], ["boss", "operator"]]
        assert key not in listed
        output_of(tmp_path, "keys", "revoke", "shop")
        assert status_with_key(url, key, "/test/null") == 401
        assert status_with_key(url, "boss-key", "/test/null") == 200
        again = flux_server(tmp_path, "keys", "revoke", "shop")
        assert (again.returncode, again.stderr) == (1, "There is no key shop; `flux-server keys list` lists all\n")


def test_tokens_and_sessions_end_with_their_key(tmp_path: Path) -> None:
    """The session of another key continues."""
    with serving(tmp_path, TEST_MODELS, keys="boss-key") as server:
        shop = {"authorization": f"Key {output_of(tmp_path, 'keys', 'add', 'shop')}"}
        with httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client:
            query = f"?fal_jwt_token={client.post('/tokens', json={'allowed_apps': ['null']}, headers=shop).json()}"
            bearer = f"Bearer {client.post('/storage/auth/token', headers=shop).json()['token']}"

            def statuses() -> list[int]:
                stream = client.post(f"/test/null/stream{query}", json=SMALL)
                upload = client.post("/files/upload", content=b"x", headers={"authorization": bearer})
                return [stream.status_code, upload.status_code]

            assert statuses() == [200, 200]
            with session(server, query=query) as revoked, session(server, authorization="Key boss-key") as other:
                assert generate(revoked)["seed"] == generate(other)["seed"] == 5
                output_of(tmp_path, "keys", "revoke", "shop")
                revoked.send(msgpack.packb(SMALL))
                assert last_message_and_code(revoked) == (UNAUTHORIZED, 1008)
                assert generate(other)["seed"] == 5
            assert statuses() == [401, 401]
            with session(server, query=query) as again:
                assert last_message_and_code(again) == (UNAUTHORIZED, 1008)


def test_keys_are_added_without_a_server(tmp_path: Path) -> None:
    """A server that starts later requires the key, also on loopback."""
    key = output_of(tmp_path, "keys", "add", "shop")
    with serving(tmp_path, TEST_MODELS) as server:
        assert status_with_key(server.ready().url, key, "/test/null") == 200
        assert status_with_key(server.url, "wrong", "/test/null") == 401
    assert "shop" in output_of(tmp_path, "keys", "list")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("keys", "add", ""), "should have 1 to 100 printable characters"),
        (("keys", "add", "a\nb"), "should have 1 to 100 printable characters"),
        (("keys", "add", "shop", "--scope", "king"), "one of client, operator"),
        (("keys", "revoke", "nobody"), "There is no key nobody"),
        (("webhooks", "redeliver", "nothing"), "There is no webhook of request nothing"),
        (("backup", "/proc/nowhere"), "/proc/nowhere: "),
    ],
)
def test_an_error_is_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with open_components(tmp_path):
        pass
    result = flux_server(tmp_path, *arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", ["keys list", "keys revoke x", "webhooks list", "backup /x"])
def test_a_missing_data_directory_is_not_created(tmp_path: Path, arguments: str) -> None:
    """Otherwise, a backup of a mistyped directory would succeed and be empty."""
    result = flux_server(tmp_path / "mistyped", *arguments.split())
    assert result.returncode == 1
    assert f"no data directory of a server at {tmp_path / 'mistyped'}" in result.stderr
    assert not (tmp_path / "mistyped").exists()


def test_the_first_and_the_last_key_print_a_notice(tmp_path: Path) -> None:
    assert "will require one from its next start" in flux_server(tmp_path, "keys", "add", "one").stderr
    assert flux_server(tmp_path, "keys", "add", "two").stderr == ""
    assert flux_server(tmp_path, "keys", "revoke", "one").stderr == ""
    assert "No named key is left" in flux_server(tmp_path, "keys", "revoke", "two").stderr
    assert (
        flux_server(tmp_path, "keys", "list").stderr
        == "There are no stored keys.\n(without those in --keys, --operator-keys and FAL_KEY)\n"
    )


def test_the_generated_key_does_not_count_on_loopback(tmp_path: Path) -> None:
    """A server behind a proxy makes this key. A server on loopback without a proxy does not require the key."""
    with open_components(tmp_path) as components:
        add_key(components.database, "", KeyScope.OPERATOR)
    assert "(the first)" in output_of(tmp_path, "keys", "list")
    assert "will require one from its next start" in flux_server(tmp_path, "keys", "add", "late").stderr
    assert flux_server(tmp_path, "keys", "add", "later").stderr == ""
    output_of(tmp_path, "keys", "revoke", "late")
    assert "No named key is left" in flux_server(tmp_path, "keys", "revoke", "later").stderr
    assert output_of(tmp_path, "keys", "revoke", "(the first)") == "Revoked the key (the first)"
    assert output_of(tmp_path, "keys", "list") == ""


def test_each_new_key_prints_a_notice_while_the_server_requires_none(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as server:
        server.ready()
        for name in ("one", "two"):
            assert "will require one from its next start" in flux_server(tmp_path, "keys", "add", name).stderr
        assert server.stop() == 0
    with serving(tmp_path, TEST_MODELS) as server:
        server.ready()
        assert flux_server(tmp_path, "keys", "add", "three").stderr == ""


def test_a_key_in_a_new_data_directory_prints_a_notice(tmp_path: Path) -> None:
    """The notice is for operators who mistyped the path."""
    directory = tmp_path / "mistyped"
    notice = f"Created a new data directory at {directory}; no server is using it"
    assert notice in flux_server(directory, "keys", "add", "one").stderr
    assert notice not in flux_server(directory, "keys", "add", "two").stderr


def test_only_the_owner_may_use_the_socket(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as server:
        server.ready()
        assert (tmp_path / control_socket.NAME).stat().st_mode & 0o777 == 0o600
        assert server.stop() == 0
    assert not (tmp_path / control_socket.NAME).exists()


def test_a_long_path_and_a_stale_socket(tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 25)
    directory.mkdir(mode=0o700)
    for _ in range(2):
        with serving(directory, TEST_MODELS) as server:
            server.ready()
            assert output_of(directory, "keys", "list") == ""
            server.kill()


@pytest.mark.parametrize("line", [b"\n", b"nonsense\n", b"{}\n", b'{"act": "exit", "arguments": {}}\n', b"[1]\n", b"x"])
def test_invalid_requests_on_the_socket_do_no_harm(tmp_path: Path, line: bytes) -> None:
    with serving(tmp_path, TEST_MODELS) as server:
        server.ready()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(tmp_path / control_socket.NAME))
            connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(65_536)
        assert output_of(tmp_path, "keys", "list") == ""


def test_a_webhook_is_redelivered(tmp_path: Path, httpserver: HTTPServer) -> None:
    """A delivered webhook is sent again, and the receiver sees the same id."""
    httpserver.expect_ordered_request("/hook").respond_with_data("")
    httpserver.expect_ordered_request("/hook").respond_with_data("")
    with serving(tmp_path, TEST_MODELS, outbound_allow="127.0.0.0/8") as server:
        with (
            httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
            httpserver.wait(raise_assertions=True, stop_on_nohandler=False) as _,
        ):
            hook = httpserver.url_for("/hook")
            posted = client.post("/queue/test/null", params={"fal_webhook": hook}, json={"prompt": "x"}).json()
            wait_until_completed(client, posted["status_url"])
            while "delivered" not in output_of(tmp_path, "webhooks", "list", "--all"):
                continue
            assert output_of(tmp_path, "webhooks", "list") == ""
            output_of(tmp_path, "webhooks", "redeliver", posted["request_id"])
        ids = [request.headers["x-fal-webhook-request-id"] for request, _ in httpserver.log]
        assert ids == [posted["request_id"]] * 2


def test_webhooks_are_listed_by_state(components: Components) -> None:
    control = Control(components.database, components.data_dir)
    due, abandoned, delivered = (finish_job(components, webhook_url=f"http://here/{n}").request_id for n in range(3))
    components.rows(f"UPDATE deliveries SET due_at = NULL, error = 'answered 500' WHERE request_id = '{abandoned}'")
    components.rows(f"UPDATE deliveries SET due_at = NULL, delivered_at = 5 WHERE request_id = '{delivered}'")
    assert {each["request_id"] for each in control.list_webhooks()} == {due, abandoned}
    assert len(control.list_webhooks(with_delivered=True)) == 3
    assert len(control.list_webhooks(with_delivered=True, limit=2)) == 2
    control.redeliver(abandoned)
    assert components.rows(f"SELECT attempt, error FROM deliveries WHERE request_id = '{abandoned}'") == [(0, None)]


def test_a_backup_of_a_running_server_can_be_served(tmp_path: Path) -> None:
    """The backup has the image and the key, but not the request that was submitted after the backup."""
    with serving(tmp_path / "data", TEST_MODELS, keys="one", tls_port=str(free_port())) as server:
        headers = {"authorization": "Key one"}
        with httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False, headers=headers) as client:
            image_url = client.post("/test/null", json={"prompt": "x"}).json()["images"][0]["url"]
            content = client.get(image_url).content
            extra = output_of(tmp_path / "data", "keys", "add", "shop")
            assert "MB" in output_of(tmp_path / "data", "backup", str(tmp_path / "copy"))
            later = client.post("/queue/test/null", json={"prompt": "later"}).json()
            wait_until_completed(client, later["status_url"])
        mode = (tmp_path / "copy" / "queue.sqlite3").stat().st_mode & 0o777
        authority = (tmp_path / "data" / "tls" / "ca.pem").read_bytes()
    assert mode == 0o600
    assert (tmp_path / "copy" / "tls" / "ca.pem").read_bytes() == authority
    with serving(tmp_path / "copy", TEST_MODELS, keys="one") as server:
        with httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False, headers=headers) as client:
            assert client.get(httpx.URL(image_url).path).content == content
            assert client.get(f"/queue/test/null/requests/{later['request_id']}/status").status_code == 404
        assert status_with_key(server.url, extra, "/test/null") == 200


def test_a_backup_overwrites_nothing(components: Components, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists"):
        Control(components.database, components.data_dir).back_up(str(tmp_path / "there"))


@pytest.mark.parametrize(
    "name", ["files", "files/copy", "inputs/a/b", "uploads/copy", "tls/copy", "./copy/../files/copy"]
)
def test_a_backup_into_a_directory_that_it_copies_is_rejected(components: Components, name: str) -> None:
    finish_job(components)
    target = components.data_dir / name
    with pytest.raises(ValueError, match=r"(choose another target|exists)$"):
        Control(components.database, components.data_dir).back_up(str(target))
    assert not target.exists() or name == "files"


def test_a_backup_that_fails_leaves_nothing_behind(components: Components, tmp_path: Path) -> None:
    for _ in range(3):
        components.files.create(b"x" * 2_000_000, "png", "image/png", "me", Lifecycle())
    # A failed backup leaves no directory, so any backup that exists is complete.
    with limited_file_size(1_000_000), pytest.raises(ValueError, match=r"copy: File too large \(3 files\)$"):
        Control(components.database, components.data_dir).back_up(str(tmp_path / "copy"))
    with limited_file_size(1000), pytest.raises(ValueError, match=r"copy: disk I/O error$"):
        Control(components.database, components.data_dir).back_up(str(tmp_path / "copy"))
    assert list(tmp_path.iterdir()) == [components.data_dir]
    Control(components.database, components.data_dir).back_up(str(tmp_path / "copy"))
    assert {path.name for path in tmp_path.iterdir()} == {components.data_dir.name, "copy"}


def test_a_backup_is_complete(components: Components, tmp_path: Path) -> None:
    job = finish_job(components)
    components.queue.submit(submission())
    Control(components.database, components.data_dir).back_up(str(tmp_path / "copy"))
    with open_components(tmp_path / "copy") as copy:
        assert copy.rows("PRAGMA integrity_check") == [("ok",)]
        assert copy.queue.recover() == 1
        found = copy.queue.get(job.request_id)
        assert found
        assert copy.queue.result(found).body == outcome().body


INPUT_NAME = f"{1:064x}.png"


def submit_with_input(components: Components) -> Job:
    """Submit a request with an input image, and leave it waiting; return its job."""
    (components.data_dir / "inputs" / INPUT_NAME).write_bytes(b"1")
    return components.queue.submit(submission(input_files={"image_url": INPUT_NAME}))


@pytest.mark.parametrize("is_submitted_before", [True, False], ids=["before", "meanwhile"])
def test_a_backup_has_the_inputs_of_waiting_requests(
    components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_submitted_before: bool
) -> None:
    """The inputs are in the backup, even if their request ends before the backup does.

    The request is submitted before the backup starts, or just before the database is copied. The request is cancelled
    right after the copy.
    """
    copy = components.database.backup_to

    def copy_and_cancel(*args: Any, **kwargs: Any) -> None:
        job = waiting or submit_with_input(components)
        copy(*args, **kwargs)
        components.queue.cancel(job)
        components.clock.now = 4_000_000_000.0
        assert components.inputs.sweep() == 1

    waiting = submit_with_input(components) if is_submitted_before else None
    monkeypatch.setattr(components.database, "backup_to", copy_and_cancel)
    Control(components.database, components.data_dir).back_up(str(tmp_path / "copy"))
    assert list((components.data_dir / "inputs").iterdir()) == []
    with open_components(tmp_path / "copy") as restored:
        assert restored.queue.recover() == 1
        assert restored.inputs.cache.path(INPUT_NAME).read_bytes() == b"1"


def test_a_backup_copies_each_input_once(
    components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is locked while it is copied, so the inputs are copied before the lock, and not again."""
    submit_with_input(components)
    copied, copy2 = list[str](), shutil.copy2

    def record(source: str, target: str) -> None:
        copied.append(Path(source).name)
        copy2(source, target)

    monkeypatch.setattr(shutil, "copy2", record)
    Control(components.database, components.data_dir).back_up(str(tmp_path / "copy"))
    assert copied == [INPUT_NAME]


def test_the_banner_names_the_options_that_env_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert env_command(Settings.load({})) == "flux-server env"
    directory = tmp_path / "a b"
    options = {"data_dir": directory, "port": 9000, "tls_port": 9443, "host": "0.0.0.0", "log_level": "debug"}
    expected = f"flux-server env --data-dir '{directory}' --host 0.0.0.0 --port 9000 --tls-port 9443"
    assert env_command(Settings.load({}, options)) == expected
    with serving(tmp_path / "data", TEST_MODELS, tls_port=str(free_port())) as server:
        port = server.ready().url.rpartition(":")[2]
        server.wait_for(rf'eval "\$\(flux-server env --data-dir {tmp_path / "data"} --port {port}.*\)"')


def test_the_banner_names_a_program_that_the_shell_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "a b" / "flux-server"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert env_command(Settings.load({})).startswith(f"'{program}' env")
    monkeypatch.setenv("PATH", str(program.parent))
    assert env_command(Settings.load({})).startswith("flux-server env")
    # As under uvx: the shell that starts the server finds the program, but other shells do not.
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert env_command(Settings.load({})).startswith(f"'{program}' env")


def test_a_backup_that_only_the_server_sees_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As under systemd's PrivateTmp: the server says that it wrote the backup, but the caller does not find it."""
    monkeypatch.setattr(admin, "_ask", lambda *_, **__: 1_000_000)
    with pytest.raises(typer.Exit):
        admin.back_up(tmp_path / "copy")
    assert "only the server sees" in capsys.readouterr().err


def test_env_prints_no_key_that_the_server_would_reject(tmp_path: Path) -> None:
    """`env` prints the placeholder `local` as the key only for a server that requires no key, running or not."""
    any_key, key_required = "export FAL_KEY=local", "# FAL_KEY: this server requires a key"
    assert any_key in output_of(tmp_path / "none", "env")
    assert f"no certificate in {tmp_path / 'none' / 'tls'}" in flux_server(tmp_path / "none", "env").stderr
    (tmp_path / "none").mkdir()
    assert any_key in output_of(tmp_path / "none", "env")
    assert list((tmp_path / "none").iterdir()) == []
    with serving(tmp_path / "open", TEST_MODELS) as server:
        server.ready()
        assert any_key in output_of(tmp_path / "open", "env")
    assert any_key in output_of(tmp_path / "open", "env")
    with serving(tmp_path / "given", TEST_MODELS, keys="alice") as server:
        server.ready()
        assert key_required in output_of(tmp_path / "given", "env")
        assert "set FAL_KEY to a key" in flux_server(tmp_path / "given", "env").stderr
    output_of(tmp_path / "open", "keys", "add", "shop")
    files = {path.name for path in (tmp_path / "open").iterdir()}
    printed = output_of(tmp_path / "open", "env")
    assert key_required in printed and any_key not in printed and 'credentials: "your-key"' in printed
    assert {path.name for path in (tmp_path / "open").iterdir()} == files


def test_an_operator_lists_and_cancels_requests_of_any_key(tmp_path: Path) -> None:
    data_dir, keys = tmp_path / "data", "shop:secret,plain"
    with (
        open_gate(tmp_path / "gate") as gate,
        serving(data_dir, TEST_MODELS, keys=keys, max_running_per_key="1") as server,
    ):
        url = server.ready().url
        owners = re.findall(r"the key (\S+|without an id) in the settings has the owner (\w+)", server.output)
        assert [name for name, _ in owners] == ["shop:...", "without an id"]
        shop = {"authorization": "Key shop:secret"}
        with httpx.Client(base_url=url, headers=shop, trust_env=False) as client:
            body = {"prompt": str(gate.path), "num_inference_steps": 2}
            running, waiting = (client.post("/queue/test/gate", json=body).json() for _ in range(2))
            wait_until_claimed(client, running["status_url"])
            listed = [line.split("\t")[:4] for line in output_of(data_dir, "requests", "list").splitlines()]
            assert listed == [
                [running["request_id"], owners[0][1], "IN_PROGRESS", "test/gate"],
                [waiting["request_id"], owners[0][1], "IN_QUEUE", "test/gate"],
            ]
            assert output_of(data_dir, "requests", "list", "--owner", owners[1][1]) == ""
            ids = [running["request_id"], waiting["request_id"]]
            assert output_of(data_dir, "requests", "cancel", *ids) == "\n".join(f"{each}: cancelled" for each in ids)
            gate.release(1)
            for request in (running, waiting):
                assert wait_until_completed(client, request["status_url"])["error_type"] == "client_cancelled"
            assert output_of(data_dir, "requests", "cancel", ids[0]) == f"{ids[0]}: has ended already"
        assert "the operator cancelled the request" in server.output
        unknown = flux_server(data_dir, "requests", "cancel", "no-such-id")
        assert (unknown.returncode, unknown.stderr.startswith("There is no request no-such-id")) == (1, True)
    without_server = flux_server(data_dir, "requests", "cancel", ids[0])
    assert (without_server.returncode, "No server uses this data directory" in without_server.stderr) == (1, True)
