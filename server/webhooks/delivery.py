"""Webhook delivery: results are posted to clients' URLs, with retries and signatures."""

import asyncio
import contextlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
from pydantic_core import from_json, to_json

from server.metrics import Metrics
from server.net.outbound import ForbiddenURL, OutboundClient
from server.queue.notifier import WEBHOOKS, Notifier
from server.storage.database import CorruptDatabase, Database
from server.webhooks.signing import WebhookSigner

log = logging.getLogger(__name__)

#: Seconds that a receiver has to respond.
TIMEOUT = 15.0
#: Seconds to wait before each of the ten retries, all within two hours, as at fal.
DELAYS = (5, 15, 30, 60, 120, 300, 600, 1200, 1800, 2700)
#: How many deliveries run at once. An owner may use at most half of the slots that other owners leave free.
CONCURRENCY = 64
#: How many deliveries of one owner run at once to one receiver.
PER_RECEIVER = 8
#: The longest sleep until deliveries are read again, and the pause after an attempt that could not be recorded.
_LONGEST_WAIT = 60.0
#: The longest pause between two passes, and the pause after a failed pass.
_MAX_PAUSE = 5.0
#: A delivery that is due later than this from now was scheduled while the clock was wrong, so it is sent at once. The
#: extra minute allows for clocks that are set back a little.
_FARTHEST = DELAYS[-1] + 60.0
#: Receivers are counted per owner, so that an owner whose receiver hangs does not delay other owners' webhooks to it.
_SELECT_DUE = """
    WITH passed AS (SELECT value FROM json_each(?)),
    due AS (
        SELECT request_id, url, deliveries.attempt, due_at, owner,
            substr(replace(url, '?', '/'), instr(url, '//') + 2) || '/' AS place
        FROM deliveries JOIN jobs USING (request_id) WHERE due_at > ? AND due_at <= ?
    )
    SELECT request_id, url, attempt, owner, owner || ' ' || substr(place, 1, instr(place, '/') - 1) AS receiver
    FROM due WHERE request_id NOT IN passed AND owner NOT IN passed AND receiver NOT IN passed
    ORDER BY due_at LIMIT ?
"""


class _Slot(NamedTuple):
    """One running delivery."""

    task: asyncio.Task[None]
    owner: str
    receiver: str


_LIST = """
    SELECT deliveries.request_id, url, deliveries.attempt, due_at, delivered_at, deliveries.error
    FROM deliveries JOIN jobs USING (request_id) WHERE delivered_at IS NULL OR ?
    ORDER BY finished_at DESC LIMIT ?
"""


