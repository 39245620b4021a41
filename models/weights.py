"""Where weights come from: the demo, a folder in diffusers layout, or the hub."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import cpu, hub, memory, trust
from models.base import AddOn, Loading, Model, Placement

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline

DEMO = Path(__file__).parent / "demo"
DEFAULT_ENDPOINT = "fal-ai/flux/dev"
#: What FLUX.1 [dev] reads a picture with instead of a prompt.
REDUX = AddOn("redux", "black-forest-labs/FLUX.1-Redux-dev")
#: Loaded by `models.safety` and `models.redux`, or by nobody: what FluxPipeline has for IP-Adapters, not served here.
NOT_OF_THE_PIPELINE = ("safety_checker", REDUX.folder, "image_encoder", "feature_extractor")
_MATCH = "take all parts from the same weights"


def assign(specs: Sequence[str], models: dict[str, Model]) -> dict[str, str | Path | None]:
    """Say which weights each served endpoint runs on.

    A spec is `demo`, a hub id, a folder (for fal-ai/flux/dev) or `ENDPOINT=FOLDER-or-hub-id`; models that need
    no weights are always served. Raises ValueError with every problem, a line each.
    """
    assigned: dict[str, str | Path | None] = {}
    problems: list[str] = []
    for spec in specs:
        try:
            assigned.update(_assign_one(spec, models))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return {**assigned, **{model.endpoint: None for model in models.values() if not model.weights}}


def _assign_one(spec: str, models: dict[str, Model]) -> dict[str, str | Path]:
    if spec == "demo":
        return {model.endpoint: DEMO for model in models.values() if model.weights and _has_all(model, DEMO)}
    endpoint, separator, rest = spec.partition("=")
    if separator:
        if endpoint not in models:
            raise ValueError(f"{spec}: {endpoint} is not an endpoint here; there are {', '.join(sorted(models))}")
        where = place(rest)
        if not _has_all(models[endpoint], where):
            raise ValueError(f"{spec}: {endpoint} needs {_lacking(models[endpoint], where)} too")
        return {endpoint: where}
    where = place(spec)
    if isinstance(where, Path):
        return {DEFAULT_ENDPOINT: where}
    served = [model.endpoint for model in models.values() if where in model.weights]
    if not served:
        raise ValueError(f"{spec}: no endpoint is known to run on it; say ENDPOINT={spec}")
    return {endpoint: where for endpoint in served if _has_all(models[endpoint], where)}


def installed(where: str | Path, add_on: AddOn) -> Path | None:
    """Where an add-on to some weights lies: weights from a folder bring it, and those from the hub find it there."""
    if isinstance(where, Path):
        return where / add_on.folder if (where / add_on.folder).is_dir() else None
    return hub.locate(add_on.hub_id)


def _has_all(model: Model, where: str | Path) -> bool:
    return model.add_on is None or installed(where, model.add_on) is not None


def _lacking(model: Model, where: str | Path) -> str:
    assert model.add_on is not None
    if isinstance(where, Path):
        return f"the folder {model.add_on.folder} in {where}, with {model.add_on.hub_id}"
    return f"{model.add_on.hub_id}; `flux-server pull {model.add_on.hub_id}` brings it"


def place(spec: str) -> str | Path:
    """A folder that has a pipeline in it, or a hub id. Raises ValueError, with the reason, for anything else."""
    if spec == "demo":
        return DEMO
    path = Path(spec).expanduser()
    if (path / "model_index.json").is_file():
        return path.resolve()
    if path.suffix in {".safetensors", ".gguf", ".ckpt"}:
        raise ValueError(f"{spec}: single-file checkpoints are not supported; give a folder in diffusers layout")
    if path.exists() or spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        raise ValueError(f"{spec}: not a folder in diffusers layout (no model_index.json) and not a hub id")
    return spec


def folder_of(where: str | Path) -> Path:
    """The folder of weights: given, or pulled from the hub if it was not pulled before. Raises hub.HubError."""
    if isinstance(where, Path):
        return where
    return hub.locate(where) or hub.pull(where)


def load(placement: Placement) -> "tuple[FluxPipeline, memory.Plan]":
    """The pipeline in its type, placed as the plan says; only safetensors, no code from the weights. Raises OSError.

    One large part after the other goes to the device, so the host never holds all of them beside the device's.
    """
    from diffusers import FluxPipeline

    _keep_quiet()
    if placement.weights is None:
        raise ValueError("a FLUX pipeline needs weights")
    folder, device = folder_of(placement.weights), device_for(placement.device)
    trust.check_pipeline(folder, NOT_OF_THE_PIPELINE)
    dtype = dtype_of(placement)
    sizes = _sizes(placement.weights, folder, dtype)
    plan = memory.choose(placement.memory, sizes, free_memory(device), device=device)
    parts, loaded = {}, 0
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if name in trust.CLASSES:
            placement.report(Loading(name, loaded, sum(sizes.values())))
            parts[name] = _load_part(folder, name, dtype)
            if plan.is_whole:
                parts[name].to(device)
            loaded += size
    small = {name: _load_part(folder, name, dtype) for name in trust.CLASSES if name not in parts}
    with trust.explained(folder):
        pipeline = FluxPipeline(**parts, **small)
        _check_fit(folder, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return plan.place(pipeline, device), plan


def sizes_on_disk(where: str | Path, folder: Path) -> dict[str, int]:
    """Bytes of the weights of each component, and of what is installed beside them, as they are stored: in bf16."""
    beside = installed(where, REDUX)
    return hub.sizes(folder) | ({REDUX.folder: hub.size(beside)} if beside else {})


def _sizes(where: str | Path, folder: Path, dtype: "torch.dtype") -> dict[str, int]:
    """The same in memory, where float32 takes twice as much."""
    return {name: size * dtype.itemsize // 2 for name, size in sizes_on_disk(where, folder).items()}


def _load_part(folder: Path, name: str, dtype: "torch.dtype") -> Any:
    """A part of the class that model_index.json names, which was checked before. Raises hub.BadWeights."""
    from torch.nn import Module

    library, class_name = hub.index(folder)[name]
    # Without it, some of transformers' classes ask on the terminal whether code from the folder may run.
    options = {"trust_remote_code": False} if library == "transformers" else {}
    with trust.explained(folder / name):
        kind = getattr(importlib.import_module(library), class_name)
        if issubclass(kind, Module):
            return trust.whole(kind, folder / name, dtype=dtype, **options)
        return kind.from_pretrained(folder / name, local_files_only=True, **options)


def _check_fit(folder: Path, pipeline: Any) -> None:
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
            raise hub.BadWeights(f"{folder / name} gives {given} channels, and the transformer takes {taken}; {_MATCH}")
    # On a GPU an index out of range is the end of the process.
    lengths = {
        "tokenizer": (max(pipeline.tokenizer.get_vocab().values()) + 1, clip.vocab_size),
        "tokenizer_2": (max(pipeline.tokenizer_2.get_vocab().values()) + 1, t5.vocab_size),
        "tokenizer/tokenizer_config.json": (pipeline.tokenizer.model_max_length, clip.max_position_embeddings),
    }
    for name, (given, limit) in lengths.items():
        if given > limit:
            raise hub.BadWeights(f"{folder / name} counts to {given}, and its text encoder to {limit}; {_MATCH}")


def _keep_quiet() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # diffusers warns of a long prompt by logging the prompt itself.
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def free_memory(device: str) -> int:
    """Bytes of the device that can still be taken, by this process's own limit too; on the CPU, of the machine."""
    import psutil
    import torch

    if device == "cpu":
        return int(psutil.virtual_memory().available)
    free, total = torch.cuda.mem_get_info()
    limit = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    return int(min(free, limit))


