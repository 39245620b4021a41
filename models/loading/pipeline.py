"""The loading of a FluxPipeline and its placement on the device."""

import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.base import EngineConfig, ExtraWeights, LoadProgress
from models.loading import conditioning, hub, memory_plans, verify
from models.loading.devices import device_for, dtype_for, free_memory
from models.loading.specs import REDUX, find_extra_weights

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline

#: Components that are not loaded here. The modules `safety_checker` and `redux` load the first two. The last two belong
#: to IP-Adapters, which are not supported.
NON_PIPELINE_COMPONENTS = ("safety_checker", REDUX.directory, "image_encoder", "feature_extractor")
_MATCH = "use components from the same weights"


def weights_directory(where: str | Path) -> Path:
    """Return the directory of weights; download them first if they are not cached. Raises HubError and BadWeights."""
    if isinstance(where, Path):
        return where
    return hub.cached_path(where) or hub.pull(where)


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
    verify.verify_pipeline(directory, NON_PIPELINE_COMPONENTS)
    sizes = _sizes(config, directory)
    target = memory_plans.Target(device, config.is_eager, fp8_failure)
    plan = memory_plans.choose(_allowed(config), sizes, free_memory(device), target)
    try:
        return _load(config, directory, sizes, plan, device), plan
    except torch.OutOfMemoryError as error:
        # Only the message: the traceback would keep the tensors of the components alive.
        reason = str(error).partition(". ")[0]
    raise memory_plans.DoesNotFit(plan, reason)


def _allowed(config: EngineConfig) -> Sequence[memory_plans.Plan]:
    return memory_plans.allowed(config.memory, config.quantize)


def _load(
    config: EngineConfig, directory: Path, sizes: Mapping[str, int], plan: memory_plans.Plan, device: str
) -> "FluxPipeline":
    from diffusers import FluxPipeline

    dtype = dtype_of(config)
    parts, loaded_bytes = {}, 0
    total_bytes = sum(size for name, size in sizes.items() if name in verify.CLASSES)
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if name in verify.CLASSES:
            config.report(LoadProgress(name, loaded_bytes, total_bytes))
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


def sizes_on_disk(where: str | Path, directory: Path, needed: Collection[ExtraWeights]) -> dict[str, int]:
    """Return the bytes of the weight files of each component, and of the extra weights that its engine can use.

    `needed` are those that the engine's endpoints need; others use Redux too if it is installed.
    """
    sizes = hub.sizes(directory)
    for weights in {REDUX, *needed}:
        if found := find_extra_weights(where, weights):
            sizes[weights.directory] = hub.size(found)
    return sizes


def _sizes(config: EngineConfig, directory: Path) -> dict[str, int]:
    """Return the bytes of each component in memory. Weight files are in bf16, so float32 takes twice their size."""
    assert config.weights
    on_disk = sizes_on_disk(config.weights, directory, config.extra_weights)
    dtype = dtype_of(config)
    return {name: size * dtype.itemsize // 2 for name, size in on_disk.items()}


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
    where = config.weights or ""
    directory = where if isinstance(where, Path) else hub.cached_path(where)
    if directory is None:
        return True
    sizes = _sizes(config, directory)
    return memory_plans.has_room(_allowed(config), sizes, free_memory(device_for(config.device)))


def dtype_of(config: EngineConfig) -> "torch.dtype":
    """Return the number type for the weights, after downloading them if they are not cached. Raises OSError."""
    if config.weights is None:
        return dtype_for(config.dtype, device_for(config.device))
    sizes = sizes_on_disk(config.weights, weights_directory(config.weights), config.extra_weights)
    return dtype_for(config.dtype, device_for(config.device), sum(sizes.values()))
