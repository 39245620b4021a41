"""Keys: who is calling. Only hashes are kept."""

import hashlib
import hmac
import secrets
import time

from server.database import Database
from server.errors import Unauthorized

#: The owner of everything when there is no key.
EVERYBODY = "everybody"


class Keys:
    """The keys clients may send; none at all means that everybody is one owner."""

    def __init__(self, keys: tuple[str, ...], hashes: tuple[str, ...] = ()) -> None:
        self._hashes = (*(_hash(key) for key in keys), *hashes)

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return not self._hashes

    def owner(self, authorization: str | None) -> str:
        """Who this is, from "Key ..." or "Bearer ...". Raises Unauthorized."""
        if self.is_open:
            return EVERYBODY
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() not in ("key", "bearer"):
            raise Unauthorized
        given = _hash(key.strip())
        # Every hash is compared, so that the time taken says nothing.
        matches = [known for known in self._hashes if hmac.compare_digest(known, given)]
        if not matches:
            raise Unauthorized
        return matches[0][:32]


def stored_hashes(database: Database) -> tuple[str, ...]:
    """Hashes of the keys made by this server."""
    return tuple(row["hash"] for row in database.read("SELECT hash FROM keys"))


def generate(database: Database) -> str:
    """Make a key, keep its hash, and return it: the only time it can be seen."""
    key = f"{secrets.token_hex(8)}:{secrets.token_hex(16)}"
    with database.transaction() as connection:
        connection.execute("INSERT INTO keys VALUES (?, ?, ?)", (_hash(key), _hash(key)[:32], time.time()))
    return key


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
