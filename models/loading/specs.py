"""The WEIGHTS arguments: which weights each endpoint runs on."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from models.base import ExtraWeights, Model, SingleFile, Weights
from models.loading import conditioning, hub

DEMO = Path(__file__).parent.parent / "demo"
DEFAULT_ENDPOINT = "fal-ai/flux/dev"
#: The weights with which FLUX.1 [dev] takes an image in place of a prompt.
REDUX = ExtraWeights("redux", "black-forest-labs/FLUX.1-Redux-dev")
#: The weights that find the depths of an image.
DEPTH = ExtraWeights("depth", "LiheYoung/depth-anything-large-hf")
#: The weights that read the images of IP adapters.
CLIP_VISION = ExtraWeights("clip-vision", "openai/clip-vit-large-patch14")
#: The control LoRAs of FLUX.1 [dev], by name: for the edges of a control image, and for its depths.
CONTROL_LORAS = {
    "canny": ExtraWeights("canny-lora", "black-forest-labs/FLUX.1-Canny-dev-lora", is_lora=True),
    "depth": ExtraWeights("depth-lora", "black-forest-labs/FLUX.1-Depth-dev-lora", is_lora=True),
}
#: The extensions of single files, and of files that are not loaded because they are pickles.
_FILES, _PICKLES = (".safetensors", ".sft", ".gguf"), (".ckpt", ".pt", ".pth", ".bin")
#: The weights, by hub id, in whose place [dev] with a control LoRA can run.
_WITH_CONTROL_LORA = {
    "black-forest-labs/FLUX.1-Canny-dev": CONTROL_LORAS["canny"],
    "black-forest-labs/FLUX.1-Depth-dev": CONTROL_LORAS["depth"],
}
#: The demo's weights for the endpoint of Fill. All others run on the demo's own.
_FILL = "black-forest-labs/FLUX.1-Fill-dev"
_DEMO_FILL = SingleFile(DEMO / "fill.safetensors", DEMO)


def assign_weights(specs: Sequence[str], models: dict[str, Model], base: str = "") -> dict[str, Weights | None]:
    """Return the weights of each endpoint to serve; None for endpoints that need no weights and are always served.

    A spec is `demo` (for all endpoints), a hub id (for the endpoints made for these weights), a directory or a single
    file (for fal-ai/flux/dev), or `ENDPOINT=` and any of these. `base` is the base of single files: a directory or a
    hub id. An endpoint whose extra weights are missing is left out, but a spec that names it is an error. Raises
    ValueError with all problems, one per line.
    """
    assigned: dict[str, Weights | None] = {}
    problems: list[str] = []
    for spec in specs:
        try:
            assigned.update(_assign_one(spec, models, base))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return {**assigned, **{model.endpoint: None for model in models.values() if not model.weights}}


def _assign_one(spec: str, models: dict[str, Model], base: str) -> Mapping[str, Weights]:
    if spec == "demo":
        weights = {model.endpoint: demo_weights(model) for model in models.values() if model.weights}
        return {endpoint: where for endpoint, where in weights.items() if not _missing(models[endpoint], where)}
    endpoint, separator, rest = spec.partition("=")
    if separator:
        if endpoint not in models:
            raise ValueError(f"{spec}: {endpoint} is not an endpoint here; choose from {', '.join(sorted(models))}")
        where = demo_weights(models[endpoint]) if rest == "demo" else parse_spec(rest, base)
        if missing := _missing(models[endpoint], where):
            raise ValueError(
                f"{spec}: {endpoint} also needs {' and '.join(describe_missing(each, where) for each in missing)}"
            )
        return {endpoint: where}
    where = parse_spec(spec, base)
    if not isinstance(where, str):
        return {DEFAULT_ENDPOINT: where}
    served = [model.endpoint for model in models.values() if where in model.weights]
    if not served:
        raise ValueError(f"{spec}: no known endpoint runs on these weights; use ENDPOINT={spec}")
    return {endpoint: where for endpoint in served if not _missing(models[endpoint], where)}


def demo_weights(model: Model) -> Weights:
    """Return the demo's weights for a model."""
    return _DEMO_FILL if _FILL in model.weights else DEMO


def extra_weights_of(model: Model, where: Weights) -> tuple[ExtraWeights, ...]:
    """Return the additional weights that a model needs on these weights.

    The models of Canny and Depth also run on weights that take no control image, with a control LoRA.
    """
    loras = [lora for hub_id, lora in _WITH_CONTROL_LORA.items() if hub_id in model.weights]
    if not loras or isinstance(where, SingleFile):
        return model.extra_weights
    directory = where if isinstance(where, Path) else hub.cached_path(where)
    is_plain = directory is not None and not conditioning.is_control(directory / "transformer")
    return (*model.extra_weights, *loras) if is_plain else model.extra_weights


