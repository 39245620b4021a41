"""All errors that a client can receive, as one tree.

ServerError
├── InvalidInput            422  invalid fields or parameters, with pydantic's messages
├── Unauthorized            401
│   └── UnauthorizedUser    401  the same for AUTOMATIC1111's API, which also takes a user and a password
├── Forbidden               403
├── NotFound                404  unknown, or owned by another key
│   └── UnknownModel        404  a model name of another API that no endpoint serves
├── MethodNotAllowed        405
├── StillInProgress         400  the request has not finished yet
├── AlreadyCompleted        400  a finished request cannot be cancelled
├── BodyTooLarge            413
├── UnsatisfiableRange      416  a Range outside the file
├── MisdirectedRequest      421  a Host that is not this server's
├── QueueFull               429  too many waiting requests, unfinished uploads or input files
├── TooManyRequests         429  one key exceeds its limit or share
├── DiskFull                507
│   └── DiskFails           507  read-only or broken
└── RequestError                 fal's "request errors", with error_type in body and header
    ├── BadRequest          400  bad_request
    ├── ClientCancelled     499  client_cancelled
    ├── ClientDisconnected  499  client_disconnected
    ├── StartTimeout        504  request_timeout
    └── InternalError       500  internal_error
"""

from collections.abc import Sequence
from typing import Any, ClassVar


class ServerError(Exception):
    """The base class of errors that are sent to clients, with fal's statuses and shapes."""

    status: ClassVar[int] = 500
    headers: ClassVar[dict[str, str]] = {}
    message: ClassVar[str] = "Internal Server Error"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.message)

    @property
    def error_type(self) -> str | None:
        """fal's error type; None for all but request errors."""
        return None

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body. `message` repeats `detail`, because fal's JavaScript SDKs show only `message`."""
        return {"detail": str(self), "message": str(self)}


class InvalidInputFile(Exception):
    """An unusable file that a request refers to. The caller, which knows the field, raises InvalidInput instead.

    `type` and `ctx` have the form of fal's documented errors.
    """

    def __init__(self, error_type: str, message: str, **ctx: Any) -> None:
        super().__init__(message)
        self.type, self.ctx = error_type, ctx


class InvalidInput(ServerError):
    """Invalid fields or parameters of a request. `detail` has one entry for each: {loc, msg, type, input, ctx}."""

    status = 422
    # As at fal, invalid requests cost nothing.
    headers: ClassVar[dict[str, str]] = {"x-fal-billable-units": "0"}

    def __init__(self, detail: Sequence[dict[str, Any]]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in detail))
        self.detail = list(detail)

    @classmethod
    def of(
        cls, error_type: str, loc: Sequence[str | int], message: str, value: object = "", **ctx: Any
    ) -> "InvalidInput":
        """Build the error for one field. `loc` is its path, such as ("body", "seed"), and `value` what was sent."""
        entry = {"type": error_type, "loc": list(loc), "msg": message, "input": value}
        return cls([{**entry, "ctx": ctx} if ctx else entry])

    @property
    def body(self) -> dict[str, Any]:
        """The list of errors as `detail`, and the same errors in one line as `message`."""
        return {"detail": self.detail, "message": str(self)}


class Unauthorized(ServerError):
    """A missing, wrong or revoked key, or an invalid token."""

    status = 401
    # HTTP requires a 401 to name the schemes that are accepted (RFC 9110, section 11.6.1).
    headers: ClassVar[dict[str, str]] = {"www-authenticate": "Bearer, Key"}
    message = (
        'This server requires a valid key: send "Authorization: Key ..." with a key from --keys, --operator-keys '
        "or FAL_KEY, from `flux-server keys add`, or from the server's first start"
    )


class UnauthorizedUser(Unauthorized):
    """A missing or wrong key in AUTOMATIC1111's API, where a key can also be a user and a password."""

    headers: ClassVar[dict[str, str]] = {"www-authenticate": 'Basic realm="flux-server", Bearer, Key'}
    message = (
        f"{Unauthorized.message}. AUTOMATIC1111's clients send a key ID:SECRET as the user ID with the password SECRET"
    )


class Forbidden(ServerError):
    """A request from a web page that may not use this server, or a client's request for the operator's data."""

    status = 403


