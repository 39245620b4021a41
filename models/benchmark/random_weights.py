"""A FLUX pipeline with random weights, built without a download in the shapes of FLUX.1 [dev] or in tiny shapes.

Speed and memory use depend only on the shapes, so both can be measured before the weights are downloaded. The shapes
named "full" come from FLUX.1 [dev]'s configuration files.
"""

import json
from typing import TYPE_CHECKING, Any

from models.loading.specs import DEMO

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, FluxPipeline

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "full": {
        "transformer": {"guidance_embeds": True},
        "text_encoder": {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "projection_dim": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        "text_encoder_2": {
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    },
    "tiny": {
        "transformer": {
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
            "guidance_embeds": True,
        },
        "text_encoder": {
            "vocab_size": 2048,
            "hidden_size": 32,
            "intermediate_size": 37,
            "projection_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "text_encoder_2": {
            "vocab_size": 2048,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        },
        "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2},
    },
}


def sizes(shape: str, dtype: "torch.dtype") -> dict[str, int]:
    """Return the bytes of each module's weights in `dtype`, without allocating them."""
    import torch

    with torch.device("meta"):
        modules = parts(shape)
    return {
        name: dtype.itemsize * sum(weight.numel() for weight in part.parameters()) for name, part in modules.items()
    }


def build(shape: str, device: str, dtype: "torch.dtype", seed: int = 0) -> "FluxPipeline":
    """Build a pipeline on the device in `dtype`, with the demo's tokenizers and scheduler. SHAPES lists the shapes."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTokenizer, T5TokenizerFast

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            modules = parts(shape)
    finally:
        torch.set_default_dtype(before)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(DEMO / "scheduler"),
        tokenizer=CLIPTokenizer.from_pretrained(DEMO / "tokenizer"),
        tokenizer_2=T5TokenizerFast.from_pretrained(DEMO / "tokenizer_2"),
        **{name: part.eval() for name, part in modules.items()},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def parts(shape: str) -> dict[str, Any]:
    """Build the modules with weights, by component name, on PyTorch's default device, in its default number type."""
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    shapes = SHAPES[shape]
    # CLIP takes its pooled state at the end token, so the configuration needs the token ids of the demo's tokenizer.
    demo = json.loads((DEMO / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    ends = {name: demo[name] for name in ("bos_token_id", "eos_token_id")}
    return {
        "transformer": FluxTransformer2DModel(**shapes["transformer"]),
        "text_encoder_2": T5EncoderModel(T5Config(**shapes["text_encoder_2"])),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**shapes["text_encoder"], **ends)),
        "vae": autoencoder(shape),
    }


def autoencoder(shape: str) -> "AutoencoderKL":
    """Build the autoencoder alone, as `parts` does."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **SHAPES[shape]["vae"],
    )