def name_of(where: Weights) -> str:
    """Return the name of weights for people: "demo", a file in it, a directory, a file or a hub id."""
    return {DEMO: "demo", _DEMO_FILL: "demo/fill.safetensors"}.get(where, str(where))


def find_extra_weights(where: Weights, extra_weights: ExtraWeights) -> Path | None:
    """Return the directory of extra weights; None if they are not installed. That of a LoRA holds one safetensors file.

    For local weights, look in their directory `where`; for a hub id, look in the hub cache; for a single file, look
    where its base is.
    """
    if isinstance(where, SingleFile):
        return find_extra_weights(where.base, extra_weights)
    if isinstance(where, Path):
        directory = where / extra_weights.directory
        is_there = hub.lora_file(directory) is not None if extra_weights.is_lora else directory.is_dir()
        return directory if is_there else None
    return (hub.cached_lora if extra_weights.is_lora else hub.cached_path)(extra_weights.hub_id)


def find_control_loras(where: Weights, needed: Collection[ExtraWeights]) -> dict[str, Path]:
    """Return the files of the installed control LoRAs that are needed, by their names in CONTROL_LORAS.

    `where` is as for `find_extra_weights`.
    """
    directories = {name: find_extra_weights(where, lora) for name, lora in CONTROL_LORAS.items() if lora in needed}
    files = {name: hub.lora_file(directory) for name, directory in directories.items() if directory}
    return {name: file for name, file in files.items() if file}


def is_lora(hub_id: str) -> bool:
    """Return whether a hub id is that of a LoRA that an endpoint needs."""
    return hub_id in {lora.hub_id for lora in CONTROL_LORAS.values()}


def _missing(model: Model, where: Weights) -> list[ExtraWeights]:
    return [extra for extra in extra_weights_of(model, where) if find_extra_weights(where, extra) is None]


def left_out(where: Weights, models: Mapping[str, Model]) -> dict[ExtraWeights, list[str]]:
    """Return the extra weights that are missing next to a hub id, each with the endpoints that it leaves out."""
    found: dict[ExtraWeights, list[str]] = {}
    for model in models.values():
        for missing in _missing(model, where) if where in model.weights else ():
            found.setdefault(missing, []).append(model.endpoint)
    return found


def describe_missing(extra_weights: ExtraWeights, where: Weights) -> str:
    """Describe where missing extra weights belong, or how to download them. `where` is as for `find_extra_weights`."""
    if isinstance(where, SingleFile):
        return describe_missing(extra_weights, where.base)
    if isinstance(where, Path):
        what = "one safetensors file of " if extra_weights.is_lora else ""
        return f"{what}{extra_weights.hub_id} in the directory {where / extra_weights.directory}"
    return f"{extra_weights.hub_id}; run `flux-server pull {extra_weights.hub_id}`"


def parse_spec(spec: str, base: str = "") -> Weights:
    """Return what a spec names: `demo` or a directory in diffusers layout, a hub id, or a single file on its base.

    Raises ValueError, also for a single file without a base.
    """
    if not is_single_file(spec):
        return _parse_pipeline(spec)
    if not base:
        raise ValueError(
            f"{spec}: a single file lacks text encoders or configurations; name the weights that give them with --base,"
            " such as --base black-forest-labs/FLUX.1-dev"
        )
    return SingleFile(_parse_file(spec), _parse_pipeline(base))


def is_single_file(spec: str) -> bool:
    """Return whether a spec names a file, on this machine or on the hub."""
    path = Path(spec).expanduser()
    return path.is_file() or path.suffix in {*_FILES, *_PICKLES}


def _parse_file(spec: str) -> str | Path:
    """Return a file's path, or its place on the hub. Raises ValueError."""
    path = Path(spec).expanduser()
    if path.suffix in _PICKLES:
        raise ValueError(f"{spec}: pickles are not supported, because they can run code; use safetensors or GGUF")
    if path.is_file():
        return path.resolve()
    if spec.count("/") < 2 or spec.startswith((".", "/", "~")) or path.suffix not in _FILES:
        raise ValueError(f"{spec}: neither a file nor a file on the hub, such as owner/name/file.gguf")
    return spec


def _parse_pipeline(spec: str) -> str | Path:
    """Return a directory in diffusers layout, also for `demo`, or a hub id. Raises ValueError."""
    if spec == "demo":
        return DEMO
    path = Path(spec).expanduser()
    if (path / "model_index.json").is_file():
        return path.resolve()
    if path.exists() or spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        raise ValueError(f"{spec}: neither a directory in diffusers layout (no model_index.json) nor a hub id")
    return spec
