"""A FLUX request during generation: its images and their progress."""

from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from models.flux import real_cfg
from models.flux.acceleration import Tier
from models.flux.image_adapters import AdapterImages
from models.flux.input_images import InputImages
from models.flux.loras import LoraAdapter
from models.flux.sample import Sample, first_step


@dataclass
class FluxTask:
    """A request during generation. If its tier does not share forwards, its images are generated one by one."""

    request: Any
    seed: int
    width: int
    height: int
    tier: Tier
    #: The floating point operations of one step of one image.
    step_work: int
    #: The transformer's number type, by PyTorch's name.
    dtype: str
    inputs: InputImages = field(default_factory=InputImages)
    loras: tuple[LoraAdapter, ...] = ()
    adapter_images: AdapterImages = field(default_factory=AdapterImages)
    samples: list[Sample] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    #: The number of steps done, over all images.
    step: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """The width and height of the images, in pixels."""
        return self.width, self.height

    @property
    def acceleration(self) -> str:
        """The name of the tier in use."""
        return self.tier.name

    @property
    def num_steps(self) -> int:
        """The number of steps in total, over all images."""
        num_left_out = 0 if self.inputs.start is None else first_step(self.request)
        return int((self.request.num_inference_steps - num_left_out) * self.request.num_images)

    @property
    def work(self) -> int:
        """The work done so far, in floating point operations."""
        return self.step * self.step_work

    @property
    def remaining_work(self) -> int:
        """The work of the remaining steps, in floating point operations."""
        return (self.num_steps - self.step) * self.step_work

    @property
    def is_decoded(self) -> bool:
        """Whether every image is decoded."""
        return bool(len(self.images) == self.request.num_images)

    @property
    def can_overflow(self) -> bool:
        """Whether values that are not finite can be the request's own doing, and not that of the weights."""
        has_own_weights = any(lora.loc or lora.scale > 1 for lora in self.loras) or bool(self.adapter_images)
        return has_own_weights or real_cfg.is_used(self.request)

    @property
    def description(self) -> str:
        """The task's description in error messages."""
        return f"an image of {self.width}x{self.height}"

    @property
    def due(self) -> list[Sample]:
        """The samples that can take a step now: all unfinished ones if the tier shares forwards, else the first."""
        unfinished = [sample for sample in self.samples if not sample.steps_done]
        return unfinished if self.tier.shares_forwards else unfinished[:1]
