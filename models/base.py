"""The contract between the server and a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image
from pydantic import BaseModel

from models.schema import ImageInput


@dataclass(frozen=True)
class Placement:
    """What a model is given to set itself up with, chosen by the operator.

    Attributes:
        weights: folder in diffusers layout, or a hub id; None for a model that needs no weights.
        safety_checker: hub id or folder, used when the weights bring no `safety_checker` of their own.
        device: "cuda", "cpu", or "auto" for the best one there is.
    """

    weights: str | Path | None
    safety_checker: str
    device: str = "auto"


class CannotPaint(Exception):
    """This request fails, for a reason that its client is told. Nothing else is harmed."""


class Painting(Protocol):
    """One request while it is being painted: one or more pictures, step after step."""

    @property
    def step(self) -> int:
        """Steps done, over all its pictures."""

    @property
    def num_steps(self) -> int:
        """Steps in all, over all its pictures."""

    @property
    def pictures(self) -> Sequence[Image]:
        """The pictures that are ready, RGB, in order of their seeds."""

    @property
    def acceleration(self) -> str:
        """The tier that paints: "none", "regular" or "high", which may be lower than the one asked for."""

    @property
    def is_done(self) -> bool:
        """Whether every picture is ready."""


class Engine(Protocol):
    """A model on its device. One thread owns it: no method may be called from another."""

    def start(self, request: Any, seed: int) -> Painting:
        """Begin to paint `request`, an instance of the model's own Input; picture k uses seed + k."""

    def advance(self, painting: Painting) -> None:
        """Advance by one step. An exception ends this painting and leaves the others as they were."""

    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        """Say of each picture whether it must not be shown. Raises CannotPaint when it cannot tell."""


class Model(Protocol):
    """One endpoint. A module in `models/` that has an instance of this named MODEL is served."""

    @property
    def endpoint(self) -> str:
        """The endpoint's id on fal, "owner/alias" or "owner/alias/path"."""

    @property
    def weights(self) -> tuple[str, ...]:
        """Hub ids this endpoint can run on; empty for a model that needs no weights."""

    @property
    def Input(self) -> type[ImageInput]:  # noqa: N802  the wire's own word
        """What a request may hold."""

    @property
    def Output(self) -> type[BaseModel]:  # noqa: N802
        """What an answer holds."""

    def setup(self, placement: Placement) -> Engine:
        """Load the weights. Called once, on the thread that will own the engine; may take minutes."""

    def answer(
        self,
        request: Any,
        images: Sequence[Mapping[str, Any]],
        has_nsfw_concepts: Sequence[bool],
        timings: Mapping[str, float],
    ) -> BaseModel:
        """The Output for these stored images, each {url, width, height, content_type}. Timings in seconds."""

    def parameters(self, request: Any, seed: int) -> Mapping[str, Any]:
        """What made one picture, to be written into its file: the same for the same bytes, whatever the load."""
