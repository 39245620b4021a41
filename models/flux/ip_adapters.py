"""IP adapters: images as further prompts, which the double blocks of the transformer see by attention of their own."""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from models.base import IncompatibleInput
from models.flux.device import num_bytes_in
from models.flux.input_images import open_image
from models.loading import specs, verify

#: The maximum bytes of IP adapters kept on the device; the least recently used are unloaded first. That published for
#: FLUX.1 takes 1 GB. The IP adapters of a single task may exceed the limit while the task runs.
CACHE_BYTES = 2_000_000_000
#: The names of tensors in a file, and what follows them in the published layouts.
_PROJECTION = re.compile(r"(?:ip_adapter_proj_model|image_proj)\.(.*)")
_BLOCK = re.compile(
    r"(?:double_blocks|ip_adapter)\.(\d{1,3})\.(?:processor\.ip_adapter_double_stream_|to_)([kv])_(?:proj|ip)\.(.*)"
)


@dataclass(frozen=True)
class PromptImage:
    """An image that a request has as a prompt, and the IP adapter that reads it.

    Attributes:
        path: the safetensors file of the IP adapter, which is content-addressed.
        loc: the path of the field that names it in the request.
        image: the image, in RGB.
        scale: the factor for what the IP adapter adds.
    """

    path: Path
    loc: tuple[str | int, ...]
    image: Image.Image
    scale: float


@dataclass(frozen=True)
class ImagePrompts:
    """What the transformer reads of the images, and of black ones for the negative prompt.

    Each is a list with an entry for each IP adapter, of shape (1, 1, image tokens, width).
    """

    states: list[torch.Tensor]
    negative: list[torch.Tensor]


@dataclass(frozen=True)
class _Adapter:
    """An IP adapter on the device: from an image's embedding to tokens, and a key and a value matrix for each block."""

    projection: Any
    blocks: list[tuple[Any, Any]]

    @property
    def num_bytes(self) -> int:
        modules = [self.projection, *(module for pair in self.blocks for module in pair)]
        return sum(weight.nbytes for module in modules for weight in module.parameters())


def images_of(request: Any, inputs: Mapping[str, Path]) -> tuple[PromptImage, ...]:
    """Return the images that a request has as prompts, whose files `inputs` has by their fields. Raises OSError."""
    return tuple(
        PromptImage(
            inputs[f"ip_adapters.{place}.path"],
            ("ip_adapters", place, "path"),
            open_image(inputs[f"ip_adapters.{place}.ip_adapter_image_url"]),
            adapter.scale,
        )
        for place, adapter in enumerate(getattr(request, "ip_adapters", ()))
    )


class IPAdapterManager:
    """The IP adapters on the device, and the encoder of their images. Only one thread may use the manager.

    The encoder is loaded by the first request that needs it. `directory` has its weights; None if they are not
    installed.
    """

    def __init__(self, pipeline: Any, directory: Path | None, kept_bytes: int = CACHE_BYTES) -> None:
        self._pipeline, self._directory = pipeline, directory
        self._kept_bytes = kept_bytes
        self._encoder: Any = None
        self._num_features = 0
        self._loaded: OrderedDict[Path, _Adapter] = OrderedDict()

    @property
    def num_loaded(self) -> int:
        """The number of IP adapters on the device."""
        return len(self._loaded)

    def check(self, images: Sequence[PromptImage]) -> None:
        """Raise IncompatibleInput if there are images but no weights of the encoder."""
        if images and self._directory is None:
            missing = specs.CLIP_VISION.hub_id
            raise IncompatibleInput(images[0].loc, f"IP adapters cannot be used, because {missing} is missing here.")

    @torch.no_grad()
    def prompts(self, images: Sequence[PromptImage]) -> ImagePrompts | None:
        """Load the IP adapters of these images, and encode the images; return None if there are none.

        Raises IncompatibleInput for an IP adapter that does not fit, and OSError if the encoder cannot be loaded.
        """
        if not images:
            return None
        if self._encoder is None:
            assert self._directory
            self._encoder = _Encoder.load(self._directory, self._pipeline.transformer)
        self._num_features = self._encoder.num_features
        adapters = self._load(images)
        black = self._encoder.embedding(Image.new("RGB", images[0].image.size))
        pairs = list(zip(images, adapters, strict=True))
        return ImagePrompts(
            [adapter.projection(self._encoder.embedding(image.image))[None] for image, adapter in pairs],
            [adapter.projection(black)[None] for _, adapter in pairs],
        )

    @contextmanager
    def attached(self, transformer: Any, images: Sequence[PromptImage]) -> Iterator[None]:
        """Let the double blocks of a transformer see the image prompts during the block.

        IP adapters that were unloaded for another task meanwhile are loaded again. Raises IncompatibleInput.
        """
        if not images:
            yield
            return
        adapters = self._load(images)
        scales = [image.scale for image in images]
        config, attentions = transformer.config, [block.attn for block in transformer.transformer_blocks]
        before = [attention.processor for attention in attentions]
        try:
            for number, attention in enumerate(attentions):
                # Its own matrices take no memory; those of the adapters take their place.
                processor: Any = FluxIPAdapterAttnProcessor(
                    transformer.inner_dim, config.joint_attention_dim, [1] * len(adapters), scales, device="meta"
                )
                keys, values = zip(*(adapter.blocks[number] for adapter in adapters), strict=True)
                processor.to_k_ip, processor.to_v_ip = torch.nn.ModuleList(keys), torch.nn.ModuleList(values)
                attention.set_processor(processor)
            yield
        finally:
            for attention, processor in zip(attentions, before, strict=True):
                attention.set_processor(processor)

    def unload_idle(self, images: Sequence[PromptImage]) -> None:
        """Unload all IP adapters but those of these images, to free memory; without images, the encoder too."""
        wanted = {image.path for image in images}
        for path in [each for each in self._loaded if each not in wanted]:
            del self._loaded[path]
        if not images:
            self._encoder = None

    def _load(self, images: Sequence[PromptImage]) -> list[_Adapter]:
        wanted = {image.path for image in images}
        for image in images:
            if image.path in self._loaded:
                self._loaded.move_to_end(image.path)
                continue
            try:
                tensors, transformer = load_file(image.path), self._pipeline.transformer
                self._make_room(wanted, num_bytes_in(transformer.dtype, tensors))
                self._loaded[image.path] = build(tensors, transformer, self._num_features)
            except (ValueError, OSError) as error:
                message = f"This IP adapter does not fit this model: {error}"
                raise IncompatibleInput(image.loc, message) from error
        return [self._loaded[image.path] for image in images]

    def _make_room(self, wanted: set[Path], num_bytes: int) -> None:
        for path in [each for each in self._loaded if each not in wanted]:
            if num_bytes + sum(adapter.num_bytes for adapter in self._loaded.values()) <= self._kept_bytes:
                return
            del self._loaded[path]


