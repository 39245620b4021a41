"""The loading of a FluxPipeline and its placement on the device."""

import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.base import EngineConfig, ExtraWeights, LoadProgress, SingleFile, Weights
from models.loading import conditioning, hub, memory_plans, quantized_files, single_file, verify
from models.loading.devices import device_for, dtype_for, free_memory, type_name
from models.loading.single_file import Contents
from models.loading.specs import REDUX, find_extra_weights

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline

#: Components that are not loaded here. The modules `safety_checker` and `redux` load the first two. The last two belong
#: to IP-Adapters, which are not supported.
NON_PIPELINE_COMPONENTS = ("safety_checker", REDUX.directory, "image_encoder", "feature_extractor")
_MATCH = "use components from the same weights"


def weights_directory(where: Weights) -> Path:
    """Return the directory of weights, for a single file that of its base.

    Weights that are not cached are downloaded first; of a base, only what the file lacks. Raises HubError and
    BadWeights.
    """
    without: Collection[str] = ()
    if isinstance(where, SingleFile):
        without, where = single_file.read(local_file(where)).components, where.base
    return where if isinstance(where, Path) else hub.cached_path(where, without) or hub.pull(where, without)


def local_file(where: SingleFile) -> Path:
    """Return the path of a single file; download it first if it is not cached. Raises HubError."""
    return where.file if isinstance(where.file, Path) else hub.cached_file(where.file) or hub.pull_file(where.file)


def cached_directory(where: Weights) -> Path | None:
    """Return the directory of `weights_directory` without downloading anything; None if something is missing."""
    without: Collection[str] = ()
    if isinstance(where, SingleFile):
        path = where.file if isinstance(where.file, Path) else hub.cached_file(where.file)
        if path is None:
            return None
        without, where = single_file.read(path).components, where.base
    return where if isinstance(where, Path) else hub.cached_path(where, without)


def contents_of(where: Weights) -> Contents | None:
    """Return what a single file holds; None for other weights. Raises HubError and BadWeights."""
    return single_file.read(local_file(where)) if isinstance(where, SingleFile) else None


def load_pipeline(config: EngineConfig, fp8_failure: str = "") -> "tuple[FluxPipeline, memory_plans.Plan]":
    """Load a pipeline and place it by a memory plan; return both.

    `fp8_failure` says why products in fp8 do not compile on the device, or is empty. Raises OSError, also for malformed
    weights, memory_plans.PlanFailed, and memory_plans.DoesNotFit if memory runs out.

    Only safetensors files are read, and no code from the directory runs. With the plan "resident", each component goes
    to the device before the next is loaded, so the host never holds a copy of all components.
    """
    import torch

    _silence_libraries()
    if config.weights is None:
        raise ValueError("a FLUX pipeline needs weights")
    directory, device = weights_directory(config.weights), device_for(config.device)
    contents = verify_weights(config.weights, directory)
    without = contents.components if contents else ()
    quantized_files.check(directory, device, type_name(dtype_of(config)), config.kernels_allow, without)
    sizes = _sizes(config, directory)
    target = memory_plans.Target(device, config.is_eager, fp8_failure, quantization_of(config.weights))
    plan = memory_plans.choose(_allowed(config), sizes, free_memory(device), target)
    try:
        return _load(config, directory, sizes, plan, device, contents), plan
    except torch.OutOfMemoryError as error:
        # Only the message: the traceback would keep the tensors of the components alive.
        reason = str(error).partition(". ")[0]
    raise memory_plans.DoesNotFit(plan, reason)


def _allowed(config: EngineConfig) -> Sequence[memory_plans.Plan]:
    return memory_plans.allowed(config.memory, config.quantize)


def quantization_of(where: Weights | None) -> str:
    """Return how a transformer's weights are quantized in their files, such as "GGUF Q4_0"; "" if they are not.

    Raises HubError and BadWeights.
    """
    if contents := contents_of(where) if where else None:
        return contents.description if contents.is_quantized else ""
    directory = cached_directory(where) if where else None
    return quantized_files.description(directory / "transformer") if directory else ""


def form_of(where: Weights | None) -> str:
    """Return the form of a transformer's weights in their files, such as "safetensors" or "GGUF Q4_0".

    Raises HubError and BadWeights.
    """
    contents = contents_of(where) if where else None
    return contents.description if contents else quantization_of(where) or "safetensors"


def verify_weights(where: Weights, directory: Path) -> Contents | None:
    """Check all files of weights before anything is loaded, also a single file; return what the single file holds.

    `directory` is that of `weights_directory`. Raises BadWeights.
    """
    contents = contents_of(where)
    verify.verify_pipeline(directory, NON_PIPELINE_COMPONENTS, contents.components if contents else ())
    if contents:
        single_file.check(contents, directory)
    return contents


