"""Tell the client's URL that its request is done: due rows, retries, signatures."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import httpx
from pydantic_core import from_json, to_json

from server.database import Database
from server.fetch import ForbiddenURL, Guard
from server.metrics import Metrics
from server.notifier import WEBHOOKS, Notifier
from server.signing import Signer

log = logging.getLogger(__name__)

#: Seconds a receiver has to answer.
TIMEOUT = 15.0
#: Seconds to wait before each of the ten retries: within two hours, as fal does.
DELAYS = (5, 15, 30, 60, 120, 300, 600, 1200, 1800, 2700)
#: How many receivers are spoken to at once.
CONCURRENCY = 32
_LONGEST_WAIT = 60.0
#: What is due later than any retry can be was put there by a wrong clock: it is due now. A minute more, because clocks
#: are set back by a little all the time.
_FARTHEST = DELAYS[-1] + 60.0
_DUE = """
    SELECT request_id, url, attempt FROM deliveries WHERE due_at <= ? OR due_at > ? ORDER BY due_at LIMIT ?
"""


class Webhooks:
    """Delivers from rows, so that what is due survives a restart. At least once; 2xx alone is success."""

    def __init__(
        self,
        database: Database,
        notifier: Notifier,
        guard: Guard,
        signer: Signer,
        clock: Callable[[], float] = time.time,
        metrics: Metrics | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._database = database
        self._signer = signer
        self._notifier = notifier
        self._guard = guard
        self._clock = clock
        self._monotonic = monotonic
        self._under_way: dict[str, asyncio.Task[None]] = {}
        #: Deliveries whose outcome could not be written down, and when to try again by the monotonic clock.
        self._put_off: dict[str, float] = {}

    async def run(self) -> None:
        """Deliver what falls due, until cancelled."""
        with self._notifier.listen(WEBHOOKS) as bell:
            while True:
                bell.clear()
                wait = await self.turn()
                # Not wait_for, which in Python 3.11 can swallow the cancellation that stops this loop.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await bell.wait()

    async def turn(self) -> float:
        """Begin the deliveries that are due; returns the seconds until the next."""
        now, moment = self._clock(), self._monotonic()
        rows = await asyncio.to_thread(self._database.read, _DUE, now, now + _FARTHEST, CONCURRENCY * 2)
        for row in rows:
            if self._put_off.get(row["request_id"], moment) > moment:
                continue
            if row["request_id"] not in self._under_way and len(self._under_way) < CONCURRENCY:
                task = asyncio.create_task(self._deliver(row["request_id"], row["url"], row["attempt"]))
                self._under_way[row["request_id"]] = task
        return await asyncio.to_thread(self._wait, now)

    def _wait(self, now: float) -> float:
        """Seconds until the next falls due."""
        ((due_at,),) = self._database.read("SELECT min(due_at) FROM deliveries WHERE due_at > ?", now)
        return _LONGEST_WAIT if due_at is None else min(_LONGEST_WAIT, float(due_at) - now)

    async def _deliver(self, request_id: str, url: str, attempt: int) -> None:
        try:
            error = await self._send(request_id, url)
            await asyncio.to_thread(self._record, request_id, attempt, error)
            self._put_off.pop(request_id, None)
        except Exception:
            # Due still, by its row; not at once, or the receiver would be flooded while the disk is full.
            self._put_off[request_id] = self._monotonic() + _LONGEST_WAIT
            log.exception("a webhook's attempt could not be recorded", extra={"request_id": request_id})
        finally:
            del self._under_way[request_id]
        self._notifier.ring(WEBHOOKS)

    async def _send(self, request_id: str, url: str) -> str | None:
        """One attempt; None on success, else what went wrong."""
        owner, payload = await asyncio.to_thread(self._payload, request_id)
        body = to_json(payload)
        headers = {
            "content-type": "application/json",
            "user-agent": "flux-server",
            **await asyncio.to_thread(self._signer.headers, request_id, owner, body),
        }
        try:
            async with asyncio.timeout(TIMEOUT):
                status = await self._guard.post(url, body, headers, TIMEOUT)
        except TimeoutError:
            return f"no answer within {TIMEOUT:.0f} s"
        except (ForbiddenURL, httpx.HTTPError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return None if 200 <= status < 300 else f"answered {status}"

    def _payload(self, request_id: str) -> tuple[str, dict[str, Any]]:
        (row,) = self._database.read("SELECT owner, status, output FROM jobs WHERE request_id = ?", request_id)
        body: dict[str, Any] = {"request_id": request_id, "gateway_request_id": request_id}
        if row["status"] == 200:
            return row["owner"], {**body, "status": "OK", "payload": from_json(row["output"])}
        error = f"Invalid status code: {row['status']}"
        return row["owner"], {**body, "status": "ERROR", "error": error, "payload": from_json(row["output"])}

    def _record(self, request_id: str, before: int, error: str | None) -> None:
        now, attempt = self._clock(), before + 1
        is_over = error is None or attempt > len(DELAYS)
        due_at = None if is_over else now + DELAYS[before]
        with self._database.transaction() as connection:
            # What the operator sends again meanwhile begins at its first attempt anew, and stays due.
            connection.execute(
                "UPDATE deliveries SET attempt = ?, due_at = ?, delivered_at = ?, error = ?"
                " WHERE request_id = ? AND attempt = ?",
                (attempt, due_at, now if error is None else None, error, request_id, before),
            )
        self._metrics.webhooks.labels("failed" if error else "delivered").inc()
        if error is not None:
            log.warning("webhook, attempt %d: %s", attempt, error, extra={"request_id": request_id})