class _Encoder:
    """CLIP's vision model, as diffusers runs it for IP adapters."""

    def __init__(self, model: Any) -> None:
        self._model = model
        side = model.config.image_size
        # The Pillow variant scales images identically everywhere and does not need torchvision.
        self._processor = CLIPImageProcessorPil(size=side, crop_size=side)

    @classmethod
    def load(cls, directory: Path, transformer: Any) -> "_Encoder":
        """Load the weights in the transformer's type onto its device. Raises OSError: BadWeights if malformed."""
        verify.verify(directory)
        with verify.translate_errors(directory):
            model = verify.load_complete(
                CLIPVisionModelWithProjection, directory, dtype=transformer.dtype, trust_remote_code=False
            )
        return cls(model.to(transformer.device).eval())

    @property
    def num_features(self) -> int:
        """The number of values in the embedding of an image."""
        return int(self._model.config.projection_dim)

    def embedding(self, image: Image.Image) -> torch.Tensor:
        """Return the embedding of an image, of shape (1, features)."""
        pixels = self._processor(image, return_tensors="pt").pixel_values
        embedding: torch.Tensor = self._model(pixels.to(self._model.device, self._model.dtype)).image_embeds
        return embedding


def build(tensors: Mapping[str, torch.Tensor], transformer: Any, num_features: int) -> _Adapter:
    """Build an IP adapter from the tensors of a file, in the type and on the device of a FluxTransformer2DModel.

    `num_features` is the number of values in the embedding of an image. Raises ValueError if the tensors are not those
    of an IP adapter, or of one for a transformer of another width or for another encoder.
    """
    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    named = _by_place(tensors)
    # As diffusers has it: sixteen tokens of FLUX.1's width, else four.
    num_tokens = 16 if len(named.get("image_embeds.weight", ())) == 65_536 else 4
    with torch.device("meta"):
        projection = ImageProjection(num_features, width, num_tokens)
        blocks = [
            (torch.nn.Linear(width, inner), torch.nn.Linear(width, inner)) for _ in range(transformer.config.num_layers)
        ]
    _fill(projection, "", named, transformer)
    for number, pair in enumerate(blocks):
        for kind, linear in zip("kv", pair, strict=True):
            _fill(linear, f"{number}.{kind}.", named, transformer)
    if named:
        raise ValueError(f"it has more tensors than the model needs, such as {next(iter(named))}")
    return _Adapter(projection, blocks)


def _by_place(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors by the names that the modules here have for them. Raises ValueError for an unknown tensor."""
    named: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 0:
            raise ValueError(f"{name} has no dimensions")
        if match := _PROJECTION.fullmatch(name):
            named[match[1].replace("proj", "image_embeds")] = tensor
        elif match := _BLOCK.fullmatch(name):
            named[f"{int(match[1])}.{match[2]}.{match[3]}"] = tensor
        else:
            raise ValueError(f"its tensor {name} is not one of an IP adapter")
    return named


def _fill(module: Any, prefix: str, named: dict[str, torch.Tensor], transformer: Any) -> None:
    """Move the tensors of a module, whose names start with `prefix`, from `named` into it. Raises ValueError."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name, shape in expected.items():
        if prefix + name not in named:
            raise ValueError(f"it has no tensor for {prefix}{name}")
        if tuple(named[prefix + name].shape) != shape:
            actual = list(named[prefix + name].shape)
            raise ValueError(f"{prefix}{name} has the shape {actual}, and the model needs {list(shape)}")
    weights = {name: named.pop(prefix + name).to(transformer.device, transformer.dtype) for name in expected}
    module.load_state_dict(weights, assign=True)
    module.eval().requires_grad_(False)
