"""The training plans: the numbers that depend on the compute available, from a laptop to a GPU."""

import os
from dataclasses import dataclass
from pathlib import Path

from models.image_size import PRESETS

ROOT = Path(__file__).resolve().parents[3]
#: The directory of everything that the recipe writes and downloads. Nothing in it is part of the repository.
WORK = Path(os.environ.get("DEMO_WORK", ROOT / "build" / "demo"))
SEED = 20

LATENT_CHANNELS = 24
#: The side in pixels of the area that a latent covers, and of the area of a token, which packs 2 x 2 latents.
LATENT_PIXELS, TOKEN_PIXELS = 16, 32
#: FluxPipeline pads or cuts every text to this many T5 tokens, and masks none of them. FLUX.1 takes 512; captions here
#: need fewer, and each text token costs as much as an image token.
TEXT_TOKENS = 64
#: The width of both text encoders.
TEXT_WIDTH = 128


@dataclass(frozen=True)
class Plan:
    """A training plan. `batch_tokens` counts the tokens of an iteration, so large images come in smaller batches.

    `tuning_tokens` does the same for weights that see an image, and `num_examples` counts their images of 320x320: of
    larger sizes, there are fewer.
    """

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
    redux_iterations: int
    depth_iterations: int
    control_iterations: int
    fill_iterations: int
    tuning_tokens: int
    num_examples: int
    pool_size: int
    flow_iterations: int
    batch_tokens: int
    heads: int
    joint_blocks: int
    single_blocks: int
    learning_rate: float = 1.0e-3
    crop: int = 128
    #: How many scenes a chunk of the pool has, and how many chunks the pool has before the flow is trained.
    chunk: int = 128
    min_chunks: int = 14
    #: Numbers for the evaluation: prompts with one object and with two, seeds of the flagged object and of the LoRA,
    #: and images for Redux, and for each kind of weights that see an image.
    singles: int = 300
    pairs: int = 120
    flagged_seeds: int = 100
    grey_seeds: int = 20
    num_redux: int = 60
    num_edits: int = 48
    #: The number of images of each preset that are scored during training.
    num_scored: int = 16
    #: The number of steps of each image that is judged.
    num_steps: int = 20
    #: Compilation takes minutes at the start and makes training 1.4 times as fast (measured on two cores).
    is_compiled: bool = True
    #: Whether training ignores the weights in the repository.
    is_from_scratch: bool = False
    threads: int = 2
    minutes_between_checkpoints: float = 2.5
    minutes_between_sheets: float = 25.0


PLANS = {
    # For tests that every step works; the result is useless.
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
        redux_iterations=2,
        depth_iterations=2,
        control_iterations=2,
        fill_iterations=2,
        tuning_tokens=512,
        num_examples=4,
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
        num_redux=2,
        num_edits=2,
        num_scored=1,
        num_steps=2,
        minutes_between_checkpoints=0.0,
    ),
    "small": Plan(
        scale="small",
        autoencoder_iterations=4_500,
        autoencoder_batch=16,
        decoder_iterations=1_200,
        judge_iterations=1_600,
        checker_iterations=1_500,
        checker_examples=3_000,
        reading_iterations=1_000,
        lora_iterations=600,
        lora_examples=256,
        redux_iterations=2_000,
        depth_iterations=1_000,
        control_iterations=1_000,
        fill_iterations=2_000,
        tuning_tokens=2_048,
        num_examples=384,
        pool_size=12_288,
        flow_iterations=28_000,
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
        redux_iterations=20_000,
        depth_iterations=20_000,
        control_iterations=10_000,
        fill_iterations=20_000,
        tuning_tokens=16_384,
        num_examples=8_192,
        pool_size=131_072,
        flow_iterations=200_000,
        batch_tokens=32_768,
        heads=4,
        joint_blocks=2,
        single_blocks=8,
    ),
}

#: Sizes in pixels that no preset has. The small ones let training take in more prompts in the same time; with all of
#: them, the model learns to draw at sizes between the presets.
OTHER_SIZES = ((320, 320), (448, 448), (640, 448), (448, 640), (640, 640), (832, 832))
#: The share of the flow's iterations that are early. The flow first learns what words mean, mostly from small images,
#: and then how things look in large ones.
EARLY = 0.5
#: The shares of the sizes in the early iterations: of each preset, and of each of OTHER_SIZES.
_EARLY_SHARES = (0.03, 0.30, 0.04, 0.04, 0.04, 0.04), (0.15, 0.15, 0.08, 0.08, 0.04, 0.01)


def size_shares(mostly_small: bool) -> dict[tuple[int, int], float]:
    """Return the share of training images of each size in pixels. The shares add up to 1."""
    presets, others = _EARLY_SHARES if mostly_small else ((0.12,) * len(PRESETS), (0.28 / len(OTHER_SIZES),) * 6)
    return dict(zip((*PRESETS.values(), *OTHER_SIZES), (*presets, *others), strict=True))
