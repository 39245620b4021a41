"""A forward of the transformer: the selection of images that share it, and the prediction of their velocities."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from models.flux import control_nets, first_block_cache
from models.flux.prompt_cache import PromptEmbeds
from models.flux.sample import Sample
from models.flux.task import FluxTask

#: The maximum number of text and image tokens in a shared forward, enough for two images of 1024x1024. A larger batch
#: makes nothing faster on a GPU, and each of its tasks would wait for the whole batch.
TOKEN_BUDGET = 9216

#: An image in a forward: its task and its sample.
BatchItem = tuple[FluxTask, Sample]


def can_share(task: FluxTask, other: FluxTask) -> bool:
    """Return whether both tasks use the same tier and the same LoRAs, and the tier allows sharing forwards."""
    return other.tier is task.tier and other.tier.shares_forwards and other.loras == task.loras


def select_batch(due: Sequence[tuple[FluxTask, Sequence[Sample]]]) -> list[BatchItem]:
    """Return the first sample and further samples with an equal key, in order, up to TOKEN_BUDGET tokens."""
    batch: list[BatchItem] = []
    for task, samples in due:
        for sample in samples:
            is_alike = not batch or sample.key == batch[0][1].key
            if is_alike and (len(batch) + 1) * sample.num_tokens <= max(TOKEN_BUDGET, sample.num_tokens):
                batch.append((task, sample))
    return batch


def predict_velocities(transformer: Any, samples: Sequence[Sample]) -> Sequence[torch.Tensor]:
    """Predict a velocity for each of several samples with equal keys, in the shape of its latents.

    They share one forward, and a second one for the negative prompts of real guidance. A sample with a first-block
    cache must be alone.
    """
    texts = [sample.text for sample in samples]
    added = _added(transformer, samples[0], texts)
    prompts = samples[0].image_prompts
    velocities = _forward(transformer, samples, texts, {**added, **_seen_images(prompts.states if prompts else None)})
    guides = [sample.real_cfg for sample in samples if sample.real_cfg]
    if not guides:
        return velocities
    added |= _seen_images(prompts.negative if prompts else None)
    negatives = _forward(transformer, samples, [guide.text for guide in guides], added)
    return [guide.guide(*pair) for guide, *pair in zip(guides, velocities, negatives, strict=True)]


def _added(transformer: Any, sample: Sample, texts: Sequence[PromptEmbeds]) -> dict[str, Any]:
    """Return what the control nets of a sample add to the blocks of the transformer; nothing without control nets."""
    if not sample.controls:
        return {}
    inputs = {**_inputs([sample], texts), "hidden_states": sample.latents}
    return control_nets.residuals(sample.controls, sample.step, len(sample.timesteps), inputs, transformer.config)


def _seen_images(states: list[torch.Tensor] | None) -> dict[str, Any]:
    return {"joint_attention_kwargs": {"ip_hidden_states": states}} if states else {}


def _forward(
    transformer: Any, samples: Sequence[Sample], texts: Sequence[PromptEmbeds], added: Mapping[str, Any]
) -> Sequence[torch.Tensor]:
    first, inputs = samples[0], {**_inputs(samples, texts), **added}
    num_tokens = first.latents.shape[1]
    if first.cache is not None:
        return [first_block_cache.velocity(transformer, first.cache, **inputs)[:, :num_tokens]]
    velocities: Sequence[torch.Tensor] = transformer(**inputs, return_dict=False)[0][:, :num_tokens].split(1)
    return velocities


def _inputs(samples: Sequence[Sample], texts: Sequence[PromptEmbeds]) -> dict[str, Any]:
    """Return the arguments of a forward of the transformer, for the prompts or for the negative prompts."""
    first = samples[0]
    timesteps = torch.stack([sample.timestep for sample in samples])
    guidance = [sample.guidance for sample in samples]
    return {
        "hidden_states": _concatenate([_seen(sample) for sample in samples]),
        "timestep": timesteps.to(first.latents.dtype) / 1000,
        "guidance": None if first.guidance is None else _concatenate(guidance),
        "pooled_projections": _concatenate([text.pooled_prompt_embeds for text in texts]),
        "encoder_hidden_states": _concatenate([text.prompt_embeds for text in texts]),
        "txt_ids": texts[0].ids,
        "img_ids": torch.cat([first.latent_ids, first.reference.ids]) if first.reference else first.latent_ids,
    }


def _seen(sample: Sample) -> torch.Tensor:
    """Return what the transformer sees of a sample: its latents with further channels, then the reference image."""
    seen: torch.Tensor = sample.latents
    if sample.channels is not None:
        seen = torch.cat([seen, sample.channels], dim=2)
    if sample.reference is not None:
        seen = torch.cat([seen, sample.reference.latents], dim=1)
    return seen


def _concatenate(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors; return a single tensor unchanged, so that the forward matches the pipeline's exactly."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
