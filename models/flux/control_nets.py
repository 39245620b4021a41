"""Control nets: networks that read a control image and add what it asks for to the blocks of the transformer."""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxControlNetModel
from PIL.Image import Image
from safetensors.torch import load_file

from models.base import IncompatibleInput
from models.flux.device import num_bytes_in
from models.flux.image_encoder import ImageEncoder
from models.flux.input_images import open_image

#: What a union of control nets can follow, in the order of its modes.
MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "low-quality")
#: The maximum bytes of control nets kept on the device; the least recently used are unloaded first. Those published for
#: FLUX.1 take 1.5 to 6.6 GB. The control nets of a single task may exceed the limit while the task runs.
CACHE_BYTES = 4_000_000_000
#: The most blocks of either kind that a control net may have. FLUX.1 has 38.
_MAX_BLOCKS = 100
#: What the inputs of a control net for pixels have, in place of an autoencoder: an eighth of the width and height, of
#: which a token packs 2 x 2.
_HINT_PIXELS, _HINT_PATCH = 8, 2

#: For each block of the transformer, what is added after it; None for nothing.
Residuals = list[torch.Tensor] | None


@dataclass(frozen=True)
class ControlImage:
    """A control image of a request, and the control net that reads it.

    Attributes:
        path: the safetensors file of the control net, which is content-addressed.
        loc: the path of the field that names it in the request.
        image: the image, in RGB.
        scale: the factor for what the control net adds.
        start: the share of the steps after which it begins to add.
        end: the share of the steps after which it stops.
        mode: the index in MODES, for a union; None for other control nets.
    """

    path: Path
    loc: tuple[str | int, ...]
    image: Image
    scale: float
    start: float
    end: float
    mode: int | None = None


def images_of(request: Any, inputs: Mapping[str, Path]) -> tuple[ControlImage, ...]:
    """Return the control images of a request, whose files `inputs` has by their fields. Raises OSError."""
    found = []
    for place, net in enumerate(getattr(request, "controlnets", ())):
        field = f"controlnets.{place}"
        image = open_image(inputs[f"{field}.image_url"])
        times = net.conditioning_scale, net.start_percentage, net.end_percentage
        found.append(ControlImage(inputs[f"{field}.path"], ("controlnets", place, "path"), image, *times))
    for place, union in enumerate(getattr(request, "controlnet_unions", ())):
        field = f"controlnet_unions.{place}"
        loc = ("controlnet_unions", place, "path")
        for number, control in enumerate(union.controls):
            image = open_image(inputs[f"{field}.controls.{number}.control_image_url"])
            times = control.conditioning_scale, control.start_percentage, control.end_percentage
            mode = MODES.index(control.control_mode)
            found.append(ControlImage(inputs[f"{field}.path"], loc, image, *times, mode))
    return tuple(found)


@dataclass(frozen=True)
class Control:
    """A control net with its input for one sample: packed latents, or pixels for a net that has no autoencoder.

    `net` returns the control net, after loading it again if it was unloaded for another task meanwhile.
    """

    net: Callable[[], Any]
    condition: torch.Tensor
    image: ControlImage
    guidance: torch.Tensor | None
    mode: torch.Tensor | None

    def is_due(self, step: int, num_steps: int) -> bool:
        """Return whether the control net adds anything in a step."""
        return step / num_steps >= self.image.start and (step + 1) / num_steps <= self.image.end

    def residuals(self, inputs: Mapping[str, Any], config: Any) -> tuple[Residuals, Residuals]:
        """Return what the net adds to each double and each single block of a transformer with this configuration.

        `inputs` are the other arguments of its forward.
        """
        net = self.net()
        double, single = net(
            **{**inputs, "guidance": self.guidance},
            controlnet_cond=self.condition,
            controlnet_mode=self.mode,
            conditioning_scale=self.image.scale,
            return_dict=False,
        )
        is_cyclic = net.input_hint_block is not None
        return (
            _spread(double, config.num_layers, is_cyclic=is_cyclic),
            _spread(single, config.num_single_layers, is_cyclic=False),
        )


