"""A cache of encoded prompts."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

#: The number of text tokens of FLUX.1, padding included, and the most that FluxPipeline takes.
FLUX_TEXT_TOKENS = 512


def count_text_tokens(pipeline: Any) -> int:
    """Return how many text tokens each prompt takes, padding included, as the weights' T5 tokenizer says.

    Fewer would be faster, but would change the image, because padding is not masked.
    """
    return min(FLUX_TEXT_TOKENS, int(pipeline.tokenizer_2.model_max_length))


@dataclass(frozen=True)
class PromptEmbeds:
    """An encoded prompt: T5's states (1, tokens, width), CLIP's pooled state (1, width), position ids (tokens, 3)."""

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    ids: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """The size on the device, in bytes."""
        return sum(part.nbytes for part in (self.prompt_embeds, self.pooled_prompt_embeds, self.ids))


class PromptCache:
    """A least-recently-used cache of encoded prompts, kept on the device. Each prompt takes 4 MB for FLUX.1."""

    def __init__(self, device: str, max_bytes: int = 256_000_000) -> None:
        self.device = device
        self.max_bytes = max_bytes
        self._cache: OrderedDict[Hashable, PromptEmbeds] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """The size of all cached prompts on the device, in bytes."""
        return sum(text.num_bytes for text in self._cache.values())

    def evict(self) -> None:
        """Remove all prompts from the cache."""
        self._cache.clear()

    # With gradients, other kernels would run, and the last bits would differ from the pipeline's.
    @torch.no_grad()
    def encode(self, prompt: str, pipeline: Any, encoders: Hashable = ()) -> PromptEmbeds:
        """Return the prompt as the pipeline encodes it, from the cache if possible.

        `encoders` is part of the key: pass the LoRAs of the pipeline, because they change its text encoders.
        """
        key = (prompt, encoders)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        max_sequence_length = count_text_tokens(pipeline)
        text = PromptEmbeds(
            *pipeline.encode_prompt(prompt, None, device=self.device, max_sequence_length=max_sequence_length)
        )
        self._cache[key] = text
        while self.num_bytes > self.max_bytes and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return text
