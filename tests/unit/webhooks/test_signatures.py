"""Tests of webhook signatures before and after key rotation, verified by receivers that share no server code."""

import asyncio
import base64
import hashlib
import json
import logging
import queue
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pytest_httpserver import HTTPServer
from standardwebhooks import Webhook, WebhookVerificationError
from werkzeug import Request, Response

from server.net.outbound import OutboundClient
from server.storage.database import Database
from server.webhooks.delivery import DELAYS, WebhookSender
from server.webhooks.signing import OVERLAP, ROTATE_AFTER, WebhookSigner
from tests.support.components import Clock, Components, finish_job, open_components
from tests.support.node import JS
from tests.support.server_process import TEST_MODELS, Server, serving

SECRET = "whsec_" + base64.b64encode(b"a secret of thirty two bytes ...").decode()
HOUR, DAY = 3600.0, 86_400.0
#: Seconds that fal lets receivers cache the published keys.
CACHE_SECONDS = DAY


@dataclass(frozen=True)
class Received:
    """A POST that a receiver got."""

    headers: dict[str, str]
    body: bytes


def public_keys(jwks: dict[str, Any]) -> list[Ed25519PublicKey]:
    """Return the keys, decoded as by fal's Python sample, which adds no padding."""
    return [Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(key["x"])) for key in jwks["keys"]]


def is_signed(jwks: dict[str, Any], message: bytes, signature: bytes) -> bool:
    """Return whether one of the keys made this signature."""
    for key in public_keys(jwks):
        try:
            key.verify(signature, message)
        except InvalidSignature:
            continue
        return True
    return False


def fal_signature_holds(received: Received, jwks: dict[str, Any]) -> bool:
    """Return whether the signature of fal's scheme holds, as its documentation describes the scheme."""
    names = ("request-id", "user-id", "timestamp")
    values = [received.headers[f"x-fal-webhook-{name}"] for name in names]
    message = "\n".join([*values, hashlib.sha256(received.body).hexdigest()]).encode()
    return is_signed(jwks, message, bytes.fromhex(received.headers["x-fal-webhook-signature"]))


def v1a_signature_holds(received: Received, jwks: dict[str, Any]) -> bool:
    """Return whether the asymmetric signature of Standard Webhooks holds, as its specification describes it."""
    headers = received.headers
    message = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + received.body
    signatures = [text.split(",") for text in headers["webhook-signature"].split(" ")]
    return any(is_signed(jwks, message, base64.b64decode(text)) for version, text in signatures if version == "v1a")


def verify_with_node(received: Received, **other: Any) -> dict[str, bool]:
    """Verify with Node's crypto; return for each scheme whether its signature holds."""
    body = base64.b64encode(received.body).decode()
    arguments = json.dumps({"headers": received.headers, "body": body, "secret": SECRET, **other})
    command = ["node", "verify.mjs"]
    completed = subprocess.run(command, cwd=JS, input=arguments, capture_output=True, text=True, timeout=60)
    assert completed.returncode == 0, completed.stderr
    found: dict[str, bool] = json.loads(completed.stdout)
    return found


class Receiver:
    """A receiver at /hook of a real HTTP server."""

    def __init__(self, httpserver: HTTPServer) -> None:
        self.url = httpserver.url_for("/hook")
        self._inbox: queue.Queue[Received] = queue.Queue()
        httpserver.expect_request("/hook", method="POST").respond_with_handler(self._take)

    def _take(self, request: Request) -> Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self._inbox.put(Received(headers, request.get_data()))
        return Response()

    def next(self) -> Received:
        """Wait for the next webhook and return it."""
        return self._inbox.get(timeout=60)


@pytest.fixture
def receiver(httpserver: HTTPServer) -> Receiver:
    return Receiver(httpserver)


