"""Types of errors in fal's form and in OpenAI's."""

from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict


class FieldError(TypedDict):
    """One field, parameter or header that is wrong."""

    loc: Annotated[list[str | int], Field(description='The place of the field, such as ["body", "prompt"].')]
    msg: Annotated[str, Field(description="What is wrong with the field.")]
    type: Annotated[str, Field(description="The type of the error, such as missing.")]
    input: NotRequired[Annotated[Any, Field(description="The value that was sent.")]]
    ctx: NotRequired[Annotated[dict[str, Any], Field(description="Facts about the error, such as a limit.")]]


class Problem(TypedDict):
    """An error in fal's form."""

    detail: Annotated[
        str | list[FieldError], Field(description="What failed. For invalid fields, one entry for each of them.")
    ]
    message: NotRequired[Annotated[str, Field(description="The same in one line.")]]
    error_type: NotRequired[Annotated[str, Field(description="fal's type of the error, such as request_timeout.")]]


class OpenAIError(TypedDict):
    """The facts about an error in OpenAI's form."""

    message: Annotated[str, Field(description="What failed.")]
    type: Annotated[str, Field(description="The kind of the error, such as invalid_request_error.")]
    param: Annotated[str | None, Field(description="The field that is wrong.")]
    code: Annotated[str | None, Field(description="The type of the error, such as model_not_found.")]


class OpenAIProblem(TypedDict):
    """An error in OpenAI's form."""

    error: OpenAIError
