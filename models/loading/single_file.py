"""Weights in a single file: which components it holds, whether they fit the base, and their loading."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from models.loading import file_header, gguf_file, hub, verify
from models.loading.file_header import TensorInfo
from models.loading.hub import BadWeights

if TYPE_CHECKING:
    import torch

#: The prefixes of each component's tensors, in the order in which they are tried. ComfyUI and Stability AI write the
#: first ones, diffusers would write the last ones. A file without any prefix holds a transformer alone.
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "transformer": ("model.diffusion_model.", "transformer."),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("text_encoders.clip_l.transformer.", "text_encoder."),
    "text_encoder_2": ("text_encoders.t5xxl.transformer.", "text_encoder_2."),
}
#: The ends of names of tensors that FLUX does not use: ComfyUI writes them, among them the tokenizer of T5.
_UNUSED = ("logit_scale", "text_projection.weight", "position_ids", "spiece_model")
_FLOATS = ("F16", "BF16", "F32", "F8_E4M3", "F8_E5M2")
#: The names of tensors in other forms, by their ends, each with the form and what to do.
_OTHER_FORMS = {
    (".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".lokr_w1", ".hada_w1_a"): (
        "a LoRA, not weights; name it in a request's loras"
    ),
    (".qweight", ".wscales"): (
        "for the library Nunchaku (SVDQuant), which diffusers cannot load as a single file; use a directory in"
        " diffusers layout whose quant_method is nunchaku_lite, or a GGUF file"
    ),
    (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".absmax"): (
        "quantized by bitsandbytes, which diffusers loads as a directory only; use a directory in diffusers layout, or"
        " a GGUF file"
    ),
    (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", "scaled_fp8"): (
        "fp8 with scales, which diffusers cannot load for FLUX.1; use fp8 without scales, bf16, or a GGUF file"
    ),
}


#: diffusers' names of FLUX.1's variants, and its name for whatever it does not know.
_ARCHITECTURES, _UNKNOWN = ("flux-dev", "flux-schnell", "flux-fill", "flux-depth"), "v1"
#: The rows of the matrix that joins query, key, value and the first one of the MLP: FLUX.1's width is 3072.
_LINEAR1_ROWS = 7 * 3072
#: The layer that takes the channels of image tokens, by diffusers' and by Black Forest Labs' names.
_FIRST_LAYER = ("x_embedder.weight", "img_in.weight")
#: No settings that replace those of a configuration.
NO_OPTIONS: Mapping[str, int] = MappingProxyType({})
_TIED = ("shared.weight", "encoder.embed_tokens.weight")


@dataclass(frozen=True)
class Contents:
    """The contents of a file of weights, as its header describes them.

    Attributes:
        path: the file.
        format: "safetensors" or "GGUF".
        components: the tensors of each component, by their names without the component's prefix.
        names: the name in the file of each tensor, by component and name without prefix.
    """

    path: Path
    format: str
    components: Mapping[str, Mapping[str, TensorInfo]]
    names: Mapping[tuple[str, str], str]

    @property
    def is_quantized(self) -> bool:
        """Whether the weights stay quantized when they are loaded."""
        return self.format == "GGUF"

    @property
    def description(self) -> str:
        """The format and the type of most of the weights, such as "GGUF Q4_0" or "safetensors BF16"."""
        tensors = self.components["transformer"].values()
        sizes: dict[str, int] = {}
        for tensor in tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_elements
        return f"{self.format} {max(sizes, key=lambda dtype: sizes[dtype])}"

    def num_bytes(self, component: str, itemsize: int) -> int:
        """Return the bytes of a component in memory, in a number type of `itemsize` bytes unless it is quantized."""
        tensors = self.components[component].values()
        if self.is_quantized:
            return sum(tensor.num_bytes for tensor in tensors)
        return sum(tensor.num_elements * itemsize for tensor in tensors)


def read(path: Path) -> Contents:
    """Read the header of a file, and find the components in it. Raises BadWeights if it holds no FLUX transformer."""
    form, tensors = _read_header(path)
    for ends, what in _OTHER_FORMS.items():
        if found := [name for name in tensors if name.endswith(ends)]:
            raise BadWeights(f"{path} is {what}; its tensors are named such as {file_header.quoted(found[0])}")
    components: dict[str, dict[str, TensorInfo]] = {}
    names: dict[tuple[str, str], str] = {}
    has_prefixes = any(name.startswith(_PREFIXES["transformer"]) for name in tensors)
    for name, tensor in tensors.items():
        if name.endswith(_UNUSED):
            continue
        component, rest = _split(name) if has_prefixes else ("transformer", name)
        if not component:
            raise BadWeights(f"{path}: {file_header.quoted(name)} is of no component of a FLUX pipeline")
        if form == "safetensors" and tensor.dtype not in _FLOATS:
            raise BadWeights(
                f"{path}: {file_header.quoted(name)} is of type {tensor.dtype}, but weights should be of"
                f" {', '.join(_FLOATS)}"
            )
        components.setdefault(component, {})[rest] = tensor
        names[component, rest] = name
    if "transformer" not in components:
        raise BadWeights(f"{path} holds no transformer of FLUX.1: its tensors are named {_shortened(tensors)}")
    if form == "GGUF" and set(components) - {"transformer"}:
        raise BadWeights(f"{path} holds more than a transformer, which is not supported in GGUF files")
    return Contents(path, form, components, names)


def _read_header(path: Path) -> tuple[str, dict[str, TensorInfo]]:
    """Return a file's format, "safetensors" or "GGUF", and its tensors. Its first bytes say what it is, not its name.

    Raises BadWeights, which names the file and the tensor or field, for every other file and for a malformed header.
    """
    with path.open("rb") as file:
        start = file.read(file_header.LENGTH_BYTES + 1)
    if start.startswith(gguf_file.MAGIC):
        return "GGUF", gguf_file.read_header(path)
    if start[file_header.LENGTH_BYTES :] == b"{":
        return "safetensors", file_header.read_safetensors(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        raise BadWeights(
            f"{path} is a pickle, which can run code when it is loaded; use the same weights as safetensors or GGUF"
        )
    raise BadWeights(f"{path} is neither a safetensors file nor a GGUF file; {hub.REPLACE}")


def _split(name: str) -> tuple[str, str]:
    """Return the component of a tensor, and its name without the component's prefix; "" for both if there is none."""
    for component, prefixes in _PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                return component, name.removeprefix(prefix)
    return "", ""


