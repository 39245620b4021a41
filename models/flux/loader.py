"""The start of an engine: weights, safety checker, memory plan and the first warm-up."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from models.base import DeviceLost, EngineConfig
from models.flux import acceleration, safety_checker, verdict
from models.flux.acceleration import Tier
from models.flux.attempts import Attempts
from models.flux.compilation import compile_cache_dir, set_compile_cache_dirs
from models.flux.control import DepthEstimator
from models.flux.decoder import COMPILED_DECODER
from models.flux.device import Device, log_dtype, summary
from models.flux.engine import FluxEngine
from models.flux.redux import Redux
from models.loading import devices, memory_plans, specs
from models.loading.pipeline import form_of, load_pipeline, quantization_of

log = logging.getLogger(__name__)

_REFUSED = "ended the server or lost the GPU at earlier starts"


def load_engine(config: EngineConfig, kind: type[FluxEngine] = FluxEngine) -> FluxEngine:
    """Load the weights and the safety checker, warm up the tier "none", and return the engine.

    If memory runs out, or no way of a memory plan works, the next plan is tried, unless the operator chose one. If the
    warm-up fails, the engine runs in the next way of `acceleration.ways`. If the checker cannot be loaded, the requests
    that need it fail.

    Raises OSError if the weights cannot be loaded, and DeviceLost if the device fails.
    """
    device = devices.device_for(config.device)
    is_auto = config.memory == "auto"
    plans = memory_plans.allowed(config.memory, config.quantize)
    failed = _self_test_failures(config, device)
    quantization = quantization_of(config.weights)
    target = memory_plans.Target(device, config.is_eager, _fp8_failure(config, device, failed), quantization)
    unavailable: list[str] = []
    while True:
        try:
            engine = _load(config, target, kind, failed)
            log.info("memory plan %s: %s", engine.plan.name, engine.plan.description)
            engine.unavailable[:0] = unavailable or (_passed_over(engine.plan, plans, target) if is_auto else [])
            return engine
        except OSError as error:
            # Without its traceback, whose frames keep the weights of this try alive.
            failure = error.with_traceback(None)
        # PyTorch still holds the memory of the partial load, and the next plan or other engines need it.
        Device(device).free()
        if not isinstance(failure, memory_plans.PlanFailed) or not is_auto:
            raise failure
        plan = memory_plans.following(failure.plan, plans, target)
        if plan is None:
            raise failure
        log.warning("%s; trying the plan %s", failure, plan.name)
        unavailable.append(f"memory plan {failure.plan.name}: {failure.reason}")
        config = dataclasses.replace(config, memory=plan.name)


def _self_test_failures(config: EngineConfig, device: str) -> Mapping[str, str]:
    """Return the message of each test that failed in the self test; the engine uses the self test's compiled code."""
    directory = compile_cache_dir(config) if device == "cuda" and not config.is_eager else None
    if directory:
        set_compile_cache_dirs(config)
    return verdict.failures(directory)


def _fp8_failure(config: EngineConfig, device: str, failed: Mapping[str, str]) -> str:
    """Return why products in fp8 do not compile on this GPU, as known from the self test or earlier starts; or ""."""
    if failure := failed.get(verdict.FP8_TEST):
        return f"failed in the self test: {failure}"
    attempts = Attempts(_attempts_directory(config, device))
    is_refused = all(attempts.is_refused(f"{way} in fp8") for way in (acceleration.FASTEST, acceleration.COMPILED))
    return _REFUSED if is_refused else ""


def _passed_over(plan: memory_plans.Plan, plans: Sequence[memory_plans.Plan], target: memory_plans.Target) -> list[str]:
    """Return why an earlier plan that needs no more memory than this one is not used."""
    return [
        f"memory plan {other.name}: {problem}"
        for other in plans[: plans.index(plan)]
        if other.required_bytes is plan.required_bytes and (problem := other.problem(target))
    ]


