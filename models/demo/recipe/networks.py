"""The networks that are trained together: the transformer and its two text encoders."""

import math
from typing import Any

import torch
import transformers
from diffusers import FluxTransformer2DModel

from models.demo.recipe import tokens
from models.demo.recipe.plan import LATENT_CHANNELS, TEXT_WIDTH, Plan

#: FluxPipeline pads every text to this many T5 tokens and masks none of them.
TEXT_TOKENS = 512
#: The maximum number of CLIP tokens.
CLIP_TOKENS = 77
#: Training pads T5's texts to at least this, which is enough for nearly all captions, so that few shapes are compiled.
SHORT_TEXT = 32
HEAD_WIDTH = 64
#: Two channels of T5's states are reserved as markers: one is nonzero only in padding, the other only in words.
PAD, WORD = 0, 1
#: The value of padding's marker. After the norm, all other channels of a padding token are negligible next to it, so
#: all padding tokens come out the same.
PAD_SIZE = 1.0e6
#: The weight that keeps words from attending to padding.
GATE = 12.0


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
    """Build T5's encoder with pinned padding (see `pin`)."""
    model = transformers.T5EncoderModel(
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
    pin(model)
    return model


@torch.no_grad()
def pin(t5: Any) -> None:
    """Set weights so that padding does not affect words, because FluxPipeline does not mask padding.

    Words do not attend to padding: in every head, one channel of query and key is nonzero only between a word and
    padding, where it makes the attention score hugely negative. All padding tokens have the same state, because their
    marker is far larger than anything that is added. The states of words are then the same for any amount of padding,
    and a few padding tokens can stand for hundreds in training (`Painter.encode`).
    """
    t5.shared.weight[:, PAD] = 0
    t5.shared.weight[:, WORD] = 1
    t5.shared.weight[0] = 0
    t5.shared.weight[0, PAD] = PAD_SIZE
    head = t5.config.d_kv
    for block in t5.encoder.block:
        attention, feed_forward = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        attention.q.weight[::head] = 0
        attention.q.weight[::head, WORD] = GATE
        attention.k.weight[::head] = 0
        attention.k.weight[::head, PAD] = -GATE
        attention.o.weight[[PAD, WORD]] = 0
        feed_forward.wo.weight[[PAD, WORD]] = 0
        for layer in block.layer:
            layer.layer_norm.weight[[PAD, WORD]] = 1
    t5.encoder.final_layer_norm.weight[[PAD, WORD]] = 1


class Painter(torch.nn.Module):  # type: ignore[misc]
    """The model: it predicts velocities from noisy latents, times and texts, as FluxPipeline's networks do together."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.tokenizer, self.tokenizer_2 = tokens.load()
        self.transformer = build_transformer(plan)
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.text_encoder_2 = build_text_encoder_2(len(self.tokenizer_2))

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return T5's states, CLIP's pooled state, and the logarithm of how many tokens each T5 token stands for.

        Texts are padded to a length of at least SHORT_TEXT, at most TEXT_TOKENS, that leaves room for padding if
        possible. The padding tokens of a text stand in equal shares for those of a text padded to TEXT_TOKENS.
        """
        device = self.transformer.device
        clip = self.tokenizer(texts, padding=True, truncation=True, max_length=CLIP_TOKENS, return_tensors="pt")
        pooled = self.text_encoder(clip.input_ids.to(device)).pooler_output
        t5 = self.tokenizer_2(texts, truncation=True, max_length=TEXT_TOKENS)["input_ids"]
        length = min(TEXT_TOKENS, max(SHORT_TEXT, 1 + max(map(len, t5))))
        padded = torch.tensor([ids + [0] * (length - len(ids)) for ids in t5], device=device)
        states = self.text_encoder_2(padded).last_hidden_state
        weights = torch.zeros(len(texts), length, device=device)
        for row, ids in zip(weights, t5, strict=True):
            if len(ids) < length:
                row[len(ids) :] = math.log((TEXT_TOKENS - len(ids)) / (length - len(ids)))
        return states, pooled, weights

    def forward(
        self,
        latents: torch.Tensor,
        sigmas: torch.Tensor,
        guidance: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Return velocities in the shape of the latents, (batch, channels, height, width)."""
        states, pooled, weights = text
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        counts = torch.cat([weights, weights.new_zeros(len(weights), height * width)], dim=1)
        # An attention mask must have the number type of the queries.
        kind = latents.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else latents.dtype
        counts = counts[:, None, None].to(dtype)
        velocity = self.transformer(
            hidden_states=pack(latents),
            timestep=sigmas,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=latents.device),
            img_ids=positions(height, width).to(latents.device),
            joint_attention_kwargs={"attention_mask": counts},
            return_dict=False,
        )[0]
        return unpack(velocity.float(), height, width)


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
