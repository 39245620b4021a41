"""Keys and tokens: who is calling. Only hashes of keys are kept."""

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

#: The owner of everything when there is no key.
ANONYMOUS = "everybody"
_ALGORITHM = "HS256"


class KeyScope(StrEnum):
    """What a key is good for: requests, or the operator's view and other keys beside them."""

    CLIENT = "client"
    OPERATOR = "operator"


#: The scope of each key that this server made, by the key's hash.
KeyScopes = Mapping[str, KeyScope]
_NONE: KeyScopes = MappingProxyType({})


class Keys:
    """The keys clients may send; none at all means that everybody is one owner.

    Tokens stand for a key for a while and for one purpose; their secret dies with the process.
    """

    def __init__(
        self,
        keys: tuple[str, ...],
        stored: KeyScopes = _NONE,
        pepper: bytes = b"",
        operators: tuple[str, ...] = (),
    ) -> None:
        self._pepper = pepper
        self._given = {_hash(key, pepper): KeyScope.CLIENT for key in keys}
        self._given |= {_hash(key, pepper): KeyScope.OPERATOR for key in operators}
        self._scopes = {**self._given, **stored}
        self._secret = secrets.token_bytes(32)
        #: Whether no key is asked for. Decided at the start, so that revoking the last key opens nothing.
        self.allows_anonymous = not self._scopes

    def reload(self, stored: KeyScopes) -> None:
        """The keys that this server made are these from now on."""
        self._scopes = {**self._given, **stored}

    def owner(self, authorization: str | None, scope: str | None = None) -> str:
        """Who this is, from "Key ..." or "Bearer ..."; a token is good where its scope is. Raises Unauthorized."""
        if self.allows_anonymous:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() not in ("key", "bearer"):
            raise Unauthorized
        given = _hash(key.strip(), self._pepper)
        # Every hash is compared, so that the time taken says nothing.
        matches = [known for known in self._scopes if hmac.compare_digest(known, given)]
        if matches:
            return matches[0][:32]
        if scope is None or scheme.lower() != "bearer":
            raise Unauthorized
        return self.owner_of_token(key.strip(), scope)

    def require_operator(self, authorization: str | None) -> None:
        """Let the operator pass. Raises Unauthorized, and Forbidden for a key that is a client's alone."""
        owner = self.owner(authorization)
        operators = [known[:32] for known, scope in self._scopes.items() if scope == KeyScope.OPERATOR]
        # Where nobody was made the operator, the only key of the settings is. Keys made here were given a scope, and
        # one of a client must not become the operator's because that was revoked.
        lone = [known[:32] for known in self._given] if len(self._given) == 1 else []
        if not self.allows_anonymous and owner not in (operators or lone):
            raise Forbidden(
                "This key is a client's; --operator-keys, or `keys add --scope operator`, make those that may see this"
            )

    def issue(self, owner: str, scope: str, seconds: float) -> str:
        """A token for this owner and scope."""
        claims = {"sub": owner, "scope": scope, "exp": int(time.time() + seconds)}
        return jwt.encode(claims, self._secret, _ALGORITHM)

    def is_active(self, owner: str) -> bool:
        """Whether this owner's key is good still: what came in by one that was revoked goes no further."""
        return self.allows_anonymous or any(known[:32] == owner for known in self._scopes)

    def owner_of_token(self, token: str, scope: str) -> str:
        """Who the token was issued to.

        Raises Unauthorized for another scope, a late token, a forged one, or one whose key was revoked.
        """
        if self.allows_anonymous:
            return ANONYMOUS
        try:
            claims = jwt.decode(token, self._secret, [_ALGORITHM], options={"require": ["exp", "sub", "scope"]})
        except jwt.InvalidTokenError:
            raise Unauthorized from None
        owner = str(claims["sub"])
        if scope not in claims["scope"].split(" ") or not self.is_active(owner):
            raise Unauthorized
        return owner


def pepper(database: Database) -> bytes:
    """What keys are hashed with: without it, who is told an owner, as webhook receivers are, cannot guess the key."""
    with database.transaction() as connection:
        connection.execute("INSERT OR IGNORE INTO secrets VALUES ('pepper', ?)", (secrets.token_bytes(32),))
        (value,) = connection.execute("SELECT value FROM secrets WHERE name = 'pepper'").fetchone()
    return bytes(value)


def load_key_scopes(database: Database, *, with_first: bool = True) -> dict[str, KeyScope]:
    """The keys made by this server; `with_first` also the one it made by itself at its first start."""
    rows = database.read("SELECT hash, scope FROM keys WHERE name <> '' OR ?", with_first)
    return {row["hash"]: KeyScope(row["scope"]) for row in rows}


def add_key(database: Database, name: str, scope: KeyScope) -> str:
    """Make a key, keep its hash, and return it: the only time it can be seen. The first one has no name.

    Raises ValueError when the name is taken.
    """
    key = f"{secrets.token_hex(8)}:{secrets.token_hex(16)}"
    hashed = _hash(key, pepper(database))
    with database.transaction() as connection:
        if name and connection.execute("SELECT 1 FROM keys WHERE name = ?", (name,)).fetchone():
            raise ValueError(f"There is a key named {name} already")
        connection.execute(
            "INSERT INTO keys (hash, owner, created_at, name, scope) VALUES (?, ?, ?, ?, ?)",
            (hashed, hashed[:32], time.time(), name, scope),
        )
    return key


def list_keys(database: Database) -> list[dict[str, Any]]:
    """Name, scope, time of making, and the owner as logs and the operator's view tell it; never the key."""
    rows = database.read("SELECT name, scope, created_at, substr(owner, 1, 9) AS owner FROM keys ORDER BY created_at")
    return [dict(row) for row in rows]


def revoke_key(database: Database, name: str) -> None:
    """Forget a key by its name or the beginning of its owner. Raises ValueError when none or several fit."""
    with database.transaction() as connection:
        found = connection.execute(
            "SELECT hash FROM keys WHERE name = ?1 OR (length(?1) >= 9 AND substr(owner, 1, length(?1)) = ?1)", (name,)
        ).fetchall()
        if len(found) != 1:
            raise ValueError(f"There is no key {name}" if not found else f"Several keys begin with {name}")
        connection.execute("DELETE FROM keys WHERE hash = ?", (found[0]["hash"],))


def _hash(key: str, pepper: bytes) -> str:
    return hmac.digest(pepper, key.encode(), hashlib.sha256).hex()
