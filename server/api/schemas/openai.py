"""Types of the responses of OpenAI's images API."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict


class OpenAIModel(TypedDict):
    """A model in OpenAI's form."""

    id: Annotated[str, Field(description="A name that `model` accepts.")]
    object: Literal["model"]
    created: Annotated[int, Field(description="Always 0.")]
    owned_by: str


class OpenAIModels(TypedDict):
    """The models of the server in OpenAI's form."""

    object: Literal["list"]
    data: list[OpenAIModel]


class OpenAIImage(TypedDict):
    """One image, either by URL or in base64."""

    url: NotRequired[Annotated[str, Field(description="The URL of the image.")]]
    b64_json: NotRequired[Annotated[str, Field(description="The image in base64.")]]


class OpenAIImages(TypedDict):
    """Images in OpenAI's form."""

    created: Annotated[int, Field(description="The time of the response, in seconds since 1970.")]
    data: list[OpenAIImage]