def prepare(encoder: ImageEncoder, image: ControlImage, find: Callable[[], Any], guidance_scale: float) -> Control:
    """Encode a control image for its control net, which `find` returns, as FluxControlNetPipeline does."""
    net = find()
    pixels = encoder.pixels(image.image).contiguous()
    if net.input_hint_block is None:
        condition = encoder.pack(encoder.latents(pixels))
    else:
        condition = pixels.to(encoder.device, encoder.dtype)
    guidance = torch.tensor([guidance_scale], device=encoder.device) if net.config.guidance_embeds else None
    mode = torch.tensor([[image.mode]], device=encoder.device) if net.union else None
    return Control(find, condition, image, guidance, mode)


def residuals(
    controls: Sequence[Control], step: int, num_steps: int, inputs: Mapping[str, Any], config: Any
) -> dict[str, Residuals]:
    """Return what all control nets add to each block of a transformer in a step, as arguments of its forward.

    `inputs` are the other arguments, and `config` is the transformer's configuration.
    """
    double: Residuals = None
    single: Residuals = None
    for control in controls:
        if control.is_due(step, num_steps):
            of_double, of_single = control.residuals(inputs, config)
            double, single = _add(double, of_double), _add(single, of_single)
    return {"controlnet_block_samples": double, "controlnet_single_block_samples": single}


