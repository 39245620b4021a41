"""A fault that a test asks for: what happens to the next request, and the error that the client then gets."""

from http import HTTPStatus
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.errors import (
    BadRequest,
    BodyTooLarge,
    ClientCancelled,
    DiskFull,
    Forbidden,
    InternalError,
    InvalidInput,
    MethodNotAllowed,
    MisdirectedRequest,
    NotFound,
    ServerError,
    StartTimeout,
    TooManyRequests,
    Unauthorized,
    UnsatisfiableRange,
)

#: The longest delay of a request or of its webhook, in seconds: an hour's delay would outlast any test.
MAX_DELAY = 600

#: The server's own errors that need only a message, by status.
_KINDS: dict[int, type[ServerError]] = {
    kind.status: kind
    for kind in (
        *(BadRequest, Unauthorized, Forbidden, NotFound, MethodNotAllowed, BodyTooLarge, UnsatisfiableRange),
        *(MisdirectedRequest, ClientCancelled, InternalError, StartTimeout, DiskFull),
    )
}
_PHRASES = {each.value: each.phrase for each in HTTPStatus}

_Seconds = Annotated[float, Field(ge=0, le=MAX_DELAY, allow_inf_nan=False)]


class Fault(BaseModel):
    """The body of POST /testing/next. Everything named here happens to the same request, in this order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Only requests to this endpoint; "" for any.
    endpoint: str = ""
    #: How many requests in a row.
    times: int = Field(1, ge=1, le=1000)
    #: Wait in the queue until the test releases the request.
    hold: bool = False
    #: The position in the queue that the client sees meanwhile.
    queue_position: int | None = Field(None, ge=0)
    #: Seconds to stay IN_PROGRESS before generating or failing.
    delay: _Seconds = 0
    #: The HTTP status to fail with. 499 cancels the request, and 504 is the timeout of a start deadline.
    status: int | None = Field(None, ge=400, le=599)
    #: Whether to refuse the request, or to accept it and fail later; None for what fal does with this status.
    at: Literal["submission", "result"] | None = None
    message: str = Field("", max_length=1000)
    #: The field of the input that a 422 names.
    field: str = "prompt"
    #: Seconds in the header Retry-After.
    retry_after: int | None = Field(None, ge=0, le=MAX_DELAY)
    #: Whether the safety checker flags every image, if the request is checked.
    flag: bool = False
    #: Seconds between the end of the request and its webhook.
    webhook_delay: _Seconds = 0
    #: How often the webhook is sent.
    webhook_copies: int = Field(1, ge=1, le=10)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        effects = (self.hold, self.delay, self.status, self.flag, self.webhook_delay, self.webhook_copies - 1)
        if not any(effects):
            raise ValueError("name at least one of hold, delay, status, flag, webhook_delay and webhook_copies")
        if self.status is None and (self.at or self.message or self.retry_after is not None):
            raise ValueError("at, message and retry_after need a status")
        if self.retry_after is not None and not self.refuses:
            raise ValueError("retry_after needs a status at submission, because results have no such header")
        if self.refuses and any((self.hold, self.delay, self.flag, self.webhook_delay, self.webhook_copies - 1)):
            raise ValueError("a request that is refused at submission can have no other fault")
        if self.queue_position is not None and not self.hold:
            raise ValueError("queue_position needs hold")
        return self

    @property
    def refuses(self) -> bool:
        """Whether the request is refused when it is submitted."""
        if self.status is None or self.at:
            return self.at == "submission"
        # As at fal, models validate their input, fail and are cancelled only after the queue has accepted the request.
        return self.retry_after is not None or not (self.status in (422, 499) or self.status >= 500)

    def error(self) -> ServerError:
        """Build the error with this fault's status, in the shape that the server itself gives such an error."""
        error = self._error(self.status or InternalError.status)
        if self.retry_after is not None:
            error.headers = {**error.headers, "retry-after": str(self.retry_after)}  # type: ignore[misc]
        return error

    def _error(self, status: int) -> ServerError:
        if status == InvalidInput.status:
            return InvalidInput.of(
                "value_error", ("body", self.field), self.message or "Value error, a test refused this input"
            )
        phrase = _PHRASES.get(status, "Error")
        if status == TooManyRequests.status:
            return TooManyRequests(self.message or phrase)
        if kind := _KINDS.get(status):
            # Errors without a message of their own inherit that of a 500.
            return kind(self.message or (phrase if kind.message == ServerError.message else None))
        return _OtherError(status, self.message or phrase)


class _OtherError(ServerError):
    """An error with a status for which this server has no class, such as 502."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status  # type: ignore[misc]