def load(contents: Contents, component: str, directory: Path, dtype: "torch.dtype") -> Any:
    """Load a component of a file, with the configuration in `directory`, in evaluation mode. Raises BadWeights."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel, GGUFQuantizationConfig
    from transformers import CLIPTextModel, T5EncoderModel

    if component == "transformer" and contents.format == "GGUF":
        tensors = gguf_file.load(contents.path, contents.components[component])
        options = {"quantization_config": GGUFQuantizationConfig(compute_dtype=dtype)}
    else:
        tensors, options = _load_safetensors(contents, component), {}
    with verify.translate_errors(contents.path):
        if component in ("transformer", "vae"):
            kind = FluxTransformer2DModel if component == "transformer" else AutoencoderKL
            options |= {"config": str(directory), "subfolder": component, "local_files_only": True, "dtype": dtype}
            if component == "transformer":
                options |= _channels(contents.components[component], directory)
            return kind.from_single_file(tensors, **options).eval()
        encoder = CLIPTextModel if component == "text_encoder" else T5EncoderModel
        config = encoder.config_class.from_pretrained(directory / component, local_files_only=True)
        return encoder.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype).eval()


def _load_safetensors(contents: Contents, component: str) -> dict[str, "torch.Tensor"]:
    """Map a component's tensors from the file into memory."""
    from safetensors import safe_open

    with verify.translate_errors(contents.path), safe_open(contents.path, framework="pt") as file:
        return {name: file.get_tensor(contents.names[component, name]) for name in contents.components[component]}


def check(contents: Contents, directory: Path) -> None:
    """Compare the names and shapes in a header with what the configurations in `directory` ask for. Raises BadWeights.

    No weights are loaded: the names are converted on tensors without memory.
    """
    import torch

    for component, infos in contents.components.items():
        with verify.translate_errors(contents.path), torch.device("meta"):
            tensors = {name: torch.empty(info.shape) for name, info in infos.items()}
            options = _channels(infos, directory) if component == "transformer" else {}
            expected = _shapes(_model(component, directory, options).state_dict())
            found, unknown = _convert(contents.path, component, tensors, directory)
        _compare(contents.path, directory / component, (_shapes(found), expected), unknown)


def _shapes(tensors: Mapping[str, "torch.Tensor"]) -> dict[str, tuple[int, ...]]:
    # Some versions of transformers write the names of CLIP with this prefix.
    return {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in tensors.items()}


