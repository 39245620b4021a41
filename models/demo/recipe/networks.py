"""The networks that are trained together: the transformer and its two text encoders."""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux

from models.demo.recipe import tokens
from models.demo.recipe.plan import LATENT_CHANNELS, TEXT_TOKENS, TEXT_WIDTH, Plan

#: The maximum number of CLIP tokens.
CLIP_TOKENS = 77
HEAD_WIDTH = 64


@dataclass(frozen=True)
class Kept:
    """Some of an image's tokens: their indices, and how many tokens each stands for."""

    indices: torch.Tensor
    copies: torch.Tensor


#: What the transformer reads: the states of the text tokens, (batch, tokens, width), and a pooled one, (batch, width).
Text = tuple[torch.Tensor, torch.Tensor]


def build_transformer(plan: Plan) -> Any:
    """Build a FluxTransformer2DModel that predicts 0 at first: its blocks start switched off, as in DiT."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=plan.joint_blocks,
        num_single_layers=plan.single_blocks,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=plan.heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if name.startswith(("proj_out", "norm_out.linear")) or (".norm" in name and ".linear" in name):
                weight.zero_()
    return transformer


def use_explicit_attention() -> None:
    """Let FLUX's transformers compute attention by matrix products and a softmax instead of PyTorch's fused function.

    Its mask lets a kept token stand for several. And measured on a CPU with AMX, the fused function took a third of the
    time of an iteration, most of it backward. At the demo's sizes, the matrix of weights between all tokens is small.
    """
    transformer_flux.dispatch_attention_fn = _attention


@contextlib.contextmanager
def first_token_counts(copies: int) -> Iterator[None]:
    """Let FLUX's transformers compute attention as if the first token were there this many times.

    Equal text tokens stay equal in every layer, because FLUX gives all of them the same position. So one is enough.
    """
    before = transformer_flux.dispatch_attention_fn
    transformer_flux.dispatch_attention_fn = functools.partial(_attention, copies_of_first=copies)
    try:
        yield
    finally:
        transformer_flux.dispatch_attention_fn = before


class _Scores(torch.autograd.Function):  # type: ignore[misc]
    """The product of queries and keys, whose gradient for the keys is not transposed.

    Measured with PyTorch 2.13 on a CPU with AVX-512: compiled, a transposed gradient had values that are not finite.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(query, key)
        return query @ key.transpose(-1, -2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ key, gradient.transpose(-1, -2).contiguous() @ query


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    copies_of_first: int = 1,
    attn_mask: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    """Compute attention. All tensors have the shape (batch, tokens, heads, width); the mask is added to the scores."""
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    scores = (_Scores.apply(query, key) * query.shape[-1] ** -0.5).float()
    if attn_mask is not None:
        scores = scores + attn_mask
    if copies_of_first > 1:
        scores = torch.cat([scores[..., :1] + math.log(copies_of_first), scores[..., 1:]], dim=-1)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def build_text_encoder(num_tokens: int) -> Any:
    """Build CLIP's text model, which pools at the first end token; the end token has the last id."""
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=num_tokens,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=num_tokens - 2,
            eos_token_id=num_tokens - 1,
            pad_token_id=num_tokens - 1,
        )
    )


def build_text_encoder_2(num_tokens: int) -> Any:
    """Build T5's encoder."""
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=num_tokens,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


class Painter(torch.nn.Module):  # type: ignore[misc]
    """The model: it predicts velocities from noisy latents, times and texts, as FluxPipeline's networks do together."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.tokenizer, self.tokenizer_2 = tokens.load()
        self.transformer = build_transformer(plan)
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.text_encoder_2 = build_text_encoder_2(len(self.tokenizer_2))

    def encode(self, texts: list[str]) -> Text:
        """Return T5's states of TEXT_TOKENS tokens, padding included, and CLIP's pooled state."""
        device = self.transformer.device
        clip = self.tokenizer(texts, padding=True, truncation=True, max_length=CLIP_TOKENS, return_tensors="pt")
        pooled = self.text_encoder(clip.input_ids.to(device)).pooler_output
        return self.text_encoder_2(t5_tokens(self.tokenizer_2, texts).to(device)).last_hidden_state, pooled

    def forward(
        self,
        latents: torch.Tensor,
        sigmas: torch.Tensor,
        guidance: torch.Tensor,
        text: Text,
    ) -> torch.Tensor:
        """Return velocities in the shape of the latents, (batch, channels, height, width)."""
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        return unpack(self.packed(latents, sigmas, guidance, text), height, width)

    def packed(
        self,
        latents: torch.Tensor,
        sigmas: torch.Tensor,
        guidance: torch.Tensor,
        text: Text,
        kept: Kept | None = None,
        channels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return packed velocities of the image tokens in `kept`, which alone the transformer sees.

        The default is all tokens. Kept tokens need `use_explicit_attention`. `channels` are what the transformer sees
        of each token next to its latents, (batch, tokens, channels).
        """
        states, pooled = text
        device = latents.device
        hidden, ids = pack(latents), positions(latents.shape[2] // 2, latents.shape[3] // 2).to(device)
        if channels is not None:
            hidden = torch.cat([hidden, channels], dim=2)
        options = {}
        if kept is not None:
            indices, copies = kept.indices.to(device), kept.copies.to(device)
            hidden, ids = hidden[:, indices], ids[indices]
            # Text tokens come first.
            options["attention_mask"] = torch.cat([torch.zeros_like(states[0, :, 0]), copies.log()])
        velocity: torch.Tensor = self.transformer(
            hidden_states=hidden,
            timestep=sigmas,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=device),
            img_ids=ids,
            joint_attention_kwargs=options,
            return_dict=False,
        )[0]
        return velocity.float()


def t5_tokens(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return the T5 tokens of texts, of shape (texts, TEXT_TOKENS), as FluxPipeline makes them."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
    tokens_of_texts: torch.Tensor = encoded.input_ids
    return tokens_of_texts


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Pack (batch, channels, 2h, 2w) into (batch, h * w, 4 * channels), as FluxPipeline does."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack(cells: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Undo `pack`; `height` and `width` are in tokens."""
    batch, _, channels = cells.shape
    latents = cells.view(batch, height, width, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(batch, channels // 4, 2 * height, 2 * width)


def positions(height: int, width: int) -> torch.Tensor:
    """Return (0, row, column) of each image token, as FluxPipeline numbers them."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return ids.reshape(-1, 3)
