"""Checks of what this machine can run, without loading any weights: `flux-server doctor`."""

import os
import shutil
import socket
import sys
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from models import discover
from models.base import ExtraWeights, SingleFile, Weights
from models.flux.flops import FLUX_DEV
from models.loading import cpu, devices, hub, memory_plans, pipeline, specs, verify
from server.cli import doctor_plans
from server.settings import Settings
from server.storage import database
from server.worker.engine_pool import engine_configs

#: Smaller transformers, like the demo's, run on any machine.
_FULL_SIZE_BYTES = 2_000_000_000
#: Bytes of FLUX.1 [dev]'s components in bf16, 33.7 GB in total, used when the weights are not downloaded.
_FLUX_DEV_SIZES = {
    "transformer": 23_802_816_640,
    "text_encoder_2": 9_524_621_312,
    "text_encoder": 246_120_960,
    "vae": 167_642_022,
}


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool
    message: str


def run_checks(settings: Settings) -> Iterator[Check]:
    """Yield the result of each check. Checks that depend on a failed check are left out."""
    yield _python()
    yield _ports(settings)
    yield _disk(settings)
    device = yield from _device(settings)
    if device is None:
        return
    models = discover(settings.models_dir)
    try:
        weights_by_endpoint = specs.assign_weights(settings.weights, models, settings.base)
    except (ValueError, OSError) as error:
        yield Check("weights", False, str(error))
        return
    endpoints_by_weights = {
        where: [name for name, weights in weights_by_endpoint.items() if weights == where]
        for where in weights_by_endpoint.values()
        if where
    }
    for where, endpoints in endpoints_by_weights.items():
        try:
            needed = {extra for each in endpoints for extra in specs.extra_weights_of(models[each], where)}
            yield from _weights(where, endpoints, needed, settings, *device)
            if any("ip_adapters" in models[endpoint].Input.model_fields for endpoint in endpoints):
                yield Check(f"{specs.name_of(where)} control nets", True, "work with the memory plan resident")
                yield _ip_adapters(where)
            for missing, names in specs.left_out(where, models).items():
                how = f"not served without {specs.describe_missing(missing, where)}"
                yield Check(f"{specs.name_of(where)} {missing.directory}", True, f"{', '.join(names)}: {how}")
        except OSError as error:
            yield Check(specs.name_of(where), False, str(error))
    yield _checker(settings, list(endpoints_by_weights))


def run_self_test(settings: Settings) -> Iterator[Check]:
    """Yield the results of the self test of the device, and of the settings' weights on it."""
    from models.flux import verdict
    from models.flux.compilation import compile_cache_dir, set_compile_cache_dirs
    from models.self_test import engine
    from models.self_test.trials import Subject, run

    device = devices.device_for(settings.device)
    models = discover(settings.models_dir)
    configs = engine_configs(settings, specs.assign_weights(settings.weights, models, settings.base), models)
    configs = {str(config.weights): config for config in configs.values()}
    config = next(iter(configs.values()))
    directory = compile_cache_dir(config) if device == "cuda" else None
    if directory:
        set_compile_cache_dirs(config)
    found = verdict.results(directory, renew=True) if directory else verdict.run_in_child(device, None)
    for result in found:
        if result["name"] != engine.WEIGHTS.name:
            yield _line(**result)
    for config in configs.values():
        if config.weights:
            (weights,) = run([engine.WEIGHTS], Subject(device, None, config), lambda _: None)
            yield _line(f"{specs.name_of(config.weights)} in the self test", weights.state, weights.message)


def _line(name: str, state: str, message: str) -> Check:
    return Check(name, state != "failed", f"skipped, {message}" if state == "skipped" else message)


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", sys.version_info >= (3, 11), version)


