"""Fair shares: how much of a limited resource one owner may hold, so that other owners still have room."""

from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from server.errors import TooManyRequests
from server.net.fair_share import FairShare
from tests.clients.test_realtime import receive, session
from tests.support.server_process import TEST_MODELS, Gate, serving


def test_a_single_owner_may_hold_half() -> None:
    shares = FairShare(80, "too many")
    shares.acquire("me", 40)
    with pytest.raises(TooManyRequests, match="too many"):
        shares.acquire("me")
    shares.release("me", 40)
    assert shares.free == 80
    shares.acquire("me", 40)


def test_there_is_always_room_for_another_owner() -> None:
    shares, share = FairShare(80, "too many"), 80
    for owner in ("a", "b", "c", "d"):
        share //= 2
        shares.acquire(owner, share)
        with pytest.raises(TooManyRequests):
            shares.acquire(owner)
    assert shares.free == share


def test_open_answers_of_one_key_leave_room_for_another(tmp_path: Path, gate: Gate) -> None:
    """Count status streams, runs, streams and realtime sessions against one limit."""
    alice, bob = {"authorization": "Key alice"}, {"authorization": "Key bob"}
    with (
        serving(tmp_path, TEST_MODELS, keys="alice,bob", max_connections="40") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
        ExitStack() as stack,
    ):
        job = client.post("/queue/test/gate", json={"prompt": str(gate.path)}, headers=alice).json()
        status = f"{job['status_url']}/stream"
        for _ in range(20):
            stream = stack.enter_context(client.stream("GET", status, headers=alice))
            assert stream.status_code == 200
        with client.stream("GET", status, headers=alice) as refused:
            assert refused.status_code == 429
            assert "--max-connections" in refused.read().decode()
        for path in ("/test/null", "/test/null/stream", "/v1/images/generations"):
            body = {"prompt": "x", "model": "test/null"}
            assert client.post(path, json=body, headers=alice).status_code == 429
        with session(server, **alice) as socket:
            assert receive(socket)["error"] == "UNAVAILABLE"
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=60)
        other = client.post("/queue/test/null", json={"prompt": "x"}, headers=bob).json()
        with client.stream("GET", f"{other['status_url']}/stream", headers=bob) as stream:
            assert stream.status_code == 200
        gate.release_all()
