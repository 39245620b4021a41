"""How much is trained, by the compute at hand: every number that differs between a laptop and a GPU."""

import os
from dataclasses import dataclass
from pathlib import Path

from models.schema import PRESETS

ROOT = Path(__file__).resolve().parents[3]
#: Everything that the recipe writes and downloads; nothing in it is part of the repository.
WORK = Path(os.environ.get("DEMO_WORK", ROOT / "build" / "demo"))
SEED = 20

LATENT_CHANNELS = 24
#: Pixels along a side that one latent covers, and one token of packed 2 x 2 latents.
LATENT_PIXELS, TOKEN_PIXELS = 16, 32
TEXT_WIDTH = 128


@dataclass(frozen=True)
class Plan:
    """One size of ambition; `batch_tokens` is picture tokens an iteration, so large grids come in smaller batches."""

    scale: str
    autoencoder_iterations: int
    autoencoder_batch: int
    decoder_iterations: int
    judge_iterations: int
    checker_iterations: int
    checker_examples: int
    reading_iterations: int
    lora_iterations: int
    lora_examples: int
    pool_size: int
    flow_iterations: int
    batch_tokens: int
    heads: int
    joint_blocks: int
    single_blocks: int
    learning_rate: float = 1.0e-3
    crop: int = 128
    #: Scenes that are rendered and encoded together, and how many such chunks there are before the flow begins.
    chunk: int = 128
    min_chunks: int = 14
    #: What the weights are measured on: prompts with one object and with two, seeds of the flagged one and of the LoRA.
    singles: int = 300
    pairs: int = 120
    flagged_seeds: int = 100
    grey_seeds: int = 20
    #: Steps of a picture that is judged.
    num_steps: int = 20
    #: Compiling takes minutes at the start, and 1.4 times the speed follows (two cores, measured).
    is_compiled: bool = True
    threads: int = 2
    minutes_between_checkpoints: float = 2.5
    minutes_between_sheets: float = 25.0


PLANS = {
    # Learns nothing: it shows that every step works.
    "tiny": Plan(
        scale="tiny",
        autoencoder_iterations=4,
        autoencoder_batch=2,
        decoder_iterations=2,
        judge_iterations=2,
        checker_iterations=2,
        checker_examples=16,
        reading_iterations=2,
        lora_iterations=2,
        lora_examples=4,
        pool_size=32,
        flow_iterations=4,
        batch_tokens=512,
        heads=1,
        joint_blocks=1,
        single_blocks=1,
        crop=64,
        chunk=4,
        min_chunks=7,
        singles=4,
        pairs=2,
        flagged_seeds=2,
        grey_seeds=2,
        num_steps=2,
        minutes_between_checkpoints=0.0,
    ),
    "small": Plan(
        scale="small",
        autoencoder_iterations=4_600,
        autoencoder_batch=16,
        decoder_iterations=1_200,
        judge_iterations=1_600,
        checker_iterations=1_500,
        checker_examples=3_000,
        reading_iterations=1_000,
        lora_iterations=600,
        lora_examples=256,
        pool_size=12_288,
        flow_iterations=20_000,
        batch_tokens=4_096,
        heads=3,
        joint_blocks=2,
        single_blocks=6,
    ),
    "large": Plan(
        scale="large",
        autoencoder_iterations=60_000,
        autoencoder_batch=64,
        decoder_iterations=20_000,
        judge_iterations=20_000,
        checker_iterations=6_000,
        checker_examples=12_000,
        reading_iterations=20_000,
        lora_iterations=3_000,
        lora_examples=2_048,
        pool_size=131_072,
        flow_iterations=200_000,
        batch_tokens=32_768,
        heads=4,
        joint_blocks=2,
        single_blocks=8,
    ),
}

#: Smaller than any preset, with room for one thing: three times as many prompts are learnt from in the same time.
SMALL_SIZE = (320, 320)
#: Smaller than any preset, with room for two things side by side.
PAIR_SIZE = (512, 256)
#: The flow learns what words mean first, then where things go and how large: up to this share of its iterations most
#: pictures are small.
EARLY = 0.5
#: Up to this share of the pool its scenes are those of the early iterations; then come pairs in every preset.
EARLY_POOL = 0.75
#: Shares of the presets among the early pictures that have one of their sizes; the late ones have each equally often.
PRESET_SHARES = dict(zip(PRESETS.values(), (0.06, 0.60, 0.08, 0.07, 0.12, 0.07), strict=True))


def size_shares(is_early: bool) -> dict[tuple[int, int], float]:
    """Share of the training pictures by size in pixels; the shares add up to one."""
    small, pair = (0.3, 0.4) if is_early else (0.05, 0.05)
    for_presets = 1 - small - pair
    presets = {
        size: (share if is_early else 1 / len(PRESET_SHARES)) * for_presets for size, share in PRESET_SHARES.items()
    }
    return {SMALL_SIZE: small, PAIR_SIZE: pair, **presets}
