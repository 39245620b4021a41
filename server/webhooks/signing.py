"""Webhook signatures: Ed25519 as at fal, and Standard Webhooks in addition."""

import base64
import hashlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from standardwebhooks import Webhook

from server.storage.database import Database

#: When the newest key is this old, in seconds, the next key is created.
ROTATE_AFTER = 90 * 86_400.0
#: Seconds for which a new key is published before it signs, and an old key after it last signed. Receivers may cache
#: the published keys for a day, and retries last two hours.
OVERLAP = 2 * 86_400.0


class WebhookSigner:
    """A signer that uses the newest key that was published at least OVERLAP ago, and publishes all keys still needed.

    The very first key signs at once.
    """

    def __init__(self, database: Database, secret: str = "", clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._shared = Webhook(secret) if secret else None
        self._clock = clock

    def headers(self, request_id: str, owner: str, body: bytes) -> dict[str, str]:
        """Return the headers of one attempt, which starts now. All attempts of a webhook have the same `webhook-id`."""
        now = int(self._clock())
        key = self._signing_key()
        message = "\n".join((request_id, owner, str(now), hashlib.sha256(body).hexdigest())).encode()
        standard = key.sign(f"{request_id}.{now}.".encode() + body)
        signatures = [f"v1a,{base64.b64encode(standard).decode()}"]
        if self._shared:
            moment = datetime.fromtimestamp(now, UTC)
            signatures.insert(0, self._shared.sign(request_id, moment, body.decode()))
        return {
            "x-fal-webhook-request-id": request_id,
            "x-fal-webhook-user-id": owner,
            "x-fal-webhook-timestamp": str(now),
            "x-fal-webhook-signature": key.sign(message).hex(),
            "webhook-id": request_id,
            "webhook-timestamp": str(now),
            "webhook-signature": " ".join(signatures),
        }

    def jwks(self) -> dict[str, Any]:
        """Return the public keys as a JSON Web Key Set, newest first. Rotates keys that are old enough."""
        self.rotate()
        return {"keys": [_jwk(key_id, key) for key_id, key, _ in self._keys()]}

    def rotate(self) -> None:
        """Create a key if there is none or the newest is as old as ROTATE_AFTER; delete keys no longer needed."""
        now = self._clock()
        ages = [now - created_at for _, _, created_at in self._keys()]
        if not ages or ages[0] >= ROTATE_AFTER:
            key = Ed25519PrivateKey.generate()
            raw = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
            key_id = hashlib.sha256(_public(key)).hexdigest()[:16]
            with self._database.transaction() as connection:
                connection.execute("INSERT INTO signing_keys VALUES (?, ?, ?)", (key_id, raw, now))
        # A key begins to sign OVERLAP after its creation. Another OVERLAP later, older keys are not needed any more.
        settled = [age for age in ages if age >= 2 * OVERLAP]
        if settled and min(settled) < max(ages):
            with self._database.transaction() as connection:
                connection.execute("DELETE FROM signing_keys WHERE created_at < ?", (now - min(settled),))

    def _signing_key(self) -> Ed25519PrivateKey:
        self.rotate()
        keys = self._keys()
        published = [key for _, key, created_at in keys if self._clock() - created_at >= OVERLAP]
        # The very first key signs at once, because there is no older one.
        return published[0] if published else keys[-1][1]

    def _keys(self) -> list[tuple[str, Ed25519PrivateKey, float]]:
        rows = self._database.read("SELECT * FROM signing_keys ORDER BY created_at DESC")
        return [
            (row["key_id"], Ed25519PrivateKey.from_private_bytes(row["private"]), row["created_at"]) for row in rows
        ]


def _public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def _jwk(key_id: str, key: Ed25519PrivateKey) -> dict[str, str]:
    # Keep the base64 padding, because fal's Python sample decodes the key without adding it. Node accepts both forms.
    x = base64.urlsafe_b64encode(_public(key)).decode()
    return {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": key_id, "use": "sig", "alg": "EdDSA"}
