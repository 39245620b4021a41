"""Types of the responses of AUTOMATIC1111's API."""

from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict


class ChosenOptions(TypedDict):
    """The options that have a meaning here."""

    sd_model_checkpoint: Annotated[str, Field(description="The endpoint that requests use.")]
    samples_format: str


class Checkpoint(TypedDict):
    """An endpoint as a checkpoint."""

    title: str
    model_name: str
    filename: str
    hash: str | None
    sha256: str | None
    config: str | None


class Progress(TypedDict):
    """The progress of a key's last request."""

    progress: Annotated[float, Field(ge=0, le=1)]
    eta_relative: Annotated[float, Field(description="Always 0.")]
    state: dict[str, Any]
    current_image: str | None
    textinfo: str | None


class A1111Images(TypedDict):
    """Generated images."""

    images: Annotated[list[str], Field(description="The images in base64.")]
    parameters: dict[str, Any]
    info: Annotated[str, Field(description="The parameters of the images, as JSON in a string.")]