def has_room(placement: Placement) -> bool:
    """Whether all of these weights fit on the device beside what is there. Weights not pulled yet are said to."""
    where = placement.weights or ""
    folder = where if isinstance(where, Path) else hub.locate(where)
    if folder is None:
        return True
    sizes = _sizes(where, folder, dtype_of(placement))
    return memory.is_whole(sizes, free_memory(device_for(placement.device)))


def device_for(name: str) -> str:
    """The device to use for "auto", "cuda" or "cpu". Raises OSError where it cannot be used."""
    import torch

    if torch.version.hip:
        raise OSError("ROCm builds of PyTorch are not supported: nobody has run this on one yet")
    if name == "cuda" and not torch.cuda.is_available():
        why = "finds no usable GPU or driver" if torch.version.cuda else "is a build without CUDA"
        raise OSError(f"--device cuda: PyTorch {torch.__version__} {why}")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(placement: Placement) -> "torch.dtype":
    """The type that these weights are computed in. Raises OSError where the device cannot, and hub.HubError."""
    if placement.weights is None:
        return dtype_for(placement.dtype, device_for(placement.device))
    sizes = sizes_on_disk(placement.weights, folder_of(placement.weights))
    return dtype_for(placement.dtype, device_for(placement.device), sum(sizes.values()))


def is_emulated(placement: Placement, dtype: "torch.dtype") -> bool:
    """Whether bfloat16 was chosen, on a CPU that is slow at it, because float32 did not fit."""
    import torch

    return placement.dtype == "auto" and dtype == torch.bfloat16 and not cpu.has_bfloat16()


def type_name(dtype: "torch.dtype") -> str:
    """PyTorch's own, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_for(name: str, device: str, num_bytes: int = 0) -> "torch.dtype":
    """The type for "auto", "bfloat16" or "float32", and `num_bytes` of weights stored in bf16.

    A GPU computes in bf16. A CPU computes in what its flags say it is fast at, and in float32 only where the weights
    fit into the machine's memory at twice their size: in bf16 they are mapped from their files. Raises OSError.
    """
    import psutil
    import torch

    if device == "cuda":
        if name == "float32":
            raise OSError("--dtype float32 is for CPUs; on a GPU only bfloat16 is supported")
        return torch.bfloat16
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    fits = 2 * num_bytes <= psutil.virtual_memory().total
    return torch.float32 if fits and not cpu.has_bfloat16() else torch.bfloat16
