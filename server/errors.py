"""Everything that can go wrong, as one tree.

ServerError
├── InvalidInput            422  the body's fields, in pydantic's words
├── Unauthorized            401
├── Forbidden               403
├── NotFound                404  unknown, or another key's
├── MethodNotAllowed        405
├── StillInProgress         400  the result was asked for too early
├── AlreadyCompleted        400  cancelled too late
├── BodyTooLarge            413
├── UnsatisfiableRange      416  a Range that a file does not have
├── MisdirectedRequest             421  a Host that is not ours
├── QueueFull               429
├── DiskFull                507
│   └── DiskFails           507  read-only, or broken
└── RequestError                 fal's "request errors": with error_type in body and header
    ├── BadRequest          400  bad_request
    ├── ClientCancelled     499  client_cancelled
    ├── ClientDisconnected  499  client_disconnected
    ├── StartTimeout        504  request_timeout
    └── InternalError       500  internal_error
"""

from collections.abc import Sequence
from typing import Any, ClassVar


class ServerError(Exception):
    """An error a client is told of. Status and shapes: fal's protocol, section 3."""

    status: ClassVar[int] = 500
    headers: ClassVar[dict[str, str]] = {}
    message: ClassVar[str] = "Internal Server Error"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.message)

    @property
    def error_type(self) -> str | None:
        """fal's word for it, for request errors only."""
        return None

    @property
    def body(self) -> dict[str, Any]:
        """What is sent as JSON; JavaScript's SDKs show `message`, never `detail`."""
        return {"detail": str(self), "message": str(self)}


class InvalidInputFile(Exception):
    """What an address in a request stands for; whoever knows the field makes an InvalidInput of it.

    `type` and `ctx` are in the words of fal's documented errors.
    """

    def __init__(self, error_type: str, message: str, **ctx: Any) -> None:
        super().__init__(message)
        self.type, self.ctx = error_type, ctx


class InvalidInput(ServerError):
    """The request's fields are wrong; `detail` lists {loc, msg, type, input, ctx}."""

    status = 422
    # fal bills nothing for these.
    headers: ClassVar[dict[str, str]] = {"x-fal-billable-units": "0"}

    def __init__(self, detail: Sequence[dict[str, Any]]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in detail))
        self.detail = list(detail)

    @property
    def body(self) -> dict[str, Any]:
        """The list, and the same as one line."""
        return {"detail": self.detail, "message": str(self)}


class Unauthorized(ServerError):
    """No key, or a wrong one."""

    status = 401
    message = (
        'This server wants a key it knows: send "Authorization: Key ..." with one of --keys, its FAL_KEY, '
        "or one that `flux-server keys add` made"
    )


class Forbidden(ServerError):
    """A web page of a foreign origin, or a client where only the operator may look."""

    status = 403


class NotFound(ServerError):
    """There is no such thing for this caller."""

    status = 404
    message = "Request not found"


class MethodNotAllowed(ServerError):
    """The path is there, the verb is not."""

    status = 405
    message = "Method Not Allowed"


class StillInProgress(ServerError):
    """Never 409, 408 or 429 here: fal-client repeats those."""

    status = 400
    message = "Request is still in progress"


class AlreadyCompleted(ServerError):
    """Cancelled too late. Not 409, which fal-client repeats."""

    status = 400
    message = "The request is completed already and cannot be cancelled"


class BodyTooLarge(ServerError):
    """More bytes than the operator allows."""

    status = 413


class UnsatisfiableRange(ServerError):
    """A Range that the file does not have, or that cannot be understood."""

    status = 416
    message = "The file has no such range"


class MisdirectedRequest(ServerError):
    """The Host header names somebody else: refused, because of DNS rebinding."""

    status = 421


class QueueFull(ServerError):
    """429 rather than 503: a 503 is repeated at once and without end by some clients."""

    status = 429
    headers: ClassVar[dict[str, str]] = {"retry-after": "5", "x-fal-needs-retry": "1"}
    message = "The queue is full; try again later"


class TooManyRequests(ServerError):
    """One key asks for more than its share; `retry_after` in seconds. With `closes` the connection ends, too."""

    status = 429

    def __init__(self, message: str, retry_after: int = 5, *, closes: bool = False) -> None:
        super().__init__(message)
        self.headers = {"retry-after": str(retry_after), "x-fal-needs-retry": "1"}  # type: ignore[misc]
        if closes:
            self.headers["connection"] = "close"


class DiskFull(ServerError):
    """Nothing was accepted; what was accepted before is safe."""

    status = 507
    message = "The disk of the server is full"


class DiskFails(DiskFull):
    """It cannot be written to, for whatever reason; all the same is true."""

    message = "The disk of the server cannot be written to"


class RequestError(ServerError):
    """fal's request errors carry a type of their own in body and header."""

    type: ClassVar[str] = "internal_error"

    @property
    def error_type(self) -> str:
        """One of fal's documented error types."""
        return self.type

    @property
    def body(self) -> dict[str, Any]:
        """Text and type."""
        return {**super().body, "error_type": self.type}


class BadRequest(RequestError):
    """A header or parameter that cannot be understood."""

    status = 400
    type = "bad_request"


class ClientCancelled(RequestError):
    """The client asked for it."""

    status = 499
    type = "client_cancelled"
    message = "Request cancelled by the client."


class ClientDisconnected(RequestError):
    """The client of a run or stream left."""

    status = 499
    type = "client_disconnected"
    message = "The client closed the connection before the request was done."


class StartTimeout(RequestError):
    """The start deadline passed while the request waited."""

    status = 504
    type = "request_timeout"
    headers: ClassVar[dict[str, str]] = {"x-fal-request-timeout-type": "user"}
    message = "The request did not start before its deadline."


class InternalError(RequestError):
    """The server's own fault."""

    status = 500
    type = "internal_error"


#: Headers that are replayed with a stored error, by its type.
HEADERS_BY_TYPE = {StartTimeout.type: StartTimeout.headers}


def not_offered(url: str) -> NotFound:
    """The error for a request that fal may answer, and that must not reach fal."""
    return NotFound(f"{url} is not offered by this server")