class NotFound(ServerError):
    """A request, file or path that does not exist for this caller."""

    status = 404
    message = "Request not found"


class UnknownModel(NotFound):
    """A model name of OpenAI's or AUTOMATIC1111's API that stands for no endpoint of this server."""


class MethodNotAllowed(ServerError):
    """A method that the path does not support."""

    status = 405
    message = "Method Not Allowed"


class StillInProgress(ServerError):
    """A request that has not finished yet, so it has no result and cannot be deleted.

    The status is 400, because fal-client retries 408, 409 and 429.
    """

    status = 400
    message = "Request is still in progress"


class AlreadyCompleted(ServerError):
    """A cancellation of a finished request. The status is 400, because fal-client retries 409."""

    status = 400
    message = "The request is already completed and cannot be cancelled"


class BodyTooLarge(ServerError):
    """A request body or upload with more bytes than the operator allows."""

    status = 413


class UnsatisfiableRange(ServerError):
    """A Range that is malformed or lies outside the file."""

    status = 416
    message = "The Range header is malformed or lies outside the file"


class MisdirectedRequest(ServerError):
    """A Host header with a name that is not this server's, which is refused to prevent DNS rebinding."""

    status = 421


class QueueFull(ServerError):
    """A full queue, or one key's limit on unfinished uploads or on disk space for input files.

    The status is 429, because some clients retry 503 immediately and forever.
    """

    status = 429
    headers: ClassVar[dict[str, str]] = {"retry-after": "5", "x-fal-needs-retry": "1"}
    message = "The queue is full: --max-queue-length or fal_max_queue_length allows no more; try again later"


class TooManyRequests(ServerError):
    """A key that exceeds its limit or share. `retry_after` is in seconds; `closes` also closes the connection."""

    status = 429

    def __init__(self, message: str, retry_after: int = 5, *, closes: bool = False) -> None:
        super().__init__(message)
        self.headers = {"retry-after": str(retry_after), "x-fal-needs-retry": "1"}  # type: ignore[misc]
        if closes:
            self.headers["connection"] = "close"


class DiskFull(ServerError):
    """A full disk: the request was not accepted, and requests accepted earlier are safe."""

    status = 507
    message = "The server's disk is full; the operator must free space on it"


class DiskFails(DiskFull):
    """A disk that cannot be written to for another reason; the guarantees of DiskFull hold."""

    @classmethod
    def because(cls, reason: object) -> "DiskFails":
        """Build the error from the system's or SQLite's reason."""
        return cls(f"The server cannot use its disk ({reason}); the operator must repair the disk")


class RequestError(ServerError):
    """The base class of fal's request errors, which have an error type in the body and in x-fal-error-type."""

    type: ClassVar[str] = "internal_error"

    @property
    def error_type(self) -> str:
        """One of fal's documented error types."""
        return self.type

    @property
    def body(self) -> dict[str, Any]:
        """The message and the error type."""
        return {**super().body, "error_type": self.type}


class BadRequest(RequestError):
    """An invalid header, parameter or body."""

    status = 400
    type = "bad_request"


class ClientCancelled(RequestError):
    """A request that its client cancelled, or the operator, for which fal has no error of its own."""

    status = 499
    type = "client_cancelled"
    message = "Request cancelled by the client."


class ClientDisconnected(RequestError):
    """A run, stream or realtime request whose client disconnected."""

    status = 499
    type = "client_disconnected"
    message = "The client closed the connection before the request was done."


class StartTimeout(RequestError):
    """A request whose start deadline passed while it waited."""

    status = 504
    type = "request_timeout"
    headers: ClassVar[dict[str, str]] = {"x-fal-request-timeout-type": "user"}
    message = "The request did not start before its deadline."


class InternalError(RequestError):
    """A failure of the server itself."""

    status = 500
    type = "internal_error"


#: Additional response headers of stored errors, by error type.
HEADERS_BY_TYPE = {StartTimeout.type: StartTimeout.headers}


def not_offered(url: str) -> NotFound:
    """Build the error for a fal URL that this server does not serve. The request is never forwarded to fal."""
    return NotFound(f"{url} is not offered by this server")