def _spread(few: Residuals, num_blocks: int, *, is_cyclic: bool) -> Residuals:
    """Return one residual for each block, from those of a control net with fewer blocks, as the transformer does it.

    Each is repeated for successive blocks, or all in turns if `is_cyclic`.
    """
    if not few:
        return None
    each = math.ceil(num_blocks / len(few))
    return [few[block % len(few) if is_cyclic else block // each] for block in range(num_blocks)]


def _add(some: Residuals, others: Residuals) -> Residuals:
    if some is None or others is None:
        return some or others
    return [one + other for one, other in zip(some, others, strict=True)]


class ControlNetManager:
    """The control nets on the device. Only one thread may use the manager."""

    def __init__(self, pipeline: Any, kept_bytes: int = CACHE_BYTES) -> None:
        self._pipeline = pipeline
        self._kept_bytes = kept_bytes
        self._loaded: OrderedDict[Path, Any] = OrderedDict()

    @property
    def num_loaded(self) -> int:
        """The number of control nets on the device."""
        return len(self._loaded)

    def load(self, images: Sequence[ControlImage]) -> list[Any]:
        """Return the control net of each image, loaded onto the device. Raises IncompatibleInput."""
        paths = {image.path for image in images}
        for image in images:
            if image.path in self._loaded:
                self._loaded.move_to_end(image.path)
            else:
                self._loaded[image.path] = self._load(image, paths)
            if self._loaded[image.path].union and image.mode is None:
                message = "This control net is a union, which needs the mode of its image; use controlnet_unions."
                raise IncompatibleInput(image.loc, message)
        return [self._loaded[image.path] for image in images]

    def finders(self, images: Sequence[ControlImage]) -> list[Callable[[], Any]]:
        """Return a function for each image that returns its control net, loaded onto the device."""
        return [partial(self._find, images, number) for number in range(len(images))]

    def _find(self, images: Sequence[ControlImage], number: int) -> Any:
        # Load all of them, so that those of one task do not evict each other.
        return self.load(images)[number]

    def unload_idle(self, images: Sequence[ControlImage]) -> None:
        """Unload all control nets but those of these images, to free memory."""
        wanted = {image.path for image in images}
        for path in [each for each in self._loaded if each not in wanted]:
            del self._loaded[path]

    def _make_room(self, wanted: set[Path], num_bytes: int) -> None:
        for path in [each for each in self._loaded if each not in wanted]:
            if num_bytes + sum(_num_bytes(net) for net in self._loaded.values()) <= self._kept_bytes:
                return
            del self._loaded[path]

    def _load(self, image: ControlImage, wanted: set[Path]) -> Any:
        transformer = self._pipeline.transformer
        try:
            # Only the tensors: what a file says in its metadata is not trusted.
            tensors = load_file(image.path)
            self._make_room(wanted, num_bytes_in(transformer.dtype, tensors))
            net = build(tensors, transformer)
            if net.input_hint_block is not None and self._pipeline.vae_scale_factor != _HINT_PIXELS:
                raise ValueError("it takes pixels, eight for each latent, and the latents of this model are of others")
            # Copied on a CPU too: on some, products with the unaligned tensors of a mapped file round otherwise.
            where = (transformer.device, transformer.dtype)
            placed = {name: each.to(*where, copy=True) for name, each in tensors.items()}
        except (ValueError, OSError) as error:
            raise IncompatibleInput(image.loc, f"This control net does not fit this model: {error}") from error
        net.load_state_dict(placed, assign=True)
        return net.eval().requires_grad_(False)


def _num_bytes(net: Any) -> int:
    return sum(weight.nbytes for weight in net.parameters())


def build(tensors: Mapping[str, torch.Tensor], transformer: Any) -> Any:
    """Build a FluxControlNetModel without memory for the weights in a file, next to a FluxTransformer2DModel.

    Its configuration follows from the names and shapes of the tensors. Raises ValueError if the tensors are not those
    of a control net, or of one for a transformer of another width.
    """
    own, base = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, transformer.config
    if scalars := [name for name, shape in own.items() if not shape]:
        raise ValueError(f"{scalars[0]} has no dimensions")
    config = {
        "in_channels": base.in_channels,
        "num_layers": _num_blocks(own, "transformer_blocks"),
        "num_single_layers": _num_blocks(own, "single_transformer_blocks"),
        "attention_head_dim": base.attention_head_dim,
        "num_attention_heads": base.num_attention_heads,
        "joint_attention_dim": base.joint_attention_dim,
        "pooled_projection_dim": base.pooled_projection_dim,
        "axes_dims_rope": list(base.axes_dims_rope),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in own,
        "num_mode": own.get("controlnet_mode_embedder.weight", (None,))[0],
    }
    if "input_hint_block.conv_out.weight" in own:
        config |= {
            "conditioning_embedding_channels": own["input_hint_block.conv_out.weight"][0],
            "patch_size": _HINT_PATCH,
        }
    if config["num_mode"] not in (None, *range(len(MODES), _MAX_BLOCKS)):
        raise ValueError(f"controlnet_mode_embedder.weight has {config['num_mode']} modes, not {len(MODES)} or more")
    with torch.device("meta"), warnings.catch_warnings():
        # diffusers warns of a class that its own control net uses.
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
        net: Any = FluxControlNetModel(**config)
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    if missing := [name for name in expected if name not in own]:
        raise ValueError(f"it has no tensor {missing[0]}")
    if unknown := [name for name in own if name not in expected]:
        raise ValueError(f"its tensor {unknown[0]} is not one of a control net in diffusers' layout")
    if wrong := [name for name, shape in expected.items() if own[name] != shape]:
        name = wrong[0]
        raise ValueError(f"{name} has the shape {list(own[name])}, and the model needs {list(expected[name])}")
    return net


def _num_blocks(names: Mapping[str, Any], kind: str) -> int:
    """Return how many blocks of a kind a file has. Raises ValueError if their numbers are not 0 and up, or too many."""
    numbers = {name.split(".")[1] for name in names if name.startswith(f"{kind}.") and name.count(".") > 1}
    if len(numbers) > _MAX_BLOCKS or numbers != {str(number) for number in range(len(numbers))}:
        raise ValueError(f"the numbers of its {kind} are not those of 0 to {_MAX_BLOCKS} blocks")
    return len(numbers)