def _load(
    config: EngineConfig, target: memory_plans.Target, kind: type[FluxEngine], failed: Mapping[str, str]
) -> FluxEngine:
    pipeline, plan = load_pipeline(config, target.fp8_failure)
    try:
        return _assemble(config, target.device, kind, failed, pipeline, plan)
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
    """Build an engine on a loaded pipeline. Raises torch.OutOfMemoryError, DeviceLost and memory_plans.PlanFailed."""
    prior = specs.find_extra_weights(config.weights, specs.REDUX) if config.weights else None
    redux = Redux.load(prior, pipeline.transformer, device) if prior else None
    estimator = _depth_estimator(config, device, pipeline)
    checker = safety_checker.load(config)
    log_dtype(config, pipeline.transformer, device)
    attempts = Attempts(_attempts_directory(config, device))
    none = [Tier("none", pipeline.transformer)]
    engine = kind(
        pipeline,
        checker,
        none,
        device,
        plan=plan,
        redux=redux,
        depth_estimator=estimator,
        clip_vision=specs.find_extra_weights(config.weights, specs.CLIP_VISION) if config.weights else None,
        control_loras=specs.find_control_loras(config.weights, config.extra_weights) if config.weights else {},
        attempts=attempts,
    )
    engine.form = form_of(config.weights)
    warm_up_none(engine, config, failed)
    return engine


def _depth_estimator(config: EngineConfig, device: str, pipeline: Any) -> DepthEstimator | None:
    """Load the weights that find depths, if an endpoint needs them."""
    if config.weights is None or specs.DEPTH not in config.extra_weights:
        return None
    directory = specs.find_extra_weights(config.weights, specs.DEPTH)
    return DepthEstimator.load(directory, device, pipeline.transformer.dtype) if directory else None


def warm_up_none(engine: FluxEngine, config: EngineConfig, failed: Mapping[str, str]) -> None:
    """Choose the fastest way that works, build the tiers to run in this way, and warm up the tier "none".

    The engine so far has the uncompiled tier "none" alone. `failed` are the self test's failures. Raises
    torch.OutOfMemoryError, DeviceLost, and memory_plans.PlanFailed if no way works.
    """
    none = engine.tiers
    for way in acceleration.ways(config, engine.device.name, engine.plan):
        if _is_ready(engine, config, way, failed):
            engine.way = way
            if way != acceleration.UNCOMPILED:
                _offer_compiled_decoder(engine)
            elif reason := acceleration.uncompiled_reason(config, engine.device.name, engine.plan):
                engine.way = f"{way}, because {reason}"
            return
        # Release the copies that were made for this way.
        engine.tiers = none
        engine.device.free()
    raise memory_plans.PlanFailed(engine.plan, "; ".join(engine.unavailable))


def _offer_compiled_decoder(engine: FluxEngine) -> None:
    if reason := _reason(engine, COMPILED_DECODER, None):
        engine.unavailable.append(f"{COMPILED_DECODER}: {reason}")
    else:
        engine.decoder.offer_compiled()


def _attempts_directory(config: EngineConfig, device: str) -> Path | None:
    """Return the directory of this GPU's attempts. The runners of one machine share the directory of compiled code."""
    directory = compile_cache_dir(config) if device == "cuda" else None
    return directory and directory / "attempts" / str(torch.cuda.get_device_properties(0).uuid)


def _is_ready(engine: FluxEngine, config: EngineConfig, way: str, failed: Mapping[str, str]) -> bool:
    """Build the tiers to run in this way, and warm up the tier "none"; return whether that worked.

    `failed` are the self test's failures. Raises torch.OutOfMemoryError and DeviceLost.
    """
    name = f"{way} in fp8" if engine.plan.needs_fp8 else way
    if reason := _reason(engine, name, failed.get(f"blocks {way}")):
        engine.unavailable.append(f"{name}: {reason}")
        return False
    built, unavailable = acceleration.build(engine.pipeline, config, engine.plan, way)
    engine.tiers = built[:1]
    multiplies_in_fp8 = engine.plan.needs_fp8 or acceleration.needs_fp8_copy(engine.pipeline.transformer, engine.plan)
    fp8_failure = failed.get(verdict.FP8_TEST) if multiplies_in_fp8 else None
    for tier in built[1:]:
        if not tier.is_ready and (reason := _reason(engine, tier.name, fp8_failure)):
            unavailable.append(f"acceleration {tier.name}: {reason}")
        else:
            engine.tiers.append(tier)
    if engine.tiers[0].is_ready:
        engine.unavailable += unavailable
        return True
    try:
        with engine.attempts.attempt(name):
            engine.warm_up()
    except (torch.OutOfMemoryError, DeviceLost):
        raise
    except Exception as error:
        log.exception("the weights do not run %s", name)
        engine.unavailable.append(f"{name}: {summary(error)}")
        return False
    engine.unavailable += unavailable
    return True


def _reason(engine: FluxEngine, name: str, failure: str | None) -> str:
    """Return why a way or a tier must not be tried; empty if it may be tried."""
    if failure:
        return f"failed in the self test: {failure}"
    return _REFUSED if engine.attempts.is_refused(name) else ""
