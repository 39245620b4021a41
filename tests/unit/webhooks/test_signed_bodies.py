"""Tests of webhook signatures of arbitrary bodies: valid for every verifier, and invalid after any change."""

import base64
import hashlib
import hmac
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic_core import to_json
from standardwebhooks import Webhook, WebhookVerificationError

from server.webhooks.signing import WebhookSigner
from tests.support.components import open_components
from tests.unit.webhooks.test_signatures import SECRET, Received, fal_signature_holds, v1a_signature_holds

#: All of JSON, deep and wide, with every character except lone surrogates, which no body can contain.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
PAYLOADS = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=30)
#: Bodies of up to a megabyte and more, like results with embedded images.
LARGE = st.builds(lambda text, times: {"images": [{"url": text * times}]}, TEXTS, st.integers(1, 100_000))
IDS = st.uuids(version=4).map(str)


def is_v1(received: Received) -> bool:
    """Return whether the symmetric signature of Standard Webhooks holds, as its specification describes it."""
    headers = received.headers
    message = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + received.body
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    expected = "v1," + base64.b64encode(hmac.digest(key, message, hashlib.sha256)).decode()
    return expected in headers["webhook-signature"].split(" ")


def is_accepted(received: Received) -> bool:
    """Return whether the library that receivers use accepts the webhook."""
    try:
        Webhook(SECRET).verify(received.body, received.headers, json_parse=False)
    except (WebhookVerificationError, UnicodeDecodeError):
        return False
    return True


def verdicts(received: Received, jwks: dict[str, Any]) -> set[bool]:
    """Return the verdicts of all four verifiers; one element means that they agree."""
    return {
        fal_signature_holds(received, jwks),
        v1a_signature_holds(received, jwks),
        is_v1(received),
        is_accepted(received),
    }


@pytest.fixture
def signer(tmp_path: Path) -> Iterator[WebhookSigner]:
    """Yield a signer with the real clock, because receivers refuse old webhooks."""
    with open_components(tmp_path) as components:
        yield WebhookSigner(components.database, SECRET, time.time)


def check_bodies(signer: WebhookSigner, max_examples: int) -> None:
    """Sign `max_examples` bodies; assert that all verifiers accept each body, and refuse it with one byte changed."""
    jwks, sizes = signer.jwks(), list[int]()
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=max_examples, deadline=None, database=None, suppress_health_check=checks)
    @given(IDS, IDS, PAYLOADS | LARGE, st.integers(0), st.integers(1, 255))
    def check(request_id: str, owner: str, payload: Any, position: int, change: int) -> None:
        body = to_json({"request_id": request_id, "status": "OK", "payload": payload})
        received = Received(signer.headers(request_id, owner, body), body)
        assert verdicts(received, jwks) == {True}
        changed = bytearray(body)
        changed[position % len(body)] ^= change
        assert verdicts(Received(received.headers, bytes(changed)), jwks) == {False}
        sizes.append(len(body))

    check()
    # Hypothesis tried enough bodies, and not only small ones.
    assert len(sizes) >= max_examples
    assert max(sizes) > 10_000


def test_signatures_of_many_bodies(signer: WebhookSigner) -> None:
    check_bodies(signer, 200)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_signatures_of_very_many_bodies(signer: WebhookSigner) -> None:
    check_bodies(signer, 10_000)


def test_every_byte_is_signed(signer: WebhookSigner) -> None:
    """Changing any bit of the body, or the id or the time, invalidates every signature; the owner, fal's only."""
    request_id, body = str(uuid.uuid4()), '{"prompt":"Grüße, 世界 🌍"}'.encode()
    received, jwks = Received(signer.headers(request_id, "me", body), body), signer.jwks()
    assert verdicts(received, jwks) == {True}
    for position in range(len(body)):
        for bit in range(8):
            changed = bytearray(body)
            changed[position] ^= 1 << bit
            assert verdicts(Received(received.headers, bytes(changed)), jwks) == {False}
    for name in ("x-fal-webhook-request-id", "x-fal-webhook-user-id", "x-fal-webhook-timestamp"):
        assert not fal_signature_holds(Received({**received.headers, name: "1"}, body), jwks)
    for name in ("webhook-id", "webhook-timestamp"):
        other = Received({**received.headers, name: "1"}, body)
        assert (v1a_signature_holds(other, jwks), is_v1(other), is_accepted(other)) == (False, False, False)
