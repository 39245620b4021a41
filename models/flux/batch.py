"""One forward: whose generations go through it together, and where it takes each of them."""

from collections.abc import Sequence
from typing import Any

import torch

from models.flux import first_block_cache
from models.flux.sample import Sample
from models.flux.task import FluxTask

#: Tokens, of text and pictures, that go through one shared forward at most: two pictures of 1024x1024. Beyond, the
#: card has nothing left to gain, and everybody would wait for the slowest.
TOKEN_BUDGET = 9216

#: A generation that goes through a forward, and whose it is.
BatchItem = tuple[FluxTask, Sample]


def can_share(task: FluxTask, other: FluxTask) -> bool:
    """Whether both run through the same transformer, and their tier allows it."""
    return other.tier is task.tier and other.tier.shares_forwards and other.loras == task.loras


def select_batch(due: Sequence[tuple[FluxTask, Sequence[Sample]]]) -> list[BatchItem]:
    """Those that are like the first, in their order, within the token budget; the first in any case."""
    found: list[BatchItem] = []
    for task, samples in due:
        for sample in samples:
            is_alike = not found or sample.key == found[0][1].key
            if is_alike and (len(found) + 1) * sample.num_tokens <= max(TOKEN_BUDGET, sample.num_tokens):
                found.append((task, sample))
    return found


def predict_velocities(transformer: Any, samples: Sequence[Sample]) -> Sequence[torch.Tensor]:
    """One forward for one or more generations of one size: the velocity of each, of the shape of its latents."""
    first = samples[0]
    timesteps = torch.stack([sample.timestep for sample in samples])
    guidance = [sample.guidance for sample in samples]
    inputs = {
        "hidden_states": _together([sample.latents for sample in samples]),
        "timestep": timesteps.to(first.latents.dtype) / 1000,
        "guidance": None if first.guidance is None else _together(guidance),
        "pooled_projections": _together([sample.text.pooled_prompt_embeds for sample in samples]),
        "encoder_hidden_states": _together([sample.text.prompt_embeds for sample in samples]),
        "txt_ids": first.text.ids,
        "img_ids": first.latent_ids,
    }
    if first.cache is not None:
        return [first_block_cache.velocity(transformer, first.cache, **inputs)]
    found: Sequence[torch.Tensor] = transformer(**inputs, return_dict=False)[0].split(1)
    return found


def _together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor alone is passed on as it is, so that its forward is the very one the pipeline makes."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
