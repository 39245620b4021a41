"""The start of an engine: weights, safety checker, memory plan and the first warm-up."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.base import DeviceLost, EngineConfig
from models.flux import acceleration, safety_checker, verdict
from models.flux.acceleration import Tier
from models.flux.attempts import Attempts
from models.flux.compilation import compile_cache_dir, set_compile_cache_dirs
from models.flux.device import Device, log_dtype, summary
from models.flux.engine import FluxEngine
from models.flux.redux import Redux
from models.loading import devices, memory_plans, specs
from models.loading.pipeline import load_pipeline

log = logging.getLogger(__name__)


def load_engine(config: EngineConfig, kind: type[FluxEngine] = FluxEngine) -> FluxEngine:
    """Load the weights and the safety checker, warm up the tier "none", and return the engine.

    If memory runs out, the next memory plan is tried, unless the operator chose one. If the warm-up fails, the engine
    runs in the next way of `acceleration.ways`. If the checker cannot be loaded, the requests that need it fail.

    Raises OSError if the weights cannot be loaded, and DeviceLost if the device fails.
    """
    device = devices.device_for(config.device)
    is_auto = config.memory == "auto"
    failed = _self_test_failures(config, device)
    while True:
        try:
            return _load(config, device, kind, failed)
        except OSError as error:
            # Without its traceback, whose frames keep the weights of this try alive.
            failure = error.with_traceback(None)
        # PyTorch still holds the memory of the partial load, and the next plan or other engines need it.
        Device(device).free()
        if not isinstance(failure, memory_plans.DoesNotFit) or not is_auto or failure.next_plan is None:
            raise failure
        log.warning("%s; trying the plan %s", failure, failure.next_plan.name)
        config = dataclasses.replace(config, memory=failure.next_plan.name)


def _self_test_failures(config: EngineConfig, device: str) -> Mapping[str, str]:
    """Return the message of each test that failed in the self test; the engine uses the self test's compiled code."""
    directory = compile_cache_dir(config) if device == "cuda" and not config.is_eager else None
    if directory:
        set_compile_cache_dirs(config)
    return verdict.failures(directory)


def _load(config: EngineConfig, device: str, kind: type[FluxEngine], failed: Mapping[str, str]) -> FluxEngine:
    pipeline, plan = load_pipeline(config)
    try:
        return _assemble(config, device, kind, failed, pipeline, plan)
    except torch.OutOfMemoryError as error:
        reason = summary(error)
    raise memory_plans.DoesNotFit(plan, reason)


def _assemble(
    config: EngineConfig,
    device: str,
    kind: type[FluxEngine],
    failed: Mapping[str, str],
    pipeline: Any,
    plan: memory_plans.Plan,
) -> FluxEngine:
    """Build an engine on a loaded pipeline. Raises torch.OutOfMemoryError and DeviceLost."""
    prior = specs.find_extra_weights(config.weights, specs.REDUX) if config.weights else None
    redux = Redux.load(prior, pipeline.transformer, device) if prior else None
    checker = safety_checker.load(config)
    log_dtype(config, pipeline.transformer, device)
    attempts = Attempts(_attempts_directory(config, device))
    none = [Tier("none", pipeline.transformer)]
    engine = kind(pipeline, checker, none, device, plan=plan, redux=redux, attempts=attempts)
    warm_up_none(engine, config, failed)
    return engine


def warm_up_none(engine: FluxEngine, config: EngineConfig, failed: Mapping[str, str]) -> None:
    """Choose the fastest way that works, build the tiers to run in this way, and warm up the tier "none".

    The engine so far has the uncompiled tier "none" alone. `failed` are the self test's failures. Raises
    torch.OutOfMemoryError and DeviceLost.
    """
    device, plan, none = engine.device.name, engine.plan, engine.tiers
    for way in acceleration.ways(config, device, is_resident=plan.is_resident):
        if _is_ready(engine, config, way, failed):
            break
        # Release the copies that were made for this way.
        engine.tiers = none
        engine.device.free()


def _attempts_directory(config: EngineConfig, device: str) -> Path | None:
    """Return the directory of this GPU's attempts. The runners of one machine share the directory of compiled code."""
    directory = compile_cache_dir(config) if device == "cuda" else None
    return directory and directory / "attempts" / str(torch.cuda.get_device_properties(0).uuid)


def _is_ready(engine: FluxEngine, config: EngineConfig, way: str, failed: Mapping[str, str]) -> bool:
    """Build the tiers to run in this way, and warm up the tier "none"; return whether that worked.

    `failed` are the self test's failures. Raises torch.OutOfMemoryError and DeviceLost.
    """
    if reason := _reason(engine, way, failed.get(f"blocks {way}")):
        engine.unavailable.append(f"{way}: {reason}")
        return False
    built, unavailable = acceleration.build(engine.pipeline, config, engine.device.name, way)
    engine.tiers = built[:1]
    for tier in built[1:]:
        if reason := _reason(engine, tier.name, failed.get("blocks compiled in fp8")):
            unavailable.append(f"acceleration {tier.name}: {reason}")
        else:
            engine.tiers.append(tier)
    if engine.tiers[0].is_ready:
        return True
    try:
        with engine.attempts.attempt(way):
            engine.warm_up()
    except (torch.OutOfMemoryError, DeviceLost):
        raise
    except Exception as error:
        log.exception("the weights do not run %s", way)
        engine.unavailable.append(f"{way}: {summary(error)}")
        return False
    engine.unavailable += unavailable
    return True


def _reason(engine: FluxEngine, name: str, failure: str | None) -> str:
    """Return why a way or a tier must not be tried; empty if it may be tried."""
    if failure:
        return f"failed in the self test: {failure}"
    return "ended the server or lost the GPU at earlier starts" if engine.attempts.is_refused(name) else ""
