"""The warm-up of an engine: one tier, the decoder or the LoRAs of one tier at a time, so that no request compiles."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from models.flux.acceleration import Tier
from models.flux.compilation import MAX_GRAPHS, clone_sharing_weights, compile_blocks
from models.flux.decoder import COMPILED_DECODER
from models.flux.device import summary

log = logging.getLogger(__name__)

#: The ranks in the warm-up of LoRAs. They differ, so that the compiler treats no rank as a constant.
RANKS = (16, 48)


def warm_up_next(engine: Any) -> bool:
    """Make the next tier of a FluxEngine ready, then its decoder, then its LoRAs; return False if all are ready."""
    tier = next((tier for tier in engine.tiers if not tier.is_ready), None)
    if tier:
        _warm_up_tier(engine, tier)
    elif engine.decoder.is_cold:
        _warm_up_decoder(engine)
    elif tier := next((tier for tier in engine.tiers if tier.compiles_loras), None):
        _warm_up_loras(engine, tier)
    else:
        return False
    return True


def _warm_up_tier(engine: Any, tier: Tier) -> None:
    # The ways to run the tier "none" are separate attempts, which the loader makes.
    attempt = engine.attempts.attempt(tier.name) if tier.name != "none" else nullcontext()
    try:
        with attempt, _compiling(engine, tier.name):
            tier.warm_up(engine.device.name, engine.pipeline.transformer.dtype, engine.num_text_tokens)
    except Exception as error:
        engine.tiers.remove(tier)
        if tier.name != "none":
            engine.unavailable.append(f"acceleration {tier.name}: {summary(error)}")
        raise
    log.info("acceleration %s is ready", tier.name)


def _warm_up_decoder(engine: Any) -> None:
    try:
        with engine.attempts.attempt(COMPILED_DECODER), _compiling(engine, COMPILED_DECODER):
            engine.decoder.warm_up()
    except Exception as error:
        engine.unavailable.append(f"{COMPILED_DECODER}: {summary(error)}")
        raise
    log.info("the %s is ready", COMPILED_DECODER)


def _warm_up_loras(engine: Any, tier: Tier) -> None:
    """Compile a tier's blocks for LoRAs of any rank. Until then, and if that fails, LoRAs run uncompiled."""
    tier.compiles_loras, name = False, f"LoRAs with acceleration {tier.name}"
    if engine.attempts.is_refused(name):
        engine.unavailable.append(f"{name}: ended the server or lost the GPU at earlier starts")
        return
    try:
        with engine.attempts.attempt(name), _compiling(engine, name):
            # A clone, because another thread may use the tier meanwhile.
            clone = compile_blocks(clone_sharing_weights(tier.transformer))
            for rank in RANKS:
                with engine.loras.zeros(clone, rank):
                    dtype = engine.pipeline.transformer.dtype
                    tier.run_all_kinds(clone, engine.device.name, dtype, engine.num_text_tokens)
    except Exception as error:
        engine.unavailable.append(f"{name}: {summary(error)}")
        raise
    tier.lora_transformer = clone
    log.info("%s are ready", name)


@contextmanager
def _compiling(engine: Any, name: str) -> Iterator[None]:
    # The limit applies to the thread that sets it.
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    with (
        engine.device.classify_errors(name),
        engine.device.on_decode_stream(),
        # Another engine may have stopped compiling in this process.
        torch.compiler.set_stance("default"),
    ):
        yield
