"""A cache of encoded prompts."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

#: FLUX's number of text tokens; fewer would be faster, but would change the image.
NUM_TOKENS = 512


@dataclass(frozen=True)
class PromptEmbeds:
    """An encoded prompt: T5's (1, 512, width), CLIP's pooled (1, width) and the tokens' positions (512, 3)."""

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    ids: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Size on the device."""
        return sum(part.nbytes for part in (self.prompt_embeds, self.pooled_prompt_embeds, self.ids))


class PromptCache:
    """A cache that evicts the least recently used embeddings. One prompt of FLUX.1 takes 4 MB."""

    def __init__(self, device: str, max_bytes: int = 256_000_000) -> None:
        self.device = device
        self.max_bytes = max_bytes
        self._cache: OrderedDict[Hashable, PromptEmbeds] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Size of all cached embeddings on the device."""
        return sum(text.num_bytes for text in self._cache.values())

    def evict(self) -> None:
        """Remove all embeddings."""
        self._cache.clear()

    # With gradients, other kernels would run and the last bits would differ from the pipeline's.
    @torch.no_grad()
    def encode(self, prompt: str, pipeline: Any, encoders: Hashable = None) -> PromptEmbeds:
        """Return the embeddings as the pipeline computes them; `encoders` identifies its text encoders in the cache."""
        key = (prompt, encoders)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        text = PromptEmbeds(
            *pipeline.encode_prompt(prompt=prompt, prompt_2=None, device=self.device, max_sequence_length=NUM_TOKENS)
        )
        self._cache[key] = text
        while self.num_bytes > self.max_bytes and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return text
