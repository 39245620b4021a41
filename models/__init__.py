"""The models that this server can run: those of each module that defines MODEL or MODELS, here or in a directory."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from models.base import Model

_HAS_MODEL = re.compile(r"^MODELS?\b", re.MULTILINE)


def discover(directory: Path | None = None) -> dict[str, Model]:
    """Return every model by its endpoint: this package's first, then those in `directory`.

    Raises ValueError if two models have the same endpoint, and for a module whose MODEL or MODELS is not as it should
    be. An error that a module raises on import passes through.
    """
    models: dict[str, Model] = {}
    for module in (*_modules_in(Path(__file__).parent, __name__), *_modules_in(directory, "flux_server_models")):
        for model in _models_of(module):
            if model.endpoint in models:
                raise ValueError(f"two models serve {model.endpoint}; one is in {module.__file__}; remove one of them")
            models[model.endpoint] = model
    return models


def _models_of(module: ModuleType) -> tuple[Model, ...]:
    """Return the models in MODELS and the one in MODEL. Raises ValueError for no models, and for other objects."""
    several = getattr(module, "MODELS", ())
    one = (module.MODEL,) if hasattr(module, "MODEL") else ()
    models = (*several, *one) if isinstance(several, tuple | list) else ()
    if not models or not all(map(_is_model, models)):
        raise ValueError(f"{module.__file__}: MODEL must be a model, and MODELS a tuple of models: (FluxDev(),)")
    return models


def _is_model(value: object) -> bool:
    """Return whether the value is a model, as far as this can be told at once: an object with an endpoint."""
    return not isinstance(value, type) and isinstance(getattr(value, "endpoint", None), str)


def _modules_in(directory: Path | None, package: str) -> Iterator[ModuleType]:
    for path in sorted(directory.glob("*.py")) if directory else ():
        # Search the text for the names: importing every module could import torch, which takes seconds.
        if _HAS_MODEL.search(path.read_text(encoding="utf-8")):
            yield _module(f"{package}.{path.stem}", path)


def _module(name: str, path: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # Register the module before running it, as the import system does: dataclasses looks modules up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