def _channels(tensors: Mapping[str, TensorInfo], directory: Path) -> dict[str, int]:
    """Return the settings of a transformer that its file decides: FLUX.1's variants differ in the channels they take.

    So all variants have the same base.
    """
    config = hub.read_json(directory / "transformer" / "config.json")
    given = config.get("out_channels") or config["in_channels"]
    shapes = [tensors[name].shape for name in _FIRST_LAYER if name in tensors]
    taken = shapes[0][1] if shapes and len(shapes[0]) == 2 else config["in_channels"]
    return {"in_channels": taken, "out_channels": given}


def _model(component: str, directory: Path, options: Mapping[str, int] = NO_OPTIONS) -> Any:
    """Build a component on PyTorch's default device, from its configuration, in which `options` replace settings."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    config = hub.read_json(directory / component / "config.json")
    # If the base is quantized, its configuration says so, but the file's tensors have the shapes of the model.
    config.pop("quantization_config", None)
    config |= options
    if component == "transformer":
        return FluxTransformer2DModel.from_config(config)
    if component == "vae":
        return AutoencoderKL.from_config(config)
    return (
        CLIPTextModel(CLIPTextConfig(**config)) if component == "text_encoder" else T5EncoderModel(T5Config(**config))
    )


def _convert(
    path: Path, component: str, tensors: dict[str, "torch.Tensor"], directory: Path
) -> tuple[Mapping[str, "torch.Tensor"], list[str]]:
    """Return the tensors under diffusers' names as diffusers will convert them, and the names that it leaves out.

    Raises BadWeights for a transformer of another architecture, and if a tensor is missing.
    """
    from diffusers.loaders import single_file_utils

    if component == "vae" and any(name.startswith("encoder.down.") for name in tensors):
        config = hub.read_json(directory / component / "config.json")
        return single_file_utils.convert_ldm_vae_checkpoint(tensors, config), []
    if component != "transformer" or not _has_original_names(path, tensors):
        return tensors, []
    for name, tensor in tensors.items():
        # The converter splits these by FLUX.1's width, whatever the width of the model.
        if ".linear1." in name and len(tensor) != _LINEAR1_ROWS:
            raise BadWeights(
                f"{path}: {file_header.quoted(name)} has {len(tensor)} rows, but FLUX.1 has {_LINEAR1_ROWS}"
            )
    try:
        converted = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(tensors)
    except KeyError as error:
        raise BadWeights(f"{path} lacks {error}, which FLUX.1's transformer has; {hub.REPLACE}") from None
    return converted, list(tensors)


def _has_original_names(path: Path, tensors: dict[str, "torch.Tensor"]) -> bool:
    """Return whether a transformer's tensors have Black Forest Labs' names, or else diffusers'.

    Raises BadWeights for another architecture.
    """
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    found = infer_diffusers_model_type(tensors)
    if found in _ARCHITECTURES or (found == _UNKNOWN and any(name.startswith("double_blocks.") for name in tensors)):
        return True
    if found == _UNKNOWN and any(name.startswith("single_transformer_blocks.") for name in tensors):
        return False
    what = f"it looks like {found}" if found != _UNKNOWN else f"its tensors are named {_shortened(tensors)}"
    raise BadWeights(f"{path} holds no transformer of FLUX.1: {what}; choose another file")


def _shortened(names: Collection[str]) -> str:
    return ", ".join(sorted(name[:100] for name in names)[:3]) or "not at all"


def _compare(
    path: Path,
    component: Path,
    shapes: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]],
    unknown: list[str],
) -> None:
    """Compare the shapes found in a file with those expected. Raises BadWeights."""
    found, expected = shapes
    # T5 has one matrix under two names, and files hold either of them or both.
    tied = set(_TIED) if set(_TIED) & set(found) else set()
    advice = "choose the base that belongs to this file with --base"
    if unknown := [*unknown, *(name for name in found if name not in expected)]:
        raise BadWeights(f"{path} has {len(unknown)} tensors that {component} lacks: {_shortened(unknown)}; {advice}")
    if missing := [name for name in expected if name not in found and name not in tied]:
        raise BadWeights(f"{path} lacks {len(missing)} tensors: {_shortened(missing)}; {advice}")
    for name, shape in found.items():
        if shape != expected[name]:
            raise BadWeights(
                f"{path}: {file_header.quoted(name)} has the shape {list(shape)}, but {component / 'config.json'} asks"
                f" for {list(expected[name])}; {advice}"
            )
