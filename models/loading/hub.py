"""Weights from the Hugging Face hub, downloaded once into its cache and then used without a network."""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Patterns of the files to download. Other files, such as pickled weights, are not downloaded.
_KINDS = ("*.json", "*.safetensors", "*.txt", "*.model")
_LORA_KINDS = ["*.safetensors"]
#: Patterns of files that are skipped although they match _KINDS: variants of the weights, such as other precisions.
_OTHER_PRECISIONS = ["*.fp16.*", "*.fp8.*", "*.non_ema.*"]
#: The maximum size of a JSON file. The largest one of FLUX.1 has 3 MB and belongs to a tokenizer.
MAX_JSON_BYTES = 64 * 2**20
#: Advice at the end of error messages about a malformed file.
REPLACE = "replace it with the original file of the weights"
RESTORE = "restore this directory from the original weights"


class HubError(OSError):
    """A failure to download something from the hub or to store the download; the message says what to do."""


class BadWeights(OSError):
    """Weights that are malformed or not allowed; the message names the file and says what to do."""


def pull(hub_id: str, without: Collection[str] = ()) -> Path:
    """Download a pipeline or a single model into the cache, with a progress bar; return its directory.

    Of the components in `without`, only the configuration is downloaded. Authenticate with the token in HF_TOKEN, if
    set. Files that are already in the cache are not downloaded again, so a download that broke off continues. Raises
    HubError, or BadWeights for a malformed JSON file.
    """
    from huggingface_hub import snapshot_download

    with _translate_errors(hub_id):
        directory = Path(snapshot_download(hub_id, allow_patterns=["model_index.json", "config.json"]))
        if not any((directory / name).is_file() for name in ("model_index.json", "config.json")):
            # Such as tencent/SRPO: nothing in this repository could be loaded, so no weights are downloaded.
            problem = f"{hub_id} has neither model_index.json nor config.json, so it is not in diffusers layout"
            raise HubError(f"{problem}; to serve one of its files, name {hub_id}/FILE and a --base")
        patterns = _patterns(directory)
        left_out = [f"{name}/*.safetensors*" for name in without]
        snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=[*_OTHER_PRECISIONS, *left_out])
    if missing := missing_components(directory, without):
        names = ", ".join(missing)
        raise HubError(f"{hub_id} lacks these parts or has only some of their files: {names}; choose another hub id")
    return directory


def pull_file(place: str) -> Path:
    """Download a file, such as "owner/name/file.gguf", into the cache as `pull` does; return its path."""
    from huggingface_hub import hf_hub_download

    hub_id, name = _split(place)
    with _translate_errors(hub_id, place):
        return Path(hf_hub_download(hub_id, name))


def cached_file(place: str) -> Path | None:
    """Return the path of a file in the cache, without connecting to the hub; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(*_split(place))
    return Path(cached) if isinstance(cached, str) else None


def _split(place: str) -> tuple[str, str]:
    owner, repository, name = place.split("/", 2)
    return f"{owner}/{repository}", name


def pull_lora(hub_id: str) -> Path:
    """Download a LoRA into the cache as `pull` does; return its directory, which holds one safetensors file.

    Raises HubError, also if the repository holds no such file, or several.
    """
    from huggingface_hub import snapshot_download

    with _translate_errors(hub_id):
        directory = Path(snapshot_download(hub_id, allow_patterns=_LORA_KINDS))
    if lora_file(directory) is None:
        raise HubError(f"{hub_id} does not hold exactly one safetensors file; choose another hub id")
    return directory


def cached_lora(hub_id: str) -> Path | None:
    """Return the directory of a LoRA in the cache, without connecting to the hub; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=_LORA_KINDS, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return directory if lora_file(directory) else None


