"""The verification of untrusted weights: no code in them runs, and nothing outside their directory is read."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from models.loading import hub
from models.loading.hub import REPLACE, RESTORE, BadWeights

#: The components of a FLUX pipeline and the allowed classes of each. Without this list, the libraries would load any
#: class by name, and classes such as AutoModel load whatever the directory names. Each tokenizer has two names.
CLASSES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "scheduler": (("diffusers", "FlowMatchEulerDiscreteScheduler"),),
    "text_encoder": (("transformers", "CLIPTextModel"),),
    "text_encoder_2": (("transformers", "T5EncoderModel"),),
    "tokenizer": (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")),
    "tokenizer_2": (("transformers", "T5TokenizerFast"), ("transformers", "T5Tokenizer")),
    "transformer": (("diffusers", "FluxTransformer2DModel"),),
    "vae": (("diffusers", "AutoencoderKL"), ("diffusers", "AutoencoderTiny")),
}
#: Keys in JSON files that make the libraries load code, from the weights' directory or, for attention, from the hub.
_CODE = ("auto_map", "attn_implementation", "_attn_implementation")
#: The only directory whose Python files are allowed: they are this project's, and the demo weights lie among them.
_MODELS_DIR = Path(__file__).resolve().parent.parent
#: The longest header that the safetensors format allows, so that no valid file is refused. FLUX.1's headers have some
#: 100 KB. A lower limit is not needed, because the operator chooses the weights, and each header is read once.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
#: The maximum number of tensor names, and of characters of a library's message, in an error message.
_MAX_NAMES, _MAX_CHARACTERS = 3, 400


def verify(directory: Path, without: Collection[str] = ()) -> None:
    """Check all files of a model or pipeline, before any of them is loaded. Raises BadWeights.

    The components in `without` may lack shards.
    """
    _refuse_links(directory)
    for path in sorted(directory.rglob("*")):
        if path.name == "adapter_config.json":
            # This file can name another directory, which transformers would then load.
            raise BadWeights(
                f"{path}: an adapter is not part of a pipeline; remove the file, and name LoRA weights in requests"
            )
        if path.suffix == ".py" and not path.resolve().is_relative_to(_MODELS_DIR):
            raise BadWeights(f"{path} is code, but weights must not contain code; remove the file")
        if path.suffix == ".json":
            _refuse_code(path)
        if path.name.endswith(".safetensors.index.json") and path.parent.name not in without:
            _refuse_shards(path)
        if path.suffix == ".safetensors":
            _check_tensors(path)


def verify_pipeline(directory: Path, exclude: Collection[str], without: Collection[str] = ()) -> None:
    """Check all files, and all entries of model_index.json except those in `exclude`. Raises BadWeights.

    Components in `without` need a configuration only: their weights come from elsewhere.
    """
    verify(directory, without)
    index, named = directory / "model_index.json", hub.read_model_index(directory)
    for name, (library, kind) in named.items():
        if name in exclude:
            continue
        if name not in CLASSES:
            raise BadWeights(f"{index}: {name} is of {library}, and is not part of a FLUX pipeline; remove the entry")
        if (library, kind) not in CLASSES[name]:
            allowed = " or ".join(".".join(each) for each in CLASSES[name])
            raise BadWeights(f"{index}: {name} is of {library}.{kind}, but only {allowed} is allowed; {REPLACE}")
    if missing := [name for name in CLASSES if name not in named]:
        raise BadWeights(f"{index} names no library and class for {', '.join(missing)}; {REPLACE}")
    if missing := [name for name in hub.missing_components(directory, without) if name not in exclude]:
        problem = "is missing, or lacks its configuration or a safetensors file"
        raise BadWeights(f"{directory / missing[0]} {problem}; {RESTORE}")


@contextmanager
def translate_errors(directory: Path) -> Iterator[None]:
    """Translate errors of the block, which loads files of the directory, into BadWeights.

    Some errors pass unchanged: out of memory, a lost device, and errors of the operating system, such as a denied
    permission.
    """
    import torch

    before = torch.get_default_dtype()
    try:
        yield
    except (BadWeights, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        message = " ".join(str(error).split())[:_MAX_CHARACTERS]
        raise BadWeights(f"{directory} cannot be loaded: {type(error).__name__}: {message}; {RESTORE}") from error
    finally:
        # diffusers changes PyTorch's default number type while it builds a model, and does not restore it on failure.
        torch.set_default_dtype(before)


def load_complete(kind: Any, directory: Path, **options: Any) -> Any:
    """Load a module of the class `kind` in evaluation mode.

    Raises BadWeights, also if tensors are missing or have wrong shapes. The libraries would replace such tensors by
    random numbers.
    """
    # Let the libraries ignore wrong shapes, so that the check below can name the tensors.
    options |= {"use_safetensors": True, "local_files_only": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with translate_errors(directory):
        model, info = kind.from_pretrained(directory, **options)
        wrong = {
            "lacks": info["missing_keys"],
            "has other shapes than its config.json for": [name for name, *_ in info["mismatched_keys"]],
        }
        for message, names in wrong.items():
            if names:
                raise BadWeights(f"{directory} {message} {shortened(names)}; {RESTORE}")
        return model.eval()


def shortened(names: Collection[str]) -> str:
    """Describe tensors by their number and the first names, for an error message."""
    return f"{len(names)} of the model's tensors: {', '.join(sorted(names)[:_MAX_NAMES])}"


def _refuse_links(directory: Path) -> None:
    """Refuse links that lead out of the directory, and special files such as pipes, whose reading could block.

    If the directory is in the hub's cache, links to the blobs of the cache are allowed. Raises BadWeights.
    """
    here = directory.resolve()
    blobs = [parent.parent / "blobs" for parent in here.parents if parent.name == "snapshots"]
    for path in directory.rglob("*"):
        # Use os.path.realpath, because Path.resolve raises an error for circular links.
        target = Path(os.path.realpath(path))
        # A linked directory must be inside: rglob does not follow links, so files elsewhere would not be checked.
        inside = [here] if target.is_dir() else [here, *blobs]
        if path.is_symlink() and not any(target.is_relative_to(place) for place in inside):
            raise BadWeights(
                f"{path} links to {target}, outside the directory of the weights; replace the link with a copy"
            )
        if not (path.is_file() or path.is_dir()):
            raise BadWeights(f"{path} is neither a file nor a directory; {REPLACE}")


def _refuse_code(path: Path) -> None:
    """Refuse a JSON file that names code, at any depth. Raises BadWeights.

    A key in _CODE whose value is a number is allowed: it is a token in a vocabulary.
    """
    waiting: list[Any] = [hub.read_json(path)]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            for name in _CODE:
                if isinstance(each.get(name), str | list | dict):
                    raise BadWeights(
                        f"{path} names code under {name}, but weights must not contain code; remove the entry"
                    )
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _refuse_shards(index: Path) -> None:
    for name in sorted(hub.shards(index)):
        if not (index.parent / name).is_file():
            raise BadWeights(f"{index} names {name}, which is missing; {REPLACE}")


def _check_tensors(path: Path) -> None:
    """Check the header of a safetensors file, and its length before parsing it. Raises BadWeights."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if length > num_bytes - _LENGTH_BYTES:
        raise BadWeights(
            f"{path} is not a safetensors file, or was cut off: its header is longer than the file; {REPLACE}"
        )
    if length > _MAX_HEADER_BYTES:
        raise BadWeights(f"{path} has a header of {length} bytes, but only {_MAX_HEADER_BYTES} are allowed; {REPLACE}")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise BadWeights(f"{path} is not a complete safetensors file: {error}; {REPLACE}") from None