class WebhookSender:
    """A sender of due deliveries. Deliveries are rows of the database, so they survive a restart.

    Each delivery is sent at least once, and again until the receiver responds with a 2xx status or no retry is left.
    """

    def __init__(
        self,
        database: Database,
        notifier: Notifier,
        outbound: OutboundClient,
        signer: WebhookSigner,
        clock: Callable[[], float] = time.time,
        metrics: Metrics | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        copies: Callable[[str], int] = lambda request_id: 1,
    ) -> None:
        """Start without deliveries in flight. `copies` says how often the first attempt for a request is sent."""
        self._metrics = metrics or Metrics()
        self._database = database
        self._signer = signer
        self._notifier = notifier
        self._outbound = outbound
        self._clock = clock
        self._monotonic = monotonic
        self._copies = copies
        self._in_flight: dict[str, _Slot] = {}
        #: By request id of a delivery whose outcome could not be recorded: when to try again, on the monotonic clock.
        self._backoff_until: dict[str, float] = {}

    async def run(self) -> None:
        """Send deliveries as they fall due, until cancelled."""
        with self._notifier.subscribe(WEBHOOKS) as event:
            while True:
                event.clear()
                began = self._monotonic()
                wait = await self._try_send_due()
                # A pass is slow when many deliveries wait for a slow receiver, because each pass reads them all. The
                # pause leaves the database to other work.
                await asyncio.sleep(min(_MAX_PAUSE, 4 * (self._monotonic() - began)))
                # Not `asyncio.wait_for`: in Python 3.11, it can swallow the cancellation that stops this loop.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await event.wait()

    async def _try_send_due(self) -> float:
        try:
            return await self.send_due()
        except CorruptDatabase:
            # `Database.on_corruption` has already stopped the backend, and the server ends with this error.
            return _LONGEST_WAIT
        except Exception:
            log.exception("sending webhooks failed; trying again in %.0f seconds", _MAX_PAUSE)
            return _MAX_PAUSE

    async def send_due(self) -> float:
        """Start the deliveries that are due; return the seconds until the next one, at most a minute."""
        now, moment = self._clock(), self._monotonic()
        self._backoff_until = {request_id: until for request_id, until in self._backoff_until.items() if until > moment}
        await self._begin(-math.inf, now)
        await self._begin(now + _FARTHEST, math.inf)
        return await asyncio.to_thread(self._wait, now)

    async def _begin(self, after: float, until: float) -> None:
        """Start deliveries that are due after `after` and until `until`, as long as there are free slots."""
        while len(self._in_flight) < CONCURRENCY:
            passed = json.dumps([*self._in_flight, *self._backoff_until, *self._saturated()])
            rows = await asyncio.to_thread(self._database.read, _SELECT_DUE, passed, after, until, CONCURRENCY)
            for row in rows:
                if self._saturated().isdisjoint((row["owner"], row["receiver"])):
                    task = asyncio.create_task(self._deliver(row["request_id"], row["url"], row["attempt"]))
                    self._in_flight[row["request_id"]] = _Slot(task, row["owner"], row["receiver"])
            # The first row always has a free slot, so each round starts at least one delivery.
            if len(rows) < CONCURRENCY:
                break

    def _saturated(self) -> set[str]:
        """Return the owners and receivers for which no further delivery may start."""
        owners = Counter(slot.owner for slot in self._in_flight.values())
        receivers = Counter(slot.receiver for slot in self._in_flight.values())
        free = CONCURRENCY - len(self._in_flight)
        return {name for name, number in owners.items() if number >= free} | {
            name for name, number in receivers.items() if number >= PER_RECEIVER
        }

    def _wait(self, now: float) -> float:
        """Return the seconds until the next delivery is due, at most _LONGEST_WAIT."""
        ((due_at,),) = self._database.read("SELECT min(due_at) FROM deliveries WHERE due_at > ?", now)
        return _LONGEST_WAIT if due_at is None else min(_LONGEST_WAIT, float(due_at) - now)

    async def _deliver(self, request_id: str, url: str, attempt: int) -> None:
        try:
            error, sent = await self._send(request_id, url), 1
            # Count the copies again before each, because a test may end meanwhile.
            while attempt == 0 and sent < self._copies(request_id):
                # The webhook is delivered if the receiver accepts one of the copies.
                error, sent = await self._send(request_id, url) and error, sent + 1
            await asyncio.to_thread(self._record, request_id, attempt, error)
            self._backoff_until.pop(request_id, None)
        except Exception:
            # The row still says that the delivery is due. The pause keeps the server from sending the webhook again and
            # again while the disk is full.
            self._backoff_until[request_id] = self._monotonic() + _LONGEST_WAIT
            log.exception(
                "a webhook could not be sent, or its attempt could not be recorded; trying again in %.0f seconds",
                _LONGEST_WAIT,
                extra={"request_id": request_id},
            )
        finally:
            del self._in_flight[request_id]
        self._notifier.notify(WEBHOOKS)

    async def _send(self, request_id: str, url: str) -> str | None:
        """Make one attempt; return None on success, otherwise the error as text."""
        owner, payload = await asyncio.to_thread(self._payload, request_id)
        body = to_json(payload)
        headers = {
            "content-type": "application/json",
            "user-agent": "flux-server",
            **await asyncio.to_thread(self._signer.headers, request_id, owner, body),
        }
        try:
            async with asyncio.timeout(TIMEOUT):
                status = await self._outbound.post(url, body, headers, TIMEOUT)
        except TimeoutError:
            return f"no response within {TIMEOUT:.0f} s"
        except (ForbiddenURL, httpx.HTTPError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return None if 200 <= status < 300 else f"the receiver answered {status}"

    def _payload(self, request_id: str) -> tuple[str, dict[str, Any]]:
        (row,) = self._database.read("SELECT owner, status, output FROM jobs WHERE request_id = ?", request_id)
        body: dict[str, Any] = {"request_id": request_id, "gateway_request_id": request_id}
        if row["status"] == 200:
            body["status"] = "OK"
        else:
            body |= {"status": "ERROR", "error": f"Invalid status code: {row['status']}"}
        try:
            body["payload"] = from_json(row["output"])
        except ValueError:
            # fal's format for a payload that cannot be sent.
            body |= {"payload": None, "payload_error": "The stored response of this request is damaged."}
        return row["owner"], body

    def _record(self, request_id: str, before: int, error: str | None) -> None:
        now, attempt = self._clock(), before + 1
        is_over = error is None or attempt > len(DELAYS)
        due_at = None if is_over else now + DELAYS[before]
        with self._database.transaction() as connection:
            # If the operator redelivers meanwhile, the row's attempt is 0: no row matches, and the delivery stays due.
            connection.execute(
                "UPDATE deliveries SET attempt = ?, due_at = ?, delivered_at = ?, error = ?"
                " WHERE request_id = ? AND attempt = ?",
                (attempt, due_at, now if error is None else None, error, request_id, before),
            )
        self._metrics.webhooks.labels("failed" if error else "delivered").inc()
        if error is not None:
            log.warning("webhook attempt %d failed: %s", attempt, error, extra={"request_id": request_id})


def list_deliveries(database: Database, *, with_delivered: bool, limit: int) -> list[dict[str, Any]]:
    """List webhooks that are waiting or were given up, newest first; with `with_delivered`, the delivered ones too."""
    return [dict(row) for row in database.read(_LIST, with_delivered, limit)]


def redeliver(database: Database, request_id: str) -> None:
    """Make a webhook due now with all its retries, even if it was delivered or given up.

    Raises ValueError if the request has no webhook.
    """
    with database.transaction() as connection:
        changed = connection.execute(
            "UPDATE deliveries SET attempt = 0, due_at = ?, delivered_at = NULL, error = NULL WHERE request_id = ?",
            (time.time(), request_id),
        ).rowcount
    if not changed:
        raise ValueError(f"There is no webhook of request {request_id}")