def lora_file(directory: Path) -> Path | None:
    """Return the only safetensors file in a directory; None if there is none, or several."""
    files = list(directory.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def cached_path(hub_id: str, without: Collection[str] = ()) -> Path | None:
    """Return the directory of a complete download in the cache, without connecting to the hub; None if there is none.

    Of the components in `without`, only the configuration must be there. Raises BadWeights for a malformed JSON file.
    """
    from huggingface_hub import try_to_load_from_cache

    if hub_id.count("/") != 1:
        return None
    for name in ("model_index.json", "config.json"):
        cached = try_to_load_from_cache(hub_id, name)
        if isinstance(cached, str) and not missing_components(Path(cached).parent, without):
            return Path(cached).parent
    return None


def missing_components(directory: Path, without: Collection[str] = ()) -> list[str]:
    """Return the components of a pipeline that are missing or incomplete in a directory; empty if none is.

    Those in `without` need no weights. Without model_index.json, return [] for a single model, else
    ["model_index.json"]. Raises BadWeights for bad JSON.
    """
    if not (directory / "model_index.json").is_file():
        return [] if (directory / "config.json").is_file() and _has_weights(directory) else ["model_index.json"]
    return [
        name
        for name in components(directory)
        if not (_is_complete(directory / name) or (name in without and (directory / name / "config.json").is_file()))
    ]


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of the weights. Raises BadWeights if it is too large or holds no object."""
    if (num_bytes := path.stat().st_size) > MAX_JSON_BYTES:
        raise BadWeights(f"{path} has {num_bytes} bytes, but only {MAX_JSON_BYTES} are allowed for JSON; {REPLACE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadWeights(f"{path} is not JSON: {error}; {REPLACE}") from None
    if not isinstance(content, dict):
        raise BadWeights(f"{path} is JSON, but not an object; {REPLACE}")
    return content


def read_model_index(directory: Path) -> dict[str, tuple[str, str]]:
    """Read the library and class of each component from model_index.json. Raises BadWeights if it is malformed."""
    path, classes = directory / "model_index.json", {}
    for name, value in read_json(path).items():
        # A pair of nulls stands for a component that is left out. A value that is not a list is a setting.
        if not isinstance(value, list) or value == [None, None]:
            continue
        if not name.isidentifier():
            raise BadWeights(f"{path} names {name!r}, which is not a component's name; {REPLACE}")
        if len(value) != 2 or not all(isinstance(word, str) for word in value):
            raise BadWeights(f"{path}: {name} is {str(value)[:100]}, not a library and a class; {REPLACE}")
        classes[name] = (value[0], value[1])
    return classes


def shards(index: Path) -> set[str]:
    """Return the file names in an index of weights. Raises BadWeights for a name outside the index's directory."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise BadWeights(f"{index} is not an index of weights: weight_map must name a file for each tensor; {REPLACE}")
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".safetensors":
            raise BadWeights(
                f"{index} names {name!r}, but only safetensors files in its directory are allowed; {REPLACE}"
            )
    return set(files.values())


def components(directory: Path) -> list[str]:
    """Return the names of the components in model_index.json, which are also their subdirectories."""
    return list(read_model_index(directory))


def size(directory: Path) -> int:
    """Return the bytes of all safetensors files in a directory and its subdirectories."""
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


def sizes(directory: Path) -> dict[str, int]:
    """Return the bytes of the weights of each component that has weights."""
    sizes_by_name = {name: size(directory / name) for name in components(directory)}
    return {name: num_bytes for name, num_bytes in sizes_by_name.items() if num_bytes}


def _patterns(directory: Path) -> list[str]:
    if not (directory / "model_index.json").is_file():
        return list(_KINDS)
    return ["model_index.json", *(f"{name}/{kind}" for name in components(directory) for kind in _KINDS)]


def _is_complete(component: Path) -> bool:
    """Return whether a component's directory exists and has a configuration and all weights that belong to it."""
    if not component.is_dir():
        return False
    if (component / "config.json").is_file():
        return _has_weights(component)
    # Tokenizers and schedulers have no weights.
    return any(component.glob("*.json"))


def _has_weights(directory: Path) -> bool:
    for index in directory.glob("*.safetensors.index.json"):
        return all((directory / shard).is_file() for shard in shards(index))
    return any(directory.glob("*.safetensors"))


@contextmanager
def _translate_errors(hub_id: str, file: str = "") -> Iterator[None]:
    """Translate errors of a download, perhaps of a single file, into HubError, with a message for the operator."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{hub_id}"
    try:
        yield
    except BadWeights:
        raise
    except HFValidationError:
        raise HubError(f"{hub_id} is neither a local directory nor a valid hub id") from None
    except GatedRepoError:
        how = "try again" if os.environ.get("HF_TOKEN") else "set HF_TOKEN to a token of the account that accepted it"
        raise HubError(f"{hub_id} requires you to accept its licence: open {page}, accept it, then {how}.") from None
    except RepositoryNotFoundError:
        raise HubError(f"{hub_id} does not exist on the hub, or HF_TOKEN has no access to it; check {page}.") from None
    except RemoteEntryNotFoundError:
        raise HubError(f"{file or hub_id} does not exist on the hub; check {page}/tree/main.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise HubError(
            f"The hub at {constants.ENDPOINT} could not be reached, or the download broke off; try again: {error}"
        ) from None
    except OSError as error:
        raise HubError(
            f"{hub_id} could not be stored: {error}; check the free space and the directory of the cache"
        ) from None
