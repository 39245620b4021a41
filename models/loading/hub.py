"""Weights from the hub: pulled once into its cache, used from there without a network ever after."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: What a pipeline reads; pickled weights, single-file checkpoints and other precisions are left where they are.
_KINDS = ("*.json", "*.safetensors", "*.txt", "*.model")
_OTHER_PRECISIONS = ["*.fp16.*", "*.fp8.*", "*.non_ema.*"]
#: The largest JSON file of FLUX.1 describes a tokenizer, and has 3 MB.
MAX_JSON_BYTES = 64 * 2**20
#: What to do about a file that is malformed.
REPLACE = "put the original file of the weights in its place"


class HubError(OSError):
    """The hub does not give what was asked for; the message says what to do."""


class BadWeights(OSError):
    """Weights that are malformed or not to be trusted; the message names the file, and says what to do."""


def pull(hub_id: str) -> Path:
    """Bring a pipeline, or a single model, into the cache, with a progress bar. Returns its folder.

    The token is the one in HF_TOKEN, if there is one.

    A file that breaks off is gone on with; after a kill, the files that are whole do not come again.
    Raises HubError, and BadWeights where a file that came is malformed.
    """
    from huggingface_hub import snapshot_download

    with _explained(hub_id):
        directory = Path(snapshot_download(hub_id, allow_patterns=["model_index.json", "config.json"]))
        patterns = _patterns(directory)
        snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=_OTHER_PRECISIONS)
    if lacking := missing_components(directory):
        raise HubError(f"{hub_id} does not have what a pipeline needs: {', '.join(lacking)}")
    return directory


def cached_path(hub_id: str) -> Path | None:
    """The folder of what was pulled, if all of it is there; never opens a connection. Raises BadWeights."""
    from huggingface_hub import try_to_load_from_cache

    if hub_id.count("/") != 1:
        return None
    for name in ("model_index.json", "config.json"):
        found = try_to_load_from_cache(hub_id, name)
        if isinstance(found, str) and not missing_components(Path(found).parent):
            return Path(found).parent
    return None


def missing_components(directory: Path) -> list[str]:
    """What a pipeline's or model's folder lacks, by name; empty when it is whole. Raises BadWeights."""
    if not (directory / "model_index.json").is_file():
        return [] if (directory / "config.json").is_file() and _has_weights(directory) else ["model_index.json"]
    return [name for name in components(directory) if not _is_whole(directory / name)]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the weights. Raises BadWeights where there is none."""
    if (num_bytes := path.stat().st_size) > MAX_JSON_BYTES:
        raise BadWeights(f"{path} has {num_bytes} bytes, and {MAX_JSON_BYTES} are allowed for JSON; {REPLACE}")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadWeights(f"{path} is not JSON: {error}; {REPLACE}") from None
    if not isinstance(said, dict):
        raise BadWeights(f"{path} is JSON, but no object; {REPLACE}")
    return said


def read_model_index(directory: Path) -> dict[str, tuple[str, str]]:
    """What model_index.json says: the library and the class of each component. Raises BadWeights."""
    path, found = directory / "model_index.json", {}
    for name, value in read_json(path).items():
        # A component that is left out is a pair of nulls, and what is no list is a setting.
        if not isinstance(value, list) or value == [None, None]:
            continue
        if not name.isidentifier():
            raise BadWeights(f"{path} names {name!r}, which is no component's name; {REPLACE}")
        if len(value) != 2 or not all(isinstance(word, str) for word in value):
            raise BadWeights(f"{path}: {name} is {str(value)[:100]}, not a library and a class; {REPLACE}")
        found[name] = (value[0], value[1])
    return found


def shards(listed: Path) -> set[str]:
    """The files that an index of weights names, each beside it. Raises BadWeights."""
    files = read_json(listed).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise BadWeights(f"{listed} is no index of weights: weight_map must name a file for each tensor; {REPLACE}")
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".safetensors":
            raise BadWeights(f"{listed} names {name!r}, and only safetensors files beside it are loaded; {REPLACE}")
    return set(files.values())


def components(directory: Path) -> list[str]:
    """The subfolders that model_index.json names."""
    return list(read_model_index(directory))


def size(directory: Path) -> int:
    """Bytes of weights in it."""
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of the weights of each component that has some."""
    found = {name: size(directory / name) for name in components(directory)}
    return {name: num_bytes for name, num_bytes in found.items() if num_bytes}


def _patterns(directory: Path) -> list[str]:
    if not (directory / "model_index.json").is_file():
        return list(_KINDS)
    return ["model_index.json", *(f"{name}/{kind}" for name in components(directory) for kind in _KINDS)]


def _is_whole(component: Path) -> bool:
    """Whether a component's folder has its configuration, and every weight that it should."""
    if not component.is_dir():
        return False
    if (component / "config.json").is_file():
        return _has_weights(component)
    # Tokenizers and schedulers have no weights.
    return any(component.glob("*.json"))


def _has_weights(directory: Path) -> bool:
    for listed in directory.glob("*.safetensors.index.json"):
        return all((directory / shard).is_file() for shard in shards(listed))
    return any(directory.glob("*.safetensors"))


@contextmanager
def _explained(hub_id: str) -> Iterator[None]:
    """The hub's errors in words for an operator."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{hub_id}"
    try:
        yield
    except BadWeights:
        raise
    except HFValidationError:
        raise HubError(f"{hub_id} is neither a folder here nor an id of the hub") from None
    except GatedRepoError:
        how = "then try again" if os.environ.get("HF_TOKEN") else "set HF_TOKEN to a token of that account"
        raise HubError(f"{hub_id} asks you to accept its licence first: open {page}, accept it, {how}.") from None
    except RepositoryNotFoundError:
        raise HubError(f"There is no {hub_id} on the hub, or HF_TOKEN may not see it ({page}).") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise HubError(f"The hub at {constants.ENDPOINT} could not be reached or broke off: {error}") from None
    except OSError as error:
        raise HubError(f"{hub_id} could not be stored: {error}") from None