def _ports(settings: Settings) -> Check:
    ports = [(settings.host, settings.port), (settings.host, settings.tls_port), ("127.0.0.1", settings.proxy_port)]
    busy = [str(port) for host, port in ports if port and not _is_free(host, port)]
    message = f"cannot listen on {', '.join(busy)}; perhaps a server is running already" if busy else "free"
    return Check("ports", not busy, message)


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _disk(settings: Settings) -> Check:
    directory = settings.data_dir
    # Path.exists would raise without permission.
    while not os.path.exists(directory):  # noqa: PTH110
        directory = directory.parent
    if problem := _unusable(directory):
        return Check("disk", False, problem)
    free = shutil.disk_usage(directory).free
    needed = settings.retention_gb * 1e9
    use = f"results and files may use {settings.retention_gb:g} GB (--retention-gb)"
    message = f"{free / 1e9:.0f} GB free at {settings.data_dir}; {use}"
    return Check("disk", free > needed, message)


def _unusable(directory: Path) -> str:
    """Return why the server cannot use its data directory, or the nearest existing parent; "" if it can."""
    if not directory.is_dir():
        return f"{directory} is not a directory"
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        return f"no permission to read and write {directory}"
    try:
        database.check_data_dir(directory)
    except OSError as error:
        return str(error)
    return ""


def _device(settings: Settings) -> Generator[Check, None, tuple[str, int] | None]:
    """Yield the device's check, and return its name and free bytes, or None if it cannot be used."""
    import torch

    try:
        device = devices.device_for(settings.device)
    except OSError as error:
        yield Check("device", False, str(error))
        return None
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        yield Check(
            "device", True, f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, PyTorch {torch.__version__}"
        )
        return device, int(free)
    free = psutil.virtual_memory().available
    description = f"{cpu.describe()}, {torch.get_num_threads()} threads, {free / 1e9:.0f} GB of memory free"
    no_gpu = f"; no GPU is used: {devices.cuda_problem()}" if settings.device == "auto" and torch.version.cuda else ""
    yield Check("device", True, f"{description}, PyTorch {torch.__version__}{no_gpu}")
    return device, int(free)


