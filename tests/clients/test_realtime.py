"""Tests of realtime over real WebSockets: authorization, buffering, refused input and disconnects."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from server.inputs.resolver import MAX_IMAGE_BYTES, MAX_INPUT_BYTES
from server.queue.jobs import Mode
from tests.support.components import open_components, submission
from tests.support.node import Client, clients
from tests.support.server_process import TEST_MODELS, Server, serving

ALICE = {"authorization": "Key alice:secret"}
SMALL = {"prompt": "x", "seed": 5, "image_size": {"width": 64, "height": 64}}
UNAUTHORIZED = {"status": "error", "error": "Unauthorized"}


@contextmanager
def session(server: Server, endpoint: str = "test/null", query: str = "", **headers: str) -> Iterator[ClientConnection]:
    """Open a realtime WebSocket as a client does."""
    url = f"{server.url.replace('http', 'ws')}/{endpoint}/realtime{query}"
    with connect(url, additional_headers=headers, proxy=None, open_timeout=60, max_size=None) as socket:
        yield socket


def receive(socket: ClientConnection) -> Any:
    """Receive the next message and return it, decoded from msgpack or JSON."""
    message = socket.recv(timeout=60)
    return json.loads(message) if isinstance(message, str) else msgpack.unpackb(message)


def generate(socket: ClientConnection, **fields: Any) -> Any:
    """Send an input and return its output, after checking the timings message that follows."""
    socket.send(msgpack.packb({**SMALL, **fields}))
    output, timing = receive(socket), receive(socket)
    assert (timing["type"], timing["action"]) == ("x-fal-message", "timings")
    assert timing["timing"] >= 0
    return output


def create_token(client: httpx.Client, *apps: str, seconds: int = 120) -> str:
    """Create a token for a web page, valid for the apps with these aliases, and return it."""
    body = {"allowed_apps": apps, "token_expiration": seconds}
    answer = client.post("/tokens/", json=body, headers={**ALICE, "host": "rest.fal.ai"})
    assert answer.status_code == 200
    created: str = answer.json()
    assert isinstance(created, str)
    return created


def last_message_and_code(socket: ClientConnection) -> tuple[Any, int]:
    """Return the last message before the server closes the session, and the close code."""
    message = receive(socket)
    with pytest.raises(ConnectionClosed) as closed:
        socket.recv(timeout=60)
    assert closed.value.rcvd
    return message, closed.value.rcvd.code


def test_the_output_equals_that_of_a_plain_run(server: Server, client: httpx.Client) -> None:
    fields = {**SMALL, "num_inference_steps": 2, "prompt": "a red apple"}
    expected = client.post("/fal-ai/flux/dev", json=fields).json()
    with session(server, "fal-ai/flux/dev") as socket:
        output = generate(socket, **fields)
    assert {**output, "images": 0, "timings": 0} == {**expected, "images": 0, "timings": 0}
    assert output["timings"].keys() == expected["timings"].keys()
    images = [client.get(answer["images"][0]["url"]).content for answer in (output, expected)]
    assert images[0] == images[1]
    assert output["images"][0]["url"].startswith(f"{server.url}/files/")


def test_outputs_of_a_session_arrive_in_order(server: Server) -> None:
    with session(server) as socket:
        for seed in range(5):
            socket.send(msgpack.packb({**SMALL, "seed": seed}))
        outputs = [message for message in (receive(socket) for _ in range(10)) if "seed" in message]
    assert [output["seed"] for output in outputs] == [0, 1, 2, 3, 4]


def test_sync_mode_returns_the_image_in_the_message(server: Server) -> None:
    with session(server) as socket:
        assert generate(socket, sync_mode=True)["images"][0]["url"].startswith("data:image/jpeg;base64,")


def test_text_frames_are_json(server: Server) -> None:
    with session(server) as socket:
        socket.send(json.dumps(SMALL))
        assert receive(socket)["seed"] == 5


@pytest.mark.parametrize("endpoint", ["test/unknown", "fal-ai/flux", "x"])
def test_unknown_endpoint(server: Server, endpoint: str) -> None:
    with pytest.raises(InvalidStatus) as raised, session(server, endpoint):
        pass
    assert raised.value.response.status_code in (403, 404)


def test_a_token_is_valid_only_for_its_apps(server_with_keys: Server, keyless_client: httpx.Client) -> None:
    for apps, is_valid in (("null",), True), (("gate",), False), (("flux", "null"), True), (("nul", "test"), False):
        with session(server_with_keys, query=f"?fal_jwt_token={create_token(keyless_client, *apps)}") as socket:
            if is_valid:
                assert generate(socket)["seed"] == 5
            else:
                assert last_message_and_code(socket) == (UNAUTHORIZED, 1008)


def test_a_token_does_not_replace_a_key(server_with_keys: Server, keyless_client: httpx.Client) -> None:
    bearer = {"authorization": f"Bearer {create_token(keyless_client, 'null')}"}
    for path in ("/test/null", "/queue/test/null", "/storage/upload/initiate", "/tokens"):
        assert keyless_client.post(path, json=SMALL, headers=bearer).status_code == 401


BAD_TOKEN_QUERIES = [
    "",
    "?fal_jwt_token=",
    "?fal_jwt_token=x",
    "?fal_jwt_token=e30.e30.e30",
    "?fal_jwt_token=alice:secret",
]
UNSIGNED_TOKEN = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIiwic2NvcGUiOiJudWxsIiwiZXhwIjo5OTk5OTk5OTk5fQ."


@pytest.mark.parametrize("query", [*BAD_TOKEN_QUERIES, f"?fal_jwt_token={UNSIGNED_TOKEN}"])
def test_a_session_needs_a_valid_token(server_with_keys: Server, query: str) -> None:
    with session(server_with_keys, query=query) as socket:
        assert last_message_and_code(socket) == (UNAUTHORIZED, 1008)


def test_a_token_of_another_server_is_refused(server_with_keys: Server, tmp_path: Path) -> None:
    with (
        serving(tmp_path, TEST_MODELS, keys="alice:secret") as other,
        httpx.Client(base_url=other.url, trust_env=False) as client,
        session(server_with_keys, query=f"?fal_jwt_token={create_token(client, 'null')}") as socket,
    ):
        assert last_message_and_code(socket) == (UNAUTHORIZED, 1008)


def test_a_token_expires(server_with_keys: Server, keyless_client: httpx.Client) -> None:
    query = f"?fal_jwt_token={create_token(keyless_client, 'null', seconds=1)}"
    message: Any = None
    while message != UNAUTHORIZED:
        with session(server_with_keys, query=query) as socket:
            with suppress(ConnectionClosed):
                socket.send(msgpack.packb(SMALL))
            message = receive(socket)


@pytest.mark.parametrize("header", ["Key alice:secret", "Bearer bob:secret", "Key mallory:secret"])
def test_key_in_the_header(server_with_keys: Server, header: str) -> None:
    with session(server_with_keys, authorization=header) as socket:
        if "mallory" in header:
            assert last_message_and_code(socket) == (UNAUTHORIZED, 1008)
        else:
            assert generate(socket)["seed"] == 5


def test_a_server_without_keys_accepts_any_token(server: Server) -> None:
    with session(server, query="?fal_jwt_token=whatever", authorization="Key whatever") as socket:
        assert generate(socket)["seed"] == 5


def test_foreign_origins_are_refused(server: Server) -> None:
    with pytest.raises(InvalidStatus) as raised, session(server, origin="https://evil.example"):
        pass
    assert raised.value.response.status_code == 403


@contextmanager
def blocked(socket: ClientConnection, path: Path, steps: int = 1) -> Iterator[None]:
    """Occupy the session with a request that makes no progress inside the block and finishes after it."""
    os.mkfifo(path)
    fields = {**SMALL, "prompt": str(path), "num_inference_steps": steps}
    socket.send(msgpack.packb(fields))
    # Opening the pipe returns once the model opens the other end. The request is running from then on.
    with path.open("wb"):
        yield


def answered_prompts(socket: ClientConnection, last: str) -> list[str]:
    """Receive messages until the output for the prompt `last`; return the prompts of all outputs in order."""
    answered: list[str] = []
    while last not in answered:
        if "prompt" in (message := receive(socket)):
            answered.append(message["prompt"])
    return answered


@pytest.mark.parametrize(("query", "num_kept"), [("?max_buffering=1", 1), ("?max_buffering=3", 3), ("", 60)])
def test_the_oldest_waiting_inputs_are_dropped(
    constrained_server: Server, tmp_path: Path, query: str, num_kept: int
) -> None:
    waiting = [f"number {number}" for number in range(65)]
    with session(constrained_server, "test/gate", query) as socket:
        with blocked(socket, tmp_path / "gate"):
            for prompt in waiting:
                # A regular file never blocks the model, so each of these requests finishes as soon as it runs.
                (tmp_path / prompt).touch()
                socket.send(msgpack.packb({**SMALL, "prompt": str(tmp_path / prompt)}))
            # Frames are handled in order, so the pong means that the server received all inputs.
            assert socket.ping().wait(60)
        answered = answered_prompts(socket, str(tmp_path / waiting[-1]))
    assert answered == [str(tmp_path / prompt) for prompt in ("gate", *waiting[-num_kept:])]


MIB = 2**20


def test_compression_is_not_negotiated(server: Server) -> None:
    """Decline compression: a compressed kilobyte could expand to megabytes. Clients that offer it continue without."""
    with session(server) as socket:
        assert socket.protocol.extensions == []
        assert generate(socket)["seed"] == 5


def test_the_largest_image_fits_into_a_frame(server: Server) -> None:
    """Send an image of zeros at the size limit. The server reads the frame and reports that the image is unreadable."""
    uri = "data:image/png;base64," + "A" * (MAX_IMAGE_BYTES // 3 * 4)
    with session(server, "test/copy") as socket:
        socket.send(msgpack.packb({**SMALL, "image_url": uri}))
        message = receive(socket)
        assert message["error"] == "INVALID_INPUT"
        assert "image" in message["reason"]


def test_frames_have_the_size_limit_of_bodies(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS, max_body_mib="1") as server, session(server.ready()) as socket:
        assert generate(socket, padding="x" * (MIB - 1000))["seed"] == 5
        with pytest.raises(ConnectionClosed) as closed:
            generate(socket, padding="x" * MIB)
        # The server does not read the rest of the frame, so the close reason may be lost.
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009


@pytest.mark.parametrize("pack", [msgpack.packb, json.dumps], ids=["msgpack", "json"])
def test_large_waiting_inputs_are_dropped_by_total_size(
    server: Server, tmp_path: Path, pack: Callable[[Any], Any]
) -> None:
    """Limit the total size of the waiting inputs to the size of the largest allowed input."""
    waiting = [f"number {number}" for number in range(6)]
    with session(server, "test/gate") as socket:
        with blocked(socket, tmp_path / "gate"):
            for prompt in waiting:
                (tmp_path / prompt).touch()
                socket.send(pack({**SMALL, "prompt": str(tmp_path / prompt), "padding": "x" * (MAX_INPUT_BYTES // 4)}))
            assert socket.ping().wait(60)
        answered = answered_prompts(socket, str(tmp_path / waiting[-1]))
    assert answered == [str(tmp_path / prompt) for prompt in ("gate", *waiting[-3:])]


@pytest.mark.parametrize("padding", [[{}] * 1000, [0] * 1024], ids=["maps", "numbers"])
def test_a_frame_with_many_values_is_accepted(server: Server, padding: list[Any]) -> None:
    with session(server) as socket:
        assert generate(socket, padding=padding)["seed"] == 5


@pytest.mark.parametrize("padding", [[[{}] * 1000] * 2, [0] * 1025, dict.fromkeys(map(str, range(1025)), 0)])
def test_a_frame_with_too_many_values_is_refused(server: Server, padding: Any) -> None:
    """Refuse frames with many values, since megabytes of empty maps would take gigabytes of memory."""
    with session(server) as socket:
        socket.send(msgpack.packb({**SMALL, "padding": padding}))
        assert receive(socket)["error"] == "INVALID_INPUT"
        assert generate(socket)["seed"] == 5


@pytest.mark.parametrize("value", ["0", "61", "-1", "x", "nan", "1e9", "%00"])
def test_bad_max_buffering(server: Server, value: str) -> None:
    with session(server, query=f"?max_buffering={value}") as socket:
        message, code = last_message_and_code(socket)
    assert (message["type"], message["error"], code) == ("x-fal-error", "BAD_REQUEST", 1008)
    assert "max_buffering" in message["reason"]


INVALID_INPUTS = [
    {},
    {"prompt": 5},
    {"prompt": "x", "num_images": 9},
    {"prompt": "x", "seed": -1},
    {1: 2},
    [],
    5,
    "x",
    None,
]


@pytest.mark.parametrize("fields", INVALID_INPUTS, ids=repr)
def test_the_session_continues_after_invalid_input(server: Server, fields: Any) -> None:
    with session(server) as socket:
        socket.send(msgpack.packb(fields))
        message = receive(socket)
        assert (message["type"], message["error"]) == ("x-fal-error", "INVALID_INPUT")
        assert isinstance(message["reason"], str)
        assert message["reason"]
        assert generate(socket)["seed"] == 5


UNREADABLE_FRAMES = [
    b"",
    b"\xc1",
    b"\x81",
    b"\x81\xa6prompt",
    b"\x81\xa6prompt\xd9\xff",
    b"\x81\xa6prompt\xa1\xff",
    b"\x81" * 5000 + b"\xa1x\x01",
    b"\x91" * 5000 + b"\x01",
    msgpack.packb({"prompt": "x"}) + b"\x00",
    msgpack.packb(msgpack.Timestamp(1)),
    msgpack.packb({"prompt": msgpack.ExtType(5, b"x")}),
    msgpack.packb({"prompt": "x", "guidance_scale": float("nan")}),
    msgpack.packb({"prompt": b"\xff\xfe"}) + b"\xc1",
    "not json",
    "",
    "[" * 5000,
    '{"prompt": "\\ud800"}',
]


@pytest.mark.parametrize("frame", UNREADABLE_FRAMES, ids=lambda frame: repr(frame[:24]))
def test_the_session_continues_after_an_unreadable_frame(server: Server, frame: str | bytes) -> None:
    before = len(server.output)
    with session(server) as socket:
        socket.send(frame)
        message = receive(socket)
        assert (message["type"], message["error"]) == ("x-fal-error", "INVALID_INPUT")
        assert generate(socket)["seed"] == 5
    assert "Traceback" not in server.output[before:]


def test_an_unreadable_binary_frame_is_called_msgpack(server: Server) -> None:
    with session(server) as socket:
        socket.send(b"\xc1")
        assert "Invalid msgpack" in receive(socket)["reason"]


def test_the_session_continues_after_a_failure(server: Server) -> None:
    with session(server, "test/raises") as socket:
        for prompt, reason in ("told", "This cannot be painted."), ("x", "Internal Server Error"):
            socket.send(msgpack.packb({**SMALL, "prompt": prompt, "num_inference_steps": 2}))
            assert receive(socket) == {"type": "x-fal-error", "error": "INTERNAL_ERROR", "reason": reason}
        assert generate(socket, num_inference_steps=1)["seed"] == 5


def test_concurrent_sessions_receive_their_own_outputs(server: Server) -> None:
    with session(server) as alice, session(server) as bob:
        for number in range(10):
            alice.send(msgpack.packb({**SMALL, "prompt": "alice", "seed": number}))
            bob.send(msgpack.packb({**SMALL, "prompt": "bob", "seed": 100 + number}))
        for socket, prompt, first in (alice, "alice", 0), (bob, "bob", 100):
            outputs = [message for message in (receive(socket) for _ in range(20)) if "seed" in message]
            assert {output["prompt"] for output in outputs} == {prompt}
            assert [output["seed"] for output in outputs] == list(range(first, first + 10))


def test_a_disconnect_cancels_the_requests_of_the_session(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "data", TEST_MODELS, max_running="1") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        os.mkfifo(tmp_path / "gate")
        with session(server, "test/gate") as socket:
            socket.send(msgpack.packb({**SMALL, "prompt": str(tmp_path / "gate"), "num_inference_steps": 50}))
            with (tmp_path / "gate").open("wb", buffering=0) as pipe:
                socket.send(msgpack.packb({**SMALL, "prompt": "behind it"}))
                assert socket.ping().wait(60)
                socket.close()
                status_url = client.post("/queue/test/null", json=SMALL).json()["status_url"]
                # Allow one step per poll until the server notices the disconnect. The remaining steps never run.
                while client.get(status_url).json()["status"] != "COMPLETED":
                    pipe.write(b".")
        assert server.stop() == 0
    with open_components(tmp_path / "data") as components:
        rows = components.rows("SELECT mode, status, error_type FROM jobs ORDER BY sequence")
        assert rows == [("realtime", 499, "client_disconnected"), ("queue", 200, None)]
        assert len(components.stored_file_names()) == 1


def test_a_restart_cancels_realtime_requests(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        components.queue.submit(submission(mode=Mode.REALTIME))
    with open_components(tmp_path) as components:
        components.queue.recover()
        assert components.queue.claim() is None
        assert components.rows("SELECT status, error_type FROM jobs") == [(499, "client_disconnected")]


def test_shutdown_closes_sessions(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as server, session(server.ready()) as socket:
        assert generate(socket)["seed"] == 5
        assert server.stop() == 0
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=60)
        assert "Traceback" not in server.output


SDKS = ["@fal-ai/client", "@fal-ai/serverless-client"]


def run_realtime_script(server: Server, sdk: str) -> Any:
    """Run realtime.mjs with this SDK, pointed at the server by requestMiddleware and a custom WebSocket class."""
    pointing = clients(server)["client, requestMiddleware"].config_call
    return Client(sdk, pointing).run("realtime.mjs", server.url.replace("http", "ws"))


@pytest.mark.parametrize("sdk", SDKS)
def test_javascript(node: None, server: Server, sdk: str) -> None:
    output = run_realtime_script(server, sdk)
    first, second = output["results"][0], output["results"][-1]
    assert (first["prompt"], first["seed"], first["images"][0]["width"]) == ("an apple", 7, 64)
    assert second["prompt"] == "a pear"
    assert [url.split("?")[0] for url in output["urls"]] == ["wss://fal.run/test/null/realtime"]
    assert "max_buffering=5" in output["urls"][0]
    assert output["errors"] == []


def test_javascript_receives_invalid_input_errors(node: None, server: Server) -> None:
    output = run_realtime_script(server, "@fal-ai/client")
    assert output["refused"]["error"] == "INVALID_INPUT"
    assert "prompt" in output["refused"]["reason"]


def test_javascript_with_a_key(node: None, server_with_keys: Server) -> None:
    assert run_realtime_script(server_with_keys, "@fal-ai/client")["results"][0]["prompt"] == "an apple"
