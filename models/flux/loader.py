"""The start of an engine: weights, safety checker, memory plan and the first warm-up."""

import dataclasses
import logging

from models.base import EngineConfig
from models.flux import acceleration, safety_checker
from models.flux.acceleration import Tier
from models.flux.device import Device, log_dtype
from models.flux.engine import FluxEngine
from models.flux.redux import Redux
from models.loading import devices, memory_plans, specs
from models.loading.pipeline import load_pipeline

log = logging.getLogger(__name__)


def load_engine(config: EngineConfig, kind: type[FluxEngine] = FluxEngine) -> FluxEngine:
    """Load the weights and the safety checker, and warm up the tier "none".

    If memory runs out, the next memory plan is tried, unless the operator chose one. If the warm-up fails, the engine
    runs uncompiled. If the checker cannot be loaded, the requests that need it fail. Raises OSError if the weights
    cannot be loaded.
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
    pipeline, plan = load_pipeline(config)
    offered = acceleration.build(pipeline, config, device, is_resident=plan.is_resident)
    prior = specs.find_extra_weights(config.weights, specs.REDUX) if config.weights else None
    redux = Redux.load(prior, pipeline.transformer, device) if prior else None
    checker = safety_checker.load(config)
    log_dtype(config, pipeline.transformer, device)
    engine = kind(pipeline, checker, offered, device, plan=plan, redux=redux)
    if not engine.tiers[0].is_ready:
        try:
            engine.warm_up()
        except Exception:
            log.exception(
                "compiling failed, so all requests run uncompiled, with acceleration none;"
                " check that a C compiler is installed"
            )
            engine.tiers = [Tier("none", pipeline.transformer)]
    return engine