def _load(
    config: EngineConfig,
    directory: Path,
    sizes: Mapping[str, int],
    plan: memory_plans.Plan,
    device: str,
    contents: Contents | None = None,
) -> "FluxPipeline":
    from diffusers import FluxPipeline

    dtype = dtype_of(config)
    parts, loaded_bytes = {}, 0
    total_bytes = sum(size for name, size in sizes.items() if name in verify.CLASSES)
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if name in verify.CLASSES:
            config.report(LoadProgress(name, loaded_bytes, total_bytes))
            if contents and name in contents.components:
                parts[name] = single_file.load(contents, name, directory, dtype)
            else:
                parts[name] = _load_part(directory, name, dtype)
            if plan.is_resident:
                parts[name].to(device)
            loaded_bytes += size
    small = {name: _load_part(directory, name, dtype) for name in verify.CLASSES if name not in parts}
    with verify.translate_errors(directory):
        pipeline = FluxPipeline(**parts, **small)
        _check_fit(directory, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return plan.place(pipeline, device)


def sizes_in_memory(
    where: Weights, directory: Path, needed: Collection[ExtraWeights], itemsize: int = 2
) -> dict[str, int]:
    """Return the bytes of each component in memory, and of the extra weights that its engine can use.

    `needed` are those that the engine's endpoints need; others use Redux too if it is installed. `itemsize` is the
    bytes of a number in the type of the computation. Files in directories are taken to be in bf16, unless they are
    quantized; the header of a single file says its types.
    """
    sizes = hub.sizes(directory)
    for weights in {REDUX, *needed}:
        if found := find_extra_weights(where, weights):
            sizes[weights.directory] = hub.size(found)
    # Quantized weights stay as they are, whatever the type of the computation.
    quantized = [name for name in sizes if quantized_files.description(directory / name)]
    sizes = {name: size if name in quantized else size * itemsize // 2 for name, size in sizes.items()}
    if contents := contents_of(where):
        sizes |= {name: contents.num_bytes(name, itemsize) for name in contents.components}
    return sizes


def _sizes(config: EngineConfig, directory: Path) -> dict[str, int]:
    assert config.weights
    return sizes_in_memory(config.weights, directory, config.extra_weights, dtype_of(config).itemsize)


def _load_part(directory: Path, name: str, dtype: "torch.dtype") -> Any:
    """Load a component with its class in model_index.json, which is already verified. Raises hub.BadWeights."""
    from torch.nn import Module

    library, class_name = hub.read_model_index(directory)[name]
    # Without this option, some classes of transformers ask on the terminal whether code from the directory may run.
    options = {"trust_remote_code": False} if library == "transformers" else {}
    with verify.translate_errors(directory / name):
        kind = getattr(importlib.import_module(library), class_name)
        if issubclass(kind, Module):
            return verify.load_complete(kind, directory / name, dtype=dtype, **options)
        return kind.from_pretrained(directory / name, local_files_only=True, **options)


def _check_fit(directory: Path, pipeline: Any) -> None:
    """Check that the components fit each other: otherwise, every request would fail. Raises hub.BadWeights."""
    clip, t5 = pipeline.text_encoder.config, pipeline.text_encoder_2.config
    flow = pipeline.transformer.config
    taken = conditioning.channels(pipeline)
    widths = {
        "text_encoder": (clip.hidden_size, flow.pooled_projection_dim),
        "text_encoder_2": (t5.d_model, flow.joint_attention_dim),
        "vae": (flow.in_channels if flow.in_channels in taken.values() else taken["plain"], flow.in_channels),
    }
    for name, (width, expected) in widths.items():
        if width != expected:
            raise hub.BadWeights(
                f"{directory / name} gives {width} channels, but the transformer takes {expected}; {_MATCH}"
            )
    # A token id or position that a text encoder does not know is an index out of range, after which the GPU is lost.
    counts = {
        "tokenizer": ("token ids", max(pipeline.tokenizer.get_vocab().values()) + 1, clip.vocab_size),
        "tokenizer_2": ("token ids", max(pipeline.tokenizer_2.get_vocab().values()) + 1, t5.vocab_size),
        "tokenizer/tokenizer_config.json": (
            "positions",
            pipeline.tokenizer.model_max_length,
            clip.max_position_embeddings,
        ),
    }
    for name, (unit, count, limit) in counts.items():
        if count > limit:
            raise hub.BadWeights(f"{directory / name} has {count} {unit}, but its text encoder has {limit}; {_MATCH}")


def _silence_libraries() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # diffusers' warning about a long prompt contains the prompt, which must not be logged.
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def has_room(config: EngineConfig) -> bool:
    """Return whether the first plan that the configuration allows fits into the free memory.

    Return True if the weights are not downloaded yet.
    """
    directory = cached_directory(config.weights) if config.weights else None
    if directory is None:
        return True
    sizes = _sizes(config, directory)
    return memory_plans.has_room(_allowed(config), sizes, free_memory(device_for(config.device)))


def dtype_of(config: EngineConfig) -> "torch.dtype":
    """Return the number type for the weights, after downloading them if they are not cached. Raises OSError."""
    if config.weights is None:
        return dtype_for(config.dtype, device_for(config.device))
    sizes = sizes_in_memory(config.weights, weights_directory(config.weights), config.extra_weights)
    return dtype_for(config.dtype, device_for(config.device), sum(sizes.values()))
