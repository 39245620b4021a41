"""Realtime over real WebSockets: who may come in, what waits, what is refused, and who is painted for."""

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
from tests.clients.test_node_clients import node as node
from tests.support.components import opened, submission
from tests.support.node import Client, clients
from tests.support.server_process import TEST_MODELS, Server, serving

ALICE = {"authorization": "Key alice:secret"}
SMALL = {"prompt": "x", "seed": 5, "image_size": {"width": 64, "height": 64}}
UNAUTHORIZED = {"status": "error", "error": "Unauthorized"}


@contextmanager
def session(server: Server, endpoint: str = "test/null", query: str = "", **headers: str) -> Iterator[ClientConnection]:
    """A WebSocket, as a client opens one."""
    url = f"{server.url.replace('http', 'ws')}/{endpoint}/realtime{query}"
    with connect(url, additional_headers=headers, proxy=None, open_timeout=60, max_size=None) as socket:
        yield socket


def heard(socket: ClientConnection) -> Any:
    """The next message: a dict of msgpack, or of JSON."""
    message = socket.recv(timeout=60)
    return json.loads(message) if isinstance(message, str) else msgpack.unpackb(message)


def painted(socket: ClientConnection, **fields: Any) -> Any:
    """Send an input and wait for its output, and for the message about its time that follows."""
    socket.send(msgpack.packb({**SMALL, **fields}))
    output, timing = heard(socket), heard(socket)
    assert (timing["type"], timing["action"]) == ("x-fal-message", "timings")
    assert timing["timing"] >= 0
    return output


def token(client: httpx.Client, *apps: str, seconds: int = 120) -> str:
    """What a page is given: good for these apps, by their aliases."""
    wanted = {"allowed_apps": apps, "token_expiration": seconds}
    answer = client.post("/tokens/", json=wanted, headers={**ALICE, "host": "rest.fal.ai"})
    assert answer.status_code == 200
    found: str = answer.json()
    assert isinstance(found, str)
    return found


def last_words(socket: ClientConnection) -> tuple[Any, int]:
    """What is said before the session is closed, and the code it is closed with."""
    words = heard(socket)
    with pytest.raises(ConnectionClosed) as closed:
        socket.recv(timeout=60)
    assert closed.value.rcvd
    return words, closed.value.rcvd.code


def test_an_answer_is_that_of_run(server: Server, client: httpx.Client) -> None:
    fields = {**SMALL, "num_inference_steps": 2, "prompt": "a red apple"}
    there = client.post("/fal-ai/flux/dev", json=fields).json()
    with session(server, "fal-ai/flux/dev") as socket:
        here = painted(socket, **fields)
    assert {**here, "images": 0, "timings": 0} == {**there, "images": 0, "timings": 0}
    assert here["timings"].keys() == there["timings"].keys()
    pictures = [client.get(answer["images"][0]["url"]).content for answer in (here, there)]
    assert pictures[0] == pictures[1]
    assert here["images"][0]["url"].startswith(f"{server.url}/files/")


def test_many_in_one_session_come_in_order(server: Server) -> None:
    with session(server) as socket:
        for seed in range(5):
            socket.send(msgpack.packb({**SMALL, "seed": seed}))
        outputs = [message for message in (heard(socket) for _ in range(10)) if "seed" in message]
    assert [output["seed"] for output in outputs] == [0, 1, 2, 3, 4]


def test_an_answer_may_hold_its_picture(server: Server) -> None:
    with session(server) as socket:
        assert painted(socket, sync_mode=True)["images"][0]["url"].startswith("data:image/jpeg;base64,")


def test_text_is_read_as_json(server: Server) -> None:
    with session(server) as socket:
        socket.send(json.dumps(SMALL))
        assert heard(socket)["seed"] == 5


@pytest.mark.parametrize("endpoint", ["test/unknown", "fal-ai/flux", "x"])
def test_no_such_endpoint(server: Server, endpoint: str) -> None:
    with pytest.raises(InvalidStatus) as refused, session(server, endpoint):
        pass
    assert refused.value.response.status_code in (403, 404)


