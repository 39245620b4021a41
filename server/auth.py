"""Keys and tokens: who is calling. Only hashes of keys are kept."""

import hashlib
import hmac
import secrets
import time

import jwt

from server.database import Database
from server.errors import Forbidden, Unauthorized

#: The owner of everything when there is no key.
EVERYBODY = "everybody"
_ALGORITHM = "HS256"


class Keys:
    """The keys clients may send; none at all means that everybody is one owner.

    Tokens stand for a key for a while and for one purpose; their secret dies with the process.
    """

    def __init__(
        self,
        keys: tuple[str, ...],
        hashes: tuple[str, ...] = (),
        pepper: bytes = b"",
        operators: tuple[str, ...] = (),
    ) -> None:
        self._pepper = pepper
        own = tuple(_hash(key, pepper) for key in operators)
        self._hashes = tuple(dict.fromkeys((*(_hash(key, pepper) for key in keys), *hashes, *own)))
        self._operators = own or (self._hashes if len(self._hashes) == 1 else ())
        self._secret = secrets.token_bytes(32)

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return not self._hashes

    def owner(self, authorization: str | None, scope: str | None = None) -> str:
        """Who this is, from "Key ..." or "Bearer ..."; a token is good where its scope is. Raises Unauthorized."""
        if self.is_open:
            return EVERYBODY
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() not in ("key", "bearer"):
            raise Unauthorized
        given = _hash(key.strip(), self._pepper)
        # Every hash is compared, so that the time taken says nothing.
        matches = [known for known in self._hashes if hmac.compare_digest(known, given)]
        if matches:
            return matches[0][:32]
        if scope is None or scheme.lower() != "bearer":
            raise Unauthorized
        return self.owner_of_token(key.strip(), scope)

    def operator(self, authorization: str | None) -> None:
        """Let the operator pass. Raises Unauthorized, and Forbidden for a key that is a client's alone."""
        owner = self.owner(authorization)
        if not self.is_open and owner not in {known[:32] for known in self._operators}:
            raise Forbidden("This key is a client's; --operator-keys names those that may see this")

    def issue(self, owner: str, scope: str, seconds: float) -> str:
        """A token for this owner and scope."""
        claims = {"sub": owner, "scope": scope, "exp": int(time.time() + seconds)}
        return jwt.encode(claims, self._secret, _ALGORITHM)

    def owner_of_token(self, token: str, scope: str) -> str:
        """Who the token was issued to. Raises Unauthorized for another scope, a late token, or a forged one."""
        if self.is_open:
            return EVERYBODY
        try:
            claims = jwt.decode(token, self._secret, [_ALGORITHM], options={"require": ["exp", "sub", "scope"]})
        except jwt.InvalidTokenError:
            raise Unauthorized from None
        if scope not in claims["scope"].split(" "):
            raise Unauthorized
        return str(claims["sub"])


def pepper(database: Database) -> bytes:
    """What keys are hashed with: without it, who is told an owner, as webhook receivers are, cannot guess the key."""
    with database.transaction() as connection:
        connection.execute("INSERT OR IGNORE INTO secrets VALUES ('pepper', ?)", (secrets.token_bytes(32),))
        (value,) = connection.execute("SELECT value FROM secrets WHERE name = 'pepper'").fetchone()
    return bytes(value)


def stored_hashes(database: Database) -> tuple[str, ...]:
    """Hashes of the keys made by this server."""
    return tuple(row["hash"] for row in database.read("SELECT hash FROM keys"))


def generate(database: Database) -> str:
    """Make a key, keep its hash, and return it: the only time it can be seen."""
    key = f"{secrets.token_hex(8)}:{secrets.token_hex(16)}"
    hashed = _hash(key, pepper(database))
    with database.transaction() as connection:
        connection.execute("INSERT INTO keys VALUES (?, ?, ?)", (hashed, hashed[:32], time.time()))
    return key


def _hash(key: str, pepper: bytes) -> str:
    return hmac.digest(pepper, key.encode(), hashlib.sha256).hex()
