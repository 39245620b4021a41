"""First-block cache: skips the later blocks if the first block's residual is close to that of the last full forward.

diffusers implements this cache as hooks on a transformer's blocks. The hooks keep their state by name and prevent
compiling whole blocks. Here, each image has a separate state, and the compiled blocks stay unchanged.
`tests/parity/test_first_block_cache.py` checks that both caches give identical images.
"""

from dataclasses import dataclass
from typing import Any

import torch

#: Up to this relative change of the first block's residual since the last full forward, the later blocks are skipped.
#: The authors of the method use this value for FLUX.1 [dev]. The saving on the real model is not measured yet.
THRESHOLD = 0.08


@dataclass
class FirstBlockCache:
    """The cache of one image, from its last full forward. A residual has the shape (1, image tokens, width).

    Attributes:
        threshold: the largest relative change of `head` at which the later blocks are skipped.
        head: the first block's residual: its output minus its input; None before the first forward.
        tail: the residual of all later blocks together; None before the first forward.
        num_skipped: the number of forwards that skipped the later blocks.
    """

    threshold: float = THRESHOLD
    head: torch.Tensor | None = None
    tail: torch.Tensor | None = None
    num_skipped: int = 0

    def can_skip(self, head: torch.Tensor) -> bool:
        """Return whether `head` is close enough to the head of the last full forward to use `tail` again.

        The comparison waits until the device has computed `head`.
        """
        if self.head is None:
            return False
        change = (head - self.head).abs().mean() / self.head.abs().mean()
        return bool(change.item() <= self.threshold)


def velocity(transformer: Any, cache: FirstBlockCache, *, img_ids: Any, txt_ids: Any, **inputs: Any) -> torch.Tensor:
    """Return a FluxTransformer2DModel's output for one image; use and update `cache`. `inputs` are the model's own."""
    image = transformer.x_embedder(inputs["hidden_states"])
    scalars = [inputs["timestep"].to(image.dtype) * 1000]
    if inputs["guidance"] is not None:
        scalars.append(inputs["guidance"].to(image.dtype) * 1000)
    temb = transformer.time_text_embed(*scalars, inputs["pooled_projections"])
    text = transformer.context_embedder(inputs["encoder_hidden_states"])
    shared = {"temb": temb, "image_rotary_emb": transformer.pos_embed(torch.cat((txt_ids, img_ids)))}
    blocks: list[Any] = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    before = image
    text, image = blocks[0](hidden_states=image, encoder_hidden_states=text, joint_attention_kwargs=None, **shared)
    head = image - before
    if cache.can_skip(head) and cache.tail is not None:
        cache.num_skipped += 1
        image = cache.tail + image
    else:
        after_first = image
        for block in blocks[1:]:
            text, image = block(hidden_states=image, encoder_hidden_states=text, joint_attention_kwargs=None, **shared)
        cache.head, cache.tail = head, image - after_first
    output: torch.Tensor = transformer.proj_out(transformer.norm_out(image, temb))
    return output
