"""Weights from strangers: none of their code runs, nothing outside of their folder is read, what is wrong is said."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from models.loading import hub
from models.loading.hub import REPLACE, BadWeights

#: The parts of a FLUX pipeline, and the classes that each may be of: by name alone a library would load any other,
#: and classes such as AutoModel load what the folder names. A tokenizer's class has two names.
CLASSES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "scheduler": (("diffusers", "FlowMatchEulerDiscreteScheduler"),),
    "text_encoder": (("transformers", "CLIPTextModel"),),
    "text_encoder_2": (("transformers", "T5EncoderModel"),),
    "tokenizer": (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")),
    "tokenizer_2": (("transformers", "T5TokenizerFast"), ("transformers", "T5Tokenizer")),
    "transformer": (("diffusers", "FluxTransformer2DModel"),),
    "vae": (("diffusers", "AutoencoderKL"), ("diffusers", "AutoencoderTiny")),
}
#: What makes the libraries look for code: beside the weights, or, for attention, on the hub.
_CODE = ("auto_map", "attn_implementation", "_attn_implementation")
#: Our own code lies around the demo weights.
_MODELS_DIR = Path(__file__).resolve().parent.parent
#: Of a safetensors file: the format's own limit, so that nothing valid is refused. FLUX.1's headers take some 100 KB,
#: but weights are the operator's choice, and are read once.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
#: How many tensors, and how many characters of a library's words, an error has.
_NAMED, _WORDS = 3, 400


def verify(directory: Path) -> None:
    """Judge the files of a model or a pipeline, before anything of them is loaded. Raises BadWeights."""
    _refuse_links(directory)
    for path in sorted(directory.rglob("*")):
        if path.name == "adapter_config.json":
            # transformers would load the folder that it names, in place of this one.
            raise BadWeights(f"{path}: an adapter is no part of a pipeline; LoRA weights come with a request")
        if path.suffix == ".py" and not path.resolve().is_relative_to(_MODELS_DIR):
            raise BadWeights(f"{path} is code, and none comes with weights; take the file away")
        if path.suffix == ".json":
            _refuse_code(path)
        if path.name.endswith(".safetensors.index.json"):
            _refuse_shards(path)
        if path.suffix == ".safetensors":
            _check_tensors(path)


def verify_pipeline(directory: Path, exclude: Collection[str]) -> None:
    """And what model_index.json names, but for what is `apart`: loaded without its word. Raises BadWeights."""
    verify(directory)
    index, named = directory / "model_index.json", hub.read_model_index(directory)
    for name, (library, kind) in named.items():
        if name in exclude:
            continue
        if name not in CLASSES:
            raise BadWeights(f"{index}: {name} is of {library}, and is no part of a FLUX pipeline; take the entry out")
        if (library, kind) not in CLASSES[name]:
            known = " or ".join(".".join(each) for each in CLASSES[name])
            raise BadWeights(f"{index}: {name} is of {library}.{kind}, and only {known} is loaded; {REPLACE}")
    if lacking := [name for name in CLASSES if name not in named]:
        raise BadWeights(f"{index} names no library and class for {', '.join(lacking)}; {REPLACE}")
    if lacking := [name for name in hub.missing_components(directory) if name not in exclude]:
        what = "is not there, or lacks its configuration or its safetensors"
        raise BadWeights(f"{directory / lacking[0]} {what}; put the original folder of the weights in its place")


@contextmanager
def translate_errors(directory: Path) -> Iterator[None]:
    """What the libraries raise over a folder, whatever it is, as BadWeights that names the folder.

    What is no fault of the folder passes: memory that ran out, a device that is lost, a file that may not be read.
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
        message = " ".join(str(error).split())[:_WORDS]
        raise BadWeights(f"{directory} cannot be loaded: {type(error).__name__}: {message}; {REPLACE}") from error
    finally:
        # diffusers changes it while it builds a model, and leaves it so when that fails.
        torch.set_default_dtype(before)


def load_complete(kind: Any, directory: Path, **options: Any) -> Any:
    """A module of this class with all of its weights from the folder, for inference.

    Raises BadWeights, also for tensors that lack or have other shapes: in their place would be random numbers.
    """
    # Other shapes are ignored there to be refused here, with the names.
    options |= {"use_safetensors": True, "local_files_only": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with translate_errors(directory):
        model, info = kind.from_pretrained(directory, **options)
        wrong = {
            "lacks": info["missing_keys"],
            "has other shapes than its configuration for": [name for name, *_ in info["mismatched_keys"]],
        }
        for message, names in wrong.items():
            if names:
                raise BadWeights(f"{directory} {message} {shortened(names)}; {REPLACE}")
        return model.eval()


def shortened(names: Collection[str]) -> str:
    """How many tensors these are, and the first of them."""
    return f"{len(names)} of the model's tensors: {', '.join(sorted(names)[:_NAMED])}"


def _refuse_links(directory: Path) -> None:
    """Links lead into the folder itself, or, as the hub's own cache has it, to blobs beside the snapshots.

    A pipe, or another special file, would be waited for.
    """
    here = directory.resolve()
    blobs = [place.parent / "blobs" for place in here.parents if place.name == "snapshots"]
    for path in directory.rglob("*"):
        # Not its own method, which raises where links lead in a circle.
        target = Path(os.path.realpath(path))
        # A folder there would not be looked through.
        inside = [here] if target.is_dir() else [here, *blobs]
        if path.is_symlink() and not any(target.is_relative_to(place) for place in inside):
            raise BadWeights(f"{path} leads out of the folder of the weights, to {target}; copy it there")
        if not (path.is_file() or path.is_dir()):
            raise BadWeights(f"{path} is neither a file nor a folder; {REPLACE}")


def _refuse_code(path: Path) -> None:
    """Whatever a JSON file names as code, at any depth. A number is a token of a vocabulary."""
    waiting: list[Any] = [hub.read_json(path)]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            for name in _CODE:
                if isinstance(each.get(name), str | list | dict):
                    raise BadWeights(f"{path} names code by {name}, and none comes with weights; take the entry out")
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _refuse_shards(listed: Path) -> None:
    for name in sorted(hub.shards(listed)):
        if not (listed.parent / name).is_file():
            raise BadWeights(f"{listed} names {name}, which is not there; {REPLACE}")


def _check_tensors(path: Path) -> None:
    """By the header alone, which is not parsed where it is too long."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if length > num_bytes - _LENGTH_BYTES:
        raise BadWeights(f"{path} is not a safetensors file, or was cut off: its header ends after it; {REPLACE}")
    if length > _MAX_HEADER_BYTES:
        raise BadWeights(f"{path} has a header of {length} bytes, and {_MAX_HEADER_BYTES} are allowed; {REPLACE}")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise BadWeights(f"{path} is not a whole safetensors file: {error}; {REPLACE}") from None
