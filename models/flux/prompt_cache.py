"""Prompts, encoded once: the embeddings of the last ones are kept."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

#: FLUX's own number of text tokens; fewer would be faster and another picture.
NUM_TOKENS = 512


@dataclass(frozen=True)
class PromptEmbeds:
    """An encoded prompt: T5's (1, 512, width), CLIP's pooled (1, width) and the tokens' positions (512, 3)."""

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    ids: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """What it takes on the device."""
        return sum(part.nbytes for part in (self.prompt_embeds, self.pooled_prompt_embeds, self.ids))


class PromptCache:
    """The least recently used embeddings go first. One prompt of FLUX.1 takes 4 MB."""

    def __init__(self, device: str, max_bytes: int = 256_000_000) -> None:
        self.device = device
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, PromptEmbeds] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """What all of them take."""
        return sum(text.num_bytes for text in self._kept.values())

    def evict(self) -> None:
        """Keep none."""
        self._kept.clear()

    # With gradients other kernels would run, and the last bits differ from the pipeline's.
    @torch.no_grad()
    def encode(self, prompt: str, pipeline: Any, encoders: Hashable = None) -> PromptEmbeds:
        """The prompt's embeddings, as the pipeline makes them; `encoders` tells its text encoders from others."""
        key = (prompt, encoders)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        text = PromptEmbeds(
            *pipeline.encode_prompt(prompt=prompt, prompt_2=None, device=self.device, max_sequence_length=NUM_TOKENS)
        )
        self._kept[key] = text
        while self.num_bytes > self.max_bytes and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return text
