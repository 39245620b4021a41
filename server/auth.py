"""API keys and tokens, which identify the caller. Only hashes of keys are stored."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import jwt

from server.errors import Forbidden, Unauthorized
from server.storage.database import Database

#: The owner of all requests on a server without keys.
ANONYMOUS = "everybody"
#: What `keys list` and `keys revoke` call the automatic key, which has no name.
FIRST_KEY = "(the first)"
_ALGORITHM = "HS256"


class KeyScope(StrEnum):
    """The rights of a key. A client's key may send requests; an operator's key may also read /status and /metrics."""

    CLIENT = "client"
    OPERATOR = "operator"


#: The scopes of keys, by the keys' hashes.
KeyScopes = Mapping[str, KeyScope]
_NONE: KeyScopes = MappingProxyType({})


class Keys:
    """The valid keys. If there are none when the server starts, no key is required and all clients are one owner.

    A token stands for a key, for a limited time and scope. Tokens become invalid when the process ends, because their
    signing secret exists only in memory.
    """

    def __init__(
        self,
        keys: tuple[str, ...],
        stored: KeyScopes = _NONE,
        pepper: bytes = b"",
        operators: tuple[str, ...] = (),
        *,
        separates_clients: bool = False,
    ) -> None:
        """Hash `keys` (for clients) and `operators`, which come from the settings, with the secret `pepper`.

        `stored` holds the keys that this server created, which are hashed already. With `separates_clients`, a server
        without keys accepts every key, and each key that clients send is a separate owner.
        """
        self._pepper = pepper
        self._configured = {_hash(key, pepper): KeyScope.CLIENT for key in keys}
        self._configured |= {_hash(key, pepper): KeyScope.OPERATOR for key in operators}
        self._scopes = {**self._configured, **stored}
        self._secret = secrets.token_bytes(32)
        #: Whether no key is required. Decided once, when the server starts, so that revoking the last key does not open
        #: the server.
        self.allows_anonymous = not self._scopes
        self._separates_clients = separates_clients

    def reload(self, stored: KeyScopes) -> None:
        """Replace the keys that this server created. Keys from the settings stay."""
        self._scopes = {**self._configured, **stored}

    def owner(self, authorization: str | None, scope: str | None = None) -> str:
        """Return the owner of the key or token in an Authorization header, "Key ..." or "Bearer ...".

        A token is accepted only if it has `scope`; if `scope` is None, only keys are accepted. If the server requires
        no key, return ANONYMOUS, or with `separates_clients` the owner of any key. Raises Unauthorized.
        """
        if self.allows_anonymous:
            return self._owner_of_any(authorization)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() not in ("key", "bearer"):
            raise Unauthorized
        hashed = _hash(key.strip(), self._pepper)
        # Compare with every hash, so that the duration reveals nothing about the keys.
        matches = [known for known in self._scopes if hmac.compare_digest(known, hashed)]
        if matches:
            return matches[0][:32]
        if scope is None or scheme.lower() != "bearer":
            raise Unauthorized
        return self.owner_of_token(key.strip(), scope)

    def require_operator(self, authorization: str | None) -> None:
        """Check that the caller's key has the rights of an operator, unless no key is required.

        Raises Unauthorized for an invalid key, and Forbidden for a client's key.
        """
        owner = self.owner(authorization)
        operators = [known[:32] for known, scope in self._scopes.items() if scope == KeyScope.OPERATOR]
        # Without an operator key, a single key in the settings is the operator's. Keys that this server created do not
        # count: a client's key must not gain rights because the operator's key was revoked.
        lone = [known[:32] for known in self._configured] if len(self._configured) == 1 else []
        if not self.allows_anonymous and owner not in (operators or lone):
            raise Forbidden(
                "Only an operator's key gives access to this: use one of --operator-keys, or create one with"
                " `flux-server keys add NAME --scope operator`"
            )

    def issue(self, owner: str, scope: str, seconds: float) -> str:
        """Return a token for this owner that expires after `seconds`. Spaces in `scope` separate several scopes."""
        claims = {"sub": owner, "scope": scope, "exp": int(time.time() + seconds)}
        return jwt.encode(claims, self._secret, _ALGORITHM)

    def is_active(self, owner: str) -> bool:
        """Return whether this owner's key is still valid, or no key is required.

        Open connections of a revoked key must end.
        """
        return self.allows_anonymous or any(known[:32] == owner for known in self._scopes)

    def owner_of_token(self, token: str, scope: str) -> str:
        """Return the owner that the token was issued to; without keys, accept any token, as `owner` does.

        Raises Unauthorized for a token that has another scope, is expired or forged, or whose key was revoked.
        """
        if self.allows_anonymous:
            return self._owner_of_any(f"Bearer {token}")
        try:
            claims = jwt.decode(token, self._secret, [_ALGORITHM], options={"require": ["exp", "sub", "scope"]})
        except jwt.InvalidTokenError:
            raise Unauthorized from None
        owner = str(claims["sub"])
        if scope not in claims["scope"].split(" ") or not self.is_active(owner):
            raise Unauthorized
        return owner

    def _owner_of_any(self, authorization: str | None) -> str:
        """Return the owner of any key or token, without checking it."""
        key = (authorization or "").partition(" ")[2].strip()
        if not (self._separates_clients and key):
            return ANONYMOUS
        try:
            return str(jwt.decode(key, self._secret, [_ALGORITHM])["sub"])
        except jwt.InvalidTokenError:
            return _hash(key, self._pepper)[:32]


def pepper(database: Database) -> bytes:
    """Return the secret for hashing keys; create it if there is none.

    Webhook receivers learn the owner, which is part of the key's hash. Without the secret, they cannot find the key by
    hashing guesses.
    """
    with database.transaction() as connection:
        connection.execute("INSERT OR IGNORE INTO secrets VALUES ('pepper', ?)", (secrets.token_bytes(32),))
        (value,) = connection.execute("SELECT value FROM secrets WHERE name = 'pepper'").fetchone()
    return bytes(value)


def load_key_scopes(database: Database, *, with_first: bool = True) -> dict[str, KeyScope]:
    """Load the scopes of the keys that this server created, by the keys' hashes.

    `with_first` includes the automatic key: the key without a name that `components.build` creates.
    """
    rows = database.read("SELECT hash, scope FROM keys WHERE name <> '' OR ?", with_first)
    return {row["hash"]: KeyScope(row["scope"]) for row in rows}


def add_key(database: Database, name: str, scope: KeyScope) -> str:
    """Create a key and return it. Only its hash is stored, so the key cannot be shown again.

    The automatic key has an empty name. Raises ValueError if the name is in use.
    """
    key = f"{secrets.token_hex(8)}:{secrets.token_hex(16)}"
    hashed = _hash(key, pepper(database))
    with database.transaction() as connection:
        if name and connection.execute("SELECT 1 FROM keys WHERE name = ?", (name,)).fetchone():
            raise ValueError(f"A key named {name} already exists; choose another name, or revoke that key first")
        connection.execute(
            "INSERT INTO keys (hash, owner, created_at, name, scope) VALUES (?, ?, ?, ?, ?)",
            (hashed, hashed[:32], time.time(), name, scope),
        )
    return key


def list_keys(database: Database) -> list[dict[str, Any]]:
    """List the name, scope, creation time and owner of each key, oldest first.

    Owners are cut to 9 characters, as in logs and /status.
    """
    rows = database.read("SELECT name, scope, created_at, substr(owner, 1, 9) AS owner FROM keys ORDER BY created_at")
    return [dict(row) for row in rows]


def revoke_key(database: Database, name: str) -> None:
    """Delete a key by its name, or by the first 9 or more characters of its owner.

    FIRST_KEY stands for the automatic key. Raises ValueError if no key or more than one key matches.
    """
    with database.transaction() as connection:
        rows = connection.execute(
            "SELECT hash FROM keys WHERE name = ?1 OR (name = '' AND ?1 = ?2)"
            " OR (length(?1) >= 9 AND substr(owner, 1, length(?1)) = ?1)",
            (name, FIRST_KEY),
        ).fetchall()
        if not rows:
            raise ValueError(f"There is no key {name}; `flux-server keys list` lists all")
        if len(rows) > 1:
            raise ValueError(f"Several keys match {name}; use a longer prefix of the owner")
        connection.execute("DELETE FROM keys WHERE hash = ?", (rows[0]["hash"],))


def _hash(key: str, pepper: bytes) -> str:
    return hmac.digest(pepper, key.encode(), hashlib.sha256).hex()