def _weights(
    where: Weights,
    endpoints: Sequence[str],
    needed: Collection[ExtraWeights],
    settings: Settings,
    device: str,
    free: int,
) -> Iterator[Check]:
    """Yield the checks of one set of weights. Raises OSError, with the reason, if the weights cannot be loaded."""
    name = specs.name_of(where)
    directory = pipeline.cached_directory(where)
    if directory is None:
        command = f"{where} --base {where.base}" if isinstance(where, SingleFile) else where
        yield Check(name, False, f"not downloaded yet; run `flux-server pull {command}`")
        sizes = _FLUX_DEV_SIZES
    else:
        contents = pipeline.verify_weights(where, directory)
        for extra in {specs.REDUX, *needed}:
            if found := specs.find_extra_weights(where, extra):
                verify.verify(found)
        sizes = pipeline.sizes_in_memory(where, directory, needed)
        size, form = sum(sizes.values()) / 1e9, f"{contents.description}, " if contents else ""
        yield Check(name, True, f"weights are here, {form}{size:.2f} GB, for {', '.join(endpoints)}")
    try:
        dtype = devices.dtype_for(settings.dtype, device, sum(sizes.values()))
        if device == "cpu":
            yield Check(f"{name} type", True, _type(sizes["transformer"], directory, dtype))
    except OSError as error:
        yield Check(f"{name} type", False, str(error))
        return
    if directory is None:
        sizes = {part: size * dtype.itemsize // 2 for part, size in sizes.items()}
    else:
        sizes = pipeline.sizes_in_memory(where, directory, needed, dtype.itemsize)
    quantization = pipeline.quantization_of(where) if directory else ""
    target = memory_plans.Target(device, settings.eager, quantization=quantization)
    if sizes["transformer"] >= _FULL_SIZE_BYTES:
        for plan, line in doctor_plans.describe_plans(sizes, _transformer_config(directory), target, free):
            yield Check(f"{name} with {plan.name}", True, line)
        yield Check(f"{name} advice", True, doctor_plans.advice(sizes, settings, target, free))
    yield _memory(name, sizes, settings, target, free)


def _ip_adapters(where: Weights) -> Check:
    """Say what requests with IP adapters need. Other requests do without the weights that read their images.

    Raises OSError if these are malformed.
    """
    if found := specs.find_extra_weights(where, specs.CLIP_VISION):
        verify.verify(found)
        message = "work with the memory plan resident"
    else:
        message = f"do not work without {specs.describe_missing(specs.CLIP_VISION, where)}"
    return Check(f"{specs.name_of(where)} IP adapters", True, message)


def _type(transformer_size: int, directory: Path | None, dtype: Any) -> str:
    """Describe the number type on a CPU; for full-size weights, estimate the time of a step too."""
    from models.flux.device import Device

    message = devices.type_name(dtype)
    if transformer_size < _FULL_SIZE_BYTES:
        return message
    with verify.translate_errors(directory / "transformer" if directory else Path()):
        return f"{message}; {Device('cpu').step_description(_transformer_config(directory), dtype)}; use a GPU"


def _transformer_config(directory: Path | None) -> Mapping[str, Any]:
    """Return the configuration of a transformer; that of FLUX.1 [dev] if the weights are not downloaded."""
    return {**FLUX_DEV, **(hub.read_json(directory / "transformer" / "config.json") if directory else {})}


def _memory(where: str, sizes: Mapping[str, int], settings: Settings, target: memory_plans.Target, free: int) -> Check:
    """Check that the chosen memory plan fits; the message lists the memory that each plan requires."""
    # With `auto`, a CPU always uses the first plan.
    name = settings.memory
    allowed = memory_plans.allowed(name, settings.quantize)
    usable = [plan for plan in memory_plans.allowed("auto", settings.quantize) if not plan.problem(target)]
    plans = usable[:1] if (target.device, name) == ("cpu", "auto") else usable
    needs = ", ".join(f"{plan.name} {plan.required_bytes(sizes) / 1e9:.2f} GB" for plan in plans)
    try:
        chosen = memory_plans.choose(allowed, sizes, free, target)
    except OSError as error:
        return Check(f"{where} memory", False, f"{error} ({needs})")
    figures = f"required: {needs}; free: {free / 1e9:.1f} GB"
    if chosen.required_bytes(sizes) <= free:
        return Check(f"{where} memory", True, f"{chosen.name}, {chosen.description}; {figures}")
    fits_none = all(plan.required_bytes(sizes) > free for plan in plans)
    return Check(
        f"{where} memory", False, f"{'no plan fits' if fits_none else f'{chosen.name} does not fit'}; {figures}"
    )


def _checker(settings: Settings, weights: Sequence[Weights]) -> Check:
    try:
        return _found_checker(settings.safety_checker, weights)
    except OSError as error:
        return Check("safety checker", False, str(error))


def _found_checker(name: str, weights: Sequence[Weights]) -> Check:
    """Check the safety checkers included in the weights, or the configured one. Raises OSError for a malformed one."""
    directories = [pipeline.cached_directory(place) for place in weights]
    included = [directory / "safety_checker" for directory in directories if directory is not None]
    if included and len(included) == len(directories) and all(directory.is_dir() for directory in included):
        checkers, message = included, "comes with the weights"
    elif configured := Path(name) if Path(name).is_dir() else hub.cached_path(name):
        checkers, message = [configured], f"{name} is here"
    else:
        return Check("safety checker", False, f"{name} is not downloaded; run `flux-server pull {name}`")
    for directory in checkers:
        verify.verify(directory)
        if hub.missing_components(directory):
            return Check(
                "safety checker", False, f"{directory} lacks its configuration or its safetensors file; restore them"
            )
    return Check("safety checker", True, message)