def test_a_token_is_good_for_its_app_only(keyed: Server, keyed_client: httpx.Client) -> None:
    for apps, is_good in (("null",), True), (("gate",), False), (("flux", "null"), True), (("nul", "test"), False):
        with session(keyed, query=f"?fal_jwt_token={token(keyed_client, *apps)}") as socket:
            if is_good:
                assert painted(socket)["seed"] == 5
            else:
                assert last_words(socket) == (UNAUTHORIZED, 1008)


def test_a_token_is_no_key(keyed: Server, keyed_client: httpx.Client) -> None:
    bearer = {"authorization": f"Bearer {token(keyed_client, 'null')}"}
    for path in ("/test/null", "/queue/test/null", "/storage/upload/initiate", "/tokens"):
        assert keyed_client.post(path, json=SMALL, headers=bearer).status_code == 401


BAD_TOKENS = ["", "?fal_jwt_token=", "?fal_jwt_token=x", "?fal_jwt_token=e30.e30.e30", "?fal_jwt_token=alice:secret"]
NO_SIGNATURE = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIiwic2NvcGUiOiJudWxsIiwiZXhwIjo5OTk5OTk5OTk5fQ."


@pytest.mark.parametrize("query", [*BAD_TOKENS, f"?fal_jwt_token={NO_SIGNATURE}"])
def test_no_token_no_session(keyed: Server, query: str) -> None:
    with session(keyed, query=query) as socket:
        assert last_words(socket) == (UNAUTHORIZED, 1008)


def test_a_token_of_another_server_is_none(keyed: Server, tmp_path: Path) -> None:
    with (
        serving(tmp_path, TEST_MODELS, keys="alice:secret") as other,
        httpx.Client(base_url=other.url, trust_env=False) as client,
        session(keyed, query=f"?fal_jwt_token={token(client, 'null')}") as socket,
    ):
        assert last_words(socket) == (UNAUTHORIZED, 1008)


def test_a_token_ends(keyed: Server, keyed_client: httpx.Client) -> None:
    query = f"?fal_jwt_token={token(keyed_client, 'null', seconds=1)}"
    words: Any = None
    while words != UNAUTHORIZED:
        with session(keyed, query=query) as socket:
            with suppress(ConnectionClosed):
                socket.send(msgpack.packb(SMALL))
            words = heard(socket)


@pytest.mark.parametrize("header", ["Key alice:secret", "Bearer bob:secret", "Key mallory:secret"])
def test_a_key_in_the_header(keyed: Server, header: str) -> None:
    with session(keyed, authorization=header) as socket:
        if "mallory" in header:
            assert last_words(socket) == (UNAUTHORIZED, 1008)
        else:
            assert painted(socket)["seed"] == 5


def test_without_keys_any_token_will_do(server: Server) -> None:
    with session(server, query="?fal_jwt_token=whatever", authorization="Key whatever") as socket:
        assert painted(socket)["seed"] == 5


def test_foreign_pages_are_kept_out(server: Server) -> None:
    with pytest.raises(InvalidStatus) as refused, session(server, origin="https://evil.example"):
        pass
    assert refused.value.response.status_code == 403


@contextmanager
def held_up(socket: ClientConnection, path: Path, steps: int = 1) -> Iterator[None]:
    """While the block lasts the session paints one thing that does not go on; then that goes to its end."""
    os.mkfifo(path)
    fields = {**SMALL, "prompt": str(path), "num_inference_steps": steps}
    socket.send(msgpack.packb(fields))
    # Opens when the model opens its side: from then on it is painting.
    with path.open("wb"):
        yield


def prompts(socket: ClientConnection, last: str) -> list[str]:
    """The prompts that are answered, up to the last."""
    found: list[str] = []
    while last not in found:
        if "prompt" in (message := heard(socket)):
            found.append(message["prompt"])
    return found


@pytest.mark.parametrize(("query", "kept"), [("?max_buffering=1", 1), ("?max_buffering=3", 3), ("", 60)])
def test_the_oldest_of_those_that_wait_give_way(narrow: Server, tmp_path: Path, query: str, kept: int) -> None:
    waiting = [f"number {number}" for number in range(65)]
    with session(narrow, "test/gate", query) as socket:
        with held_up(socket, tmp_path / "gate"):
            for prompt in waiting:
                # Pipes that are open already, so that these are painted at once.
                (tmp_path / prompt).touch()
                socket.send(msgpack.packb({**SMALL, "prompt": str(tmp_path / prompt)}))
            # Answered in the order of what was sent: all were received.
            assert socket.ping().wait(60)
        found = prompts(socket, str(tmp_path / waiting[-1]))
    assert found == [str(tmp_path / prompt) for prompt in ("gate", *waiting[-kept:])]


