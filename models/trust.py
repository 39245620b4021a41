"""What a folder of weights may not hold, whoever made it: ways out of it, pickles, code.

The libraries that load it are told to run no code and to read safetensors; these they would follow all the same.
"""

import json
from collections.abc import Collection
from pathlib import Path

from models import hub

_LIBRARIES = ("diffusers", "transformers")


def check(folder: Path) -> None:
    """Judge the files of a model or a pipeline. Raises OSError, naming the one."""
    _refuse_links(folder)
    for listed in folder.rglob("*.safetensors.index.json"):
        _refuse_shards(listed)
    for adapter in folder.rglob("adapter_config.json"):
        # transformers would load the folder that it names, in place of this one.
        raise OSError(f"{adapter}: an adapter is no part of a pipeline; LoRA weights come with a request")


def check_pipeline(folder: Path, apart: Collection[str]) -> None:
    """And what model_index.json names, but for what is `apart`: loaded without its word. Raises OSError."""
    check(folder)
    for name, (library, _) in hub.index(folder).items():
        if not name.isidentifier():
            raise OSError(f"{folder}: model_index.json names {name!r}, which is no component's name")
        if name not in apart and library not in _LIBRARIES:
            raise OSError(f"{folder}: {name} is of {library}, and only diffusers' and transformers' classes are loaded")


def _refuse_links(folder: Path) -> None:
    """Links lead into the folder itself, or, as the hub's own cache has it, into the blobs beside the snapshots."""
    here = folder.resolve()
    inside = [here, *(place.parent / "blobs" for place in here.parents if place.name == "snapshots")]
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in inside):
            raise OSError(f"{path} leads out of the folder of the weights, to {path.resolve()}; copy it there")


def _refuse_shards(listed: Path) -> None:
    try:
        names = set(json.loads(listed.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OSError(f"{listed} is no index of weights") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".safetensors":
            raise OSError(f"{listed} names {name!r}, and only safetensors files beside it are loaded")
