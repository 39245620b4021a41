"""One request of FLUX while it is painted: its pictures, and how far they are."""

from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from models.flux.acceleration import Tier
from models.flux.loras import LoraAdapter
from models.flux.sample import Sample, first_step


@dataclass
class FluxTask:
    """One request. Without shared forwards its pictures are painted one after the other, each as if alone."""

    request: Any
    seed: int
    width: int
    height: int
    tier: Tier
    #: Floating point operations of one step of one picture.
    step_work: int
    #: The transformer's type, by PyTorch's name.
    dtype: str
    #: What it is painted over, if anything.
    init_image: Image | None = None
    #: What it is told to paint by, instead of a prompt.
    reference_image: Image | None = None
    loras: tuple[LoraAdapter, ...] = ()
    samples: list[Sample] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    step: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its pictures."""
        return self.width, self.height

    @property
    def acceleration(self) -> str:
        """The tier that paints."""
        return self.tier.name

    @property
    def num_steps(self) -> int:
        """Steps of all its pictures."""
        num_left_out = 0 if self.init_image is None else first_step(self.request)
        return int((self.request.num_inference_steps - num_left_out) * self.request.num_images)

    @property
    def work(self) -> int:
        """Work done so far, in floating point operations."""
        return self.step * self.step_work

    @property
    def remaining_work(self) -> int:
        """Work of the steps still to take."""
        return (self.num_steps - self.step) * self.step_work

    @property
    def is_decoded(self) -> bool:
        """Whether every picture is decoded."""
        return bool(len(self.images) == self.request.num_images)

    @property
    def description(self) -> str:
        """What is painted, in an error."""
        return f"a picture of {self.width}x{self.height}"

    @property
    def due(self) -> list[Sample]:
        """What can take a step now: all its pictures where they may share a forward, else the next one."""
        unfinished = [sample for sample in self.samples if not sample.steps_done]
        return unfinished if self.tier.shares_forwards else unfinished[:1]