MIB = 2**20


def test_nothing_is_spoken_compressed(server: Server) -> None:
    """A kilobyte would become megabytes here. The client offers it, as most do, and goes on without."""
    with session(server) as socket:
        assert socket.protocol.extensions == []
        assert painted(socket)["seed"] == 5


def test_the_largest_picture_fits_into_a_frame(server: Server) -> None:
    """Of zeros, so that it is told of as a picture that cannot be read."""
    uri = "data:image/png;base64," + "A" * (MAX_IMAGE_BYTES // 3 * 4)
    with session(server, "test/copy") as socket:
        socket.send(msgpack.packb({**SMALL, "image_url": uri}))
        words = heard(socket)
        assert words["error"] == "INVALID_INPUT"
        assert "image" in words["reason"]


def test_a_frame_is_no_larger_than_a_body_may_be(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS, max_body_mib="1") as server, session(server.ready()) as socket:
        assert painted(socket, padding="x" * (MIB - 1000))["seed"] == 5
        with pytest.raises(ConnectionClosed) as closed:
            painted(socket, padding="x" * MIB)
        # The reason may be lost with the rest of the frame, which the server does not read.
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009


@pytest.mark.parametrize("pack", [msgpack.packb, json.dumps], ids=["msgpack", "json"])
def test_large_inputs_that_wait_give_way_sooner(server: Server, tmp_path: Path, pack: Callable[[Any], Any]) -> None:
    """All that wait are no larger than the largest."""
    waiting = [f"number {number}" for number in range(6)]
    with session(server, "test/gate") as socket:
        with held_up(socket, tmp_path / "gate"):
            for prompt in waiting:
                (tmp_path / prompt).touch()
                socket.send(pack({**SMALL, "prompt": str(tmp_path / prompt), "padding": "x" * (MAX_INPUT_BYTES // 4)}))
            assert socket.ping().wait(60)
        found = prompts(socket, str(tmp_path / waiting[-1]))
    assert found == [str(tmp_path / prompt) for prompt in ("gate", *waiting[-3:])]


@pytest.mark.parametrize("padding", [[{}] * 1000, [0] * 1024], ids=["maps", "numbers"])
def test_a_frame_may_hold_many_things(server: Server, padding: list[Any]) -> None:
    with session(server) as socket:
        assert painted(socket, padding=padding)["seed"] == 5


@pytest.mark.parametrize("padding", [[[{}] * 1000] * 2, [0] * 1025, dict.fromkeys(map(str, range(1025)), 0)])
def test_a_frame_of_too_many_things_is_not_read(server: Server, padding: Any) -> None:
    """Megabytes of empty maps would take gigabytes."""
    with session(server) as socket:
        socket.send(msgpack.packb({**SMALL, "padding": padding}))
        assert heard(socket)["error"] == "INVALID_INPUT"
        assert painted(socket)["seed"] == 5


@pytest.mark.parametrize("given", ["0", "61", "-1", "x", "nan", "1e9", "%00"])
def test_bad_max_buffering(server: Server, given: str) -> None:
    with session(server, query=f"?max_buffering={given}") as socket:
        words, code = last_words(socket)
    assert (words["type"], words["error"], code) == ("x-fal-error", "BAD_REQUEST", 1008)
    assert "max_buffering" in words["reason"]


INVALID = [{}, {"prompt": 5}, {"prompt": "x", "num_images": 9}, {"prompt": "x", "seed": -1}, {1: 2}, [], 5, "x", None]


@pytest.mark.parametrize("fields", INVALID, ids=repr)
def test_invalid_input_is_told_and_the_session_goes_on(server: Server, fields: Any) -> None:
    with session(server) as socket:
        socket.send(msgpack.packb(fields))
        words = heard(socket)
        assert (words["type"], words["error"]) == ("x-fal-error", "INVALID_INPUT")
        assert isinstance(words["reason"], str)
        assert words["reason"]
        assert painted(socket)["seed"] == 5


UNREADABLE = [
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


@pytest.mark.parametrize("frame", UNREADABLE, ids=lambda frame: repr(frame[:24]))
def test_a_frame_that_cannot_be_read_is_told_and_the_session_goes_on(server: Server, frame: str | bytes) -> None:
    before = len(server.output)
    with session(server) as socket:
        socket.send(frame)
        words = heard(socket)
        assert (words["type"], words["error"]) == ("x-fal-error", "INVALID_INPUT")
        assert painted(socket)["seed"] == 5
    assert "Traceback" not in server.output[before:]


def test_a_failure_is_told_and_the_session_goes_on(server: Server) -> None:
    with session(server, "test/raises") as socket:
        for prompt, reason in ("told", "This cannot be painted."), ("x", "Internal Server Error"):
            socket.send(msgpack.packb({**SMALL, "prompt": prompt, "num_inference_steps": 2}))
            assert heard(socket) == {"type": "x-fal-error", "error": "INTERNAL_ERROR", "reason": reason}
        assert painted(socket, num_inference_steps=1)["seed"] == 5


def test_two_clients_do_not_mix(server: Server) -> None:
    with session(server) as alice, session(server) as bob:
        for number in range(10):
            alice.send(msgpack.packb({**SMALL, "prompt": "alice", "seed": number}))
            bob.send(msgpack.packb({**SMALL, "prompt": "bob", "seed": 100 + number}))
        for socket, prompt, first in (alice, "alice", 0), (bob, "bob", 100):
            outputs = [message for message in (heard(socket) for _ in range(20)) if "seed" in message]
            assert {output["prompt"] for output in outputs} == {prompt}
            assert [output["seed"] for output in outputs] == list(range(first, first + 10))


def test_who_leaves_is_not_painted_for(tmp_path: Path) -> None:
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
                # A step for each look, until the server has seen that nobody is there: the rest is never taken.
                while client.get(status_url).json()["status"] != "COMPLETED":
                    pipe.write(b".")
        assert server.stop() == 0
    with opened(tmp_path / "data") as parts:
        rows = parts.rows("SELECT mode, status, error_type FROM jobs ORDER BY sequence")
        assert rows == [("realtime", 499, "client_disconnected"), ("queue", 200, None)]
        assert len(parts.on_disk()) == 1


def test_who_was_there_before_a_restart_is_not_painted_for(tmp_path: Path) -> None:
    with opened(tmp_path) as parts:
        parts.queue.submit(submission(mode=Mode.REALTIME))
    with opened(tmp_path) as parts:
        parts.queue.recover()
        assert parts.queue.claim() is None
        assert parts.rows("SELECT status, error_type FROM jobs") == [(499, "client_disconnected")]


def test_a_stop_ends_sessions(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as server, session(server.ready()) as socket:
        assert painted(socket)["seed"] == 5
        assert server.stop() == 0
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=60)
        assert "Traceback" not in server.output


SDKS = ["@fal-ai/client", "@fal-ai/serverless-client"]


def javascript(server: Server, sdk: str) -> Any:
    """What realtime.mjs says with this SDK, pointed at the server by requestMiddleware and a WebSocket of its own."""
    pointing = clients(server)["client, requestMiddleware"].pointing
    return Client(sdk, pointing).run("realtime.mjs", server.url.replace("http", "ws"))


@pytest.mark.parametrize("sdk", SDKS)
def test_javascript(node: None, server: Server, sdk: str) -> None:
    said = javascript(server, sdk)
    first, second = said["results"][0], said["results"][-1]
    assert (first["prompt"], first["seed"], first["images"][0]["width"]) == ("an apple", 7, 64)
    assert second["prompt"] == "a pear"
    assert [url.split("?")[0] for url in said["urls"]] == ["wss://fal.run/test/null/realtime"]
    assert "max_buffering=5" in said["urls"][0]
    assert said["errors"] == []


def test_javascript_is_told_of_invalid_input(node: None, server: Server) -> None:
    said = javascript(server, "@fal-ai/client")
    assert said["refused"]["error"] == "INVALID_INPUT"
    assert "prompt" in said["refused"]["reason"]


def test_javascript_with_a_key(node: None, keyed: Server) -> None:
    assert javascript(keyed, "@fal-ai/client")["results"][0]["prompt"] == "an apple"
