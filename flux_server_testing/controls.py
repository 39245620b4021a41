"""The controls of a flux-server in a test: faults for the next requests, and the requests that were made."""

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Literal

#: No proxy: the controls are on this machine, and HTTPS_PROXY may lead to the server's own proxy.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_SECONDS = 60


class ServerError(Exception):
    """A server that does not answer, or that refuses what a test asks; the message says why.

    `status` is the HTTP status, or 0 if there was no answer.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class RecordedRequest:
    """A request that the application made. Requests with an invalid input are not recorded.

    Attributes:
        endpoint: such as fal-ai/flux/dev.
        input: the endpoint's input, with all defaults and the seed.
        mode: run, queue, stream or realtime.
        request_id: None if the request was refused.
        status: IN_QUEUE, IN_PROGRESS, COMPLETED, or REFUSED.
        refused: the HTTP status of a refused request.
        is_cancelled: whether the application, or a fault, cancelled the request.
        error: the message of the error that the request ended with.
        webhook_url: where the result is sent.
        idempotency_key: the header Idempotency-Key.
        priority: normal or low.
        submitted_at: seconds since 1970.
    """

    endpoint: str
    input: dict[str, Any]
    mode: str
    request_id: str | None
    status: str
    refused: int | None
    is_cancelled: bool
    error: str | None
    webhook_url: str | None
    idempotency_key: str | None
    priority: str
    submitted_at: float


@dataclass(frozen=True)
class Hold:
    """A hold on one or more requests, which stay IN_QUEUE until it is released."""

    _server: "FalServer"
    _id: str

    def release(self) -> None:
        """Let the held requests run. A request that has not come yet is not held any more."""
        self._server.call("POST", "/testing/release", {"id": self._id})


class FalServer:
    """A running server, as the fixture `fal_server` gives it. Each fault is for the next request without one."""

    def __init__(self, url: str, key: str = "") -> None:
        """Control the requests with this key, or all requests if the key is empty."""
        self.url = url
        self._key = key

    @property
    def requests(self) -> list[RecordedRequest]:
        """The requests that the application has made since the start of the test, the oldest first."""
        known = RecordedRequest.__dataclass_fields__
        listed = self.call("GET", "/testing/requests")["requests"]
        return [RecordedRequest(**{name: item[name] for name in known}) for item in listed]

    def wait_for_requests(self, number: int = 1, seconds: float = 30) -> list[RecordedRequest]:
        """Wait until the application, in another thread or process, has made so many requests; return the requests.

        Raises TimeoutError.
        """
        deadline = time.monotonic() + seconds
        while len(requests := self.requests) < number:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(requests)} of {number} requests were made within {seconds:g} seconds")
            time.sleep(0.02)
        return requests

    def fail_next(
        self,
        status: int,
        *,
        message: str = "",
        field: str = "prompt",
        retry_after: int | None = None,
        at: Literal["submission", "result"] | None = None,
        times: int = 1,
        endpoint: str = "",
    ) -> None:
        """Make the next request fail with this HTTP status, in fal's shape.

        By default 422 and 500 and above come with the result, as at fal, and all others at the submission. A 422 names
        the `field`. `retry_after` is in seconds. `times` requests in a row fail; `endpoint` selects requests.
        """
        self._plan(times, endpoint, status=status, message=message, field=field, retry_after=retry_after, at=at)

    def time_out_next(self, *, times: int = 1, endpoint: str = "") -> None:
        """Make the next request fail with 504, as if its start deadline had passed."""
        self._plan(times, endpoint, status=504)

    def cancel_next(self, *, times: int = 1, endpoint: str = "") -> None:
        """Cancel the next request, as an operator can. It ends with 499."""
        self._plan(times, endpoint, status=499)

    def delay_next(self, seconds: float, *, times: int = 1, endpoint: str = "") -> None:
        """Let the next request stay IN_PROGRESS for so long before it is generated."""
        self._plan(times, endpoint, delay=seconds)

    def hold_next(self, *, queue_position: int | None = None, times: int = 1, endpoint: str = "") -> Hold:
        """Let the next request stay IN_QUEUE until the returned hold is released, at this position if it is given."""
        return Hold(self, self._plan(times, endpoint, hold=True, queue_position=queue_position))

    def flag_next(self, *, times: int = 1, endpoint: str = "") -> None:
        """Let the safety checker flag the next request's images: they are black, and has_nsfw_concepts says true.

        A request that turns the safety checker off is not flagged.
        """
        self._plan(times, endpoint, flag=True)

    def webhook_next(self, *, delay: float = 0, copies: int = 1, times: int = 1, endpoint: str = "") -> None:
        """Send the next request's webhook so many seconds after the end of the request, or more than once."""
        self._plan(times, endpoint, webhook_delay=delay, webhook_copies=copies)

    def plan_next(self, **fault: Any) -> str:
        """Plan a fault with the fields of POST /testing/next, such as `delay=1, status=500`; return its id."""
        planned: str = self.call("POST", "/testing/next", fault)["id"]
        return planned

    def reset(self) -> None:
        """Delete all faults and records, and cancel unfinished requests. The plugin does so before each test."""
        self.call("POST", "/testing/reset")

    def variables(self) -> dict[str, str]:
        """Return the environment variables that point fal's and OpenAI's clients at this server."""
        found: dict[str, str] = self.call("GET", "/testing/environment")["variables"]
        return found

    def certificates(self) -> bytes:
        """Return the certificates of the public authorities and of the server, as PEM."""
        return self._send("GET", "/testing/certificates", None)

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Call one of the server's controls; return its JSON. Raises ServerError."""
        return json.loads(self._send(method, path, body))

    def _send(self, method: str, path: str, body: object) -> bytes:
        headers = {"authorization": f"Key {self._key}"} if self._key else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)  # noqa: S310  http
        try:
            with OPENER.open(request, timeout=_SECONDS) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as error:
            raise ServerError(f"flux-server refuses {method} {path}: {_message(error)}", error.code) from None
        except (urllib.error.URLError, OSError) as error:
            raise ServerError(f"flux-server at {self.url} does not answer: {error}") from None

    def _plan(self, times: int, endpoint: str, **fault: object) -> str:
        chosen = {name: value for name, value in fault.items() if value is not None}
        return self.plan_next(times=times, endpoint=endpoint, **chosen)


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {text[:200]}"
