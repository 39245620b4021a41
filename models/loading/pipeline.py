"""Loads a FluxPipeline and places it on its device."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.base import EngineConfig, LoadProgress
from models.loading import hub, memory_plans, verify
from models.loading.devices import device_for, dtype_for, free_memory
from models.loading.specs import REDUX, find_extra_weights

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline

#: Loaded by `safety_checker` and `redux`, or by no module: what FluxPipeline has for IP-Adapters, not served here.
NON_PIPELINE_COMPONENTS = ("safety_checker", REDUX.directory, "image_encoder", "feature_extractor")
_MATCH = "take all parts from the same weights"


def folder_of(where: str | Path) -> Path:
    """The folder of weights: given, or pulled from the hub if it was not pulled before. Raises hub.HubError."""
    if isinstance(where, Path):
        return where
    return hub.cached_path(where) or hub.pull(where)


def load_pipeline(config: EngineConfig) -> "tuple[FluxPipeline, memory_plans.Plan]":
    """The pipeline in its type, placed as the plan says; only safetensors, no code from the weights. Raises OSError.

    One large part after the other goes to the device, so the host never holds all of them beside the device's.
    """
    from diffusers import FluxPipeline

    _silence_libraries()
    if config.weights is None:
        raise ValueError("a FLUX pipeline needs weights")
    directory, device = folder_of(config.weights), device_for(config.device)
    verify.verify_pipeline(directory, NON_PIPELINE_COMPONENTS)
    dtype = dtype_of(config)
    sizes = _sizes(config.weights, directory, dtype)
    plan = memory_plans.choose(config.memory, sizes, free_memory(device), device=device)
    parts, loaded = {}, 0
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if name in verify.CLASSES:
            config.report(LoadProgress(name, loaded, sum(sizes.values())))
            parts[name] = _load_part(directory, name, dtype)
            if plan.is_resident:
                parts[name].to(device)
            loaded += size
    small = {name: _load_part(directory, name, dtype) for name in verify.CLASSES if name not in parts}
    with verify.translate_errors(directory):
        pipeline = FluxPipeline(**parts, **small)
        _check_fit(directory, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return plan.apply(pipeline, device), plan


def sizes_on_disk(where: str | Path, directory: Path) -> dict[str, int]:
    """Bytes of the weights of each component, and of what is installed beside them, as they are stored: in bf16."""
    redux = find_extra_weights(where, REDUX)
    return hub.sizes(directory) | ({REDUX.directory: hub.size(redux)} if redux else {})


def _sizes(where: str | Path, directory: Path, dtype: "torch.dtype") -> dict[str, int]:
    """The same in memory, where float32 takes twice as much."""
    return {name: size * dtype.itemsize // 2 for name, size in sizes_on_disk(where, directory).items()}


def _load_part(directory: Path, name: str, dtype: "torch.dtype") -> Any:
    """A part of the class that model_index.json names, which was checked before. Raises hub.BadWeights."""
    from torch.nn import Module

    library, class_name = hub.read_model_index(directory)[name]
    # Without it, some of transformers' classes ask on the terminal whether code from the folder may run.
    options = {"trust_remote_code": False} if library == "transformers" else {}
    with verify.translate_errors(directory / name):
        kind = getattr(importlib.import_module(library), class_name)
        if issubclass(kind, Module):
            return verify.load_complete(kind, directory / name, dtype=dtype, **options)
        return kind.from_pretrained(directory / name, local_files_only=True, **options)


def _check_fit(directory: Path, pipeline: Any) -> None:
    """Parts that do not fit each other are whole, and every picture would fail. Raises hub.BadWeights."""
    clip, t5 = pipeline.text_encoder.config, pipeline.text_encoder_2.config
    flow, vae = pipeline.transformer.config, pipeline.vae.config
    widths = {
        "text_encoder": (clip.hidden_size, flow.pooled_projection_dim),
        "text_encoder_2": (t5.d_model, flow.joint_attention_dim),
        # Four latents are a token.
        "vae": (4 * vae.latent_channels, flow.in_channels),
    }
    for name, (given, taken) in widths.items():
        if given != taken:
            raise hub.BadWeights(
                f"{directory / name} gives {given} channels, and the transformer takes {taken}; {_MATCH}"
            )
    # On a GPU an index out of range is the end of the process.
    lengths = {
        "tokenizer": (max(pipeline.tokenizer.get_vocab().values()) + 1, clip.vocab_size),
        "tokenizer_2": (max(pipeline.tokenizer_2.get_vocab().values()) + 1, t5.vocab_size),
        "tokenizer/tokenizer_config.json": (pipeline.tokenizer.model_max_length, clip.max_position_embeddings),
    }
    for name, (given, limit) in lengths.items():
        if given > limit:
            raise hub.BadWeights(f"{directory / name} counts to {given}, and its text encoder to {limit}; {_MATCH}")


def _silence_libraries() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # diffusers warns of a long prompt by logging the prompt itself.
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def has_room(config: EngineConfig) -> bool:
    """Whether all of these weights fit on the device beside what is there. Weights not pulled yet are said to."""
    where = config.weights or ""
    directory = where if isinstance(where, Path) else hub.cached_path(where)
    if directory is None:
        return True
    sizes = _sizes(where, directory, dtype_of(config))
    return memory_plans.fits_resident(sizes, free_memory(device_for(config.device)))


def dtype_of(config: EngineConfig) -> "torch.dtype":
    """The type that these weights are computed in. Raises OSError where the device cannot, and hub.HubError."""
    if config.weights is None:
        return dtype_for(config.dtype, device_for(config.device))
    sizes = sizes_on_disk(config.weights, folder_of(config.weights))
    return dtype_for(config.dtype, device_for(config.device), sum(sizes.values()))
