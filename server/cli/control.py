"""The operator's actions on requests, keys, webhooks and backups, in a running server or without one."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server import auth
from server.auth import KeyScope
from server.queue.jobs import State
from server.storage import backup
from server.storage.database import Database
from server.webhooks import delivery

if TYPE_CHECKING:
    from server.queue.queue import Queue

log = logging.getLogger(__name__)


def _nothing() -> None:
    """Do nothing, because no server is running."""


class Control:
    """The operator's actions on one data directory. Arguments and results are plain values, as in JSON.

    The actions wait for the disk. They raise ValueError with a message for the operator, DiskFull and CorruptDatabase.
    """

    def __init__(
        self,
        database: Database,
        data_dir: Path,
        *,
        on_keys_changed: Callable[[], None] = _nothing,
        on_webhook_redelivered: Callable[[], None] = _nothing,
        is_open: Callable[[], bool] | None = None,
        queue: "Queue | None" = None,
    ) -> None:
        """Set up the actions. The `on_...` callbacks run after a change.

        `is_open` says whether the running server requires no key, and `queue` is its queue; None means that no server
        is running.
        """
        self._database = database
        self._data_dir = data_dir
        self._on_keys = on_keys_changed
        self._on_webhooks = on_webhook_redelivered
        self._is_open = is_open
        self._queue = queue
        self.commands: dict[str, Callable[..., Any]] = {
            "add_key": self.add_key,
            "list_keys": self.list_keys,
            "is_open": self.is_open,
            "revoke_key": self.revoke_key,
            "list_requests": self.list_requests,
            "cancel_request": self.cancel_request,
            "list_webhooks": self.list_webhooks,
            "redeliver": self.redeliver,
            "back_up": self.back_up,
        }

    def add_key(self, name: str, scope: str) -> str:
        """Create a key and return it; it cannot be read again.

        Raises ValueError for an invalid name or scope, and for a name in use.
        """
        if not name or len(name) > 100 or not name.isprintable():
            raise ValueError("A key's name should have 1 to 100 printable characters")
        if scope not in set(KeyScope):
            raise ValueError(f"A key's scope should be one of {', '.join(KeyScope)}")
        key = auth.add_key(self._database, name, KeyScope(scope))
        self._on_keys()
        log.info("the operator added the key %s with the scope %s", name, scope)
        return key

    def list_keys(self) -> list[dict[str, Any]]:
        """List name, scope, creation time and owner of each key."""
        return auth.list_keys(self._database)

    def is_open(self) -> bool:
        """Return whether the running server requires no key.

        Without a running server, return whether no named key is stored. The next server then requires no key, if only
        this machine can reach it and its settings contain no keys.
        """
        return self._is_open() if self._is_open else not auth.load_key_scopes(self._database, with_first=False)

    def revoke_key(self, name: str) -> None:
        """Revoke a key immediately; its requests and images stay. Raises ValueError unless exactly one key matches."""
        auth.revoke_key(self._database, name)
        self._on_keys()
        log.info("the operator revoked the key %s", name)

    def list_requests(self, *, owner: str = "", limit: int = 100) -> list[dict[str, Any]]:
        """List id, owner, state, endpoint and time of submit of the unfinished requests, oldest first.

        Owners are cut to 9 characters; `owner` selects those that begin with it.
        """
        rows = self._database.read(
            "SELECT request_id, substr(owner, 1, 9) AS owner, state, endpoint, submitted_at FROM jobs"
            " WHERE state <> 'COMPLETED' AND substr(owner, 1, length(?1)) = ?1 ORDER BY sequence LIMIT ?2",
            owner,
            limit,
        )
        return [dict(row) for row in rows]

    def cancel_request(self, request_id: str) -> bool:
        """Cancel a request of any key; return False if it had ended already.

        Raises ValueError if there is no such request, or no server is running.
        """
        if self._queue is None:
            raise ValueError("No server uses this data directory; start it, because only a server cancels requests")
        job = self._queue.get(request_id)
        if job is None:
            raise ValueError(f"There is no request {request_id}; `flux-server requests list` lists the unfinished ones")
        is_unfinished = self._queue.cancel(job) != State.COMPLETED
        if is_unfinished:
            log.info("the operator cancelled the request", extra={"request_id": request_id})
        return is_unfinished

    def list_webhooks(self, *, with_delivered: bool = False, limit: int = 100) -> list[dict[str, Any]]:
        """List webhooks that are waiting or were given up, newest first; `with_delivered` adds the delivered ones."""
        return delivery.list_deliveries(self._database, with_delivered=with_delivered, limit=limit)

    def redeliver(self, request_id: str) -> None:
        """Send a request's webhook again now, with all its retries. Raises ValueError if the request has no webhook."""
        delivery.redeliver(self._database, request_id)
        self._on_webhooks()
        log.info("the operator had the webhook sent again", extra={"request_id": request_id})

    def back_up(self, directory: str) -> int:
        """Copy the data directory to a new one, even while the server runs; return the number of bytes.

        Raises ValueError if the copy fails.
        """
        num_bytes = backup.back_up(self._database, self._data_dir, Path(directory))
        log.info("the operator backed up %.1f MB to %s", num_bytes / 1e6, directory)
        return num_bytes
