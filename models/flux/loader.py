"""The start of an engine: weights, safety checker, memory plan and the first warm-up."""

import dataclasses
import logging
from collections.abc import Mapping

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
    """Load the weights and the safety checker, and warm up the tier "none".

    If memory runs out, the next memory plan is tried, unless the operator chose one. If the warm-up fails, the engine
    runs in the next way of `acceleration.ways`. If the checker cannot be loaded, the requests that need it fail.

    Raises OSError if the weights cannot be loaded, and DeviceLost.
    """
    device = devices.device_for(config.device)
    is_auto = config.memory == "auto"
    while True:
        try:
            return _load(config, device, kind)
        except BaseException as error:
            # PyTorch still holds the memory of the partial load, and the next plan or other engines need it.
            Device(device).free()
            if not isinstance(error, memory_plans.DoesNotFit) or not is_auto or error.next_plan is None:
                raise
            log.warning("%s; trying the plan %s", error, error.next_plan.name)
            config = dataclasses.replace(config, memory=error.next_plan.name)


def _load(config: EngineConfig, device: str, kind: type[FluxEngine]) -> FluxEngine:
    directory = compile_cache_dir(config) if device == "cuda" else None
    if directory:
        # The self test compiles too, and what it compiled is used again.
        set_compile_cache_dirs(config)
    # Before the weights are loaded, because the self test needs memory.
    failed = verdict.failures(directory)
    pipeline, plan = load_pipeline(config)
    prior = specs.find_extra_weights(config.weights, specs.REDUX) if config.weights else None
    redux = Redux.load(prior, pipeline.transformer, device) if prior else None
    checker = safety_checker.load(config)
    log_dtype(config, pipeline.transformer, device)
    attempts = Attempts(directory)
    none = [Tier("none", pipeline.transformer)]
    engine = kind(pipeline, checker, none, device, plan=plan, redux=redux, attempts=attempts)
    for way in acceleration.ways(config, device, is_resident=plan.is_resident):
        if _is_ready(engine, config, way, failed):
            break
    return engine


def _is_ready(engine: FluxEngine, config: EngineConfig, way: str, failed: Mapping[str, str]) -> bool:
    """Build the tiers to run in this way, and warm up the tier "none"; return whether that worked.

    `failed` are the self test's failures. Raises memory_plans.DoesNotFit if memory runs out, and DeviceLost.
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
        engine.unavailable += unavailable
        return True
    except torch.OutOfMemoryError as error:
        reason = summary(error)
    except torch.AcceleratorError as error:
        raise DeviceLost(str(error)) from error
    except Exception as error:
        log.exception("the weights cannot run %s", way)
        engine.unavailable[-1] = f"{way}: {summary(error)}"
        return False
    raise memory_plans.DoesNotFit(engine.plan, reason)


def _reason(engine: FluxEngine, name: str, failure: str | None) -> str:
    """Return why a way or a tier must not be tried; empty if it may be."""
    if failure:
        return f"failed in the self test: {failure}"
    return "ended the server or lost the GPU at earlier starts" if engine.attempts.is_refused(name) else ""