@pytest.fixture(scope="module")
def signing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server that has a webhook secret and may send webhooks to this machine."""
    settings = {"outbound_allow": "127.0.0.0/8", "webhook_secret": SECRET}
    with serving(tmp_path_factory.mktemp("signing"), TEST_MODELS, **settings) as server:
        yield server.ready()


def submit_with_webhook(server: Server, receiver: Receiver, endpoint: str = "test/null") -> str:
    """Submit a request with a webhook to the receiver; return the request id."""
    query = {"fal_webhook": receiver.url}
    # Not ASCII, so that bytes and characters differ.
    body = {"prompt": "ein roter Apfel — 苹果", "num_inference_steps": 2}
    response = httpx.post(f"{server.url}/queue/{endpoint}", params=query, json=body, trust_env=False)
    request_id: str = response.json()["request_id"]
    return request_id


@pytest.mark.parametrize("endpoint", ["test/null", "test/raises"])
def test_the_signature_of_every_scheme_holds(signing: Server, receiver: Receiver, endpoint: str) -> None:
    request_id = submit_with_webhook(signing, receiver, endpoint)
    received = receiver.next()
    jwks = httpx.get(f"{signing.url}/.well-known/jwks.json", trust_env=False).json()
    assert fal_signature_holds(received, jwks)
    assert v1a_signature_holds(received, jwks)
    verified = Webhook(SECRET).verify(received.body, received.headers)
    assert verified["request_id"] == request_id
    assert verified["status"] == {"test/null": "OK", "test/raises": "ERROR"}[endpoint]
    assert received.headers["x-fal-webhook-request-id"] == received.headers["webhook-id"] == request_id
    assert received.headers["x-fal-webhook-timestamp"] == received.headers["webhook-timestamp"]
    assert received.headers["x-fal-webhook-user-id"]


def test_every_scheme_holds_by_node(node: None, signing: Server, receiver: Receiver) -> None:
    submit_with_webhook(signing, receiver)
    found = verify_with_node(receiver.next(), jwksUrl=f"{signing.url}/.well-known/jwks.json")
    assert found == {"fal": True, "v1": True, "v1a": True}


def test_no_signature_holds_for_another_body_time_or_id(node: None, signing: Server, receiver: Receiver) -> None:
    submit_with_webhook(signing, receiver)
    received = receiver.next()
    jwks = httpx.get(f"{signing.url}/.well-known/jwks.json", trust_env=False).json()
    other_time = {"x-fal-webhook-timestamp": "1", "webhook-timestamp": "1"}
    other_id = {"x-fal-webhook-request-id": "0", "webhook-id": "0"}
    forged = [
        Received(received.headers, received.body + b" "),
        Received({**received.headers, **other_time}, received.body),
        Received({**received.headers, **other_id}, received.body),
    ]
    for forgery in forged:
        assert not fal_signature_holds(forgery, jwks)
        assert not v1a_signature_holds(forgery, jwks)
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(forgery.body, forgery.headers)
    assert verify_with_node(forged[0], jwks=jwks) == {"fal": False, "v1": False, "v1a": False}


def test_the_published_keys(signing: Server) -> None:
    response = httpx.get(f"{signing.url}/.well-known/jwks.json", headers={"host": "rest.fal.ai"}, trust_env=False)
    (key,) = response.json()["keys"]
    assert (key["kty"], key["crv"]) == ("OKP", "Ed25519")
    # The key is padded, because fal's sample decodes the key without adding padding.
    assert len(key["x"]) == 44
    assert not {"d", "p", "q"} & key.keys()
    assert "max-age=86400" in response.headers["cache-control"]


def test_without_a_secret_there_is_no_v1(components: Components) -> None:
    signatures = WebhookSigner(components.database, clock=components.clock).headers("id", "me", b"{}")[
        "webhook-signature"
    ]
    assert [signature.split(",")[0] for signature in signatures.split(" ")] == ["v1a"]


def sign(signer: WebhookSigner) -> Received:
    """Sign a webhook at the present time and return it as a receiver gets it."""
    return Received(signer.headers("id", "me", b'{"seed":7}'), b'{"seed":7}')


@pytest.fixture
def signer(components: Components) -> WebhookSigner:
    return WebhookSigner(components.database, SECRET, components.clock)


def holds(received: Received, jwks: dict[str, Any]) -> bool:
    """Return whether the signatures of both schemes that use the published keys hold."""
    return fal_signature_holds(received, jwks) and v1a_signature_holds(received, jwks)


@pytest.mark.parametrize("step", [HOUR, 7 * HOUR, 23 * HOUR, DAY])
def test_receivers_that_cache_the_keys_for_a_day_never_lack_one(
    components: Components, signer: WebhookSigner, step: float
) -> None:
    jwks, fetched_at, start = signer.jwks(), components.clock.now, components.clock.now
    seen = {key["kid"] for key in jwks["keys"]}
    while components.clock.now < start + 2 * ROTATE_AFTER + 3 * OVERLAP:
        if components.clock.now - fetched_at >= CACHE_SECONDS:
            jwks, fetched_at = signer.jwks(), components.clock.now
            seen |= {key["kid"] for key in jwks["keys"]}
        assert holds(sign(signer), jwks)
        components.clock.now += step
    assert len(seen) == 3


def test_a_new_key_is_published_before_it_signs_and_an_old_one_after(
    components: Components, signer: WebhookSigner
) -> None:
    first = signer.jwks()
    components.clock.now += ROTATE_AFTER
    both = signer.jwks()
    assert len(both["keys"]) == 2
    assert both["keys"][1] == first["keys"][0]
    new, old = ({"keys": [key]} for key in both["keys"])
    components.clock.now += OVERLAP - 1
    before = sign(signer)
    assert (holds(before, old), holds(before, new)) == (True, False)
    components.clock.now += 1
    after = sign(signer)
    assert (holds(after, old), holds(after, new)) == (False, True)
    components.clock.now += CACHE_SECONDS
    assert signer.jwks() == both
    assert holds(before, signer.jwks())
    components.clock.now += OVERLAP
    assert signer.jwks() == new


def test_the_schemes_hold_by_node_before_and_after_a_rotation(
    node: None, components: Components, signer: WebhookSigner
) -> None:
    for _ in range(2):
        found = verify_with_node(sign(signer), jwks=signer.jwks(), now=components.clock.now)
        assert found == {"fal": True, "v1": True, "v1a": True}
        components.clock.now += ROTATE_AFTER
        signer.rotate()
        components.clock.now += OVERLAP


def test_signatures_hold_after_the_server_was_off_for_long(components: Components, signer: WebhookSigner) -> None:
    jwks = signer.jwks()
    components.clock.now += 5 * ROTATE_AFTER
    assert holds(sign(signer), jwks)
    assert holds(sign(signer), signer.jwks())


def test_keys_outlive_the_server(tmp_path: Path) -> None:
    clock = Clock()
    with open_components(tmp_path, clock=clock) as components:
        first = WebhookSigner(components.database, clock=clock).jwks()
    with open_components(tmp_path, clock=clock) as components:
        assert WebhookSigner(components.database, clock=clock).jwks() == first


def test_two_servers_have_different_keys(components: Components, signer: WebhookSigner, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Database(tmp_path / "other")
    assert not holds(sign(WebhookSigner(other, clock=components.clock)), signer.jwks())
    other.close()


def send_due(components: Components, signer: WebhookSigner) -> None:
    """Send what is due with a new sender, as after a restart, and wait for all deliveries."""

    async def send() -> None:
        sender = WebhookSender(
            components.database, components.notifier, OutboundClient(("127.0.0.0/8",)), signer, components.clock
        )
        await sender.send_due()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    asyncio.run(send())


def delivery(components: Components) -> Any:
    """Return the number of attempts, the time of the next attempt, and whether the webhook was delivered."""
    (row,) = components.rows("SELECT attempt, due_at, delivered_at IS NOT NULL FROM deliveries")
    return row


def test_a_receiver_that_is_down_for_the_first_five_attempts_still_gets_the_webhook(
    components: Components, signer: WebhookSigner, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        job = finish_job(components, webhook_url=f"http://127.0.0.1:{port}/hook")
        with caplog.at_level(logging.WARNING, logger="server.webhooks.delivery"):
            for delay in DELAYS[:5]:
                send_due(components, signer)
                components.clock.now += delay
    with HTTPServer("127.0.0.1", port) as httpserver:
        receiver = Receiver(httpserver)
        send_due(components, signer)
    assert delivery(components) == (6, None, 1)
    records = [record for record in caplog.records if record.name == "server.webhooks.delivery"]
    assert {vars(record)["request_id"] for record in records} == {job.request_id}
    lines = [record.getMessage() for record in records]
    assert [line.partition(": ")[0] for line in lines] == [f"webhook attempt {number} failed" for number in range(1, 6)]
    assert all("ConnectError" in line for line in lines)
    received = receiver.next()
    assert holds(received, signer.jwks())
    # The timestamp is that of the successful attempt, not of the first.
    assert received.headers["webhook-timestamp"] == str(int(components.clock.now))


def test_each_attempt_has_a_new_signature(
    components: Components, signer: WebhookSigner, httpserver: HTTPServer
) -> None:
    httpserver.expect_oneshot_request("/hook").respond_with_data(status=503)
    httpserver.expect_request("/hook").respond_with_data()
    finish_job(components, webhook_url=httpserver.url_for("/hook"))
    send_due(components, signer)
    components.clock.now += DELAYS[0]
    send_due(components, signer)
    attempts = [
        Received({name.lower(): value for name, value in request.headers.items()}, request.get_data())
        for request, _ in httpserver.log
    ]
    assert [holds(attempt, signer.jwks()) for attempt in attempts] == [True, True]
    assert len({attempt.headers["x-fal-webhook-timestamp"] for attempt in attempts}) == 2
    assert len({attempt.headers["webhook-id"] for attempt in attempts}) == 1
    assert len({attempt.body for attempt in attempts}) == 1


def test_the_server_logs_a_failed_attempt(signing: Server, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/hook").respond_with_data(status=500)
    query = {"fal_webhook": httpserver.url_for("/hook")}
    response = httpx.post(f"{signing.url}/queue/test/null", params=query, json={"prompt": "x"}, trust_env=False)
    signing.wait_for(f"webhook attempt 1 failed: the receiver answered 500.*request_id={response.json()['request_id']}")


def test_receivers_on_this_machine_are_refused_unless_allowed(
    constrained_client: httpx.Client, httpserver: HTTPServer
) -> None:
    query = {"fal_webhook": httpserver.url_for("/hook").replace("localhost", "127.0.0.1")}
    assert constrained_client.post("/queue/test/null", params=query, json={"prompt": "x"}).status_code == 422
