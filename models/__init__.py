"""The models this server can run: every module here, or in a folder given, that has a MODEL."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from models.base import Model

_HAS_MODEL = re.compile(r"^MODEL\b", re.MULTILINE)


def discover(directory: Path | None = None) -> dict[str, Model]:
    """Every model by its endpoint, those of this package first, then those of `directory`.

    Raises ValueError when two modules claim one endpoint.
    """
    found: dict[str, Model] = {}
    for module in (*_modules_in(Path(__file__).parent, __name__), *_modules_in(directory, "flux_server_models")):
        model: Model = module.MODEL
        if model.endpoint in found:
            raise ValueError(f"two modules serve {model.endpoint}; one is {module.__file__}")
        found[model.endpoint] = model
    return found


def _modules_in(directory: Path | None, package: str) -> Iterator[ModuleType]:
    for path in sorted(directory.glob("*.py")) if directory else ():
        # Looked for in the text, because importing engine.py and the like would bring in torch.
        if _HAS_MODEL.search(path.read_text(encoding="utf-8")):
            yield _module(f"{package}.{path.stem}", path)


def _module(name: str, path: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # Registered first, as the import system does, so that its classes can be looked up by module.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
