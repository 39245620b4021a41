"""Adapters that read further images next to the transformer: control nets and IP adapters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.base import IncompatibleInput
from models.flux import control_nets, ip_adapters
from models.flux.control_nets import ControlImage, ControlNetManager
from models.flux.ip_adapters import IPAdapterManager, PromptImage
from models.loading.memory_plans import Plan


@dataclass(frozen=True)
class AdapterImages:
    """The images of a request that adapters read: those to follow, and those that are prompts."""

    control: tuple[ControlImage, ...] = ()
    prompts: tuple[PromptImage, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.control or self.prompts)


class ImageAdapters:
    """The control nets and IP adapters on the device. Only one thread may use them."""

    def __init__(self, pipeline: Any, clip_vision: Path | None) -> None:
        """Start empty. `clip_vision` has the weights that read the images of IP adapters; None if there are none."""
        self.control_nets = ControlNetManager(pipeline)
        self.ip_adapters = IPAdapterManager(pipeline, clip_vision)

    def images_of(self, request: Any, inputs: Mapping[str, Path], plan: Plan) -> AdapterImages:
        """Return the images of a request, whose files `inputs` has by their fields.

        Raises IncompatibleInput if this engine, with its memory plan, cannot use their adapters, and OSError.
        """
        images = AdapterImages(control_nets.images_of(request, inputs), ip_adapters.images_of(request, inputs))
        self.ip_adapters.check(images.prompts)
        if images and not plan.is_resident:
            message = "Control nets and IP adapters do not work with this server's memory plan; use --memory resident."
            first = images.control[0] if images.control else images.prompts[0]
            raise IncompatibleInput(first.loc, message)
        return images

    @contextmanager
    def attached(self, transformer: Any, images: AdapterImages) -> Iterator[None]:
        """Let the blocks of a transformer see the image prompts during the block."""
        with self.ip_adapters.attached(transformer, images.prompts):
            yield

    def unload_idle(self, images: AdapterImages) -> None:
        """Unload all adapters but those of these images, to free memory."""
        self.control_nets.unload_idle(images.control)
        self.ip_adapters.unload_idle(images.prompts)
